"""Bootstrap confidence intervals of shares that are sums over objects (B. Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979)."""

import numpy as np
from jaxtyping import Float

# Bound on the weights of one block of resamples: 2 MB.
_BLOCK_ELEMENTS = 1 << 18


def ratio_intervals(
    hits: Float[np.ndarray, "objects figures"],
    counts: Float[np.ndarray, "objects figures"],
    *,
    seed: int = 0,
    num_resamples: int = 1_000,
    coverage: float = 0.95,
) -> tuple[Float[np.ndarray, " figures"], Float[np.ndarray, " figures"]]:
    """Percentile intervals of ``hits.sum(0) / counts.sum(0)`` under resampling of whole objects.

    What an object contributes (six query images, say) is drawn or left out together, for it is not independent; figures share their resamples.

    Args:
        hits: What each object adds to each figure's numerator.
        counts: What each object adds to its denominator; not negative, with a positive sum.
        seed: Seeds the resamples: the same input gives the same interval.
        coverage: Share of the resamples between the bounds, in (0, 1).

    Returns:
        ``(low, high)``, float64 [figures]. A resample in which a figure has nothing to count does not count for it.

    Raises:
        ValueError: no objects, shapes that differ, or a figure without anything to count.
    """
    if hits.shape != counts.shape or len(hits) == 0:
        raise ValueError(f"hits {hits.shape} and counts {counts.shape} must be of one shape, with at least one object")
    if not (counts.sum(axis=0) > 0).all():
        raise ValueError("a figure has nothing to count: leave it out")
    num_objects = len(hits)
    rng = np.random.default_rng(seed)
    found = np.empty((num_resamples, hits.shape[1]))
    block = max(1, _BLOCK_ELEMENTS // num_objects)
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        drawn = rng.multinomial(num_objects, np.full(num_objects, 1 / num_objects), size=size).astype(np.float64)
        with np.errstate(invalid="ignore"):
            found[start : start + size] = (drawn @ hits) / (drawn @ counts)
    tail = (1 - coverage) / 2
    low, high = np.nanquantile(found, [tail, 1 - tail], axis=0)
    return low, high
