"""Registry members -> ensemble -> answers: which part does this picture show, which pictures show this part, what class is it?

    python rayjobs/infer.py --task alignment --model models:/cad-alignment@champion --queries q/ --gallery g/ --output submission.csv
    python rayjobs/infer.py --task alignment --model models:/cad-alignment/3 --model outputs/run/best --queries q/ --gallery g/
    python rayjobs/infer.py --task alignment --model moe.safetensors:pc_encoder.safetensors --queries test/       # the source system's layout

Alignment: images among the queries are searched among the gallery's meshes, and meshes among its images (`bolt_0.png`, `bolt_1.png`: two views of
`bolt`); `--task-direction mesh_to_mesh` finds the meshes most like a mesh. Where answers are classes there is no gallery.
Writes the CSV, and beside it a table of ranks and scores (Parquet), a page to look at (HTML), and the files that could not be read.
"""

import csv
import io
import json
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from cad_models.config import Recipe
from cad_models.dataset import QUARANTINE_SCHEMA, Folder
from cad_models.task import Answer, InferOptions, Input, Reject, Requests
from cad_models.tasks import TASKS
from rayjobs.cli import TrackingConfig, check_rule, run_job
from rayjobs.resources import ScaleConfig

if TYPE_CHECKING:
    from cad_models.ensemble import Ensemble

# Files of one unit of work: enough that handing them out costs nothing, few enough that the last worker does not keep the others waiting.
_MAX_INPUTS_PER_UNIT = 16


@dataclass(frozen=True, kw_only=True)
class InferJob:
    """See the module's docstring."""

    task: str
    recipe: tyro.conf.Suppress[Recipe]
    smoke: tyro.conf.Suppress[bool] = False
    model: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What answers: models:/<registered model>@<alias> or /<version>, a checkpoint folder, or its files joined by colons; repeat for an ensemble."""
    queries: str = tyro.MISSING
    """Folder of the files that are asked about: images, meshes, whatever the task reads."""
    gallery: str = ""
    """Folder to search in; needed only where answers are files, and not for the source system's layout."""
    output: str = "outputs/submission.csv"
    """The answers as CSV, in the columns that the task's users expect."""
    table: str = ""
    """Ranks and scores as Parquet; empty = beside the output."""
    page: str = ""
    """The answers as a page; empty = beside the output."""
    direction: Annotated[str, tyro.conf.arg(aliases=["--task-direction"])] = "auto"
    """Which way to search: image_to_mesh, mesh_to_image or mesh_to_mesh (alignment); auto = every way for which there are files, mesh_to_mesh only where
    there is no image."""
    combine: str = "auto"
    """How members are combined: a rule of the task (alignment: concatenate = mean of their cosines, mean = mean of their vectors); auto = as
    registered, else the task's first."""
    weights: tuple[float, ...] = ()
    """One for each --model; empty = every member counts the same (or as registered)."""
    top_k: int = 3
    """Answers to each query."""
    max_bad_fraction: float = 0.1
    """More unreadable files than this share of all end in exit status 1, after everything is written."""
    options: InferOptions = InferOptions()
    """The task's own."""
    scale: ScaleConfig = ScaleConfig(num_workers=0)
    """Workers and their limits; --scale.num-workers 0 = one for each core or GPU."""
    tracking: TrackingConfig = TrackingConfig()


def main(job: InferJob) -> int:
    """Answer, write, and tell; 1 when too many files were bad or nothing could be answered."""
    if job.top_k < 1:
        raise ValueError(f"--top-k {job.top_k}: ask for at least one answer")
    if not 0 <= job.max_bad_fraction <= 1:
        raise ValueError(f"--max-bad-fraction {job.max_bad_fraction} is no share between 0 and 1")
    if job.combine != "auto":
        check_rule(job.task, job.combine)
    clock = _Clock()
    requests = TASKS[job.task].list_requests(job.queries, job.gallery or None, direction=job.direction, options=job.options)

    from cad_models.ensemble import load_ensemble, ranked
    from rayjobs.registry import gather_ensemble
    from rayjobs.tracking import open_tracking

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as spool:
        directory = Path(folder) / "ensemble"
        gather_ensemble(
            job.model,
            directory,
            tracking=lambda: open_tracking(job.tracking, job.task),
            weights=job.weights or None,
            rule=None if job.combine == "auto" else job.combine,
        )
        # Here too, not in the workers alone: what is wrong with a member is said once and before anything starts.
        ensemble = load_ensemble(directory)
        if ensemble.task.name != job.task:
            raise ValueError(f"--model is of the task {ensemble.task.name}, --task says {job.task}")
        ensemble.task.predictor(ensemble.members, options=job.options)
        clock.lap("load models", len(ensemble.members))
        _tell_start(ensemble, requests)
        outputs: dict[int, list[Any]] = {}
        rejects: list[tuple[Input, Reject]] = []
        thumbnails = _Thumbnails(spool)
        for position, row in _processed(directory, requests, job, clock):
            if row.reject is None:
                outputs[position] = row.outputs
                thumbnails.add(position, row.thumbnail)
            else:
                rejects.append((requests.inputs[position], row.reject))
        clock.lap("all files (wall time)", len(requests.inputs))
        answers = ranked(ensemble, requests, outputs, top_k=job.top_k, options=job.options)
        clock.lap("search", len({(a.direction, a.query) for a in answers}))
        written = _write(job, ensemble, requests, answers, sorted(rejects, key=lambda r: r[0].source), thumbnails)
        clock.lap("write", len(written))
    _tell_end(job, requests, answers, rejects, written, clock)
    if not answers:
        searched = any(search.gallery for search in requests.searches)
        print(f"error: nothing could be answered: no query{', or no gallery file,' if searched else ''} could be read", file=sys.stderr)
        return 1
    if len(rejects) > job.max_bad_fraction * len(requests.inputs):
        print(
            f"error: {len(rejects)} of {len(requests.inputs)} files could not be read, more than --max-bad-fraction {job.max_bad_fraction:g} allows; "
            "the rest was answered and written: mend or remove them, or raise the limit",
            file=sys.stderr,
        )
        return 1
    return 0


# --- working on the files -----------------------------------------------------------------------------------------------------------------
def _processed(directory: Path, requests: Requests, job: InferJob, clock: "_Clock") -> Iterator[tuple[int, Any]]:
    """Pairs (position, `Processed`) of all inputs, in no order, from Ray Data actors that each hold the ensemble."""
    import ray

    from cad_models.ensemble import pack
    from rayjobs.actor_pool import connect_stoppable, plan_pool, run_units
    from rayjobs.progress import Progress

    scale = job.scale
    connect_stoppable()
    clock.lap("start Ray", 1)
    num_inputs = len(requests.inputs)
    size = max(1, min(_MAX_INPUTS_PER_UNIT, num_inputs // 32))
    units = [
        {"start": start, "inputs": json.dumps([asdict(item) for item in requests.inputs[start : start + size]])}
        for start in range(0, num_inputs, size)
    ]
    pool = plan_pool(len(units), num_workers=scale.num_workers, cpus_per_worker=scale.cpus_per_worker, use_gpu=scale.use_gpu)
    device = "cuda" if pool.gpus else "cpu"
    # The files themselves, not their path: workers may lie on machines that do not see the driver's disk.
    files = ray.put(pack(directory))
    arguments = (files, device, scale.timeout_s, int(scale.memory_gb * (1 << 30)), job.options)
    progress = Progress("infer", num_inputs, "files")
    for row in run_units(units, InferWorker, arguments, pool, longest_unit_s=size * scale.timeout_s):
        clock.add(json.loads(row["seconds"]))
        progress.add(len(row["thumbnails"]))
        yield from _unpacked(row)
    progress.close()


class InferWorker:
    """One process of the pool: the ensemble, loaded once, and a child that reads files.

    Args:
        files: Reference to `cad_models.ensemble.pack`'s result.
    """

    def __init__(self, files: Any, device: str, timeout_s: float, memory_limit_bytes: int, options: InferOptions) -> None:
        import ray
        import torch

        from cad_models.common.memory import keep_freed_memory
        from cad_models.ensemble import InputProcessor, load_ensemble, unpack

        keep_freed_memory()
        if device == "cpu":
            # A process a core; and sums over several threads would depend on their number.
            torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            unpack(ray.get(files), Path(folder))
            ensemble = load_ensemble(Path(folder), device=device)
        self._processor = InputProcessor(
            ensemble, device=device, timeout_s=timeout_s, memory_limit_bytes=memory_limit_bytes, options=options
        )
        self._processor.__enter__()

    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        """Outputs of all members for the unit's files."""
        before = dict(self._processor.seconds)
        rows = self._processor.process([Input(**item) for item in json.loads(unit["inputs"])])
        return {
            "start": unit["start"],
            "outputs": [b"".join(output.tobytes() for output in row.outputs) for row in rows],
            "shapes": json.dumps([[(output.dtype.name, output.shape) for output in row.outputs] for row in rows]),
            "thumbnails": [row.thumbnail for row in rows],
            "rejects": json.dumps([row.reject and asdict(row.reject) for row in rows]),
            "seconds": json.dumps({name: value - before.get(name, 0.0) for name, value in self._processor.seconds.items()}),
        }


def _unpacked(row: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    import numpy as np

    from cad_models.ensemble import Processed

    rejects, shapes = json.loads(row["rejects"]), json.loads(row["shapes"])
    for i, (data, thumbnail) in enumerate(zip(row["outputs"], row["thumbnails"], strict=True)):
        outputs, start = [], 0
        for kind, shape in shapes[i]:
            outputs.append(np.frombuffer(data, dtype=kind, count=math.prod(shape), offset=start).reshape(shape))
            start += outputs[-1].nbytes
        reject = None if rejects[i] is None else Reject(**rejects[i])
        yield row["start"] + i, Processed(outputs=outputs, thumbnail=thumbnail, reject=reject)


class _Thumbnails:
    """Pictures by input position, in a temporary file: a gallery of a hundred thousand must not lie in memory."""

    def __init__(self, spool: Any) -> None:
        self._spool = spool
        self._places: dict[int, tuple[int, int]] = {}

    def add(self, position: int, data: bytes) -> None:
        self._places[position] = (self._spool.seek(0, io.SEEK_END), len(data))
        self._spool.write(data)

    def first(self, positions: Sequence[int]) -> bytes:
        """The picture of the first of these inputs that has one."""
        for position in positions:
            if position in self._places:
                start, length = self._places[position]
                self._spool.seek(start)
                return self._spool.read(length)
        return b""


# --- writing ------------------------------------------------------------------------------------------------------------------------------
def _write(
    job: InferJob,
    ensemble: "Ensemble",
    requests: Requests,
    answers: list[Answer],
    rejects: list[tuple[Input, Reject]],
    thumbnails: _Thumbnails,
) -> dict[str, str]:
    """Write everything; what each file holds -> where it is."""
    import pyarrow as pa

    from cad_models.answers_page import answers_page

    stem = job.output.removesuffix(".csv")
    places = {
        "answers": job.output,
        "ranks and scores": job.table or f"{stem}.ranks.parquet",
        "page": job.page or f"{stem}.html",
        "unreadable files": f"{stem}.quarantine.parquet",
    }
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(ensemble.task.submission(answers, options=job.options))
    members = [
        {"name": name, "digest": member.digest, "weight": weight}
        for name, member, weight in zip(ensemble.names, ensemble.members, ensemble.weights, strict=True)
    ]
    schema = pa.schema(
        [("direction", pa.string()), ("query", pa.string()), ("rank", pa.int32()), ("answer", pa.string()), ("score", pa.float32())],
        metadata={"rule": ensemble.rule, "fitted": json.dumps(dict(ensemble.fitted)), "members": json.dumps(members)},
    )
    ranks = pa.Table.from_pylist([asdict(answer) for answer in answers], schema=schema)
    quarantine = [{"source": item.source, "reason": reject.reason, "detail": reject.detail} for item, reject in rejects]
    notes = [
        f"{_members(ensemble)}: {', '.join(ensemble.names)}",
        *(f"{s.direction}: {len(s.queries):,} queries" + (f" in a gallery of {len(s.gallery):,}" if s.gallery else "") for s in requests.searches),
    ]
    if rejects:
        notes.append(f"{len(rejects)} files could not be read: {', '.join(item.source for item, _ in rejects[:10])}{' …' if len(rejects) > 10 else ''}")
    labels = {search.direction for search in requests.searches if not search.gallery}
    page = answers_page(answers, _pictures(requests, answers, thumbnails), title=f"Answers: {job.task}", notes=notes, labels=labels)
    contents = {
        "answers": text.getvalue().encode(),
        "ranks and scores": _parquet(ranks),
        "page": page.encode(),
        "unreadable files": _parquet(pa.Table.from_pylist(quarantine, schema=QUARANTINE_SCHEMA)),
    }
    for what, place in places.items():
        folder, _, name = Folder(place).uri.rpartition("/")
        Folder(folder or "/").write_bytes(name, contents[what])
    return places


def _pictures(requests: Requests, answers: list[Answer], thumbnails: _Thumbnails) -> dict[tuple[str, str, str], bytes]:
    shown = {(a.direction, "query", a.query) for a in answers} | {(a.direction, "answer", a.answer) for a in answers}
    pictures = {}
    for search in requests.searches:
        for side, entries in (("query", search.queries), ("answer", search.gallery)):
            for entry in entries:
                if (search.direction, side, entry.entry_id) in shown:
                    pictures[search.direction, side, entry.entry_id] = thumbnails.first(entry.inputs)
    return pictures


def _parquet(table: Any) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


# --- telling ------------------------------------------------------------------------------------------------------------------------------
class _Clock:
    """Where the time went: wall time of the driver's stages, and the workers' time summed over all of them."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.stages: list[tuple[str, float, int]] = []
        self.workers: Counter[str] = Counter()

    def lap(self, stage: str, count: int) -> None:
        now = time.perf_counter()
        self.stages.append((stage, now - self._last, count))
        self._last = now

    def add(self, seconds: dict[str, float]) -> None:
        self.workers.update(seconds)


def _members(ensemble: "Ensemble") -> str:
    count = len(ensemble.members)
    return "1 member" if count == 1 else f"{count} members, combined by {ensemble.rule}"


def _tell_start(ensemble: "Ensemble", requests: Requests) -> None:
    print(f"{_members(ensemble)}:")
    for name, member, weight in zip(ensemble.names, ensemble.members, ensemble.weights, strict=True):
        print(f"  {name}  (digest {member.digest[:12]}, weight {weight:g})")
    if ensemble.fitted:
        print(f"  fitted on the validation split: {json.dumps(dict(ensemble.fitted))}")
    for search in requests.searches:
        files = sum(len(entry.inputs) for entry in search.gallery)
        among = f", gallery of {len(search.gallery):,} objects in {files:,} files" if search.gallery else ""
        print(f"{search.direction}: {len(search.queries):,} queries{among}")
    if requests.num_ignored:
        print(f"{requests.num_ignored:,} files are of kinds that these searches do not read")
    sys.stdout.flush()


def _tell_end(
    job: InferJob, requests: Requests, answers: list[Answer], rejects: list[tuple[Input, Reject]], written: dict[str, str], clock: _Clock
) -> None:
    print(f"\n{'stage':<32}{'seconds':>10}{'items':>10}")
    for stage, seconds, count in clock.stages:
        print(f"{stage:<32}{seconds:>10.2f}{count:>10,}")
        if stage.startswith("all files"):
            for name, total in clock.workers.items():
                print(f"{'  ' + name + ' (all workers)':<32}{total:>10.2f}")
    if rejects:
        reasons = Counter(reject.reason for _, reject in rejects)
        print(f"\n{len(rejects)} of {len(requests.inputs)} files could not be read:")
        for reason, count in sorted(reasons.items()):
            examples = [item.source for item, reject in rejects if reject.reason == reason]
            print(f"  {reason}: {count} ({', '.join(sorted(examples)[:5])}{' …' if count > 5 else ''})")
    print(f"\n{len({(a.direction, a.query) for a in answers}):,} queries answered")
    for what, place in written.items():
        print(f"  {what}: {place}")


if __name__ == "__main__":
    run_job(InferJob, main)
