"""Faults on a fake cluster of several nodes: what a training loses, and what it ends with."""

import contextlib
import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from cluster.local.start import LocalCluster, running
from tests.cluster.chaos import Chaos, disturb
from tests.cluster.fault_matrix import RECIPE, Matrix, Setting, disk_full, store_stopped
from tests.cluster.faults import end, node_of, start, train_workers, wait_until
from tests.rayjobs.test_telemetry import RAYS
from tests.shared import REPOSITORY
from tests.synthetic import make_dataset

HOLD_A_CPU = """
import sys, time, ray
from ray.util.placement_group import placement_group
ray.init(log_to_driver=False)
ray.get(placement_group([{"CPU": 1.0}]).ready())
open(sys.argv[1], "w").close()
time.sleep(1000)
"""
FLAGS = ["--smoke", "--data.num-points", "64", "--model.num-points", "64", "--model.embed-dim", "32"]


def lines(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train_command(dataset: str, home: Path, name: str, *flags: str) -> list[str]:
    output = ["--dataset", dataset, "--output", str(home / "runs"), "--tracking.folder", str(home / "mlflow"), "--name", name]
    return [sys.executable, str(REPOSITORY / "rayjobs/train.py"), "--task", "alignment", *FLAGS, *output, *flags]


def served_metrics(cluster) -> str:
    """What Prometheus would read from the nodes and from the autoscaler."""
    targets = json.loads((cluster.folder / "h/prom_metrics_service_discovery.json").read_text())
    texts = []
    for address in {address for target in targets for address in target["targets"]}:
        with contextlib.suppress(urllib.error.URLError):  # of a node that was lost
            texts.append(urllib.request.urlopen(f"http://{address}/metrics", timeout=20).read().decode())
    return "\n".join(texts)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_training_grows_with_the_cluster_and_goes_on_when_a_node_is_lost(tmp_path):
    dataset = make_dataset(str(tmp_path / "ds"), 40, recipe=RECIPE).uri
    # Small steps: with the recipe's own, another order of sums alone (1e-8) grows to 1e-2 within a hundred epochs, in one process too.
    epochs = ["--schedule.num-epochs", "150", "--schedule.eval-every-epochs", "5", "--optim.lr", "1e-5", "--optim.head-lr", "1e-5"]
    log, folder, busy = tmp_path / "log.txt", tmp_path / "runs/elastic", tmp_path / "busy"
    elastic = ["--scale.num-workers", "2", "--scale.min-workers", "1", "--scale.resize-s", "5", "--checkpoint-every-steps", "1"]
    metrics = [f"ray_{name}{{" for name in ("cad_train_epoch", "cad_val_score", "cad_train_workers")] + sorted(RAYS)
    with running(LocalCluster(cpus_per_node=1, max_nodes=3, idle_timeout_s=60)) as cluster:
        # Somebody else has one of the three nodes: there is room for one worker, and for the tasks that read.
        other = start([sys.executable, "-c", HOLD_A_CPU, str(busy)], cluster, tmp_path / "other.txt")
        wait_until(busy.exists, other, tmp_path / "other.txt")
        driver = start(train_command(dataset, tmp_path, "elastic", *epochs, *elastic), cluster, log)
        try:
            wait_until(lambda: "training with 1 worker of at most 2: more as nodes come" in log.read_text() and lines(folder), driver, log)
            end(other)
            wait_until(lambda: "room for 2 workers: saved, starting again with them" in log.read_text(), driver, log)
            wait_until(lambda: len(train_workers(cluster)) == 2, driver, log)
            before = len(lines(folder))
            wait_until(lambda: len(lines(folder)) > before, driver, log)
            wait_until(lambda: all(name in served_metrics(cluster) for name in metrics), driver, log)
            killed = time.monotonic()
            node_of(train_workers(cluster)[1]).kill()
            wait_until(lambda: "lost a worker" in log.read_text(), driver, log)
            before = len(lines(folder))
            wait_until(lambda: len(lines(folder)) > before, driver, log)
            print(f"from the kill to the next evaluation: {time.monotonic() - killed:.0f} s")
            assert driver.wait(timeout=500) == 0, log.read_text()
        finally:
            end(other)
            end(driver)
    # The same global batches all along: the losses are those of one undisturbed process, but for the order of sums.
    alone = start(train_command(dataset, tmp_path, "alone", *epochs, "--scale.num-workers", "0"), cluster, tmp_path / "alone.txt")
    assert alone.wait(timeout=500) == 0, (tmp_path / "alone.txt").read_text()
    ours, theirs = lines(folder), lines(tmp_path / "runs/alone")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one["metrics"]["train/loss"] == pytest.approx(other["metrics"]["train/loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_search_under_random_kills_ends_with_the_undisturbed_table(tmp_path):
    outcome = disturb(Chaos(kills=3, seed=3, trials=2, epochs=80, shortest_s=3, longest_s=8), tmp_path)
    assert len(outcome.kills) == 3, outcome.log
    assert outcome.undisturbed == outcome.disturbed, outcome.log


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_disk_that_is_full_and_an_object_store_that_stops_cost_no_result(tmp_path):
    with running(LocalCluster(max_nodes=1)) as cluster:
        setting = Setting(Matrix(epochs=24), tmp_path, make_dataset(str(tmp_path / "ds"), 40, recipe=RECIPE).uri, cluster)
        rows = [store_stopped(setting, seconds=8.0), disk_full(setting)]
    for row in rows:
        assert row.note.startswith("not tried") or (row.equal and row.epochs_lost == 0), row
    assert "No space left on device" in rows[1].note or rows[1].note.startswith("not tried"), rows[1]
