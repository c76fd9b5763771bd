"""OBJ: polygons of Wavefront's text format. Materials, curves and free-form surfaces are ignored; no other file is opened."""

from typing import no_type_check

import numpy as np
from numba import njit

from cad_models.common.mesh_formats import BadMesh, RawMesh, check_num_faces
from cad_models.common.mesh_formats.numbers import BAD, LONG, reread_long, scan_integer, scan_number, skip_token
from cad_models.common.mesh_formats.polygons import triangulated


@njit(cache=True)
@no_type_check  # type checkers would wrap what numba must compile
def _count(text):
    """(lines "v", lines "f", corners of these)"""
    position, stop = 0, len(text)
    num_vertices, num_polygons, num_corners = 0, 0, 0
    while position < stop:
        while position < stop and text[position] <= 32:
            position += 1
        if position + 1 < stop and (text[position + 1] == 32 or text[position + 1] == 9):
            if text[position] == 118:
                num_vertices += 1
            elif text[position] == 102:
                num_polygons += 1
                inside = False
                position += 1
                while position < stop and text[position] != 10 and text[position] != 13:
                    if text[position] > 32 and not inside:
                        num_corners += 1
                    inside = text[position] > 32
                    position += 1
        while position < stop and text[position] != 10 and text[position] != 13:
            position += 1
    return num_vertices, num_polygons, num_corners


@njit(cache=True)
@no_type_check  # type checkers would wrap what numba must compile
def _scan(text, values, long_at, sizes, corners):
    """Fills vertices and corners, these counted from 0; an index 0 of the file becomes -1. Returns (corners, position of an error or -1)."""
    position, stop = 0, len(text)
    num_vertices, num_polygons, num_corners = 0, 0, 0
    while position < stop:
        while position < stop and text[position] <= 32:
            position += 1
        if position + 1 < stop and (text[position + 1] == 32 or text[position + 1] == 9):
            if text[position] == 118:
                position += 1
                for axis in range(3):
                    while position < stop and text[position] <= 32 and text[position] != 10 and text[position] != 13:
                        position += 1
                    value, after, status = scan_number(text, position, stop)
                    if status == BAD:
                        return num_corners, position
                    values[3 * num_vertices + axis] = value
                    long_at[3 * num_vertices + axis] = position if status == LONG else -1
                    position = after
                num_vertices += 1
            elif text[position] == 102:
                position += 1
                size = 0
                while True:
                    while position < stop and text[position] <= 32 and text[position] != 10 and text[position] != 13:
                        position += 1
                    if position >= stop or text[position] == 10 or text[position] == 13 or text[position] == 35:
                        break
                    index, after, status = scan_integer(text, position, stop)
                    if status == BAD or (after < stop and text[after] > 32 and text[after] != 47):
                        return num_corners, position
                    corners[num_corners] = index - 1 if index >= 0 else num_vertices + index
                    num_corners += 1
                    size += 1
                    position = skip_token(text, after, stop)
                sizes[num_polygons] = size
                num_polygons += 1
        while position < stop and text[position] != 10 and text[position] != 13:
            position += 1
    return num_corners, -1


def read_obj(data: bytes, max_faces: int) -> RawMesh:
    """Reads the vertices and faces of an OBJ file: n-gons, ``v/vt/vn`` corners, indices relative to the end (negative), continued lines.

    Faces with fewer than three corners are dropped with a warning; an index that names no vertex rejects the file.
    """
    if b"\\" in data:
        data = data.replace(b"\\\r\n", b" ").replace(b"\\\n", b" ")
    text = np.frombuffer(data, np.uint8)
    num_vertices, num_polygons, num_corners = _count(text)
    if num_polygons == 0:
        if num_vertices == 0:
            raise BadMesh("not_a_mesh", "no line begins with 'v' or 'f'")
        raise BadMesh("no_faces", f"{num_vertices} vertices, no face: points or curves only")
    check_num_faces(num_polygons, max_faces)
    values = np.empty(3 * num_vertices)
    long_at = np.empty(3 * num_vertices, np.int64)
    sizes = np.empty(num_polygons, np.int64)
    corners = np.empty(num_corners, np.int64)
    num_corners, bad = _scan(text, values, long_at, sizes, corners)
    if bad >= 0:
        if not data[bad:].strip():
            raise BadMesh("truncated", "the last line is incomplete")
        line = data.count(b"\n", 0, bad) + 1
        raise BadMesh("malformed", f"line {line} cannot be read at {data[bad : bad + 30]!r}")
    reread_long(data, values, long_at)
    vertices = values.reshape(-1, 3)
    warnings: list[str] = []
    return RawMesh(vertices, triangulated(vertices, sizes, corners[:num_corners], max_faces, warnings), warnings)
