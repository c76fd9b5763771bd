"""The table of ablations: every row is a recipe with a command, and its arithmetic is that of means and paired differences."""

import numpy as np
import pytest

from benchmarks.ablations import ROWS, SHOWN, command_of, figures, mean_hits, recipe_of, table
from cad_models.config import differences
from rayjobs.cli import parse_job
from rayjobs.train import TrainJob


@pytest.mark.parametrize("row", ROWS)
def test_command_of_a_row_trains_its_recipe(row):
    common = {"schedule.num_epochs": 5, "schedule.num_warmup_epochs": 1.0}
    words = command_of(row, "ds/", common, [0, 1]).split()
    job = parse_job(TrainJob, words[2:])
    assert words[:2] == ["python", "rayjobs/train.py"] and job.seeds == (0, 1) and job.dataset == "ds/"
    assert differences(job.recipe, recipe_of(row, job.recipe.seed, common)) == []


def test_rows_differ_from_the_default_and_from_each_other():
    recipes = [recipe_of(row, 0, {}) for row in ROWS]
    assert len(set(recipes)) == len(recipes)


def hits(seed: int, num_objects: int = 30):
    rng = np.random.default_rng(seed)
    return {name: (rng.integers(0, 7, num_objects).astype(float), np.full(num_objects, 6.0)) for name in SHOWN}


def test_mean_of_seeds_and_difference_are_those_of_their_recalls():
    first, second, other = hits(0), hits(1), hits(2)
    name = SHOWN[1]
    recall = [side[name][0].sum() / side[name][1].sum() for side in (first, second, other)]
    value, low, high = figures(mean_hits([first, second]))[name]
    assert value == pytest.approx((recall[0] + recall[1]) / 2) and low < value < high
    value, low, high = figures(mean_hits([first, second]), other)[name]
    assert value == pytest.approx((recall[0] + recall[1]) / 2 - recall[2]) and low < value < high
    assert figures(first, first)[name] == (0.0, 0.0, 0.0)


def test_table_leaves_out_the_side_that_is_subtracted():
    text = table({"a": hits(0), "b": hits(1)}, "a")
    assert text.count("\n") == 2 and "| b | " in text and "| a |" not in text and "minus a" in text
