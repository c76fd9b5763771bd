"""The smallest ball around a set of points, exactly."""

from itertools import combinations

import numpy as np
from jaxtyping import Float

_ROUNDING = 1e-10  # of the radius: how far outside a point may lie by rounding alone


def smallest_enclosing_ball(points: Float[np.ndarray, "n 3"]) -> tuple[Float[np.ndarray, " 3"], float]:
    """Centre and radius of the smallest ball that holds all points.

    An active-set method of the kind of Welzl (1991): the ball of at most four support points grows by the farthest point outside until
    there is none. Its radius rises strictly, so it ends; a few passes over the points suffice.

    Raises:
        ValueError: no points.
    """
    if not len(points):
        raise ValueError("the smallest ball around no points is not defined")
    points = np.asarray(points, dtype=np.float64)
    support = points[:1]
    centre, radius = points[0], 0.0
    while True:
        distance = np.linalg.norm(points - centre, axis=1)
        farthest = int(distance.argmax())
        if distance[farthest] <= radius * (1 + _ROUNDING):
            return centre, float(distance[farthest])
        grown = _smallest_ball_of_few(np.vstack([support, points[farthest]]))
        if grown[1] <= radius:  # only by rounding: nothing is left to gain
            return centre, float(distance[farthest])
        centre, radius, support = grown


def _smallest_ball_of_few(points: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """The same for at most five points, by trying which of them lie on the sphere."""
    best = None
    for size in range(1, min(4, len(points)) + 1):
        for chosen in combinations(range(len(points)), size):
            ball = _circumscribed(points[list(chosen)])
            if ball is None or (best is not None and ball[1] >= best[1]):
                continue
            if (np.linalg.norm(points - ball[0], axis=1) <= ball[1] * (1 + _ROUNDING) + 1e-300).all():
                best = (*ball, points[list(chosen)])
    if best is None:  # nearly coplanar points: the ball about their mean holds them, and the caller's loop goes on from it
        centre = points.mean(axis=0)
        return centre, float(np.linalg.norm(points - centre, axis=1).max()), points[:4]
    return best


def _circumscribed(points: np.ndarray) -> tuple[np.ndarray, float] | None:
    """The smallest sphere through all of 1 to 4 points; None where there is none."""
    edges = points[1:] - points[0]
    if not len(edges):
        return points[0], 0.0
    gram = edges @ edges.T
    if np.linalg.matrix_rank(gram, tol=1e-14 * gram.trace()) < len(edges):
        return None
    offset = np.linalg.solve(gram, np.diag(gram) / 2) @ edges
    return points[0] + offset, float(np.linalg.norm(offset))
