"""Points on a surface, and the order in which every prefix covers it evenly."""

import hashlib
from typing import no_type_check

import numpy as np
from jaxtyping import Float32, Int32
from numba import njit

from cad_models.common.bounds import bounds, moved_and_scaled
from cad_models.common.meshes import Mesh
from cad_models.common.point_blocks import cut_into_blocks, farthest_in_blocks


def seed_of(object_id: str, seed: int) -> int:
    """A seed for one object, in [0, 2^63): the same on every machine and in any order of work. BLAKE2b of both, no Python hash."""
    digest = hashlib.blake2b(f"{seed}:{object_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@njit(cache=True)
@no_type_check  # type checkers would wrap what numba must compile
def _sample(vertices, faces, uniform, scale, middle, points, normals):
    """Stratum i of n equal slices of the area gives point i; ``uniform`` [n, 3] in [0, 1) places it in the slice, and on the face. Points are
    scaled and moved in float64 as they are written."""
    num_points = len(points)
    total = 0.0
    last = 0  # the last face with an area, for a position that rounding carries past the end
    areas = np.empty(len(faces))
    for f in range(len(faces)):
        a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
        ux, uy, uz = vertices[b, 0] - vertices[a, 0], vertices[b, 1] - vertices[a, 1], vertices[b, 2] - vertices[a, 2]
        wx, wy, wz = vertices[c, 0] - vertices[a, 0], vertices[c, 1] - vertices[a, 1], vertices[c, 2] - vertices[a, 2]
        nx, ny, nz = uy * wz - uz * wy, uz * wx - ux * wz, ux * wy - uy * wx
        areas[f] = np.sqrt(nx * nx + ny * ny + nz * nz)
        total += areas[f]
        if areas[f] > 0:
            last = f
    face, below = 0, 0.0
    for i in range(num_points):
        position = (i + uniform[i, 0]) / num_points * total
        while face < last and (areas[face] == 0.0 or below + areas[face] <= position):
            below += areas[face]
            face += 1
        s, t = uniform[i, 1], uniform[i, 2]
        if s + t > 1:  # the other half of the parallelogram
            s, t = 1 - s, 1 - t
        a, b, c = faces[face, 0], faces[face, 1], faces[face, 2]
        ux, uy, uz = vertices[b, 0] - vertices[a, 0], vertices[b, 1] - vertices[a, 1], vertices[b, 2] - vertices[a, 2]
        wx, wy, wz = vertices[c, 0] - vertices[a, 0], vertices[c, 1] - vertices[a, 1], vertices[c, 2] - vertices[a, 2]
        points[i, 0] = (vertices[a, 0] + s * ux + t * wx) * scale + middle[0]
        points[i, 1] = (vertices[a, 1] + s * uy + t * wy) * scale + middle[1]
        points[i, 2] = (vertices[a, 2] + s * uz + t * wz) * scale + middle[2]
        normals[i, 0] = (uy * wz - uz * wy) / areas[face]
        normals[i, 1] = (uz * wx - ux * wz) / areas[face]
        normals[i, 2] = (ux * wy - uy * wx) / areas[face]


def sample_surface(mesh: Mesh, num_points: int, seed: int) -> tuple[Float32[np.ndarray, "n 3"], Float32[np.ndarray, "n 3"]]:
    """Points evenly on the surface, by area, with the normals of their faces.

    Stratified: the surface is cut, face after face, into ``num_points`` slices of equal area, and each gives one point; this covers about
    three times more evenly than independent points, at no cost. Points come in the order of the slices. The same mesh and seed give the
    same bytes on every machine: the generator is numpy's PCG64, the arithmetic is plain float64 in a fixed order.

    Args:
        mesh: any scale; coordinates beyond float32 (3e38) must be normalised first.
        num_points: at least 1.
        seed: not negative.

    Returns:
        points float32 [num_points, 3], unit normals float32 [num_points, 3], outward where the faces are (counter-clockwise).

    Raises:
        ValueError: num_points < 1.
    """
    if num_points < 1:
        raise ValueError(f"num_points is {num_points}: at least 1 is needed")
    low, high = bounds(mesh.vertices)
    middle = low / 2 + high / 2
    scale = float((high / 2 - low / 2).max())
    unit = moved_and_scaled(mesh.vertices, middle, scale)  # lengths near 1, so that areas neither overflow nor vanish
    points, normals = np.empty((num_points, 3), np.float32), np.empty((num_points, 3), np.float32)
    _sample(unit, mesh.faces, np.random.default_rng(seed).random((num_points, 3)), scale, middle, points, normals)
    return points, normals


def fps_order(points: Float32[np.ndarray, "n 3"], num_ordered: int | None = None) -> Int32[np.ndarray, " n"]:
    """Farthest-point order: every prefix is the farthest-point sample of its length (Y. Eldar et al., "The farthest point strategy for
    progressive image sampling", 1997), so a cloud stored in this order needs no sampling later.

    It starts at the point that is farthest from the mean of all; each next is the one farthest from those before it. Ties go to the
    lowest index. Distances are squared and float32.

    Args:
        points: float32 [n, 3], finite, squares within float32 (a cloud in the unit sphere, say).
        num_ordered: how many are ordered; the others follow in their given order. None orders all.

    Returns:
        int32 [n], a permutation.

    Raises:
        ValueError: points are not finite or none, or num_ordered is not in 1..n.
    """
    num_points = len(points)
    num_ordered = num_points if num_ordered is None else num_ordered
    if not 1 <= num_ordered <= num_points:
        raise ValueError(f"num_ordered is {num_ordered}, with {num_points} points: 1 to {num_points} can be ordered")
    if not np.isfinite(points).all():
        raise ValueError("points are not all finite")
    points = np.ascontiguousarray(points)
    first = _farthest_from_mean(points)
    columns, index, starts, lows, highs = cut_into_blocks(points)
    order = np.empty(num_points, np.int32)
    position = int(np.flatnonzero(index == first)[0])
    farthest_in_blocks(columns, index, starts, lows, highs, position, np.full(num_points, np.float32(np.inf)), True, order[:num_ordered])
    _append_rest(order, num_ordered)
    return order


@njit(cache=True, nogil=True)
@no_type_check
def _farthest_from_mean(points):
    """Lowest index of the points that are farthest from the mean of all: the mean is summed in float64, in order, the rest is float32."""
    total_x, total_y, total_z = 0.0, 0.0, 0.0
    for i in range(len(points)):
        total_x += points[i, 0]
        total_y += points[i, 1]
        total_z += points[i, 2]
    x, y, z = np.float32(total_x / len(points)), np.float32(total_y / len(points)), np.float32(total_z / len(points))
    first, largest = 0, np.float32(-1.0)
    for i in range(len(points)):
        dx, dy, dz = points[i, 0] - x, points[i, 1] - y, points[i, 2] - z
        distance = dx * dx + dy * dy + dz * dz
        if distance > largest:
            first, largest = i, distance
    return first


@njit(cache=True, nogil=True)
@no_type_check
def _append_rest(order, num_ordered):
    """Complete a permutation with the numbers that its first ``num_ordered`` places do not hold, ascending."""
    held = np.zeros(len(order), np.bool_)
    for rank in range(num_ordered):
        held[order[rank]] = True
    place = num_ordered
    for i in range(len(order)):
        if not held[i]:
            order[place] = i
            place += 1


def side_by_side(points: Float32[np.ndarray, "clouds n 3"], normals: Float32[np.ndarray, "clouds n 3"]) -> Float32[np.ndarray, "clouds n 6"]:
    """Coordinates and normals of each point beside each other: `numpy.concatenate` along the last axis, whose runs of three floats it copies slowly.

    Raises:
        ValueError: the shapes differ, or are no rows of three.
    """
    if points.shape != normals.shape or points.shape[-1] != 3:
        # Compiled code does not check bounds.
        raise ValueError(f"points of shape {points.shape} and normals of shape {normals.shape}: both must be [clouds, n, 3]; prepare the dataset again")
    joined = np.empty((*points.shape[:2], 6), dtype=np.float32)
    _interleave(points, normals, joined)
    return joined


@njit(cache=True, nogil=True)
@no_type_check
def _interleave(points, normals, joined):
    for cloud in range(points.shape[0]):
        for i in range(points.shape[1]):
            for axis in range(3):
                joined[cloud, i, axis] = points[cloud, i, axis]
                joined[cloud, i, 3 + axis] = normals[cloud, i, axis]
