"""What parts are built from: random dimensions, sections in the plane, and solids.

Solids come from manifold3d, whose Booleans are guaranteed to return closed, oriented meshes. Lengths are millimetres;
solids stand on z = 0 and rise along +z unless said otherwise.
"""

import numpy as np
from manifold3d import CrossSection, JoinType, Manifold, Mesh64, OpType

ROUND_SEGMENTS = 48  # segments of large circles
HOLE_SEGMENTS = 28  # segments of holes

Number = float | int  # type checkers that run with the program tell them apart


class Draw:
    """Random dimensions and features of one part, each recorded under its name in ``parameters``."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.parameters: dict[str, float] = {}
        self._rng = rng

    def real(self, name: str, low: Number, high: Number) -> float:
        """A number from ``low`` to ``high``, to the thousandth."""
        return self._record(name, round(float(self._rng.uniform(low, high)), 3))

    def count(self, name: str, low: int, high: int) -> int:
        """An integer from ``low`` to ``high``, both included."""
        return int(self._record(name, int(self._rng.integers(low, high + 1))))

    def feature(self, name: str, probability: Number = 0.5) -> bool:
        """Whether the part has the feature; recorded as 1 or 0."""
        return bool(self._record(name, float(self._rng.random() < probability)))

    def _record(self, name: str, value: Number) -> Number:
        assert name not in self.parameters, f"{name} is drawn twice"
        self.parameters[name] = float(value)
        return value


def polygon_section(points) -> CrossSection:
    """The inside of a closed outline of points [N, 2]; counter-clockwise."""
    return CrossSection([np.asarray(points, dtype=np.float64)])


def circle_section(radius: Number, segments: int = ROUND_SEGMENTS) -> CrossSection:
    """A disc around the origin."""
    return CrossSection.circle(radius, segments)


def hexagon_section(across_flats: Number) -> CrossSection:
    """A regular hexagon with corners on the x axis."""
    return CrossSection.circle(across_flats / np.sqrt(3.0), 6)


def rectangle_section(width: Number, depth: Number, radius: Number = 0.0) -> CrossSection:
    """Centred; corners rounded to ``radius``."""
    if radius <= 0.0:
        return CrossSection.square((width, depth), True)
    core = CrossSection.square((width - 2 * radius, depth - 2 * radius), True)
    return core.offset(radius, JoinType.Round, 2.0, 32)


def slot_section(length: Number, width: Number) -> CrossSection:
    """A hole of round ends along x; ``length`` is over all."""
    ends = [circle_section(width / 2, HOLE_SEGMENTS).translate((s * (length - width) / 2, 0)) for s in (-1, 1)]
    return CrossSection.batch_hull(ends)


def placed_around(section: CrossSection, count: int, radius: Number, phase_deg: Number = 0.0) -> CrossSection:
    """Copies of a section on a circle."""
    copies = [section.translate((radius, 0)).rotate(phase_deg + 360.0 * i / count) for i in range(count)]
    return CrossSection.batch_boolean(copies, OpType.Add)


def placed(section: CrossSection, places) -> CrossSection:
    """Copies of a section at points (x, y)."""
    return CrossSection.batch_boolean([section.translate((float(x), float(y))) for x, y in places], OpType.Add)


def extruded(section: CrossSection, height: Number, z: Number = 0.0) -> Manifold:
    """The section raised from ``z`` to ``z + height``."""
    return section.extrude(height).translate((0, 0, z))


def rod(
    radius: Number, height: Number, z: Number = 0.0, top_radius: Number = -1.0, segments: int = ROUND_SEGMENTS
) -> Manifold:
    """A cylinder, or a cone up to ``top_radius`` where that is not negative."""
    return Manifold.cylinder(height, radius, top_radius, segments).translate((0, 0, z))


def block(x: Number, y: Number, z: Number, center: tuple[Number, Number, Number]) -> Manifold:
    """A box of the given sides around ``center``."""
    return Manifold.cube((x, y, z), True).translate(center)


def revolved(profile, segments: int = ROUND_SEGMENTS, degrees: Number = 360.0) -> Manifold:
    """Points (radius, height) turned about +z."""
    return polygon_section(profile).revolve(segments, degrees)


def extruded_along_x(section: CrossSection, length: Number) -> Manifold:
    """A section whose axes become y and z, extruded along x, centred."""
    return section.extrude(length).rotate((90, 0, 90)).translate((-length / 2, 0, 0))


def extruded_along_y(section: CrossSection, length: Number) -> Manifold:
    """A section whose axes become x and z, extruded along y, centred."""
    return section.extrude(length).rotate((90, 0, 0)).translate((0, length / 2, 0))


def union(solids) -> Manifold:
    """All solids as one."""
    return Manifold.batch_boolean(list(solids), OpType.Add)


def lofted(rings: np.ndarray, start: np.ndarray, end: np.ndarray) -> Manifold:
    """A skin over closed rings [N, M, 3], counter-clockwise seen from the end, closed by a fan around a point."""
    num_rings, num_points = rings.shape[:2]
    i, j = np.meshgrid(np.arange(num_rings - 1), np.arange(num_points), indexing="ij")
    a, b = i * num_points + j, i * num_points + (j + 1) % num_points
    c, d = a + num_points, b + num_points
    first = num_rings * num_points
    k = np.arange(num_points)
    k_next = (k + 1) % num_points
    top = (num_rings - 1) * num_points
    faces = np.concatenate(
        [
            np.stack([a, b, d], -1).reshape(-1, 3),
            np.stack([a, d, c], -1).reshape(-1, 3),
            np.stack([np.full(num_points, first), k_next, k], -1),
            np.stack([np.full(num_points, first + 1), top + k, top + k_next], -1),
        ]
    )
    vertices = np.concatenate([rings.reshape(-1, 3), start[None], end[None]])
    return Manifold(Mesh64(vert_properties=vertices, tri_verts=faces.astype(np.uint64)))


def threaded_rod(radius: Number, length: Number, pitch: Number) -> Manifold:
    """A rod with one helical groove of sinusoidal profile."""
    samples, segments = 9, 20
    z = np.linspace(0.0, length, max(2, int(samples * length / pitch) + 1))
    angles = 2 * np.pi * np.arange(segments) / segments
    depth = 0.26 * pitch
    groove = 0.5 - 0.5 * np.cos(2 * np.pi * z[:, None] / pitch - angles)
    r = radius - depth * groove
    rings = np.stack([r * np.cos(angles), r * np.sin(angles), np.broadcast_to(z[:, None], r.shape)], -1)
    return lofted(rings, np.array([0.0, 0.0, 0.0]), np.array([0.0, 0.0, length]))


def tube_along(path: np.ndarray, normals: np.ndarray, binormals: np.ndarray, radius: Number, segments: int) -> Manifold:
    """A round wire along an open path [N, 3] with unit frames [N, 3] given at every point."""
    angles = 2 * np.pi * np.arange(segments) / segments
    circle = np.cos(angles)[:, None] * normals[:, None] + np.sin(angles)[:, None] * binormals[:, None]
    return lofted(path[:, None] + radius * circle, path[0], path[-1])


def twisted_bar(length: Number, thickness: Number, height: Number, twist_deg: Number) -> Manifold:
    """A bar from the z axis along +x that turns about the axis as it rises; cut fine, so that its sides are smooth."""
    x = np.linspace(0.0, length, 11)
    outline = np.concatenate([np.stack([x, np.full(11, -0.5)], 1), np.stack([x[::-1], np.full(11, 0.5)], 1)])
    outline[:, 1] *= thickness
    z = np.linspace(0.0, height, 15)
    turn = np.radians(twist_deg) * z / height
    cos, sin = np.cos(turn)[:, None], np.sin(turn)[:, None]
    x, y = outline[:, 0] * cos - outline[:, 1] * sin, outline[:, 0] * sin + outline[:, 1] * cos
    rings = np.stack([x, y, np.broadcast_to(z[:, None], x.shape)], -1)
    return lofted(rings, rings[0].mean(axis=0), rings[-1].mean(axis=0))


def keyway_cutter(bore_radius: Number, width: Number, height: Number) -> Manifold:
    """What a keyway removes beside a bore, over the given height."""
    return block(2 * bore_radius * 1.25, width, height + 2, (bore_radius * 0.6, 0, height / 2))


def hex_chamfered(solid: Manifold, across_flats: Number, height: Number, below: bool) -> Manifold:
    """Cuts the corners of a hexagonal prism on top, and below, as a turning tool does."""
    corner, flat = across_flats / np.sqrt(3.0) * 1.01, across_flats / 2 * 0.97
    drop = (corner - flat) * 0.6
    profile = [(0, 0), (flat if below else corner, 0), (corner, drop if below else 0.0)]
    profile += [(corner, height - drop), (flat, height), (0, height)]
    return solid ^ revolved([p for k, p in enumerate(profile) if k == 0 or p != profile[k - 1]])
