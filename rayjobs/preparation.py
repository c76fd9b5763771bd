"""What ``prepare.py`` computes, without Ray: inspections of chunks of items, the plan of the parts, the part files. Pure but for the folder.

Everything here is idempotent: a unit of work (a chunk, a part) is recognised by its *key*, the digest of all that it is made from, so that a
killed run goes on where it was and a changed source remakes only the parts that hold it. The same units give the same bytes on any number of
workers, because a unit reads nothing but its own description and its own source files.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cad_models.config import Recipe, json_digest
from cad_models.dataset import SCHEMA_VERSION, DatasetError, DatasetFolder, Folder, PartInfo, build_table
from cad_models.task import Inspection, RawItem, Reject, Row, Task

INSPECTIONS = ".inspect"
"""Folder, inside the dataset, of the inspections of an unfinished run; removed before the manifest is written."""

CHUNK_SIZE = 32
"""Items inspected as one unit of work."""

# What a larger --scale.timeout-s or --scale.memory-gb may cure.
_LIMIT_REASONS = ("timeout", "out_of_memory", "crashed")

_INSPECTION_SCHEMA = pa.schema(
    [
        ("object_id", pa.string()),
        ("sha256", pa.string()),
        ("inputs", pa.string()),
        ("size", pa.int64()),
        ("complexity", pa.float64()),
        ("signature", pa.binary()),
        ("shape", pa.binary()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)

_OBJECT_COLUMNS = [(name, pa.string()) for name in ("object_id", "group_id", "split", "label", "source", "sha256")]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one object may take."""

    timeout_s: float
    memory_gb: float


# --- one object, in a process that may be lost --------------------------------------------------------------------------------------------
def call_task(task: Task, verb: Literal["inspect", "prepare"], item: RawItem, recipe: Recipe) -> Inspection | Row | Reject:
    """``task.inspect`` or ``task.prepare``; whatever it raises becomes a Reject, since one object must not stop the others."""
    try:
        return getattr(task, verb)(item, recipe)
    except MemoryError:
        return Reject(reason="out_of_memory", detail=f"{verb} needs more memory than it may take")
    except Exception as error:
        return Reject(reason="failed", detail=f"{verb}: {type(error).__name__}: {error}")


class ObjectProcess:
    """A task's ``inspect`` and ``prepare`` in a child process with a time and a memory limit. Started at the first call; close it after the last."""

    def __init__(self, task: Task, recipe: Recipe, limits: Limits) -> None:
        from cad_models.common.isolation import Isolated

        self._task, self._recipe, self._limits = task, recipe, limits
        self._child = Isolated(call_task, timeout_s=limits.timeout_s, memory_limit_bytes=int(limits.memory_gb * 1e9))
        self._warm = False

    def inspect(self, item: RawItem) -> Inspection | Reject:
        """Raises nothing that concerns one object alone."""
        return self._call("inspect", item)

    def prepare(self, item: RawItem) -> Row | Reject:
        """Raises nothing that concerns one object alone."""
        return self._call("prepare", item)

    def close(self) -> None:
        """End the child."""
        self._child.close()

    def _call(self, verb: Literal["inspect", "prepare"], item: RawItem) -> Any:
        from cad_models.common.isolation import Lost

        for attempt in range(2):
            try:
                result = self._child(self._task, verb, item, self._recipe)
                self._warm = True
                return result if not isinstance(result, Reject) else relative_reject(result, item)
            except Lost as lost:
                # A child that the node's memory monitor killed, or whose first call also paid for imports and compilation, deserves a second
                # chance: what an object is judged by must not depend on its neighbours.
                retry = lost.reason != "timeout" or not self._warm
                self._warm = True
                if attempt == 0 and retry:
                    continue
                return relative_reject(Reject(reason=lost.reason, detail=f"{verb}: {lost.detail}"), item)
        raise AssertionError("unreachable")


def relative_reject(reject: Reject, item: RawItem) -> Reject:
    """The same without what differs from machine to machine: the folder of the sources, memory addresses."""
    detail = reject.detail
    if item.uri.endswith(item.source):
        detail = detail.replace(item.uri[: -len(item.source)], "")
    return Reject(reason=reject.reason, detail=re.sub(r"0x[0-9a-fA-F]{6,}", "0x…", detail).replace(item.uri, item.source))


# --- inspections ------------------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Inspected:
    """An item and what its inspection gave."""

    item: RawItem
    result: Inspection | Reject


def pack_items(items: Sequence[RawItem]) -> str:
    """Items as JSON, for a unit of work."""
    return json.dumps([asdict(item) for item in items])


def unpack_items(text: str) -> list[RawItem]:
    """The inverse of :func:`pack_items`."""
    return [_item(value) for value in json.loads(text)]


def _item(value: dict[str, Any]) -> RawItem:
    return RawItem(**{**value, "images": tuple(value["images"])})


def inspect_chunk(
    dataset: DatasetFolder, task: Task, recipe: Recipe, limits: Limits, items: Sequence[RawItem], inspect: Callable[[RawItem], Inspection | Reject]
) -> tuple[bytes, bool]:
    """Inspect items, or take what an earlier, killed run found out about the same unchanged files.

    Returns:
        The inspections as Parquet bytes (:func:`read_inspections`), and whether they were there already.
    """
    states = [[_state(uri) for uri in (item.uri, *item.images)] for item in items]
    settings = [SCHEMA_VERSION, task.name, task.prepare_settings(recipe), asdict(limits)]
    name = f"{INSPECTIONS}/{json_digest([settings, [asdict(item) for item in items], states], length=24)}.parquet"
    try:
        data = dataset.folder.read_bytes(name)
        if "unreadable" not in {i.result.reason for i in read_inspections(data, items) if isinstance(i.result, Reject)}:
            return data, True
    except (FileNotFoundError, DatasetError):
        pass  # not there yet, or cut off by something other than us: inspect
    rows = []
    for item in items:
        result = inspect(item)
        row = dict.fromkeys(_INSPECTION_SCHEMA.names) | {"object_id": item.object_id}
        if isinstance(result, Reject):
            row |= {"reason": result.reason, "detail": result.detail}
        else:
            row |= {"sha256": result.sha256, "inputs": result.inputs, "size": result.size, "complexity": result.complexity}
            row["signature"] = np.asarray(result.signature, dtype=np.float64).tobytes()
            row["shape"] = None if result.shape is None else np.asarray(result.shape, dtype=np.float16).tobytes()
        rows.append(row)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=_INSPECTION_SCHEMA), sink)
    data = sink.getvalue().to_pybytes()
    dataset.folder.write_bytes(name, data)
    return data, False


def read_inspections(data: bytes, items: Sequence[RawItem]) -> list[Inspected]:
    """Decode :func:`inspect_chunk`'s bytes. Raises DatasetError when they are not those of ``items``."""
    try:
        rows = pq.read_table(pa.BufferReader(data), schema=_INSPECTION_SCHEMA).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise DatasetError(f"unreadable inspections ({error}): run prepare again") from error
    if [row["object_id"] for row in rows] != [item.object_id for item in items]:
        raise DatasetError("inspections of other objects: run prepare again")
    return [Inspected(item=item, result=_result(row)) for row, item in zip(rows, items, strict=True)]


def _result(row: dict[str, Any]) -> Inspection | Reject:
    if row["reason"] is not None:
        return Reject(reason=row["reason"], detail=row["detail"])
    return Inspection(
        sha256=row["sha256"],
        inputs=row["inputs"],
        size=row["size"],
        complexity=row["complexity"],
        signature=np.frombuffer(row["signature"], dtype=np.float64),
        shape=None if row["shape"] is None else np.frombuffer(row["shape"], dtype=np.float16).reshape(-1, 3),
    )


def _state(uri: str) -> str:
    parent, _, name = uri.rpartition("/")
    return Folder(parent or "/").state(name)


# --- the plan -----------------------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class PlannedObject:
    """A good object with its group and split."""

    item: RawItem
    sha256: str
    inputs: str
    group_id: str
    split: str


@dataclass(frozen=True, kw_only=True)
class PartPlan:
    """One part: its objects, in their order, and the key that it is recognised by."""

    index: int
    key: str
    objects: tuple[PlannedObject, ...]

    def packed(self) -> str:
        """As JSON, for a unit of work."""
        return json.dumps(asdict(self))

    @staticmethod
    def unpacked(text: str) -> "PartPlan":
        """The inverse of :meth:`packed`."""
        value = json.loads(text)
        objects = tuple(PlannedObject(**{**o, "item": _item(o["item"])}) for o in value["objects"])
        return PartPlan(index=value["index"], key=value["key"], objects=objects)


def unique_items(items: Iterable[RawItem]) -> tuple[list[RawItem], list[tuple[str, Reject]]]:
    """Items by object id, the first of each; the others are rejects."""
    first: dict[str, RawItem] = {}
    rejects = []
    for item in sorted(items, key=lambda item: (item.object_id, item.source)):
        kept = first.setdefault(item.object_id, item)
        if kept is not item:
            rejects.append((item.source, Reject(reason="duplicate_id", detail=f"object id {item.object_id!r} is that of {kept.source}")))
    return list(first.values()), rejects


def plan_parts(objects: Sequence[PlannedObject], task: Task, recipe: Recipe, objects_per_part: int) -> list[PartPlan]:
    """Cut the objects of each split, in the order of their ids, into parts: an evaluation reads its own split's parts and no others."""
    settings = [SCHEMA_VERSION, task.name, task.prepare_settings(recipe)]
    plans: list[PartPlan] = []
    by_split: dict[str, list[PlannedObject]] = {}
    for planned in sorted(objects, key=lambda o: (o.split, o.item.object_id)):
        by_split.setdefault(planned.split, []).append(planned)
    chunks = [found[i : i + objects_per_part] for found in by_split.values() for i in range(0, len(found), objects_per_part)]
    for members in map(tuple, chunks):
        # Nothing of where the sources lie: the same files give the same bytes on every machine.
        identities = [
            [o.item.object_id, o.item.source, o.item.label, o.item.caption, len(o.item.images), o.sha256, o.inputs, o.group_id, o.split] for o in members
        ]
        plans.append(PartPlan(index=len(plans), key=json_digest([settings, identities], length=32), objects=members))
    return plans


# --- one part -----------------------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class PartResult:
    """A finished part."""

    index: int
    part: dict[str, Any]
    """Its entry in the manifest."""
    rejects: list[list[str]]
    """Rows [source, reason, detail] for the quarantine."""
    num_lost: int
    """Objects of the plan that are not in the part."""
    labels: dict[str, dict[str, int]]
    """Label -> split -> objects; those without a label are not counted."""
    reused: bool


def finished_part(dataset: DatasetFolder, plan: PartPlan, kinds: Sequence[str], limits: Limits, recorded: dict[str, Any] | None) -> PartResult | None:
    """The part as an earlier run left it, or None when it has to be made.

    Args:
        kinds: The folders, ``objects`` among them.
        recorded: The part's entry in the dataset's former manifest, if there was one: then its digests are taken over; without it the files
            are read whole, since the run that wrote them was killed.
    """
    notes = {kind: dataset.part_notes(kind, plan.index, key=plan.key) for kind in kinds}
    if any(note is None for note in notes.values()):
        return None
    note = notes["objects"]
    reasons = {reason for _, reason, _ in note["rejects"]}
    # The file may be readable by now, the limits higher: such objects get another try.
    if "unreadable" in reasons or (reasons & set(_LIMIT_REASONS) and note["limits"] != asdict(limits)):
        return None
    if recorded is not None and recorded["key"] == plan.key:
        part = recorded
    else:
        try:
            infos = {kind: dataset.part_info(kind, plan.index) for kind in kinds}
        except DatasetError:
            return None  # a broken file is made again
        if any(infos[kind].sha256 != sha256 for kind, sha256 in note["files"].items()):
            return None
        part = _manifest_entry(plan, note["splits"], infos)
    try:
        written = dataset.read_part("objects", plan.index, ["label", "split"]).to_pylist()
    except DatasetError:
        return None
    return PartResult(
        index=plan.index, part=part, rejects=note["rejects"], num_lost=note["num_lost"], labels=count_labels(written), reused=True
    )


def make_part(
    dataset: DatasetFolder, plan: PartPlan, task: Task, recipe: Recipe, limits: Limits, prepare: Callable[[RawItem], Row | Reject]
) -> PartResult:
    """Prepare the objects of a part and write its files, ``objects/`` last. Memory: one part."""
    rows: dict[str, list[dict[str, Any]]] = {"objects": [], "views": []}
    rejects: list[list[str]] = []
    for planned in plan.objects:
        item = planned.item
        row = prepare(item)
        if isinstance(row, Row) and row.objects.get("sha256", planned.sha256) != planned.sha256:
            row = Reject(reason="unreadable", detail="the file changed while it was prepared: run prepare again")
        if isinstance(row, Reject):
            rejects.append([item.source, row.reason, row.detail])
            continue
        rejects += [[source, reject.reason, relative_reject(reject, item).detail] for source, reject in row.rejects]
        common = {"object_id": item.object_id, "group_id": planned.group_id, "split": planned.split}
        given = {"label": item.label, "source": item.source, "sha256": planned.sha256}
        rows["objects"].append({**given, **row.objects, **common})
        rows["views"].append({**row.views, "object_id": item.object_id})
    infos: dict[str, PartInfo] = {}
    schemas = task.schemas(recipe)
    for kind in [*(kind for kind in schemas if kind != "objects"), "objects"]:
        columns = _OBJECT_COLUMNS if kind == "objects" else [("object_id", pa.string())]
        schema = pa.schema([*[pa.field(name, kind_) for name, kind_ in columns], *schemas[kind]])
        notes: dict[str, Any] = {}
        if kind == "objects":
            splits = dict(sorted(Counter(row["split"] for row in rows["objects"]).items()))
            notes = {"rejects": rejects, "num_lost": len(plan.objects) - len(rows["objects"]), "splits": splits}
            notes["files"] = {other: info.sha256 for other, info in infos.items()}
            if any(reason in _LIMIT_REASONS for _, reason, _ in rejects):
                notes["limits"] = asdict(limits)
        infos[kind] = dataset.write_part(kind, plan.index, build_table(schema, rows[kind]), key=plan.key, notes=notes)
    part = _manifest_entry(plan, notes["splits"], infos)
    labels = count_labels(rows["objects"])
    return PartResult(index=plan.index, part=part, rejects=rejects, num_lost=notes["num_lost"], labels=labels, reused=False)


def count_labels(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Label -> split -> number of rows, both sorted; rows without a label are not counted."""
    counts = Counter((row["label"], row["split"]) for row in rows if row["label"])
    labels: dict[str, dict[str, int]] = {}
    for (label, split), count in sorted(counts.items()):
        labels.setdefault(label, {})[split] = count
    return labels


def _manifest_entry(plan: PartPlan, splits: dict[str, int], infos: dict[str, PartInfo]) -> dict[str, Any]:
    return {"key": plan.key, "num_rows": infos["objects"].num_rows, "splits": splits, **{kind: info.sha256 for kind, info in infos.items()}}
