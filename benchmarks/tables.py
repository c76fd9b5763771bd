"""What the benchmarks share: figures of queries with intervals, and how they are printed; models by the names that infer.py knows."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from cad_models.common.bootstrap import ratio_intervals
from cad_models.ensemble import Ensemble, load_ensemble

Figure = tuple[float, float, float]
"""Value, and bounds of its 95 % interval."""


def with_intervals(values: Mapping[str, np.ndarray], cluster: Sequence[int]) -> dict[str, Figure]:
    """Means over queries with 95 % bounds, by bootstrap over clusters of queries that are not independent; all figures share their resamples.

    Args:
        values: float [queries] a figure: a hit (0 or 1), a precision, a difference of these between two methods.
        cluster: Of each query: its family, or the object that it shows.
    """
    _, row = np.unique(np.asarray(cluster), return_inverse=True)
    count = np.bincount(row).astype(np.float64)
    table = np.stack([np.bincount(row, weights=np.asarray(v, dtype=np.float64)) for v in values.values()], axis=1)
    low, high = ratio_intervals(table, np.repeat(count[:, None], len(values), axis=1))
    means = table.sum(axis=0) / count.sum()
    return {name: (float(m), float(a), float(b)) for name, m, a, b in zip(values, means, low, high, strict=True)}


def cell(figure: Figure, *, signed: bool = False) -> str:
    """As ``0.52 (0.44 … 0.61)``; signed, in points, as ``+3.1 (-1.0 … +7.2)``."""
    value, low, high = figure
    return f"{100 * value:+.1f} ({100 * low:+.1f} … {100 * high:+.1f})" if signed else f"{value:.2f} ({low:.2f} … {high:.2f})"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


@contextlib.contextmanager
def named_ensemble(names: Sequence[str]) -> Iterator[Ensemble]:
    """The ensemble of models named as ``infer.py --model`` does (MLFLOW_TRACKING_URI, else outputs/mlflow, for those of the registry).

    Raises:
        ValueError: as `rayjobs.registry.gather_ensemble`, or models of another task than alignment.
    """
    from rayjobs.cli import TrackingConfig
    from rayjobs.registry import gather_ensemble
    from rayjobs.tracking import open_tracking

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "ensemble"
        gather_ensemble(names, directory, tracking=lambda: open_tracking(TrackingConfig(), "alignment"))
        ensemble = load_ensemble(directory)
        if ensemble.task.name != "alignment":
            raise ValueError(f"--model is of the task {ensemble.task.name}: this benchmark is about alignment")
        yield ensemble


def splits_by_digest(dataset: str) -> dict[str, str]:
    """SHA-256 of a source file -> its split, of everything in a prepared dataset."""
    from cad_models.dataset import DatasetFolder

    folder = DatasetFolder(dataset)
    splits: dict[str, str] = {}
    for index in range(len(folder.manifest().parts)):
        table = folder.read_part("objects", index, columns=["sha256", "split"])
        splits |= dict(zip(table.column("sha256").to_pylist(), table.column("split").to_pylist(), strict=True))
    return splits
