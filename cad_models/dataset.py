"""The dataset folder: co-partitioned Parquet part files, their manifest, the quarantine. No ray here; works in a notebook.

::

    <dataset>/
      objects/part-00000.parquet ...               one row an object
      views/part-00000.parquet ...                 the same objects in the same order: encoded images, cameras
      embeddings/<encoder>/part-00000.parquet ...  the same again: float16 [views, width]
      embeddings/<encoder>/manifest.json
      quarantine.parquet                           source, reason, detail
      manifest.json                                written last: its existence means completion

Tensors are stored as (fixed-size) binary columns with dtype and shape in the field's metadata: read 7-10 x faster than Parquet lists. For a
human-friendly table use :func:`to_numpy` on a column, as ``to_numpy(folder.read_part("objects", 0), "points")``.

A folder may lie on a local disk or behind any URI that ``pyarrow.fs`` knows (``s3://bucket/ds``). Every file is written under a temporary name
and renamed, so that a reader never sees a half-written one.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cad_models.common.meshes import MESH_REASONS
from cad_models.config import json_digest
from cad_models.folder import DatasetError, Folder

SCHEMA_VERSION = 1

REASONS: tuple[str, ...] = tuple(
    dict.fromkeys(
        (
            *MESH_REASONS,
            "timeout",
            "out_of_memory",
            "crashed",
            "unreadable",
            "no_views",
            "bad_image",
            "no_model",
            "no_image",
            "no_label",
            "bad_row",
            "duplicate_id",
            "failed",
        )
    )
)
"""The closed list of quarantine reasons: what can be wrong with a mesh, then what can happen around it."""

QUARANTINE_SCHEMA = pa.schema([("source", pa.string()), ("reason", pa.string()), ("detail", pa.string())])

# Rows of a row group: small enough that a shuffled reader may take single groups, large enough to read at full speed.
ROW_GROUP_SIZE = 16


# --- tensor columns -----------------------------------------------------------------------------------------------------------------------
def tensor_field(name: str, dtype: str, shape: Sequence[int]) -> pa.Field:
    """A column of tensors: ``shape`` without the row axis; a first -1 means that it differs from row to row."""
    shape = tuple(shape)
    fixed = all(n >= 0 for n in shape)
    width = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    kind = pa.binary(width) if fixed else pa.binary()
    return pa.field(name, kind, nullable=False, metadata={"dtype": dtype, "shape": json.dumps(list(shape))})


def tensor_array(field: pa.Field, values: Iterable[np.ndarray]) -> pa.Array:
    """The Arrow column of ``values`` (one array a row).

    Raises:
        ValueError: a value's shape is not the field's.
    """
    dtype, shape = _tensor_type(field)
    cells = []
    for value in values:
        value = np.ascontiguousarray(value, dtype=dtype)
        if value.ndim != len(shape) or any(want not in (-1, have) for want, have in zip(shape, value.shape, strict=True)):
            raise ValueError(f"column {field.name!r} holds tensors of shape {shape}, got {value.shape}")
        cells.append(value.tobytes())
    return pa.array(cells, type=field.type)


def to_numpy(table: pa.Table, name: str) -> np.ndarray | list[np.ndarray]:
    """A tensor column as one array ``[rows, *shape]``, or as a list of arrays when the shape differs from row to row. Read-only views."""
    field = table.schema.field(name)
    dtype, shape = _tensor_type(field)
    if -1 in shape:
        alike = [_one_array(chunk, dtype, shape) for chunk in table.column(name).chunks if len(chunk)]
        if alike and all(found is not None and found.shape[1:] == alike[0].shape[1:] for found in alike):
            return alike[0] if len(alike) == 1 else np.concatenate(alike)
        return [np.frombuffer(cell.as_buffer(), dtype=dtype).reshape(shape) for cell in table.column(name)]
    if table.num_rows == 0:
        return np.zeros((0, *shape), dtype=dtype)
    chunks = []
    for chunk in table.column(name).chunks:
        width = chunk.type.byte_width
        buffer = chunk.buffers()[1].slice(chunk.offset * width, len(chunk) * width)
        chunks.append(np.frombuffer(buffer, dtype=dtype).reshape(len(chunk), *shape))
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def _one_array(chunk: pa.Array, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray | None:
    """Cells of one shape, which lie one behind the other, as one view; None where they differ."""
    if chunk.type != pa.binary():  # a writer of another kind: its offsets have another width
        return None
    ends = np.frombuffer(chunk.buffers()[1], dtype=np.int32, count=len(chunk) + 1, offset=4 * chunk.offset)
    sizes = np.diff(ends)
    if sizes[0] == 0 or (sizes != sizes[0]).any():
        return None
    data = chunk.buffers()[2].slice(int(ends[0]), int(ends[-1] - ends[0]))
    known = math.prod(n for n in shape if n >= 0) * dtype.itemsize
    return np.frombuffer(data, dtype=dtype).reshape(len(chunk), *(int(sizes[0]) // known if n < 0 else n for n in shape))


def build_table(schema: pa.Schema, rows: Sequence[dict[str, Any]]) -> pa.Table:
    """The table of ``rows``, one dict each with a value for every column of ``schema`` (arrays for tensor columns; other keys are left out).

    Raises:
        ValueError: a tensor's shape is not its column's, or a column holds 2 GiB or more.
    """
    arrays = []
    for field in schema:
        values = [row[field.name] for row in rows]
        is_tensor = b"dtype" in (field.metadata or {})
        array = tensor_array(field, values) if is_tensor else pa.array(values, type=field.type)
        if isinstance(array, pa.ChunkedArray):
            raise ValueError(f"column {field.name!r} of {len(rows)} rows takes 2 GiB or more: use smaller parts (--objects-per-part)")
        arrays.append(array)
    return pa.Table.from_arrays(arrays, schema=schema)


def _tensor_type(field: pa.Field) -> tuple[np.dtype, tuple[int, ...]]:
    metadata = field.metadata or {}
    if b"dtype" not in metadata or b"shape" not in metadata:
        raise DatasetError(f"column {field.name!r} is not a tensor column: its metadata name no dtype and shape")
    return np.dtype(metadata[b"dtype"].decode()), tuple(json.loads(metadata[b"shape"]))


# --- parts --------------------------------------------------------------------------------------------------------------------------------
_PART_NAME = re.compile(r"part-(\d{5,})\.parquet")


def part_name(index: int) -> str:
    """``part-00000.parquet``."""
    return f"part-{index:05d}.parquet"


@dataclass(frozen=True)
class PartInfo:
    """What the manifest says of one file."""

    num_rows: int
    sha256: str


@dataclass(frozen=True)
class DatasetFolder:
    """A dataset folder, by path or URI. Picklable; methods read and write single files and keep nothing in memory."""

    uri: str

    @cached_property
    def folder(self) -> Folder:
        """The storage below."""
        return Folder(self.uri)

    def __getstate__(self) -> dict[str, str]:
        return {"uri": self.uri}

    def __setstate__(self, state: dict[str, str]) -> None:
        object.__setattr__(self, "uri", state["uri"])

    def write_part(self, kind: str, index: int, table: pa.Table, *, key: str, notes: dict[str, Any] | None = None) -> PartInfo:
        """Write part ``index`` of the folder ``kind`` (``objects``, ``views``, ``embeddings/<encoder>``), atomically and reproducibly.

        Args:
            table: The rows, in the objects' order.
            key: Digest of everything the part was made from; :meth:`part_notes` gives nothing for a part with another key.
            notes: JSON values kept in the file's footer, for the job that writes the manifest.
        """
        metadata = dict(table.schema.metadata or {}) | {b"key": key.encode(), b"notes": json.dumps(notes or {}, sort_keys=True).encode()}
        sink = pa.BufferOutputStream()
        pq.write_table(
            table.replace_schema_metadata(metadata),
            sink,
            row_group_size=ROW_GROUP_SIZE,
            compression="none",
            # Statistics and dictionaries of binary tensors would copy them into the footer.
            use_dictionary=False,
            write_statistics=False,
            # A flipped bit in an uncompressed page would otherwise read as data.
            write_page_checksum=True,
        )
        data = sink.getvalue().to_pybytes()
        self.folder.write_bytes(f"{kind}/{part_name(index)}", data)
        return PartInfo(table.num_rows, hashlib.sha256(data).hexdigest())

    def part_notes(self, kind: str, index: int, *, key: str) -> dict[str, Any] | None:
        """The notes of a finished part with this key; None if it is missing, unreadable or made from something else."""
        name = f"{kind}/{part_name(index)}"
        try:
            with self.folder.open(name) as source:
                metadata = pq.read_schema(source).metadata or {}
        except (FileNotFoundError, pa.ArrowInvalid, OSError):
            return None
        if metadata.get(b"key") != key.encode():
            return None
        return json.loads(metadata.get(b"notes", b"{}"))

    def part_info(self, kind: str, index: int) -> PartInfo:
        """Row count and digest of a part file, after reading all of it and its checksums. Raises DatasetError when it is missing or broken."""
        name = f"{kind}/{part_name(index)}"
        try:
            data = self.folder.read_bytes(name)
        except FileNotFoundError as error:
            raise DatasetError(f"{self.folder.path(name)} is missing: run the job that writes it again") from error
        try:
            num_rows = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read().num_rows
        except (pa.ArrowInvalid, OSError) as error:
            raise DatasetError(f"{self.folder.path(name)} is broken ({error}): delete it and run the job that writes it again") from error
        return PartInfo(num_rows, hashlib.sha256(data).hexdigest())

    def drop_parts(self, kind: str, first: int) -> int:
        """Delete the part files of ``kind`` from number ``first`` on, and temporary files that a killed writer left; returns how many parts."""
        self.folder.remove_leftovers(kind)
        stale = [name for name in self.folder.names(kind) if (match := _PART_NAME.fullmatch(name)) and int(match[1]) >= first]
        for name in stale:
            self.folder.delete(f"{kind}/{name}")
        return len(stale)

    def read_part(self, kind: str, index: int, columns: list[str] | None = None, *, verify: bool = False) -> pa.Table:
        """Part ``index`` of ``kind`` as a table; ``verify`` compares the checksums of what is read.

        Raises:
            DatasetError: the file is missing or broken, or lacks a column; the message names it.
        """
        name = f"{kind}/{part_name(index)}"
        try:
            with self.folder.open(name) as source:
                reader = pq.ParquetFile(source, page_checksum_verification=verify)
                if columns is not None:
                    lacking = [c for c in columns if c not in reader.schema_arrow.names]
                    if lacking:
                        remedy = "run embed.py again with the same recipe flags" if kind.startswith("embeddings/") else "made by another version? run prepare again"
                        raise DatasetError(f"{self.folder.path(name)} has no column {', '.join(lacking)}: {remedy}")
                # From a disk, whoever asks for several parts at once is faster than one part's columns side by side; an object store answers late.
                return reader.read(columns=columns, use_threads=not self.folder.is_local)
        except FileNotFoundError as error:
            raise DatasetError(f"{self.folder.path(name)} is missing: run the job that writes it again (only missing parts are recomputed)") from error
        except (pa.ArrowInvalid, OSError) as error:
            raise DatasetError(f"{self.folder.path(name)} is broken ({error}): delete it and run the job that writes it again") from error

    def read_aligned(self, index: int, columns: dict[str, list[str]]) -> dict[str, pa.Table]:
        """Part ``index`` of several folders side by side: ``{"objects": [...], "embeddings/hog": [...]}``.

        Raises:
            DatasetError: the folders' parts do not hold the same objects in the same order; the message names both files.
        """
        tables: dict[str, pa.Table] = {}
        first: tuple[str, list[str]] | None = None
        for kind, names in columns.items():
            table = self.read_part(kind, index, ["object_id", *[n for n in names if n != "object_id"]])
            ids = table.column("object_id").to_pylist()
            if first is None:
                first = (kind, ids)
            elif ids != first[1]:
                raise DatasetError(
                    f"{self.folder.path(first[0])}/{part_name(index)} ({len(first[1])} objects) and {self.folder.path(kind)}/{part_name(index)} "
                    f"({len(ids)}) do not hold the same objects in the same order: run embed.py again on this dataset"
                )
            tables[kind] = table
        return tables

    # manifests ----------------------------------------------------------------------------------------------------------------------------
    def manifest(self) -> "Manifest":
        """The dataset's manifest.

        Raises:
            DatasetError: there is none; the message tells whether the folder is missing or merely not finished.
        """
        try:
            value = self.folder.read_json("manifest.json")
        except (FileNotFoundError, NotADirectoryError) as error:
            state = "is not finished (no manifest.json)" if self.folder.exists("objects") else "is not a dataset folder"
            raise DatasetError(f"--dataset {self.uri}: {state}: run `python rayjobs/prepare.py --dataset {self.uri} --source ...`") from error
        if value.get("schema_version") != SCHEMA_VERSION:
            raise DatasetError(
                f"{self.folder.path('manifest.json')} has schema version {value.get('schema_version')!r}, this program reads {SCHEMA_VERSION}: "
                "prepare the dataset again"
            )
        return Manifest(labels=value.get("labels"), **{f.name: value[f.name] for f in dataclasses.fields(Manifest) if f.name != "labels"})

    def write_manifest(self, manifest: "Manifest") -> None:
        """Write the manifest; call it last."""
        self.folder.write_json("manifest.json", {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(manifest)})

    def embeddings_manifest(self, encoder: str) -> "EmbeddingsManifest":
        """The manifest of ``embeddings/<encoder>/`` (``encoder`` is the folder's name).

        Raises:
            DatasetError: those embeddings are missing or not finished; the message lists what is there.
        """
        try:
            value = self.folder.read_json(f"embeddings/{encoder}/manifest.json")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DatasetError(
                f"{self.uri} has no finished embeddings {encoder!r} (it has {', '.join(self.encoders()) or 'none'}): "
                f"run `python rayjobs/embed.py --dataset {self.uri} --encoder ...`"
            ) from error
        return EmbeddingsManifest(**{f.name: value[f.name] for f in dataclasses.fields(EmbeddingsManifest)})

    def encoders(self) -> list[str]:
        """Folder names of the finished embeddings."""
        return [name for name in self.folder.names("embeddings") if self.folder.exists(f"embeddings/{name}/manifest.json")]

    def quarantine(self) -> list[dict[str, str]]:
        """The quarantined sources: dicts with source, reason, detail."""
        return pq.read_table(pa.BufferReader(self.folder.read_bytes("quarantine.parquet"))).to_pylist()

    def write_quarantine(self, rows: Sequence[dict[str, str]]) -> None:
        """Write ``quarantine.parquet``, sorted by source. Raises ValueError for a reason outside ``REASONS``."""
        for row in rows:
            if row["reason"] not in REASONS:
                raise ValueError(f"{row['source']}: {row['reason']!r} is not one of the quarantine reasons")
        table = pa.Table.from_pylist(sorted(rows, key=lambda r: (r["source"], r["reason"], r["detail"])), schema=QUARANTINE_SCHEMA)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        self.folder.write_bytes("quarantine.parquet", sink.getvalue().to_pybytes())


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """``manifest.json``: what the dataset is. Holds no times or paths, so that equal datasets have equal manifests."""

    task: str
    settings: dict[str, Any]
    """``Task.prepare_settings``, the split's settings (``split``) and ``objects_per_part``."""
    settings_digest: str
    parts: list[dict[str, Any]]
    """One dict a part: ``{"key": str, "num_rows": int, "splits": {"train": int, ...}, "objects": sha256, "views": sha256}``."""
    num_objects: int
    num_groups: int
    num_quarantined: int
    num_ignored: int
    splits: dict[str, int]
    """Objects in each split."""
    labels: dict[str, dict[str, int]] | None = None
    """Label -> split -> objects, sorted; objects without a label are not counted. None: written by a version that did not count."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The labels of all splits, sorted. Raises DatasetError when they were not counted or when there are none."""
        if self.labels is None:
            raise DatasetError(
                "manifest.json counts no labels: an earlier version wrote it; run the same prepare.py command again (no finished part is made again)"
            )
        if not self.labels:
            raise DatasetError("no object of the dataset has a label: prepare it from a source that names classes, as a folder per class")
        return tuple(sorted(self.labels))

    def class_counts(self, split: str) -> dict[str, int]:
        """Objects of each class in a split, 0 included, by sorted name. Raises as :attr:`class_names`."""
        return {name: self.labels[name].get(split, 0) for name in self.class_names}

    @property
    def digest(self) -> str:
        """Identifies the dataset's content: settings and every part's digest."""
        return json_digest([self.task, self.settings_digest, self.parts])


@dataclass(frozen=True, kw_only=True)
class EmbeddingsManifest:
    """``embeddings/<encoder>/manifest.json``."""

    encoder: str
    """The encoder's name as given to ``embed.py``."""
    encoder_digest: str
    width: int
    dataset_digest: str
    """Digest of the dataset whose views were embedded."""
    parts: list[dict[str, Any]]
    """One dict a part: ``{"num_rows": int, "sha256": str, "max_views": int}``."""
