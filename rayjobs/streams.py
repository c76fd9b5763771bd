"""The dataset folder as training and evaluation streams.

Co-partitioned part files are read side by side and turned into model-ready arrays (`Task.examples`). What fits the cache budget is read once into
Ray's object store, for all workers and trials; what does not streams through windows of a few parts, read ahead by Ray Data tasks anywhere in
the cluster, or on a single machine by threads of the worker, so that memory does not grow with the dataset. Either way the order is
`cad_models.order`'s: it depends on seed and epoch only, and any step can be resumed.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from cad_models.common.encoders import encoder_folder
from cad_models.common.memory import keep_freed_memory
from cad_models.config import Recipe
from cad_models.dataset import DatasetError, DatasetFolder, EmbeddingsManifest, Manifest
from cad_models.order import StreamOrder, WholeOrder, Window, num_shards, shuffled
from cad_models.task import LABEL_INDEX, Columns, Task
from cad_models.tasks import TASKS
from rayjobs.capacity import cluster_capacity
from rayjobs.columns_on_disk import padded

ROW_KEY = "row_key"
"""Column that numbers every object of a dataset: part * 2**20 + row."""

_READ_THREADS = 8

# What reads a worker's windows ahead: threads of its own, or tasks somewhere in the cluster.
_READER_THREADS = 2
_READ_TASKS = 2
# What they have read and nobody has taken yet. Without a bound Ray Data reads ahead until its share of the object store is full.
_READ_AHEAD_BYTES = 64 * 10**6

_Row = tuple[Columns, int]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset folder opened for one recipe: manifests checked against each other. Picklable."""

    uri: str
    task: str
    manifest: Manifest
    embeddings: EmbeddingsManifest | None

    @property
    def digest(self) -> str:
        """Identifies content and embeddings."""
        return self.manifest.digest if self.embeddings is None else f"{self.manifest.digest}-{self.embeddings.encoder_digest[:8]}"

    @property
    def embeddings_folder(self) -> str:
        """Where the embeddings' parts lie within the dataset."""
        assert self.embeddings is not None
        return f"embeddings/{encoder_folder(self.embeddings.encoder)}"

    @property
    def signature_inputs(self) -> dict[str, Any]:
        """What `Task.signature` reads."""
        return {"manifest": self.manifest, "embeddings": self.embeddings}


def _only_embeddings(folder: DatasetFolder) -> str:
    found = folder.encoders()
    if len(found) > 1:
        names = ", ".join(folder.embeddings_manifest(name).encoder for name in found)
        raise DatasetError(f"{folder.uri} has the embeddings of several encoders: choose with --data.encoder, one of {names}")
    return found[0] if found else "hog_polar"  # not there either: the error says how to make them


def open_dataset(uri: str, task: Task, recipe: Recipe) -> Dataset:
    """Open a dataset folder for a task and a recipe.

    Raises:
        DatasetError: unfinished, of another task, without the embeddings that the recipe names, or with embeddings of another state.
    """
    folder = DatasetFolder(uri)
    manifest = folder.manifest()
    if manifest.task != task.name:
        raise DatasetError(f"--dataset {uri} was prepared for --task {manifest.task}, not for --task {task.name}")
    embeddings = None
    if "embeddings" in task.columns(recipe):
        embeddings = folder.embeddings_manifest(
            _only_embeddings(folder) if recipe.data.encoder == "auto" else encoder_folder(recipe.data.encoder)
        )
        encoder = embeddings.encoder
        if embeddings.dataset_digest != manifest.digest:
            raise DatasetError(
                f"embeddings/{encoder_folder(encoder)} were made from dataset {embeddings.dataset_digest}, --dataset {uri} is now {manifest.digest}: "
                f"run `python rayjobs/embed.py --dataset {uri} --encoder {encoder}` again (only changed parts are recomputed)"
            )
        for index, (ours, theirs) in enumerate(zip(manifest.parts, embeddings.parts, strict=False)):
            if ours["num_rows"] != theirs["num_rows"]:
                raise DatasetError(
                    f"part {index}: objects/ has {ours['num_rows']} rows, embeddings/{encoder_folder(encoder)}/ has {theirs['num_rows']}"
                )
        if len(manifest.parts) != len(embeddings.parts):
            raise DatasetError(
                f"objects/ has {len(manifest.parts)} parts, embeddings/{encoder_folder(encoder)}/ has {len(embeddings.parts)}: run embed.py again"
            )
    return Dataset(uri=uri, task=task.name, manifest=manifest, embeddings=embeddings)


def read_examples(dataset: Dataset, recipe: Recipe, split: str, index: int) -> Columns:
    """The objects of one split in one part, model-ready, with their ``row_key``."""
    task = TASKS[dataset.task]
    kinds = task.columns(recipe)
    named = {dataset.embeddings_folder if kind == "embeddings" else kind: kind for kind in kinds}
    asked = kinds.get("objects", [])
    objects = ["split", "group_id", *(name for name in asked if name != LABEL_INDEX)]
    if LABEL_INDEX in asked and "label" not in objects:
        objects.append("label")
    wanted = {name: (objects if kind == "objects" else kinds[kind]) for name, kind in named.items()}
    tables = DatasetFolder(dataset.uri).read_aligned(index, wanted)
    keep = np.flatnonzero(np.array(tables["objects"].column("split").to_pylist(), dtype=object) == split)
    if len(keep) < tables["objects"].num_rows:
        tables = {name: table.take(keep) for name, table in tables.items()}
    if LABEL_INDEX in asked:
        number = {name: i for i, name in enumerate(dataset.manifest.class_names)}
        indices = [number.get(label, -1) for label in tables["objects"].column("label").to_pylist()]
        tables["objects"] = tables["objects"].append_column(LABEL_INDEX, pa.array(indices, pa.int64()))
    columns = task.examples({named[name]: table for name, table in tables.items()}, recipe)
    columns[ROW_KEY] = keep.astype(np.int64) + index * 2**20
    return columns


@dataclass(frozen=True, kw_only=True)
class SplitStream:
    """One split of a dataset as batches; travels to workers. As it is made, the process that asks for batches reads the split into its own memory."""

    dataset: Dataset
    recipe: Recipe
    split: str
    blocks: list[Any] = field(default_factory=list)
    """References into Ray's object store: the split's parts, when they are held there for all workers."""
    streamed: bool = False
    """Batches are read window by window."""
    reader_threads: int = 0
    """Threads of the process that asks for batches which read its windows ahead; 0 = tasks of Ray Data read them, anywhere in the cluster."""

    @property
    def part_rows(self) -> list[int]:
        """Rows of the split in each part."""
        return [part["splits"].get(self.split, 0) for part in self.dataset.manifest.parts]

    @property
    def num_rows(self) -> int:
        """Rows of the split."""
        return sum(self.part_rows)

    def key_after(self, num_objects: int) -> int:
        """The `ROW_KEY` below which the first parts stand that hold ``num_objects`` of the split together (or all that it has)."""
        held = np.cumsum(self.part_rows)
        return (int(np.searchsorted(held, num_objects)) + 1) * 2**20

    def cached(self, budget_bytes: int, reader_threads: int | None = None) -> "SplitStream":
        """The same split for workers: held in Ray's object store if that takes no more than ``budget_bytes``, else streamed. Needs Ray.

        Args:
            reader_threads: Of a streamed split; None = threads where all of the cluster is one machine, whose cores do the reading either way (the object
                store would only add copies), else tasks of Ray Data, which use the cores of other nodes too.
        """
        parts = [p for p, rows in enumerate(self.part_rows) if rows]
        if not parts:
            return self
        if reader_threads is None:
            reader_threads = _READER_THREADS if len(cluster_capacity().most) == 1 else 0
        first = read_examples(self.dataset, self.recipe, self.split, parts[0])
        if _row_bytes(first) * self.num_rows > budget_bytes:
            return replace(self, streamed=True, reader_threads=reader_threads)
        # Threads: reading is Arrow's work, outside Python's lock. Processes would take longer to start than such a split takes to read.
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            # Kept as well: a trial that reads more than this recipe may have to stream.
            return replace(self, reader_threads=reader_threads, blocks=list(pool.map(lambda p: ray.put(read_examples(self.dataset, self.recipe, self.split, p)), parts)))

    def num_steps(self, epoch: int, batch_size: int, world_size: int) -> int:
        """Optimiser steps of an epoch; the same on every worker."""
        if self.streamed:
            return StreamOrder(self.part_rows, batch_size, self.recipe.seed).num_steps(epoch, world_size)
        return WholeOrder(self.num_rows, batch_size, self.recipe.seed).num_steps

    def batches(self, epoch: int, batch_size: int, rank: int, world_size: int, *, first_step: int = 0) -> Iterator[Columns]:
        """A worker's shares of the global batches of an epoch, from ``first_step`` on."""
        if self.streamed:
            yield from self._streamed(epoch, batch_size, rank, world_size, first_step)
            return
        rows = self._rows()
        order = WholeOrder(self.num_rows, batch_size, self.recipe.seed)
        for step in range(first_step, order.num_steps):
            chosen = order.rows(epoch, step, rank, world_size)
            yield {name: column[chosen] for name, column in rows.items()}

    def parts(self, rank: int, world_size: int) -> Iterator[Columns]:
        """The split in dataset order, one part after the other; a worker gets every ``world_size``-th part. For evaluation."""
        present = [p for p, rows in enumerate(self.part_rows) if rows]
        for i in range(rank, len(present), world_size):
            yield _block(self.blocks[i]) if self.blocks else read_examples(self.dataset, self.recipe, self.split, present[i])

    def _rows(self) -> Columns:
        # Kept on the instance of this process: a worker concatenates the split once, not once an epoch.
        if "rows" not in self.__dict__:
            if self.blocks:
                columns = [_block(ref) for ref in self.blocks]
            else:
                columns = [read_examples(self.dataset, self.recipe, self.split, p) for p, rows in enumerate(self.part_rows) if rows]
            self.__dict__["rows"] = concatenated(columns)
        return self.__dict__["rows"]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "rows"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _streamed(self, epoch: int, batch_size: int, rank: int, world_size: int, first_step: int) -> Iterator[Columns]:
        shards = num_shards(batch_size, world_size)
        share = batch_size // shards
        order = StreamOrder(self.part_rows, batch_size, self.recipe.seed)
        num_steps = order.num_steps(epoch, world_size)
        mine = range(rank, shards, world_size)
        first_row = first_step * share
        windows = [w for shard in mine for w in order.windows(epoch, shards)[shard] if w.start < num_steps * share]
        windows = [w for w in windows if w.start + sum(self.part_rows[p] for p in w.parts) > first_row]
        # In the order of need: all shards advance together.
        windows.sort(key=lambda w: (w.start, w.shard))
        if not windows:
            return
        # Read and not yet used up. A row holds on to what was read with it.
        buffers: dict[int, deque[_Row]] = defaultdict(deque)
        position: dict[int, int] = defaultdict(lambda: first_row)
        read = self._read_by_threads if self.reader_threads else self._read_by_tasks
        queue = zip(windows, read(windows), strict=True)
        for _ in range(first_step, num_steps):
            rows: list[_Row] = []
            for shard in mine:
                while len(buffers[shard]) < share:
                    window, read_rows = next(queue)
                    skipped = max(0, position[window.shard] - window.start)  # resumed within this window
                    position[window.shard] = window.start + sum(self.part_rows[p] for p in window.parts)
                    buffers[window.shard].extend(read_rows[skipped:])
                rows += [buffers[shard].popleft() for _ in range(share)]
            yield gathered(rows)

    def _window(self, window: Window) -> list[_Row]:
        pieces = [read_examples(self.dataset, self.recipe, self.split, p) for p in window.parts]
        rows = [(piece, i) for piece in pieces for i in range(len(piece[ROW_KEY]))]
        return [rows[i] for i in shuffled(len(rows), window)]

    def _read_by_threads(self, windows: list[Window]) -> Iterator[list[_Row]]:
        keep_freed_memory()
        ahead: deque[Future[list[_Row]]] = deque()
        rows_ahead, most_rows = 0, 0  # how many fit is known when the first window is there
        pool = ThreadPoolExecutor(self.reader_threads, thread_name_prefix="read-windows")
        try:
            for window in windows:
                num_rows = sum(self.part_rows[p] for p in window.parts)
                while len(ahead) >= self.reader_threads and rows_ahead + num_rows > most_rows:
                    rows = ahead.popleft().result()
                    rows_ahead -= len(rows)
                    # By rows: windows differ in size, and a small one must not let a hundred large ones in.
                    most_rows = int(_READ_AHEAD_BYTES / max(1, _row_bytes(rows[0][0])))
                    yield rows
                    del rows  # its consumer keeps what it needs of it
                ahead.append(pool.submit(self._window, window))
                rows_ahead += num_rows
            while ahead:
                yield ahead.popleft().result()
        finally:  # also where nobody asks for the rest
            pool.shutdown(wait=False, cancel_futures=True)

    def _read_by_tasks(self, windows: list[Window]) -> Iterator[list[_Row]]:
        stream = replace(self, blocks=[])

        def load(batch: dict[str, np.ndarray]) -> Columns:
            return gathered(stream._window(windows[int(batch["window"][0])]))

        pipeline = _ordered([{"window": i} for i in range(len(windows))]).map_batches(
            load, batch_size=1, num_cpus=0.25, concurrency=_READ_TASKS
        )
        for batch in pipeline.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2):
            yield [(batch, i) for i in range(len(batch[ROW_KEY]))]


def _ordered(items: list[dict[str, Any]]) -> "ray.data.Dataset":
    context = ray.data.DataContext.get_current()
    # Ray Data yields results as they come unless told so; the order of objects must not depend on who was faster.
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(object_store_memory=_READ_AHEAD_BYTES)
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells each execution's plan and folder
    return ray.data.from_items(items, override_num_blocks=len(items))


def _block(reference: Any) -> Columns:
    # Of its own dict, since callers take columns out; the arrays are the object store's.
    return dict(ray.get(reference))


def gathered(rows: Sequence[_Row]) -> Columns:
    """Rows of columns, each named by the columns it lies in and its index there, as columns of their own: the one copy between what was read and
    a batch. Where later axes differ (the number of views), rows are padded with zeros at the end, as `concatenated` does."""
    result: Columns = {}
    for name in rows[0][0]:
        cells = [columns[name][i] for columns, i in rows]
        alike = {(array.shape[1:], array.dtype) for array in {id(columns): columns[name] for columns, _ in rows}.values()}
        if len(alike) > 1:
            result[name] = concatenated([{name: cell[None]} for cell in cells])[name]
            continue
        shape, dtype = alike.pop()
        result[name] = np.empty((len(cells), *shape), dtype=dtype)
        for place, cell in enumerate(cells):
            result[name][place] = cell
    return result


def concatenated(pieces: list[Columns]) -> Columns:
    """Columns one after the other; where later axes differ (the number of views), shorter ones are padded with zeros at the end."""
    if len(pieces) == 1:
        return pieces[0]
    result: Columns = {}
    for name in pieces[0]:
        arrays = [np.asarray(piece[name]) for piece in pieces]
        trailing = {a.shape[1:] for a in arrays}
        if len(trailing) > 1:
            target = tuple(max(sizes) for sizes in zip(*trailing, strict=True))
            arrays = [padded(a, target) for a in arrays]
        result[name] = np.concatenate(arrays)
    return result


def _row_bytes(columns: Columns) -> float:
    return sum(map(_num_bytes, columns.values())) / max(1, len(columns[ROW_KEY]))


def _num_bytes(column: np.ndarray) -> int:
    return sum(map(len, column.tolist())) if column.dtype == object else column.nbytes
