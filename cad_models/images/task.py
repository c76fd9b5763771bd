"""The task *images*: classification of pictures, with ensembles of seeds. Imports no torch until a learner is asked for."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cad_models.config import Recipe, replace_all
from cad_models.images.options import ImagesOptions
from cad_models.images.recipe import RECIPE, SMOKE, ImagesRecipe
from cad_models.images.runs import RUNS
from cad_models.task import (
    LABEL_INDEX,
    Answer,
    Columns,
    InferOptions,
    Input,
    Inspection,
    Learner,
    Listing,
    Predictions,
    Predictor,
    RawItem,
    Reject,
    Requests,
    Row,
    Score,
    Search,
    Task,
)

if TYPE_CHECKING:
    from cad_models.checkpoint import Member


def search_space(trial: Any) -> dict[str, Any]:
    """What ``tune.py`` searches: model, augmentation, learning rate and decay, dropout, smoothing.

    Args:
        trial: An ``optuna.Trial``.
    """
    lr = trial.suggest_float("optim.lr", 3e-4, 6e-3, log=True)
    return {
        "model.name": trial.suggest_categorical("model.name", ["simple_cnn", "simple_cnn_v2", "hog"]),
        "data.augment.preset": trial.suggest_categorical("data.augment.preset", ["baseline", "ensemble_1", "ensemble_2"]),
        "optim.lr": lr,
        # The last layers are trained from scratch like the others.
        "optim.head_lr": lr,
        "optim.weight_decay": trial.suggest_float("optim.weight_decay", 1e-4, 0.1, log=True),
        "model.dropout": trial.suggest_float("model.dropout", 0.0, 0.5),
        "loss.label_smoothing": trial.suggest_float("loss.label_smoothing", 0.0, 0.15),
    }


class ImagesTask(Task):
    """See ``cad_models/images/README.md``."""

    name = "images"
    recipe = RECIPE
    smoke = SMOKE
    score = Score(name="val/macro_f1", mode="max")
    best_metrics = {"macro_f1": "val/macro_f1"}
    search_space = staticmethod(search_space)
    history_columns = {
        "train_loss": "train/loss",
        "train_acc": "train/accuracy",
        "train_f1": "train/macro_f1",
        "val_loss": "val/log_loss",
        "val_acc": "val/accuracy",
        "val_f1": "val/macro_f1",
    }
    report_splits = ("val", "test")
    runs = RUNS
    combine_rules = ("soft", "hard", "weighted", "stacked", "tuned")
    fitted_rules = ("weighted", "stacked", "tuned")
    infer_options = ImagesOptions
    preview_source = ("views", "image")

    # prepare ------------------------------------------------------------------------------------------------------------------------------
    def list_raw(self, source: str) -> Listing:
        from cad_models.images.sources import list_source

        return list_source(source)

    def inspect(self, item: RawItem, recipe: ImagesRecipe) -> Inspection | Reject:
        from cad_models.images.data import inspect_item

        return inspect_item(item)

    def duplicates(self, inspections: Sequence[Inspection]) -> list[int]:
        """Pictures of equal pixels."""
        first: dict[bytes, int] = {}
        return [first.setdefault(inspection.signature.tobytes(), i) for i, inspection in enumerate(inspections)]

    def prepare(self, item: RawItem, recipe: ImagesRecipe) -> Row | Reject:
        from cad_models.images.data import prepare_item

        return prepare_item(item, recipe)

    def prepare_settings(self, recipe: ImagesRecipe) -> dict[str, Any]:
        return {"stored_size": recipe.data.stored_size}

    def schemas(self, recipe: ImagesRecipe) -> dict[str, pa.Schema]:
        from cad_models.images.data import schemas

        return schemas(recipe)

    # train --------------------------------------------------------------------------------------------------------------------------------
    def columns(self, recipe: ImagesRecipe) -> dict[str, list[str]]:
        return {"objects": ["pixels", "width", "height", LABEL_INDEX]}

    def examples(self, tables: dict[str, pa.Table], recipe: ImagesRecipe) -> Columns:
        from cad_models.images.data import examples

        return examples(tables, recipe)

    def collate(self, columns: Columns, recipe: ImagesRecipe, *, rngs: Sequence[np.random.Generator] | None) -> dict[str, Any]:
        from cad_models.images.data import collate

        return collate(columns, recipe, rngs=rngs)

    def learner(self, recipe: ImagesRecipe, signature: dict[str, Any]) -> Learner:
        from cad_models.images.learner import build

        return build(recipe, signature)

    def signature(self, recipe: ImagesRecipe, dataset: dict[str, Any]) -> dict[str, Any]:
        manifest = dataset["manifest"]
        names = manifest.class_names
        if len(names) < 2:
            raise ValueError(f"the dataset has one class only, {names[0]!r}: a classifier needs two or more")
        counts = manifest.class_counts("train")
        return {
            "class_names": list(names),
            "class_counts": [counts[name] for name in names],
            "image_size": recipe.data.image_size,
            "stored_size": manifest.settings["stored_size"],
            "num_channels": recipe.model.num_channels,
            "dataset_digest": manifest.digest,
        }

    signature_notes = ("dataset_digest", "class_counts")

    def evaluate(self, predictions: Predictions, reference: Predictions | None = None) -> dict[str, float]:
        from cad_models.images.metrics import classification_metrics

        return classification_metrics(predictions["probabilities"], predictions["label"])

    def references(self, columns: Columns, recipe: ImagesRecipe, reference: Columns | None = None) -> dict[str, dict[str, float]]:
        from cad_models.images.metrics import chance_metrics

        return {"most frequent class": chance_metrics(columns["label"], int(columns["label"].max(initial=0)) + 1)}

    def report(
        self, predictions: Mapping[str, Predictions], *, recipe: ImagesRecipe, signature: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> dict[str, bytes]:
        from cad_models.images.report import build_report

        return build_report(predictions, signature["class_names"], metrics)

    def baseline_recipes(self, recipe: ImagesRecipe) -> dict[str, Recipe]:
        other = "simple_cnn" if recipe.model.name != "simple_cnn" else "simple_cnn_v2"
        return {other: replace_all(recipe, {"model.name": other})}

    def fit_rule(self, members: Sequence[Predictions], *, rule: str) -> dict[str, Any]:
        from cad_models.images.ensembling import fit

        return fit([m["probabilities"] for m in members], members[0]["label"], rule=rule)

    def combine(
        self,
        members: Sequence[Predictions],
        *,
        rule: str | None = None,
        weights: Sequence[float] | None = None,
        fitted: Mapping[str, Any] | None = None,
    ) -> Predictions:
        """See `cad_models.images.ensembling`."""
        from cad_models.images.ensembling import combine

        probabilities = combine([m["probabilities"] for m in members], rule=rule or self.combine_rules[0], weights=weights, fitted=fitted)
        return {"probabilities": probabilities, "label": members[0]["label"]}

    # infer --------------------------------------------------------------------------------------------------------------------------------
    def list_requests(
        self, queries: str | Sequence[str], gallery: str | None, *, direction: str = "auto", options: InferOptions | None = None
    ) -> Requests:
        from cad_models.images.answers import list_requests

        if gallery is not None:
            raise ValueError(f"--gallery {gallery}: a classifier's answers are labels, it has no gallery; leave the flag out")
        return list_requests(queries, direction=direction)

    def predictor(self, members: "Sequence[Member]", *, device: str = "cpu", options: InferOptions | None = None) -> Predictor:
        from cad_models.images.answers import ImagesPredictor

        return ImagesPredictor(members, device=device, options=options or ImagesOptions())

    def read_input(self, item: Input, settings: Any) -> Columns | Reject:
        from cad_models.images.answers import read_input

        return read_input(item, settings)

    def rank(
        self,
        search: Search,
        outputs: Mapping[int, list[np.ndarray]],
        *,
        rule: str,
        weights: Sequence[float],
        top_k: int,
        fitted: Mapping[str, Any] | None = None,
        signatures: Sequence[Mapping[str, Any]] = (),
        options: InferOptions | None = None,
    ) -> list[Answer]:
        from cad_models.images.answers import rank

        return rank(search, outputs, rule=rule, weights=weights, top_k=top_k, fitted=fitted, signatures=signatures)

    def submission(self, answers: Sequence[Answer], *, options: InferOptions | None = None) -> list[list[str]]:
        from cad_models.images.answers import submission

        return submission(answers, options or ImagesOptions())
