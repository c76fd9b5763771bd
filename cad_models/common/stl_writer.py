"""Writing binary STL files."""

import numpy as np
from jaxtyping import Float, Integer


def binary_stl(vertices: Float[np.ndarray, "vertices 3"], faces: Integer[np.ndarray, "faces 3"]) -> bytes:
    """A binary STL file; coordinates are rounded to float32."""
    corners = vertices[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-30)
    records = np.zeros(len(faces), dtype=[("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    records["normal"], records["corners"] = normals, corners
    return bytes(80) + np.uint32(len(faces)).tobytes() + records.tobytes()
