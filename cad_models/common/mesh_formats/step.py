"""STEP (ISO 10303-21), through OpenCASCADE: the optional package cascadio."""

import re

import numpy as np

from cad_models.common.mesh_formats import BadMesh, RawMesh
from cad_models.common.mesh_formats.gltf import read_gltf

_POINT = re.compile(rb"CARTESIAN_POINT\s*\(\s*'[^']*'\s*,\s*\(\s*([-+0-9.eE]+)\s*,\s*([-+0-9.eE]+)\s*,\s*([-+0-9.eE]+)\s*\)")
_RELATIVE_TOLERANCE = 1e-3  # largest distance of a facet from the true surface, in lengths of the part's diagonal
_ANGULAR_TOLERANCE_RAD = 0.35  # 18 facets around a full circle, at the least


def read_step(data: bytes, max_faces: int) -> RawMesh:
    """Tessellates a STEP file, in millimetres whatever its own unit. The tolerance follows the part's size: an absolute one gives millions of facets, or none at all.

    OpenCASCADE is native code and may hang or crash on broken files: call this in a process that can be lost.

    Raises:
        BadMesh: unsupported_format where cascadio is not installed; truncated, malformed, no_faces, too_large.
    """
    if not data.lstrip().startswith(b"ISO-10303-21"):
        raise BadMesh("not_a_mesh", f"does not begin with ISO-10303-21 but with {data[:40]!r}")
    if b"END-ISO-10303-21" not in data[-4096:]:
        raise BadMesh("truncated", "the STEP file has no END-ISO-10303-21")
    try:
        import cascadio
    except ImportError as error:
        raise BadMesh("unsupported_format", "STEP needs the package cascadio: pip install '.[step]'") from error
    points = [tuple(map(_float, match)) for match in _POINT.findall(data)]
    if not points:
        raise BadMesh("no_faces", "the STEP file has no points")
    # Points of infinite construction lines may lie far out: the inner 98 % tell the size.
    low, high = np.nanpercentile(np.array(points), (1, 99), axis=0)
    size = float(np.linalg.norm(high - low)) or 1.0
    glb = cascadio.load(
        data,
        file_type="step",
        tol_linear=size * _RELATIVE_TOLERANCE,
        tol_angular=_ANGULAR_TOLERANCE_RAD,
        use_parallel=False,  # the same order of facets every time
    )
    if not glb:
        raise BadMesh("malformed", "OpenCASCADE cannot read this STEP file")
    raw = read_gltf(glb, max_faces)
    # glTF is in metres; parts in STEP files are drawn in millimetres, as those in STL files are.
    return RawMesh(raw.vertices * 1000, raw.faces, raw.warnings)


def _float(text: bytes) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
