"""3MF: the core specification's meshes and components, and the production extension's parts (3mf.io/spec)."""

import io
import posixpath
import zipfile
import zlib
from array import array

import numpy as np

from cad_models.common.mesh_formats import BadMesh, RawMesh, check_num_faces
from cad_models.common.mesh_formats.scene import SceneBuilder
from cad_models.common.mesh_formats.xml import parse_xml

_MAX_INFLATED = 2 << 30  # bytes of all model parts together
_MAX_RATIO = 200  # inflated by packed bytes: XML of meshes packs 5 to 15 times, bombs 1,000 times
_RATIO_FREE = 16 << 20  # below this size the ratio does not matter


class _Part:
    """One .model file: its objects by id, and what it asks to build."""

    def __init__(self, max_faces: int):
        self.vertices: dict[str, array] = {}
        self.triangles: dict[str, array] = {}
        self.components: dict[str, list[tuple[str, str | None, np.ndarray]]] = {}
        self.build: list[tuple[str, str | None, np.ndarray]] = []
        self._max_faces = max_faces
        self._object = ""
        self._points, self._corners = array("d"), array("q")

    def start(self, name: str, attributes: dict[str, str]) -> None:
        try:
            if name == "vertex":
                self._points.append(float(attributes["x"]))
                self._points.append(float(attributes["y"]))
                self._points.append(float(attributes["z"]))
            elif name == "triangle":
                self._corners.append(int(attributes["v1"]))
                self._corners.append(int(attributes["v2"]))
                self._corners.append(int(attributes["v3"]))
            elif name == "object":
                self._object = attributes["id"]
                self._points, self._corners = array("d"), array("q")
                self.vertices[self._object], self.triangles[self._object] = self._points, self._corners
                self.components[self._object] = []
            elif name == "component" and self._object:
                self.components[self._object].append(_reference(attributes))
            elif name == "item":
                self.build.append(_reference(attributes))
        except KeyError as error:
            raise BadMesh("malformed", f"<{name}> without attribute {error}") from error
        except (ValueError, OverflowError) as error:
            raise BadMesh("malformed", f"<{name}>: {error}") from error
        if name == "triangle":
            check_num_faces(len(self._corners) // 3, self._max_faces)

    def end(self, name: str) -> None:
        if name == "object":
            self._object = ""


def _reference(attributes: dict[str, str]) -> tuple[str, str | None, np.ndarray]:
    """(object id, part of the archive or None, transform for column vectors) of a <component> or an <item>."""
    transform = np.eye(4)
    if "transform" in attributes:
        # The file multiplies row vectors from the left: 4 rows of 3.
        transform[:3, :] = np.array([float(word) for word in attributes["transform"].split()]).reshape(4, 3).T
    path = next((value for name, value in attributes.items() if name.rpartition("}")[2] == "path"), None)
    return attributes["objectid"], path, transform


def _absolute(name: str) -> str:
    """The name of a part as packages write it in references: from the root, with one slash."""
    return posixpath.normpath("/" + name.lstrip("/"))


def _inflate(archive: zipfile.ZipFile, name: str, budget: int) -> bytes:
    """One file of the archive, read in steps: the size that it declares is not trusted."""
    data = bytearray()
    with archive.open(name) as stream:
        while block := stream.read(1 << 20):
            data += block
            if len(data) > budget:
                raise BadMesh("too_large", f"{name} inflates to more than {budget} bytes")
    return bytes(data)


def read_3mf(data: bytes, max_faces: int) -> RawMesh:
    """Reads the objects that the build section places (all objects where it is missing, with a warning), in the file's unit."""
    try:
        return _read_archive(data, max_faces)
    except zipfile.BadZipFile as error:
        raise BadMesh("truncated" if data.startswith(b"PK") else "not_a_mesh", f"ZIP archive: {error}") from error
    except (zlib.error, EOFError, NotImplementedError, RuntimeError, OSError, ValueError, OverflowError) as error:
        # zipfile: broken deflate data; ends early; unknown compression; encrypted; seeks outside the file; odd fields
        if isinstance(error, BadMesh):
            raise
        raise BadMesh("malformed", f"ZIP archive: {type(error).__name__}: {error}") from error


def _read_archive(data: bytes, max_faces: int) -> RawMesh:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        models = {_absolute(entry.filename): entry for entry in archive.infolist() if entry.filename.lower().endswith(".model")}
        if not models:
            raise BadMesh("not_a_mesh", "a ZIP archive without a .model file")
        for entry in models.values():
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise BadMesh("unsupported_format", f"{entry.filename} is packed by method {entry.compress_type}, 3MF allows stored and deflate")
        budget = min(_MAX_INFLATED, max(_RATIO_FREE, _MAX_RATIO * len(data)))
        declared = sum(entry.file_size for entry in models.values())
        if declared > budget:
            raise BadMesh("too_large", f"{len(data)} bytes declare {declared} bytes of models inside, the limit is {budget}")
        parts: dict[str, _Part] = {}
        for path, entry in models.items():
            text = _inflate(archive, entry.filename, budget)
            budget -= len(text)
            parts[path] = _Part(max_faces)
            parse_xml(text, parts[path].start, parts[path].end)
    return _build(parts, max_faces)


def _build(parts: dict[str, _Part], max_faces: int) -> RawMesh:
    scene = SceneBuilder(max_faces)
    root = next((path for path in parts if path.lower() == "/3d/3dmodel.model"), None)
    if root is None:
        root = next((path for path, part in parts.items() if part.build), next(iter(parts)))
    items = parts[root].build
    if not items:
        scene.warnings.append("no build section: all objects are taken")
        used = {reference[0] for components in parts[root].components.values() for reference in components}
        items = [(name, None, np.eye(4)) for name in parts[root].vertices if name not in used]
    arrays: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
    stack = [(root, item, np.eye(4), 0) for item in reversed(items)]
    while stack:
        path, (name, other, local), outer, depth = stack.pop()
        scene.visit(depth)
        path = _absolute(other) if other else path
        if path not in parts or name not in parts[path].vertices:
            raise BadMesh("malformed", f"object {name} of {path} is placed but not defined")
        with np.errstate(over="ignore", invalid="ignore"):
            transform = outer @ local
        part = parts[path]
        if len(part.triangles[name]):
            if (path, name) not in arrays:
                arrays[path, name] = (np.array(part.vertices[name]).reshape(-1, 3), np.array(part.triangles[name]).reshape(-1, 3))
            scene.add(*arrays[path, name], transform)
        stack.extend((path, component, transform, depth + 1) for component in reversed(part.components[name]))
    return scene.mesh()
