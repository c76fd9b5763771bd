"""Recall of image -> mesh and mesh -> image over a whole split, under three protocols for the number of images."""

import numpy as np
import torch

from cad_models.common.retrieval import ranks, recall_at
from cad_models.task import Predictions

KS = (1, 3, 5, 10)
PROTOCOLS: dict[str, int] = {"": 1, "3_views/": 3, "all_views/": 0}
"""Infix of the metric's name -> images that are averaged into one; 0 = all that an object has."""


def retrieval_metrics(predictions: Predictions) -> dict[str, float]:
    """Metrics of one split.

    One image a query is the protocol that counts: ``image_to_mesh/recall@3``. ``3_views/`` averages disjoint triples of an object's query views (an
    object with fewer uses what it has), ``all_views/`` all of them; means of unit vectors are scaled to length 1 again. image -> mesh asks with
    every such image among all meshes. mesh -> image asks with every mesh among galleries that hold one such image of each object: the first of
    each, the second of each, and so on; the figure is the mean over these galleries. Objects of the same group (exact duplicates) count as right
    answers for one another. Ties count against the query.

    Args:
        predictions: ``cad`` float32 [n, dim], ``query`` float32 [n, views, dim], ``num_queries`` int64 [n], ``group`` int64 [n].

    Returns:
        ``image_to_mesh/recall@1`` … ``mesh_to_image/all_views/recall@10`` in [0, 1]; ``<direction>/median_rank`` (from 1); ``recall@1`` …
        ``recall@10``: the mean of both directions, one image.
    """
    cad = torch.from_numpy(np.asarray(predictions["cad"], dtype=np.float32))
    group = torch.from_numpy(np.asarray(predictions["group"], dtype=np.int64))
    metrics: dict[str, float] = {}
    for infix, size in PROTOCOLS.items():
        images, owner = averaged_views(predictions["query"], predictions["num_queries"], size)
        image = torch.from_numpy(images)
        forward = ranks(image, cad, group[torch.from_numpy(owner)], group)
        metrics |= {f"image_to_mesh/{infix}recall@{k}": value for k, value in _recalls(forward).items()}
        backward = [ranks(cad, image[rows], group, group[torch.from_numpy(owner[rows])]) for rows in one_per_object(owner)]
        backward_ranks = torch.cat(backward)
        metrics |= {f"mesh_to_image/{infix}recall@{k}": value for k, value in _recalls(backward_ranks).items()}
        if not infix:
            metrics["image_to_mesh/median_rank"] = float(forward.float().median())
            metrics["mesh_to_image/median_rank"] = float(backward_ranks.float().median())
    for k in KS:
        metrics[f"recall@{k}"] = (metrics[f"image_to_mesh/recall@{k}"] + metrics[f"mesh_to_image/recall@{k}"]) / 2
    return metrics


def _recalls(found: torch.Tensor) -> dict[int, float]:
    return {k: recall_at(found, (k,))[f"recall@{k}"] for k in KS}


def averaged_views(views: np.ndarray, count: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit means of disjoint runs of ``size`` views of each object (0 = all its views).

    A remainder of fewer than ``size`` views is left out unless it is all that an object has. Objects without views have no row.

    Args:
        views: float32 [n, most views, dim].
        count: int64 [n].

    Returns:
        ``(means, owner)``: float32 [m, dim] and the object of each mean, int64 [m], ordered by object.
    """
    means, owner = [], []
    for i, (rows, n) in enumerate(zip(views, count, strict=True)):
        n = int(n)
        if n == 0:
            continue
        length = min(size, n) if size else n
        for start in range(0, n - length + 1, length):
            mean = rows[start : start + length].astype(np.float64).mean(0)
            means.append(mean / max(np.linalg.norm(mean), 1e-12))
            owner.append(i)
    dim = views.shape[2]
    return np.array(means, dtype=np.float32).reshape(-1, dim), np.array(owner, dtype=np.int64)


def one_per_object(owner: np.ndarray) -> list[np.ndarray]:
    """Galleries that hold one row of every object: the j-th of each, for each j; an object with fewer rows starts over."""
    if len(owner) == 0:
        return []
    objects, first, count = np.unique(owner, return_index=True, return_counts=True)
    return [first + j % count for j in range(int(count.max()))]


def chance_metrics(group: np.ndarray) -> dict[str, float]:
    """Recall of a random order: the chance that one of an object's group stands among the first k of all meshes. Both directions, all protocols.

    Args:
        group: int64 [n].
    """
    n = len(group)
    _, inverse, count = np.unique(group, return_inverse=True, return_counts=True)
    relevant = count[inverse].astype(np.float64)
    metrics = {}
    for k in KS:
        missed = np.ones(n)
        for i in range(min(k, n)):
            missed *= np.maximum(n - relevant - i, 0) / (n - i)
        for direction in ("image_to_mesh", "mesh_to_image"):
            metrics |= {f"{direction}/{infix}recall@{k}": float(1 - missed.mean()) for infix in PROTOCOLS}
        metrics[f"recall@{k}"] = float(1 - missed.mean())
    return metrics


def view_matching_metrics(
    views: np.ndarray, num_views: np.ndarray, queries: np.ndarray, num_queries: np.ndarray, group: np.ndarray
) -> dict[str, float]:
    """The rival without learning: render the gallery, and match views by the cosine of their frozen embeddings, the best view counts.

    Several query images of an object add their scores; objects without a query image are only in the gallery. Ties count against the query, as in `retrieval_metrics`.

    Args:
        views: [n, most views, width], frozen embeddings of the gallery's views.
        num_views: int64 [n].
        queries: [n, most queries, width], frozen embeddings of the query images.
        num_queries: int64 [n].
        group: int64 [n].
    """
    gallery = [_unit_rows(v[:count]) for v, count in zip(views, num_views, strict=True)]
    images = [_unit_rows(q[:count]) for q, count in zip(queries, num_queries, strict=True)]
    # [n, queries, n]: the best view of every mesh for every image.
    score = [np.stack([(image @ mesh.T).max(axis=1) for mesh in gallery], axis=1) for image in images]
    relevant = group[:, None] == group[None, :]
    metrics: dict[str, float] = {}
    for infix, size in PROTOCOLS.items():
        rows, owner = [], []
        for i, scores in enumerate(score):
            if len(scores) == 0:
                continue
            length = min(size, len(scores)) if size else len(scores)
            for start in range(0, len(scores) - length + 1, length):
                rows.append(scores[start : start + length].mean(axis=0))
                owner.append(i)
        matrix, owners = np.stack(rows), np.array(owner)
        forward = _ranks_of_scores(matrix, relevant[owners])
        backward = np.concatenate([_ranks_of_scores(matrix[chosen].T, relevant[:, owners[chosen]]) for chosen in one_per_object(owners)])
        for direction, found in (("image_to_mesh", forward), ("mesh_to_image", backward)):
            metrics |= {f"{direction}/{infix}recall@{k}": float((found <= k).mean()) for k in KS}
    for k in KS:
        metrics[f"recall@{k}"] = (metrics[f"image_to_mesh/recall@{k}"] + metrics[f"mesh_to_image/recall@{k}"]) / 2
    return metrics


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def _ranks_of_scores(score: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Rank, from 1, of each row's best relevant column; irrelevant columns with an equal score stand before it."""
    best = np.where(relevant, score, -np.inf).max(axis=1, keepdims=True)
    return 1 + ((score >= best) & ~relevant).sum(axis=1)
