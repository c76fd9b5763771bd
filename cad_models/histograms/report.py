"""Pictures of embeddings and clusters, and the page that shows them."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cad_models.histograms.metrics import class_centres, cluster, evenly_spaced
from cad_models.task import Predictions

_MOST_LEAVES = 200  # a dendrogram with more is a grey block
_DPI = 110


def confusion_table(
    predictions: Predictions, reference: Predictions, num_classes: int
) -> Int[np.ndarray, "num_classes num_classes"]:
    """Objects by class (rows) and by the nearest class centre of the reference (columns)."""
    centres = class_centres(reference["embedding"], reference["label"], num_classes)
    known = np.bincount(reference["label"], minlength=num_classes) > 0
    scores = np.where(known, predictions["embedding"].astype(np.float64) @ centres.T, -np.inf)
    return _crossed(predictions["label"], scores.argmax(axis=1), num_classes, num_classes)


def _crossed(rows: np.ndarray, columns: np.ndarray, num_rows: int, num_columns: int) -> np.ndarray:
    table = np.zeros((num_rows, num_columns), dtype=np.int64)
    np.add.at(table, (rows, columns), 1)
    return table


def principal_plane(embeddings: Float[np.ndarray, "n dim"]) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, " 2"]]:
    """Coordinates on the first two principal axes, and the shares of the variance that they hold (0 for embeddings that are all equal).

    Each axis points to where its largest loading is positive, so that the picture does not depend on the solver."""
    centred = embeddings.astype(np.float64) - embeddings.mean(axis=0, dtype=np.float64)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2] * np.sign(axes[np.arange(len(axes[:2])), np.abs(axes[:2]).argmax(axis=1)])[:, None]
    share = singular[:2] ** 2 / max(1e-30, (singular**2).sum())
    plane = np.zeros((len(centred), 2))
    plane[:, : len(axes)] = centred @ axes.T
    return plane, np.pad(share, (0, 2 - len(share)))


def pictures(split: str, predictions: Predictions, reference: Predictions, class_names: Sequence[str], num_clusters: int) -> dict[str, bytes]:
    """PNG files of one split: scatter, dendrogram, confusion by nearest centre, clusters beside classes.

    Args:
        num_clusters: 0 = as many as the split has classes.
    """
    chosen = evenly_spaced(len(predictions["label"]))
    embeddings, labels = predictions["embedding"][chosen], predictions["label"][chosen]
    wanted = num_clusters or len(np.unique(labels))
    clusters = cluster(embeddings, wanted)
    by_cluster = _crossed(labels, clusters, len(class_names), int(clusters.max()) + 1)
    return {
        f"{split}_scatter.png": _scatter(embeddings, labels, class_names, split),
        f"{split}_dendrogram.png": _dendrogram(embeddings, labels, class_names, split, wanted),
        f"{split}_confusion.png": _table_picture(
            confusion_table(predictions, reference, len(class_names)), class_names, class_names, f"{split}: nearest class centre", "predicted"
        ),
        f"{split}_clusters.png": _table_picture(
            by_cluster, class_names, [str(i) for i in range(by_cluster.shape[1])], f"{split}: agglomerative clusters", "cluster"
        ),
    }


def report(
    predictions: Mapping[str, Predictions], *, reference_split: str, class_names: Sequence[str], num_clusters: int, metrics: Mapping[str, float]
) -> dict[str, bytes]:
    """All pictures and ``index.html``, which holds them."""
    files: dict[str, bytes] = {}
    for split, predicted in predictions.items():
        if split != reference_split:
            files |= pictures(split, predicted, predictions[reference_split], class_names, num_clusters)
    names = sorted({name.split("/", 1)[1] for name in metrics if name.split("/", 1)[0] in predictions and "seconds" not in name})
    splits = [split for split in predictions if any(name.startswith(f"{split}/") for name in metrics)]
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{_number(metrics.get(f'{split}/{name}'))}</td>" for split in splits) + "</tr>"
        for name in names
        if any(f"{split}/{name}" in metrics and split != reference_split for split in splits)
    )
    images = "".join(
        f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(data).decode()}"></figure>'
        for name, data in files.items()
    )
    heads = "".join(f"<th>{html.escape(split)}</th>" for split in splits)
    files["index.html"] = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        "<title>Shape histograms: embeddings and clusters</title><style>body{font:15px/1.45 system-ui,sans-serif;margin:1rem auto;max-width:1200px;"
        "padding:0 1rem}table{border-collapse:collapse}td,th{padding:.2rem .8rem;border-bottom:1px solid #8884;text-align:left}figure{display:inline-block;"
        "margin:.5rem;vertical-align:top}img{max-width:100%;width:540px;background:#fff}</style></head><body>"
        "<h1>Shape histograms: embeddings and clusters</h1>"
        f"<p>Best checkpoint. Class centres are those of the {html.escape(reference_split)} split. Clusters: agglomerative, cosine distance, complete linkage. "
        f"Classes: {html.escape(', '.join(class_names))}.</p><table><tr><th>metric</th>{heads}</tr>{rows}</table>{images}</body></html>\n"
    ).encode()
    return files


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


# --- pictures -----------------------------------------------------------------------------------------------------------------------------
def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI, metadata={"Software": None})
    return stream.getvalue()


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["tab10" if count <= 10 else "tab20"](i % 20) for i in range(count)]


def _scatter(embeddings: np.ndarray, labels: np.ndarray, class_names: Sequence[str], split: str) -> bytes:
    from matplotlib.figure import Figure

    plane, share = principal_plane(embeddings)
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    for number, (name, colour) in enumerate(zip(class_names, _colours(len(class_names)), strict=True)):
        chosen = labels == number
        if chosen.any():
            axes.scatter(*plane[chosen].T, s=16, color=colour, label=f"{name} ({int(chosen.sum())})", linewidths=0)
    axes.set_xlabel(f"1st principal axis ({100 * share[0]:.0f} % of the variance)")
    axes.set_ylabel(f"2nd principal axis ({100 * share[1]:.0f} %)")
    axes.set_title(f"{split}: embeddings")
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(fontsize=8)
    return _png(figure)


def _dendrogram(embeddings: np.ndarray, labels: np.ndarray, class_names: Sequence[str], split: str, num_clusters: int) -> bytes:
    from matplotlib.figure import Figure
    from scipy.cluster.hierarchy import dendrogram, linkage

    chosen = evenly_spaced(len(labels), _MOST_LEAVES)
    embeddings, labels = embeddings[chosen].astype(np.float64), labels[chosen]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(f"{split}: complete linkage, cosine distance ({len(labels)} shapes; the line cuts {num_clusters} clusters)")
    if len(labels) > 1:
        tree = linkage(embeddings, method="complete", metric="cosine")
        drawn = dendrogram(tree, ax=axes, no_labels=True, color_threshold=0, above_threshold_color="#666")
        if 1 < num_clusters <= len(labels):
            heights = np.append(tree[:, 2], tree[-1, 2] * 1.02)
            axes.axhline((heights[-num_clusters - 1] + heights[-num_clusters]) / 2 if num_clusters < len(labels) else 0, color="#c33", lw=1, ls="--")
        # Leaves stand at 5, 15, 25 …: a strip below tells their classes.
        colours = _colours(len(class_names))
        below = -0.04 * max(1e-9, tree[-1, 2])
        axes.scatter(5 + 10 * np.arange(len(labels)), np.full(len(labels), below), c=[colours[labels[i]] for i in drawn["leaves"]], marker="s", s=14)
        axes.set_ylim(bottom=2 * below)
        for number in np.unique(labels):
            axes.scatter([], [], color=colours[number], marker="s", label=class_names[number])
        axes.legend(fontsize=8, loc="upper right")
    axes.set_ylabel("distance")
    return _png(figure)


def _table_picture(table: np.ndarray, row_names: Sequence[str], column_names: Sequence[str], title: str, below: str) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.8 + 0.65 * len(column_names), 1.6 + 0.45 * len(row_names)), layout="constrained")
    axes = figure.subplots()
    shares = table / np.maximum(1, table.sum(axis=1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(*table.shape):
        if table[row, column]:
            axes.text(column, row, str(table[row, column]), ha="center", va="center", color="white" if shares[row, column] > 0.6 else "black", fontsize=9)
    axes.set_xticks(range(len(column_names)), column_names, rotation=45 if max(map(len, column_names)) > 3 else 0)
    axes.set_yticks(range(len(row_names)), row_names)
    axes.set_xlabel(below)
    axes.set_ylabel("class")
    axes.set_title(title, fontsize=10)
    return _png(figure)
