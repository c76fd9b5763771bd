"""The task *histograms*: metric learning and clustering of shapes by their histograms. Imports no torch until a learner is asked for."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cad_models.config import Recipe, replace_all
from cad_models.histograms.recipe import PUBLISHED_HISTOGRAMS, RECIPE, SMOKE, SOURCE_BASELINE, SOURCE_WITH_ACTIVATIONS, HistogramRecipe
from cad_models.task import (
    LABEL_INDEX,
    Answer,
    Columns,
    InferOptions,
    Input,
    Inspection,
    Learner,
    Listing,
    NamedRun,
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
    """What ``tune.py`` searches: loss, width and depth, regularisation, learning rates, how histograms are encoded.

    Args:
        trial: An ``optuna.Trial``.
    """
    kind = trial.suggest_categorical("loss.kind", ["normalized_softmax", "arcface", "supcon", "multi_similarity"])
    values = {
        "loss.kind": kind,
        "loss.mixup": 0.0,
        "model.width": trial.suggest_categorical("model.width", [64, 128, 256]),
        "model.depth": trial.suggest_int("model.depth", 1, 3),
        "model.dropout": trial.suggest_float("model.dropout", 0.0, 0.5),
        "model.input_dropout": trial.suggest_float("model.input_dropout", 0.0, 0.3),
        "optim.lr": trial.suggest_float("optim.lr", 3e-4, 1e-2, log=True),
        "optim.weight_decay": trial.suggest_float("optim.weight_decay", 1e-3, 1.0, log=True),
        "data.encoding": trial.suggest_categorical("data.encoding", ["raw", "sqrt", "sqrt+cumulative"]),
    }
    if kind != "multi_similarity":
        values["loss.temperature"] = trial.suggest_float("loss.temperature", 0.03, 0.3, log=True)
    if kind in ("normalized_softmax", "arcface"):
        values["loss.mixup"] = trial.suggest_categorical("loss.mixup", [0.0, 0.1, 0.4])
    return values


class HistogramTask(Task):
    """See ``cad_models/histograms/README.md``."""

    name = "histograms"
    recipe = RECIPE
    smoke = SMOKE
    score = Score(name="val/nearest_centre_accuracy", mode="max")
    best_metrics = {
        "nearest_centre": "val/nearest_centre_accuracy",
        "knn": "val/knn_accuracy",
        "retrieval": "val/recall@1",
    }
    search_space = staticmethod(search_space)
    reference_split = "train"
    report_splits = ("val", "test")
    combine_rules = ("concatenate",)
    requirements = ("scipy", "embreex", "numba", "pytorch-metric-learning", "scikit-learn")
    runs = {
        "source_baseline": NamedRun(
            changes=SOURCE_BASELINE,
            note="the source system's published model: 128 -> 4 x 32 -> 16 without activations, pairwise cosine loss, 400 epochs, batches of 8",
        ),
        "source_with_activations": NamedRun(
            changes=SOURCE_WITH_ACTIVATIONS, note="the same network and loss with ReLU and standardised inputs"
        ),
        "published_histograms": NamedRun(
            changes=PUBLISHED_HISTOGRAMS, seeds=(0, 1, 2), note="for the source system's JSON files: model and hull histograms, 128 bins each"
        ),
        "generated_shapes": NamedRun(changes={}, seeds=(0, 1, 2), note="for meshes: shape distributions in the affine frame"),
    }

    def list_raw(self, source: str) -> Listing:
        from cad_models.histograms.data import list_source

        return list_source(source)

    def inspect(self, item: RawItem, recipe: HistogramRecipe) -> Inspection | Reject:
        from cad_models.histograms.data import inspect_item

        return inspect_item(item)

    def duplicates(self, inspections: Sequence[Inspection]) -> list[int]:
        from cad_models.histograms.data import duplicates

        return duplicates(inspections)

    def prepare(self, item: RawItem, recipe: HistogramRecipe) -> Row | Reject:
        from cad_models.histograms.data import prepare_item

        return prepare_item(item, recipe)

    def prepare_settings(self, recipe: HistogramRecipe) -> dict[str, Any]:
        return {"log2_chords": recipe.data.log2_chords}

    def schemas(self, recipe: HistogramRecipe) -> dict[str, pa.Schema]:
        from cad_models.histograms.data import schemas

        return schemas()

    def columns(self, recipe: HistogramRecipe) -> dict[str, list[str]]:
        return {"objects": ["histograms", "distributions", LABEL_INDEX]}

    def examples(self, tables: dict[str, pa.Table], recipe: HistogramRecipe) -> Columns:
        from cad_models.histograms.data import examples

        return examples(tables, recipe)

    def collate(self, columns: Columns, recipe: HistogramRecipe, *, rngs: Sequence[np.random.Generator] | None) -> dict[str, Any]:
        from cad_models.histograms.data import collate

        return collate(columns)

    def learner(self, recipe: HistogramRecipe, signature: dict[str, Any]) -> Learner:
        from cad_models.histograms.learner import build

        return build(recipe, signature)

    def signature(self, recipe: HistogramRecipe, dataset: dict[str, Any]) -> dict[str, Any]:
        from cad_models.histograms.features import feature_width

        manifest, data = dataset["manifest"], recipe.data
        return {
            "class_names": list(manifest.class_names),
            "inputs": list(data.inputs),
            "bins": data.bins,
            "encoding": data.encoding,
            "log2_chords": manifest.settings["log2_chords"],
            "feature_width": feature_width(data),
            "embed_dim": recipe.model.num_networks * recipe.model.embed_dim,
            "dataset_digest": manifest.digest,
        }

    def evaluate(self, predictions: Predictions, reference: Predictions | None = None) -> dict[str, float]:
        from cad_models.histograms.metrics import embedding_metrics

        return embedding_metrics(predictions, reference)

    def references(self, columns: Columns, recipe: HistogramRecipe, reference: Columns | None = None) -> dict[str, dict[str, float]]:
        from cad_models.histograms.metrics import untrained_metrics

        return untrained_metrics(columns, reference)

    def report(
        self, predictions: Mapping[str, Predictions], *, recipe: HistogramRecipe, signature: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> dict[str, bytes]:
        from cad_models.histograms.report import report

        return report(
            predictions,
            reference_split=self.reference_split,
            class_names=signature["class_names"],
            num_clusters=recipe.clustering.num_clusters,
            metrics=metrics,
        )

    def baseline_recipes(self, recipe: HistogramRecipe) -> dict[str, Recipe]:
        values = {"model.activation": "none", "model.residual": False, "model.width": 32, "model.depth": 1, "model.num_networks": 1}
        return {"linear map": replace_all(recipe, values)}

    def combine(
        self,
        members: Sequence[Predictions],
        *,
        rule: str | None = None,
        weights: Sequence[float] | None = None,
        fitted: Mapping[str, Any] | None = None,
    ) -> Predictions:
        """See `cad_models.histograms.answers.combine_embeddings`."""
        from cad_models.histograms.answers import combine_embeddings

        return {**members[0], "embedding": combine_embeddings([m["embedding"] for m in members], weights)}

    def list_requests(
        self, queries: str | Sequence[str], gallery: str | None, *, direction: str = "auto", options: InferOptions | None = None
    ) -> Requests:
        from cad_models.histograms.answers import list_requests

        return list_requests(queries, gallery, direction=direction)

    def predictor(self, members: "Sequence[Member]", *, device: str = "cpu", options: InferOptions | None = None) -> Predictor:
        from cad_models.histograms.answers import HistogramPredictor

        return HistogramPredictor(members, device=device)

    def read_input(self, item: Input, settings: Any) -> Columns | Reject:
        from cad_models.histograms.answers import read_input

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
        from cad_models.histograms.answers import rank

        return rank(search, outputs, weights=weights, top_k=top_k, signatures=signatures)

    def submission(self, answers: Sequence[Answer], *, options: InferOptions | None = None) -> list[list[str]]:
        from cad_models.histograms.answers import submission

        return submission(answers)
