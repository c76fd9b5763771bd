"""The task *alignment*: image <-> 3D CAD retrieval. Imports no torch until a learner is asked for."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cad_models.alignment.options import AlignmentOptions
from cad_models.alignment.recipe import QUERY_CONDITIONS, RECIPE, SMOKE, AlignmentRecipe
from cad_models.config import Recipe, replace_all
from cad_models.task import (
    Answer,
    Columns,
    EmbedColumn,
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
    """What ``tune.py`` searches: experts and how many of them answer, temperature, learning rates, weight decay, EMA, changed views, augmentation, views a step,
    the loss between images.

    Most ranges reach about two times to either side of the default recipe: in wider ones most trials of a short search are wasted. The default reads 8 views a
    step and hardly decays its weights because that is quick; what longer steps and shrunken weights bring is for the search. Experts always have the residual
    linear path, for without it they do not beat one linear layer (the room's README). An EMA of 0.99 is the slowest that a short run can tell from others:
    in its first 264 steps the average's own warm-up keeps it below 0.97.

    Args:
        trial: An ``optuna.Trial``.
    """
    num_experts = trial.suggest_categorical("model.num_experts", [1, 2, 4, 8, 16])
    values = {
        "model.num_experts": num_experts,
        "model.top_k": 0,
        "model.residual_head": num_experts > 1,
        "loss.image_weight": trial.suggest_float("loss.image_weight", 0.1, 0.6),
        "loss.temperature": trial.suggest_float("loss.temperature", 0.05, 0.1, log=True),
        "optim.lr": trial.suggest_float("optim.lr", 2.5e-4, 1e-3, log=True),
        "optim.head_lr": trial.suggest_float("optim.head_lr", 1e-3, 4e-3, log=True),
        "optim.weight_decay": trial.suggest_float("optim.weight_decay", 0.05, 10.0, log=True),
        "optim.ema_decay": trial.suggest_categorical("optim.ema_decay", [0.9, 0.95, 0.99]),
        "data.augment.max_scale": trial.suggest_float("data.augment.max_scale", 1.0, 1.4),
        "data.augmented_share": trial.suggest_float("data.augmented_share", 0.2, 0.6),
        "data.views_per_step": trial.suggest_categorical("data.views_per_step", [0, 8]),
    }
    if num_experts > 1:
        # As a share of the experts, so that the parameter's range does not depend on their number: TPE models it better so.
        share = trial.suggest_categorical("top_k_share", ["all", "half", "one"])
        values["model.top_k"] = {"all": 0, "half": num_experts // 2, "one": 1}[share]
    return values


# Parts of the default recipe that the source system does not have.
_AS_PUBLISHED = {"model.residual_head": False, "model.pair_histogram": False, "data.augmented_share": 0.0, "data.views_per_step": 0, "loss.image_weight": 0.0}

RUNS = {
    "moe": NamedRun(
        changes={**_AS_PUBLISHED, "model.size": "tiny", "model.num_experts": 8, "data.augment.max_scale": 1.5, "data.augment.max_shift": 0.2},
        note="the published head (8 dense experts) and augmentation with the tiny point encoder: for CPUs",
    ),
    "linear_head": NamedRun(changes={"model.num_experts": 1, "model.top_k": 0}, note="one linear layer instead of experts: the trained baseline"),
    "recon_large": NamedRun(
        changes={
            **_AS_PUBLISHED,
            "model.size": "large",
            "model.channels": "xyz",
            "model.num_points": 10_000,
            "model.embed_dim": 1_280,
            "model.num_experts": 8,
            "model.top_k": 0,
            "model.drop_path": 0.2,
            "loss.temperature": 0.07,
            "data.augment.max_scale": 1.5,
            "data.augment.max_shift": 0.2,
            "optim.lr": 2e-5,
            "optim.head_lr": 2e-4,
            "optim.weight_decay": 0.05,
            "optim.grad_clip_norm": 10.0,
            "optim.ema_decay": 0.0,
            "schedule.num_epochs": 40,
            "schedule.num_warmup_epochs": 10.0,
            "batch_size": 32,
            "seed": 42,
        },
        note="stage 1 of the source system (HSE DL 2025) with its published hyper-parameters, for GPUs; embed with timm:eva_large_patch14_336.in22k_ft_in22k_in1k",
    ),
    "thorough": NamedRun(
        changes={"data.views_per_step": 0, "optim.weight_decay": 5.0},
        note="the default recipe with all 24 views in every step and strong weight decay: finds more turned and badly boxed pictures, and takes longer",
    ),
    "thorough_upright": NamedRun(
        changes={"data.views_per_step": 0, "optim.weight_decay": 5.0, "data.augmented_share": 0.25},
        note="thorough with fewer changed pictures: finds more where pictures are upright",
    ),
    "ensemble_3": NamedRun(changes={}, seeds=(0, 1, 2), note="three seeds of the default recipe, and their ensemble"),
}


class AlignmentTask(Task):
    """See ``cad_models/alignment/README.md``."""

    name = "alignment"
    recipe = RECIPE
    smoke = SMOKE
    score = Score(name="val/recall@3", mode="max")
    best_metrics = {
        "mean": "val/recall@3",
        "image_to_mesh": "val/image_to_mesh/recall@3",
        "mesh_to_image": "val/mesh_to_image/recall@3",
    }
    search_space = staticmethod(search_space)
    searched_where_on = frozenset({"data.augmented_share"})
    points_to_evaluate = (RUNS["thorough"].changes, RUNS["thorough_upright"].changes)
    combine_rules = ("concatenate", "mean")
    infer_options = AlignmentOptions
    signature_notes = ("dataset_digest", "class_names")
    runs = RUNS
    embed_columns = (
        EmbedColumn(source=("views", "images"), name="embeddings", count="num_views"),
        EmbedColumn(source=("views", "query_images"), name="query_embeddings", count="num_query_views"),
    )

    def changed_embed_columns(self, recipe: AlignmentRecipe) -> tuple[EmbedColumn, ...]:
        from cad_models.alignment.data import changed_embed_columns

        return changed_embed_columns(recipe)

    def list_raw(self, source: str) -> Listing:
        from cad_models.alignment.data import list_source

        return list_source(source)

    def inspect(self, item: RawItem, recipe: AlignmentRecipe) -> Inspection | Reject:
        from cad_models.alignment.data import inspect_item

        return inspect_item(item)

    def duplicates(self, inspections: Sequence[Inspection]) -> list[int]:
        from cad_models.common.meshes import group_duplicates

        return group_duplicates([i.signature for i in inspections], [i.size for i in inspections]).tolist()

    def near_duplicates(self, inspections: Sequence[Inspection]) -> list[tuple[int, int, float]]:
        from cad_models.common.near_duplicates import near_duplicates

        known = [i for i, inspection in enumerate(inspections) if inspection.shape is not None]
        if len(known) < 2:
            return []
        found = near_duplicates(np.stack([inspections[i].shape for i in known]))
        return [(known[i], known[j], distance) for i, j, distance in found]

    def prepare(self, item: RawItem, recipe: AlignmentRecipe) -> Row | Reject:
        from cad_models.alignment.data import prepare_item

        return prepare_item(item, recipe)

    def prepare_settings(self, recipe: AlignmentRecipe) -> dict[str, Any]:
        data = recipe.data
        return {
            "num_points": data.num_points,
            "num_views": data.num_views,
            "num_query_views": data.num_query_views,
            "image_size": data.image_size,
        }

    def schemas(self, recipe: AlignmentRecipe) -> dict[str, pa.Schema]:
        from cad_models.alignment.data import schemas

        return schemas(recipe)

    def columns(self, recipe: AlignmentRecipe) -> dict[str, list[str]]:
        points = ["points", "normals"] if "normals" in recipe.model.channels else ["points"]
        embeddings = ["embeddings", "query_embeddings"]
        if recipe.data.query_conditions:
            embeddings += [f"query_embeddings_{name}" for name in QUERY_CONDITIONS]
        if recipe.data.augmented_share > 0:
            embeddings.append("augmented_embeddings")
        return {"objects": [*points, "label"], "embeddings": embeddings}

    def examples(self, tables: dict[str, pa.Table], recipe: AlignmentRecipe) -> Columns:
        from cad_models.alignment.data import examples

        return examples(tables, recipe)

    def collate(self, columns: Columns, recipe: AlignmentRecipe, *, rngs: Sequence[np.random.Generator] | None) -> dict[str, Any]:
        from cad_models.alignment.data import collate

        return collate(columns, recipe, rngs=rngs)

    def learner(self, recipe: AlignmentRecipe, signature: dict[str, Any]) -> Learner:
        from cad_models.alignment.learner import build

        return build(recipe, signature)

    def signature(self, recipe: AlignmentRecipe, dataset: dict[str, Any]) -> dict[str, Any]:
        embeddings = dataset["embeddings"]
        return {
            "axes": "z-up, centred on the surface's centroid, radius 1",
            "channels": recipe.model.channels,
            "num_points": recipe.model.num_read_points,
            "num_stored_points": dataset["manifest"].settings["num_points"],
            "encoder": embeddings.encoder,
            "encoder_digest": embeddings.encoder_digest,
            "image_width": embeddings.width,
            "dataset_digest": dataset["manifest"].digest,
            "class_names": sorted(dataset["manifest"].labels or ()),
        }

    def evaluate(self, predictions: Predictions, reference: Predictions | None = None) -> dict[str, float]:
        from cad_models.alignment.metrics import retrieval_metrics

        return retrieval_metrics(predictions)

    def details(self, predictions: Predictions, *, class_names: Sequence[str] = ()) -> dict[str, float]:
        from cad_models.alignment.metrics import retrieval_details

        details = retrieval_details(predictions, class_names)
        if "view" in predictions:
            from cad_models.alignment.fusion import fused_details

            details |= fused_details(predictions)
        return details

    def references(
        self, columns: Columns, recipe: AlignmentRecipe, reference: Columns | None = None
    ) -> dict[str, dict[str, float]]:
        from cad_models.alignment.metrics import chance_metrics, view_matching_metrics

        conditions = [name for name in QUERY_CONDITIONS if f"query_views_{name}" in columns]
        return {"chance": chance_metrics(columns["group"], conditions), "match rendered views": view_matching_metrics(columns)}

    def baseline_recipes(self, recipe: AlignmentRecipe) -> dict[str, Recipe]:
        return {"linear head": replace_all(recipe, {"model.num_experts": 1, "model.top_k": 0})}

    def fit_rule(self, members: Sequence[Predictions], *, rule: str) -> dict[str, Any]:
        """Weights of the fused score, which is asked for where a gallery is rendered."""
        from cad_models.alignment.fusion import FIT_OBJECTS, fit_weights

        if "view" not in members[0]:
            return {}
        few = min(FIT_OBJECTS, len(members[0]["view"]))
        weights = fit_weights(self.combine([{name: column[:few] for name, column in m.items()} for m in members], rule=rule))
        return {} if weights is None else {"fusion": asdict(weights)}

    def combine(
        self,
        members: Sequence[Predictions],
        *,
        rule: str | None = None,
        weights: Sequence[float] | None = None,
        fitted: Mapping[str, Any] | None = None,
    ) -> Predictions:
        """See `cad_models.alignment.answers.combine_embeddings`."""
        from cad_models.alignment.answers import combine_embeddings
        from cad_models.alignment.fusion import combined_views, fusion_column

        first = members[0]
        combine = functools.partial(combine_embeddings, rule=rule or self.combine_rules[0], weights=weights)
        embedded = [name for name in first if name == "cad" or name.startswith("query")]
        combined = {name: combine([m[name] for m in members]) for name in embedded}
        combined |= {name: first[name] for name in ("num_queries", "group", "label") if name in first}
        if "view" in first:
            combined |= combined_views(combine, members, weights)
        return combined | fusion_column(fitted, len(first["group"]))

    def list_requests(
        self, queries: str | Sequence[str], gallery: str | None, *, direction: str = "auto", options: InferOptions | None = None
    ) -> Requests:
        from cad_models.alignment.answers import list_requests

        options = options or AlignmentOptions()
        return list_requests(queries, gallery, direction=direction, turned=options.query_rolls > 1, measured=options.scale_aware > 0)

    def predictor(self, members: "Sequence[Member]", *, device: str = "cpu", options: InferOptions | None = None) -> Predictor:
        from cad_models.alignment.predictor import AlignmentPredictor

        return AlignmentPredictor(members, device=device, options=options or AlignmentOptions())

    def read_input(self, item: Input, settings: Any) -> Columns | Reject:
        from cad_models.alignment.answers import read_input

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
        from cad_models.alignment.answers import MESH_TO_MESH, rank
        from cad_models.alignment.similar_meshes import rank_meshes

        if search.direction == MESH_TO_MESH:
            scale_aware = (options or AlignmentOptions()).scale_aware
            return rank_meshes(search, outputs, rule=rule, weights=weights, top_k=top_k, scale_aware=scale_aware)
        return rank(search, outputs, rule=rule, weights=weights, top_k=top_k, fitted=fitted, signatures=signatures)

    def submission(self, answers: Sequence[Answer], *, options: InferOptions | None = None) -> list[list[str]]:
        from cad_models.alignment import answers as between_kinds
        from cad_models.alignment import similar_meshes

        to_meshes = any(answer.direction == between_kinds.MESH_TO_MESH for answer in answers)
        return similar_meshes.submission(answers) if to_meshes else between_kinds.submission(answers)
