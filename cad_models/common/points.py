"""Points on a surface, and the order in which every prefix covers it evenly."""

import hashlib
from typing import no_type_check

import numpy as np
from jaxtyping import Float32, Int32
from numba import njit

from cad_models.common.meshes import Mesh

_LEAF = 64  # points in a block of the farthest-point search


def seed_of(object_id: str, seed: int) -> int:
    """A seed for one object, in [0, 2^63): the same on every machine and in any order of work. BLAKE2b of both, no Python hash."""
    digest = hashlib.blake2b(f"{seed}:{object_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@njit(cache=True)
@no_type_check  # type checkers would wrap what numba must compile
def _sample(vertices, faces, uniform, points, normals):
    """Stratum i of n equal slices of the area gives point i; ``uniform`` [n, 3] in [0, 1) places it in the slice, and on the face."""
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
        points[i, 0] = vertices[a, 0] + s * ux + t * wx
        points[i, 1] = vertices[a, 1] + s * uy + t * wy
        points[i, 2] = vertices[a, 2] + s * uz + t * wz
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
    low, high = mesh.vertices.min(axis=0), mesh.vertices.max(axis=0)
    middle = low / 2 + high / 2
    scale = float((high / 2 - low / 2).max())
    unit = (mesh.vertices - middle) / scale  # lengths near 1, so that areas neither overflow nor vanish
    points, normals = np.empty((num_points, 3)), np.empty((num_points, 3))
    _sample(unit, mesh.faces, np.random.default_rng(seed).random((num_points, 3)), points, normals)
    return (points * scale + middle).astype(np.float32), normals.astype(np.float32)


@njit(cache=True)
@no_type_check  # type checkers would wrap what numba must compile
def _farthest_points(points, index, starts, lows, highs, first, order):
    """Farthest points of ``points`` [n, 3], which lie block by block; ``index`` [n] are their numbers outside.

    A block keeps the largest distance of its points to those chosen. Where the new point is farther from the block's box than that, no
    distance in the block can change, and the block is skipped; the choice is the same as without blocks.
    """
    num_blocks = len(starts) - 1
    distances = np.full(len(points), np.float32(np.inf))
    farthest = np.full(num_blocks, np.float32(np.inf))
    where = np.zeros(num_blocks, np.int64)
    for block in range(num_blocks):
        where[block] = starts[block]
    newest = first
    order[0] = index[first]
    distances[first] = np.float32(-1.0)  # chosen: below every distance, also that of a twin
    for rank in range(1, len(order)):
        x, y, z = points[newest, 0], points[newest, 1], points[newest, 2]
        best_block = 0
        for block in range(num_blocks):
            gap_x = max(lows[block, 0] - x, x - highs[block, 0], np.float32(0))
            gap_y = max(lows[block, 1] - y, y - highs[block, 1], np.float32(0))
            gap_z = max(lows[block, 2] - z, z - highs[block, 2], np.float32(0))
            gap = gap_x * gap_x + gap_y * gap_y + gap_z * gap_z
            # The margin is far above float32 rounding, so that skipping is never wrong by a last digit. The block of the newest point
            # has gap 0 and is always visited.
            if gap * np.float32(0.9999) <= farthest[block]:
                largest, at, number = np.float32(-2.0), starts[block], 0
                for i in range(starts[block], starts[block + 1]):
                    dx, dy, dz = points[i, 0] - x, points[i, 1] - y, points[i, 2] - z
                    distance = dx * dx + dy * dy + dz * dz
                    if distance < distances[i]:
                        distances[i] = distance
                    if distances[i] > largest or (distances[i] == largest and index[i] < number):
                        largest, at, number = distances[i], i, index[i]
                farthest[block] = largest
                where[block] = at
            if farthest[block] > farthest[best_block] or (
                farthest[block] == farthest[best_block] and index[where[block]] < index[where[best_block]]
            ):
                best_block = block
        newest = where[best_block]
        order[rank] = index[newest]
        distances[newest] = np.float32(-1.0)


@njit(cache=True)
@no_type_check  # type checkers would wrap what numba must compile
def _blocks(points, leaf):
    """A k-d tree's leaves of at most ``leaf`` points: permutation [n] of the points, and where each leaf starts in it, with n at the end."""
    permutation = np.arange(len(points))
    starts = [len(points)]
    stack = [(0, len(points))]
    while len(stack) > 0:
        start, end = stack.pop()
        if end - start <= leaf:
            starts.append(start)
            continue
        axis, widest = 0, np.float32(-1.0)
        for column in range(3):
            low = high = points[permutation[start], column]
            for i in range(start + 1, end):
                value = points[permutation[i], column]
                low, high = min(low, value), max(high, value)
            if high - low > widest:
                axis, widest = column, high - low
        half = start + (end - start) // 2
        # Quickselect (C. A. R. Hoare, 1961): afterwards nothing before `half` lies beyond what stands there, nothing behind it before.
        left, right = start, end - 1
        while left < right:
            pivot = points[permutation[(left + right) // 2], axis]
            i, j = left, right
            while i <= j:
                while points[permutation[i], axis] < pivot:
                    i += 1
                while points[permutation[j], axis] > pivot:
                    j -= 1
                if i <= j:
                    permutation[i], permutation[j] = permutation[j], permutation[i]
                    i += 1
                    j -= 1
            if half <= j:
                right = j
            elif half >= i:
                left = i
            else:
                break
        stack.append((half, end))
        stack.append((start, half))
    return permutation, np.sort(np.array(starts))


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
    centred = points - points.mean(axis=0, dtype=np.float64).astype(np.float32)
    first = int(np.einsum("ni,ni->n", centred, centred).argmax())
    permutation, starts = _blocks(points, _LEAF)
    rows = points[permutation]
    lows, highs = np.minimum.reduceat(rows, starts[:-1]), np.maximum.reduceat(rows, starts[:-1])
    order = np.empty(num_ordered, np.int32)
    _farthest_points(rows, permutation, starts, lows, highs, int(np.flatnonzero(permutation == first)[0]), order)
    rest = np.ones(num_points, bool)
    rest[order] = False
    return np.concatenate([order, np.flatnonzero(rest).astype(np.int32)])
