"""Between a stream of columns and the loop: batches made ahead, regrouped, and their size."""

import math
import queue
import threading
from collections.abc import Iterator
from typing import Any

from cad_models.config import Recipe
from cad_models.order import MAX_SHARDS
from cad_models.task import Columns
from rayjobs.streams import ROW_KEY, SplitStream, concatenated


def prefetched(items: Iterator[Any], depth: int = 2) -> Iterator[Any]:
    """The same items, made ahead in a thread, so that collating overlaps with computing."""
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(value: tuple[str, Any]) -> bool:
        while not stop.is_set():
            try:
                ready.put(value, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def fill() -> None:
        try:
            for item in items:
                if not put(("item", item)):
                    return
            put(("end", None))
        except Exception as error:  # handed to the consumer, which raises it
            put(("error", error))

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stop.set()


def regrouped(pieces: Iterator[Columns], size: int, *, limit: int | None) -> Iterator[Columns]:
    """The same rows in groups of ``size`` (the last one smaller), at most ``limit`` rows in all; reads no more pieces than it needs."""
    held: list[Columns] = []
    left = math.inf if limit is None else limit
    for piece in pieces:
        held.append(piece)
        while left > 0 and (num_rows := sum(len(p[ROW_KEY]) for p in held)) >= (wanted := min(size, left)):
            columns = concatenated(held)
            yield {name: column[:wanted] for name, column in columns.items()}
            left -= wanted
            held = [{name: column[wanted:] for name, column in columns.items()}] if num_rows > wanted else []
        if left <= 0:
            return
    if held:
        yield concatenated(held)


def fitting_batch_size(recipe: Recipe, train: SplitStream, world_size: int) -> int:
    """The recipe's, or for a smaller dataset the largest that it fills: a multiple of 8 where it can, so that 1, 2, 4 or 8 workers agree."""
    if train.num_rows == 0:
        raise ValueError(f"the train split of --dataset {train.dataset.uri} is empty")
    if train.num_rows >= recipe.batch_size:
        return recipe.batch_size
    unit = MAX_SHARDS if MAX_SHARDS % world_size == 0 and train.num_rows >= MAX_SHARDS else world_size
    return max(unit, train.num_rows // unit * unit)
