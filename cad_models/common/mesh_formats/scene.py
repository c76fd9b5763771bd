"""Instances of geometry under transforms -> one mesh; shared by the formats that have a scene graph."""

import numpy as np

from cad_models.common.mesh_formats import BadMesh, RawMesh, check_num_faces

MAX_NODES = 200_000  # visits of nodes: nested instances multiply, so a small file may describe an endless scene
MAX_DEPTH = 200  # levels of nested nodes or XML elements


class SceneBuilder:
    """Collects placed triangles; the limit of faces holds for the scene as placed, before anything is copied."""

    def __init__(self, max_faces: int):
        self._max_faces = max_faces
        self._num_faces = 0
        self._num_visits = 0
        self._num_vertices = 0
        self._vertices: list[np.ndarray] = []
        self._faces: list[np.ndarray] = []
        self.warnings: list[str] = []

    def visit(self, depth: int) -> None:
        """Counts the visit of a node ``depth`` levels down; raises BadMesh where the scene has no end."""
        self._num_visits += 1
        if depth > MAX_DEPTH:
            raise BadMesh("malformed", f"nodes are nested more than {MAX_DEPTH} deep, or contain themselves")
        if self._num_visits > MAX_NODES:
            raise BadMesh("too_large", f"the scene has more than {MAX_NODES} nodes")

    def add(self, vertices: np.ndarray, faces: np.ndarray, transform: np.ndarray) -> None:
        """Places a geometry.

        Args:
            vertices: float64 [V, 3].
            faces: integer [F, 3].
            transform: float64 [4, 4], for column vectors. One that mirrors turns the faces round, so that they still look outwards.
        """
        self._num_faces += len(faces)
        check_num_faces(self._num_faces, self._max_faces)
        if len(faces) and (faces.min() < 0 or faces.max() >= len(vertices)):
            raise BadMesh("index_out_of_range", f"a face refers to vertex {faces.max()}, counted from 0, of {len(vertices)}")
        with np.errstate(over="ignore", invalid="ignore"):  # non-finite results are rejected by the caller
            if not np.array_equal(transform, np.eye(4)):
                vertices = vertices @ transform[:3, :3].T + transform[:3, 3]
                if np.linalg.det(transform[:3, :3]) < 0:
                    faces = faces[:, ::-1]
        self._vertices.append(vertices)
        self._faces.append(faces + self._num_vertices)
        self._num_vertices += len(vertices)

    def mesh(self) -> RawMesh:
        """All that was placed; raises BadMesh("no_faces") if nothing was."""
        if self._num_faces == 0:
            raise BadMesh("no_faces", "the scene places no triangles")
        return RawMesh(np.concatenate(self._vertices), np.concatenate(self._faces), self.warnings)
