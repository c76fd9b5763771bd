"""Shape distributions, and the affine frame that makes them blind to non-uniform scale.

*Classical* shape distributions (Osada et al., "Shape Distributions", 2002) describe a surface by random samples of a simple function on it:
D1, the distance of a point from the centroid; D2, the distance of two points; A3, the angle at the middle one of three points. Rotation,
translation and uniform scale leave them as they are; a non-uniform scale does not.

In the *affine frame* it does not either: the shape is moved and stretched so that its solid convex hull has the centroid 0 and the covariance
matrix 1 ("whitening"). Every affine image of a shape has the same form in that frame, up to a
rotation, so D1, D2 and A3 taken there depend on the shape's affine class only. The hull is taken because it has a volume for open and
badly wound meshes, too.
"""

import numpy as np
from jaxtyping import Float, Integer

from cad_models.common.bounds import bounds
from cad_models.common.meshes import BadMesh
from cad_models.histograms.shape_histograms import convex_hull, surface_points

DISTRIBUTIONS = ("d1", "d2", "a3")
NUM_BINS = 64

# Ends of the bins: in mean distances for the classical distributions; in standard deviations of the solid hull in the affine frame, where no
# convex body reaches further than sqrt(3 * 5) = 3.9 from its centroid (a cone's apex does).
_CLASSICAL_ENDS = {"d1": 3.0, "d2": 3.0, "a3": np.pi}
_AFFINE_ENDS = {"d1": 4.0, "d2": 6.0, "a3": np.pi}


def hull_moments(vertices: Float[np.ndarray, "v 3"]) -> tuple[Float[np.ndarray, " 3"], Float[np.ndarray, "3 3"]]:
    """Centroid and covariance of the solid convex hull, uniform density; exact, by tetrahedra.

    Raises:
        BadMesh: the points are flat or a line.
    """
    points, faces = convex_hull(vertices)
    inside = points[np.unique(faces)].mean(axis=0)
    corners = points[faces] - inside
    # From an inner point all tetrahedra of a convex body have volumes of one sign, however the faces are wound.
    volumes = np.abs(np.linalg.det(corners)) / 6
    sums = corners.sum(axis=1)
    volume = volumes.sum()
    mean = (volumes @ sums) / (4 * volume)
    second = np.einsum("f,fci,fcj->ij", volumes, corners, corners) + np.einsum("f,fi,fj->ij", volumes, sums, sums)
    return inside + mean, second / (20 * volume) - np.outer(mean, mean)


def affine_frame(vertices: Float[np.ndarray, "v 3"]) -> Float[np.ndarray, "v 3"]:
    """The points moved and stretched so that their solid convex hull has centroid 0 and covariance 1.

    Raises:
        BadMesh: ``zero_extent`` where the hull is so flat that the stretch would only enlarge rounding errors.
    """
    # A unit box first: neither huge nor tiny units must overflow.
    low, high = bounds(vertices)
    extent = (high - low).max()
    if not extent > 0:
        raise BadMesh("zero_extent", "all vertices are one point")
    unit = (vertices - (low + high) / 2) / extent
    centroid, covariance = hull_moments(unit)
    values, axes = np.linalg.eigh(covariance)
    if values[0] < 1e-12 * values[-1]:
        raise BadMesh("zero_area", f"flat: a million times thinner than long ({np.sqrt(values[0]):.1e} of {np.sqrt(values[-1]):.1e})")
    return (unit - centroid) @ axes / np.sqrt(values)


def shape_distributions(
    vertices: Float[np.ndarray, "v 3"], faces: Integer[np.ndarray, "f 3"], *, affine: bool
) -> Float[np.ndarray, "3 bins"]:
    """D1, D2 and A3 of a surface, float64 [3, `NUM_BINS`], each summing to 1.

    Args:
        affine: take them in the affine frame; otherwise in the shape's own, with lengths in mean distances of their kind.

    Raises:
        BadMesh: see :func:`affine_frame`.
    """
    placed = affine_frame(vertices) if affine else vertices - vertices.mean(axis=0)
    points = surface_points(placed[faces])
    # Neighbours in the list are neighbours on the surface; fixed random orders make independent pairs and triples of them.
    first, second = (points[np.random.default_rng(i).permutation(len(points))] for i in (1, 2))
    centre = 0 if affine else points.mean(axis=0)
    to_first, to_second = first - points, second - points
    lengths = np.linalg.norm(to_first, axis=1), np.linalg.norm(to_second, axis=1)
    cosine = np.einsum("ni,ni->n", to_first, to_second) / np.maximum(lengths[0] * lengths[1], 1e-300)
    values = {"d1": np.linalg.norm(points - centre, axis=1), "d2": lengths[0], "a3": np.arccos(np.clip(cosine, -1, 1))}
    rows = []
    for name in DISTRIBUTIONS:
        value, end = values[name], (_AFFINE_ENDS if affine else _CLASSICAL_ENDS)[name]
        if not affine and name != "a3":
            value = value / max(1e-300, value.mean())
        place = np.minimum((value * (NUM_BINS / end)).astype(np.int64), NUM_BINS - 1)
        rows.append(np.bincount(place, minlength=NUM_BINS) / len(value))
    return np.stack(rows)
