"""A run's report: confusion table, ROC curves, calibration, precision and recall of each class, as pictures and as one page that stands alone."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cad_models.images.metrics import NUM_BINS, calibration
from cad_models.task import Predictions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More classes than these make a table or a legend that nobody reads.
_MOST_CELLS_WRITTEN, _MOST_CURVES = 20, 10

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222}table{border-collapse:collapse;margin:.5rem 0 1.5rem}
td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child{text-align:left}img{max-width:100%;margin:.3rem 1rem .3rem 0}
.row{display:flex;flex-wrap:wrap;align-items:flex-start}"""


def build_report(predictions: Mapping[str, Predictions], class_names: Sequence[str], metrics: Mapping[str, float]) -> dict[str, bytes]:
    """``index.html`` and, for each split, ``confusion_<split>.png``, ``roc_<split>.png``, ``calibration_<split>.png``, ``classes_<split>.csv``.

    Args:
        metrics: ``<split>/<name>``, for the page's table.
    """
    files: dict[str, bytes] = {}
    body = []
    for split, predicted in predictions.items():
        probabilities, label = predicted["probabilities"], predicted["label"]
        pictures = {
            f"confusion_{split}.png": _png(confusion_figure(probabilities, label, class_names)),
            f"roc_{split}.png": _png(roc_figure(probabilities, label, class_names)),
            f"calibration_{split}.png": _png(calibration_figure(probabilities, label)),
        }
        table = class_table(probabilities, label, class_names)
        files |= pictures
        files[f"classes_{split}.csv"] = _csv(table)
        body.append(f"<h2>{html.escape(split)}: {len(label):,} pictures</h2>{_metric_table(split, metrics)}{_html_table(table)}<div class='row'>")
        body += [
            f"<img alt='{name}' src='data:image/png;base64,{base64.b64encode(data).decode()}'>" for name, data in pictures.items()
        ]
        body.append("</div>")
    page = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Image classifier</title><style>{_STYLE}</style><h1>Image classifier</h1>"
    files["index.html"] = (page + "".join(body) + "</html>\n").encode()
    return files


def class_table(probabilities: np.ndarray, label: np.ndarray, class_names: Sequence[str]) -> list[list[Any]]:
    """Header and a row a class: precision, recall, F1 (0 where undefined), number of pictures and of answers."""
    from sklearn.metrics import precision_recall_fscore_support

    answer, classes = probabilities.argmax(axis=1), np.arange(len(class_names))
    precision, recall, f1, support = precision_recall_fscore_support(label, answer, labels=classes, zero_division=0.0)
    answers = np.bincount(answer, minlength=len(classes))
    rows = [
        [name, f"{p:.3f}", f"{r:.3f}", f"{f:.3f}", int(n), int(a)]
        for name, p, r, f, n, a in zip(class_names, precision, recall, f1, support, answers, strict=True)
    ]
    return [["class", "precision", "recall", "f1", "pictures", "answers"], *rows]


def confusion_figure(probabilities: np.ndarray, label: np.ndarray, class_names: Sequence[str]) -> "Figure":
    """Counts, coloured by their share of the true class."""
    count = np.zeros((len(class_names), len(class_names)), dtype=np.int64)
    np.add.at(count, (label, probabilities.argmax(axis=1)), 1)
    share = count / np.maximum(1, count.sum(axis=1, keepdims=True))
    side = float(np.clip(2.5 + 0.45 * len(class_names), 4.0, 14.0))
    figure, axes = _figure(side + 0.8, side)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    axes.set_xticks(range(len(class_names)), class_names, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(class_names)), class_names)
    axes.set(xlabel="answer", ylabel="truth", title="Confusion")
    if len(class_names) <= _MOST_CELLS_WRITTEN:
        for y, x in zip(*np.nonzero(count), strict=True):
            axes.text(x, y, str(count[y, x]), ha="center", va="center", fontsize=8, color="white" if share[y, x] > 0.5 else "black")
    return figure


def roc_figure(probabilities: np.ndarray, label: np.ndarray, class_names: Sequence[str]) -> "Figure":
    """Each class against the rest (of two classes: the second); the ten most frequent."""
    from sklearn.metrics import auc, roc_curve

    figure, axes = _figure(5.2, 4.6)
    counts = np.bincount(label, minlength=len(class_names))
    classes = [1] if len(class_names) == 2 else list(np.argsort(-counts, kind="stable")[:_MOST_CURVES])
    for c in classes:
        if 0 < counts[c] < len(label):
            false, true, _ = roc_curve(label == c, probabilities[:, c])
            axes.plot(false, true, linewidth=1.2, label=f"{class_names[c]} ({auc(false, true):.3f})")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, linestyle="--")
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC, class against the rest (area)", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, loc="lower right")
    return figure


def calibration_figure(probabilities: np.ndarray, label: np.ndarray) -> "Figure":
    """Share of right answers by their probability, and how many there are."""
    found = calibration(probabilities, label)
    figure, axes = _figure(5.2, 4.6)
    centers = (np.arange(NUM_BINS) + 0.5) / NUM_BINS
    axes.bar(centers, found.count / max(1, found.count.sum()), width=0.9 / NUM_BINS, color="0.85", label="share of the pictures")
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle="--")
    seen = found.count > 0
    axes.plot(found.confidence[seen], found.accuracy[seen], marker="o", markersize=4, label="right answers")
    axes.set(xlabel="probability of the answer", ylabel="share", title=f"Calibration (error {found.error:.3f})", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(fontsize=8, loc="best", framealpha=0.6)
    return figure


def _figure(width: float, height: float) -> tuple["Figure", Any]:
    # Not pyplot: it keeps global state, and would look for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _png(figure: "Figure") -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()


def _csv(table: list[list[Any]]) -> bytes:
    import csv

    sink = io.StringIO()
    csv.writer(sink, lineterminator="\n").writerows(table)
    return sink.getvalue().encode()


def _html_table(table: list[list[Any]]) -> str:
    head, *rows = table
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return "<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + f"</tr>{cells}</table>"


def _metric_table(split: str, metrics: Mapping[str, float]) -> str:
    names = ("macro_f1", "accuracy", "macro_precision", "macro_recall", "roc_auc", "log_loss", "ece")
    own = [(name, metrics[f"{split}/{name}"]) for name in names if f"{split}/{name}" in metrics]
    return _html_table([["metric", "value"], *[[name, f"{value:.4f}"] for name, value in own]]) if own else ""
