"""The bounding box of points, in one pass of compiled code: numpy's minimum along the long axis of an array of triples takes many times as long."""

from typing import no_type_check

import numpy as np
from jaxtyping import Float
from numba import njit


def bounds(points: Float[np.ndarray, "n 3"]) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    """Lowest and highest coordinates, in the points' dtype; NaN where a coordinate is NaN. Raises ValueError without points, or where they are no triples."""
    if points.ndim != 2 or points.shape[1] != 3 or len(points) == 0:  # compiled code does not check bounds
        raise ValueError(f"an array of shape {points.shape} has no bounding box in space: [n, 3] with at least one point is needed")
    return _bounds(points)


@njit(cache=True, nogil=True)
@no_type_check  # type checkers would wrap what numba must compile
def _bounds(points):
    low, high = points[0].copy(), points[0].copy()
    for i in range(len(points)):
        for axis in range(3):
            value = points[i, axis]
            if value < low[axis] or value != value:
                low[axis] = value
            if value > high[axis] or value != value:
                high[axis] = value
    return low, high


@njit(cache=True, nogil=True)
@no_type_check
def moved_and_scaled(points, shift, scale):
    """``(points - shift) / scale`` of float64 [n, 3], [3] and a number: the same bits, without numpy's loop over rows of three."""
    found = np.empty_like(points)
    for i in range(len(points)):
        for axis in range(3):
            found[i, axis] = (points[i, axis] - shift[axis]) / scale
    return found
