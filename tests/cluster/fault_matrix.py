"""Each fault once, on a fake cluster: seconds lost, finished epochs lost, and whether the results are those of the undisturbed job.

    python -m tests.cluster.fault_matrix                   # all, about 20 minutes on 2 cores; writes outputs/faults.json
    python -m tests.cluster.fault_matrix --only node notice

A finished epoch counts as lost when the run's history had its evaluation and later had not.
"""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import tyro

from cad_models.alignment.recipe import SMOKE
from cad_models.config import replace_all
from cluster.local.start import LocalCluster, RunningCluster, processes, running
from tests.cluster.faults import end, node_of, start, train_workers, wait_until
from tests.object_store import BUCKET, free_port, s3_server
from tests.rayjobs.test_loop import stable_lines
from tests.shared import REPOSITORY
from tests.synthetic import make_dataset

RECIPE = replace_all(SMOKE, {"data.num_points": 64})
FLAGS = ["--smoke", "--data.num-points", "64", "--model.num-points", "64", "--model.embed-dim", "32"]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Faults to try."""

    only: tuple[str, ...] = ()
    """Names of faults; empty = all."""
    epochs: int = 40
    """Of each training."""
    out: Path = Path("outputs/faults.json")


@dataclass(kw_only=True)
class Row:
    """What a fault cost."""

    fault: str
    seconds_lost: float
    epochs_lost: int
    equal: bool
    note: str = ""


@dataclass
class Setting:
    """What all faults share."""

    job: Matrix
    home: Path
    dataset: str
    cluster: RunningCluster
    undisturbed: dict[tuple[str, ...], tuple[float, Any]] = field(default_factory=dict)
    """Flags -> (seconds, results) of the undisturbed job."""

    def train(self, name: str, *flags: str) -> list[str]:
        """train.py with its files in the home."""
        given = [*FLAGS, "--schedule.num-epochs", str(self.job.epochs), *flags]
        if "--output" not in flags:
            given += ["--output", str(self.home / "runs")]
        if "--dataset" not in flags:
            given += ["--dataset", self.dataset]
        return [sys.executable, str(REPOSITORY / "rayjobs/train.py"), "--task", "alignment", "--name", name, "--tracking.folder", str(self.home / "mlflow"), *given]

    def tune(self, name: str) -> list[str]:
        """tune.py: three trials, one after the other."""
        flags = ["--search.num-samples", "3", "--search.scheduler", "none", "--ensemble-size", "2", "--scale.cpus-per-worker", "1"]
        tracking = ["--tracking.folder", str(self.home / f"mlflow-{name}")]  # registers members: each job its own
        return [
            *(sys.executable, str(REPOSITORY / "rayjobs/tune.py"), "--task", "alignment", "--dataset", self.dataset, "--output", str(self.home / "searches")),
            *("--name", name, *FLAGS, "--schedule.num-epochs", str(self.job.epochs), *tracking, *flags),
        ]


class History:
    """Watches a run's history: how many evaluations it has, and how many it ever lost."""

    def __init__(self, folder: Path) -> None:
        self.lost, self._most, self._folder = 0, 0, folder
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "History":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def __len__(self) -> int:
        path = self._folder / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            count = len(self)
            self.lost = max(self.lost, self._most - count)
            self._most = max(self._most, count)


def trials_table(folder: Path) -> list[dict[str, str]]:
    """trials.csv without seconds."""
    with (folder / "trials.csv").open() as rows:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(rows)]


def finished(driver: subprocess.Popen, log: Path) -> None:
    """Wait for a driver that must end well."""
    try:
        if driver.wait(timeout=900):
            raise RuntimeError(f"ended with {driver.returncode}:\n{log.read_text()}")
    finally:
        end(driver)


def base(setting: Setting, *flags: str) -> tuple[float, list[dict]]:
    """The undisturbed training with these flags, done once; a first one, not counted, brings the nodes."""
    if flags not in setting.undisturbed:
        for turn in range(2 if "0" not in flags else 1):
            name = f"base-{len(setting.undisturbed)}-{turn}"
            log, begun = setting.home / f"{name}.txt", time.monotonic()
            finished(start(setting.train(name, *flags), setting.cluster, log), log)
            setting.undisturbed[flags] = time.monotonic() - begun, stable_lines(setting.home / "runs" / name)
    return setting.undisturbed[flags]


TWO = ("--scale.num-workers", "2", "--scale.cpus-per-worker", "1")
HERE = ("--scale.num-workers", "0")


def disturbed(setting: Setting, fault: str, strike: Callable[[subprocess.Popen], None], *, again: bool = False, flags: tuple[str, ...] = TWO) -> Row:
    """A training that is struck after a quarter of its epochs; ``again``: it ends, and the same command is given once more."""
    seconds, expected = base(setting, *flags)
    folder, log, begun = setting.home / "runs" / fault, setting.home / f"{fault}.txt", time.monotonic()
    driver = start(setting.train(fault, *flags), setting.cluster, log)
    with History(folder) as history:
        try:
            wait_until(lambda: len(history) >= setting.job.epochs // 4, driver, log)
            strike(driver)
            if again:
                driver.wait(timeout=200)
                driver = start(setting.train(fault, *flags), setting.cluster, log)
        finally:
            finished(driver, log)
    taken = time.monotonic() - begun
    return Row(fault=fault, seconds_lost=round(taken - seconds, 1), epochs_lost=history.lost, equal=stable_lines(folder) == expected)


# --- the faults ---------------------------------------------------------------------------------------------------------------------------
def worker(setting: Setting) -> Row:
    """SIGKILL of a training worker."""
    return disturbed(setting, "worker", lambda driver: train_workers(setting.cluster)[1].kill())


def node(setting: Setting) -> Row:
    """SIGKILL of a node with a training worker on it."""
    return disturbed(setting, "node", lambda driver: node_of(train_workers(setting.cluster)[1]).kill())


def notice(setting: Setting) -> Row:
    """SIGTERM, a spot machine's notice, to a node with a training worker on it."""
    return disturbed(setting, "notice", lambda driver: node_of(train_workers(setting.cluster)[1]).terminate())


def drain(setting: Setting) -> Row:
    """A node with a training worker on it is drained, as the autoscaler does at a spot machine's notice that it has read: 15 s later it is gone."""

    def announce(driver: subprocess.Popen) -> None:
        node_id = next(word.partition("=")[2] for word in node_of(train_workers(setting.cluster)[1]).cmdline() if word.startswith(("--node_id=", "--node-id=")))
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "15"]
        command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", setting.cluster.environment["RAY_ADDRESS"], "--node-id", node_id, *reason]
        subprocess.run(command, env=setting.cluster.environment, check=True, capture_output=True, timeout=60)

    return disturbed(setting, "drain", announce)


def train_driver(setting: Setting) -> Row:
    """SIGKILL of the training's driver; the same command again."""
    return disturbed(setting, "train_driver", lambda driver: driver.kill(), again=True)


def tracking_down(setting: Setting) -> Row:
    """The tracking server does not answer from beginning to end."""
    seconds, expected = base(setting, *HERE)
    os.environ["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{free_port()}"
    log, begun = setting.home / "tracking_down.txt", time.monotonic()
    try:
        environment = {**setting.cluster.environment, "MLFLOW_TRACKING_URI": os.environ["MLFLOW_TRACKING_URI"], "OMP_NUM_THREADS": "1"}
        with log.open("w") as sink:
            driver = subprocess.Popen(setting.train("tracking_down", *HERE), env=environment, cwd=setting.home, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True)
        finished(driver, log)
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]
    taken = time.monotonic() - begun
    told = [line for line in log.read_text().splitlines() if "track" in line.lower()]
    equal = stable_lines(setting.home / "runs/tracking_down") == expected
    return Row(fault="tracking_down", seconds_lost=round(taken - seconds, 1), epochs_lost=0, equal=equal, note=told[-1] if told else "")


def store_stopped(setting: Setting, seconds: float = 30.0) -> Row:
    """The S3 server that holds dataset and run is stopped for a while."""
    with s3_server(setting.home / "s3.txt") as reach, changed_environment(reach):
        make_dataset(f"s3://{BUCKET}/ds", 40, recipe=RECIPE)
        flags = ("--dataset", f"s3://{BUCKET}/ds", "--output", f"s3://{BUCKET}/runs", *HERE)
        (server,) = [p for p in psutil.Process().children() if any("moto" in word for word in p.cmdline())]
        results, times = [], []
        for name in ("undisturbed", "stopped"):
            log, begun = setting.home / f"s3-{name}.txt", time.monotonic()
            environment = {**setting.cluster.environment, **reach, "OMP_NUM_THREADS": "1"}
            with log.open("w") as sink:
                driver = subprocess.Popen(setting.train(name, *flags), env=environment, cwd=setting.home, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True)
            if name == "stopped":
                wait_until(lambda log=log: log.read_text().count("epoch ") >= setting.job.epochs // 4, driver, log)
                server.suspend()
                time.sleep(seconds)
                server.resume()
            finished(driver, log)
            times.append(time.monotonic() - begun)
            from cad_models.dataset import Folder

            with Folder(f"s3://{BUCKET}/runs/{name}").fetched("") as directory:
                results.append(stable_lines(directory))
    return Row(fault="store_stopped", seconds_lost=round(times[1] - times[0], 1), epochs_lost=0, equal=results[0] == results[1], note=f"of which {seconds:g} s the server did not answer")


def disk_full(setting: Setting) -> Row:
    """The disk is full when a checkpoint is written; then there is room, and the same command again."""
    disk = setting.home / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True).returncode:
        return Row(fault="disk_full", seconds_lost=0.0, epochs_lost=0, equal=False, note="not tried: mounting a small disk needs root")
    try:
        seconds, expected = base(setting, *HERE)
        flags, log, begun = (*HERE, "--output", str(disk / "runs")), setting.home / "disk_full.txt", time.monotonic()
        driver = start(setting.train("full", *flags), setting.cluster, log)
        with History(disk / "runs/full") as history:
            wait_until(lambda: len(history) >= setting.job.epochs // 4, driver, log)
            with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
                while True:
                    filler.write(b"0" * 4096)
            status = driver.wait(timeout=100)
            told = log.read_text().strip().splitlines()[-1]
            (disk / "filler").unlink()
            finished(start(setting.train("full", *flags), setting.cluster, log), log)
        taken = time.monotonic() - begun
        equal = stable_lines(disk / "runs/full") == expected and status == 1
        return Row(fault="disk_full", seconds_lost=round(taken - seconds, 1), epochs_lost=history.lost, equal=equal, note=f"exit status {status}: {told}"[:200])
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def _searched(setting: Setting) -> tuple[float, list[dict[str, str]]]:
    if ("tune",) not in setting.undisturbed:
        log, begun = setting.home / "tune.txt", time.monotonic()
        finished(start(setting.tune("undisturbed"), setting.cluster, log), log)
        setting.undisturbed[("tune",)] = time.monotonic() - begun, trials_table(setting.home / "searches/undisturbed")
    return setting.undisturbed[("tune",)]


def tune_driver(setting: Setting) -> Row:
    """SIGKILL of a search's driver in its second trial; the same command again."""
    seconds, expected = _searched(setting)
    log, begun = setting.home / "tune_driver.txt", time.monotonic()
    driver = start(setting.tune("driver"), setting.cluster, log)
    wait_until(lambda: "1/3 trial" in log.read_text() and train_workers(setting.cluster), driver, log)
    end(driver)
    finished(start(setting.tune("driver"), setting.cluster, log), log)
    equal = trials_table(setting.home / "searches/driver") == expected
    return Row(fault="tune_driver", seconds_lost=round(time.monotonic() - begun - seconds, 1), epochs_lost=0, equal=equal)


def supervisor(setting: Setting) -> Row:
    """SIGKILL of a submitted job's supervisor (with it its driver); submitted again."""
    _, expected = _searched(setting)
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", setting.cluster.dashboard_url, "--working-dir", str(REPOSITORY), "--"]
    seconds = []
    for name in ("submitted", "supervisor"):
        log, begun = setting.home / f"{name}.txt", time.monotonic()
        driver = start([*submit, *setting.tune(name)], setting.cluster, log)
        if name == "supervisor":
            wait_until(lambda log=log: "1/3 trial" in log.read_text() and train_workers(setting.cluster), driver, log)
            (found,) = [p for p in processes(setting.cluster.mark) if "JobSupervisor" in " ".join(p.cmdline())]
            found.kill()
            driver.wait(timeout=300)
            driver = start([*submit, *setting.tune(name)], setting.cluster, log)
        finished(driver, log)
        seconds.append(time.monotonic() - begun)
    equal = all(trials_table(setting.home / "searches" / name) == expected for name in ("submitted", "supervisor"))
    return Row(fault="supervisor", seconds_lost=round(seconds[1] - seconds[0], 1), epochs_lost=0, equal=equal)


FAULTS = {f.__name__: f for f in (worker, node, notice, drain, train_driver, tune_driver, supervisor, store_stopped, tracking_down, disk_full)}


@contextlib.contextmanager
def changed_environment(values: dict[str, str]) -> Iterator[None]:
    """Variables of this process, for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def main(job: Matrix) -> int:
    """Try each, tell, write."""
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # else the cluster would outlive this program
    if unknown := [name for name in job.only if name not in FAULTS]:
        print(f"error: --only {' '.join(unknown)}: there are {' '.join(FAULTS)}", file=sys.stderr)
        return 2
    rows = []
    with tempfile.TemporaryDirectory() as scratch, running(LocalCluster(cpus_per_node=1, max_nodes=4, idle_timeout_s=3_600)) as cluster:
        home = Path(scratch)
        setting = Setting(job, home, make_dataset(str(home / "ds"), 40, recipe=RECIPE).uri, cluster)
        for name in job.only or FAULTS:
            row = FAULTS[name](setting)
            rows.append(row)
            print(f"{row.fault:>14}: {row.seconds_lost:6.1f} s lost, {row.epochs_lost} finished epochs lost, results {'equal' if row.equal else 'NOT EQUAL'}  {row.note}", flush=True)
    job.out.parent.mkdir(parents=True, exist_ok=True)
    job.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0 if all(row.equal and row.epochs_lost == 0 for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Matrix, description=__doc__)))
