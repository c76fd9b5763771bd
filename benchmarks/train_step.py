"""Row 1. The whole job: objects a second of ``train.py`` with 1 and 2 workers (Ray Train), from its own history, in the epochs after the first.

Rivals, started by torchrun on the same number of processes: the training as research code has it, and one tuned by hand (``plain_training``). The
losses of train.py and of the tuned one must agree: same batches, same mathematics. Wall-clock; a thread a process.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.generated_dataset import write_dataset
from benchmarks.measure import Comparison, Settings, row_main, times_better
from benchmarks.plain_training import PUBLISHED, changes, recipe

_ROOT = Path(__file__).resolve().parent.parent
WIDTH = 1024


def _run(command: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    run = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=600)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {run.returncode}:\n{run.stderr[-3000:]}")


def ours(dataset: Path, out: Path, *, num_workers: int, epochs: int, quick: bool) -> dict[str, list[float]]:
    """Rates and losses of every epoch, from the run's metrics."""
    told = PUBLISHED | changes(epochs, quick)
    flags = [f"--{path.replace('_', '-')}={value}" for path, value in told.items() if not isinstance(value, bool)]
    flags += [f"--{path.replace('.', '.no-', 1).replace('_', '-')}" for path, value in told.items() if value is False]
    _run(
        [
            sys.executable, "rayjobs/train.py", "--task", "alignment", "--dataset", str(dataset), "--output", str(out), "--name", "run",
            "--tracking.folder", str(out / "tracking"), f"--scale.num-workers={num_workers}", "--scale.threads-per-worker=1", "--scale.cache-gb=4", *flags,
        ]  # fmt: skip
    )
    lines = [json.loads(line)["metrics"] for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    return {"objects_per_s": [line["train/objects_per_s"] for line in lines], "loss": [line["train/loss"] for line in lines]}


def plain(style: str, dataset: Path, out: Path, *, num_workers: int, epochs: int, quick: bool) -> dict[str, list[float]]:
    """The same of ``plain_training``."""
    out.mkdir()
    _run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_workers), "-m", "benchmarks.plain_training",
            "--style", style, "--dataset", str(dataset), "--epochs", str(epochs), "--out", str(out / "rates.json"), *(["--quick"] if quick else []),
        ]  # fmt: skip
    )
    return json.loads((out / "rates.json").read_text())


def run(settings: Settings) -> list[Comparison]:
    """Each of the three in turn, round after round."""
    epochs, rounds = settings.pick(4, 3), settings.pick(3, 1)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        dataset = Path(scratch) / "dataset"
        write_dataset(dataset, recipe(epochs, settings.quick), num_objects={"train": settings.pick(256, 64), "val": 16, "test": 16}, width=WIDTH, npz=True)
        for num_workers in (1, 2):
            seconds: dict[str, list[float]] = {"ours": [], "research": [], "tuned": []}
            losses = {}
            for number in range(rounds):
                common = {"num_workers": num_workers, "epochs": epochs, "quick": settings.quick}
                # Turned around from round to round: a machine that gets busier hits all alike.
                for name in list(seconds) if number % 2 == 0 else list(seconds)[::-1]:
                    out = Path(scratch) / f"{name}-{num_workers}-{number}"
                    result = ours(dataset, out, **common) if name == "ours" else plain(name, dataset, out, **common)
                    # The first epoch also compiles, and fills caches.
                    seconds[name].append(1 / statistics.median(result["objects_per_s"][1:]))
                    losses[name] = result["loss"]
            for mine, theirs in zip(losses["ours"], losses["tuned"], strict=True):
                assert abs(mine - theirs) < 2e-3 * theirs, (losses["ours"], losses["tuned"])
            for rival, aim in (("research", 1.5), ("tuned", 0.97)):
                ratio, low, high = times_better(seconds["ours"], seconds[rival])
                found.append(
                    Comparison(
                        row=1, what=f"training, {num_workers} worker{'s' if num_workers > 1 else ''}, published recipe", unit="objects/s",
                        against={"research": "torchrun + DataLoader on .npz, as research code", "tuned": "torchrun, tuned by hand"}[rival],
                        ours=1 / statistics.median(seconds["ours"]), theirs=1 / statistics.median(seconds[rival]), ratio=ratio, low=low, high=high,
                        num_rounds=rounds, at_least=aim,
                    )  # fmt: skip
                )
    return found


if __name__ == "__main__":
    row_main(run)
