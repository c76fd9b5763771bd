"""Ranks and average precision from a matrix of scores of any kind (`cad_models.common.retrieval` has them for inner products, without the matrix).

Ties count against the query: an irrelevant item with the score of a relevant one stands before it. Scores are compared as float32.
"""

import numpy as np
from jaxtyping import Bool, Float, Int64


def score_ranks(
    scores: Float[np.ndarray, "queries items"],
    relevant: Bool[np.ndarray, "queries items"],
    allowed: Bool[np.ndarray, "queries items"] | None = None,
) -> Int64[np.ndarray, " queries"]:
    """Rank, from 1, of each query's best relevant item among the allowed ones (None = all).

    >>> score_ranks(np.array([[0.9, 0.5, 0.5]]), np.array([[False, True, False]])).tolist()
    [3]

    Raises:
        ValueError: a query has no relevant item that is allowed.
    """
    scores, wanted, others = _checked(scores, relevant, allowed)
    best = np.where(wanted, scores, -np.inf).max(axis=1, keepdims=True)
    return 1 + (others & (scores >= best)).sum(axis=1)


def average_precisions(
    scores: Float[np.ndarray, "queries items"],
    relevant: Bool[np.ndarray, "queries items"],
    allowed: Bool[np.ndarray, "queries items"] | None = None,
) -> Float[np.ndarray, " queries"]:
    """Mean, over each query's relevant items, of the precision among the items up to it; in (0, 1].

    >>> average_precisions(np.array([[0.9, 0.7, 0.5]]), np.array([[True, False, True]])).tolist()
    [0.8333333333333333]

    Raises:
        ValueError: as `score_ranks`.
    """
    scores, wanted, others = _checked(scores, relevant, allowed)
    found = np.empty(len(scores))
    for i, row in enumerate(scores):
        hits = np.sort(row[wanted[i]])[::-1]
        before = (row[others[i]][None, :] >= hits[:, None]).sum(axis=1)
        number = np.arange(1, len(hits) + 1)
        found[i] = (number / (number + before)).mean()
    return found


def _checked(scores: np.ndarray, relevant: np.ndarray, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    wanted = relevant if allowed is None else relevant & allowed
    without = np.flatnonzero(~wanted.any(axis=1))
    if len(without):
        raise ValueError(f"query {without[0]} has no relevant item: leave queries without a rank out")
    return scores.astype(np.float32), wanted, ~relevant if allowed is None else ~relevant & allowed
