"""The fused score against loops over pictures, meshes and views; fitted weights; figures of a split."""

import numpy as np
import pytest

from cad_models.alignment import fusion
from cad_models.alignment.fusion import (
    DEFAULT_WEIGHTS,
    POINT_ONLY,
    FusionWeights,
    MeshVectors,
    PictureVectors,
    best_columns,
    crowding,
    fit_weights,
    fuse,
    fused_details,
    score_components,
    weights_in,
)
from cad_models.alignment.metrics import retrieval_metrics, view_matching_metrics
from cad_models.tasks import TASKS

TASK = TASKS["alignment"]


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


def vectors(seed: int = 0, pictures: int = 5, meshes: int = 4, views: int = 3) -> tuple[PictureVectors, MeshVectors]:
    rng = np.random.default_rng(seed)
    return (
        PictureVectors(head=unit(rng.normal(size=(pictures, 6))), frozen=rng.normal(size=(pictures, 9)).astype(np.float16)),
        MeshVectors(
            point=unit(rng.normal(size=(meshes, 6))),
            view=unit(rng.normal(size=(meshes, views, 6))).astype(np.float16),
            frozen=rng.normal(size=(meshes, views, 9)).astype(np.float16),
        ),
    )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def split(seed: int = 0, objects: int = 12, signal: tuple[float, float, float] = (1.0, 1.0, 1.0), noise: float = 1.0) -> dict[str, np.ndarray]:
    """Predictions in which each score tells as much of the right object as ``signal`` says; 2 or 3 pictures, 2 to 4 views an object."""
    rng = np.random.default_rng(seed)
    count, queries = rng.integers(2, 5, objects), rng.integers(2, 4, objects)
    dim = 16
    truth = [unit(rng.normal(size=(objects, dim))) for _ in range(3)]

    def seen(k: int, number: np.ndarray, most: int) -> np.ndarray:
        rows = signal[k] * truth[k][:, None] + noise * rng.normal(size=(objects, most, dim)) / np.sqrt(dim)
        rows[np.arange(most)[None, :] >= number[:, None]] = 0.0
        return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)

    # The head's space is shared by two scores: its first half tells the point cloud's, the second the views'.
    head = np.concatenate([seen(0, queries, 3), seen(1, queries, 3)], axis=2) / np.sqrt(2)
    point = np.concatenate([seen(0, np.full(objects, 1), 1)[:, 0], np.zeros((objects, dim))], axis=1)
    view = np.concatenate([np.zeros((objects, 4, dim)), seen(1, count, 4)], axis=2)
    return {
        "cad": point.astype(np.float32),
        "query": head.astype(np.float32),
        "num_queries": queries.astype(np.int64),
        "group": np.arange(objects, dtype=np.int64),
        "view": view.astype(np.float16),
        "num_views": count.astype(np.int64),
        "frozen_view": seen(2, count, 4).astype(np.float16),
        "frozen_query": seen(2, queries, 3).astype(np.float16),
    }


# --- scores -------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("block", [None, 8])
def test_score_components_equal_a_loop_over_pictures_meshes_and_views(block, monkeypatch):
    if block:
        monkeypatch.setattr(fusion, "_BLOCK_ELEMENTS", block)
    pictures, meshes = vectors()
    found = score_components(pictures, meshes)
    for i in range(5):
        for j in range(4):
            assert found[0, i, j] == pytest.approx(cosine(pictures.head[i], meshes.point[j]), abs=1e-6)
            assert found[1, i, j] == pytest.approx(max(cosine(pictures.head[i], view) for view in meshes.view[j]), abs=1e-6)
            assert found[2, i, j] == pytest.approx(max(cosine(pictures.frozen[i], view) for view in meshes.frozen[j]), abs=1e-6)


def test_scores_do_not_depend_on_how_the_work_is_cut(monkeypatch):
    pictures, meshes = vectors(seed=4, pictures=30, meshes=20)
    whole = score_components(pictures, meshes)
    monkeypatch.setattr(fusion, "_BLOCK_ELEMENTS", 60)
    assert np.array_equal(score_components(pictures, meshes), whole)


def test_score_of_weight_0_is_not_computed_and_the_rest_is_the_same():
    pictures, meshes = vectors()
    weights = FusionWeights(point=1.0, view=0.0, frozen=3.0)
    found, whole = score_components(pictures, meshes, weights), score_components(pictures, meshes)
    assert not found[1].any() and np.array_equal(found[[0, 2]], whole[[0, 2]])
    np.testing.assert_allclose(fuse(found, weights), 0.25 * whole[0] + 0.75 * whole[2], atol=1e-6)


def test_equal_meshes_have_equal_scores():
    pictures, meshes = vectors(meshes=6)
    twice = MeshVectors(**{name: np.concatenate([rows, rows[::-1]]) for name, rows in vars(meshes).items()})
    scores = fuse(score_components(pictures, twice), DEFAULT_WEIGHTS)
    assert np.array_equal(scores[:, :6], scores[:, 6:][:, ::-1])


@pytest.mark.parametrize("k", [1, 3, 7, 20])
def test_best_columns_equal_a_sort_with_ties_to_the_lower_index(k):
    scores = np.random.default_rng(1).integers(0, 4, (6, 7)).astype(np.float32)
    for row, found in zip(scores, best_columns(scores, k), strict=True):
        assert found.tolist() == sorted(range(7), key=lambda column: (-row[column], column))[:k]


@pytest.mark.parametrize("values", [(0.0, 0.0, 0.0), (-1.0, 1.0, 1.0), (float("nan"), 1.0, 1.0), (float("inf"), 1.0, 1.0)])
def test_weights_that_weigh_nothing_are_refused(values):
    with pytest.raises(ValueError, match="must be finite, not negative, and not all 0"):
        FusionWeights(point=values[0], view=values[1], frozen=values[2])


def test_weights_in_what_was_fitted_else_the_default():
    assert weights_in(None) == weights_in({}) == DEFAULT_WEIGHTS
    assert weights_in({"fusion": {"point": 1, "view": 0, "frozen": 2, "crowd": 0.5}}) == FusionWeights(point=1.0, view=0.0, frozen=2.0, crowd=0.5)


# --- fitting ------------------------------------------------------------------------------------------------------------------------------
def test_logit_gradient_equals_finite_differences():
    rng = np.random.default_rng(0)
    components, relevant = rng.normal(size=(3, 7, 5)), rng.random((7, 5)) < 0.3
    relevant[:, 0] = True
    weights = np.array([0.5, 2.0, 1.0])
    value, gradient = fusion._negative_log_share(components, relevant, weights)
    naive = 0.0
    for q in range(7):
        odds = [np.exp(sum(weights[k] * components[k, q, c] for k in range(3))) for c in range(5)]
        naive -= np.log(sum(o for o, right in zip(odds, relevant[q], strict=True) if right) / sum(odds)) / 7
    assert value == pytest.approx(naive, abs=1e-12)
    for k in range(3):
        step = 1e-6 * np.eye(3)[k]
        high, low = (fusion._negative_log_share(components, relevant, weights + s)[0] for s in (step, -step))
        assert gradient[k] == pytest.approx((high - low) / 2e-6, abs=1e-6)


@pytest.mark.parametrize("telling", [0, 1, 2])
def test_fitted_weights_go_to_the_score_that_tells_something(telling):
    signal = [0.0, 0.0, 0.0]
    signal[telling] = 3.0
    weights = fit_weights(split(objects=60, signal=tuple(signal)))
    assert weights.of_scores[telling] > 0.8 and sum(weights.of_scores) == pytest.approx(1, abs=1e-5)


def test_fitted_weights_do_better_than_each_score_alone_on_other_objects():
    weights = fit_weights(split(seed=1, objects=60))
    other = split(seed=2, objects=60)
    found = fused_details(other | {"fusion": np.tile(weights.as_tuple(), (60, 1))})
    assert found["fused_gain/over_view_matching/recall@3_low"] > 0 and found["fused_gain/over_learned/recall@3_low"] > 0
    assert found["fused/weight/frozen"] == weights.frozen


def test_fit_is_deterministic_and_sees_no_padding():
    predictions = split(objects=20)
    filled = {name: column.copy() for name, column in predictions.items()}
    for name, count in (("view", "num_views"), ("frozen_view", "num_views"), ("query", "num_queries"), ("frozen_query", "num_queries")):
        filled[name][np.arange(filled[name].shape[1])[None, :] >= filled[count][:, None]] = 0.3
    assert fit_weights(predictions) == fit_weights(predictions) == fit_weights(filled)
    assert fused_details(predictions) == fused_details(filled)


def test_nothing_to_choose_from_fits_nothing():
    assert fit_weights(split(objects=1)) is None
    same = split(objects=5)
    assert fit_weights({**same, "group": np.zeros(5, dtype=np.int64)}) is None
    constant = {name: np.ones_like(column) if column.ndim > 1 else column for name, column in same.items()}
    assert fit_weights(constant) is None


# --- crowd --------------------------------------------------------------------------------------------------------------------------------
def naive_crowd(pictures: list[np.ndarray], i: int, owner: list[int] | None = None) -> float:
    owner = list(range(len(pictures))) if owner is None else owner
    nearest = sorted((cosine(pictures[i], other) for j, other in enumerate(pictures) if owner[j] != owner[i]), reverse=True)[:5]
    return float(np.mean(nearest)) if nearest else 0.0


@pytest.mark.parametrize("block", [None, 4])
def test_crowding_equals_a_loop_over_the_pictures_of_other_objects(block, monkeypatch):
    if block:
        monkeypatch.setattr(fusion, "_BLOCK_ELEMENTS", block)
    frozen, owner = vectors(pictures=12)[0].frozen, [0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 7, 8]
    found = crowding(frozen, np.array(owner))
    np.testing.assert_allclose(found, [naive_crowd(list(frozen), i, owner) for i in range(12)], atol=1e-6)


def test_crowding_of_few_and_of_many_pictures(monkeypatch):
    frozen = vectors(pictures=12)[0].frozen
    assert crowding(frozen[:1], np.array([0])).tolist() == [0.0]
    assert crowding(frozen[:3], np.array([0, 0, 0])).tolist() == [0.0] * 3
    assert crowding(frozen[:2], np.array([0, 1]))[0] == pytest.approx(cosine(frozen[0], frozen[1]), abs=1e-6)
    monkeypatch.setattr(fusion, "_CROWD_BANK", 4)
    every_third = [np.mean(sorted((cosine(frozen[i], frozen[j]) for j in range(0, 12, 3) if j != i), reverse=True)) for i in range(12)]
    np.testing.assert_allclose(crowding(frozen, np.arange(12)), every_third, atol=1e-6)


def test_crowd_is_taken_off_where_pictures_are_the_answers_and_is_learned_there():
    predictions = split(seed=1, objects=40, signal=(0.7, 0.7, 0.7))
    # Every fourth object's pictures lie near the middle of all: they come near to every mesh.
    rng = np.random.default_rng(0)
    middle = rng.normal(size=16)
    for name in ("frozen_query", "frozen_view"):
        predictions[name] = (predictions[name] + 0.8 * middle / np.linalg.norm(middle)).astype(np.float16)
    predictions["frozen_query"][::4] += (1.5 * middle / np.linalg.norm(middle)).astype(np.float16)
    weights = fit_weights(predictions)
    assert weights.crowd > 0.1
    without = FusionWeights(point=weights.point, view=weights.view, frozen=weights.frozen)
    told, plain = (fused_details(predictions | {"fusion": np.tile(w.as_tuple(), (40, 1))}) for w in (weights, without))
    assert told["fused/mesh_to_image/recall@1"] > plain["fused/mesh_to_image/recall@1"]
    assert told["fused/image_to_mesh/recall@1"] == plain["fused/image_to_mesh/recall@1"]


# --- figures ------------------------------------------------------------------------------------------------------------------------------
def naive_recall(predictions: dict[str, np.ndarray], weights: FusionWeights, k: int) -> tuple[float, float]:
    """Recall@k, one picture a query, by a loop over everything."""
    n, group = len(predictions["group"]), predictions["group"]

    def score(i: int, q: int, j: int) -> float:
        views = range(predictions["num_views"][j])
        head, frozen = predictions["query"][i, q], predictions["frozen_query"][i, q]
        scores = (
            float(head.astype(float) @ predictions["cad"][j]),
            max(cosine(head, predictions["view"][j, v]) for v in views),
            max(cosine(frozen, predictions["frozen_view"][j, v]) for v in views),
        )
        return sum(w * s for w, s in zip(weights.normalised.of_scores, scores, strict=True))

    def crowd(turn: int) -> list[float]:
        pictures = [predictions["frozen_query"][i, turn % predictions["num_queries"][i]] for i in range(n)]
        return [naive_crowd(pictures, i) for i in range(n)]

    forward = []
    for i in range(n):
        for q in range(predictions["num_queries"][i]):
            scores = [score(i, q, j) for j in range(n)]
            best = max(scores[j] for j in range(n) if group[j] == group[i])
            forward.append(1 + sum(scores[j] >= best for j in range(n) if group[j] != group[i]))
    backward = []
    for turn in range(predictions["num_queries"].max()):
        crowds = crowd(turn)
        for j in range(n):
            scores = [score(i, turn % predictions["num_queries"][i], j) - weights.normalised.crowd * crowds[i] for i in range(n)]
            best = max(scores[i] for i in range(n) if group[i] == group[j])
            backward.append(1 + sum(scores[i] >= best for i in range(n) if group[i] != group[j]))
    return float(np.mean([r <= k for r in forward])), float(np.mean([r <= k for r in backward]))


@pytest.mark.parametrize("k", [1, 3])
def test_fused_figures_equal_a_loop_over_everything(k):
    predictions = split(seed=7, objects=9)
    predictions["group"][3] = predictions["group"][5]
    weights = FusionWeights(point=0.6, view=1.0, frozen=0.4, crowd=0.8)
    found = fused_details(predictions | {"fusion": np.tile(weights.as_tuple(), (9, 1))})
    forward, backward = naive_recall(predictions, weights, k)
    assert found[f"fused/image_to_mesh/recall@{k}"] == pytest.approx(forward)
    assert found[f"fused/mesh_to_image/recall@{k}"] == pytest.approx(backward)
    assert found[f"fused/recall@{k}"] == pytest.approx((forward + backward) / 2)
    forward, _ = naive_recall(predictions, FusionWeights(point=0.0, view=1.0, frozen=0.0), k)
    assert found[f"best_view/image_to_mesh/recall@{k}"] == pytest.approx(forward)


def test_gains_are_differences_of_the_figures_that_metrics_tell():
    predictions = split(seed=3, objects=15)
    found, learned = fused_details(predictions), retrieval_metrics(predictions)
    names = {"views": "frozen_view", "num_views": "num_views", "query_views": "frozen_query", "num_query_views": "num_queries", "group": "group"}
    matching = view_matching_metrics({column: predictions[name] for column, name in names.items()})
    for direction in ("image_to_mesh/", "mesh_to_image/", ""):
        fused = found[f"fused/{direction}recall@3"]
        assert found[f"fused_gain/over_learned/{direction}recall@3"] == pytest.approx(fused - learned[f"{direction}recall@3"])
        assert found[f"fused_gain/over_view_matching/{direction}recall@3"] == pytest.approx(fused - matching[f"{direction}recall@3"])


def test_intervals_hold_their_figures_and_have_no_width_where_all_is_certain():
    found = fused_details(split(seed=5, objects=20))
    for name in [name for name in found if not name.endswith(("_low", "_high")) and name.split("/")[1] not in ("weight", "num_objects")]:
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]
    certain = fused_details(split(objects=10, signal=(50.0, 50.0, 50.0)))
    assert certain["fused/recall@1_low"] == certain["fused/recall@1_high"] == 1.0
    assert certain["fused_gain/over_learned/recall@3_low"] == certain["fused_gain/over_learned/recall@3_high"] == 0.0


def test_large_split_is_measured_on_its_first_objects_and_pictures(monkeypatch):
    predictions = split(objects=9)
    found = fused_details({name: column[:6] if name in fusion.COLUMNS else column for name, column in predictions.items()})
    assert found["fused/num_objects"] == 6.0 and found == fused_details({name: column[:6] for name, column in predictions.items()})
    monkeypatch.setattr(fusion, "_TOLD_WORK", 1.0)
    single = {**predictions, "num_queries": np.ones(9, dtype=np.int64)}
    assert fused_details(predictions) == fused_details(single) != found


def test_pictures_in_other_conditions_have_figures_of_their_own():
    predictions, turned = split(seed=3, objects=12), split(seed=4, objects=12)
    both = predictions | {"query_roll": turned["query"], "frozen_query_roll": turned["frozen_query"], "num_queries": turned["num_queries"]}
    found = fused_details(both)
    alone = fused_details(both | {"query": turned["query"], "frozen_query": turned["frozen_query"]})
    for name in ("fused/{}recall@1", "fused_gain/over_learned/{}recall@3", "best_view/image_to_mesh/{}recall@5_low"):
        assert found[name.format("roll/")] == alone[name.format("")]
    member = {name: column for name, column in both.items()}
    assert np.array_equal(TASK.combine([member, member])["frozen_query_roll"], turned["frozen_query"])


def test_all_views_alike_are_not_rewarded():
    predictions = split(objects=6)
    constant = {name: np.ones_like(column) if column.ndim > 1 else column for name, column in predictions.items()}
    assert fused_details(constant)["fused/recall@3"] == 0.0


# --- ensembles ----------------------------------------------------------------------------------------------------------------------------
def test_member_beside_itself_says_nothing_new_and_one_encoder_is_kept_once(monkeypatch):
    predictions = split(objects=8) | {"label": np.zeros(8, dtype=np.int64)}
    monkeypatch.setattr(fusion, "_COMBINED_OBJECTS", 3)
    twice = TASK.combine([predictions, predictions], weights=[1.0, 3.0])
    assert np.array_equal(twice["frozen_view"], predictions["frozen_view"])
    once = fused_details(predictions)
    assert fused_details(twice) == pytest.approx(once, abs=1e-9)


def test_members_of_other_encoders_count_as_the_mean_of_their_cosines():
    a, b = split(seed=1, objects=6), split(seed=1, objects=6)
    b["frozen_view"], b["frozen_query"] = (np.repeat(split(seed=9, objects=6)[name], 2, axis=2) for name in ("frozen_view", "frozen_query"))
    b["num_views"] = a["num_views"]
    together = TASK.combine([a, b], weights=[3.0, 1.0])
    one, other = a["frozen_query"][0, 0], b["frozen_query"][0, 0]
    wanted = 0.75 * cosine(one, a["frozen_view"][1, 0]) + 0.25 * cosine(other, b["frozen_view"][1, 0])
    assert cosine(together["frozen_query"][0, 0], together["frozen_view"][1, 0]) == pytest.approx(wanted, abs=2e-3)


def test_fit_rule_weights_reach_the_figures_of_the_test_split():
    val, test = split(seed=1, objects=30), split(seed=2, objects=30)
    fitted = TASK.fit_rule([val], rule="concatenate")
    together = TASK.combine([test], rule="concatenate", fitted=fitted)
    assert fused_details(together)["fused/weight/view"] == pytest.approx(fitted["fusion"]["view"])
    assert TASK.fit_rule([{name: val[name] for name in ("cad", "query", "num_queries", "group")}], rule="concatenate") == {}


def test_learned_score_alone_is_the_plain_ranking():
    predictions = split(seed=3, objects=15)
    found = fused_details(predictions | {"fusion": np.tile(POINT_ONLY.as_tuple(), (15, 1))})
    learned = retrieval_metrics(predictions)
    for k in (1, 3, 5, 10):
        assert found[f"fused/recall@{k}"] == pytest.approx(learned[f"recall@{k}"])
