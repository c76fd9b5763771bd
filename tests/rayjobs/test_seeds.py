"""One member a seed: each is the run that it would be alone, one failure stops nobody, a stop ends all, and the same command goes on."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cad_models.config import replace_all
from cad_models.dataset import Folder
from cad_models.tasks import TASKS
from rayjobs.champion import Candidate, Measuring, fit, predict_members, select
from rayjobs.loop import Training
from rayjobs.seeds import LiveSeeds, seed_folder
from rayjobs.trials import TrialSetting, run_here
from tests.rayjobs.test_loop import RECIPE, TASK, assert_same_run, config_of, dataset  # noqa: F401  (the fixture)
from tests.shared import REPOSITORY

SHORT = replace_all(RECIPE, {"schedule.num_epochs": 1, "schedule.num_warmup_epochs": 0.5})


class FittedTask(type(TASK)):
    """In place of the room: rules with a fitted weight; fails for seed 2; its score needs the train split beside the one that is measured."""

    combine_rules = ("concatenate", "weighted")
    fitted_rules = ("weighted",)
    reference_split = "train"

    def learner(self, recipe, signature):
        if recipe.seed == 2:
            raise ValueError("seed 2 is unlucky")
        return super().learner(recipe, signature)

    def evaluate(self, predictions, reference=None):
        return {**super().evaluate(predictions), "num_beside": float(len(reference["group"]))}

    def fit_rule(self, members, *, rule):
        # Something that only the validation predictions can say.
        return {"weights": [1.0 + float(np.abs(m["cad"]).sum()) for m in members]} if rule == "weighted" else {}

    def combine(self, members, *, rule=None, weights=None, fitted=None):
        if rule == "weighted":
            weights = fitted["weights"]
        return super().combine(members, rule="concatenate", weights=weights)


@pytest.fixture
def setting(dataset, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(TASKS, "alignment", FittedTask())
    folder = Folder(str(tmp_path / "seeds"))
    base = config_of(dataset, tmp_path / "seeds", SHORT)
    return TrialSetting(folder=folder.uri, base=base, plan=None, cache_bytes=0)


def live_seeds(setting, seeds, on_start=lambda seed: None):
    return LiveSeeds(folder=Folder(setting.folder), recipe=setting.base.recipe, seeds=seeds, on_start=on_start, on_end=lambda s, r: None)


def measuring(setting):
    return Measuring(base=setting.base, num_tasks=0, cpus_per_task=1.0, use_gpu=False, cache_bytes=0)


def candidates(*seeds):
    return [Candidate(name=f"seed {seed}", folder=seed_folder(seed)) for seed in seeds]


def test_seeds_are_the_runs_that_they_would_be_alone_and_a_failed_one_stops_nobody(setting, dataset, tmp_path):  # noqa: F811
    live = live_seeds(setting, (1, 2, 3))
    run_here(live, setting)
    assert {seed: result.state for seed, result in live.results.items()} == {1: "complete", 2: "failed", 3: "complete"}
    assert live.results[2].reason == "seed 2 is unlucky"
    alone = config_of(dataset, tmp_path / "alone", dataclasses.replace(SHORT, seed=3))
    Training(alone).run()
    assert_same_run(tmp_path / "alone", tmp_path / "seeds/seed_3")
    # Again: the finished ones are known, the failed one is tried once more.
    again = live_seeds(setting, (1, 2, 3))
    assert set(again.results) == {1, 3} and again.num_left() == 1


def test_stop_file_ends_all_seeds_and_who_never_began_leaves_nothing(setting, tmp_path):
    started = []

    def on_start(seed):
        started.append(seed)
        if seed == 3:
            (tmp_path / "seeds/STOP").touch()

    live = live_seeds(setting, (1, 3, 4), on_start)
    run_here(live, setting)
    assert started == [1, 3] and list(live.results) == [1] and live.stopping
    assert sorted(p.name for p in (tmp_path / "seeds").iterdir()) == ["STOP", "seed_1"]
    (tmp_path / "seeds/STOP").unlink()
    again = live_seeds(setting, (1, 3, 4))
    run_here(again, setting)
    assert {seed: result.state for seed, result in again.results.items()} == {1: "complete", 3: "complete", 4: "complete"}


def test_live_seeds_reminds_only_those_that_have_begun(setting, tmp_path):
    live = live_seeds(setting, (5, 6))
    live.suggest("a"), live.suggest("b")
    (tmp_path / "seeds/seed_5").mkdir(parents=True)
    live.ask_to_stop()
    assert (tmp_path / "seeds/seed_5/STOP").exists() and not (tmp_path / "seeds/seed_6").exists()
    live.observe("a", {"outcome": "stopped"})
    live.end("a"), live.end("b")
    assert live.results == {}


def test_live_seeds_lost_process_is_a_failed_seed(setting):
    live = live_seeds(setting, (5,))
    live.suggest("a")
    live.end("a")
    assert live.results[5].state == "failed" and "lost" in live.results[5].reason


def test_ensemble_is_fitted_on_val_alone_and_measured_beside_the_reference_split(setting, tmp_path):
    run_here(live_seeds(setting, (1, 3)), setting)
    folder, task = Folder(setting.folder), TASKS["alignment"]
    found = select(folder, task, candidates(1, 3), measuring(setting), rule="weighted", take_all=True)
    assert found["chosen"] == [0, 1] and [entry["name"] for entry in found["members"]] == ["seed 1", "seed 3"]
    packed = [{str(p.relative_to(f)): p.read_bytes() for p in f.rglob("*")} for f in (tmp_path / f"seeds/seed_{s}/best/mean" for s in (1, 3))]
    predicted = predict_members(packed, measuring(setting), ["val", "test", "train"])
    assert found["fitted"] == fit(task, predicted, "weighted") == {"weights": [1.0 + float(np.abs(p["val"]["cad"]).sum()) for p in predicted]}
    for split in ("val", "test"):
        together = task.combine([p[split] for p in predicted], rule="weighted", fitted=found["fitted"])
        for name, value in task.evaluate(together, {"group": np.zeros(24)}).items():
            assert found["metrics"][f"{split}/{name}"] == value
    assert found["metrics"]["val/num_beside"] == 24.0 and not any(name.startswith("train/") for name in found["metrics"])
    # Asked again nothing is predicted; another rule is another question.
    assert select(folder, task, candidates(1, 3), measuring(setting), rule="weighted", take_all=True) == found
    assert select(folder, task, candidates(1, 3), measuring(setting), rule="concatenate", take_all=True)["fitted"] == {}


# --- from the command line ----------------------------------------------------------------------------------------------------------------
def command(dataset, home: Path, *flags: str) -> list[str]:  # noqa: F811
    small = ["--smoke", "--data.num-points", "64", "--model.num-points", "64", "--model.embed-dim", "32", "--checkpoint-every-steps", "1"]
    where = ["--dataset", dataset, "--output", str(home / "runs"), "--tracking.folder", str(home / "mlflow"), "--name", "n"]
    return [sys.executable, str(REPOSITORY / "rayjobs/train.py"), "--task", "alignment", *small, *where, *flags]


def environment() -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    return {**clean, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}


def run(dataset, home: Path, *flags: str) -> subprocess.CompletedProcess:  # noqa: F811
    return subprocess.run(command(dataset, home, *flags), env=environment(), cwd=home, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_train_seeds_without_ray_registers_members_and_ensemble_once(dataset, tmp_path):  # noqa: F811
    flags = ["--scale.num-workers", "0", "--seeds", "1", "3", "--register", "--combine", "mean"]
    done = run(dataset, tmp_path, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 1 = version 1, seed 3 = version 2, ensemble = version 3" in done.stdout and "combined by mean" in done.stdout
    again = run(dataset, tmp_path, *flags)
    assert again.returncode == 0 and "finished seeds reused: 1 3" in again.stdout and "ensemble = version 3" in again.stdout
    changed = run(dataset, tmp_path, *flags, "--optim.lr", "0.125")
    assert changed.returncode == 1 and "optim.lr: 0.001 -> 0.125" in changed.stderr and "Traceback" not in changed.stderr


@pytest.mark.slow
@pytest.mark.ray
def test_train_seeds_stopped_by_sigterm_and_run_again_equal_undisturbed_ones(dataset, tmp_path):  # noqa: F811
    # The number of threads decides the order of sums; a worker would have one for each core.
    flags = ["--seeds", "1", "3", "--max-concurrent", "1", "--schedule.num-epochs", "4", "--scale.threads-per-worker", "1"]
    undisturbed = run(dataset, tmp_path, "--scale.num-workers", "0", *flags, "--output", str(tmp_path / "whole"))
    assert undisturbed.returncode == 0, undisturbed.stderr
    folder = tmp_path / "runs/n"
    with (tmp_path / "log.txt").open("w") as log:
        driver = subprocess.Popen(command(dataset, tmp_path, *flags), env=environment(), cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT)
    until = time.monotonic() + 300
    while not (folder / "seed_1/last").exists():
        assert driver.poll() is None and time.monotonic() < until, (tmp_path / "log.txt").read_text()
        time.sleep(0.05)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(timeout=300) == 75, (tmp_path / "log.txt").read_text()
    assert not (folder / "seed_3").exists() and not (folder / "seed_1/result.json").exists()
    done = run(dataset, tmp_path, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    for seed in (1, 3):
        assert_same_run(folder / seed_folder(seed), tmp_path / "whole/n" / seed_folder(seed))
    assert json.loads((folder / "selection.json").read_text())["chosen"] == [0, 1]
