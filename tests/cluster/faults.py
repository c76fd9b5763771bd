"""What goes wrong in clusters, done on purpose to a fake one (cluster/local): losing workers, nodes, drivers."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from cluster.local.start import RunningCluster, processes


def train_workers(cluster: RunningCluster) -> list[psutil.Process]:
    """Processes that train, of whatever driver."""
    return _named(cluster, "RayTrainWorker")


def trial_processes(cluster: RunningCluster) -> list[psutil.Process]:
    """Ray Tune's processes, one a trial."""
    return [*_named(cluster, "ImplicitFunc"), *_named(cluster, "run_trial")]


def _named(cluster: RunningCluster, part: str) -> list[psutil.Process]:
    found = []
    for process in processes(cluster.mark):
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if command.startswith("ray::") and part in command:
                found.append(process)
    return found


def raylets(cluster: RunningCluster) -> list[psutil.Process]:
    """The raylets of the nodes beside the head: each is what makes a process group a node."""
    found = []
    for process in processes(cluster.mark):
        with contextlib.suppress(psutil.Error):
            if process.name() == "raylet" and process.environ().get("RAY_NODE_TYPE_NAME") == "cpu":
                found.append(process)
    return found


def node_of(process: psutil.Process) -> psutil.Process:
    """The raylet of the node that a worker runs on."""
    return next(parent for parent in process.parents() if parent.name() == "raylet")


def wait_until(happened: Callable[[], object], driver: subprocess.Popen, log: Path, *, longest_s: float = 300) -> None:
    """Until it happened; fails with the driver's output when it ended or took too long."""
    deadline = time.monotonic() + longest_s
    while not happened():
        assert driver.poll() is None, f"ended with {driver.returncode}:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"{longest_s:g} s passed:\n{log.read_text()}"
        time.sleep(0.1)


def start(command: list[str], cluster: RunningCluster, log: Path) -> subprocess.Popen:
    """A driver on the cluster, in a process group of its own; its output is appended to ``log``."""
    environment = {**cluster.environment, "OMP_NUM_THREADS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with log.open("a") as sink:
        return subprocess.Popen(command, env=environment, cwd=log.parent, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True)


def end(driver: subprocess.Popen) -> None:
    """Make sure that a driver is gone."""
    if driver.poll() is None:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
