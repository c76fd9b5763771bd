"""What ``embed.py`` computes, without Ray: the frozen embeddings of one part of a dataset. Pure but for the folder."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cad_models.config import json_digest
from cad_models.dataset import SCHEMA_VERSION, DatasetError, DatasetFolder, build_table, part_name, tensor_field
from cad_models.task import EmbedColumn

if TYPE_CHECKING:
    from cad_models.common.encoders import ImageEncoder

# Images decoded and held at once: bounds the memory of a worker whatever the size of a part.
_BATCH_IMAGES = 128


@dataclass(frozen=True, kw_only=True)
class EmbeddedPart:
    """A finished part of embeddings."""

    index: int
    part: dict[str, Any]
    """Its entry in the manifest: ``{"key": str, "num_rows": int, "sha256": str, "max_views": int}``."""
    num_images: int
    """Images encoded now; 0 for a part that was there."""
    reused: bool


def embedding_key(part: dict[str, Any], columns: Sequence[EmbedColumn], encoder: "ImageEncoder") -> str:
    """Digest of all that a part of embeddings is made from: the source files' digests, the columns, the encoder."""
    folders = sorted({column.source[0] for column in columns})
    named = [[*column.source, column.name, column.count] + ([repr(column.change), column.copies] if column.change else []) for column in columns]
    return json_digest([SCHEMA_VERSION, [[f, part[f]] for f in folders], named, encoder.digest, encoder.width, encoder.input_size], length=32)


def finished_embeddings(dataset: DatasetFolder, kind: str, index: int, key: str, recorded: dict[str, Any] | None) -> EmbeddedPart | None:
    """The part as an earlier run left it, or None when it has to be made.

    Args:
        recorded: The part's entry in the former manifest; without it the file is read whole, since the run that wrote it was killed.
    """
    notes = dataset.part_notes(kind, index, key=key)
    if notes is None:
        return None
    if recorded is not None and recorded.get("key") == key:
        return EmbeddedPart(index=index, part=recorded, num_images=0, reused=True)
    try:
        info = dataset.part_info(kind, index)
    except DatasetError:
        return None  # a broken file is made again
    part = {"key": key, "num_rows": info.num_rows, "sha256": info.sha256, "max_views": notes["max_views"]}
    return EmbeddedPart(index=index, part=part, num_images=0, reused=True)


def embed_part(
    dataset: DatasetFolder, kind: str, index: int, part: dict[str, Any], columns: Sequence[EmbedColumn], encoder: "ImageEncoder", *, num_threads: int = 1
) -> EmbeddedPart:
    """Encode the images of part ``index`` and write ``<kind>/part-<index>``. Memory: one part of encoded images, ``128`` decoded ones.

    Args:
        part: The part's entry in the dataset's manifest.
        num_threads: Threads that decode and crop images while the encoder works.

    Raises:
        DatasetError: a source file is missing, broken, not the one in the manifest, or holds an image that cannot be decoded; the message
            names the file and the remedy.
    """
    for folder in {column.source[0] for column in columns}:
        name = dataset.folder.path(f"{folder}/{part_name(index)}")
        if dataset.part_info(folder, index).sha256 != part[folder]:
            raise DatasetError(f"{name} is not the file that manifest.json names: delete it and run prepare again (only it is made again)")
    wanted: dict[str, list[str]] = {}
    for column in columns:
        wanted.setdefault(column.source[0], []).append(column.source[1])
    tables = dataset.read_aligned(index, wanted)
    ids = next(iter(tables.values())).column("object_id").to_pylist()
    rows: list[dict[str, Any]] = [{"object_id": object_id} for object_id in ids]
    num_images = max_views = 0
    with ThreadPoolExecutor(max_workers=num_threads) as threads:
        for column in columns:
            folder, source = column.source
            cells = tables[folder].column(source)
            counts = [len(cell) * column.copies for cell in cells]
            vectors = _encoded(cells, ids, column, encoder, threads, dataset.folder.path(f"{folder}/{part_name(index)}"))
            start = 0
            for row, count in zip(rows, counts, strict=True):
                row[column.name], row[column.count] = vectors[start : start + count], count
                start += count
            num_images += start
            max_views = max(max_views, *(len(cell) for cell in cells), 0)
    fields = [pa.field("object_id", pa.string())]
    for column in columns:
        fields += [tensor_field(column.name, "float16", (-1, encoder.width)), pa.field(column.count, pa.int64())]
    key = embedding_key(part, columns, encoder)
    info = dataset.write_part(kind, index, build_table(pa.schema(fields), rows), key=key, notes={"max_views": max_views})
    entry = {"key": key, "num_rows": info.num_rows, "sha256": info.sha256, "max_views": max_views}
    return EmbeddedPart(index=index, part=entry, num_images=num_images, reused=False)


def _encoded(
    cells: pa.ChunkedArray, ids: Sequence[str], column: EmbedColumn, encoder: "ImageEncoder", threads: ThreadPoolExecutor, where: str
) -> np.ndarray:
    """float16 [embeddings of all cells, width]."""
    from cad_models.common.images import BadImage, decode_image, prepare_image

    def load(named: tuple[str, int, Any, int]) -> np.ndarray:
        object_id, view, image, copy = named
        try:
            data = image.as_py()
            picture = decode_image(data)
            if column.change is not None:
                # By the image's bytes: the same picture is changed in the same way in any dataset, part and order.
                picture = column.change(picture, np.random.default_rng([int(hashlib.sha256(data).hexdigest()[:16], 16), copy]))
            return prepare_image(picture, size=encoder.input_size)
        except BadImage as error:
            raise DatasetError(f"{where}: image {view} of {object_id} cannot be read ({error}): delete the file and run prepare again") from error

    images = (
        (object_id, view, image, copy)
        for object_id, cell in zip(ids, cells, strict=True)
        for view, image in enumerate(cell)
        for copy in range(column.copies)
    )
    vectors = [np.zeros((0, encoder.width), dtype=np.float16)]
    # One batch ahead: the threads decode the next images while the encoder works on these.
    waiting: list[Any] = []
    for batch in _batches(images):
        pending = [threads.submit(load, image) for image in batch]
        if waiting:
            vectors.append(_encode_batch(waiting, encoder, where))
        waiting = pending
    if waiting:
        vectors.append(_encode_batch(waiting, encoder, where))
    return np.concatenate(vectors)


def _batches(images: Iterator[Any]) -> Iterator[list[Any]]:
    while batch := list(islice(images, _BATCH_IMAGES)):
        yield batch


def _encode_batch(pending: list[Any], encoder: "ImageEncoder", where: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # told below, with the file's name
        vectors = encoder.encode_squares([future.result() for future in pending]).astype(np.float16)
    if not np.isfinite(vectors).all():
        raise DatasetError(f"{where}: encoder {encoder.name} gave values beyond the range of float16: use another encoder")
    return vectors
