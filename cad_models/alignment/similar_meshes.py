"""Mesh -> mesh: the gallery's parts most like a part, by the members' point embeddings and by measures in file units."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32

from cad_models.alignment.answers import combine_embeddings
from cad_models.alignment.descriptors import NUM_MEASURES, similarity
from cad_models.alignment.sides import as_one
from cad_models.task import Answer, Entry, Search

# Elements of a block of scores: what is kept of a block are its best answers.
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Described:
    """Meshes as the search compares them.

    Attributes:
        ids: one a mesh.
        inputs: int64 [n], position of the file.
        embeddings: [n, dim], the members' point embeddings, combined; inner products are the ensemble's cosines; of several vectors their mean.
        measures: [n, 21], as `cad_models.alignment.descriptors.measures`; [n, 0] where they were not asked for.
    """

    ids: list[str]
    inputs: np.ndarray
    embeddings: np.ndarray
    measures: np.ndarray


def described(entries: Sequence[Entry], outputs: Mapping[int, list[np.ndarray]], *, rule: str, weights: Sequence[float]) -> Described:
    """The entries whose file could be read.

    Args:
        outputs: By file, one unit embedding a member, then the measures where they were asked for, or what `AlignmentPredictor.predict` adds for views.
    """
    read = [entry for entry in entries if entry.inputs[0] in outputs]
    inputs = np.array([entry.inputs[0] for entry in read], dtype=np.int64)
    if not read:
        return Described(ids=[], inputs=inputs, embeddings=np.zeros((0, 0), np.float32), measures=np.zeros((0, 0), np.float32))
    rows = [outputs[i] for i in inputs.tolist()]
    members = [np.stack([row[m] for row in rows]) for m in range(len(weights))]
    measured = np.stack([row[-1] if len(row) == len(weights) + 1 else np.zeros(0, np.float32) for row in rows])
    return Described(ids=[e.entry_id for e in read], inputs=inputs, embeddings=as_one(combine_embeddings(members, rule=rule, weights=weights)), measures=measured)


def fused_scores(
    queries: tuple[Float32[np.ndarray, "queries dim"], Float32[np.ndarray, "queries _"]],
    gallery: tuple[Float32[np.ndarray, "gallery dim"], Float32[np.ndarray, "gallery _"]],
    *,
    scale_aware: float,
) -> Float[np.ndarray, "queries gallery"]:
    """``(1 - scale_aware)`` x the cosine of the embeddings + ``scale_aware`` x the similarity of the measures; float64, in [-1, 1].

    Args:
        queries, gallery: Embeddings, and measures (read only where ``scale_aware`` is not 0).

    Raises:
        ValueError: measures are wanted and were not computed.
    """
    score = queries[0].astype(np.float64) @ gallery[0].astype(np.float64).T if scale_aware < 1 else 0.0
    if scale_aware == 0:
        return score
    for _, given in (queries, gallery):
        if given.shape[1] != NUM_MEASURES:
            raise ValueError(f"scale_aware is {scale_aware} and the meshes were read without their measures: read them for the same weight")
    return (1 - scale_aware) * score + scale_aware * similarity(queries[1], gallery[1])


def rank_meshes(
    search: Search, outputs: Mapping[int, list[np.ndarray]], *, rule: str, weights: Sequence[float], top_k: int, scale_aware: float
) -> list[Answer]:
    """The ``top_k`` best gallery meshes of every query by `fused_scores`; exact, ties by id. A query's own file is no answer to it; a copy of it under
    another name is. Files that could not be read are left out."""
    queries = described(search.queries, outputs, rule=rule, weights=weights)
    gallery = described(search.gallery, outputs, rule=rule, weights=weights)
    if not queries.ids or not gallery.ids:
        return []
    by_id = np.argsort(np.array(gallery.ids), kind="stable")
    block = max(1, _BLOCK_ELEMENTS // len(gallery.ids))
    answers = []
    for start in range(0, len(queries.ids), block):
        rows = slice(start, start + block)
        scores = fused_scores(
            (queries.embeddings[rows], queries.measures[rows]), (gallery.embeddings[by_id], gallery.measures[by_id]), scale_aware=scale_aware
        )
        # To seven digits: beyond, sums differ from machine to machine.
        scores = scores.astype(np.float32)
        scores[queries.inputs[rows, None] == gallery.inputs[by_id]] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        for query, row, found in zip(queries.ids[rows], scores, order, strict=True):
            answers += [
                Answer(direction=search.direction, query=query, rank=place, answer=gallery.ids[by_id[i]], score=float(row[i]))
                for place, i in enumerate((i for i in found.tolist() if row[i] > -np.inf), start=1)
            ]
    return answers


SUBMISSION_COLUMNS = ("id", "mesh_to_mesh_query", "mesh_to_mesh_answers")


def submission(answers: Sequence[Answer]) -> list[list[str]]:
    """A row a query, sorted by it; ``id`` counts rows, the answers are a printed Python list as in the source system's table, which knows the other two
    directions only."""
    found: dict[str, list[str]] = {}
    for answer in sorted(answers, key=lambda a: (a.query, a.rank)):
        found.setdefault(answer.query, []).append(answer.answer)
    return [list(SUBMISSION_COLUMNS), *[[str(i), query, str(best)] for i, (query, best) in enumerate(found.items())]]
