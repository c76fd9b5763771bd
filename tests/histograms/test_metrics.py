"""Metrics against hand values and slow, obvious code."""

import numpy as np
import pytest

from cad_models.histograms.metrics import (
    cluster,
    cluster_metrics,
    embedding_metrics,
    evenly_spaced,
    nearest_centre_accuracy,
    neighbour_accuracy,
    purity,
    recall_at,
    untrained_metrics,
)


def angles(degrees):
    a = np.deg2rad(np.asarray(degrees, dtype=float))
    return np.stack([np.cos(a), np.sin(a)], axis=1)


def clouds(n=40, classes=3, dim=6, noise=0.6, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    rows = np.eye(dim)[labels] + noise * rng.standard_normal((n, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


def test_nearest_centre_by_hand():
    train, train_labels = angles([0, 10, 90, 100]), np.array([0, 0, 1, 1])
    # Centres lie at 5 and at 95 degrees: the border is at 50.
    assert nearest_centre_accuracy(angles([40, 49, 51, 60]), np.array([0, 0, 1, 0]), train, train_labels) == 0.75
    # A class that the reference does not have is never the answer.
    assert nearest_centre_accuracy(angles([180]), np.array([3]), train, train_labels) == 0.0


def test_nearest_centre_without_reference_leaves_the_object_out():
    # Alone in its class at 30 degrees: its own centre would be itself.
    assert nearest_centre_accuracy(angles([0, 10, 30]), np.array([0, 0, 1])) == pytest.approx(2 / 3)
    rows, labels = clouds()
    right = 0
    for i in range(len(rows)):
        rest = np.arange(len(rows)) != i
        centres = np.stack([rows[rest & (labels == c)].astype(float).sum(axis=0) for c in range(3)])
        right += (centres / np.linalg.norm(centres, axis=1, keepdims=True) @ rows[i]).argmax() == labels[i]
    assert nearest_centre_accuracy(rows, labels) == pytest.approx(right / len(rows))


def test_neighbours_vote_and_similarity_breaks_ties():
    train, train_labels = angles([0, 20, 22, 90]), np.array([0, 1, 1, 0])
    assert neighbour_accuracy(angles([4]), np.array([1]), train, train_labels, k=3) == 1.0  # two of three
    assert neighbour_accuracy(angles([4]), np.array([0]), train, train_labels, k=2) == 1.0  # one each: the nearer wins
    assert neighbour_accuracy(angles([4]), np.array([1]), train, train_labels, k=99) == 1.0  # all four: two each, 20 and 22 nearer than 0 and 90


def test_neighbours_without_reference_equal_a_loop():
    rows, labels = clouds()
    right = 0
    for i in range(len(rows)):
        order = sorted((j for j in range(len(rows)) if j != i), key=lambda j: -float(rows[i].astype(float) @ rows[j]))[:5]
        votes = {c: (sum(labels[j] == c for j in order), sum(float(rows[i] @ rows[j]) for j in order if labels[j] == c)) for c in range(3)}
        right += max(votes, key=votes.get) == labels[i]
    assert neighbour_accuracy(rows, labels) == pytest.approx(right / len(rows))


def test_recall_by_hand_leaves_duplicates_and_lone_classes_out():
    rows, labels = angles([0, 1.1, 2, 50, 60]), np.array([0, 1, 0, 1, 2])
    each = np.arange(5)
    # 0: 1.1 (wrong), 2 (right). 1.1: 2, 0, 50 (right). 2: 1.1, 0 (right). 50: 60, 2, 1.1 (right). 60 is alone in its class and asks nothing.
    assert recall_at(rows, labels, each, (1, 2, 3)) == {"recall@1": 0.0, "recall@2": 0.5, "recall@3": 1.0}
    # With 0 and 2 one group, class 0 has nothing else to find and asks nothing; both of class 1 find others first.
    assert recall_at(rows, labels, np.array([0, 1, 0, 3, 4]), (2,)) == {"recall@2": 0.0}
    assert recall_at(rows, np.arange(5), each, (1,)) == {"recall@1": 0.0}


def test_purity_and_clusters_of_separated_clouds_are_perfect():
    rows, labels = clouds(noise=0.05)
    found = cluster(rows, 3)
    assert purity(found, labels) == 1.0 and purity(np.zeros(40, dtype=int), labels) == pytest.approx(14 / 40)
    metrics = cluster_metrics(rows, labels)
    assert metrics["clusters/ari"] == metrics["clusters/nmi"] == metrics["clusters/purity"] == 1.0 and metrics["silhouette"] > 0.9
    assert cluster_metrics(rows, labels, num_clusters=2)["clusters/purity"] < 0.7


def test_cluster_metrics_at_the_edges_are_finite():
    rows, labels = clouds(4, classes=1)
    assert cluster_metrics(rows, labels)["silhouette"] == 0.0
    assert cluster_metrics(rows[:1], labels[:1])["clusters/purity"] == 1.0
    assert cluster_metrics(rows, np.arange(4), num_clusters=9)["clusters/purity"] == 1.0


def test_evenly_spaced_keeps_all_or_as_many_as_asked():
    assert evenly_spaced(3, 5).tolist() == [0, 1, 2]
    assert evenly_spaced(10, 4).tolist() == [0, 2, 5, 7]


def test_all_metrics_of_a_split_are_there():
    rows, labels = clouds()
    predictions = {"embedding": rows, "label": labels, "group": np.arange(40), "num_clusters": np.zeros(40, dtype=int)}
    metrics = embedding_metrics(predictions, {"embedding": rows, "label": labels})
    assert set(metrics) == {
        "nearest_centre_accuracy", "knn_accuracy", "recall@1", "recall@5", "recall@10", "clusters/ari", "clusters/nmi", "clusters/purity", "silhouette",
    }  # fmt: skip
    assert metrics["nearest_centre_accuracy"] == nearest_centre_accuracy(rows, labels, rows, labels)


def test_untrained_baselines_learn_from_the_reference_alone():
    rows, labels = clouds(60, noise=0.2)
    columns = {"features": rows, "label": labels, "group": np.arange(60)}
    found = untrained_metrics({n: c[40:] for n, c in columns.items()}, {n: c[:40] for n, c in columns.items()})
    assert found["ridge"]["nearest_centre_accuracy"] == found["features as they are"]["nearest_centre_accuracy"] == 1.0
    wrong = untrained_metrics({n: c[40:] for n, c in columns.items()}, {**{n: c[:40] for n, c in columns.items()}, "label": (labels[:40] + 1) % 3})
    assert wrong["ridge"]["nearest_centre_accuracy"] == 0.0
