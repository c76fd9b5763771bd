"""The compiled part of ``rendering``: welding, normals and drawing. Callers have checked indices and finiteness.

``no_type_check`` keeps run-time type checkers from wrapping functions that numba must compile.
Compiled without fastmath: the bytes must not depend on the machine.
"""

from typing import no_type_check

import numpy as np
from numba import njit

_WELD_CELLS = 2.0**19  # cells per unit: points within about 2e-6 of the bounding radius become one
_MIN_HEIGHT = 2e-6  # of a face, in bounding radii: thinner ones are below float32 noise, their normals are meaningless
_MAX_VALENCE = 256  # corners of larger fans keep the normal of their face: caps are flat, and a sum over all pairs is quadratic
_STEP = 0.008  # depth step, in bounding radii, that is drawn as a line

_AMBIENT = 0.42
_HEAD = 0.32
_FILL = 0.38
_FILL_RIGHT, _FILL_UP, _FILL_TOWARD = -0.48, 0.80, 0.36  # over the viewer's left shoulder: unit length
_LINE_LEVEL = 34.0  # grey of the lines
_LINE_OPACITY = 0.85


@njit(cache=True)
@no_type_check
def weld_points(points):
    """Group points of the unit sphere that share a grid cell.

    Returns the group of each point (int32 [V]) and the first point of each group (float64 [U, 3]). Vertices of
    triangle soups are equal to the bit, so cells are enough; two that differ by rounding can fall to both sides of a
    cell wall, which costs a seam in the shading and nothing else.
    """
    num_points = len(points)
    capacity = 16
    while capacity < 2 * num_points:
        capacity *= 2
    mask = capacity - 1
    slots = np.full(capacity, -1, dtype=np.int32)
    keys = np.empty(num_points, dtype=np.int64)
    groups = np.empty(num_points, dtype=np.int32)
    unique = np.empty((num_points, 3), dtype=np.float64)
    num_unique = 0
    for i in range(num_points):
        key = np.int64(0)
        for axis in range(3):
            key = (key << 21) | np.int64((points[i, axis] + 1.0) * _WELD_CELLS + 0.5)
        slot = key * np.int64(-7046029254386353131)  # golden-ratio hashing (Knuth, TAOCP 3, 6.4)
        slot = (slot ^ (slot >> 29)) & mask
        while slots[slot] >= 0 and keys[slots[slot]] != key:
            slot = (slot + 1) & mask
        if slots[slot] < 0:
            slots[slot] = num_unique
            keys[num_unique] = key
            for axis in range(3):
                unique[num_unique, axis] = points[i, axis]
            num_unique += 1
        groups[i] = slots[slot]
    return groups, unique[:num_unique].copy()


@njit(cache=True)
@no_type_check
def compute_corner_normals(points, triangles, cos_crease):
    """Drawable faces, their normals, and corner normals averaged over the faces that meet below the crease angle.

    Returns triangles (int32 [F', 3]) whose corners are sorted, so that nothing depends on the winding of the file;
    face normals (float64 [F', 3]); corner normals (float64 [F', 3, 3]), weighted by area, on the same side as their
    face.
    """
    kept = np.empty((len(triangles), 3), dtype=np.int32)
    normals = np.empty((len(triangles), 3), dtype=np.float64)
    areas = np.empty(len(triangles), dtype=np.float64)
    num_kept = 0
    for i in range(len(triangles)):
        a, b, c = triangles[i, 0], triangles[i, 1], triangles[i, 2]
        if a > b:
            a, b = b, a
        if b > c:
            b, c = c, b
        if a > b:
            a, b = b, a
        ux, uy, uz = points[b, 0] - points[a, 0], points[b, 1] - points[a, 1], points[b, 2] - points[a, 2]
        vx, vy, vz = points[c, 0] - points[a, 0], points[c, 1] - points[a, 1], points[c, 2] - points[a, 2]
        wx, wy, wz = vx - ux, vy - uy, vz - uz
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        double_area = np.sqrt(nx * nx + ny * ny + nz * nz)
        longest = np.sqrt(max(ux * ux + uy * uy + uz * uz, vx * vx + vy * vy + vz * vz, wx * wx + wy * wy + wz * wz))
        if double_area <= _MIN_HEIGHT * longest:
            continue
        kept[num_kept, 0], kept[num_kept, 1], kept[num_kept, 2] = a, b, c
        normals[num_kept, 0], normals[num_kept, 1], normals[num_kept, 2] = (
            nx / double_area,
            ny / double_area,
            nz / double_area,
        )
        areas[num_kept] = double_area
        num_kept += 1

    starts = np.zeros(len(points) + 1, dtype=np.int64)
    for i in range(num_kept):
        for k in range(3):
            starts[kept[i, k] + 1] += 1
    for i in range(len(points)):
        starts[i + 1] += starts[i]
    cursor = starts[:-1].copy()
    incident = np.empty(3 * num_kept, dtype=np.int32)
    for i in range(num_kept):
        for k in range(3):
            incident[cursor[kept[i, k]]] = i
            cursor[kept[i, k]] += 1

    corners = np.empty((num_kept, 3, 3), dtype=np.float64)
    for i in range(num_kept):
        nx, ny, nz = normals[i, 0], normals[i, 1], normals[i, 2]
        for k in range(3):
            first, last = starts[kept[i, k]], starts[kept[i, k] + 1]
            sx, sy, sz = 0.0, 0.0, 0.0
            if last - first <= _MAX_VALENCE:
                for j in range(first, last):
                    g = incident[j]
                    cosine = nx * normals[g, 0] + ny * normals[g, 1] + nz * normals[g, 2]
                    if abs(cosine) >= cos_crease:
                        weight = areas[g] if cosine > 0.0 else -areas[g]
                        sx += weight * normals[g, 0]
                        sy += weight * normals[g, 1]
                        sz += weight * normals[g, 2]
            length = np.sqrt(sx * sx + sy * sy + sz * sz)
            if length > 0.0:
                corners[i, k, 0], corners[i, k, 1], corners[i, k, 2] = sx / length, sy / length, sz / length
            else:
                corners[i, k, 0], corners[i, k, 1], corners[i, k, 2] = nx, ny, nz
    return kept[:num_kept].copy(), normals[:num_kept].copy(), corners


@njit(cache=True)
@no_type_check
def draw_views(points, triangles, face_normals, corner_normals, axes, lenses, size, supersampling, color, cos_crease):
    """Draw every view; see ``rendering.render_views``. Returns uint8 [num_views, size, size, 3]."""
    num_views = len(axes)
    side = size * supersampling
    pictures = np.full((num_views, size, size, 3), 255, dtype=np.uint8)
    projected = np.empty((len(points), 3), dtype=np.float64)
    slopes = np.empty((len(triangles), 2), dtype=np.float64)
    nearness = np.empty((side, side), dtype=np.float32)
    shade = np.empty((side, side), dtype=np.float32)
    owner = np.empty((side, side), dtype=np.int32)
    lines = np.empty((side, side), dtype=np.uint8)
    for view in range(num_views):
        nearness[:] = 0.0
        owner[:] = -1
        lines[:] = 0
        _project(points, axes[view], lenses[view, 0], lenses[view, 1], side, projected)
        top, bottom = _covered(projected[:, 1], supersampling, size)
        left, right = _covered(projected[:, 0], supersampling, size)
        _fill(projected, triangles, corner_normals, axes[view], slopes, nearness, shade, owner)
        distance = lenses[view, 0]
        step = _STEP / (distance * distance) if distance > 0.0 else _STEP
        _find_lines(owner, nearness, face_normals, slopes, cos_crease, step, lines, top, bottom, left, right)
        _resolve(owner, shade, lines, supersampling, color, pictures[view], top, bottom, left, right)
    return pictures


@njit(cache=True)
@no_type_check
def _project(points, axes, distance, focal, side, projected):
    """Columns and rows in samples, and nearness: 1/depth or minus depth, which is linear over the picture."""
    half = 0.5 * side
    scale = focal * half
    for i in range(len(points)):
        x, y, z = points[i, 0], points[i, 1], points[i, 2]
        right = axes[0, 0] * x + axes[0, 1] * y + axes[0, 2] * z
        up = axes[1, 0] * x + axes[1, 1] * y + axes[1, 2] * z
        toward = axes[2, 0] * x + axes[2, 1] * y + axes[2, 2] * z
        if distance > 0.0:
            near = 1.0 / (distance - toward)
            projected[i, 0] = half + scale * right * near
            projected[i, 1] = half - scale * up * near
        else:
            near = 2.0 + toward
            projected[i, 0] = half + scale * right
            projected[i, 1] = half - scale * up
        projected[i, 2] = near


@njit(cache=True)
@no_type_check
def _covered(positions, supersampling, size):
    """The half-open range of samples, in whole pixels with one to spare, that holds all points along one axis."""
    low, high = np.inf, -np.inf
    for position in positions:
        low, high = min(low, position), max(high, position)
    first = max(0, int(np.floor(low / supersampling)) - 1)
    last = min(size, int(np.ceil(high / supersampling)) + 1)
    return first * supersampling, last * supersampling


@njit(cache=True)
@no_type_check
def _light(corner, sign, head, fill):
    """Brightness 0 to 1 of a corner whose normal times ``sign`` is on the viewer's side."""
    toward = sign * (corner[0] * head[0] + corner[1] * head[1] + corner[2] * head[2])
    over = sign * (corner[0] * fill[0] + corner[1] * fill[1] + corner[2] * fill[2])
    return min(1.0, _AMBIENT + _HEAD * max(0.0, toward) + _FILL * max(0.0, over))


@njit(cache=True)
@no_type_check
def _fill(projected, triangles, corner_normals, axes, slopes, nearness, shade, owner):
    """Z-buffered scan conversion; a sample belongs to a face if its centre lies in it or on its border."""
    side = nearness.shape[0]
    head = axes[2]
    fill = _FILL_RIGHT * axes[0] + _FILL_UP * axes[1] + _FILL_TOWARD * axes[2]
    ex, ey, el, eh = np.empty(3), np.empty(3), np.empty(3), np.empty(3)
    slope = np.empty(3)
    for face in range(len(triangles)):
        a, b, c = triangles[face, 0], triangles[face, 1], triangles[face, 2]
        ax, ay, bx, by, cx, cy = (
            projected[a, 0],
            projected[a, 1],
            projected[b, 0],
            projected[b, 1],
            projected[c, 0],
            projected[c, 1],
        )
        row_first = max(0, int(np.ceil(min(ay, by, cy) - 0.5)))
        row_last = min(side - 1, int(np.floor(max(ay, by, cy) - 0.5)))
        if row_first > row_last or np.ceil(min(ax, bx, cx) - 0.5) > np.floor(max(ax, bx, cx) - 0.5):
            continue
        double_area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
        if double_area == 0.0:
            continue
        inverse = 1.0 / double_area
        # Corners are numbered, not wound: the sign of the drawn area says which side of the normal is seen
        # (rows grow downwards).
        sign = 1.0 if double_area < 0.0 else -1.0
        la = _light(corner_normals[face, 0], sign, head, fill)
        lb = _light(corner_normals[face, 1], sign, head, fill)
        lc = _light(corner_normals[face, 2], sign, head, fill)
        na, nb, nc = projected[a, 2], projected[b, 2], projected[c, 2]
        near_low, near_high = min(na, nb, nc), max(na, nb, nc)
        light_low, light_high = min(la, lb, lc), max(la, lb, lc)
        near_dx = ((nb - na) * (cy - ay) - (nc - na) * (by - ay)) * inverse
        near_dy = ((bx - ax) * (nc - na) - (cx - ax) * (nb - na)) * inverse
        light_dx = ((lb - la) * (cy - ay) - (lc - la) * (by - ay)) * inverse
        light_dy = ((bx - ax) * (lc - la) - (cx - ax) * (lb - la)) * inverse
        slopes[face, 0], slopes[face, 1] = near_dx, near_dy

        # Each edge from its upper end: neighbours compute the same crossing to the bit, so no gap opens between them.
        for k in range(3):
            p = a if k == 0 else (b if k == 1 else c)
            q = b if k == 0 else (c if k == 1 else a)
            if projected[p, 1] > projected[q, 1]:
                p, q = q, p
            ex[k], ey[k], el[k], eh[k] = projected[p, 0], projected[p, 1], projected[p, 1], projected[q, 1]
            height = projected[q, 1] - projected[p, 1]
            slope[k] = (projected[q, 0] - projected[p, 0]) / height if height > 0.0 else 0.0
        for row in range(row_first, row_last + 1):
            y = row + 0.5
            left, right = np.inf, -np.inf
            for k in range(3):
                if el[k] <= y <= eh[k] and el[k] < eh[k]:
                    x = ex[k] + (y - ey[k]) * slope[k]
                    left, right = min(left, x), max(right, x)
            if left > right:
                continue
            column_first = max(0, int(np.ceil(left - 0.5)))
            column_last = min(side - 1, int(np.floor(right - 0.5)))
            near_row = na + (y - ay) * near_dy - (ax - 0.5) * near_dx
            light_row = la + (y - ay) * light_dy - (ax - 0.5) * light_dx
            for column in range(column_first, column_last + 1):
                # Clamped: on faces seen edge-on the slopes are so steep that rounding would lift
                # samples out of the face.
                near = np.float32(min(near_high, max(near_low, near_row + column * near_dx)))
                if near > nearness[row, column]:
                    nearness[row, column] = near
                    shade[row, column] = min(light_high, max(light_low, light_row + column * light_dx))
                    owner[row, column] = face


@njit(cache=True)
@no_type_check
def _is_line(f, g, near_f, near_g, axis, face_normals, slopes, cos_crease, step):
    """Whether two neighbouring samples on faces ``f`` and ``g`` lie on surfaces that do not continue each other."""
    cosine = face_normals[f, 0] * face_normals[g, 0] + face_normals[f, 1] * face_normals[g, 1] + face_normals[f, 2] * face_normals[g, 2]
    if abs(cosine) < cos_crease:
        return True
    # Where two faces join between the samples, extending the nearer-by of them misses by at most half the
    # change of slope.
    rise = float(near_g) - float(near_f)
    slope_f, slope_g = slopes[f, axis], slopes[g, axis]
    miss = min(abs(rise - slope_f), abs(rise - slope_g))
    return miss > step + 0.5 * abs(slope_f - slope_g)


@njit(cache=True)
@no_type_check
def _find_lines(owner, nearness, face_normals, slopes, cos_crease, step, lines, top, bottom, left, right):
    """Mark samples on silhouettes (inside), creases and depth steps (both sides)."""
    side = owner.shape[0]
    for row in range(top, bottom):
        for column in range(left, right):
            f = owner[row, column]
            for axis in range(2):
                next_row, next_column = row + axis, column + 1 - axis
                inside = next_row < side and next_column < side
                g = owner[next_row, next_column] if inside else -1
                if f == g:
                    continue
                # Silhouettes are as wide as creases, but wholly inside, so that lines do not change the outline.
                if f < 0:
                    lines[next_row, next_column] = 1
                    lines[min(side - 1, next_row + axis), min(side - 1, next_column + 1 - axis)] = 1
                elif g < 0:
                    lines[row, column] = 1
                    lines[max(0, row - axis), max(0, column + axis - 1)] = 1
                elif _is_line(
                    f,
                    g,
                    nearness[row, column],
                    nearness[next_row, next_column],
                    axis,
                    face_normals,
                    slopes,
                    cos_crease,
                    step,
                ):
                    lines[row, column] = 1
                    lines[next_row, next_column] = 1


@njit(cache=True)
@no_type_check
def _resolve(owner, shade, lines, supersampling, color, picture, top, bottom, left, right):
    """Average the samples of each pixel; pixels without samples stay white."""
    share = 1.0 / (supersampling * supersampling)
    for row in range(top // supersampling, bottom // supersampling):
        for column in range(left // supersampling, right // supersampling):
            white, light, dark = 0, 0.0, 0
            for y in range(row * supersampling, (row + 1) * supersampling):
                for x in range(column * supersampling, (column + 1) * supersampling):
                    if owner[y, x] < 0:
                        white += 1
                    elif lines[y, x]:
                        dark += 1
                        light += (1.0 - _LINE_OPACITY) * shade[y, x]
                    else:
                        light += shade[y, x]
            if white * share < 1.0:
                for channel in range(3):
                    level = (255.0 * white + color[channel] * light + _LINE_OPACITY * _LINE_LEVEL * dark) * share
                    picture[row, column, channel] = np.uint8(level + 0.5)
