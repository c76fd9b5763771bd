"""The loop on this room, in one process: exact on resume with early stopping, evaluated with the weights and statistics that it keeps."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cad_models.checkpoint import load_member, read_weights
from cad_models.config import replace_all
from cad_models.images.model import high_pass
from cad_models.images.recipe import SMOKE
from cad_models.images.task import ImagesTask
from rayjobs.loop import Training
from rayjobs.predictions import split_metrics
from rayjobs.resources import ScaleConfig
from rayjobs.train import loop_config
from tests.images.datasets import make_dataset

# Every part of a run: augmentation with noise, dropout, averaged weights, class weights, early stopping.
RECIPE = replace_all(
    SMOKE,
    {
        "data.stored_size": 32,
        "data.image_size": 24,
        "data.augment.max_salt_pepper": 0.1,
        "loss.class_weights": "balanced",
        "schedule.num_epochs": 6,
        "schedule.patience_evals": 2,
        "optim.lr": 1e-4,
        "optim.head_lr": 1e-4,
    },
)
STEPS_PER_EPOCH = 36 // RECIPE.batch_size


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(str(tmp_path_factory.mktemp("data") / "ds"), RECIPE).uri


def config_of(dataset: str, folder: Path, recipe=RECIPE):
    return loop_config(
        task_name="images", recipe=recipe, dataset_uri=dataset, output=str(folder.parent), name=folder.name, scale=ScaleConfig(num_workers=0), plan=None
    )


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    Training(config_of(dataset, folder)).run()
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_weights(folder / "classifier.safetensors")


class Killed(BaseException):
    """Stands for a kill: nothing of the loop can catch it."""


@pytest.mark.parametrize("after", [1, STEPS_PER_EPOCH + 1, 2 * STEPS_PER_EPOCH])
def test_interrupted_run_ends_bit_equal(dataset, undisturbed, tmp_path, after):
    folder = tmp_path / "killed"
    training, steps = Training(config_of(dataset, folder)), 0
    step = training._step

    def counted(*args):
        nonlocal steps
        if steps == after:
            raise Killed
        steps += 1
        return step(*args)

    training._step = counted
    with pytest.raises(Killed):
        training.run()
    Training(config_of(dataset, folder)).run()
    for name in ("last", "best/macro_f1"):
        left, right = weights(undisturbed / name), weights(folder / name)
        assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
    results = [json.loads((f / "result.json").read_text()) for f in (undisturbed, folder)]
    assert results[0]["num_steps"] == results[1]["num_steps"] and results[0]["score"] == results[1]["score"]
    # The history but for what depends on the moment.
    assert (undisturbed / "training_history.csv").read_bytes() == (folder / "training_history.csv").read_bytes()


def test_run_leaves_history_and_report_in_the_documented_form(undisturbed):
    rows = list(csv.DictReader((undisturbed / "training_history.csv").open()))
    assert list(rows[0]) == ["epoch", "train_loss", "train_acc", "train_f1", "val_loss", "val_acc", "val_f1"]
    scores = [float(row["val_f1"]) for row in rows]
    best = int(np.argmax(scores))
    # Patience 2: two evaluations after the best, unless the epochs were over before.
    assert len(rows) == min(6, best + 3)
    assert (undisturbed / "training_history.png").exists()
    report = {p.name for p in (undisturbed / "report").iterdir()}
    assert {"index.html", "confusion_val.png", "roc_test.png", "calibration_val.png", "classes_test.csv"} <= report


def test_kept_weights_and_statistics_are_those_that_were_evaluated(dataset, undisturbed):
    member = load_member(undisturbed / "best/macro_f1")
    config = config_of(dataset, undisturbed)
    found = split_metrics(ImagesTask(), RECIPE, member.learner, config.val, torch.device("cpu"), "val")
    assert found == {name: pytest.approx(value, abs=1e-12) for name, value in member.metrics.items() if name in found}
    raw = torch.load(undisturbed / "last" / "trainer_state.pt", weights_only=True)
    running = "classifier.features.1.running_mean"
    # The average is over weights and running statistics alike, so both are of the same moment; neither is the raw one.
    assert torch.equal(weights(undisturbed / "last")[running], raw["ema"]["average"][running])
    assert not torch.equal(raw["weights"][running], raw["ema"]["average"][running])


def test_high_pass_statistics_come_from_the_whole_train_split_alone(dataset, undisturbed):
    config = config_of(dataset, undisturbed)
    columns = [c for c in config.train.parts(0, 1)]
    task = ImagesTask()
    pixels = torch.cat([task.collate({k: v for k, v in c.items() if k != "row_key"}, RECIPE, rngs=None)["pixels"] for c in columns])
    assert len(pixels) == 36
    values = high_pass(pixels.double() / 255)
    kept = weights(undisturbed / "best/macro_f1")
    assert float(kept["normaliser.mean"][3]) == pytest.approx(float(values.mean()), abs=1e-6)
    assert float(kept["normaliser.std"][3]) == pytest.approx(float(values.std(correction=0)), rel=1e-4)


def test_balanced_loss_follows_the_train_split(dataset, tmp_path):
    config = config_of(dataset, tmp_path / "r")
    counts = config.signature["class_counts"]
    assert sum(counts) == 36
    learner = ImagesTask().learner(RECIPE, config.signature)
    present = [i for i, n in enumerate(counts) if n]
    products = [float(learner.class_weights[i]) * counts[i] for i in present]
    assert products == pytest.approx([36 / len(present)] * len(present), rel=1e-5)
