"""Which faces of a mesh meet: equal vertices, closed surfaces, bodies."""

from typing import no_type_check

import numpy as np
from jaxtyping import Float, Int
from numba import njit


@njit(cache=True)
@no_type_check  # type checkers would wrap what numba must compile
def _merge(bits, table):
    """Gives equal rows of ``bits`` equal numbers, in order of first appearance; ``table`` is filled with -1, its length a power of two."""
    mask = len(table) - 1
    vertex_of = np.empty(len(bits), np.int64)
    first = np.empty(len(bits), np.int64)
    count = 0
    for row in range(len(bits)):
        key = np.uint64(0)
        for axis in range(3):
            key = (key ^ bits[row, axis]) * np.uint64(0x9E3779B97F4A7C15)
            key ^= key >> np.uint64(29)
        slot = np.int64(key & np.uint64(mask))
        while True:
            known = table[slot]
            if known < 0:
                table[slot] = count
                first[count] = row
                vertex_of[row] = count
                count += 1
                break
            other = first[known]
            if bits[other, 0] == bits[row, 0] and bits[other, 1] == bits[row, 1] and bits[other, 2] == bits[row, 2]:
                vertex_of[row] = known
                break
            slot = (slot + 1) & mask
    return vertex_of, count


def merged_vertices(vertices: Float[np.ndarray, "v 3"], *, tolerance: float = 0.0) -> tuple[Int[np.ndarray, " v"], int]:
    """Numbers the distinct positions.

    Args:
        vertices: float64 [V, 3].
        tolerance: 0 merges equal coordinates only: a file that writes a vertex several times mostly writes the same digits. Above, two
            values of a coordinate that no gap larger than this separates count as equal; there are no rounding boundaries.

    Returns:
        (int64 [V] number of each vertex's position, in order of first appearance, and how many there are)
    """
    if tolerance > 0:
        vertices = np.stack([_clustered(vertices[:, axis], tolerance) for axis in range(3)], axis=1)
    bits = (np.ascontiguousarray(vertices, np.float64) + 0.0).view(np.uint64)  # + 0.0 turns -0.0 into 0.0
    size = 1 << max(4, int(2 * len(bits) - 1).bit_length())
    vertex_of, count = _merge(bits, np.full(size, -1, np.int64))
    return vertex_of, int(count)


def _clustered(values: np.ndarray, tolerance: float) -> np.ndarray:
    """Number of the cluster of each value; clusters are separated by gaps larger than ``tolerance``."""
    order = np.argsort(values, kind="stable")
    clusters = np.empty(len(values))
    clusters[order] = np.concatenate([[0], np.cumsum(np.diff(values[order]) > tolerance)])
    return clusters


def closedness(faces: Int[np.ndarray, "f 3"], num_vertices: int) -> tuple[bool, bool]:
    """(watertight, consistent): every edge belongs to exactly two faces; these run along it in opposite directions.

    Args:
        faces: of merged vertices. Faces that use a vertex twice (needles) are left out.
        num_vertices: larger than all indices.
    """
    start, end = _edges(faces)
    if len(start) == 0:
        return False, False
    low, high = np.minimum(start, end), np.maximum(start, end)
    keys = low * num_vertices + high
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    if len(keys) % 2 or (keys[0::2] != keys[1::2]).any() or (keys[1:-1:2] == keys[2::2]).any():
        return False, False
    forward = (start < end)[order]
    return True, bool((forward[0::2] != forward[1::2]).all())


def _edges(faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Directed edges, int64 [E] each, of the faces with three different vertices."""
    proper = faces[(faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])].astype(np.int64)
    return proper.reshape(-1), proper[:, [1, 2, 0]].reshape(-1)


@njit(cache=True)
@no_type_check  # type checkers would wrap what numba must compile
def _unite(left, right, parent):
    for pair in range(len(left)):
        a, b = left[pair], right[pair]
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        while parent[b] != b:
            parent[b] = parent[parent[b]]
            b = parent[b]
        if a != b:
            parent[max(a, b)] = min(a, b)


def num_bodies(faces: Int[np.ndarray, "f 3"], num_vertices: int) -> int:
    """Parts of the surface that no common edge connects; touching in a point does not connect.

    Args:
        faces: of merged vertices. Faces that use a vertex twice are left out.
        num_vertices: larger than all indices.
    """
    start, end = _edges(faces)
    keys = np.minimum(start, end) * num_vertices + np.maximum(start, end)
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    parent = np.arange(len(keys) // 3)
    _unite(order[same] // 3, order[same + 1] // 3, parent)
    return int((parent == np.arange(len(parent))).sum())
