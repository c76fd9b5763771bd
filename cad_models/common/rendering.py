"""Pictures of meshes that look like CAD renderings, without a display, a GPU or a driver.

A software rasteriser: z-buffer over supersampled pixels, two-sided matt shading with a head light and a fill light,
normals smoothed up to a crease angle, and dark lines at silhouettes, creases, open borders and intersections. Lines
are found in the picture (where neighbouring samples lie on faces that do not continue each other), so no topology is
repaired: triangle soups, open meshes, mixed winding and bodies that cut each other come out right. Arithmetic is
float64 in a fixed order without fused or reordered operations, so the same mesh gives the same bytes on every machine.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Integer, UInt8

from cad_models.common.bounds import bounds, moved_and_scaled
from cad_models.common.cameras import Camera, query_cameras, ring_cameras
from cad_models.common.rasterizer import compute_corner_normals, draw_views, weld_points

__all__ = ["Camera", "query_cameras", "render_views", "ring_cameras"]

CREASE_ANGLE_DEG = 32.0  # a cylinder of 12 sides is still smooth, a chamfer is not
_MAX_SUPERSAMPLING = 8


def render_views(
    vertices: Float[np.ndarray, "num_vertices 3"],
    faces: Integer[np.ndarray, "num_faces 3"],
    cameras: Sequence[Camera],
    *,
    size: int = 224,
    supersampling: int = 2,
    color: tuple[int, int, int] = (190, 206, 226),
) -> UInt8[np.ndarray, "num_views size size 3"]:
    """One picture a camera: the part on white, its bounding sphere fitted to the frame (the same scale in all views).

    Args:
        vertices: any unit, any scale; vertices that no face uses are ignored.
        faces: indices into ``vertices``; winding does not matter, faces without area are skipped.
        size: height and width in pixels.
        supersampling: samples a pixel along each axis, 1 to 8.
        color: RGB, 0 to 255, of the part where it is lit fully.

    Raises:
        ValueError: an index out of range, a coordinate that is not finite, no face, no extent, or no face with area.
    """
    if size < 1 or not 1 <= supersampling <= _MAX_SUPERSAMPLING:
        raise ValueError(f"size is {size} and supersampling {supersampling}: give size >= 1, supersampling 1 to {_MAX_SUPERSAMPLING}")
    if len(color) != 3 or not all(0 <= channel <= 255 for channel in color):
        raise ValueError(f"color is {color!r}: give three numbers from 0 to 255")
    points, triangles = _normalised(vertices, faces)
    ids, points = weld_points(points)
    triangles, face_normals, corner_normals = compute_corner_normals(
        points, np.ascontiguousarray(ids[triangles]), float(np.cos(np.radians(CREASE_ANGLE_DEG)))
    )
    if len(triangles) == 0:
        raise ValueError(f"none of the {len(faces)} faces has an area: there is nothing to draw")
    axes = np.stack([camera.axes() for camera in cameras]) if cameras else np.zeros((0, 3, 3))
    lenses = np.array([_lens(camera) for camera in cameras], dtype=np.float64).reshape(-1, 2)
    return draw_views(
        points,
        triangles,
        face_normals,
        corner_normals,
        axes,
        lenses,
        size,
        supersampling,
        np.asarray(color, dtype=np.float64),
        float(np.cos(np.radians(CREASE_ANGLE_DEG))),
    )


def _normalised(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Used vertices (float64) in the unit sphere around the centre of their box, and faces (int64)."""
    if len(faces) == 0:
        raise ValueError("the mesh has no faces: there is nothing to draw")
    low, high = int(faces.min()), int(faces.max())
    if low < 0 or high >= len(vertices):
        # Compiled code does not check bounds: a wrong index would end the process.
        raise ValueError(f"faces use the vertices {low} to {high}, but there are {len(vertices)}: the mesh is broken")
    used = np.zeros(len(vertices), dtype=bool)
    used[faces] = True
    points = vertices if used.all() else vertices[used]
    points = np.array(points, dtype=np.float64, order="C")  # one layout, so that nothing is compiled twice
    if not np.isfinite(points).all():
        bad = int((~np.isfinite(points)).any(axis=1).sum())
        raise ValueError(f"{bad} of {len(points)} vertices are not finite: repair or drop them before rendering")
    renumbered = np.cumsum(used) - 1
    triangles = renumbered[faces] if len(points) < len(vertices) else faces.astype(np.int64)
    # Scaled by the largest coordinate first, so that squares neither overflow nor vanish.
    points *= 0.5
    lowest, highest = bounds(points)
    points = moved_and_scaled(points, 0.5 * (lowest + highest), 1.0)
    largest = np.abs(points).max()
    if not largest > 0.0:
        raise ValueError("all vertices lie at one point: the mesh has no extent")
    points /= largest
    points /= np.sqrt((points[:, 0] ** 2 + points[:, 1] ** 2 + points[:, 2] ** 2).max())
    return points, np.ascontiguousarray(triangles)


def _lens(camera: Camera) -> tuple[float, float]:
    """Distance to the unit sphere's centre (0 = orthographic) and focal length in half frames."""
    if camera.fov_deg == 0.0:
        return 0.0, 1.0 - camera.margin
    half_frame = float(np.tan(np.radians(camera.fov_deg / 2.0)))
    tangent = (1.0 - camera.margin) * half_frame  # of the cone that touches the sphere
    return round(float(np.sqrt(1.0 + 1.0 / tangent**2)), 12), round(1.0 / half_frame, 12)
