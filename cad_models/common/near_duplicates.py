"""Near duplicates: parts of almost the same shape, wherever they lie, however large they are, and whichever axis is up.

A part is stood for by a few hundred well-spread points of its surface, centred and scaled to a root-mean-square radius of 1. Two parts are compared by the
mean distance from each one's points to the nearest of the other's, in units of the points' own spacing: two samples of one surface come to about 0.6, a
part with one more hole to a little more, another part to several. Most pairs never get so far: the quantiles of the distances within a part (D2 of Osada
et al., "Shape Distributions", 2002), which no motion changes, and those along its axes tell them apart.
"""

import itertools

import numpy as np
from jaxtyping import Float, Float16

NUM_POINTS = 512
"""Points that stand for a part."""
CLOSE = 0.55
"""Distance, in point spacings, up to which two parts count as near duplicates: on 497 real parts those are versions, sizes and mirror images of one part
(and, for want of details, some plain plates)."""

_NUM_PAIRS = 8_192
_D2_QUANTILES = 16
_AXIS_QUANTILES = 17
# Mean differences of quantiles, in root-mean-square radii, beyond which two parts are not compared point by point: 95 % of the pairs of real parts whose
# surfaces lie within 0.55 spacings differ by less than 0.026 and 0.022.
_WIDEST_D2 = 0.03
_WIDEST_AXIS = 0.03
# Parts that one part is compared with, the most alike by D2: what is one cluster hangs together through its members.
_MOST_CANDIDATES = 32
_CHUNK = 1 << 14
# Motions compared point by point: parts that are nearly symmetric have several that the axes do not tell apart.
_NUM_MOTIONS = 2
_PERMUTATIONS = np.array(list(itertools.permutations(range(3))))


def shape_points(points: Float[np.ndarray, "n 3"]) -> Float16[np.ndarray, "512 3"]:
    """The stand-in of a part: a farthest-point sample of points on its surface, centred, of root-mean-square radius 1.

    Raises:
        ValueError: fewer than 512 points.
    """
    from cad_models.common.points import fps_order

    if len(points) < NUM_POINTS:
        raise ValueError(f"{len(points)} points, {NUM_POINTS} are needed")
    centred = points.astype(np.float64) - points.mean(axis=0, dtype=np.float64)
    radius = np.sqrt((centred**2).sum(axis=1).mean())
    unit = (centred / max(radius, 1e-12)).astype(np.float32)
    return unit[fps_order(unit, NUM_POINTS)[:NUM_POINTS]].astype(np.float16)


def near_duplicates(shapes: Float16[np.ndarray, "n 512 3"], most: float = CLOSE) -> list[tuple[int, int, float]]:
    """Pairs of parts whose surfaces are at most ``most`` point spacings apart, the closest first: ``(i, j, distance)`` with i < j.

    A part turned about or mirrored along the axes counts; one turned by any other angle does not.
    """
    from scipy.spatial import cKDTree

    if len(shapes) < 2:
        return []
    chosen = np.random.default_rng(0).integers(0, NUM_POINTS, (2, _NUM_PAIRS))
    d2 = np.empty((len(shapes), _D2_QUANTILES))
    axes = np.empty((len(shapes), 3, _AXIS_QUANTILES))
    for i, shape in enumerate(shapes):
        points = shape.astype(np.float32)
        lengths = np.linalg.norm(points[chosen[0]] - points[chosen[1]], axis=1)
        d2[i] = np.quantile(lengths, (np.arange(_D2_QUANTILES) + 0.5) / _D2_QUANTILES)
        axes[i] = np.quantile(points, (np.arange(_AXIS_QUANTILES) + 0.5) / _AXIS_QUANTILES, axis=0).T
    candidates = _candidates(d2, axes)
    trees: dict[int, tuple[cKDTree, float]] = {}

    def tree_of(i: int) -> tuple[cKDTree, float]:
        if i not in trees:
            points = shapes[i].astype(np.float64)
            tree = cKDTree(points)
            trees[i] = tree, float(tree.query(points, k=2)[0][:, 1].mean())
        return trees[i]

    found: list[tuple[int, int, float]] = []
    for i, j in candidates:
        (tree, spacing), (other, other_spacing) = tree_of(i), tree_of(j)
        distances = []
        for motion in _motions(axes[i], axes[j]):
            # tree.data are the points of i; those of j are moved onto them.
            moved = other.data @ motion.T
            there = tree.query(moved)[0].mean()
            if there > 2 * most * spacing:
                continue
            back = other.query(tree.data @ motion)[0].mean()
            distances.append((there + back) / (spacing + other_spacing))
        if distances and min(distances) <= most:
            found.append((i, j, float(min(distances))))
    return sorted(found, key=lambda pair: (pair[2], pair[0], pair[1]))


def _candidates(d2: np.ndarray, axes: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (i < j), sorted, that the quantiles do not tell apart."""
    from scipy.spatial import cKDTree

    count = min(len(d2), _MOST_CANDIDATES + 1)
    # p=1: the tree's distance is the sum of the differences, not their mean. Beyond the bound it gives len(d2) as index.
    _, nearest = cKDTree(d2).query(d2, k=count, p=1, distance_upper_bound=_WIDEST_D2 * _D2_QUANTILES)
    first = np.repeat(np.arange(len(d2)), count)
    second = nearest.reshape(-1)
    inside = (second < len(d2)) & (second != first)
    pairs = np.unique(np.sort(np.stack([first[inside], second[inside]], axis=1), axis=1), axis=0)
    kept = []
    for start in range(0, len(pairs), _CHUNK):
        chunk = pairs[start : start + _CHUNK]
        a, b = axes[chunk[:, 0]], axes[chunk[:, 1]]
        cost = np.minimum(_axis_cost(a, b), _axis_cost(a, -b[..., ::-1]))
        best = np.min([cost[:, np.arange(3), permutation].mean(axis=1) for permutation in _PERMUTATIONS], axis=0)
        kept += chunk[best <= _WIDEST_AXIS].tolist()
    return [(i, j) for i, j in kept]


def _axis_cost(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean differences of the quantiles [..., 3, q] along each axis of one part and each of the other: [..., axis of a, axis of b]."""
    return np.abs(a[..., :, None, :] - b[..., None, :, :]).mean(axis=-1)


def _motions(axes: np.ndarray, other: np.ndarray) -> list[np.ndarray]:
    """Signed permutations [3, 3] that may lay the other part's points onto this one's, the likeliest first."""
    straight, turned = _axis_cost(axes, other), _axis_cost(axes, -other[:, ::-1])
    options = []
    for permutation in _PERMUTATIONS:
        pairs = list(enumerate(permutation))
        for signs in itertools.product((1, -1), repeat=3):
            cost = sum((straight if sign > 0 else turned)[a, b] for (a, b), sign in zip(pairs, signs, strict=True)) / 3
            if cost <= _WIDEST_AXIS:
                motion = np.zeros((3, 3))
                for (a, b), sign in zip(pairs, signs, strict=True):
                    motion[a, b] = sign
                options.append((cost, len(options), motion))
    return [motion for _, _, motion in sorted(options, key=lambda option: option[:2])[:_NUM_MOTIONS]]
