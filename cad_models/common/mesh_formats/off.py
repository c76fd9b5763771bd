"""OFF: the Object File Format of Geomview, as real files have it."""

import re
from typing import no_type_check

import numpy as np
from numba import njit

from cad_models.common.mesh_formats import BadMesh, RawMesh, check_num_faces
from cad_models.common.mesh_formats.numbers import BAD, LONG, reread_long, scan_integer, scan_number
from cad_models.common.mesh_formats.polygons import triangulated

# The counts may be glued to the keyword ("OFF490 518 0"), as in thousands of ModelNet files.
_HEADER = re.compile(rb"\s*(?:#[^\n]*\n\s*)*(ST)?(C)?(N)?(4)?(n)?OFF", re.ASCII)


@njit(cache=True)
@no_type_check  # type checkers would wrap what numba must compile
def _next_record(text, position, stop):
    """The next character that is neither white space nor in a comment."""
    while position < stop:
        if text[position] == 35:
            while position < stop and text[position] != 10 and text[position] != 13:
                position += 1
        elif text[position] <= 32:
            position += 1
        else:
            break
    return position


@njit(cache=True)
@no_type_check  # type checkers would wrap what numba must compile
def _next_on_line(text, position, stop):
    while position < stop and text[position] <= 32 and text[position] != 10 and text[position] != 13:
        position += 1
    return position


@njit(cache=True)
@no_type_check  # type checkers would wrap what numba must compile
def _skip_line(text, position, stop):
    while position < stop and text[position] != 10 and text[position] != 13:
        position += 1
    return position


@njit(cache=True)
@no_type_check  # type checkers would wrap what numba must compile
def _scan_vertices(text, position, num_vertices, values, long_at):
    """One vertex a line, what follows the third number (normal, colour) is ignored. Returns (vertices read, position)."""
    stop = len(text)
    for row in range(num_vertices):
        position = _next_record(text, position, stop)
        for axis in range(3):
            position = _next_on_line(text, position, stop)
            value, after, status = scan_number(text, position, stop)
            if status == BAD:
                return row, position
            values[3 * row + axis] = value
            long_at[3 * row + axis] = position if status == LONG else -1
            position = after
        position = _skip_line(text, position, stop)
    return num_vertices, position


@njit(cache=True)
@no_type_check  # type checkers would wrap what numba must compile
def _scan_faces(text, position, num_faces, sizes, corners):
    """One face a line: n, n indices, perhaps a colour. Returns (faces read, corners, position)."""
    stop, count = len(text), 0
    for row in range(num_faces):
        position = _next_record(text, position, stop)
        size, after, status = scan_integer(text, position, stop)
        if status == BAD or size < 0 or size > len(corners) - count:
            return row, count, position
        sizes[row] = size
        for _ in range(size):
            position = _next_on_line(text, after, stop)
            index, after, status = scan_integer(text, position, stop)
            if status == BAD or (after < stop and text[after] > 32 and text[after] != 35):
                return row, count, position
            corners[count] = index
            count += 1
        position = _skip_line(text, after, stop)
    return num_faces, count, position


def read_off(data: bytes, max_faces: int) -> RawMesh:
    """Reads ASCII OFF, COFF, NOFF, STOFF: comments, blank lines, any line ends, polygons, glued header. Records are lines."""
    header = _HEADER.match(data[:65536])
    if header is None:
        raise BadMesh("not_a_mesh", f"does not begin with the keyword OFF but with {data[:40]!r}")
    if header[4] or header[5]:
        raise BadMesh("unsupported_format", "OFF in other than three dimensions")
    if data[header.end() :].lstrip(b" \t").startswith(b"BINARY"):
        raise BadMesh("unsupported_format", "binary OFF: convert it to ASCII OFF or PLY")
    text = np.frombuffer(data, np.uint8)
    position = _next_record(text, header.end(), len(text))
    counts = re.compile(rb"(\d{1,18})[ \t]+(\d{1,18})(?:[ \t]+\d{1,18})?[ \t]*(?=[\r\n#]|\Z)").match(data, position)
    if counts is None:
        raise BadMesh("malformed", f"expected the counts of vertices, faces and edges, found {data[position : position + 40]!r}")
    num_vertices, num_faces = int(counts[1]), int(counts[2])
    left = len(data) - counts.end()
    if 6 * num_vertices + 2 * num_faces > left + 1:
        raise BadMesh("truncated", f"declares {num_vertices} vertices and {num_faces} faces, {left} bytes follow")
    check_num_faces(num_faces, max_faces)
    if num_faces == 0:
        raise BadMesh("no_faces", f"declares {num_vertices} vertices and 0 faces")
    values = np.empty(3 * num_vertices)
    long_at = np.empty(3 * num_vertices, np.int64)
    num_read, position = _scan_vertices(text, counts.end(), num_vertices, values, long_at)
    if num_read < num_vertices:
        raise _broken("vertex", num_read, num_vertices, data, position)
    reread_long(data, values, long_at)
    sizes = np.empty(num_faces, np.int64)
    corners = np.empty((len(data) - position) // 2 + 1, np.int64)
    num_read, num_corners, position = _scan_faces(text, position, num_faces, sizes, corners)
    if num_read < num_faces:
        raise _broken("face", num_read, num_faces, data, position)
    vertices = values.reshape(-1, 3)
    warnings: list[str] = []
    if data[position:].strip():
        position = _next_record(text, position, len(text))
        if position < len(data):
            warnings.append(f"{len(data) - position} bytes behind the last face ignored")
    return RawMesh(vertices, triangulated(vertices, sizes, corners[:num_corners], max_faces, warnings), warnings)


def _broken(what: str, num_read: int, num_declared: int, data: bytes, position: int) -> BadMesh:
    if not data[position:].strip():
        return BadMesh("truncated", f"ends after {num_read} of {num_declared} records of kind {what}")
    return BadMesh("malformed", f"{what} {num_read} of {num_declared} cannot be read at {data[position : position + 30]!r}")
