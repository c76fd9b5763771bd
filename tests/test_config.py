"""Recipes: JSON and back, changes by path, differences, digests, and what is refused."""

import dataclasses
import json
from dataclasses import dataclass

import pytest

from cad_models.alignment.recipe import AlignmentModel, AlignmentRecipe
from cad_models.config import (
    OptimConfig,
    Recipe,
    ScheduleConfig,
    differences,
    digest,
    from_dict,
    json_digest,
    paths,
    replace_all,
    replace_at,
    to_dict,
    value_at,
)
from cad_models.tasks import TASKS


@dataclass(frozen=True, kw_only=True)
class Layered:
    widths: tuple[int, ...] = (8, 16)
    limit: float | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LayeredRecipe(Recipe):
    layers: Layered = Layered()


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("kind", ["recipe", "smoke"])
def test_recipe_through_json_text_comes_back_equal(name, kind):
    recipe = getattr(TASKS[name], kind)
    back = from_dict(type(recipe), json.loads(json.dumps(to_dict(recipe))))
    assert back == recipe and type(back) is type(recipe)
    assert digest(back) == digest(recipe)


def test_recipe_with_tuples_and_optional_values_comes_back_equal():
    recipe = LayeredRecipe(layers=Layered(widths=(1, 2, 3), limit=0.5, names=("a",)))
    assert from_dict(LayeredRecipe, json.loads(json.dumps(to_dict(recipe)))) == recipe
    unset = replace_at(recipe, "layers.limit", None)
    assert from_dict(LayeredRecipe, to_dict(unset)) == unset


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("optim.lr", "fast", r"optim\.lr: expected float, got 'fast'"),
        ("optim.lr", True, r"optim\.lr: expected float, got True"),
        ("batch_size", 2.5, r"batch_size: expected int, got 2\.5"),
        ("batch_size", True, r"batch_size: expected int, got True"),
        ("model.size", "huge", r"model\.size: 'huge' is none of 'pairs'"),
        ("loss.learned_temperature", 1, r"loss\.learned_temperature: expected bool, got 1"),
        ("data.augment", 3, r"data\.augment: expected the fields of AugmentConfig, got 3"),
        ("model", [], r"model: expected the fields of AlignmentModel, got \[\]"),
    ],
)
def test_value_of_another_type_is_refused_with_its_path(path, value, message):
    values = to_dict(AlignmentRecipe())
    *parents, leaf = path.split(".")
    inner = values
    for name in parents:
        inner = inner[name]
    inner[leaf] = value
    with pytest.raises(ValueError, match=message):
        from_dict(AlignmentRecipe, values)
    with pytest.raises(ValueError, match=message):
        replace_at(AlignmentRecipe(), path, value)


def test_unknown_field_is_refused_with_its_path_and_a_hint():
    values = to_dict(AlignmentRecipe())
    values["model"]["num_expert"] = 3
    with pytest.raises(ValueError, match=r"model\.num_expert: AlignmentModel has no such field; did you mean num_experts"):
        from_dict(AlignmentRecipe, values)


def test_missing_field_is_refused_with_its_path():
    values = to_dict(AlignmentRecipe())
    del values["data"]["augment"]["max_shift"]
    with pytest.raises(ValueError, match=r"data\.augment\.: missing max_shift"):
        from_dict(AlignmentRecipe, values)
    with pytest.raises(ValueError, match="AlignmentRecipe: expected the fields of AlignmentRecipe, got 5"):
        from_dict(AlignmentRecipe, 5)


@pytest.mark.parametrize(
    "widths, message", [(["a"], r"layers\.widths\[0\]: expected int, got 'a'"), (7, r"layers\.widths: expected a list, got 7")]
)
def test_wrong_element_of_a_tuple_is_refused_with_its_index(widths, message):
    with pytest.raises(ValueError, match=message):
        replace_at(LayeredRecipe(), "layers.widths", widths)


def test_optional_value_of_another_type_is_refused_with_both_reasons():
    with pytest.raises(ValueError, match=r"layers\.limit: expected float, got 'x'; layers\.limit: expected nothing"):
        replace_at(LayeredRecipe(), "layers.limit", "x")


def test_replace_at_changes_one_leaf_of_a_copy():
    before = AlignmentRecipe()
    after = replace_at(before, "data.augment.max_scale", 2)
    assert after.data.augment.max_scale == 2.0 and isinstance(after.data.augment.max_scale, float)
    assert before.data.augment.max_scale == AlignmentRecipe().data.augment.max_scale
    assert differences(before, after) == ["data.augment.max_scale: 1.25 -> 2.0"]
    assert value_at(after, "data.augment.max_scale") == 2.0
    assert replace_at(before, "model", AlignmentModel(embed_dim=8)).model.embed_dim == 8


@pytest.mark.parametrize("path", ["optim.lrr", "optm.lr", "optim.lr.x", "", "seed.x"])
def test_replace_at_of_an_unknown_path_names_it(path):
    with pytest.raises(ValueError, match="has no field"):
        replace_at(AlignmentRecipe(), path, 1)
    with pytest.raises(ValueError, match="has no field"):
        value_at(AlignmentRecipe(), path)


def test_replace_all_of_every_path_with_its_own_value_changes_nothing():
    recipe = TASKS["alignment"].smoke
    assert replace_all(recipe, paths(recipe)) == recipe
    assert differences(recipe, recipe) == []


def test_replace_all_needs_the_values_to_fit_only_together():
    assert replace_all(ScheduleConfig(), {"num_epochs": 2, "num_warmup_epochs": 0.5}).num_epochs == 2
    with pytest.raises(ValueError, match="num-warmup-epochs 2"):
        replace_all(ScheduleConfig(), {"num_epochs": 2})


def test_recipe_written_before_a_field_was_added_has_its_default():
    written = to_dict(AlignmentRecipe())
    del written["schedule"]["patience_evals"]
    assert from_dict(AlignmentRecipe, written) == AlignmentRecipe()
    del written["schedule"]["num_epochs"]
    with pytest.raises(ValueError, match="missing num_epochs"):
        from_dict(AlignmentRecipe, written)


def test_differences_between_classes_name_fields_of_one_side():
    assert "layers.limit: None -> None" not in differences(LayeredRecipe(), AlignmentRecipe())
    assert "model.embed_dim: None -> 512" in differences(LayeredRecipe(), AlignmentRecipe())


def test_digest_differs_for_every_changed_leaf_and_is_pinned():
    recipe = AlignmentRecipe(model=AlignmentModel(size="projection"))
    digests = {digest(recipe)}
    for path, value in paths(recipe).items():
        other = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v / 2 + 0.25, str: lambda v: None}[type(value)](value)
        if other is not None:
            digests.add(digest(replace_at(recipe, path, other if path != "data.augment.max_scale" else 3.0)))
    assert len(digests) == 1 + sum(not isinstance(value, str) for value in paths(recipe).values())
    # Made by hand: sha256 of '{"a":[1,2.5],"b":"é"}' in UTF-8. Another value would part every run from its folder.
    assert json_digest({"b": "é", "a": [1, 2.5]}, length=8) == "2071e595"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: OptimConfig(ema_decay=1.0), "--optim.ema-decay is 1.0: it must be in"),
        (lambda: OptimConfig(lr=float("nan")), "--optim.lr is nan"),
        (lambda: ScheduleConfig(num_epochs=0), "--schedule.num-epochs is 0: it must be at least 1"),
        (lambda: ScheduleConfig(eval_every_epochs=0), "--schedule.eval-every-epochs is 0"),
        (lambda: ScheduleConfig(patience_evals=-1), "--schedule.patience-evals is -1"),
        (lambda: ScheduleConfig(num_epochs=2), "--schedule.num-warmup-epochs 2 does not fit into --schedule.num-epochs 2: it must be less"),
        (lambda: ScheduleConfig(num_epochs=3, num_warmup_epochs=9.5), "--schedule.num-warmup-epochs 9.5 .* --schedule.num-epochs 3"),
        (lambda: AlignmentRecipe(batch_size=-3), "--batch-size is -3"),
        (lambda: AlignmentRecipe(seed=-1), "--seed is -1"),
        (lambda: replace_at(AlignmentRecipe(), "data.num_query_views", 0), "--data.num-query-views is 0"),
        (lambda: replace_at(AlignmentRecipe(), "data.augment.max_scale", 0.5), "--data.augment.max-scale is 0.5"),
    ],
)
def test_value_out_of_range_is_refused_in_terms_of_its_flag(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_recipes_are_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AlignmentRecipe().seed = 1
    assert hash(AlignmentRecipe()) == hash(AlignmentRecipe())
