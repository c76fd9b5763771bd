"""Predictions of a whole split; the costly ones of its first objects only."""

import numpy as np
import pytest
import torch

from cad_models.alignment.recipe import SMOKE
from cad_models.tasks import TASKS
from rayjobs import predictions
from rayjobs.predictions import predict_split
from rayjobs.streams import ROW_KEY, SplitStream, open_dataset
from tests.synthetic import make_dataset

TASK = TASKS["alignment"]


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> SplitStream:
    path = tmp_path_factory.mktemp("predictions") / "ds"
    make_dataset(str(path), 50, objects_per_part=4)
    return SplitStream(dataset=open_dataset(str(path), TASK, SMOKE), recipe=SMOKE, split="train")


@pytest.fixture(scope="module")
def learner(stream):
    torch.manual_seed(0)
    return TASK.learner(SMOKE, TASK.signature(SMOKE, stream.dataset.signature_inputs)).eval()


@pytest.mark.parametrize(("wanted", "expected"), [(1, 4), (4, 4), (5, 8), (29, 30), (30, 30), (10_000, 30)])
def test_key_after_ends_behind_the_part_that_has_the_last_wanted_object(stream, wanted, expected):
    keys = np.concatenate([columns[ROW_KEY] for columns in stream.parts(0, 1)])
    assert len(keys) == 30 and (keys < stream.key_after(wanted)).sum() == expected


def test_costly_predictions_are_of_the_first_objects_whatever_the_batch(stream, learner, monkeypatch):
    device = torch.device("cpu")
    everything = predict_split(TASK, SMOKE, learner, stream, device, more=True)
    assert {len(column) for column in everything.values()} == {30}
    monkeypatch.setattr(predictions, "MORE_OBJECTS", 10)
    bounded = predict_split(TASK, SMOKE, learner, stream, device, more=True)
    added = everything.keys() - predict_split(TASK, SMOKE, learner, stream, device).keys()
    assert added == {"view", "num_views", "frozen_view", "frozen_query"}
    for name, column in everything.items():
        assert len(bounded[name]) == (12 if name in added else 30)
        # Where all objects have fewer views than the split's largest number, so has the column.
        short = bounded[name]
        cut = column[: len(short)][tuple(slice(0, n) for n in short.shape)] if short.ndim > 1 else column[: len(short)]
        np.testing.assert_array_equal(short, cut)


def test_figures_and_fitted_rule_of_a_large_split_need_the_first_objects_only(stream, learner, monkeypatch):
    monkeypatch.setattr(predictions, "MORE_OBJECTS", 10)
    bounded = predict_split(TASK, SMOKE, learner, stream, torch.device("cpu"), more=True)
    fitted = TASK.fit_rule([bounded], rule=TASK.combine_rules[0])
    combined = TASK.combine([bounded], rule=TASK.combine_rules[0], fitted=fitted)
    details = TASK.details(combined)
    assert details["fused/num_objects"] == 12
    assert len(combined["cad"]) == 30
