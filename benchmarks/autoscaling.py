"""Nodes over time during a search on a cluster that grows and shrinks (cluster/local), as JSON and as a picture.

    python benchmarks/autoscaling.py --dataset ds/ --out outputs/autoscaling
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cluster.local.start import REPOSITORY, LocalCluster, RunningCluster, running  # noqa: E402

# After a search Ray Train's last wish for resources keeps nodes alive for 180 s (a constant of Ray); then comes the idle time.
_LONGEST_SHRINKING_S = 300.0
_LONGEST_SEARCH_S = 1_200.0


@dataclass(frozen=True, kw_only=True)
class Autoscaling:
    """A search of 8 trials, watched."""

    dataset: str = tyro.MISSING
    """Of --task alignment, prepared and embedded."""
    out: str = "outputs/autoscaling"
    """Where <out>.json and <out>.png go."""
    num_workers: int = 1
    """--scale.num-workers of the search."""
    cluster: LocalCluster = LocalCluster()


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What was seen."""

    status: int
    """Exit status of the search."""
    counts: list[tuple[float, int]]
    """(seconds since the search was started, nodes, the head among them), once a second."""
    ended_s: float
    """When the search ended."""
    output: str
    """What the search printed."""


def watch(started: RunningCluster, command: list[str], folder: Path) -> Watched:
    """Run a command on a cluster until it ends and the nodes are gone, or for five minutes after it."""
    counts: list[tuple[float, int]] = []
    begun, done = time.monotonic(), threading.Event()

    def count() -> None:
        while not done.wait(1.0):
            counts.append((round(time.monotonic() - begun, 1), started.num_nodes()))

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        with (folder / "search.txt").open("w") as log:
            status = subprocess.run(command, env=started.environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder, timeout=_LONGEST_SEARCH_S).returncode
        ended = time.monotonic() - begun
        while time.monotonic() - begun < ended + _LONGEST_SHRINKING_S and (not counts or counts[-1][0] < ended or counts[-1][1] > 1):
            time.sleep(1.0)
    finally:
        done.set()
        thread.join()
    return Watched(status=status, counts=counts, ended_s=round(ended, 1), output=(folder / "search.txt").read_text())


def search_command(dataset: str, folder: Path, *, num_workers: int, trials: int = 8, at_once: int = 4) -> list[str]:
    """``tune.py --smoke`` with its files in ``folder``."""
    return [
        *(sys.executable, str(REPOSITORY / "rayjobs/tune.py"), "--task", "alignment", "--smoke", "--dataset", os.path.abspath(dataset)),
        *("--output", str(folder / "searches"), "--tracking.folder", str(folder / "mlflow"), "--search.num-samples", str(trials)),
        *("--search.max-concurrent", str(at_once), "--search.scheduler", "none", "--scale.num-workers", str(num_workers), "--ensemble-size", "2"),
    ]


def draw(watched: Watched, path: Path) -> None:
    """The steps of the node count, with the time of the search shaded."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    axes.axvspan(0, watched.ended_s, color="0.92")
    axes.text(watched.ended_s / 2, 0.25, "search", ha="center", color="0.4")
    axes.step([t for t, _ in watched.counts], [n for _, n in watched.counts], where="post", color="tab:blue")
    axes.set(xlabel="seconds since the search was started", ylabel="nodes, head included", ylim=(0, max(n for _, n in watched.counts) + 0.5), xlim=(0, None))
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(job: Autoscaling) -> int:
    """Measure, write, tell."""
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # else the cluster would outlive this program
    out = Path(job.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, running(job.cluster) as started:
        watched = watch(started, search_command(job.dataset, Path(scratch), num_workers=job.num_workers), Path(scratch))
    print(watched.output)
    out.with_suffix(".json").write_text(json.dumps({key: value for key, value in asdict(watched).items() if key != "output"}) + "\n")
    draw(watched, out.with_suffix(".png"))
    most = max(n for _, n in watched.counts)
    first = next((t for t, n in watched.counts if n > 1), float("nan"))
    print(f"search {watched.ended_s:.0f} s, exit status {watched.status}; second node after {first:.0f} s, {most} nodes at most, {watched.counts[-1][1]} at the end, "
          f"{watched.counts[-1][0] - watched.ended_s:.0f} s after the search")  # fmt: skip
    return watched.status


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Autoscaling, description=__doc__)))
