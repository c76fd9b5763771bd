"""What embeddings are worth: nearest class centre, nearest neighbours, retrieval, and clusters beside classes."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cad_models.task import Columns, Predictions

NEIGHBOURS = 5
RECALL_AT = (1, 5, 10)

MOST_CLUSTERED = 2_000
"""Clustering and silhouette compare all pairs: of a larger split they take as many objects, evenly spaced."""


def class_centres(
    embeddings: Float[np.ndarray, "n dim"], labels: Int[np.ndarray, " n"], num_classes: int
) -> Float[np.ndarray, "num_classes dim"]:
    """Normalised sum of each class's embeddings, as in the source system; float64, zero for a class without objects."""
    sums = np.zeros((num_classes, embeddings.shape[1]))
    np.add.at(sums, labels, embeddings.astype(np.float64))
    return _unit(sums)


def nearest_centre_accuracy(
    embeddings: Float[np.ndarray, "n dim"],
    labels: Int[np.ndarray, " n"],
    reference: Float[np.ndarray, "m dim"] | None = None,
    reference_labels: Int[np.ndarray, " m"] | None = None,
) -> float:
    """Share of the objects whose nearest class centre (by cosine) is their own class's; ties go to the lower class number.

    The centres are those of the reference. Without one they are the objects' own, each object left out of its class's: a class of one object has no
    centre for it.
    """
    if reference is None or reference_labels is None:
        num_classes = int(labels.max()) + 1
        rows = embeddings.astype(np.float64)
        sums = np.zeros((num_classes, rows.shape[1]))
        np.add.at(sums, labels, rows)
        scores = rows @ _unit(sums).T
        own = np.einsum("nd,nd->n", rows, _unit(sums[labels] - rows))
        alone = np.bincount(labels, minlength=num_classes)[labels] == 1
        scores[np.arange(len(rows)), labels] = np.where(alone, -np.inf, own)
        present = np.bincount(labels, minlength=num_classes) > 0
    else:
        num_classes = int(max(labels.max(), reference_labels.max())) + 1
        scores = embeddings.astype(np.float64) @ class_centres(reference, reference_labels, num_classes).T
        present = np.bincount(reference_labels, minlength=num_classes) > 0
    return float((np.where(present, scores, -np.inf).argmax(axis=1) == labels).mean())


def neighbour_accuracy(
    embeddings: Float[np.ndarray, "n dim"],
    labels: Int[np.ndarray, " n"],
    reference: Float[np.ndarray, "m dim"] | None = None,
    reference_labels: Int[np.ndarray, " m"] | None = None,
    *,
    k: int = NEIGHBOURS,
) -> float:
    """Share of the objects whose ``k`` nearest references (by cosine) are mostly of their class; of equally frequent classes the one whose neighbours
    are more similar wins. Without a reference: the other objects."""
    leave_out = reference is None or reference_labels is None
    against, classes = (embeddings, labels) if leave_out else (reference, reference_labels)
    nearest, similarity = _nearest(embeddings, against, k, excluded=np.arange(len(labels)) if leave_out else None)
    num_classes = int(max(labels.max(), classes.max())) + 1
    votes = np.zeros((len(labels), num_classes))
    rows = np.arange(len(labels))
    for column in range(nearest.shape[1]):
        # Similarities weigh less than a vote: they only break ties.
        vote = 1 + (similarity[:, column] + 1) / (4 * k)
        votes[rows, classes[nearest[:, column]]] += np.where(np.isfinite(vote), vote, 0)
    return float((votes.argmax(axis=1) == labels).mean())


def recall_at(
    embeddings: Float[np.ndarray, "n dim"], labels: Int[np.ndarray, " n"], groups: Int[np.ndarray, " n"], ks: tuple[int, ...] = RECALL_AT
) -> dict[str, float]:
    """Retrieval among the split's other objects: share of the queries with one of their class among the ``k`` nearest (by cosine), as
    ``{"recall@k": share}``. Exact duplicates of the query (its group) are no answers; a query without another object of its class asks nothing;
    without any query 0."""
    groups_of_class = np.bincount(np.unique(np.stack([labels, groups]), axis=1)[0], minlength=int(labels.max()) + 1)
    asks = groups_of_class[labels] > 1
    if not asks.any():
        return {f"recall@{k}": 0.0 for k in ks}
    nearest, similarity = _nearest(embeddings, embeddings, max(ks), excluded=groups)
    found = (labels[nearest] == labels[:, None]) & np.isfinite(similarity)
    return {f"recall@{k}": float(found[asks, :k].any(axis=1).mean()) for k in ks}


def _nearest(queries: np.ndarray, gallery: np.ndarray, k: int, *, excluded: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Positions and cosines [n, k] of the nearest, best first, ties to the lower position.

    Args:
        excluded: int [n], where queries and gallery are the same objects: those with the same number are not each other's neighbours (cosine -inf).
    """
    k = max(1, min(k, len(gallery) - (excluded is not None)))
    positions, values = [], []
    block = max(1, (1 << 24) // max(1, len(gallery)))
    gallery = gallery.astype(np.float64)
    for start in range(0, len(queries), block):
        scores = queries[start : start + block].astype(np.float64) @ gallery.T
        if excluded is not None:
            scores[excluded[start : start + block, None] == excluded[None, :]] = -np.inf
        # Rounding differs with the block; what is equal to seven digits is a tie.
        order = np.argsort(-scores.astype(np.float32), axis=1, kind="stable")[:, :k]
        positions.append(order)
        values.append(np.take_along_axis(scores, order, axis=1))
    return np.concatenate(positions), np.concatenate(values)


def purity(clusters: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> float:
    """Share of the objects that belong to the most frequent class of their cluster.

    >>> purity(np.array([0, 0, 0, 1]), np.array([2, 2, 1, 1]))
    0.75
    """
    table = np.zeros((int(clusters.max()) + 1, int(labels.max()) + 1), dtype=np.int64)
    np.add.at(table, (clusters, labels), 1)
    return float(table.max(axis=1).sum() / len(labels))


def cluster(embeddings: Float[np.ndarray, "n dim"], num_clusters: int) -> Int[np.ndarray, " n"]:
    """Agglomerative clusters by cosine distance and complete linkage, numbered from 0; no more clusters than objects."""
    from sklearn.cluster import AgglomerativeClustering

    if len(embeddings) < 2:
        return np.zeros(len(embeddings), dtype=np.int64)
    model = AgglomerativeClustering(n_clusters=min(num_clusters, len(embeddings)), metric="cosine", linkage="complete")
    return model.fit_predict(embeddings.astype(np.float64)).astype(np.int64)


def evenly_spaced(count: int, most: int = MOST_CLUSTERED) -> Int[np.ndarray, " kept"]:
    """Positions of at most ``most`` of ``count`` objects."""
    return np.arange(count) if count <= most else np.arange(most) * count // most


def cluster_metrics(
    embeddings: Float[np.ndarray, "n dim"], labels: Int[np.ndarray, " n"], num_clusters: int = 0
) -> dict[str, float]:
    """``clusters/ari``, ``clusters/nmi`` and ``clusters/purity`` of agglomerative clusters beside the classes, and ``silhouette`` of the classes (by
    cosine distance, in [-1, 1]; 0 where it is not defined: one class, or each object its own).

    Args:
        num_clusters: 0 = as many as there are classes.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

    chosen = evenly_spaced(len(labels))
    embeddings, labels = embeddings[chosen], labels[chosen]
    num_classes = len(np.unique(labels))
    found = cluster(embeddings, num_clusters or num_classes)
    defined = 1 < num_classes < len(labels)
    return {
        "clusters/ari": float(adjusted_rand_score(labels, found)),
        "clusters/nmi": float(normalized_mutual_info_score(labels, found)),
        "clusters/purity": purity(found, labels),
        "silhouette": float(silhouette_score(embeddings.astype(np.float64), labels, metric="cosine")) if defined else 0.0,
    }


def embedding_metrics(predictions: Predictions, reference: Predictions | None = None) -> dict[str, float]:
    """All metrics of a split; the reference is the train split's predictions. See the single functions."""
    embeddings, labels = predictions["embedding"], predictions["label"]
    against = (None, None) if reference is None else (reference["embedding"], reference["label"])
    return {
        "nearest_centre_accuracy": nearest_centre_accuracy(embeddings, labels, *against),
        "knn_accuracy": neighbour_accuracy(embeddings, labels, *against),
        **recall_at(embeddings, labels, predictions["group"]),
        **cluster_metrics(embeddings, labels, int(predictions["num_clusters"][0])),
    }


def untrained_metrics(columns: Columns, reference: Columns | None) -> dict[str, dict[str, float]]:
    """Nearest class centre and nearest neighbours on the features as they are, centred on the reference's mean, and ridge regression on the classes
    (standardised features, penalty 100). Without a reference only the first."""
    centre = (columns if reference is None else reference)["features"].mean(axis=0, dtype=np.float64)
    rows = {"embedding": _unit(columns["features"] - centre), "label": columns["label"], "group": columns["group"], "num_clusters": np.zeros(1, dtype=np.int64)}
    if reference is None:
        return {"features as they are": embedding_metrics(rows)}
    beside = {"embedding": _unit(reference["features"] - centre), "label": reference["label"]}
    ridge = ridge_classifier().fit(reference["features"], reference["label"])
    accuracy = float((ridge.predict(columns["features"]) == columns["label"]).mean())
    return {"features as they are": embedding_metrics(rows, beside), "ridge": {"nearest_centre_accuracy": accuracy}}


def ridge_classifier() -> Any:
    """scikit-learn's ridge regression on class indicators, on standardised features."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), RidgeClassifier(alpha=100.0))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
