"""Polygons of a file -> triangles."""

from typing import no_type_check

import numpy as np
from numba import njit

from cad_models.common.mesh_formats import BadMesh, check_num_faces

_LARGEST_CLIPPED = 512  # ear clipping costs the square of the corners: longer polygons are cut as fans, so that no file can stall it


@njit(cache=True)
@no_type_check  # type checkers would wrap what numba must compile
def _inside(ax, ay, bx, by, cx, cy, px, py):
    return (
        (bx - ax) * (py - ay) - (by - ay) * (px - ax) >= 0
        and (cx - bx) * (py - by) - (cy - by) * (px - bx) >= 0
        and (ax - cx) * (py - cy) - (ay - cy) * (px - cx) >= 0
    )


@njit(cache=True)
@no_type_check  # type checkers would wrap what numba must compile
def _triangulate(vertices, sizes, corners, largest_clipped, triangles):
    row, start = 0, 0
    for size in sizes:
        if size >= 3:
            clip = False
            u = np.empty(0)
            w = np.empty(0)
            if 3 < size <= largest_clipped:
                # Newell's normal; the polygon is laid onto the coordinate plane where it is largest.
                nx, ny, nz = 0.0, 0.0, 0.0
                for i in range(size):
                    a = vertices[corners[start + i]]
                    b = vertices[corners[start + (i + 1) % size]]
                    nx += (a[1] - b[1]) * (a[2] + b[2])
                    ny += (a[2] - b[2]) * (a[0] + b[0])
                    nz += (a[0] - b[0]) * (a[1] + b[1])
                ax, ay, az = abs(nx), abs(ny), abs(nz)
                if ax >= ay and ax >= az:
                    first, second, sign = 1, 2, nx
                elif ay >= az:
                    first, second, sign = 2, 0, ny
                else:
                    first, second, sign = 0, 1, nz
                u = np.empty(size)
                w = np.empty(size)
                for i in range(size):
                    vertex = corners[start + i]
                    u[i] = vertices[vertex, first]
                    w[i] = vertices[vertex, second] if sign >= 0 else -vertices[vertex, second]
                for i in range(size):
                    j, k = (i + 1) % size, (i + 2) % size
                    if (u[j] - u[i]) * (w[k] - w[j]) - (w[j] - w[i]) * (u[k] - u[j]) < 0:
                        clip = True
                        break
            if not clip:
                for i in range(1, size - 1):
                    triangles[row, 0] = corners[start]
                    triangles[row, 1] = corners[start + i]
                    triangles[row, 2] = corners[start + i + 1]
                    row += 1
            else:
                ring = np.arange(size)
                left = size
                at = 0
                failures = 0
                while left > 3:
                    i, j, k = ring[(at + left - 1) % left], ring[at % left], ring[(at + 1) % left]
                    ear = (u[j] - u[i]) * (w[k] - w[j]) - (w[j] - w[i]) * (u[k] - u[j]) > 0
                    if ear:
                        for other in ring[:left]:
                            if other != i and other != j and other != k:
                                same = (
                                    (u[other] == u[i] and w[other] == w[i])
                                    or (u[other] == u[j] and w[other] == w[j])
                                    or (u[other] == u[k] and w[other] == w[k])
                                )
                                if not same and _inside(u[i], w[i], u[j], w[j], u[k], w[k], u[other], w[other]):
                                    ear = False
                                    break
                    # A whole turn without an ear (self-crossing polygon): cut anyway, so that the loop ends.
                    if ear or failures >= left:
                        triangles[row, 0] = corners[start + i]
                        triangles[row, 1] = corners[start + j]
                        triangles[row, 2] = corners[start + k]
                        row += 1
                        cut = at % left
                        for position in range(cut, left - 1):
                            ring[position] = ring[position + 1]
                        left -= 1
                        at = cut % left
                        failures = 0
                    else:
                        at = (at + 1) % left
                        failures += 1
                for i in range(3):
                    triangles[row, i] = corners[start + ring[i]]
                row += 1
        start += size


def triangulated(
    vertices: np.ndarray, sizes: np.ndarray, corners: np.ndarray, max_faces: int, warnings: list[str]
) -> np.ndarray:
    """Cuts polygons into triangles: convex ones as fans, others by ear clipping (polygons of n corners give n - 2 triangles).

    Args:
        vertices: float64 [V, 3].
        sizes: int64 [P], corners of each polygon; those below 3 are dropped, with a warning.
        corners: int64 [sum of sizes], vertex indices, polygon after polygon.
        max_faces: limit of triangles.
        warnings: is added to.

    Returns:
        int64 [F, 3].

    Raises:
        BadMesh: index_out_of_range, too_large.
    """
    if len(corners) and (corners.min() < 0 or corners.max() >= len(vertices)):
        worst = corners.max() if corners.max() >= len(vertices) else corners.min()
        raise BadMesh("index_out_of_range", f"a face refers to vertex {worst}, counted from 0, of {len(vertices)}")
    num_small = int((sizes < 3).sum())
    if num_small:
        warnings.append(f"{num_small} faces with fewer than 3 corners dropped")
    num_triangles = int(np.maximum(sizes - 2, 0).sum())
    check_num_faces(num_triangles, max_faces)
    if len(sizes) and (sizes == 3).all():
        return corners.reshape(-1, 3)
    triangles = np.empty((num_triangles, 3), np.int64)
    _triangulate(vertices, sizes, corners, _LARGEST_CLIPPED, triangles)
    return triangles
