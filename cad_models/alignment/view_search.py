"""Answers where meshes were rendered or query pictures turned: the fused score of `cad_models.alignment.fusion`, both directions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cad_models.alignment.answers import combine_embeddings, combined_entry
from cad_models.alignment.fusion import (
    POINT_ONLY,
    FusionWeights,
    MeshVectors,
    PictureVectors,
    best_columns,
    crowding,
    fuse,
    score_components,
    weights_in,
)
from cad_models.alignment.sides import scores as side_scores
from cad_models.task import Answer, Entry, Search

# Bound on the scores of one block of pictures: the three of each pair in float32 and float64.
_BLOCK_PAIRS = 1 << 22


def rank_by_views(
    search: Search,
    outputs: Mapping[int, list[np.ndarray]],
    *,
    rule: str,
    weights: Sequence[float],
    top_k: int,
    fitted: Mapping[str, Any] | None,
    signatures: Sequence[Mapping[str, Any]],
) -> list[Answer]:
    """The ``top_k`` best gallery objects of every query; exact, ties by id. Also for meshes with several vectors.

    A picture and a mesh have the weighted mean of three cosines (see `cad_models.alignment.fusion`), or, where no mesh was rendered, the learned one
    alone. An ensemble's vectors are combined first, so that its members must agree in the view. Of a turned picture the best position counts. An
    object given by several pictures has the mean of their scores; its learned score is that of its mean embedding, as everywhere. Where pictures are the
    answers and meshes were rendered, an object's crowd is taken off.

    Args:
        outputs: As `cad_models.alignment.predictor.AlignmentPredictor.predict` gives them.
        signatures: One a member: which of them share an encoder.
    """
    members = _Members(rule, weights, signatures)
    to_mesh = search.direction.startswith("image")
    pictures = _read(search.queries if to_mesh else search.gallery, outputs)
    meshes = _read(search.gallery if to_mesh else search.queries, outputs)
    if not pictures or not meshes:
        return []
    rendered = len(outputs[meshes[0].inputs[0]]) > len(weights)
    vectors = members.meshes([outputs[entry.inputs[0]] for entry in meshes], rendered=rendered)
    chosen = weights_in(fitted) if rendered else POINT_ONLY
    crowd = None
    if rendered and not to_mesh:
        crowd = _crowd([[outputs[i] for i in entry.inputs] for entry in pictures], members)
    scores = np.empty((len(pictures), len(meshes)), dtype=np.float32)
    rows = max(len(entry.inputs) * len(np.atleast_2d(outputs[entry.inputs[0]][0])) for entry in pictures)
    step = max(1, _BLOCK_PAIRS // (len(meshes) * rows))
    for start in range(0, len(pictures), step):
        block = [[outputs[i] for i in entry.inputs] for entry in pictures[start : start + step]]
        near = None if crowd is None else crowd[start : start + step]
        scores[start : start + step] = _scores(block, vectors, members, chosen, near, rendered=rendered)
    scores, asked, among = (scores, pictures, meshes) if to_mesh else (scores.T, meshes, pictures)
    return [
        Answer(direction=search.direction, query=query.entry_id, rank=place, answer=among[column].entry_id, score=float(row[column]))
        for query, row, found in zip(asked, scores, best_columns(scores, top_k), strict=True)
        for place, column in enumerate(found, start=1)
    ]


def _read(entries: Sequence[Entry], outputs: Mapping[int, list[np.ndarray]]) -> list[Entry]:
    """The entries with those of their files that could be read; entries without any are left out."""
    kept = [Entry(entry_id=entry.entry_id, inputs=tuple(i for i in entry.inputs if i in outputs)) for entry in entries]
    return [entry for entry in kept if entry.inputs]


class _Members:
    """How the outputs of one input lie, and the ensemble's rule."""

    def __init__(self, rule: str, weights: Sequence[float], signatures: Sequence[Mapping[str, Any]]) -> None:
        self._rule, self._weights, self.count = rule, list(weights), len(weights)
        shares: dict[str, float] = {}
        for weight, signature in zip(weights, signatures, strict=True):
            digest = signature["encoder_digest"]
            shares[digest] = shares.get(digest, 0.0) + weight
        self._encoder_shares = list(shares.values())

    def combined(self, found: Sequence[np.ndarray]) -> np.ndarray:
        """The members' embeddings -> the ensemble's."""
        return combine_embeddings(found, rule=self._rule, weights=self._weights)

    def meshes(self, found: list[list[np.ndarray]], *, rendered: bool) -> MeshVectors:
        """Meshes by their outputs."""
        count = self.count
        point = np.stack([self.combined(outputs[:count]) for outputs in found])
        if not rendered:
            none = np.zeros((len(found), 0, 0), dtype=np.float16)
            return MeshVectors(point=point, view=none, frozen=none)
        view = np.stack([self.combined([v.astype(np.float32) for v in outputs[count : 2 * count]]).astype(np.float16) for outputs in found])
        return MeshVectors(point=point, view=view, frozen=np.stack([self.frozen(outputs[2 * count :]) for outputs in found]))

    def pictures(self, found: list[list[np.ndarray]], *, rendered: bool) -> PictureVectors:
        """Pictures by their outputs, all positions below one another."""
        head = np.concatenate([np.atleast_2d(self.combined(outputs[: self.count])) for outputs in found])
        frozen = np.concatenate([self.frozen(outputs[self.count :]) for outputs in found]) if rendered else np.zeros((len(head), 0), dtype=np.float16)
        return PictureVectors(head=head, frozen=frozen)

    def frozen(self, by_encoder: Sequence[np.ndarray]) -> np.ndarray:
        """The encoders' embeddings of the same pictures -> one, float16; each encoder counts as much as its members."""
        if len(by_encoder) == 1:
            return by_encoder[0]
        rows = [v.astype(np.float32) for v in by_encoder]
        unit = [row / np.maximum(np.linalg.norm(row, axis=-1, keepdims=True), np.float32(1e-12)) for row in rows]
        return combine_embeddings(unit, weights=self._encoder_shares).astype(np.float16)


def _crowd(objects: list[list[list[np.ndarray]]], members: _Members) -> np.ndarray:
    """Crowd of each object of a gallery of pictures, given by the outputs of its pictures: the mean of theirs, float32 [objects]."""
    counts = np.array([len(views) for views in objects])
    frozen = np.concatenate([members.frozen(outputs[members.count :]) for views in objects for outputs in views])
    found = crowding(frozen, np.repeat(np.arange(len(objects)), counts)).astype(np.float64)
    return (np.add.reduceat(found, np.cumsum(counts) - counts) / counts).astype(np.float32)


def _scores(
    block: list[list[list[np.ndarray]]],
    meshes: MeshVectors,
    members: _Members,
    weights: FusionWeights,
    crowd: np.ndarray | None,
    *,
    rendered: bool,
) -> np.ndarray:
    """Fused scores of some picture objects, each given by the outputs of its pictures, and all meshes: float32 [objects, meshes]."""
    pictures = members.pictures([outputs for views in block for outputs in views], rendered=rendered)
    components = score_components(pictures, meshes, weights)
    counts = np.array([len(views) for views in block])
    rolls = len(pictures.head) // counts.sum()
    if rolls > 1:  # a turned picture is a query, and stands alone
        return fuse(components, weights).reshape(len(block), int(rolls), -1).max(axis=1)
    if (counts > 1).any():
        starts = np.cumsum(counts) - counts
        components = (np.add.reduceat(components.astype(np.float64), starts, axis=1) / counts[None, :, None]).astype(np.float32)
        means = np.stack([members.combined(combined_entry([outputs[: members.count] for outputs in views])) for views in block])
        components[0] = side_scores(means, meshes.point)
    return fuse(components, weights, crowd)
