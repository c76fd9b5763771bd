"""Query images in harder conditions, changed gallery views in training, and paired differences: against loops and by hand."""

import numpy as np
import pyarrow as pa
import pytest

from cad_models.alignment.data import changed_embed_columns, collate, examples
from cad_models.alignment.learner import AlignmentLearner
from cad_models.alignment.metrics import learned_ranks, matching_ranks, paired_differences, recalls, retrieval_metrics
from cad_models.alignment.recipe import QUERY_CONDITIONS, SMOKE, AlignmentRecipe
from cad_models.config import from_dict, replace_all, to_dict
from cad_models.dataset import build_table, tensor_field
from cad_models.order import object_rng
from cad_models.tasks import TASKS

RECIPE = replace_all(SMOKE, {"model.num_points": 4, "model.channels": "xyz", "data.query_conditions": True, "data.augmented_share": 0.5})
WIDTH = 3


def tables_of(counts: list[int], copies: int = 2) -> dict[str, pa.Table]:
    """Objects with so many views; view v of object i is 100 i + v everywhere, its versions are that plus 0.25 and 0.5."""
    objects = pa.schema(
        [("object_id", pa.string()), ("group_id", pa.string()), ("label", pa.string()), tensor_field("points", "float32", (4, 3))]
    )
    names = ["embeddings", "query_embeddings", *(f"query_embeddings_{name}" for name in QUERY_CONDITIONS), "augmented_embeddings"]
    rows = []
    for i, count in enumerate(counts):
        views = np.tile((100 * i + np.arange(count))[:, None], (1, WIDTH))
        versions = np.repeat(views, copies, axis=0) + 0.25 * np.tile(1 + np.arange(copies), count)[:, None]
        queries = {name: np.full((2, WIDTH), i + place) for place, name in enumerate(names[1:-1])}
        rows.append({"object_id": str(i), "group_id": str(i), "label": "", "points": np.zeros((4, 3)), "embeddings": views} | queries)
        rows[-1]["augmented_embeddings"] = versions
    embeddings = pa.schema([("object_id", pa.string()), *(tensor_field(name, "float16", (-1, WIDTH)) for name in names)])
    return {"objects": build_table(objects, rows), "embeddings": build_table(embeddings, rows)}


def rngs(count: int, epoch: int = 0):
    return [object_rng(0, epoch, key) for key in range(count)]


def test_recipe_decides_what_is_embedded_and_what_is_read():
    task = TASKS["alignment"]
    assert changed_embed_columns(SMOKE) == () and len(task.columns(SMOKE)["embeddings"]) == 2
    wanted = replace_all(SMOKE, {"data.query_conditions": True, "data.augmented_views": 3})
    columns = task.changed_embed_columns(wanted)
    assert [column.name for column in columns] == [f"query_embeddings_{name}" for name in QUERY_CONDITIONS] + ["augmented_embeddings"]
    assert [column.copies for column in columns] == [1] * len(QUERY_CONDITIONS) + [3]
    assert set(task.columns(RECIPE)["embeddings"]) == {"embeddings", "query_embeddings", *(column.name for column in columns)}


def test_examples_hold_conditions_and_versions_by_view():
    columns = examples(tables_of([3, 1]), RECIPE)
    assert columns["augmented_views"].shape == (2, 3, 2, WIDTH)
    np.testing.assert_array_equal(columns["augmented_views"][0, 2], [[2.25] * WIDTH, [2.5] * WIDTH])
    np.testing.assert_array_equal(columns["augmented_views"][1, 0], [[100.25] * WIDTH, [100.5] * WIDTH])
    assert (columns["augmented_views"][1, 1:] == 0).all()
    for place, name in enumerate(QUERY_CONDITIONS, start=1):
        np.testing.assert_array_equal(columns[f"query_views_{name}"][:, :, 0], [[place, place], [1 + place, 1 + place]])
    assert examples({name: table.slice(0, 0) for name, table in tables_of([3, 1]).items()}, RECIPE)["augmented_views"].shape[0] == 0


def test_training_draws_a_share_of_versions_each_of_its_own_view():
    columns = examples(tables_of([24] * 4), RECIPE)  # float16 tells their values apart
    views = np.stack([collate(columns, RECIPE, rngs=rngs(4, epoch))["views"][:, :, 0].numpy() for epoch in range(50)])
    np.testing.assert_array_equal(np.floor(views), np.broadcast_to(columns["views"][:, :, 0], views.shape))
    kinds = views - np.floor(views)
    assert (kinds == 0).mean() == pytest.approx(0.5, abs=0.02)
    assert (kinds == 0.25).mean() == pytest.approx(0.25, abs=0.02) and (kinds == 0.5).mean() == pytest.approx(0.25, abs=0.02)
    every = collate(columns, replace_all(RECIPE, {"data.augmented_share": 1.0}), rngs=rngs(4))["views"].numpy()
    assert (every[:, :, 0] > np.floor(every[:, :, 0])).all()


def test_training_without_a_share_is_what_it_was_before():
    recipe = replace_all(RECIPE, {"data.augmented_share": 0.0, "data.views_per_step": 2})
    columns = examples(tables_of([3, 5]), recipe)
    assert "augmented_views" not in columns
    before = collate({k: v for k, v in columns.items() if not k.startswith("query_views_")}, recipe, rngs=rngs(2))
    now = collate(columns, recipe, rngs=rngs(2))
    assert before.keys() == now.keys() and all((before[name] == now[name]).all() for name in now)


def test_drawn_versions_do_not_depend_on_the_rest_of_the_batch():
    columns = examples(tables_of([24] * 6), RECIPE)
    whole = collate(columns, RECIPE, rngs=rngs(6))["views"]
    half = collate({name: column[3:] for name, column in columns.items()}, RECIPE, rngs=rngs(6)[3:])["views"]
    assert (whole[3:] == half).all()


# --- metrics ------------------------------------------------------------------------------------------------------------------------------
def random_predictions(seed: int, n: int = 15, views: int = 3, dim: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    cad = rng.normal(size=(n, dim))
    found = {"cad": cad, "num_queries": np.full(n, views), "group": np.arange(n)}
    for name, noise in {"query": 0.5, "query_roll": 1.0, "query_crop": 1.5, "query_roll_crop": 3.0}.items():
        found[name] = cad[:, None] + noise * rng.normal(size=(n, views, dim))
    return {name: value / np.linalg.norm(value, axis=-1, keepdims=True) if value.ndim > 1 else value for name, value in found.items()}


def test_each_condition_is_the_one_image_protocol_of_its_own_queries():
    found = random_predictions(0)
    metrics = retrieval_metrics(found)
    for name in QUERY_CONDITIONS:
        alone = retrieval_metrics({"query": found[f"query_{name}"], **{key: found[key] for key in ("cad", "num_queries", "group")}})
        for direction in ("image_to_mesh", "mesh_to_image"):
            for k in (1, 3, 5, 10):
                assert metrics[f"{direction}/{name}/recall@{k}"] == alone[f"{direction}/recall@{k}"]
    assert metrics["image_to_mesh/recall@1"] > metrics["image_to_mesh/roll_crop/recall@1"]


def test_matching_ranks_of_each_condition_are_those_of_its_own_queries():
    found = random_predictions(1)
    columns = {"views": found["cad"][:, None], "num_views": np.ones(15, int), "num_query_views": found["num_queries"], "group": found["group"]}
    columns |= {name.replace("query", "query_views"): value for name, value in found.items() if name.startswith("query")}
    ours, theirs = matching_ranks(columns), learned_ranks(found)
    assert ours.keys() == theirs.keys() >= {"roll/", "crop/", "roll_crop/"}
    for infix in ("", "roll/", "crop/", "roll_crop/"):  # with one view a mesh both are nearest neighbours of the same vectors
        np.testing.assert_array_equal(ours[infix].image_to_mesh, theirs[infix].image_to_mesh)


def test_paired_difference_is_that_of_the_recalls_and_zero_against_itself():
    first, second = learned_ranks(random_predictions(2)), learned_ranks(random_predictions(3))
    found = paired_differences(first, second, 15)
    for name, (difference, low, high) in found.items():
        assert difference == pytest.approx(recalls(first)[name] - recalls(second)[name]) and low <= difference <= high
    assert all(values == (0.0, 0.0, 0.0) for values in paired_differences(first, first, 15).values())


def test_paired_interval_is_narrower_than_that_of_independent_sides():
    # The second side misses one object more than the first; which objects are hard varies much more than the difference.
    base = random_predictions(4, n=60)
    worse = {**base, "query": base["query"].copy()}
    worse["query"][7] = -worse["query"][7]
    difference, low, high = paired_differences(learned_ranks(base), learned_ranks(worse), 60)["image_to_mesh/recall@1"]
    assert 0 <= difference <= 1 / 60 + 1e-9 and 0 <= low and high <= 6 / 60


def test_paired_differences_of_other_queries_raise():
    first, second = learned_ranks(random_predictions(2)), learned_ranks({**random_predictions(3), "num_queries": np.full(15, 2)})
    with pytest.raises(ValueError, match="different queries"):
        paired_differences(first, second, 15)


def test_ensemble_combines_the_queries_of_every_condition():
    found = random_predictions(5)
    combined = TASKS["alignment"].combine([found, found])
    assert combined.keys() == found.keys()
    assert retrieval_metrics(combined) == pytest.approx(retrieval_metrics(found))


def test_recipe_of_an_earlier_version_means_what_it_meant():
    values = to_dict(AlignmentRecipe())
    for path in ("data.query_conditions", "data.augmented_views", "data.augmented_share", "model.residual_head", "model.pair_histogram",
                 "loss.router_z_weight", "loss.image_weight"):  # fmt: skip
        part, name = path.split(".")
        del values[part][name]
    recipe = from_dict(AlignmentRecipe, values)
    assert recipe == AlignmentRecipe() and not recipe.data.query_conditions and recipe.data.augmented_share == 0
    names = set(AlignmentLearner(replace_all(recipe, {"model.embed_dim": 8}), 5).state_dict())
    assert not any("residual" in name or "pairs" in name for name in names)
