"""STL: binary and ASCII, with one or several solids."""

from typing import no_type_check

import numpy as np
from numba import njit

from cad_models.common.mesh_formats import BadMesh, RawMesh, check_num_faces
from cad_models.common.mesh_formats.numbers import BAD, LONG, reread_long, scan_number, skip_token

_FACET = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])  # 50 bytes
_VERTEX, _FACET_WORD, _NORMAL = (np.frombuffer(word, np.uint8) for word in (b"vertex", b"facet", b"normal"))
_SOLID, _ENDSOLID = (np.frombuffer(word, np.uint8) for word in (b"solid", b"endsolid"))


def read_stl(data: bytes, max_faces: int) -> RawMesh:
    """Reads an STL file. The length decides first: 84 + 50 x count bytes is binary, even where the header begins with "solid".

    Choices: several binary solids one after the other are joined; bytes behind the last facet are tolerated with a warning while they are
    fewer than the facets' own; a binary file shorter than its count is truncated; an ASCII file whose facets are complete, but which has no
    "endsolid", is read with a warning. Normals in the file are ignored: the order of the corners says the same.
    """
    if len(data) >= 84 and 84 + 50 * _count_at(data, 0) == len(data):
        return _read_binary(data, max_faces)
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n")
    if start[:5].lower() == b"solid" and (_is_text(data) or b"facet" in data[:4096].lower()):
        return _read_ascii(data, max_faces)
    if _is_text(data):
        raise BadMesh("not_a_mesh", f"text that does not begin with 'solid' but with {data[:40]!r}")
    if len(data) < 84:
        raise BadMesh("truncated", f"{len(data)} bytes are fewer than the 84 of a binary STL header")
    return _read_binary(data, max_faces)


def _is_text(data: bytes) -> bool:
    """Whether the beginning has no bytes that text never has (header fields of a binary STL nearly always have zeros)."""
    head = data[:2048]
    return not head.translate(None, delete=bytes(range(128, 256)) + bytes(range(32, 127)) + b"\t\r\n\f\x0b")


def _count_at(data: bytes, position: int) -> int:
    return int.from_bytes(data[position + 80 : position + 84], "little")


def _read_binary(data: bytes, max_faces: int) -> RawMesh:
    num_faces = _count_at(data, 0)
    available = (len(data) - 84) // 50
    if num_faces == 0:
        raise BadMesh("no_faces", f"the header declares 0 facets ({len(data)} bytes)")
    if num_faces > available:
        raise BadMesh("truncated", f"the header declares {num_faces} facets, the file has room for {available}")
    check_num_faces(num_faces, max_faces)
    position = 84 + 50 * num_faces
    solids = [np.frombuffer(data, _FACET, num_faces, 84)["corners"]]
    warnings = []
    while len(data) - position >= 134:  # a further header and at least one facet
        count = _count_at(data, position)
        if count == 0 or position + 84 + 50 * count > len(data):
            break
        num_faces += count
        check_num_faces(num_faces, max_faces)
        solids.append(np.frombuffer(data, _FACET, count, position + 84)["corners"])
        position += 84 + 50 * count
    trailing = len(data) - position
    if trailing:
        if trailing >= 50 * num_faces:
            raise BadMesh("malformed", f"the header declares {num_faces} facets, but {trailing} more bytes follow them")
        warnings.append(f"{trailing} bytes behind the last facet ignored")
    corners = np.concatenate(solids)
    with np.errstate(invalid="ignore"):  # signalling NaNs of a broken file; the caller rejects them
        vertices = corners.reshape(-1, 3).astype(np.float64)
    return RawMesh(vertices, np.arange(len(vertices)).reshape(-1, 3), warnings)


@njit(cache=True)
@no_type_check  # type checkers would wrap what numba must compile
def _is_word(text, start, stop, word):
    if stop - start != len(word):
        return False
    for i in range(len(word)):
        if text[start + i] != word[i]:
            return False
    return True


@njit(cache=True)
@no_type_check  # type checkers would wrap what numba must compile
def _scan_ascii(text, values, long_at):
    """Fills the coordinates of all "vertex" records of a lower-case text.

    Returns:
        (coordinates read, facets, facets without exactly 3 vertices, "endsolid" words, position of a bad number or -1)
    """
    position, stop = 0, len(text)
    count, num_facets, num_uneven, num_ends = 0, 0, 0, 0
    while True:
        while position < stop and text[position] <= 32:
            position += 1
        if position >= stop:
            break
        after = skip_token(text, position, stop)
        if _is_word(text, position, after, _VERTEX):
            position = after
            for _ in range(3):
                while position < stop and text[position] <= 32:
                    position += 1
                if position >= stop:
                    return count, num_facets, num_uneven, num_ends, stop
                value, after, status = scan_number(text, position, stop)
                if status == BAD or count == len(values):
                    return count, num_facets, num_uneven, num_ends, position
                values[count] = value
                long_at[count] = position if status == LONG else -1
                count += 1
                position = after
        elif _is_word(text, position, after, _FACET_WORD):
            if count != 9 * num_facets:
                num_uneven += 1
            num_facets += 1
            position = after
        elif _is_word(text, position, after, _SOLID) or _is_word(text, position, after, _ENDSOLID):
            if text[position] == 101:
                num_ends += 1
            while after < stop and text[after] != 10 and text[after] != 13:  # the rest of the line is the solid's name
                after += 1
            position = after
        else:
            position = after
    return count, num_facets, num_uneven, num_ends, -1


def _read_ascii(data: bytes, max_faces: int) -> RawMesh:
    text = data.lower()
    capacity = 3 * text.count(b"vertex")
    check_num_faces(capacity // 9, max_faces)
    values = np.empty(capacity)
    long_at = np.empty(capacity, np.int64)
    count, num_facets, num_uneven, num_ends, bad = _scan_ascii(np.frombuffer(text, np.uint8), values, long_at)
    if bad >= 0:
        if len(text) - bad < 40 and num_ends == 0:
            raise BadMesh("truncated", f"the text ends inside facet {num_facets}, without 'endsolid'")
        raise BadMesh("malformed", f"not a coordinate in facet {num_facets}: {text[bad : bad + 20]!r}")
    if num_facets == 0:
        raise BadMesh("no_faces", "an ASCII STL without a facet")
    if num_uneven or count != 9 * num_facets:
        if num_ends == 0:
            raise BadMesh("truncated", f"facet {num_facets} is incomplete and there is no 'endsolid'")
        raise BadMesh("malformed", f"{num_facets} facets have {count // 3} vertices, three each are needed")
    reread_long(text, values[:count], long_at[:count])
    warnings = [] if num_ends else ["no 'endsolid': the file may have been cut off between two facets"]
    vertices = values[:count].reshape(-1, 3)
    return RawMesh(vertices, np.arange(len(vertices)).reshape(-1, 3), warnings)
