"""A run's evaluations for people: ``training_history.csv``, one line an evaluation, and ``training_history.png``."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cad_models.task import Score, Task

CSV_NAME, PNG_NAME = "training_history.csv", "training_history.png"

_MOST_CURVES = 8
_DPI = 110


def history_columns(task: Task, lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Column -> metric: the task's own choice, else every metric of ``lines``."""
    if task.history_columns:
        return dict(task.history_columns)
    names = sorted({name for line in lines for name in line["metrics"]})
    return {name.replace("/", "_"): name for name in names}


def history_csv(task: Task, lines: Sequence[Mapping[str, Any]]) -> bytes:
    """The table of a run's evaluations; a metric that an evaluation does not have, or that is not finite, is an empty cell.

    Args:
        lines: ``{"step", "epoch", "metrics"}`` each, as in ``metrics.jsonl``.
    """
    columns = history_columns(task, lines)
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(["epoch", *columns])
    for line in lines:
        writer.writerow([line["epoch"], *(_cell(line["metrics"].get(metric)) for metric in columns.values())])
    return sink.getvalue().encode()


def _cell(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else repr(float(value))


def history_png(task: Task, lines: Sequence[Mapping[str, Any]], *, title: str = "") -> bytes:
    """Losses, what checkpoints are chosen by, and learning rates over the epochs; the best evaluation is marked. The same lines give the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained", dpi=_DPI)
    figure.suptitle(title, fontsize=10)
    for axes, (name, metrics) in zip(figure.subplots(1, 3), _panels(task, lines).items(), strict=True):
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        for metric in metrics:
            points = [(line["epoch"], line["metrics"][metric]) for line in lines if math.isfinite(line["metrics"].get(metric, math.nan))]
            axes.plot(*zip(*points, strict=True) if points else ((), ()), marker="." if len(points) < 60 else "", label=metric)
        best = best_evaluation(task.score, lines)
        if best is not None and task.score.name in metrics:
            axes.axvline(best["epoch"], color="grey", linestyle=":", linewidth=1)
            axes.plot(best["epoch"], best["metrics"][task.score.name], "k*", label=f"best {best['metrics'][task.score.name]:.4g}")
        if metrics:
            axes.legend(fontsize=7)
    sink = io.BytesIO()
    FigureCanvasAgg(figure).print_png(sink, metadata={"Software": None})
    return sink.getvalue()


def _panels(task: Task, lines: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    known = sorted({name for line in lines for name in line["metrics"]})
    losses = [name for name in known if name.rsplit("/", 1)[-1] == "loss"]
    wanted = [task.score.name, *task.best_metrics.values(), *(m for m in task.history_columns.values() if m.startswith("val/"))]
    scores = [name for name in dict.fromkeys(wanted) if name in known and name not in losses]
    rates = [name for name in known if name.startswith("train/lr_")]
    return {"loss": losses[:_MOST_CURVES], "validation": scores[:_MOST_CURVES], "learning rate": rates[:_MOST_CURVES]}


def best_evaluation(score: Score, lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The first of the best by the score; None where none is finite."""
    best = None
    for line in lines:
        value = line["metrics"].get(score.name, math.nan)
        if score.better(value, None if best is None else best["metrics"][score.name]):
            best = line
    return best
