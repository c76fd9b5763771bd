"""Readers of mesh files: bytes in, triangles out, or :class:`BadMesh` that says why not.

One file a format. Every reader is bounded by the length of its input: a declared count is compared with the bytes that are there before
anything is allocated, an archive is inflated only up to a limit, XML entities are refused, nothing outside the given bytes is opened. The
readers are our own because general mesh libraries return an empty mesh without an error for many broken files, merge vertices by absolute
tolerances, and parse materials, which are of no use here. Checks that all formats share (indices, finite, extent, area) are in
:mod:`cad_models.common.meshes`.
"""

from dataclasses import dataclass, field

import numpy as np

MESH_REASONS: tuple[str, ...] = (
    "empty_file",  # no bytes at all
    "lfs_pointer",  # a Git LFS pointer, not the file that it stands for
    "not_a_mesh",  # the content is of another kind than its suffix says
    "unsupported_format",  # a suffix or variant that no reader here knows
    "external_data",  # the geometry is in another file
    "truncated",  # ends before what it declares
    "malformed",  # breaks the rules of its format
    "no_faces",  # points or lines only, or nothing
    "index_out_of_range",  # a face refers to a vertex that does not exist
    "non_finite",  # NaN or infinite coordinates
    "zero_extent",  # all vertices in one point
    "zero_area",  # every face is a line or a point
    "too_large",  # more faces, or inflated bytes, than the limit
)

MESH_SUFFIXES: tuple[str, ...] = (
    ".stl", ".off", ".obj", ".ply", ".glb", ".gltf", ".3mf", ".dae", ".step", ".stp",
)  # fmt: skip


class BadMesh(ValueError):
    """A file that gives no usable triangle mesh.

    Args:
        reason: one of :data:`MESH_REASONS`.
        detail: what was found, for a person.
    """

    def __init__(self, reason: str, detail: str):
        assert reason in MESH_REASONS, reason
        super().__init__(reason, detail)  # both in args: the exception must survive pickling between processes
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class RawMesh:
    """What a file says, before the checks that all formats share.

    Attributes:
        vertices: float64 [V, 3], in file units and axes; may be non-finite.
        faces: integer [F, 3]; may be out of range.
        warnings: what was tolerated.
    """

    vertices: np.ndarray
    faces: np.ndarray
    warnings: list[str] = field(default_factory=list)


_FOREIGN_CONTENT = (
    (b"\x89PNG\r\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"BM", "a BMP image"),
    (b"%PDF", "a PDF document"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"Rar!", "a RAR archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"\x7fELF", "a program"),
    (b"ply\n", "a PLY mesh"),
    (b"ply\r", "a PLY mesh"),
    (b"glTF", "a binary glTF mesh"),
    (b"ISO-10303-21", "a STEP file"),
    (b"PK\x03\x04", "a ZIP archive"),
)
_OWN_CONTENT = {
    ".ply": ("a PLY mesh",),
    ".glb": ("a binary glTF mesh",),
    ".gltf": ("a binary glTF mesh",),
    ".3mf": ("a ZIP archive",),
    ".step": ("a STEP file",),
    ".stp": ("a STEP file",),
}


def _foreign_content(data: bytes, suffix: str) -> str | None:
    """What the content plainly is, where that is not what ``suffix`` says; None where nothing speaks against it."""
    if suffix == ".stl" and len(data) >= 84 and 84 + 50 * int.from_bytes(data[80:84], "little") == len(data):
        return None  # the length proves a binary STL; its first 80 bytes are free text and may be anything
    for magic, kind in _FOREIGN_CONTENT:
        if data.startswith(magic):
            return None if kind in _OWN_CONTENT.get(suffix, ()) else kind
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if start.startswith(b"<") and suffix != ".dae":
        return "an XML or HTML document"
    return None


def read_raw(data: bytes, suffix: str, max_faces: int) -> RawMesh:
    """Reads ``data`` by the reader of ``suffix`` (any case, with its dot).

    Raises:
        BadMesh: the content cannot be read; see :data:`MESH_REASONS`.
    """
    suffix = suffix.lower()
    if suffix not in MESH_SUFFIXES:
        raise BadMesh("unsupported_format", f"{suffix or 'no suffix'} is not one of {', '.join(MESH_SUFFIXES)}")
    if not data:
        raise BadMesh("empty_file", "the file has no bytes")
    if len(data) < 1024 and data.lstrip().startswith(b"version https://git-lfs"):
        raise BadMesh("lfs_pointer", "this is a Git LFS pointer, not the mesh: run `git lfs pull` where the file comes from")
    foreign = _foreign_content(data, suffix)
    if foreign:
        raise BadMesh("not_a_mesh", f"the content is {foreign}, not {suffix}")
    # Each reader is imported when its format comes up: numba and expat cost start-up time.
    if suffix == ".stl":
        from cad_models.common.mesh_formats.stl import read_stl as read
    elif suffix == ".off":
        from cad_models.common.mesh_formats.off import read_off as read
    elif suffix == ".obj":
        from cad_models.common.mesh_formats.obj import read_obj as read
    elif suffix == ".ply":
        from cad_models.common.mesh_formats.ply import read_ply as read
    elif suffix in (".glb", ".gltf"):
        from cad_models.common.mesh_formats.gltf import read_gltf as read
    elif suffix == ".3mf":
        from cad_models.common.mesh_formats.threemf import read_3mf as read
    elif suffix == ".dae":
        from cad_models.common.mesh_formats.dae import read_dae as read
    else:
        from cad_models.common.mesh_formats.step import read_step as read
    return read(data, max_faces)


def check_num_faces(num_faces: int, max_faces: int) -> None:
    """Raises BadMesh("too_large") when there are more faces than the limit."""
    if num_faces > max_faces:
        raise BadMesh("too_large", f"{num_faces} faces, the limit is {max_faces}")
