"""Row 9. What it costs to start: ``train.py --help``, and a smoke training on a Ray that is up, beside the same training in a bare loop.

The bare loop is the training loop in this very process, its libraries loaded; the job is a new Python that joins Ray, starts a worker there, trains,
tracks the run and tells its figures. Wall-clock.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.generated_dataset import write_dataset
from benchmarks.measure import Comparison, Settings, row_main
from cad_models.alignment.recipe import SMOKE
from cad_models.tasks import TASKS

_ROOT = Path(__file__).resolve().parent.parent


def _seconds(command: list[str], **environment: str) -> float:
    started = time.perf_counter()
    run = subprocess.run(command, cwd=_ROOT, env={**os.environ, "PYTHONPATH": str(_ROOT), **environment}, capture_output=True, text=True, timeout=600)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {run.returncode}:\n{run.stderr[-3000:]}")
    return time.perf_counter() - started


def _bare(dataset: Path, out: Path) -> float:
    from rayjobs.loop import Training
    from rayjobs.resources import ScaleConfig
    from rayjobs.train import loop_config

    started = time.perf_counter()
    loop = loop_config(
        task_name="alignment", recipe=SMOKE, dataset_uri=str(dataset), output=str(out), name="bare", scale=ScaleConfig(num_workers=0), plan=None
    )
    Training(loop).run()
    return time.perf_counter() - started


def run(settings: Settings) -> list[Comparison]:
    """Time ``--help``, and jobs beside bare loops."""
    rounds = settings.pick(5, 1)
    train = [sys.executable, "rayjobs/train.py", "--task", "alignment"]
    _seconds([*train, "--help"])  # byte code
    helps = [_seconds([*train, "--help"]) for _ in range(rounds)]
    found = [Comparison(row=9, what="train.py --help", against="", unit="s", ours=statistics.median(helps), num_rounds=rounds, at_most=1.0)]

    import ray

    from rayjobs.resources import connect

    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["PYTHONPATH"] = str(_ROOT)
    os.environ.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory() as scratch:
        dataset, out = Path(scratch) / "dataset", Path(scratch)
        write_dataset(dataset, SMOKE, num_objects={"train": 64, "val": 16, "test": 16}, width=64)
        assert TASKS["alignment"].smoke == SMOKE
        _bare(dataset, out / "warm")
        connect()  # as the jobs do, again where a busy machine lets Ray's processes start too slowly
        try:
            address = ray.get_runtime_context().gcs_address
            job = [*train, "--smoke", "--dataset", str(dataset), "--output", str(out / "runs"), "--tracking.folder", str(out / "tracking")]
            _seconds([*job, "--name", "warm"], RAY_ADDRESS=address)  # makes the tracking database
            jobs, bares = [], []
            for number in range(settings.pick(3, 1)):
                jobs.append(_seconds([*job, "--name", f"job-{number}"], RAY_ADDRESS=address))
                bares.append(_bare(dataset, out / f"bare-{number}"))
            scores = [json.loads((out / path / "result.json").read_text())["score"] for path in ("runs/job-0", "bare-0/bare")]
            assert scores[0] == scores[1], f"the job and the bare loop end at {scores}"
        finally:
            ray.shutdown()
    overhead = statistics.median(job - bare for job, bare in zip(jobs, bares, strict=True))
    note = f"{statistics.median(jobs):.1f} s beside {statistics.median(bares):.1f} s"
    found.append(
        Comparison(row=9, what="smoke job on a warm Ray: overhead", against="bare loop", unit="s", ours=overhead, num_rounds=len(jobs), at_most=10.0, note=note)
    )
    return found


if __name__ == "__main__":
    row_main(run)
