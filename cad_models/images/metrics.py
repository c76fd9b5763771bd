"""Metrics of a classifier on a whole split. Pure functions of probabilities and labels; scikit-learn's definitions."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

NUM_BINS = 15
"""Of the calibration error and its diagram."""


def classification_metrics(probabilities: Float[np.ndarray, "objects classes"], label: Int[np.ndarray, " objects"]) -> dict[str, float]:
    """``macro_f1``, ``accuracy``, ``macro_precision``, ``macro_recall``, ``min_class_f1``, ``log_loss``, ``ece`` and ``roc_auc``.

    Macro means are over the classes that occur in the labels or the answers, as ``sklearn.metrics.f1_score``; a quotient 0/0 counts as 0. The answer is
    the most probable class, the first among equals. ``roc_auc`` is the mean over the classes against the rest; without two classes in the labels it is
    undefined and 0.5 is given.
    """
    from sklearn.metrics import log_loss, precision_recall_fscore_support

    answer = probabilities.argmax(axis=1)
    precision, recall, f1, _ = precision_recall_fscore_support(label, answer, average=None, zero_division=0.0)
    # Clipped before the logarithm: one certain mistake must not make the mean infinite.
    certain = np.clip(probabilities.astype(np.float64), 1e-7, 1.0)
    return {
        "macro_f1": float(np.mean(f1)),
        "accuracy": float(np.mean(answer == label)),
        "macro_precision": float(np.mean(precision)),
        "macro_recall": float(np.mean(recall)),
        "min_class_f1": float(np.min(f1)),
        "log_loss": float(log_loss(label, certain / certain.sum(axis=1, keepdims=True), labels=np.arange(probabilities.shape[1]))),
        "ece": calibration(probabilities, label).error,
        "roc_auc": mean_roc_auc(probabilities, label),
    }


def mean_roc_auc(probabilities: Float[np.ndarray, "objects classes"], label: Int[np.ndarray, " objects"]) -> float:
    """Mean over the classes (that some but not all objects have) of the area under the ROC of that class against the rest; 0.5 when there is none."""
    from sklearn.metrics import roc_auc_score

    areas = [
        roc_auc_score(label == c, probabilities[:, c])
        for c in range(probabilities.shape[1])
        if 0 < np.count_nonzero(label == c) < len(label)
    ]
    return float(np.mean(areas)) if areas else 0.5


@dataclass(frozen=True)
class Calibration:
    """The reliability diagram of the answers' probabilities, in `NUM_BINS` equal bins."""

    confidence: np.ndarray
    """Mean probability of the answers in each bin; NaN where there is none."""
    accuracy: np.ndarray
    """Share of right answers in each bin; NaN where there is none."""
    count: np.ndarray
    error: float
    """Expected calibration error: the mean of their distance, by objects (Guo et al., arXiv:1706.04599)."""


def calibration(probabilities: Float[np.ndarray, "objects classes"], label: Int[np.ndarray, " objects"]) -> Calibration:
    """Of the most probable class."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == label
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    count = np.bincount(bins, minlength=NUM_BINS)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(bins, weights=confidence, minlength=NUM_BINS) / count
        share = np.bincount(bins, weights=right, minlength=NUM_BINS) / count
    error = float(np.nansum(np.abs(mean - share) * count) / max(1, len(label)))
    return Calibration(mean, share, count, error)


def chance_metrics(label: Int[np.ndarray, " objects"], num_classes: int) -> dict[str, float]:
    """Of who always answers the most frequent class, with the classes' shares as probabilities."""
    shares = np.bincount(label, minlength=num_classes) / max(1, len(label))
    return classification_metrics(np.tile(shares, (len(label), 1)), label)
