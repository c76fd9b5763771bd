"""Row 2. Batches of a dataset that is streamed from disk: 24 × 1,024 float16 embeddings and 10,000 points with normals an object, batches of 32.

Rivals: pyarrow reading the same files in a bare loop (no shuffle, no batches, one array a column), and torch's DataLoader over a .npz file an object,
which is what research code has. Wall-clock, all with two reading processes or threads; the files are in the page cache.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.generated_dataset import write_dataset
from benchmarks.measure import Comparison, Settings, compared, copy_bandwidth, row_main, seconds_in_turn
from cad_models.alignment.recipe import AlignmentData, AlignmentModel, AlignmentRecipe
from cad_models.tasks import TASKS

BATCH = 32


def arrow_bytes(folder: Path, parts: int) -> int:
    """Read every column that training needs, by name, as arrays; returns how many bytes that were."""
    total = 0
    for index in range(parts):
        for kind, columns in (("objects", ["points", "normals"]), ("embeddings/hog", ["embeddings"])):
            table = pq.read_table(folder / kind / f"part-{index:05d}.parquet", columns=columns)
            for name in columns:
                for chunk in table.column(name).chunks:
                    total += np.frombuffer(chunk.buffers()[-1], dtype=np.uint8).nbytes
    return total


def data_loader(folder: Path, num_workers: int) -> Iterator[dict]:
    """Shuffled batches of a .npz file an object."""
    import torch

    files = sorted(folder.glob("npz/train/*.npz"))

    class Objects(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, i: int) -> dict[str, np.ndarray]:
            with np.load(files[i]) as stored:
                return {"points": np.concatenate([stored["points"], stored["normals"]], axis=1), "views": stored["embeddings"].astype(np.float32)}

    return torch.utils.data.DataLoader(Objects(), batch_size=BATCH, shuffle=True, drop_last=True, num_workers=num_workers)


def run(settings: Settings) -> list[Comparison]:
    """Time the loop's own batches, from Ray Data and as collated tensors, and both rivals."""
    import ray

    from rayjobs.batching import prefetched
    from rayjobs.resources import set_defaults
    from rayjobs.streams import ROW_KEY, SplitStream, open_dataset

    set_defaults()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    task, count = TASKS["alignment"], settings.pick(1024, 256)
    recipe = AlignmentRecipe(
        batch_size=BATCH, data=AlignmentData(num_points=settings.pick(10_000, 1_000)), model=AlignmentModel(num_points=settings.pick(10_000, 1_000))
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "dataset"
        write_dataset(folder, recipe, num_objects={"train": count}, width=1024, npz=True)
        ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="error", object_store_memory=1_000_000_000)
        try:
            dataset = open_dataset(str(folder), task, recipe)
            # As a worker on this machine has it; with tasks of Ray Data, as on a cluster of several nodes, beside it.
            stream = SplitStream(dataset=dataset, recipe=recipe, split="train").cached(0)
            by_tasks = SplitStream(dataset=dataset, recipe=recipe, split="train").cached(0, reader_threads=0)
            parts = len(dataset.manifest.parts)
            epoch = iter(range(1_000))

            def streamed(stream: SplitStream = stream) -> int:
                # The prefetching thread is the loop's; here it only copies.
                return sum(len(columns[ROW_KEY]) for columns in prefetched(stream.batches(next(epoch), BATCH, 0, 1)))

            def loaded() -> int:
                return sum(len(batch["points"]) for batch in data_loader(folder, 2))

            started = time.perf_counter()
            num_streamed, num_loaded = streamed(), loaded()
            assert num_streamed == stream.num_steps(0, BATCH, 1) * BATCH and num_streamed >= 0.9 * count, (num_streamed, count)
            assert num_loaded == count // BATCH * BATCH
            size = arrow_bytes(folder, parts)
            rivals = {"ours": streamed, "arrow": lambda: arrow_bytes(folder, parts), "loader": loaded}
            rounds = settings.pick(11, 1) if time.perf_counter() - started < 60 else 3
            seconds = seconds_in_turn(rivals, rounds=rounds, clock="wall", warm=False)
            # By themselves: Ray Data's processes are at work for a while after their last batch.
            by_task = {"tasks": lambda: streamed(by_tasks), "arrow": rivals["arrow"]}
            seconds_by_task = seconds_in_turn(by_task, rounds=rounds, clock="wall", warm=False)
        finally:
            ray.shutdown()
    what = f"dataset stream, {count:,} objects of {size / count / 1e3:.0f} kB"
    # Every byte is written by the reading process and read again: two copies.
    limit = {"limit_share": 2 * size / copy_bandwidth() / statistics.median(seconds["ours"]), "limit": "of copying the bytes once on one core"}
    common = {"per_call": count, "unit": "objects/s"}
    return [
        compared(2, what, "pyarrow, bare loop", seconds["ours"], seconds["arrow"], at_least=0.8, **common, **limit),
        compared(2, what, "DataLoader on .npz, 2 workers", seconds["ours"], seconds["loader"], at_least=2, **common, **limit),
        compared(2, f"{what}, read by Ray Data tasks", "pyarrow, bare loop", seconds_by_task["tasks"], seconds_by_task["arrow"], **common),
    ]


if __name__ == "__main__":
    row_main(run)
