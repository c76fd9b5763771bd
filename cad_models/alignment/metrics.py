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
