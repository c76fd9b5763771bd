"""Raw files -> the dataset folder: parse, find duplicates, split, make what training reads (Ray Data, CPU).

    python rayjobs/prepare.py --task alignment --source parts/ --dataset ds/          # a folder of meshes, at any depth
    python rayjobs/prepare.py --task alignment --source builtin:600 --dataset ds/     # generated CAD parts, no download
    python rayjobs/prepare.py --task alignment --source train/ --dataset s3://bucket/ds --split.kind csv --split.csv split.csv

Killed or stopped, the same command goes on from what is finished; run again, it remakes only what changed. Files that cannot be used are
listed with their reason in <dataset>/quarantine.parquet; the others are all there.
"""

import csv
import dataclasses
import io
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from cad_models.config import json_digest
from cad_models.splits import SplitConfig, apply_split_csv, draw_splits, joined, read_split_csv
from cad_models.task import Inspection, Listing, RawItem, Reject, Task
from cad_models.tasks import TASKS
from rayjobs.cli import RecipeFlags, UsageError, run_job
from rayjobs.progress import Progress, duration
from rayjobs.resources import ScaleConfig

if TYPE_CHECKING:
    from cad_models.dataset import DatasetFolder, Manifest
    from rayjobs.preparation import Inspected, PartPlan, PartResult, PlannedObject

LOCK_NAME = ".prepare.lock"
NEAR_DUPLICATES = "near_duplicates.csv"

# ROW_KEY of rayjobs/streams.py numbers the rows of a part with 20 bits.
_MOST_OBJECTS_PER_PART = 2**20


@dataclass(frozen=True, kw_only=True)
class PrepareJob:
    """Raw files -> dataset folder."""

    task: str
    """Which room: see cad_models/tasks.py."""
    recipe: RecipeFlags
    smoke: bool = False
    """The task's smoke recipe: the same code in seconds on a CPU."""
    source: str = tyro.MISSING
    """Folder (path or URI) of raw files, read at any depth, or builtin:<N> for N generated objects."""
    dataset: str = tyro.MISSING
    """The dataset folder (path or URI) to write, outside the source."""
    split: SplitConfig = SplitConfig()
    objects_per_part: int = 16
    """Most objects in a part file, which holds one split: the unit of work, of resuming and of reading."""
    max_bad_fraction: float = 0.1
    """Exit with status 1 (after writing everything) when more than this share of the listed objects cannot be used."""
    preview: str = ""
    """PNG file for a contact sheet of up to 48 of the objects, for tasks whose objects have pictures; empty = none."""
    progress_file: str = ""
    """JSON-lines file for progress; empty = outputs/logs/prepare-<name of the dataset>.jsonl."""
    scale: ScaleConfig = ScaleConfig(num_workers=0)


class InspectWorker:
    """Inspects chunks of items; one a process."""

    def __init__(self, uri: str, task: Task, recipe: Any, limits: Any) -> None:
        from cad_models.dataset import DatasetFolder
        from rayjobs.preparation import ObjectProcess

        self._dataset, self._task, self._recipe, self._limits = DatasetFolder(uri), task, recipe, limits
        self._process = ObjectProcess(task, recipe, limits)

    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        """``{index, items}`` -> ``{index, inspections, reused}``."""
        from rayjobs.preparation import inspect_chunk, unpack_items

        items = unpack_items(unit["items"])
        data, reused = inspect_chunk(self._dataset, self._task, self._recipe, self._limits, items, self._process.inspect)
        return {"index": unit["index"], "inspections": data, "reused": reused}


class PartWorker:
    """Makes part files; one a process."""

    def __init__(self, uri: str, task: Task, recipe: Any, limits: Any) -> None:
        from cad_models.dataset import DatasetFolder
        from rayjobs.preparation import ObjectProcess

        self._dataset, self._task, self._recipe, self._limits = DatasetFolder(uri), task, recipe, limits
        self._process = ObjectProcess(task, recipe, limits)

    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        """``{plan, recorded}`` -> ``{result}``, all JSON."""
        import json

        from rayjobs.preparation import PartPlan, finished_part, make_part

        plan, recorded = PartPlan.unpacked(unit["plan"]), json.loads(unit["recorded"])
        result = finished_part(self._dataset, plan, list(self._task.schemas(self._recipe)), self._limits, recorded)
        if result is None:
            result = make_part(self._dataset, plan, self._task, self._recipe, self._limits, self._process.prepare)
        return {"result": json.dumps(dataclasses.asdict(result))}


def main(job: PrepareJob) -> int:
    """List, inspect, split, prepare; then the quarantine, and the manifest last."""
    from cad_models.dataset import DatasetFolder
    from rayjobs.folder_lock import locked

    check_flags(job)
    task, dataset = TASKS[job.task], DatasetFolder(job.dataset)
    # The user's mistakes come first, before Ray starts.
    csv_text = _read_csv(job.split.csv) if job.split.kind == "csv" else ""
    listing = task.list_raw(job.source)
    former = _former_manifest(dataset, task)
    with locked(dataset.folder, LOCK_NAME, "prepare"):
        return _prepare(job, task, dataset, listing, csv_text, former)


def _prepare(job: PrepareJob, task: Task, dataset: "DatasetFolder", listing: Listing, csv_text: str, former: "Manifest | None") -> int:
    from cad_models.dataset import Manifest
    from rayjobs.actor_pool import connect_stoppable
    from rayjobs.preparation import INSPECTIONS, Limits, plan_parts, unique_items

    start = time.monotonic()
    connect_stoppable()
    limits = Limits(timeout_s=job.scale.timeout_s, memory_gb=job.scale.memory_gb)
    progress_file = Path(job.progress_file or f"outputs/logs/prepare-{Path(job.dataset.rstrip('/')).name}.jsonl")
    items, doubles = unique_items(listing.items)
    rejects = [*listing.rejects, *doubles]
    num_listed = len(listing.items) + len(listing.rejects)
    print(f"{len(items):,} objects listed in {job.source}, {listing.num_ignored:,} files of other kinds", flush=True)

    inspected = _inspect_all(job, task, dataset, limits, items, progress_file)
    rejects += [(i.item.source, i.result) for i in inspected if isinstance(i.result, Reject)]
    good = sorted((i for i in inspected if isinstance(i.result, Inspection)), key=lambda i: i.item.object_id)
    near = task.near_duplicates([i.result for i in good]) if job.split.near_duplicates != "ignore" else []
    objects, warnings = assign(good, task, job.split, csv_text, near)
    plans = plan_parts(objects, task, job.recipe, job.objects_per_part)

    kinds = list(task.schemas(job.recipe))
    settings = {**task.prepare_settings(job.recipe), "split": _split_settings(job.split, csv_text), "objects_per_part": job.objects_per_part}
    recorded = {part["key"]: part for part in former.parts} if former else {}
    if former and (former.settings_digest != json_digest(settings) or [p["key"] for p in former.parts] != [p.key for p in plans]):
        # From here on the folder is between two states, which no reader may take for a dataset.
        dataset.folder.delete("manifest.json")
    results = _make_all(job, task, dataset, limits, plans, recorded, progress_file)

    rejects += [(source, Reject(reason=reason, detail=detail)) for r in results for source, reason, detail in r.rejects]
    for kind in kinds:
        dataset.drop_parts(kind, len(plans))
    rows = [{"source": source, "reason": reject.reason, "detail": reject.detail} for source, reject in rejects]
    manifest = Manifest(
        task=task.name,
        settings=settings,
        settings_digest=json_digest(settings),
        parts=[r.part for r in results],
        num_objects=sum(r.part["num_rows"] for r in results),
        num_groups=len({o.group_id for o in objects}),
        num_quarantined=len(rows),
        num_ignored=listing.num_ignored,
        splits={name: count for name, count in sorted(_sum_splits(results).items())},
        labels=sum_labels([r.labels for r in results]),
    )
    dataset.write_quarantine(rows)
    if job.split.near_duplicates == "ignore":
        dataset.folder.delete(NEAR_DUPLICATES)
    else:
        dataset.folder.write_bytes(NEAR_DUPLICATES, near_duplicates_csv(objects, near))
    dataset.folder.delete(INSPECTIONS)
    dataset.folder.remove_leftovers()
    dataset.write_manifest(manifest)

    num_lost = len(listing.rejects) + len(doubles) + len(inspected) - len(good) + sum(r.num_lost for r in results)
    _print_summary(job, dataset, manifest, rows, results, num_listed, time.monotonic() - start)
    for line in warnings:
        print(f"warning: {line}")
    if job.preview and manifest.num_objects:
        from rayjobs.contact_sheet import write_contact_sheet

        print(f"preview: {write_contact_sheet(dataset, manifest, task, Path(job.preview))}")
    if manifest.num_objects == 0:
        print(f"error: none of the {num_listed:,} listed objects can be used; reasons above and in {dataset.folder.path('quarantine.parquet')}")
        return 1
    if num_lost > job.max_bad_fraction * num_listed:
        print(
            f"error: {num_lost:,} of {num_listed:,} listed objects cannot be used, more than --max-bad-fraction {job.max_bad_fraction:g}. The dataset is "
            "complete without them: mend or remove the files above and run the same command again, or raise --max-bad-fraction to accept it"
        )
        return 1
    return 0


def check_flags(job: PrepareJob) -> None:
    """Raises ValueError, in the flags' words, for values that cannot be meant."""
    job.split.check()
    if not 1 <= job.objects_per_part <= _MOST_OBJECTS_PER_PART:
        raise ValueError(f"--objects-per-part {job.objects_per_part} must lie in 1 … {_MOST_OBJECTS_PER_PART:,}")
    if not 0 <= job.max_bad_fraction <= 1:
        raise ValueError(f"--max-bad-fraction {job.max_bad_fraction:g} must lie in 0 … 1")
    if not job.scale.timeout_s > 0:
        raise ValueError(f"--scale.timeout-s {job.scale.timeout_s:g} must be above 0")
    if not job.scale.memory_gb > 0:
        raise ValueError(f"--scale.memory-gb {job.scale.memory_gb:g} must be above 0")
    if job.scale.num_workers < 0:
        raise ValueError(f"--scale.num-workers {job.scale.num_workers} must be at least 0")
    task = TASKS[job.task]
    if job.preview and not (task.preview_source or task.embed_columns):
        raise UsageError(f"--preview {job.preview}: the objects of --task {job.task} have no pictures; leave --preview out")
    if job.preview and Path(job.preview).suffix.lower() != ".png":
        raise ValueError(f"--preview {job.preview} must end in .png")
    if not any("://" in uri or uri.startswith("builtin:") for uri in (job.source, job.dataset)):
        source, dataset = (os.path.realpath(os.path.expanduser(uri)) for uri in (job.source, job.dataset))
        if os.path.commonpath([source, dataset]) == source:
            raise ValueError(f"--dataset {job.dataset} lies in --source {job.source}: its files would count as raw files; choose a folder outside")


def _read_csv(uri: str) -> str:
    from cad_models.dataset import Folder

    parent, _, name = (uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))).rpartition("/")
    try:
        text = Folder(parent or "/").read_bytes(name).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"--split.csv {uri}: there is no such file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--split.csv {uri} is not UTF-8 text ({error})") from error
    read_split_csv(text)
    return text


def _former_manifest(dataset: "DatasetFolder", task: Task) -> "Manifest | None":
    """The manifest of a finished dataset in the same folder, if there is one that this program can read."""
    from cad_models.dataset import DatasetError

    try:
        manifest = dataset.manifest()
    except (DatasetError, KeyError):
        return None  # none, or of another schema version: every part is made again
    if manifest.task != task.name:
        raise ValueError(f"--dataset {dataset.uri} was prepared for --task {manifest.task}: delete it or choose another folder for --task {task.name}")
    return manifest if all("key" in part for part in manifest.parts) else None


def _inspect_all(
    job: PrepareJob, task: Task, dataset: "DatasetFolder", limits: Any, items: Sequence[RawItem], progress_file: Path
) -> "list[Inspected]":
    """Inspections of all items, in their order."""
    from rayjobs.actor_pool import plan_pool, run_units
    from rayjobs.preparation import CHUNK_SIZE, pack_items, read_inspections

    if not items:
        return []
    chunks = [items[i : i + CHUNK_SIZE] for i in range(0, len(items), CHUNK_SIZE)]
    units = [{"index": i, "items": pack_items(chunk)} for i, chunk in enumerate(chunks)]
    pool = plan_pool(len(units), num_workers=job.scale.num_workers, cpus_per_worker=job.scale.cpus_per_worker, use_gpu=False)
    progress = Progress("inspect", len(items), "objects", file=progress_file)
    found: dict[int, list[Inspected]] = {}
    arguments = (dataset.folder.uri, task, job.recipe, limits)
    for result in run_units(units, InspectWorker, arguments, pool, longest_unit_s=CHUNK_SIZE * 2 * limits.timeout_s):
        index = result["index"]
        found[index] = read_inspections(result["inspections"], chunks[index])
        progress.add(len(chunks[index]))
    progress.close()
    return [inspected for i in range(len(chunks)) for inspected in found[i]]


def assign(
    inspected: "Sequence[Inspected]", task: Task, split: SplitConfig, csv_text: str, near: Sequence[tuple[int, int, float]] = ()
) -> "tuple[list[PlannedObject], list[str]]":
    """Group the good objects by exact duplicates (with ``--split.near-duplicates group`` also by near ones) and split the groups.

    Args:
        near: `Task.near_duplicates` of the objects in the order of their ids.

    Returns:
        The objects in the order of their ids, and what the user should know of their CSV and of near duplicates in different splits.
    """
    from rayjobs.preparation import PlannedObject

    inspected = sorted(inspected, key=lambda i: i.item.object_id)
    ids = [i.item.object_id for i in inspected]
    group = task.duplicates([i.result for i in inspected]) if inspected else []
    warnings = []
    # What is drawn as one. The group that counts as one right answer stays that of the exact duplicates.
    together = joined(group, [(i, j) for i, j, _ in near]) if split.near_duplicates == "group" else group
    if split.kind == "csv":
        named = read_split_csv(csv_text)
        given = apply_split_csv(named, ids, together, divide_duplicates=split.divide_duplicates)
        splits = given.splits
        if given.num_unnamed:
            unnamed = [object_id for object_id, name in zip(ids, splits, strict=True) if name == "unused"]
            warnings.append(f"{given.num_unnamed:,} objects are not named by --split.csv and in no split ({_examples(unnamed)})")
        if given.unknown:
            warnings.append(f"{len(given.unknown):,} rows of --split.csv name no object of this dataset ({_examples(given.unknown)})")
        kind = "exact and near duplicates" if split.near_duplicates == "group" else "exact duplicates"
        if given.divided_groups and split.divide_duplicates:
            warnings.append(
                f"{len(given.divided_groups):,} groups of {kind} are divided, as --split.divide-duplicates asks: {given.num_leaked:,} objects of val "
                f"and test have one of their {kind} in train, and metrics reward remembering them"
            )
        elif given.divided_groups:
            warnings.append(
                f"{len(given.divided_groups):,} groups of {kind} are divided by --split.csv; each went whole to its strictest split "
                f"(test, then val, then train): {_examples(given.divided_groups)}"
            )
    else:
        splits = draw_splits(split, together, [i.result.complexity for i in inspected], [i.item.label for i in inspected])
    apart = [(ids[i], ids[j], distance) for i, j, distance in near if splits[i] != splits[j] and "unused" not in (splits[i], splits[j])]
    if apart:
        shown = [f"{a} ~ {b} ({distance:.2f})" for a, b, distance in apart]
        warnings.append(
            f"{len(apart):,} pairs of near duplicates lie in different splits, which flatters val and test: {_examples(shown)}; all of them in "
            f"{NEAR_DUPLICATES}; --split.near-duplicates group keeps each in one split"
        )
    objects = [
        PlannedObject(item=i.item, sha256=i.result.sha256, inputs=i.result.inputs, group_id=ids[g], split=name)
        for i, g, name in zip(inspected, group, splits, strict=True)
    ]
    return objects, warnings


def near_duplicates_csv(objects: "Sequence[PlannedObject]", near: Sequence[tuple[int, int, float]]) -> bytes:
    """``near_duplicates.csv``: pairs that are no exact duplicates, the closest first, with their splits."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(["distance", "model_id_1", "split_1", "model_id_2", "split_2"])
    for i, j, distance in near:
        a, b = objects[i], objects[j]
        if a.group_id != b.group_id:
            writer.writerow([f"{distance:.3f}", a.item.object_id, a.split, b.item.object_id, b.split])
    return sink.getvalue().encode()


def _examples(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _split_settings(split: SplitConfig, csv_text: str) -> dict[str, Any]:
    # The CSV's content decides, not where it lies.
    return {**dataclasses.asdict(split), "csv": json_digest(csv_text) if csv_text else ""}


def _make_all(
    job: PrepareJob,
    task: Task,
    dataset: "DatasetFolder",
    limits: Any,
    plans: "Sequence[PartPlan]",
    recorded: dict[str, dict[str, Any]],
    progress_file: Path,
) -> "list[PartResult]":
    """Make or find again all parts, in their order."""
    import json

    from rayjobs.actor_pool import plan_pool, run_units
    from rayjobs.preparation import PartResult

    if not plans:
        return []
    units = [{"plan": plan.packed(), "recorded": json.dumps(recorded.get(plan.key))} for plan in plans]
    pool = plan_pool(len(units), num_workers=job.scale.num_workers, cpus_per_worker=job.scale.cpus_per_worker, use_gpu=False)
    progress = Progress("prepare", sum(len(plan.objects) for plan in plans), "objects", file=progress_file)
    found: dict[int, PartResult] = {}
    arguments = (dataset.folder.uri, task, job.recipe, limits)
    for row in run_units(units, PartWorker, arguments, pool, longest_unit_s=job.objects_per_part * 2 * limits.timeout_s):
        result = PartResult(**json.loads(row["result"]))
        found[result.index] = result
        num_reused = sum(r.reused for r in found.values())
        progress.add(len(plans[result.index].objects), f"{num_reused:,} of {len(found):,} parts were there" if num_reused else "")
    progress.close()
    return [found[i] for i in range(len(plans))]


def _sum_splits(results: "Sequence[PartResult]") -> Counter:
    total: Counter = Counter()
    for result in results:
        total.update(result.part["splits"])
    return total


def _class_summary(labels: dict[str, dict[str, int]]) -> str:
    counts = sorted(((sum(of_split.values()), name) for name, of_split in labels.items()), key=lambda pair: (-pair[0], pair[1]))
    return f"{len(counts):,}: {_examples([f'{name} {count:,}' for count, name in counts])}" if counts else ""


def sum_labels(parts: Sequence[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """Label -> split -> objects over all parts, both sorted."""
    total: dict[str, Counter] = {}
    for labels in parts:
        for label, counts in labels.items():
            total.setdefault(label, Counter()).update(counts)
    return {label: dict(sorted(total[label].items())) for label in sorted(total)}


def _print_summary(
    job: PrepareJob, dataset: "DatasetFolder", manifest: "Manifest", rows: list[dict[str, str]], results: "Sequence[PartResult]", num_listed: int, seconds: float
) -> None:
    computed = [r for r in results if not r.reused]
    rate = sum(r.part["num_rows"] + r.num_lost for r in computed) / seconds if seconds > 0 else 0.0
    splits = ", ".join(f"{name} {manifest.splits[name]:,}" for name in sorted(manifest.splits))
    lines = [
        ("dataset", dataset.folder.uri),
        ("listed", f"{num_listed:,} ({manifest.num_ignored:,} other files ignored)"),
        ("objects", f"{manifest.num_objects:,} in {manifest.num_groups:,} groups of exact duplicates"),
        ("splits", splits or "none"),
        ("classes", _class_summary(manifest.labels)),
        ("quarantined", f"{len(rows):,}" + (f" (all: {dataset.folder.path('quarantine.parquet')})" if rows else "")),
    ]
    lines = [line for line in lines if line[1]]
    by_reason: dict[str, list[dict[str, str]]] = {}
    for row in sorted(rows, key=lambda r: r["source"]):
        by_reason.setdefault(row["reason"], []).append(row)
    for reason, members in sorted(by_reason.items(), key=lambda pair: (-len(pair[1]), pair[0])):
        lines.append((f"  {reason}", f"{len(members):,}: {_examples([m['source'] for m in members])}"))
    lines.append(("parts", f"{len(results) - len(computed):,} reused, {len(computed):,} computed"))
    lines.append(("time", f"{duration(seconds)}, {rate:.1f} objects/s computed"))
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name:<{width}}  {text}" for name, text in lines), flush=True)


if __name__ == "__main__":
    run_job(PrepareJob, main)
