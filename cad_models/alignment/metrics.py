"""Recall of image -> mesh and mesh -> image over a whole split, by the number of query images and by their condition."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from cad_models.alignment.data import category_number
from cad_models.alignment.query_bank import bank_normalised
from cad_models.alignment.recipe import QUERY_CONDITIONS
from cad_models.alignment.sides import scores as side_scores
from cad_models.common.bootstrap import ratio_intervals
from cad_models.common.mapped import forget_pages
from cad_models.common.retrieval import ranks
from cad_models.task import Columns, Predictions

KS = (1, 3, 5, 10)
DIRECTIONS = ("image_to_mesh", "mesh_to_image")
PROTOCOLS: dict[str, int] = {"": 1, "3_views/": 3, "all_views/": 0}
"""Infix of the metric's name -> images that are averaged into one; 0 = all that an object has."""

# Scores held at a time: 16 MB, and the masks beside them.
_SCORE_ELEMENTS = 1 << 22
_MOST_CATEGORIES = 50
# Below it an interval from resamples says more about their number than about the category.
_FEWEST_FOR_BOUNDS = 5


def retrieval_metrics(predictions: Predictions) -> dict[str, float]:
    """Metrics of one split.

    One image a query is the protocol that counts: ``image_to_mesh/recall@3``. ``3_views/`` averages disjoint triples of an object's query views (an
    object with fewer uses what it has), ``all_views/`` all of them; means of unit vectors are scaled to length 1 again. ``roll/``, ``crop/`` and
    ``roll_crop/``, where there are such predictions, ask with one image that was turned or badly boxed. image -> mesh asks with
    every such image among all meshes. mesh -> image asks with every mesh among galleries that hold one such image of each object: the first of
    each, the second of each, and so on; the figure is the mean over these galleries. Objects of the same group (exact duplicates) count as right
    answers for one another. Ties count against the query.

    Args:
        predictions: ``cad`` float32 [n, dim] (or float [n, sides, dim]), ``query`` float32 [n, views, dim], ``num_queries`` int64 [n], ``group`` int64 [n]; optionally
            ``query_roll`` and so on, as ``query``.

    Returns:
        ``image_to_mesh/recall@1`` … ``mesh_to_image/all_views/recall@10`` in [0, 1]; ``<direction>/median_rank`` (from 1); ``recall@1`` …
        ``recall@10``: the mean of both directions, one image.
    """
    by_protocol = learned_ranks(predictions)
    metrics = recalls(by_protocol)
    metrics["image_to_mesh/median_rank"] = float(np.sort(by_protocol[""].image_to_mesh)[(len(by_protocol[""].image_to_mesh) - 1) // 2])
    metrics["mesh_to_image/median_rank"] = float(np.sort(by_protocol[""].mesh_to_image)[(len(by_protocol[""].mesh_to_image) - 1) // 2])
    return metrics


def retrieval_details(predictions: Predictions, class_names: Sequence[str] = ()) -> dict[str, float]:
    """What is worth its place once, at the end of a run: intervals of `retrieval_metrics`, and Recall@3 by category.

    Bounds of 95 % by bootstrap over objects (1,000 resamples, seeded; the gallery stays as it is) are named ``<metric>_low`` and ``<metric>_high``.
    Categories (the 50 largest) are ``<direction>/category/<name>/recall@3``, among the whole split's gallery, with ``category/<name>/num_objects``
    and, from 5 objects on, bounds.

    Args:
        predictions: As for `retrieval_metrics`; with ``label`` int64 [n] (`cad_models.alignment.data.category_number`) also by category.
        class_names: Names of the categories.
    """
    figures = hits_by_object(learned_ranks(predictions), len(predictions["group"]))
    details = _bounds(figures)
    if "label" not in predictions:
        return details
    label = np.asarray(predictions["label"])
    members = {name: label == category_number(name) for name in class_names}
    largest = sorted((name for name in members if members[name].any()), key=lambda name: (-int(members[name].sum()), name))[:_MOST_CATEGORIES]
    for name in largest:
        inside = members[name]
        details[f"category/{name}/num_objects"] = float(inside.sum())
        own = {}
        for direction in DIRECTIONS:
            hits, counts = (values[inside] for values in figures[f"{direction}/recall@3"])
            if counts.sum() > 0:
                own[f"{direction}/category/{name}/recall@3"] = hits, counts
        details |= {metric: float(hits.sum() / counts.sum()) for metric, (hits, counts) in own.items()}
        if inside.sum() >= _FEWEST_FOR_BOUNDS:
            details |= _bounds(own)
    return details


def paired_differences(
    first: Mapping[str, "Ranks"], second: Mapping[str, "Ranks"], num_objects: int
) -> dict[str, tuple[float, float, float]]:
    """Recalls of ``first`` minus those of ``second`` on the same queries, with 95 % bounds: metric -> (difference, low, high).

    Bootstrap over objects as in `retrieval_details`, with the same resamples for both sides and for all metrics, so that what is hard for both cancels.

    Raises:
        ValueError: the two were not asked the same.
    """
    ours, theirs = hits_by_object(first, num_objects), hits_by_object(second, num_objects)
    if ours.keys() != theirs.keys() or any(not np.array_equal(ours[name][1], theirs[name][1]) for name in ours):
        raise ValueError("the two sides were asked by different queries: compare what was ranked for the same split and protocols")
    figures = {name: (hits - theirs[name][0], counts) for name, (hits, counts) in ours.items()}
    bounds = _bounds(figures)
    return {
        name: (float(hits.sum() / counts.sum()), bounds[f"{name}_low"], bounds[f"{name}_high"]) for name, (hits, counts) in figures.items()
    }


def _bounds(figures: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    if not figures:
        return {}
    low, high = ratio_intervals(np.stack([hits for hits, _ in figures.values()], axis=1), np.stack([counts for _, counts in figures.values()], axis=1))
    bounds = {}
    for name, least, most in zip(figures, low.tolist(), high.tolist(), strict=True):
        bounds |= {f"{name}_low": least, f"{name}_high": most}
    return bounds


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Ranks (from 1) of all queries of a protocol, and the object that each query is of: int64 arrays."""

    image_to_mesh: np.ndarray
    image_owner: np.ndarray
    mesh_to_image: np.ndarray
    mesh_owner: np.ndarray


def learned_ranks(predictions: Predictions) -> dict[str, Ranks]:
    """Ranks by the inner product of the embeddings (of meshes with several vectors by `cad_models.alignment.sides.scores`), by infix of the protocol;
    see `retrieval_metrics`."""
    if predictions["cad"].ndim == 3:
        return _ranks_by_sides(predictions)
    cad = torch.from_numpy(np.asarray(predictions["cad"], dtype=np.float32))
    group = torch.from_numpy(np.asarray(predictions["group"], dtype=np.int64))
    found = {}
    for infix, (condition, size) in protocols(predictions, "query").items():
        images, owner = averaged_views(predictions[f"query{condition}"], predictions["num_queries"], size)
        image = torch.from_numpy(images)
        galleries = one_per_object(owner)
        found[infix] = Ranks(
            image_to_mesh=ranks(image, cad, group[torch.from_numpy(owner)], group).numpy(),
            image_owner=owner,
            mesh_to_image=torch.cat([ranks(cad, image[rows], group, group[torch.from_numpy(owner[rows])]) for rows in galleries]).numpy(),
            mesh_owner=np.tile(np.arange(len(cad)), len(galleries)),
        )
    return found


def _ranks_by_sides(predictions: Predictions) -> dict[str, Ranks]:
    cad, group, found = predictions["cad"], np.asarray(predictions["group"]), {}
    for infix, (condition, size) in protocols(predictions, "query").items():
        views, count = predictions[f"query{condition}"], predictions["num_queries"]
        owner = _owners(count, size)
        galleries = one_per_object(owner)
        first = np.searchsorted(owner, owner)  # the first image of each image's object
        to_mesh, to_image = np.zeros(len(owner), dtype=np.int64), []
        # A gallery at a time, for both directions: the scores of all pictures at once would grow with the split six times as fast, and so would the pictures.
        for rows in galleries:
            images = _images(views, count, size, owner[rows], rows - first[rows])
            to_mesh[rows], of_meshes = _two_way_ranks(images, group[owner[rows]], cad, group)
            to_image.append(of_meshes)
            forget_pages(views)
        meshes = np.tile(np.arange(len(group)), len(galleries))
        found[infix] = Ranks(image_to_mesh=to_mesh, image_owner=owner, mesh_to_image=np.concatenate(to_image), mesh_owner=meshes)
    return found


def _owners(count: np.ndarray, size: int) -> np.ndarray:
    """The ``owner`` of `averaged_views`."""
    count = np.asarray(count)
    images = np.where(count == 0, 0, count // np.maximum(np.minimum(size, count) if size else count, 1))
    return np.repeat(np.arange(len(count)), images)


def _images(views: np.ndarray, count: np.ndarray, size: int, objects: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Of some objects one row each of `averaged_views`: float32 [objects, dim], the ``numbers``-th of each."""
    found = np.empty((len(objects), views.shape[2]), dtype=np.float32)
    for row, (i, number) in enumerate(zip(objects.tolist(), numbers.tolist(), strict=True)):
        length = min(size, int(count[i])) if size else int(count[i])
        mean = views[i, number * length : (number + 1) * length].astype(np.float64).mean(0)
        found[row] = mean / max(np.linalg.norm(mean), 1e-12)
    return found


def _two_way_ranks(images: np.ndarray, image_group: np.ndarray, cad: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the right meshes for each image, and of the right images for each mesh.

    Scores that are too many for one block are computed twice, by blocks of images and by blocks of meshes: their memory would grow with the square of
    the split.
    """
    if len(images) * len(cad) <= _SCORE_ELEMENTS:
        score, relevant = side_scores(images, cad), image_group[:, None] == group[None, :]
        return _ranks_of_scores(score, relevant), _ranks_of_scores(score.T, relevant.T)

    def blocks(rows: int, columns: int) -> list[slice]:
        step = max(1, _SCORE_ELEMENTS // max(1, columns))
        return [slice(start, start + step) for start in range(0, rows, step)]

    by_images = [_ranks_of_scores(side_scores(images[b], cad), image_group[b][:, None] == group) for b in blocks(len(images), len(cad))]
    by_meshes = [_ranks_of_scores(side_scores(images, cad[b]).T, group[b][:, None] == image_group) for b in blocks(len(cad), len(images))]
    return np.concatenate(by_images), np.concatenate(by_meshes)


def query_bank_ranks(predictions: Predictions, bank: np.ndarray, *, temperature: float = 0.05) -> dict[str, Ranks]:
    """As `learned_ranks`, with image -> mesh scores normalised by a bank of queries (`cad_models.alignment.query_bank`).

    Args:
        bank: float32 [m, dim], unit embeddings of images of the training split.
    """
    cad, group = np.asarray(predictions["cad"]), np.asarray(predictions["group"])
    found = learned_ranks(predictions)
    for infix, (condition, size) in protocols(predictions, "query").items():
        images, owner = averaged_views(predictions[f"query{condition}"], predictions["num_queries"], size)
        scores = bank_normalised(side_scores(images, cad), side_scores(bank, cad), temperature=temperature)
        found[infix] = replace(found[infix], image_to_mesh=_ranks_of_scores(scores, group[owner][:, None] == group))
    return found


def protocols(columns: Collection[str], prefix: str) -> dict[str, tuple[str, int]]:
    """Infix of a metric's name -> (suffix of the queries' column, images that are averaged into one; 0 = all that an object has).

    Args:
        columns: Names of what there is; a condition whose column is not among them is left out.
        prefix: Name of the column of the query images as they are.
    """
    conditions = {f"{name}/": (f"_{name}", 1) for name in QUERY_CONDITIONS if f"{prefix}_{name}" in columns}
    return {**{infix: ("", size) for infix, size in PROTOCOLS.items()}, **conditions}


def recalls(by_protocol: Mapping[str, "Ranks"]) -> dict[str, float]:
    """``<direction>/<infix>recall@k`` and, of the protocol with one image, ``recall@k``: the mean of both directions."""
    metrics: dict[str, float] = {}
    for infix, found in by_protocol.items():
        for direction in DIRECTIONS:
            metrics |= {f"{direction}/{infix}recall@{k}": float((getattr(found, direction) <= k).mean()) for k in KS}
    for k in KS:
        metrics[f"recall@{k}"] = (metrics[f"image_to_mesh/recall@{k}"] + metrics[f"mesh_to_image/recall@{k}"]) / 2
    return metrics


def hits_by_object(by_protocol: Mapping[str, "Ranks"], num_objects: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What each object adds to each figure of `recalls`: metric -> (hits, queries), float64 [num_objects] each; their sums' ratio is the metric."""
    figures: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for infix, found in by_protocol.items():
        for direction, owner in (("image_to_mesh", found.image_owner), ("mesh_to_image", found.mesh_owner)):
            counts = np.bincount(owner, minlength=num_objects).astype(np.float64)
            for k in KS:
                hits = np.bincount(owner, weights=getattr(found, direction) <= k, minlength=num_objects)
                figures[f"{direction}/{infix}recall@{k}"] = hits, counts
    for k in KS:
        # The mean of both directions as one ratio: each direction's hits are scaled to the same denominator.
        (hits, counts), (others, other_counts) = (figures[f"{direction}/recall@{k}"] for direction in DIRECTIONS)
        figures[f"recall@{k}"] = (hits / counts.sum() + others / other_counts.sum()) / 2, (counts / counts.sum() + other_counts / other_counts.sum()) / 2
    return figures


def averaged_views(views: np.ndarray, count: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit means of disjoint runs of ``size`` views of each object (0 = all its views).

    A remainder of fewer than ``size`` views is left out unless it is all that an object has. Objects without views have no row.

    Args:
        views: float32 [n, most views, dim].
        count: int64 [n].

    Returns:
        ``(means, owner)``: float32 [m, dim] and the object of each mean, int64 [m], ordered by object.
    """
    owner = _owners(count, size)
    return _images(views, count, size, owner, np.arange(len(owner)) - np.searchsorted(owner, owner)), owner


def one_per_object(owner: np.ndarray) -> list[np.ndarray]:
    """Galleries that hold one row of every object: the j-th of each, for each j; an object with fewer rows starts over."""
    if len(owner) == 0:
        return []
    objects, first, count = np.unique(owner, return_index=True, return_counts=True)
    return [first + j % count for j in range(int(count.max()))]


def chance_metrics(group: np.ndarray, conditions: Sequence[str] = ()) -> dict[str, float]:
    """Recall of a random order: the chance that one of an object's group stands among the first k of all meshes. Both directions, all protocols.

    Args:
        group: int64 [n].
        conditions: Names of further conditions of the query images.
    """
    n = len(group)
    _, inverse, count = np.unique(group, return_inverse=True, return_counts=True)
    relevant = count[inverse].astype(np.float64)
    metrics = {}
    for k in KS:
        missed = np.ones(n)
        for i in range(min(k, n)):
            missed *= np.maximum(n - relevant - i, 0) / (n - i)
        for direction in DIRECTIONS:
            metrics |= {f"{direction}/{infix}recall@{k}": float(1 - missed.mean()) for infix in (*PROTOCOLS, *(f"{name}/" for name in conditions))}
        metrics[f"recall@{k}"] = float(1 - missed.mean())
    return metrics


def view_matching_metrics(columns: Columns) -> dict[str, float]:
    """Recalls of the rival without learning: `matching_ranks` of the frozen embeddings."""
    return recalls(matching_ranks(columns))


def matching_ranks(columns: Columns) -> dict[str, Ranks]:
    """Render the gallery, and match views by the cosine of their embeddings, the best view counts; by infix of the protocol.

    Several query images of an object add their scores; objects without a query image are only in the gallery. Ties count against the query, as in
    `retrieval_metrics`.

    Args:
        columns: ``views`` [n, most views, width], embeddings of the gallery's views, ``num_views`` int64 [n]; ``query_views`` [n, most queries, width],
            ``num_query_views``; optionally ``query_views_roll`` and so on; ``group`` int64 [n].
    """
    gallery = [_unit_rows(v[:count]) for v, count in zip(columns["views"], columns["num_views"], strict=True)]
    relevant = columns["group"][:, None] == columns["group"][None, :]
    score_of: dict[str, list[np.ndarray]] = {}
    found = {}
    for infix, (condition, size) in protocols(columns, "query_views").items():
        if condition not in score_of:
            images = [_unit_rows(q[:count]) for q, count in zip(columns[f"query_views{condition}"], columns["num_query_views"], strict=True)]
            # [queries, n] of each object: the best view of every mesh for every image.
            score_of[condition] = [np.stack([(image @ mesh.T).max(axis=1) for mesh in gallery], axis=1) for image in images]
        rows, owner = [], []
        for i, scores in enumerate(score_of[condition]):
            if len(scores) == 0:
                continue
            length = min(size, len(scores)) if size else len(scores)
            for start in range(0, len(scores) - length + 1, length):
                rows.append(scores[start : start + length].mean(axis=0))
                owner.append(i)
        matrix, owners = np.stack(rows), np.array(owner)
        galleries = one_per_object(owners)
        found[infix] = Ranks(
            image_to_mesh=_ranks_of_scores(matrix, relevant[owners]),
            image_owner=owners,
            mesh_to_image=np.concatenate([_ranks_of_scores(matrix[chosen].T, relevant[:, owners[chosen]]) for chosen in galleries]),
            mesh_owner=np.tile(np.arange(len(gallery)), len(galleries)),
        )
    return found


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def _ranks_of_scores(score: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Rank, from 1, of each row's best relevant column; irrelevant columns with an equal score stand before it."""
    best = np.where(relevant, score, -np.inf).max(axis=1, keepdims=True)
    return 1 + ((score >= best) & ~relevant).sum(axis=1)
