"""Three scores of a picture and a mesh, and what they are worth together.

======== ===========================================================================================================
point    cosine of the picture's embedding and the point cloud's: needs no rendering
view     cosine of the picture and the mesh's best rendered view, both through the trained head
frozen   the same of the frozen encoder's embeddings: matching rendered views, the rival without learning
======== ===========================================================================================================

The fused score is their weighted mean. Where pictures are the answers (mesh to image), a picture that resembles many others of its gallery comes near to
everything; how much it does, its *crowd*, is taken off, times a weight (after cross-domain similarity local scaling: A. Conneau et al., "Word translation
without parallel data", ICLR 2018; only the gallery is asked, never the queries). Weights are the coefficients of a conditional logit (D. McFadden, "Conditional logit analysis of qualitative
choice behavior", 1974) on validation queries: which of the gallery's objects is the right one, given its three scores.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from cad_models.alignment.metrics import DIRECTIONS, KS, one_per_object
from cad_models.alignment.recipe import QUERY_CONDITIONS
from cad_models.alignment.sides import scores as side_scores
from cad_models.common.bootstrap import ratio_intervals
from cad_models.task import Predictions

# Bound on the numbers of one block, vectors or scores: 32 MB in float64.
_BLOCK_ELEMENTS = 1 << 22
# Objects and galleries that weights are fitted on: three numbers need no more.
FIT_OBJECTS = 256
_FIT_GALLERIES = 3
# Multiplications that all galleries together may take of which figures are told: a minute of one core.
_TOLD_WORK = 1e12
# Objects whose views are combined at a time.
_COMBINED_OBJECTS = 256
# Nearest other pictures that make a picture's crowd, and pictures of a gallery that are looked at for it.
_CROWD = 5
_CROWD_BANK = 4_096
# Standard deviation of the Gaussian prior of a coefficient, in units of 1 / standard deviation of its score: keeps few objects from deciding alone.
_PRIOR_STD = 5.0


@dataclass(frozen=True, kw_only=True)
class FusionWeights:
    """Weights of the three scores and of the crowd, in units of a cosine; only their proportions count."""

    point: float
    view: float
    frozen: float
    crowd: float = 0.0

    def __post_init__(self) -> None:
        if not all(0 <= value < float("inf") for value in self.as_tuple()) or not sum(self.of_scores) > 0:
            raise ValueError(f"the weights of the fused scores are {self.as_tuple()}: they must be finite, not negative, and not all 0")

    @property
    def of_scores(self) -> tuple[float, float, float]:
        """As ``(point, view, frozen)``."""
        return self.point, self.view, self.frozen

    def as_tuple(self) -> tuple[float, float, float, float]:
        """As ``(point, view, frozen, crowd)``."""
        return *self.of_scores, self.crowd

    @property
    def normalised(self) -> "FusionWeights":
        """The same, with the sum 1 of those of the scores: a fused score is then a mean of cosines."""
        return FusionWeights.of([value / sum(self.of_scores) for value in self.as_tuple()])

    @staticmethod
    def of(values: Sequence[float]) -> "FusionWeights":
        """The inverse of :meth:`as_tuple`."""
        return FusionWeights(**{field.name: float(value) for field, value in zip(fields(FusionWeights), values, strict=True)})


DEFAULT_WEIGHTS = FusionWeights(point=0.1, view=0.3, frozen=0.6, crowd=0.2)
"""Where nothing was fitted: near what is fitted for the encoders hog and hog_polar on real meshes."""

POINT_ONLY = FusionWeights(point=1.0, view=0.0, frozen=0.0)
"""The learned score alone."""


def weights_in(fitted: Mapping[str, Any] | None) -> FusionWeights:
    """The weights that `Task.fit_rule` found, else the default ones."""
    found = (fitted or {}).get("fusion")
    return DEFAULT_WEIGHTS if found is None else FusionWeights.of([float(found[field.name]) for field in fields(FusionWeights)])


# --- scores -------------------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class PictureVectors:
    """Pictures as one member or an ensemble sees them, one row each."""

    head: np.ndarray
    """float [pictures, dim], through the trained head; unit."""
    frozen: np.ndarray
    """float [pictures, width], of any length; [pictures, 0] where no views are compared."""

    def rows(self, chosen: Any) -> "PictureVectors":
        """Some of them."""
        return PictureVectors(head=self.head[chosen], frozen=self.frozen[chosen])


@dataclass(frozen=True, kw_only=True)
class MeshVectors:
    """Meshes as one member or an ensemble sees them, one row each. Views are kept as float16: 2,000 meshes of 24 views and 1,024 numbers take 98 MB."""

    point: np.ndarray
    """float [meshes, dim] or [meshes, sides, dim]; unit."""
    view: np.ndarray
    """float [meshes, views, dim], rendered views through the head, of any length; no views where none are compared. A mesh with fewer views than
    others repeats one of its own."""
    frozen: np.ndarray
    """float [meshes, views, width], the same views by the frozen encoder."""


def score_components(
    pictures: PictureVectors, meshes: MeshVectors, weights: FusionWeights | None = None
) -> Float32[np.ndarray, "3 pictures meshes"]:
    """The three scores of every picture and mesh.

    Inner products are summed in float64 and rounded to float32, so that equal vectors have equal scores however the work is cut.

    Args:
        weights: Scores of weight 0 are not computed, and are 0; None = compute all.
    """
    wanted = (True, True, True) if weights is None else [share > 0 for share in weights.of_scores]
    found = np.zeros((3, len(pictures.head), len(meshes.point)), dtype=np.float32)
    if wanted[0]:
        found[0] = side_scores(pictures.head, meshes.point)
    for k, images, views in ((1, pictures.head, meshes.view), (2, pictures.frozen, meshes.frozen)):
        if wanted[k]:
            _best_views(_unit(images), views, found[k])
    return found


def _best_views(images: np.ndarray, views: np.ndarray, into: np.ndarray) -> None:
    """Each image's cosine with the best view of each mesh, block by block."""
    num_meshes, num_views, width = views.shape
    step = max(1, _BLOCK_ELEMENTS // max(1, num_views * width))
    for start in range(0, num_meshes, step):
        block = _unit(views[start : start + step]).reshape(-1, width)
        height = max(1, _BLOCK_ELEMENTS // len(block))
        for top in range(0, len(images), height):
            scores = (images[top : top + height] @ block.T).astype(np.float32)
            into[top : top + height, start : start + step] = scores.reshape(len(scores), -1, num_views).max(axis=2)


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def crowding(frozen: Float[np.ndarray, "pictures width"], owner: Int[np.ndarray, " pictures"]) -> Float32[np.ndarray, " pictures"]:
    """How much each picture of a gallery resembles others: its mean cosine with the nearest five pictures of other objects, by the frozen encoder; 0
    where there are no others. Of a large gallery every n-th picture is looked at, so that they are at most 4,096.

    Args:
        owner: The object that each picture shows.
    """
    found = np.zeros(len(frozen), dtype=np.float32)
    chosen = np.arange(0, len(frozen), max(1, -(-len(frozen) // _CROWD_BANK)))
    bank = _unit(frozen[chosen])
    step = max(1, _BLOCK_ELEMENTS // max(1, len(bank)))
    for start in range(0, len(frozen), step):
        rows = slice(start, start + step)
        scores = (_unit(frozen[rows]) @ bank.T).astype(np.float32)
        scores[owner[rows][:, None] == owner[chosen][None, :]] = -np.inf
        k = min(_CROWD, scores.shape[1])
        nearest = np.partition(scores, scores.shape[1] - k, axis=1)[:, scores.shape[1] - k :].astype(np.float64)
        others = np.isfinite(nearest)
        found[rows] = np.where(others, nearest, 0.0).sum(axis=1) / np.maximum(others.sum(axis=1), 1)
    return found


def fuse(
    components: Float[np.ndarray, "3 rows columns"], weights: FusionWeights, crowd: Float32[np.ndarray, " rows"] | None = None
) -> Float32[np.ndarray, "rows columns"]:
    """The weighted mean of the three scores, less the rows' crowd where it is given: summed in float64, rounded to float32."""
    weights = weights.normalised
    scores = sum(share * part.astype(np.float64) for share, part in zip(weights.of_scores, components, strict=True))
    return (scores if crowd is None else scores - weights.crowd * crowd.astype(np.float64)[:, None]).astype(np.float32)


def best_columns(scores: Float32[np.ndarray, "rows columns"], k: int) -> list[np.ndarray]:
    """For each row the indices of its ``k`` best columns, best first; ties go to the lower index."""
    k = min(k, scores.shape[1])
    chosen = []
    for row in scores:
        least = np.partition(row, len(row) - k)[len(row) - k]
        candidates = np.flatnonzero(row >= least)
        chosen.append(candidates[np.argsort(-row[candidates], kind="stable")][:k])
    return chosen


# --- a split's predictions ----------------------------------------------------------------------------------------------------------------
COLUMNS = ("view", "num_views", "frozen_view", "frozen_query")
"""What a split's predictions need beside those of every evaluation."""


def combined_views(combine: Any, members: Sequence[Predictions], weights: Sequence[float] | None) -> Predictions:
    """The members' `COLUMNS` -> one.

    Args:
        combine: Function of some members' vectors that applies the ensemble's rule and weights to unit vectors.
        weights: One a member; None = equal.
    """
    from cad_models.alignment.answers import combine_embeddings

    def by_blocks(columns: Sequence[np.ndarray], function: Any) -> np.ndarray:
        """``function`` of some objects at a time: in float32 the views of many take gigabytes."""
        starts = range(0, max(1, len(columns[0])), _COMBINED_OBJECTS)
        return np.concatenate([function([column[s : s + _COMBINED_OBJECTS] for column in columns]).astype(np.float16) for s in starts])

    def frozen(columns: list[np.ndarray]) -> np.ndarray:
        return combine_embeddings([_unit(column).astype(np.float32) for column in columns], weights=weights)

    found = {"view": by_blocks([m["view"] for m in members], combine), "num_views": members[0]["num_views"]}
    for name in ("frozen_view", *(name for name in members[0] if name.startswith("frozen_query"))):
        columns = [m[name] for m in members]
        one_encoder = all(np.array_equal(columns[0], column) for column in columns[1:])
        found[name] = columns[0] if one_encoder else by_blocks(columns, frozen)
    return found


def fusion_column(fitted: Mapping[str, Any] | None, num_objects: int) -> Predictions:
    """``fusion`` float64 [objects, 4], fitted weights in every row; empty where nothing was fitted."""
    return {"fusion": np.tile(weights_in(fitted).as_tuple(), (num_objects, 1))} if "fusion" in (fitted or {}) else {}


def meshes_of(predictions: Predictions) -> MeshVectors:
    """A split's meshes. Objects with fewer views than others repeat their first."""
    missing = np.arange(predictions["view"].shape[1])[None, :] >= predictions["num_views"][:, None]
    filled = [np.where(missing[:, :, None], predictions[name][:, :1], predictions[name]) for name in ("view", "frozen_view")]
    return MeshVectors(point=predictions["cad"], view=filled[0], frozen=filled[1])


def pictures_of(predictions: Predictions) -> tuple[PictureVectors, np.ndarray]:
    """A split's query pictures, and the object of each, int64 [pictures], ordered by object."""
    given = np.arange(predictions["query"].shape[1])[None, :] < predictions["num_queries"][:, None]
    return PictureVectors(head=predictions["query"][given], frozen=predictions["frozen_query"][given]), np.nonzero(given)[0]


@dataclass(frozen=True, kw_only=True)
class _Gallery:
    """One picture of each object, and all meshes."""

    rows: np.ndarray
    """Which pictures, int64 [rows]."""
    owner: np.ndarray
    """Object of each, int64 [rows]."""
    components: np.ndarray
    """float32 [3, rows, meshes]."""
    crowd: np.ndarray
    """float32 [rows]."""


def _galleries(predictions: Predictions) -> Iterator[_Gallery]:
    """The first picture of each object, the second of each, and so on."""
    meshes = meshes_of(predictions)
    pictures, owner = pictures_of(predictions)
    for rows in one_per_object(owner):
        chosen = pictures.rows(rows)
        yield _Gallery(rows=rows, owner=owner[rows], components=score_components(chosen, meshes), crowd=crowding(chosen.frozen, owner[rows]))


def fit_weights(predictions: Predictions) -> FusionWeights | None:
    """Weights under which the right object is most likely, among all objects of a split for its pictures and among all pictures for its objects.

    The sum over the queries of the logarithm of the right answers' share in the softmax of the weighted scores is maximised over weights that are
    not negative, with a weak Gaussian prior. Up to 256 objects and three pictures of each are used.

    Args:
        predictions: Of the validation split: ``cad``, ``query``, ``num_queries``, ``group`` as for `cad_models.alignment.metrics.retrieval_metrics`, and
            `COLUMNS`.

    Returns:
        Weights, those of the scores with the sum 1; None where no score tells anything (or there is nothing to choose from).
    """
    from scipy.optimize import minimize

    few = {name: column[: min(FIT_OBJECTS, len(predictions["view"]))] for name, column in predictions.items()}
    group = few["group"]
    choices: list[tuple[np.ndarray, np.ndarray]] = []
    for _, gallery in zip(range(_FIT_GALLERIES), _galleries(few), strict=False):
        relevant = group[gallery.owner][:, None] == group[None, :]
        # A picture that asks is as crowded whatever the answer.
        choices.append((np.concatenate([gallery.components, np.zeros((1, *relevant.shape))]), relevant))
        asked = relevant.any(axis=0)  # a mesh without a picture asks nothing
        crowd = np.broadcast_to(-gallery.crowd, relevant.T[asked].shape)
        choices.append((np.concatenate([gallery.components.transpose(0, 2, 1)[:, asked], crowd[None]]), relevant.T[asked]))
    if not choices or all(relevant.all() for _, relevant in choices):
        return None
    spread = np.max([components.std(axis=(1, 2)) for components, _ in choices], axis=0)
    if not (spread[:3] > 0).any():
        return None
    scale = np.where(spread > 0, 1 / np.maximum(spread, 1e-12), 0.0)
    prior = 1 / (_PRIOR_STD**2 * len(group))

    def loss(u: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = prior * float(u @ u) / 2, prior * u
        for components, relevant in choices:
            found, gradient = _negative_log_share(components, relevant, u * scale)
            value += found / len(choices)
            slope = slope + gradient * scale / len(choices)
        return value, slope

    best = minimize(loss, np.ones(4), jac=True, method="L-BFGS-B", bounds=[(0, None)] * 4).x * scale
    if not best[:3].sum() > 0:
        return None
    # Rounded: the last digits depend on the machine, and the weights are part of what identifies an ensemble.
    return FusionWeights.of([round(float(value), 6) for value in best / best[:3].sum()])


def _negative_log_share(
    components: Float[np.ndarray, "parts queries choices"], relevant: Bool[np.ndarray, "queries choices"], weights: Float[np.ndarray, " parts"]
) -> tuple[float, np.ndarray]:
    """Mean over the queries of -log of the relevant choices' share in the softmax, and its gradient [parts]."""
    logits = np.tensordot(weights, components, axes=1)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    right = np.where(relevant, odds, 0.0)
    totals, rights = odds.sum(axis=1, keepdims=True), np.maximum(right.sum(axis=1, keepdims=True), 1e-300)
    gradient = np.einsum("kqc,qc->k", components, odds / totals - right / rights) / len(relevant)
    return float(np.mean(np.log(totals) - np.log(rights))), gradient


def fused_details(predictions: Predictions) -> dict[str, float]:
    """Recall of the fused score, of its parts, and how far it is ahead of two of them, with 95 % intervals; one picture a query.

    ``fused/<direction>/recall@k`` (k of `KS`), ``fused/recall@k`` (the mean of both directions), ``best_view/<direction>/recall@k`` (the views through
    the head alone); ``fused_gain/over_view_matching/<direction>/recall@3`` and ``fused_gain/over_learned/...``: differences, paired: all figures are
    resampled together (1,000 resamples of whole objects, seeded). Pictures in other conditions likewise: ``fused/<direction>/roll/recall@k``. ``fused/weight/<score>``: the weights. ``fused/num_objects``: of a large split the first
    objects are measured (those that have ``view``), as a gallery of their own, and as many pictures of each as a minute or so allows, at least one.

    Args:
        predictions: As for :func:`fit_weights`, also ``query_<condition>`` and ``frozen_query_<condition>``; ``fusion`` float64 [n, 4], the weights in every
            row, where they were fitted.
    """
    weights = _weights_of(predictions)
    figures = fused_hits(predictions)
    low, high = ratio_intervals(np.stack([of for of, _ in figures.values()], axis=1), np.stack([among for _, among in figures.values()], axis=1))
    told = {"fused/num_objects": float(len(predictions["view"]))} | {f"fused/weight/{name}": value for name, value in asdict(weights.normalised).items()}
    for (name, (of, among)), least, most in zip(figures.items(), low.tolist(), high.tolist(), strict=True):
        told |= {name: float(of.sum() / among.sum()), f"{name}_low": least, f"{name}_high": most}
    return told


def fused_hits(predictions: Predictions) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What each object adds to each figure of `fused_details`: name -> (hits, queries), float64 [objects with ``view``] each; their sums' ratio is the
    figure."""
    weights = _weights_of(predictions)
    predictions = {name: column[: len(predictions["view"])] for name, column in predictions.items()}
    figures: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for condition in [name for name in ("", *(f"_{name}" for name in QUERY_CONDITIONS)) if f"frozen_query{name}" in predictions]:
        asked = {name: predictions[f"{name}{condition}"] for name in ("query", "frozen_query")}
        figures |= _figures(predictions | asked, weights, f"{condition[1:]}/" if condition else "")
    return figures


def _weights_of(predictions: Predictions) -> FusionWeights:
    return FusionWeights.of(predictions["fusion"][0].tolist()) if "fusion" in predictions else DEFAULT_WEIGHTS


def _figures(predictions: Predictions, weights: FusionWeights, infix: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> (hits, counts), float64 [objects]: numerator and denominator of each figure, object by object."""
    parts = {
        "fused": weights,
        "best_view": FusionWeights(point=0.0, view=1.0, frozen=0.0),
        "learned": POINT_ONLY,
        "view_matching": FusionWeights(point=0.0, view=0.0, frozen=1.0),
    }
    group = predictions["group"]
    num_objects = len(group)
    work = float(num_objects) * predictions["view"].shape[1] * num_objects * (predictions["view"].shape[2] + predictions["frozen_view"].shape[2])
    hits = {name: np.zeros((2, num_objects, len(KS))) for name in parts}
    counts = np.zeros((2, num_objects))
    seen: set[int] = set()
    for _, gallery in zip(range(max(1, int(_TOLD_WORK / work))), _galleries(predictions), strict=False):
        owner = gallery.owner
        relevant = group[owner][:, None] == group[None, :]
        fresh = np.array([row not in seen for row in gallery.rows.tolist()])
        seen.update(gallery.rows.tolist())
        asked = np.flatnonzero(relevant.any(axis=0))
        np.add.at(counts[0], owner[fresh], 1)
        counts[1, asked] += 1
        for name, chosen in parts.items():
            found = _within(fuse(gallery.components, chosen)[fresh], relevant[fresh])
            np.add.at(hits[name][0], owner[fresh], found)
            hits[name][1, asked] += _within(fuse(gallery.components, chosen, gallery.crowd).T[asked], relevant.T[asked])
    figures: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    # Both directions as one ratio: each direction's hits are scaled to the same denominator.
    totals = counts.sum(axis=1, keepdims=True)

    def add(name: str, of: np.ndarray, k: int) -> None:
        for one, direction in enumerate(DIRECTIONS):
            figures[f"{name}/{direction}/{infix}recall@{k}"] = of[one, :, KS.index(k)], counts[one]
        figures[f"{name}/{infix}recall@{k}"] = (of[:, :, KS.index(k)] / totals).sum(axis=0) / 2, (counts / totals).sum(axis=0) / 2

    for name in ("fused", "best_view"):
        for k in KS:
            add(name, hits[name], k)
    for name in ("view_matching", "learned"):
        add(f"fused_gain/over_{name}", hits["fused"] - hits[name], 3)
    return figures


def _within(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Whether each row's best relevant column is among its first k, for each k of `KS`: float64 [rows, KS]. Ties count against it."""
    best = np.where(relevant, scores, -np.inf).max(axis=1, keepdims=True)
    ranks = 1 + ((scores >= best) & ~relevant).sum(axis=1)
    return (ranks[:, None] <= np.array(KS)).astype(np.float64)
