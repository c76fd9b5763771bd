"""Query-bank normalisation: scores of a gallery object weighed by how much it attracts queries in general (hubness).

Dynamic inverted softmax of Bogolin et al., "Cross Modal Retrieval with Querybank Normalisation" (CVPR 2022, arXiv:2112.12777). The bank holds queries of
the training split: nothing of the queries that are measured is looked at, and one query alone is answered as among others.
"""

import numpy as np
from jaxtyping import Float


def bank_normalised(
    scores: Float[np.ndarray, "queries gallery"], bank: Float[np.ndarray, "bank gallery"], *, temperature: float = 0.05
) -> Float[np.ndarray, "queries gallery"]:
    """Logarithms of ``exp(score / temperature) / Σ_bank exp(bank score / temperature)``, for queries whose best object is a hub; others stay as they are.

    A hub is an object that is the best for at least one query of the bank. Rows are comparable within themselves only.

    Args:
        scores: Of the queries against the gallery.
        bank: Of the bank's queries against the same gallery.
        temperature: Above 0; the smaller, the more the hubs lose.

    Raises:
        ValueError: the bank is empty, or ``temperature`` is not positive.
    """
    if len(bank) == 0:
        raise ValueError("the bank has no queries: give those of the training split")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be above 0")
    logits = bank.astype(np.float64) / temperature
    highest = logits.max(axis=0)
    attraction = highest + np.log(np.exp(logits - highest).sum(axis=0))
    is_hub = np.zeros(scores.shape[1], dtype=bool)
    is_hub[bank.argmax(axis=1)] = True
    weighed = scores.astype(np.float64) / temperature - attraction
    return np.where(is_hub[scores.argmax(axis=1)][:, None], weighed, scores.astype(np.float64) / temperature)
