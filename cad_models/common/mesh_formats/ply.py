"""PLY: ASCII and binary of both byte orders (G. Turk, "The PLY polygon file format", 1994)."""

from dataclasses import dataclass, field
from typing import no_type_check

import numpy as np
from numba import njit

from cad_models.common.mesh_formats import BadMesh, RawMesh, check_num_faces
from cad_models.common.mesh_formats.numbers import numbers_of
from cad_models.common.mesh_formats.polygons import triangulated

_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2", "uint16": "u2",
    "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "int64": "i8", "uint64": "u8",
    "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip


@dataclass
class _Element:
    name: str
    count: int
    properties: list[tuple[str, str, str | None]] = field(default_factory=list)  # name, type, type of a list's length

    @property
    def has_list(self) -> bool:
        return any(length for _, _, length in self.properties)


def _header(data: bytes) -> tuple[str, list[_Element], int]:
    """Returns the encoding ("ascii", "<" or ">"), the elements in order, and where the body begins."""
    end = data.find(b"end_header", 0, 1 << 20)
    if not data.startswith(b"ply"):
        raise BadMesh("not_a_mesh", f"does not begin with 'ply' but with {data[:40]!r}")
    if end < 0:
        raise BadMesh("truncated", "the header has no 'end_header'")
    body = end + len(b"end_header")
    body += 2 if data[body : body + 2] == b"\r\n" else 1
    encoding, elements = "", []
    for line in data[:end].decode("latin-1").splitlines()[1:]:
        words = line.split()
        if not words or words[0] in ("comment", "obj_info"):
            continue
        if words[0] == "format" and len(words) > 1:
            encoding = {"ascii": "ascii", "binary_little_endian": "<", "binary_big_endian": ">"}.get(words[1], "")
        elif words[0] == "element" and len(words) == 3 and words[2].isascii() and words[2].isdigit() and len(words[2]) < 19:
            elements.append(_Element(words[1], int(words[2])))
        elif words[0] == "property" and elements and len(words) == 3 and words[1] in _TYPES:
            elements[-1].properties.append((words[2], _TYPES[words[1]], None))
        elif (
            words[0] == "property" and elements and len(words) == 5 and words[1] == "list"
            and _TYPES.get(words[2], "f")[0] in "iu" and words[3] in _TYPES
        ):  # fmt: skip
            elements[-1].properties.append((words[4], _TYPES[words[3]], _TYPES[words[2]]))
        else:
            raise BadMesh("malformed", f"header line {line[:60]!r}")
    if not encoding:
        raise BadMesh("malformed", "the header names no known format (ascii, binary_little_endian, binary_big_endian)")
    return encoding, elements, body


@njit(cache=True)
@no_type_check  # type checkers would wrap what numba must compile
def _read_integer(data, position, size, signed, big_endian):
    value = 0
    for i in range(size):
        value = (value << 8) | data[position + i if big_endian else position + size - 1 - i]
    if signed and size < 8 and value >= 1 << (8 * size - 1):
        value -= 1 << (8 * size)
    return value


@njit(cache=True)
@no_type_check  # type checkers would wrap what numba must compile
def _scan_binary_lists(data, position, num_rows, item_size, item_signed, length_size, length_signed, target, big_endian, sizes, corners):
    """Walks rows whose lists make them unequal. ``length_size`` is 0 for scalars. Returns (rows read, corners, position)."""
    stop, count = len(data), 0
    for row in range(num_rows):
        for column in range(len(item_size)):
            repeats = 1
            if length_size[column] > 0:
                if position + length_size[column] > stop:
                    return row, count, position
                repeats = _read_integer(data, position, length_size[column], length_signed[column], big_endian)
                position += length_size[column]
                if repeats < 0:
                    return row, count, position
            if repeats > (stop - position) // item_size[column]:
                return row, count, position
            if column == target:
                sizes[row] = repeats
                for _ in range(repeats):
                    corners[count] = _read_integer(data, position, item_size[column], item_signed[column], big_endian)
                    count += 1
                    position += item_size[column]
            else:
                position += repeats * item_size[column]
    return num_rows, count, position


@njit(cache=True)
@no_type_check  # type checkers would wrap what numba must compile
def _scan_ascii_lists(values, begins_line, position, num_rows, is_list, target, sizes, corners):
    """As the binary walk, over the numbers of a text. A row is a line; more numbers on it than the header declares are skipped."""
    stop, count = len(values), 0
    for row in range(num_rows):
        for column in range(len(is_list)):
            repeats = 1
            if is_list[column]:
                if position >= stop or not 0 <= values[position] <= stop:
                    return row, count, position
                repeats = int(values[position])
                position += 1
            if repeats > stop - position:
                return row, count, position
            if column == target:
                sizes[row] = repeats
                for i in range(repeats):
                    value = values[position + i]
                    corners[count] = int(value) if abs(value) < 1e15 else -1
                    count += 1
            position += repeats
        while position < stop and not begins_line[position]:
            position += 1
    return num_rows, count, position


def _truncated(element: _Element, num_read: int) -> BadMesh:
    return BadMesh("truncated", f"ends, or is broken, after {num_read} of {element.count} rows of element {element.name}")


def read_ply(data: bytes, max_faces: int) -> RawMesh:
    """Reads elements "vertex" (x, y, z) and "face" (vertex_indices or vertex_index); other elements and properties are skipped."""
    encoding, elements, position = _header(data)
    numbers, begins_line = np.empty(0), np.empty(0, np.bool_)
    if encoding == "ascii":
        body = data[position:]
        numbers, begins_line, end = numbers_of(body)
        if body[end:].strip():
            raise BadMesh("malformed", f"not a number: {body[end : end + 20]!r}")
        position = 0
    names = {element.name: element for element in elements}
    if "vertex" not in names:
        raise BadMesh("no_faces", "the header declares no vertices")
    if "face" not in names or names["face"].count == 0:
        raise BadMesh("no_faces", f"{names['vertex'].count} points, no faces")
    check_num_faces(names["face"].count, max_faces)
    vertices, sizes, corners = None, None, None
    for element in elements:
        left = len(numbers) - position if encoding == "ascii" else len(data) - position
        if not element.properties:
            continue
        smallest = len(element.properties)  # a number each, or at least a byte
        if element.count * smallest > left:
            raise _truncated(element, 0)
        target = next(
            (i for i, (name, _, length) in enumerate(element.properties) if length and name in ("vertex_indices", "vertex_index")), -1
        )
        if element.name == "face" and target < 0:
            raise BadMesh("no_faces", "element face has no list vertex_indices")
        if not element.has_list:
            if encoding == "ascii":
                columns, position = _ascii_columns(element, numbers, begins_line, position)
            else:
                columns, position = _binary_columns(element, data, position, encoding)
            if element.name == "vertex":
                missing = [axis for axis in "xyz" if axis not in columns]
                if missing:
                    raise BadMesh("malformed", f"element vertex has no property {', '.join(missing)}")
                with np.errstate(invalid="ignore"):  # signalling NaNs of a broken file; the caller rejects them
                    vertices = np.stack([columns[axis].astype(np.float64) for axis in "xyz"], axis=1)
            continue
        if element.name == "vertex":
            raise BadMesh("malformed", "element vertex has a list property")
        row_sizes = np.zeros(element.count, np.int64)
        wanted = target if element.name == "face" else -1
        if encoding == "ascii":
            row_corners = np.empty(left if wanted >= 0 else 0, np.int64)
            is_list = np.array([length is not None for _, _, length in element.properties])
            num_read, num_corners, position = _scan_ascii_lists(
                numbers, begins_line, position, element.count, is_list, wanted, row_sizes, row_corners
            )
        else:
            row_corners = np.empty(left // int(element.properties[target][1][1]) if wanted >= 0 else 0, np.int64)
            if wanted >= 0 and element.properties[target][1][0] == "f":
                raise BadMesh("malformed", "vertex_indices are of a float type")
            num_read, num_corners, position = _scan_binary_lists(
                np.frombuffer(data, np.uint8),
                position,
                element.count,
                np.array([int(kind[1]) for _, kind, _ in element.properties]),
                np.array([kind[0] == "i" for _, kind, _ in element.properties]),
                np.array([int(length[1]) if length else 0 for _, _, length in element.properties]),
                np.array([bool(length) and length[0] == "i" for _, _, length in element.properties]),
                wanted,
                encoding == ">",
                row_sizes,
                row_corners,
            )
        if num_read < element.count:
            raise _truncated(element, num_read)
        if wanted >= 0:
            sizes, corners = row_sizes, row_corners[:num_corners]
    if vertices is None or sizes is None or corners is None:
        raise BadMesh("malformed", "element vertex or face has no properties")
    warnings: list[str] = []
    return RawMesh(vertices, triangulated(vertices, sizes, corners, max_faces, warnings), warnings)


def _ascii_columns(
    element: _Element, numbers: np.ndarray, begins_line: np.ndarray, position: int
) -> tuple[dict[str, np.ndarray], int]:
    """The columns of an element without lists, a line a row, and the position behind it."""
    width = len(element.properties)
    starts = position + np.flatnonzero(begins_line[position:])[: element.count + 1]
    ends = np.append(starts, len(numbers))[1 : element.count + 1]
    starts = starts[: element.count]
    if len(starts) < element.count or (ends - starts < width).any():
        raise _truncated(element, int((ends - starts >= width).sum()))
    columns = {name: numbers[starts + column] for column, (name, _, _) in enumerate(element.properties)}
    return columns, int(ends[-1]) if element.count else position


def _binary_columns(element: _Element, data: bytes, position: int, byte_order: str) -> tuple[dict[str, np.ndarray], int]:
    """The columns of an element without lists, and the position behind it."""
    offsets = np.cumsum([0] + [int(kind[1]) for _, kind, _ in element.properties])
    stride = int(offsets[-1])
    if element.count * stride > len(data) - position:
        raise _truncated(element, (len(data) - position) // stride)
    columns = {
        name: np.ndarray(element.count, byte_order + kind, data, position + int(offset), stride)
        for (name, kind, _), offset in zip(element.properties, offsets, strict=False)
    }
    return columns, position + element.count * stride
