"""Random kills during one search on a fake cluster, and whether its table of trials is that of an undisturbed search.

    python -m tests.cluster.chaos --kills 20 --seed 0

Killed (SIGKILL) are training workers, trials' processes, whole nodes and the driver, which is started again with the same command. Which, and when,
follows from the seed; what there is to kill at that moment does not, so two runs differ in detail. The last line is JSON. Exit status 0: the tables are equal.
"""

import collections
import csv
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import tyro

from cad_models.alignment.recipe import SMOKE
from cad_models.config import replace_all
from cluster.local.start import LocalCluster, RunningCluster, running
from tests.cluster.faults import end, raylets, start, train_workers, trial_processes
from tests.shared import REPOSITORY
from tests.synthetic import make_dataset

_LONGEST_RECOVERY_S = 600.0
KINDS = ("worker", "trial", "node", "driver")


@dataclass(frozen=True, kw_only=True)
class Chaos:
    """A search that is disturbed."""

    kills: int = 20
    """Kills in all."""
    seed: int = 0
    """Of kinds, victims and times."""
    trials: int = 8
    at_once: int = 2
    epochs: int = 300
    """Epochs of each trial: long enough that the kills fall into the search."""
    shortest_s: float = 5.0
    longest_s: float = 20.0
    """Between two kills: so many seconds, at random, in which something trained."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of it."""

    undisturbed: list[dict[str, str]]
    disturbed: list[dict[str, str]]
    """Rows of both trials.csv, without seconds."""
    kills: list[tuple[float, str]]
    """(seconds since the search was started, what was killed)."""
    seconds: tuple[float, float]
    """Of the undisturbed and of the disturbed search."""
    log: str

    @property
    def equal(self) -> bool:
        """Whether the tables agree in all that does not depend on time."""
        return self.undisturbed == self.disturbed


def command(job: Chaos, dataset: str, home: Path, name: str) -> list[str]:
    """A search of random trials, so that none depends on which was faster, each with a training worker."""
    return [
        *(sys.executable, str(REPOSITORY / "rayjobs/tune.py"), "--task", "alignment", "--smoke", "--dataset", dataset, "--output", str(home), "--name", name),
        *("--data.num-points", "64", "--model.num-points", "64", "--model.embed-dim", "32"),
        *("--tracking.folder", str(home / f"mlflow-{name}"), "--search.num-samples", str(job.trials), "--search.max-concurrent", str(job.at_once)),
        *("--search.scheduler", "none", "--search.num-startup-trials", str(job.trials), "--schedule.num-epochs", str(job.epochs)),
        *("--scale.num-workers", "1", "--scale.cpus-per-worker", "1", "--scale.threads-per-worker", "1", "--ensemble-size", "2"),
    ]


def disturb(job: Chaos, home: Path) -> Outcome:
    """Run the search undisturbed, then disturbed."""
    dataset = make_dataset(str(home / "ds"), 40, recipe=replace_all(SMOKE, {"data.num_points": 64})).uri
    with running(LocalCluster(cpus_per_node=2, max_nodes=3, idle_timeout_s=120)) as cluster:
        begun = time.monotonic()
        log = home / "undisturbed.txt"
        driver = start(command(job, dataset, home, "undisturbed"), cluster, log)
        try:
            if driver.wait(timeout=1_800):
                raise RuntimeError(f"the undisturbed search failed:\n{log.read_text()}")
        finally:
            end(driver)
        undisturbed_s = time.monotonic() - begun
        kills, seconds, text = _disturbed(job, cluster, command(job, dataset, home, "disturbed"), home / "disturbed.txt")
    tables = [_table(home / name / "trials.csv") for name in ("undisturbed", "disturbed")]
    return Outcome(undisturbed=tables[0], disturbed=tables[1], kills=kills, seconds=(undisturbed_s, seconds), log=text)


def _disturbed(job: Chaos, cluster: RunningCluster, search: list[str], log: Path) -> tuple[list[tuple[float, str]], float, str]:
    rng, begun = random.Random(job.seed), time.monotonic()
    kills: list[tuple[float, str]] = []
    driver = start(search, cluster, log)
    try:
        while len(kills) < job.kills:
            kind = rng.choices(KINDS, weights=(4, 2, 3, 1))[0]
            if not _trained_for(rng.uniform(job.shortest_s, job.longest_s), cluster, driver):
                break
            if not (victims := _victims(kind, cluster, driver)):
                continue
            victim = rng.choice(victims)
            print(f"{time.monotonic() - begun:6.0f} s: kill {len(kills) + 1}, a {kind}", flush=True)
            try:
                victim.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
            kills.append((round(time.monotonic() - begun, 1), kind))
            if kind == "driver":
                driver.wait()
                driver = start(search, cluster, log)
        # Each of the losses may need a node to be missed, and another to come.
        status = driver.wait(timeout=1_800)
    finally:
        end(driver)
    if status:
        raise RuntimeError(f"the disturbed search ended with {status}:\n{log.read_text()}")
    return kills, time.monotonic() - begun, log.read_text()


def _trained_for(seconds: float, cluster: RunningCluster, driver: subprocess.Popen) -> bool:
    """Wait until something has trained for so long; False when the search ended before."""
    trained, deadline = 0.0, time.monotonic() + _LONGEST_RECOVERY_S
    while trained < seconds:
        if driver.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise RuntimeError(f"nothing trained for {seconds:.0f} s within {_LONGEST_RECOVERY_S:.0f} s: the search did not recover")
        time.sleep(0.5)
        trained += 0.5 if train_workers(cluster) else 0.0
    return True


def _victims(kind: str, cluster: RunningCluster, driver: subprocess.Popen) -> list[psutil.Process]:
    if kind == "driver":
        return [psutil.Process(driver.pid)]
    found = {"worker": train_workers, "trial": trial_processes, "node": raylets}[kind](cluster)
    return sorted(found, key=lambda process: process.pid)


def _table(path: Path) -> list[dict[str, str]]:
    with path.open() as rows:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(rows)]


def main(job: Chaos) -> int:
    """Disturb, compare, tell."""
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # else the cluster would outlive this program
    with tempfile.TemporaryDirectory() as scratch:
        outcome = disturb(job, Path(scratch))
    for one, other in zip(outcome.undisturbed, outcome.disturbed, strict=False):
        if one != other:
            print("differs:", {name: (one[name], other.get(name)) for name in one if one[name] != other.get(name)})
    counts = collections.Counter(kind for _, kind in outcome.kills)
    print(json.dumps({"kills": dict(counts), "equal": outcome.equal, "seconds": [round(s) for s in outcome.seconds], "trials": len(outcome.disturbed)}))
    return 0 if outcome.equal and len(outcome.kills) == job.kills else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Chaos, description=__doc__)))
