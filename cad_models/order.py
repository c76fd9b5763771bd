"""Which objects make which batch: a pure function of seed, epoch and batch size, the same for every number of workers.

A global batch is the union of equal shares from ``num_shards`` *shards*; a worker serves the shards ``rank, rank + world_size, ...``. As long as
the number of shards stays the same (8 where 8 divides the batch size), 1, 2, 4 or 8 workers train on the very same batches.

Small datasets are shuffled whole. Large ones stream: parts are dealt to the shards at random, then rows are shuffled within windows of a few
parts, so that a worker reads each of its parts once an epoch and holds one window a shard.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_SHARDS = 8
WINDOW_PARTS = 4


def num_shards(batch_size: int, world_size: int) -> int:
    """The most shards, up to ``MAX_SHARDS``, that ``world_size`` divides and that divide ``batch_size``.

    Raises:
        ValueError: the workers cannot share the batch equally.
    """
    if batch_size % world_size:
        raise ValueError(
            f"--batch-size {batch_size} cannot be shared equally by --scale.num-workers {world_size}: make it a multiple, as {batch_size - batch_size % world_size + world_size}"
        )
    fitting = [n for n in range(world_size, max(MAX_SHARDS, world_size) + 1, world_size) if batch_size % n == 0]
    return fitting[-1]


@dataclass(frozen=True)
class WholeOrder:
    """Order of a dataset that is shuffled whole (held in memory)."""

    num_rows: int
    batch_size: int
    seed: int

    @property
    def num_steps(self) -> int:
        """Steps of an epoch; rows that fill no whole batch sit out, others in each epoch."""
        return self.num_rows // self.batch_size

    def rows(self, epoch: int, step: int, rank: int, world_size: int) -> np.ndarray:
        """Row numbers, int64 [batch_size / world_size], that a worker takes in a step."""
        shards = num_shards(self.batch_size, world_size)
        order = np.random.default_rng((self.seed, 11, epoch)).permutation(self.num_rows)
        batch = order[step * self.batch_size : (step + 1) * self.batch_size]
        return batch.reshape(shards, -1)[rank::world_size].reshape(-1)


@dataclass(frozen=True)
class Window:
    """Some parts of one shard whose rows are shuffled together."""

    shard: int
    parts: tuple[int, ...]
    start: int
    """Rows of the shard before this window."""
    seed: tuple[int, ...]


@dataclass(frozen=True)
class StreamOrder:
    """Order of a dataset that is read part by part."""

    part_rows: Sequence[int]
    """Rows of the split in each part."""
    batch_size: int
    seed: int

    def windows(self, epoch: int, shards: int) -> list[list[Window]]:
        """The windows of each shard, in reading order."""
        parts = [p for p in range(len(self.part_rows)) if self.part_rows[p]]
        dealt = np.random.default_rng((self.seed, 12, epoch)).permutation(parts)
        # Each to the shard that has the fewest rows so far: the smallest one bounds the epoch.
        hands: list[list[int]] = [[] for _ in range(shards)]
        held = [0] * shards
        for part in dealt.tolist():
            shard = held.index(min(held))
            hands[shard].append(part)
            held[shard] += self.part_rows[part]
        result = []
        for shard, mine in enumerate(hands):
            windows, start = [], 0
            for i in range(0, len(mine), WINDOW_PARTS):
                chosen = tuple(mine[i : i + WINDOW_PARTS])
                windows.append(Window(shard, chosen, start, (self.seed, 13, epoch, shard, i)))
                start += sum(self.part_rows[p] for p in chosen)
            result.append(windows)
        return result

    def num_steps(self, epoch: int, world_size: int) -> int:
        """Steps of an epoch: as many as the shard with the fewest rows allows, so that all workers agree on it."""
        shards = num_shards(self.batch_size, world_size)
        share = self.batch_size // shards
        return min(sum(self.part_rows[p] for w in windows for p in w.parts) // share for windows in self.windows(epoch, shards))


def shuffled(num_rows: int, window: Window) -> np.ndarray:
    """The order of a window's rows, int64 [num_rows]."""
    return np.random.default_rng(window.seed).permutation(num_rows)


def object_rng(seed: int, epoch: int, row_key: int) -> np.random.Generator:
    """The generator of one object's augmentation in one epoch."""
    return np.random.default_rng((seed, 14, epoch, row_key))
