"""Shape histograms: what chords of a shape's bounding sphere meet, and how far from its centre the surface lies.

The source system (prod-stories HW5) had them from a web service whose code was never published; the definitions below reproduce the invariants of
its published files (see the room's README for the comparison) and are this project's own.

All are taken in the *frame of the bounding sphere*: the smallest ball around the shape, scaled to diameter 1. They depend on no rotation (up to the
finite number of chords), translation or uniform scale. `Chords` are drawn uniformly: both ends uniform on the sphere (so that a chord's length l
has the density 2 l), those shorter than `SHORTEST_CHORD` left out: so close to the sphere they say little, and the published files have none.

``strict_outer``
    Depth of the first hit: the distance along a chord from where it enters the sphere to where it first meets the surface, in diameters, in
    [0, 1]. Over the chords that hit; sums to 1 (all zero if none hits).
``strict_outer_absolute``
    The same over all chords: ``strict_outer`` times the share of the chords that hit. For a convex body that share is the ratio of its
    surface to the sphere's (Cauchy), but for the short chords.
``missed``
    Lengths, in diameters, of the chords that hit nothing; sums to 1 (all zero if every chord hits).
``concentric_sphere``
    Distance of the surface from the sphere's centre, in radii: share of the area in concentric shells of equal thickness; sums to 1. A sphere has
    one shell.

Each for two *parts*: ``model``, the surface as it is, and ``hull``, its convex hull, in the hull's bounding sphere (which is the same).
"""

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from cad_models.common.meshes import BadMesh, Mesh
from cad_models.histograms.bounding_ball import smallest_enclosing_ball

PARTS = ("model", "hull")
KINDS = ("strict_outer", "strict_outer_absolute", "missed", "concentric_sphere")
BINS = (8, 16, 32, 64, 128)

SHORTEST_CHORD = 39 / 128
"""Diameters. All 356 published histograms are zero below it, with 128 bins, and none above."""

_NUM_AREA_SAMPLES = 1 << 14


@dataclass(frozen=True)
class Chords:
    """Chords of the sphere with diameter 1 about the origin.

    Attributes:
        starts: float32 [n, 3], where a chord enters.
        directions: float32 [n, 3], unit.
        lengths: float32 [n], in [SHORTEST_CHORD, 1].
    """

    starts: np.ndarray
    directions: np.ndarray
    lengths: np.ndarray


@functools.cache
def chords(log2_count: int) -> Chords:
    """About ``0.9 * 2**log2_count`` chords, always the same: a Sobol sequence spreads their ends evenly, so that bins are less noisy than
    random chords would make them.

    Args:
        log2_count: 4 … 20.
    """
    from scipy.stats import qmc

    uniform = qmc.Sobol(d=4, scramble=True, rng=np.random.default_rng(0)).random_base2(log2_count)
    ends = []
    for height, turn in ((uniform[:, 0], uniform[:, 1]), (uniform[:, 2], uniform[:, 3])):
        z, angle = 2 * height - 1, 2 * np.pi * turn
        radius = np.sqrt(np.maximum(0, 1 - z * z))
        ends.append(np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=1) / 2)
    across = ends[1] - ends[0]
    lengths = np.linalg.norm(across, axis=1)
    kept = lengths >= SHORTEST_CHORD
    directions = across[kept] / lengths[kept, None]
    return Chords(ends[0][kept].astype(np.float32), directions.astype(np.float32), lengths[kept].astype(np.float32))


@dataclass(frozen=True)
class ShapeMeasure:
    """What the histograms of one part are made of, in the frame of its bounding sphere.

    Attributes:
        depths: float64 [hits], where the chords that hit do so first, in diameters.
        missed: float64 [misses], lengths of the others.
        distances: float64 [samples], of evenly spread surface points from the sphere's centre, in radii.
    """

    depths: np.ndarray
    missed: np.ndarray
    distances: np.ndarray

    def histogram(self, kind: str, bins: int) -> Float[np.ndarray, " bins"]:
        """One histogram over [0, 1], float64.

        Raises:
            ValueError: an unknown kind.
        """
        if kind not in KINDS:
            raise ValueError(f"a histogram of kind {kind!r} is not known: {', '.join(KINDS)}")
        values = {"missed": self.missed, "concentric_sphere": self.distances}.get(kind, self.depths)
        # Rounding may carry a value just beyond 1; the last bin holds it.
        counts = np.bincount(np.minimum((values * bins).astype(np.int64), bins - 1), minlength=bins).astype(np.float64)
        total = len(self.depths) + len(self.missed) if kind == "strict_outer_absolute" else len(values)
        return counts / max(1, total)


def measure(
    vertices: Float[np.ndarray, "v 3"], faces: Int[np.ndarray, "f 3"], *, log2_chords: int = 14, ball: tuple[np.ndarray, float] | None = None
) -> ShapeMeasure:
    """Cast the chords at one closed or open surface, and spread points on it.

    Args:
        vertices: Any units and position.
        log2_chords: See :func:`chords`.
        ball: Centre and radius of the bounding sphere, where they are known.

    Raises:
        BadMesh: ``zero_area``: all vertices are one point.
    """
    from embreex.mesh_construction import TriangleMesh
    from embreex.rtcore_scene import EmbreeScene

    corners = vertices[faces]
    centre, radius = ball or smallest_enclosing_ball(np.unique(corners.reshape(-1, 3), axis=0))
    if not radius > 0:
        raise BadMesh("zero_area", "all vertices are one point")
    corners = (corners - centre) / (2 * radius)
    rays = chords(log2_chords)
    scene = EmbreeScene()
    TriangleMesh(scene, corners.astype(np.float32))
    found = scene.run(rays.starts, rays.directions, output=True)
    depth = found["tfar"].astype(np.float64)
    # A chord ends where it leaves the sphere; what lies beyond by rounding is no hit.
    hit = (found["primID"] >= 0) & (depth <= rays.lengths)
    distances = 2 * np.linalg.norm(surface_points(corners), axis=1)
    return ShapeMeasure(depths=depth[hit], missed=rays.lengths[~hit].astype(np.float64), distances=distances)


def surface_points(corners: Float[np.ndarray, "f 3 3"], count: int = _NUM_AREA_SAMPLES) -> Float[np.ndarray, "count 3"]:
    """Points evenly spread over the area, the same for the same triangles: systematic sampling along the list of faces, and within them the
    additive recurrence R2 (Roberts 2018)."""
    areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    cumulative = np.cumsum(areas)
    face = np.searchsorted(cumulative, (np.arange(count) + 0.5) / count * cumulative[-1])
    plastic = 1.32471795724474602596
    index = np.arange(1, count + 1)
    u, v = (0.5 + index / plastic) % 1, (0.5 + index / plastic**2) % 1
    root = np.sqrt(u)
    a, b, c = corners[face].transpose(1, 0, 2)
    return a * (1 - root)[:, None] + b * (root * (1 - v))[:, None] + c * (root * v)[:, None]


def convex_hull(vertices: Float[np.ndarray, "v 3"]) -> tuple[Float[np.ndarray, "h 3"], Int[np.ndarray, "f 3"]]:
    """The convex hull as a triangle mesh.

    Raises:
        BadMesh: ``zero_area``: the points are flat or a line.
    """
    from scipy.spatial import ConvexHull, QhullError

    try:
        hull = ConvexHull(vertices)
    except (QhullError, ValueError) as error:
        raise BadMesh("zero_area", "the shape is flat or a line: it has no convex hull with a volume") from error
    return vertices, hull.simplices.astype(np.int64)


def shape_histograms(mesh: Mesh, *, log2_chords: int = 14) -> dict[tuple[str, str, int], np.ndarray]:
    """All 40 histograms of a mesh: (part, kind, bins) -> float64 [bins], in the order of the published files."""
    vertices, faces = np.asarray(mesh.vertices, dtype=np.float64), np.asarray(mesh.faces)
    hull_vertices, hull_faces = convex_hull(vertices)
    # Only the hull's corners decide about the sphere, which is the same for both.
    ball = smallest_enclosing_ball(hull_vertices[np.unique(hull_faces)])
    parts = {"model": (vertices, faces), "hull": (hull_vertices, hull_faces)}
    measures = {name: measure(*part, log2_chords=log2_chords, ball=ball) for name, part in parts.items()}
    return {(part, kind, bins): measures[part].histogram(kind, bins) for part in PARTS for bins in BINS for kind in KINDS}
