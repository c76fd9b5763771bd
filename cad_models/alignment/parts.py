"""Generated CAD parts: any number of mechanical parts from a seed, so that a demo and tests need no download.

A part is drawn from a family (bolt, bracket, gear, ...) with continuous dimensions in millimetres and optional
features, and built from exact solids (extrusions, revolutions, sweeps and their Boolean combinations), so every mesh
is closed and oriented outwards. Parts stand as they would on a table, +z up, centred on the z axis, on the plane z =
0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int32

from cad_models.alignment.families import FAMILIES, Draw

__all__ = ["FAMILIES", "Part", "generate_part", "solid_arrays"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A closed triangle mesh with the parameters that it was made from."""

    object_id: str
    """``part-`` and the index in six digits."""
    family: str
    """Key of ``FAMILIES``."""
    parameters: dict[str, float]
    """Dimensions in mm, angles in degrees, counts, and features as 0 or 1."""
    vertices: Float64[np.ndarray, "num_vertices 3"]
    """In mm, +z up."""
    faces: Int32[np.ndarray, "num_faces 3"]
    """Counter-clockwise seen from outside."""


def generate_part(index: int, seed: int) -> Part:
    """Part number ``index`` of the set ``seed``; the families take turns, so any run of indices is balanced.

    The same index and seed give the same bytes in every process; neither may be negative.
    """
    if index < 0 or seed < 0:
        raise ValueError(f"index is {index} and seed is {seed}: neither may be negative")
    family = list(FAMILIES)[index % len(FAMILIES)]
    draw = Draw(np.random.default_rng([seed, index]))
    vertices, faces = solid_arrays(FAMILIES[family], draw)
    return Part(
        object_id=f"part-{index:06d}", family=family, parameters=dict(draw.parameters), vertices=vertices, faces=faces
    )


def solid_arrays(build: Callable, draw: Draw) -> tuple[Float64[np.ndarray, "v 3"], Int32[np.ndarray, "f 3"]]:
    """Vertices and faces of the solid that ``build(draw)`` makes, set on the plane z = 0 around the z axis."""
    solid = build(draw)
    assert not solid.is_empty(), f"{build.__name__} made an empty solid ({solid.status()}) from {draw.parameters}"
    mesh = solid.to_mesh64()
    vertices = np.array(mesh.vert_properties[:, :3], dtype=np.float64)
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    vertices -= np.array([(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]])
    return vertices, np.array(mesh.tri_verts, dtype=np.int32)
