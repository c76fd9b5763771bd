"""Recall under its three protocols: worked by hand, against a loop over everything, and against simulation."""

import numpy as np
import pytest

from cad_models.alignment.data import category_number
from cad_models.alignment.metrics import (
    KS,
    averaged_views,
    chance_metrics,
    one_per_object,
    retrieval_details,
    retrieval_metrics,
    view_matching_metrics,
)


def unit(*angles_deg: float) -> np.ndarray:
    """Unit vectors of the plane, by their angles."""
    radians = np.deg2rad(np.array(angles_deg, dtype=np.float64))
    return np.stack([np.cos(radians), np.sin(radians)], axis=-1).astype(np.float32)


def predictions(cad, query, num_queries=None, group=None) -> dict[str, np.ndarray]:
    query = np.asarray(query, dtype=np.float32)
    return {
        "cad": np.asarray(cad, dtype=np.float32),
        "query": query,
        "num_queries": np.full(len(query), query.shape[1]) if num_queries is None else np.array(num_queries),
        "group": np.arange(len(query)) if group is None else np.array(group),
    }


def random_predictions(seed: int, n=12, views=7, dim=6, duplicates=True):
    rng = np.random.default_rng(seed)
    cad = rng.normal(size=(n, dim))
    count = rng.integers(1, views + 1, n)
    query = cad[:, None] + 1.2 * rng.normal(size=(n, views, dim))
    cad /= np.linalg.norm(cad, axis=1, keepdims=True)
    query /= np.linalg.norm(query, axis=2, keepdims=True)
    for row, c in zip(query, count, strict=True):
        row[c:] = 0
    group = np.arange(n)
    if duplicates:
        group[3], group[7] = group[1], group[2]
    return predictions(cad, query, count, group)


def naive_recall(found: list[int], k: int) -> float:
    return sum(rank <= k for rank in found) / len(found)


def naive_rank(score: np.ndarray, relevant: np.ndarray) -> int:
    best = max(s for s, r in zip(score, relevant, strict=True) if r)
    return 1 + sum(not r and s >= best for s, r in zip(score, relevant, strict=True))


def naive_metrics(p) -> dict[str, float]:
    """Written out: every image, every gallery, one after the other."""
    metrics = {}
    n = len(p["cad"])
    for infix, size in {"": 1, "3_views/": 3, "all_views/": None}.items():
        images: list[list[np.ndarray]] = []
        for i in range(n):
            views = [p["query"][i, j].astype(np.float64) for j in range(p["num_queries"][i])]
            step = len(views) if size is None else size
            runs = [views[s : s + step] for s in range(0, len(views), step)]
            runs = [run for run in runs if len(run) == step] or [views]
            images.append([np.mean(run, axis=0) / np.linalg.norm(np.mean(run, axis=0)) for run in runs])
        forward = [naive_rank(p["cad"] @ image, p["group"] == p["group"][i]) for i in range(n) for image in images[i]]
        backward = []
        for j in range(max(map(len, images))):
            gallery = np.stack([own[j % len(own)] for own in images])
            backward += [naive_rank(gallery @ p["cad"][i], p["group"] == p["group"][i]) for i in range(n)]
        for k in KS:
            metrics[f"image_to_mesh/{infix}recall@{k}"] = naive_recall(forward, k)
            metrics[f"mesh_to_image/{infix}recall@{k}"] = naive_recall(backward, k)
        if not infix:
            metrics["image_to_mesh/median_rank"] = sorted(forward)[(len(forward) - 1) // 2]
            metrics["mesh_to_image/median_rank"] = sorted(backward)[(len(backward) - 1) // 2]
    for k in KS:
        metrics[f"recall@{k}"] = (metrics[f"image_to_mesh/recall@{k}"] + metrics[f"mesh_to_image/recall@{k}"]) / 2
    return metrics


@pytest.mark.parametrize("seed", range(6))
def test_retrieval_metrics_equal_a_loop_over_everything(seed):
    p = random_predictions(seed, duplicates=seed % 2 == 0)
    found, expected = retrieval_metrics(p), naive_metrics(p)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == pytest.approx(expected[name], abs=1e-12), name


def test_retrieval_of_perfect_embeddings_is_one_everywhere():
    cad = unit(0, 60, 120, 180, 240, 300)
    metrics = retrieval_metrics(predictions(cad, np.repeat(cad[:, None], 4, axis=1)))
    assert all(value == 1 for value in metrics.values())


def test_retrieval_worked_by_hand():
    # Objects at 0°, 30°, 90°. The images of the first: at 5° (nearest itself, rank 1), at 80° (nearest the third, then the second: rank 3), at
    # 20° (nearest the second: rank 2); of the second one at 30°, of the third one at 100°.
    query = np.zeros((3, 3, 2), dtype=np.float32)
    query[0], query[1, 0], query[2, 0] = unit(5, 80, 20), unit(30)[0], unit(100)[0]
    metrics = retrieval_metrics(predictions(unit(0, 30, 90), query, [3, 1, 1]))
    assert metrics["image_to_mesh/recall@1"] == pytest.approx(3 / 5)
    assert metrics["image_to_mesh/recall@3"] == 1 and metrics["image_to_mesh/median_rank"] == 1
    # The mean of 5°, 80° and 20° lies at 33.6°: nearest to the second object, then to the first.
    assert metrics["image_to_mesh/3_views/recall@1"] == metrics["image_to_mesh/all_views/recall@1"] == pytest.approx(2 / 3)
    # Galleries (5|30|100), (80|30|100), (20|30|100). The first mesh (0°) finds 5° first; 30° before 80°; 20° before 30°. The second (30°) finds its
    # 30° always, the third (90°) 100° (10° away; 80° is as far: a tie counts against it).
    assert metrics["mesh_to_image/recall@1"] == pytest.approx((3 + 1 + 3) / 9)
    assert metrics["mesh_to_image/recall@3"] == 1


def test_constant_embeddings_are_not_rewarded():
    constant = np.ones((12, 3, 4), dtype=np.float32) / 2
    metrics = retrieval_metrics(predictions(constant[:, 0], constant))
    assert metrics["image_to_mesh/recall@10"] == metrics["mesh_to_image/recall@10"] == 0
    assert metrics["image_to_mesh/median_rank"] == 12


def test_duplicates_are_right_answers_for_one_another():
    cad, query = unit(0, 1, 90), unit(1, 0, 90)[:, None]
    assert retrieval_metrics(predictions(cad, query))["image_to_mesh/recall@1"] == pytest.approx(1 / 3)
    alike = retrieval_metrics(predictions(cad, query, group=[4, 4, 5]))
    assert alike["image_to_mesh/recall@1"] == alike["mesh_to_image/recall@1"] == 1


def test_metrics_do_not_depend_on_what_stands_in_the_padding():
    p = random_predictions(1)
    filled = {**p, "query": p["query"].copy()}
    for row, count in zip(filled["query"], p["num_queries"], strict=True):
        row[count:] = 7.0
    assert retrieval_metrics(filled) == retrieval_metrics(p)


@pytest.mark.parametrize("size, owners, first", [(1, [0, 0, 0, 0, 2], 0.0), (2, [0, 0, 2], 5.0), (3, [0, 2], 10.0), (0, [0, 2], 15.0)])
def test_averaged_views_are_unit_means_of_disjoint_runs(size, owners, first):
    views = np.zeros((3, 4, 2), dtype=np.float32)
    views[0], views[2, 0] = unit(0, 10, 20, 30), 3 * unit(45)[0]
    means, owner = averaged_views(views, np.array([4, 0, 1]), size)
    assert owner.tolist() == owners
    np.testing.assert_allclose(means[0], unit(first)[0], atol=1e-6)
    np.testing.assert_allclose(means[-1], unit(45)[0], atol=1e-6)


def test_one_per_object_starts_over_where_an_object_has_fewer():
    galleries = one_per_object(np.array([0, 0, 0, 2, 5, 5]))
    assert [g.tolist() for g in galleries] == [[0, 3, 4], [1, 3, 5], [2, 3, 4]]
    assert one_per_object(np.zeros(0, dtype=np.int64)) == []


def test_chance_metrics_equal_a_simulation_of_random_orders():
    group = np.array([0, 0, 0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9])
    expected = chance_metrics(group)
    rng = np.random.default_rng(0)
    num_trials = 1500
    hits = dict.fromkeys(KS, 0)
    for _ in range(num_trials):
        order = rng.permutation(len(group))
        for query in range(len(group)):
            for k in KS:
                hits[k] += bool((group[order[:k]] == group[query]).any())
    for k in KS:
        for name in (f"recall@{k}", f"image_to_mesh/recall@{k}", f"mesh_to_image/3_views/recall@{k}"):
            assert expected[name] == pytest.approx(hits[k] / num_trials / len(group), abs=0.015)


def test_chance_metrics_of_fewer_objects_than_k_are_one():
    assert chance_metrics(np.arange(2))["recall@3"] == 1.0
    assert chance_metrics(np.arange(2))["recall@1"] == 0.5


def matching_metrics(views, num_views, queries, num_queries, group):
    return view_matching_metrics(
        {"views": views, "num_views": num_views, "query_views": queries, "num_query_views": num_queries, "group": group}
    )


def test_view_matching_finds_the_object_of_the_best_view():
    views = np.zeros((3, 2, 2), dtype=np.float16)
    views[0], views[1], views[2, 0] = unit(0, 180), unit(90, 200), 5 * unit(45)[0]  # length does not count
    queries = np.zeros((3, 2, 2), dtype=np.float16)
    queries[0], queries[1], queries[2, 0] = unit(170, 5), unit(95, 100), unit(10)[0]
    metrics = matching_metrics(views, np.array([2, 2, 1]), queries, np.array([2, 2, 1]), np.arange(3))
    # 170° is 10° from 180°, 5° from 0° is right, 95° and 100° are near 90°; 10° is nearer to 0° than to 45°.
    assert metrics["image_to_mesh/recall@1"] == pytest.approx(4 / 5)
    assert metrics["image_to_mesh/all_views/recall@1"] == pytest.approx(2 / 3)
    assert metrics["image_to_mesh/recall@3"] == 1
    assert metrics.keys() == {n for n in retrieval_metrics(random_predictions(0)) if "median" not in n}


def test_view_matching_with_one_view_equals_retrieval_of_the_same_vectors():
    p = random_predictions(3, views=1)
    matching = matching_metrics(p["cad"][:, None], np.ones(12, int), p["query"], p["num_queries"], p["group"])
    metrics = retrieval_metrics(p)
    for name in matching:
        assert matching[name] == pytest.approx(metrics[name]), name


def test_view_matching_of_equal_views_is_not_rewarded():
    same = np.ones((8, 2, 4), dtype=np.float16)
    metrics = matching_metrics(same, np.full(8, 2), same, np.full(8, 2), np.arange(8))
    assert metrics["image_to_mesh/recall@5"] == metrics["mesh_to_image/recall@5"] == 0


def test_view_matching_leaves_out_objects_without_a_query_image():
    views, queries = unit(0, 90, 180)[:, None], unit(0, 90, 180)[:, None]
    with np.errstate(all="raise"):
        metrics = matching_metrics(views, np.ones(3, int), queries, np.array([1, 0, 1]), np.arange(3))
    assert metrics["image_to_mesh/recall@1"] == 1


# --- intervals and categories -------------------------------------------------------------------------------------------------------------
def test_details_bound_every_recall_and_hold_its_value():
    found = random_predictions(4, n=40)
    metrics, details = retrieval_metrics(found), retrieval_details(found)
    recalls = {name for name in metrics if "recall@" in name}
    assert details.keys() == {f"{name}_{side}" for name in recalls for side in ("low", "high")}
    for name in recalls:
        assert details[f"{name}_low"] - 1e-12 <= metrics[name] <= details[f"{name}_high"] + 1e-12
    assert any(details[f"{name}_low"] < metrics[name] < details[f"{name}_high"] for name in recalls)
    assert retrieval_details(found) == details


def test_details_of_certain_answers_have_no_width():
    p = predictions(unit(0, 90, 180), unit(0, 90, 180)[:, None])
    assert set(retrieval_details(p).values()) == {1.0}


def test_categories_equal_recall_of_their_own_queries_among_all_meshes():
    found = random_predictions(6, n=30)
    names = ["bolt", "nut", "a/b c"]
    labels = [names[i % 3] if i < 28 else "" for i in range(30)]
    details = retrieval_details(found | {"label": np.array([category_number(label) for label in labels])}, [*names, "absent"])
    assert not any("absent" in name for name in details)
    similarity = np.einsum("ivd,jd->ivj", found["query"].astype(np.float64), found["cad"].astype(np.float64))
    relevant = found["group"][:, None] == found["group"][None, :]
    for category in names:
        members = [i for i in range(30) if labels[i] == category]
        assert details[f"category/{category}/num_objects"] == len(members)
        ranks_found = [naive_rank(similarity[i, v], relevant[i]) for i in members for v in range(found["num_queries"][i])]
        metric = f"image_to_mesh/category/{category}/recall@3"
        assert details[metric] == pytest.approx(naive_recall(ranks_found, 3))
        assert details[f"{metric}_low"] <= details[metric] <= details[f"{metric}_high"]
        backward = []
        for gallery in range(int(found["num_queries"].max())):
            image = similarity[np.arange(30), gallery % found["num_queries"]]
            backward += [naive_rank(image[:, i], relevant[i]) for i in members]
        assert details[f"mesh_to_image/category/{category}/recall@3"] == pytest.approx(naive_recall(backward, 3))


def test_small_categories_have_no_bounds_and_many_are_cut_to_the_largest():
    found = random_predictions(7, n=120, duplicates=False)
    names = [f"c{i:02d}" for i in range(60)]
    labels = [names[i // 2] for i in range(120)]
    details = retrieval_details(found | {"label": np.array([category_number(label) for label in labels])}, names)
    counted = [name for name in details if name.endswith("num_objects")]
    assert len(counted) == 50 and "category/c59/num_objects" not in details
    assert not any("category" in name and name.endswith(("_low", "_high")) for name in details)
