"""Triangle meshes: loading with checks, geometry facts, the unit sphere, and exact duplicates.

Bytes go in, so a local file and an object in a store are the same. What comes out is checked: indices in range, finite, some extent, some
area; what does not pass raises :class:`BadMesh` with a reason of a closed list. Nothing here depends on the scale of the coordinates: parts
come in metres, millimetres and worse.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from cad_models.common.mesh_formats import MESH_REASONS, MESH_SUFFIXES, BadMesh, check_num_faces, read_raw

__all__ = [
    "MESH_REASONS", "MESH_SUFFIXES", "BadMesh", "Mesh", "MeshFacts", "geometry_signature", "group_duplicates", "load_mesh", "mesh_facts",
    "normalized", "read_mesh",
]  # fmt: skip

_CHUNK = 1 << 18  # faces worked on at a time, so that temporary arrays stay small
_SAME_VERTEX = 1e-7  # difference of coordinates, in half extents, that float32 cannot resolve at the far side of a part
_FLATTEST = 1e-13  # height over longest edge below which a triangle has no area: 500 roundings of float64


def _no_faces() -> np.ndarray:
    return np.empty((0, 3), np.int32)


@dataclass(frozen=True, eq=False)
class Mesh:
    """A surface of triangles.

    Attributes:
        vertices: float64 [V, 3], finite, file units and axes; not merged: an STL has three for every face.
        faces: int32 [F, 3], F > 0, indices in range, every face with an area.
        warnings: what was tolerated or changed while loading, for people.
        degenerate_faces: int32 [D, 3], the file's faces without area. They carry no surface, but a mesh may be closed only with them.
    """

    vertices: np.ndarray
    faces: np.ndarray
    warnings: tuple[str, ...] = ()
    degenerate_faces: np.ndarray = field(default_factory=_no_faces)


@dataclass(frozen=True)
class MeshFacts:
    """What can be said of a mesh in a few numbers; lengths in file units.

    Attributes:
        num_vertices: distinct positions.
        num_faces: faces of the file, those without area included: the same number for every copy of a file.
        volume: absolute enclosed volume; 0.0 unless the mesh is watertight with one winding (an open mesh encloses nothing).
        area: of the surface.
        extents: sides of the bounding box.
        watertight: every edge belongs to exactly two faces, after merging equal positions.
        num_bodies: parts that no edge connects.
        warnings: the mesh's warnings, and what was found here ("not watertight", ...).
    """

    num_vertices: int
    num_faces: int
    volume: float
    area: float
    extents: tuple[float, float, float]
    watertight: bool
    num_bodies: int
    warnings: tuple[str, ...]


def read_mesh(path: str | Path, *, max_faces: int = 20_000_000) -> Mesh:
    """:func:`load_mesh` of a local file, by its suffix in any case.

    Raises:
        BadMesh: see :func:`load_mesh`.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    return load_mesh(path.read_bytes(), path.suffix, max_faces=max_faces)


def load_mesh(data: bytes, suffix: str, *, max_faces: int = 20_000_000) -> Mesh:
    """Reads and checks the mesh in ``data``.

    Faces without area are set apart and vertices that no face uses are dropped, both with a warning; all bodies and all instances of a scene
    become one mesh. Polygons are cut into triangles.

    Args:
        data: the whole file.
        suffix: its format, one of :data:`MESH_SUFFIXES` in any case, with the dot.
        max_faces: limit of triangles; more are rejected, not thinned out.

    Raises:
        BadMesh: with one of :data:`MESH_REASONS`.
    """
    raw = read_raw(data, suffix, max_faces)
    vertices = np.ascontiguousarray(raw.vertices, np.float64)
    faces = raw.faces
    warnings = list(raw.warnings)
    if len(faces) == 0:
        raise BadMesh("no_faces", f"{len(vertices)} vertices and no face")
    check_num_faces(len(faces), max_faces)
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise BadMesh("index_out_of_range", f"faces refer to vertices {faces.min()} to {faces.max()} of {len(vertices)}")
    used = np.zeros(len(vertices), bool)
    used[faces.reshape(-1)] = True
    if not used.all():
        warnings.append(f"{int((~used).sum())} vertices that no face uses dropped")
        faces = (np.cumsum(used) - 1)[faces]
        vertices = vertices[used]
    if not np.isfinite(vertices).all():
        broken = int((~np.isfinite(vertices)).any(axis=1).sum())
        raise BadMesh("non_finite", f"{broken} of {len(vertices)} vertices have NaN or infinite coordinates")
    faces = np.ascontiguousarray(faces, np.int32)
    unit, _, half_extent = _in_unit_box(vertices)
    if half_extent == 0:
        raise BadMesh("zero_extent", f"all {len(vertices)} vertices are in one point, {vertices[0].tolist()}")
    has_area = _has_area(unit, faces)
    if not has_area.any():
        raise BadMesh("zero_area", f"all {len(faces)} faces are lines or points")
    degenerate = _no_faces()
    if not has_area.all():
        degenerate = faces[~has_area]
        faces = faces[has_area]
        warnings.append(f"{len(degenerate)} faces without area set apart")
    warnings.extend(_resolution_warnings(vertices, half_extent))
    return Mesh(vertices, faces, tuple(dict.fromkeys(warnings)), degenerate)


def _resolution_warnings(vertices: np.ndarray, half_extent: float) -> list[str]:
    """A warning where the part is so far from the origin that float32, in which most files store it, cannot resolve its details."""
    farthest = float(np.abs(vertices).max())
    if farthest > 1e30 or farthest * 2.0**-23 < 1e-4 * half_extent:
        return []
    if not np.array_equal(vertices.astype(np.float32), vertices):
        return []  # the file had more digits than float32
    step = farthest * 2.0**-23 / (2 * half_extent)
    return [f"{farthest:.3g} from the origin: coordinates are rounded to {100 * step:.2g} % of the size, details may be lost"]


def _in_unit_box(vertices: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Vertices moved into [-1, 1]^3 about the middle of their bounding box, the middle, and half of the longest side (0: one point)."""
    from cad_models.common.bounds import bounds, moved_and_scaled  # late: --help needs this module, not its compiler

    low, high = bounds(vertices)
    middle = low / 2 + high / 2  # halves first: low + high may overflow
    half_extent = float((high / 2 - low / 2).max())
    if half_extent == 0:
        return np.zeros_like(vertices), middle, 0.0
    # A division: the reciprocal of a subnormal overflows, and so may the square of anything beyond 1e154.
    return moved_and_scaled(vertices, middle, half_extent), middle, half_extent


def _cross_products(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Normals with twice the faces' areas as their lengths, float64 [n, 3]."""
    a, b, c = (vertices.take(faces[:, corner], axis=0) for corner in range(3))
    return np.cross(b - a, c - a)


def _lengths(vectors: np.ndarray) -> np.ndarray:
    """`numpy.linalg.norm` of rows of three, the same bits without its slow sums along the short axis."""
    return np.sqrt(vectors[:, 0] ** 2 + vectors[:, 1] ** 2 + vectors[:, 2] ** 2)


def _has_area(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """bool [F]: the triangle's height is more than rounding, compared with its longest edge."""
    has_area = np.empty(len(faces), bool)
    for start in range(0, len(faces), _CHUNK):
        chunk = faces[start : start + _CHUNK]
        a, b, c = (vertices.take(chunk[:, corner], axis=0) for corner in range(3))
        edges = np.stack([b - a, c - b, a - c])
        longest = np.einsum("exi,exi->ex", edges, edges).max(axis=0)
        double_area = _lengths(np.cross(edges[0], edges[2]))
        has_area[start : start + _CHUNK] = double_area > _FLATTEST * longest
    return has_area


def _area_and_centroid(vertices: np.ndarray, faces: np.ndarray) -> tuple[float, np.ndarray]:
    """Surface area, and the centroid of the surface (not of the volume: open meshes have one, too)."""
    area, moment = 0.0, np.zeros(3)
    for start in range(0, len(faces), _CHUNK):
        chunk = faces[start : start + _CHUNK]
        a, b, c = (vertices.take(chunk[:, corner], axis=0) for corner in range(3))
        areas = _lengths(np.cross(b - a, c - a)) / 2  # corners are needed below too
        centres = (a + b + c) / 3
        area += float(areas.sum())
        moment += areas @ centres
    return area, moment / area


def normalized(mesh: Mesh) -> Mesh:
    """The mesh with the centroid of its surface at the origin and its farthest vertex at distance 1; axes unchanged, float64 throughout.

    The centroid is that of the surface, weighted by area: the mean of points sampled evenly on it, by which point clouds are centred.
    """
    from cad_models.common.bounds import moved_and_scaled

    unit, _, _ = _in_unit_box(mesh.vertices)
    _, centroid = _area_and_centroid(unit, mesh.faces)
    centred = moved_and_scaled(unit, centroid, 1.0)
    radius = np.sqrt(np.einsum("vi,vi->v", centred, centred).max())
    return Mesh(centred / radius, mesh.faces, mesh.warnings, mesh.degenerate_faces)


def mesh_facts(mesh: Mesh) -> MeshFacts:
    """Counts, measures and topology of a mesh. Computed in a unit box, so that no coordinate is too large or too small to be squared."""
    from cad_models.common.bounds import bounds
    from cad_models.common.mesh_topology import closedness, merged_vertices, num_bodies

    unit, _, half_extent = _in_unit_box(mesh.vertices)
    warnings = list(mesh.warnings)
    vertex_of, num_vertices = merged_vertices(mesh.vertices)
    faces = np.concatenate([mesh.faces, mesh.degenerate_faces])
    topology = vertex_of[faces]
    watertight, consistent = closedness(topology, num_vertices)
    if not watertight:  # exporters that transform each facet by itself write the same vertex with other last digits
        near, num_near = merged_vertices(unit, tolerance=_SAME_VERTEX)
        if num_near < num_vertices and closedness(near[faces], num_near)[0]:
            vertex_of, num_vertices, topology = near, num_near, near[faces]
            watertight, consistent = closedness(topology, num_vertices)
    bodies = num_bodies(topology, num_vertices)
    if not watertight:
        warnings.append("not watertight: its volume is given as 0")
    elif not consistent:
        warnings.append("faces look to different sides: the volume is given as 0")
    unit_area, _ = _area_and_centroid(unit, mesh.faces)
    volume = 0.0
    if watertight and consistent:
        for start in range(0, len(mesh.faces), _CHUNK):
            a, b, c = (unit[mesh.faces[start : start + _CHUNK, corner]] for corner in range(3))
            volume += float(np.einsum("fi,fi->", a, np.cross(b, c))) / 6
    largest = float(np.finfo(np.float64).max)
    with np.errstate(over="ignore", under="ignore"):
        low, high = bounds(unit)
        extents = np.minimum((high - low) * half_extent, largest)
        return MeshFacts(
            num_vertices=num_vertices,
            num_faces=len(topology),
            volume=float(min(np.float64(abs(volume)) * half_extent * half_extent * half_extent, largest)),
            area=float(min(np.float64(unit_area) * half_extent * half_extent, largest)),
            extents=(float(extents[0]), float(extents[1]), float(extents[2])),
            watertight=watertight,
            num_bodies=bodies,
            warnings=tuple(warnings),
        )


# --- Exact duplicates -------------------------------------------------------------------------------------------------------------------
#
# The signature is a set of Fourier coefficients of the mesh: sums over faces of exp(i w . c), c the face's centre in coordinates that are
# free of position and scale, once with equal weights and once weighted by area. Sums do not know the order of faces, are smooth in every
# vertex (so rounding moves them by little, without boundaries at which a hash would jump), and change when any vertex moves. The directions
# of w come in sets that a mirror along an axis maps onto themselves, so that the coefficients of a mirror image are a permutation.

_NUM_HARMONICS = 3
_BASE_FREQUENCY = 2.0  # radians per root-mean-square radius
_DECIMAL_RESOLUTION = 5e-7  # ASCII files commonly carry 7 digits: coarser than float32's 6e-8
_COARSEST_RESOLUTION = 2e-5  # beyond it, rounding and real differences cannot be told apart


def _directions() -> np.ndarray:
    """[3, 12] unit vectors, none along an axis or a diagonal: three vectors, each with the four sign patterns that differ up to -1."""
    rows = [(0.31, 0.55, 0.78), (0.78, 0.31, 0.55), (0.55, 0.78, 0.31)]
    signs = [(1, 1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1)]
    directions = np.array([[x * i, y * j, z * k] for x, y, z in rows for i, j, k in signs])
    return (directions / np.linalg.norm(directions, axis=1, keepdims=True)).T


def geometry_signature(mesh: Mesh) -> Float[np.ndarray, " k"]:
    """A fingerprint of the triangulated shape: the same, up to rounding, wherever and however large the part is, in whatever order and
    format its faces are stored. Rotated and mirrored copies, and other triangulations of the same surface, have other signatures.

    Returns:
        float64 [1 + 144]. First the resolution of the coordinates in units of the part's size, which tells :func:`group_duplicates` how
        far rounding may carry two copies apart; then coefficients in [-1, 1].
    """
    unit, middle, half_extent = _in_unit_box(mesh.vertices)
    _, centroid = _area_and_centroid(unit, mesh.faces)
    faces = np.concatenate([mesh.faces, mesh.degenerate_faces])
    directions = _directions()
    second_moment, area = 0.0, 0.0
    for start in range(0, len(faces), _CHUNK):
        chunk = faces[start : start + _CHUNK]
        areas = _lengths(_cross_products(unit, chunk))
        centres = unit[chunk].mean(axis=1) - centroid
        second_moment += float(areas @ np.einsum("fi,fi->f", centres, centres))
        area += float(areas.sum())
    radius = np.sqrt(second_moment / area)
    if radius == 0:  # every face has its centre at the centroid, as a single triangle has
        radius = 1.0
    sums = np.zeros((2, _NUM_HARMONICS, directions.shape[1]), np.complex128)
    for start in range(0, len(faces), _CHUNK):
        chunk = faces[start : start + _CHUNK]
        weights = np.stack([np.full(len(chunk), 1 / len(faces)), _lengths(_cross_products(unit, chunk)) / area])
        centres = (unit[chunk].mean(axis=1) - centroid) / radius
        phase = _BASE_FREQUENCY * (centres @ directions)
        wave = np.cos(phase) + 1j * np.sin(phase)
        harmonic = np.ones_like(wave)
        for order in range(_NUM_HARMONICS):
            harmonic = harmonic * wave
            sums[:, order] += weights @ harmonic
    with np.errstate(over="ignore"):
        offset = float((np.abs(middle) / half_extent).max())
    resolution = min((1 + offset) / radius * _DECIMAL_RESOLUTION, _COARSEST_RESOLUTION)
    return np.concatenate([[resolution], sums.real.reshape(-1), sums.imag.reshape(-1)])


def _mirror_images(table: np.ndarray) -> list[np.ndarray]:
    """Signatures [n, k] of the same shapes mirrored along x, along y and along z."""
    directions = _directions()
    num_directions = directions.shape[1]
    coefficients = table[:, 1:].reshape(len(table), 2, -1, num_directions)  # real and imaginary; weights and harmonics; directions
    images = []
    for axis in range(3):
        mirrored = directions.copy()
        mirrored[axis] *= -1
        cosines = directions.T @ mirrored  # +1 where the mirrored direction is one of the set, -1 where its opposite is
        source = np.abs(cosines).argmax(axis=0)
        image = coefficients[..., source].copy()
        image[:, 1] *= np.round(cosines[source, np.arange(num_directions)])  # the coefficient of -w is the conjugate
        images.append(np.concatenate([table[:, :1], image.reshape(len(table), -1)], axis=1))
    return images


def group_duplicates(
    signatures: Sequence[Float[np.ndarray, " k"]], num_faces: Sequence[int], *, mirror_images: bool = False
) -> Int[np.ndarray, " n"]:
    """Groups exact duplicates: the same triangles under other names, positions, sizes or formats.

    Two objects are duplicates when they have equally many faces and no coefficient of their signatures differs by more than rounding
    explains: the difference is compared with a tolerance, not hashed, so no copy falls across a rounding boundary.

    Args:
        signatures: of :func:`geometry_signature`, one an object.
        num_faces: :attr:`MeshFacts.num_faces`, one an object.
        mirror_images: whether a part and its mirror image along x, y or z (the left and the right one of a pair) are duplicates, too.

    Returns:
        int64 [n], for each object the index of the first member of its group (its own, if it has no twin before it).

    Raises:
        ValueError: the lengths differ.
    """
    if len(signatures) != len(num_faces):
        raise ValueError(f"{len(signatures)} signatures and {len(num_faces)} face counts: one each is needed")
    first = np.arange(len(signatures))

    def root(index: int) -> int:
        while first[index] != index:
            first[index] = first[first[index]]
            index = int(first[index])
        return index

    members: dict[int, list[int]] = {}
    for index, count in enumerate(num_faces):
        members.setdefault(int(count), []).append(index)
    for indices in members.values():
        if len(indices) < 2:
            continue
        table = np.stack([signatures[index] for index in indices])
        owners = np.array(indices)
        if mirror_images:
            table = np.concatenate([table, *_mirror_images(table)])
            owners = np.tile(owners, 4)
        # Sorted by the coefficient that varies most, twins are close neighbours: few pairs are compared in full.
        key = table[:, 1 + int(np.argmax(table[:, 1:].std(axis=0)))]
        order = np.argsort(key, kind="stable")
        key, table, owner = key[order], table[order], owners[order].tolist()
        widest = 2 * float(table[:, 0].max())
        for position in range(len(order) - 1):
            end = int(np.searchsorted(key, key[position] + widest, side="right"))
            rivals = table[position + 1 : end]
            tolerance = table[position, 0] + rivals[:, 0]
            same = np.abs(rivals[:, 1:] - table[position, 1:]).max(axis=1, initial=0.0) <= tolerance
            for rival in np.flatnonzero(same).tolist():
                a, b = root(owner[position]), root(owner[position + 1 + rival])
                first[max(a, b)] = min(a, b)
    return np.array([root(index) for index in range(len(first))], np.int64)
