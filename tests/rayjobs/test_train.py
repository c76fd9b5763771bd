"""train.py from its command line: without Ray, on two workers, and killed at every place where it hurts."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cad_models.alignment.recipe import SMOKE
from cad_models.config import replace_all
from tests.rayjobs.test_loop import assert_same_run, stable_lines
from tests.shared import REPOSITORY
from tests.synthetic import make_dataset

# Long enough to be killed in the middle: 3 steps an epoch.
FLAGS = ["--smoke", "--data.num-points", "64", "--model.num-points", "64", "--model.embed-dim", "32", "--checkpoint-every-steps", "1"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    recipe = replace_all(SMOKE, {"data.num_points": 64})
    return make_dataset(str(tmp_path_factory.mktemp("data") / "ds"), 40, recipe=recipe).uri


def command(dataset: str, home: Path, *flags: str) -> list[str]:
    output = ["--dataset", dataset, "--output", str(home / "runs"), "--tracking.folder", str(home / "mlflow"), "--name", "run"]
    return [sys.executable, str(REPOSITORY / "rayjobs/train.py"), "--task", "alignment", *FLAGS, *output, *flags]


def environment(**changes: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    return {**clean, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", **changes}


def run(dataset: str, home: Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(dataset, home, *flags), env=environment(), cwd=home, capture_output=True, text=True, timeout=400)


def start(dataset: str, home: Path, *flags: str) -> subprocess.Popen:
    with (home / "log.txt").open("w") as log:
        return subprocess.Popen(command(dataset, home, *flags), env=environment(), cwd=home, stdout=log, stderr=subprocess.STDOUT)


def wait_until(happened: Callable[[], bool], driver: subprocess.Popen, home: Path) -> None:
    deadline = time.monotonic() + 300
    while not happened():
        assert driver.poll() is None and time.monotonic() < deadline, (home / "log.txt").read_text()
        time.sleep(0.05)


def num_evaluations(folder: Path) -> int:
    return len((folder / "metrics.jsonl").read_text().splitlines()) if (folder / "metrics.jsonl").exists() else 0


def train_workers(driver: subprocess.Popen) -> list[psutil.Process]:
    """The processes of this driver's own Ray that train."""
    return [p for p in psutil.Process(driver.pid).children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]


# --- without Ray --------------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """A whole run in one process."""
    home = tmp_path_factory.mktemp("finished")
    return home, run(dataset, home, "--scale.num-workers", "0")


@pytest.mark.slow
def test_train_without_ray_tells_its_figures_and_where_they_lie(finished):
    home, done = finished
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((home / "runs/run/result.json").read_text())
    assert f"best val/recall@3: {result['score']:.4f}" in done.stdout and str(home / "runs/run/best/mean") in done.stdout
    for name in ("image_to_mesh/recall@3", "recall@10"):
        line = next(line for line in done.stdout.splitlines() if line.split()[:1] == [name])
        assert float(line.split()[1]) == pytest.approx(result["metrics"][f"test/{name}"], abs=1e-4)
    # Figures of a deeper path are in the file alone.
    assert "mesh_to_image/all_views/recall@10" not in done.stdout and str(home / "runs/run/figures.csv") in done.stdout
    figures = {row["figure"]: float(row["this run"]) for row in csv.DictReader((home / "runs/run/figures.csv").open())}
    assert figures == {name.removeprefix("test/"): value for name, value in result["metrics"].items() if name.startswith("test/")}


@pytest.mark.slow
def test_train_again_reuses_the_finished_run(finished, dataset):
    home, _ = finished
    before = (home / "runs/run/result.json").stat().st_mtime_ns
    again = run(dataset, home, "--scale.num-workers", "0")
    assert again.returncode == 0 and "is finished: reused" in again.stderr
    assert (home / "runs/run/result.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_train_with_another_recipe_under_the_same_name_is_refused_naming_both_sides(finished, dataset):
    home, _ = finished
    changed = run(dataset, home, "--scale.num-workers", "0", "--optim.lr", "0.125")
    assert changed.returncode == 1 and "Traceback" not in changed.stderr
    assert "optim.lr: 0.001 -> 0.125" in changed.stderr and "choose another --name" in changed.stderr


@pytest.mark.slow
def test_train_stopped_by_sigterm_leaves_a_checkpoint_and_the_same_command_completes(finished, dataset, tmp_path):
    home, _ = finished
    folder = tmp_path / "runs/run"
    driver = start(dataset, tmp_path, "--scale.num-workers", "0")
    wait_until(lambda: (folder / "last").exists(), driver, tmp_path)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(timeout=120) == 75, (tmp_path / "log.txt").read_text()
    assert "stopped with a checkpoint" in (tmp_path / "log.txt").read_text() and not (folder / "result.json").exists()
    assert run(dataset, tmp_path, "--scale.num-workers", "0").returncode == 0
    assert_same_run(folder, home / "runs/run")


@pytest.mark.slow
def test_train_on_a_dataset_that_is_not_there_says_what_makes_it(tmp_path):
    done = run(str(tmp_path / "nowhere"), tmp_path, "--scale.num-workers", "0")
    assert done.returncode == 1 and "run `python rayjobs/prepare.py" in done.stderr and "Traceback" not in done.stderr


TWO = ["--scale.num-workers", "2", "--schedule.num-epochs", "6"]


# --- two workers --------------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    """A whole run on two workers."""
    home = tmp_path_factory.mktemp("undisturbed")
    done = run(dataset, home, *TWO)
    assert done.returncode == 0, done.stdout + done.stderr
    return home / "runs/run"


@pytest.mark.slow
@pytest.mark.ray
def test_train_on_two_workers_equals_one_process(undisturbed, dataset, tmp_path):
    assert run(dataset, tmp_path, "--scale.num-workers", "0", "--schedule.num-epochs", "6").returncode == 0
    one, two = stable_lines(tmp_path / "runs/run"), stable_lines(undisturbed)
    for a, b in zip(one, two, strict=True):
        assert a["metrics"]["train/loss"] == pytest.approx(b["metrics"]["train/loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.ray
def test_train_with_a_worker_killed_finishes_like_an_undisturbed_run(undisturbed, dataset, tmp_path):
    folder = tmp_path / "runs/run"
    driver = start(dataset, tmp_path, *TWO)
    wait_until(lambda: num_evaluations(folder) >= 2, driver, tmp_path)
    workers = train_workers(driver)
    assert len(workers) == 2
    workers[1].kill()
    assert driver.wait(timeout=400) == 0, (tmp_path / "log.txt").read_text()
    assert not psutil.pid_exists(workers[1].pid) or workers[1].status() == psutil.STATUS_ZOMBIE
    assert_same_run(folder, undisturbed)
    assert not (folder / "ray").exists()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("how, status", [(signal.SIGKILL, -9), (signal.SIGTERM, 75)])
def test_train_with_its_driver_ended_completes_with_the_same_command(undisturbed, dataset, tmp_path, how, status):
    folder = tmp_path / "runs/run"
    driver = start(dataset, tmp_path, *TWO)
    wait_until(lambda: num_evaluations(folder) >= 1, driver, tmp_path)
    driver.send_signal(how)
    assert driver.wait(timeout=200) == status, (tmp_path / "log.txt").read_text()
    assert not (folder / "result.json").exists() and (folder / "last").exists()
    done = run(dataset, tmp_path, *TWO)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.ray
def test_train_streaming_with_one_broken_part_ends_soon_with_its_name(tmp_path):
    """The one worker that meets it must not leave the other one waiting, and Ray must not try again."""
    recipe = replace_all(SMOKE, {"data.num_points": 64})
    folder = make_dataset(str(tmp_path / "ds"), 40, recipe=recipe, objects_per_part=3)
    val_parts = [p for p, part in enumerate(folder.manifest().parts) if part["splits"].get("val")]
    path = tmp_path / f"ds/objects/part-{val_parts[1]:05d}.parquet"  # the second worker's
    path.write_bytes(path.read_bytes()[:200])
    # Nothing is held in memory but one part of each split: otherwise the driver would find it.
    started = time.monotonic()
    done = run(folder.uri, tmp_path, *TWO, "--scale.cache-gb", "0")
    assert done.returncode == 1 and path.name in done.stderr and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert time.monotonic() - started < 200  # gloo's timeout alone is 300 s
