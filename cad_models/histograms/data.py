"""Raw files -> rows, rows -> model-ready arrays, arrays -> batches, for the histograms task. No torch until a batch is made."""

import functools
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from cad_models.common.meshes import MESH_SUFFIXES, BadMesh, Mesh, geometry_signature, group_duplicates, load_mesh
from cad_models.dataset import Folder, tensor_field, to_numpy
from cad_models.histograms.features import DISTRIBUTION_SHAPE, HISTOGRAM_SHAPE, features, mesh_histograms, stored_histograms
from cad_models.histograms.primitives import CLASSES, SOURCE_CLASSES, generate_shape
from cad_models.histograms.published import BadHistograms, Histograms, Table, read_json, read_table, table_histograms
from cad_models.histograms.recipe import HistogramRecipe
from cad_models.sources import generated_set, source_files
from cad_models.task import LABEL_INDEX, Columns, Inspection, Listing, RawItem, Reject, Row

if TYPE_CHECKING:
    import torch

_DELIMITERS = {".tsv": "\t", ".csv": ","}

# Printed tensors have five digits, their values are below 1; distinct published shapes differ by 0.01 and more.
_SAME_HISTOGRAM = 1e-5


# --- listing ------------------------------------------------------------------------------------------------------------------------------
def list_source(source: str) -> Listing:
    """The shapes of a source, each with its class.

    - ``builtin:<N>[:seed=<S>][:classes=source|all]``: generated; the source system's five classes, or three more.
    - A folder with meshes at any depth: the class of a mesh is what a table (TSV or CSV: id, object name) beside them says of its file name, or,
      where there is no table, the name of the topmost folder that it lies in.
    - A folder without meshes: the source system's histograms, ``<id>.json`` anywhere with tables beside them, or tables with a ``hist`` column.

    Raises:
        ValueError: the source is not there, is no folder, or holds nothing of that.
    """
    if source.startswith("builtin:"):
        return _list_generated(source)
    folder, files = source_files(source)
    tables, rejects = _tables(folder, files)
    labels: dict[str, str] = {}
    for name, table in tables.items():
        rejects += [(f"{name}: {row}", Reject(reason="bad_row", detail=detail)) for row, detail in table.bad_rows]
        for object_id, label in table.labels.items():
            if labels.setdefault(object_id, label) != label:
                detail = f"is a {labels[object_id]} in another table and a {label} here; the first is used"
                rejects.append((f"{name}: {object_id}", Reject(reason="bad_row", detail=detail)))
    meshes = [name for name in files if suffix_of(name) in MESH_SUFFIXES]
    records = [name for name in files if suffix_of(name) == ".json"]
    if meshes or records:
        items, unlabelled = _labelled(folder, meshes or records, labels, bool(tables))
        rejects += unlabelled
    else:
        # A TSV and a CSV of one name hold the same; the first table that has an object's histogram is read.
        items = [
            RawItem(object_id=object_id, source=f"{name}#{object_id}", uri=f"{folder.path(name)}#{object_id}", label=labels[object_id])
            for object_id, name in {i: n for n, table in reversed(tables.items()) for i in table.histograms}.items()
        ]
    if not items and not rejects:
        raise ValueError(
            f"--source {source} holds no mesh ({', '.join(MESH_SUFFIXES)}), no histogram file (<id>.json) and no table with histograms among its "
            f"{len(files)} files"
        )
    used = len(items) + len(tables)
    return Listing(items=sorted(items, key=lambda i: i.object_id), rejects=rejects, num_ignored=max(0, len(files) - used) if meshes or records else 0)


def _list_generated(source: str) -> Listing:
    count, seed, options = generated_set(source, of="shapes", options=("classes",), example="builtin:600:seed=7:classes=all")
    which = options.get("classes", "source")
    if which not in ("source", "all"):
        raise ValueError(f"--source {source}: classes are source (those of the source system) or all")
    classes = CLASSES if which == "all" else SOURCE_CLASSES
    return Listing(
        items=[
            RawItem(
                object_id=f"shape-{i:06d}", source=f"builtin:{i}:seed={seed}", uri=f"builtin:{i}:{seed}:{which}", label=classes[i % len(classes)]
            )
            for i in range(count)
        ]
    )


def _tables(folder: Folder, files: list[str]) -> tuple[dict[str, Table], list[tuple[str, Reject]]]:
    tables, rejects = {}, []
    for name in sorted(files, key=lambda n: (n.rpartition(".")[0], suffix_of(n) != ".tsv")):
        if suffix_of(name) not in _DELIMITERS:
            continue
        try:
            table = read_table(folder.read_bytes(name).decode("utf-8"), delimiter=_DELIMITERS[suffix_of(name)])
        except UnicodeDecodeError as error:
            rejects.append((name, Reject(reason="bad_row", detail=f"no UTF-8 text ({error})")))
            continue
        if table is not None:
            tables[name] = table
    return tables, rejects


def _labelled(folder: Folder, names: list[str], labels: dict[str, str], has_tables: bool) -> tuple[list[RawItem], list[tuple[str, Reject]]]:
    stems = [name.rpartition("/")[2].rpartition(".")[0] for name in names]
    repeated = {stem for stem in stems if stems.count(stem) > 1} if len(set(stems)) < len(stems) else set()
    items, rejects = [], []
    for name, stem in zip(names, stems, strict=True):
        label = labels.get(stem, "") if has_tables else name.split("/", 1)[0] if "/" in name else ""
        if not label:
            detail = f"no table names {stem}" if has_tables else "lies in no folder that names its class, and no table (TSV: id, class) is there"
            rejects.append((name, Reject(reason="no_label", detail=detail)))
            continue
        items.append(RawItem(object_id=name if stem in repeated else stem, source=name, uri=folder.path(name), label=label))
    return items, rejects


def suffix_of(name: str) -> str:
    """With the dot, in lower case; empty without one."""
    dot = name.rfind(".")
    return name[dot:].lower() if dot > name.rfind("/") else ""


# --- one object ---------------------------------------------------------------------------------------------------------------------------
def read_uri(uri: str) -> bytes:
    """A file's bytes, by path or URI."""
    parent, _, name = uri.rpartition("/")
    return Folder(parent or "/").read_bytes(name)


def read_shape(uri: str) -> tuple[Mesh | Histograms, str]:
    """A mesh or histograms, and the SHA-256 of where they come from.

    Raises:
        BadMesh, BadHistograms: the content cannot be used.
        OSError: it cannot be read.
    """
    if uri.startswith("builtin:"):
        _, index, seed, which = uri.split(":")
        shape = generate_shape(int(index), int(seed), CLASSES if which == "all" else SOURCE_CLASSES)
        digest = hashlib.sha256(shape.vertices.tobytes() + shape.faces.tobytes()).hexdigest()
        return Mesh(vertices=shape.vertices, faces=shape.faces.astype(np.int32)), digest
    if "#" in uri and suffix_of(uri.rpartition("#")[0]) in _DELIMITERS:
        path, _, object_id = uri.rpartition("#")
        values = _read_table_file(path).histograms[object_id]
        return table_histograms(values), hashlib.sha256(values.tobytes()).hexdigest()
    data = read_uri(uri)
    digest = hashlib.sha256(data).hexdigest()
    return (read_json(data) if suffix_of(uri) == ".json" else load_mesh(data, suffix_of(uri))), digest


@functools.lru_cache(maxsize=8)
def _read_table_file(path: str) -> Table:
    table = read_table(read_uri(path).decode("utf-8"), delimiter=_DELIMITERS[suffix_of(path)])
    if table is None:
        raise BadHistograms("the table has other columns than when it was listed")
    return table


def _rejected(error: Exception) -> Reject:
    if isinstance(error, BadMesh):
        return Reject(reason=error.reason, detail=error.detail)
    if isinstance(error, BadHistograms):
        return Reject(reason="malformed", detail=str(error))
    return Reject(reason="unreadable", detail=str(error))


def inspect_item(item: RawItem) -> Inspection | Reject:
    """Read a shape once: enough to find its exact duplicates."""
    try:
        shape, sha256 = read_shape(item.uri)
    except (BadMesh, BadHistograms, OSError, KeyError) as error:
        return _rejected(error)
    if isinstance(shape, Mesh):
        size, complexity, signature = len(shape.faces), float(len(shape.vertices)) * len(shape.faces), geometry_signature(shape)
    else:
        size, complexity, signature = 0, 1.0, np.concatenate(list(shape.values()))
    return Inspection(sha256=sha256, size=size, complexity=complexity, signature=signature)


def duplicates(inspections: Sequence[Inspection]) -> list[int]:
    """For each shape the index of the first of its exact duplicates: equal triangles, or histograms that are equal up to their printing."""
    first = list(range(len(inspections)))
    kinds: dict[tuple[bool, int], list[int]] = {}
    for index, inspection in enumerate(inspections):
        is_mesh = inspection.size > 0
        kinds.setdefault((is_mesh, len(inspection.signature)), []).append(index)
    for (is_mesh, _), members in kinds.items():
        signatures = [inspections[i].signature for i in members]
        groups = group_duplicates(signatures, [inspections[i].size for i in members]) if is_mesh else equal_histograms(np.stack(signatures))
        for index, group in zip(members, groups, strict=True):
            first[index] = members[int(group)]
    return first


def equal_histograms(values: np.ndarray, tolerance: float = _SAME_HISTOGRAM) -> list[int]:
    """For each row the index of the first row from which no value differs by more than the tolerance.

    Rows whose sums, weighted at random, differ by more than that allows need not be compared: sorted by it, equals are neighbours.
    """
    weights = np.random.default_rng(0).uniform(0.5, 1.5, values.shape[1])
    keys = values @ weights
    reach = tolerance * weights.sum()
    order = np.argsort(keys, kind="stable")
    first = np.arange(len(values))
    start = 0
    for place, index in enumerate(order):
        while keys[index] - keys[order[start]] > reach:
            start += 1
        for other in order[start:place]:
            if np.abs(values[index] - values[other]).max() <= tolerance:
                low, high = sorted((int(first[index]), int(first[other])))
                first[first == high] = low
    return first.tolist()


def prepare_item(item: RawItem, recipe: HistogramRecipe) -> Row | Reject:
    """The heavy work on one shape: all its histograms."""
    try:
        shape, sha256 = read_shape(item.uri)
        columns = shape_columns(shape, recipe.data.log2_chords)
    except (BadMesh, BadHistograms, OSError, KeyError) as error:
        return _rejected(error)
    return Row(objects={**columns, "label": item.label, "sha256": sha256})


def shape_columns(shape: Mesh | Histograms, log2_chords: int) -> dict[str, np.ndarray]:
    """``histograms`` and ``distributions`` of a mesh, or what histograms were given."""
    if isinstance(shape, Mesh):
        histograms, distributions = mesh_histograms(shape, log2_chords)
    else:
        histograms, distributions = stored_histograms(shape), np.full(DISTRIBUTION_SHAPE, np.nan, dtype=np.float32)
    return {"histograms": histograms, "distributions": distributions}


def schemas() -> dict[str, pa.Schema]:
    """Columns that :func:`prepare_item` fills."""
    return {
        "objects": pa.schema(
            [tensor_field("histograms", "float32", HISTOGRAM_SHAPE), tensor_field("distributions", "float32", DISTRIBUTION_SHAPE)]
        )
    }


# --- training -----------------------------------------------------------------------------------------------------------------------------
def examples(tables: dict[str, pa.Table], recipe: HistogramRecipe) -> Columns:
    """``features`` float32 [n, width], ``label`` int64 [n] (position among the dataset's classes), ``group`` int64 [n], ``object_id`` [n]."""
    objects = tables["objects"]
    groups = objects.column("group_id").to_pylist()
    return {
        "features": features(to_numpy(objects, "histograms"), to_numpy(objects, "distributions"), recipe.data),
        "label": objects.column(LABEL_INDEX).to_numpy().astype(np.int64),
        "group": np.array([_number(g) for g in groups], dtype=np.int64),
        "object_id": np.array(objects.column("object_id").to_pylist(), dtype=object),
    }


def _number(group_id: str) -> int:
    """A group id as int64, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(group_id.encode(), digest_size=8).digest(), "big", signed=True)


def collate(columns: Columns) -> "dict[str, torch.Tensor]":
    """Arrays of a batch -> tensors ``features``, ``label``, ``group``."""
    import torch

    return {name: torch.from_numpy(np.array(columns[name])) for name in ("features", "label", "group")}
