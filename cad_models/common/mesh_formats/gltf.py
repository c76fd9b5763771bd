"""glTF 2.0: .glb, and .gltf with its buffers embedded (Khronos glTF 2.0 specification)."""

import base64
import binascii
import json
import struct

import numpy as np

from cad_models.common.mesh_formats import BadMesh, RawMesh, check_num_faces
from cad_models.common.mesh_formats.scene import SceneBuilder

_COMPONENTS = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}
_UNREADABLE_EXTENSIONS = ("KHR_draco_mesh_compression", "EXT_meshopt_compression", "KHR_meshopt_compression")
_TRIANGLES, _STRIP, _FAN = 4, 5, 6


def _chunks(data: bytes) -> tuple[bytes, bytes | None]:
    """JSON and binary chunk of a .glb; the text itself of a .gltf."""
    if not data.startswith(b"glTF"):
        return data, None
    if len(data) < 20:
        raise BadMesh("truncated", f"{len(data)} bytes")
    version, length = struct.unpack_from("<II", data, 4)
    if version != 2:
        raise BadMesh("unsupported_format", f"binary glTF version {version}, version 2 is read")
    if length > len(data):
        raise BadMesh("truncated", f"the header declares {length} bytes, there are {len(data)}")
    position, found = 12, {}
    while position + 8 <= length:
        size, kind = struct.unpack_from("<I4s", data, position)
        if position + 8 + size > length:
            raise BadMesh("truncated", f"a chunk declares {size} bytes, {length - position - 8} are left")
        found.setdefault(kind, data[position + 8 : position + 8 + size])
        position += 8 + size
    if b"JSON" not in found:
        raise BadMesh("malformed", "binary glTF without a JSON chunk")
    return found[b"JSON"], found.get(b"BIN\x00")


class _Document:
    def __init__(self, tree: dict, binary: bytes | None):
        self._tree = tree
        self._binary = binary
        self._buffers: dict[int, bytes] = {}

    def entry(self, kind: str, index: object) -> dict:
        """``tree[kind][index]``, checked."""
        entries = self._tree.get(kind, [])
        if not isinstance(entries, list) or type(index) is not int or not 0 <= index < len(entries) or not isinstance(entries[index], dict):
            raise BadMesh("malformed", f"{kind}[{index!r}] does not exist")
        return entries[index]

    def _buffer(self, index: object) -> bytes:
        buffer = self.entry("buffers", index)
        if index not in self._buffers:
            uri = buffer.get("uri")
            if uri is None:
                if self._binary is None or index != 0:
                    raise BadMesh("malformed", f"buffer {index} has neither a URI nor a binary chunk")
                self._buffers[index] = self._binary
            elif isinstance(uri, str) and uri.startswith("data:") and ";base64," in uri[:200]:
                try:
                    self._buffers[index] = base64.b64decode(uri.partition(";base64,")[2], validate=True)
                except (binascii.Error, ValueError) as error:
                    raise BadMesh("malformed", f"buffer {index}: {error}") from error
            else:
                raise BadMesh("external_data", f"buffer {index} is in another file ({str(uri)[:60]!r}): save as .glb or embed it")
        return self._buffers[index]

    def accessor(self, index: object, width: int) -> np.ndarray:
        """Values of an accessor, [count, width]; float64 where normalised or float, else int64."""
        accessor = self.entry("accessors", index)
        kind = accessor.get("componentType")
        if kind not in _COMPONENTS or _WIDTHS.get(accessor.get("type", "")) != width:
            raise BadMesh("malformed", f"accessor {index} is {accessor.get('type')!r} of component type {kind!r}")
        dtype = np.dtype(_COMPONENTS[kind])
        count = _natural(accessor, "count")
        if "bufferView" in accessor:
            values = self._view(accessor["bufferView"], _natural(accessor, "byteOffset"), count, dtype, width)
        elif "sparse" in accessor:
            check_num_faces(count, 1 << 24)  # zeros, which no byte of the file backs
            values = np.zeros((count, width), dtype)
        else:
            raise BadMesh("malformed", f"accessor {index} has no data")
        if "sparse" in accessor:
            values = self._with_sparse(values, accessor["sparse"])
        if dtype.kind == "f":
            with np.errstate(invalid="ignore"):
                return values.astype(np.float64)
        if accessor.get("normalized"):
            return np.maximum(values / np.iinfo(dtype).max, -1.0)
        return values.astype(np.int64)

    def _view(self, index: object, offset: int, count: int, dtype: np.dtype, width: int) -> np.ndarray:
        view = self.entry("bufferViews", index)
        if any(name in view.get("extensions", {}) for name in _UNREADABLE_EXTENSIONS):
            raise BadMesh("unsupported_format", "meshopt-compressed buffers: decompress with gltfpack or gltf-transform")
        data = self._buffer(view.get("buffer"))
        start, length = _natural(view, "byteOffset"), _natural(view, "byteLength")
        item = dtype.itemsize * width
        stride = _natural(view, "byteStride") or item
        end = offset + (stride * (count - 1) + item if count else 0)
        if stride < item or end > length or start + length > len(data):
            raise BadMesh("truncated", f"{count} values of bufferView {index} need {end} bytes; it has {min(length, max(len(data) - start, 0))}")
        return np.ndarray((count, width), dtype, data, start + offset, (stride, dtype.itemsize))

    def _with_sparse(self, values: np.ndarray, sparse: object) -> np.ndarray:
        if not isinstance(sparse, dict) or not all(isinstance(sparse.get(part), dict) for part in ("indices", "values")):
            raise BadMesh("malformed", "broken sparse accessor")
        count = _natural(sparse, "count")
        where, what = sparse["indices"], sparse["values"]
        if where.get("componentType") not in (5121, 5123, 5125):
            raise BadMesh("malformed", "broken sparse accessor")
        dtype = np.dtype(_COMPONENTS[where["componentType"]])
        rows = self._view(where.get("bufferView"), _natural(where, "byteOffset"), count, dtype, 1)[:, 0]
        if count and rows.max() >= len(values):
            raise BadMesh("index_out_of_range", "a sparse accessor replaces a value that does not exist")
        values = values.copy()
        values[rows] = self._view(what.get("bufferView"), _natural(what, "byteOffset"), count, values.dtype, values.shape[1])
        return values

    def primitive(self, primitive: dict) -> tuple[np.ndarray, np.ndarray] | None:
        """(vertices float64 [V, 3], faces int64 [F, 3]); None for points and lines."""
        if any(name in primitive.get("extensions", {}) for name in _UNREADABLE_EXTENSIONS):
            raise BadMesh("unsupported_format", "Draco-compressed geometry: decompress with gltf-transform")
        mode = primitive.get("mode", _TRIANGLES)
        attributes = primitive.get("attributes")
        if mode not in (_TRIANGLES, _STRIP, _FAN) or not isinstance(attributes, dict) or "POSITION" not in attributes:
            return None
        vertices = self.accessor(attributes["POSITION"], 3).astype(np.float64)
        indices = self.accessor(primitive["indices"], 1)[:, 0] if "indices" in primitive else np.arange(len(vertices))
        indices = indices.astype(np.int64)
        if mode == _TRIANGLES:
            if len(indices) % 3:
                raise BadMesh("malformed", f"{len(indices)} indices of triangles, not a multiple of 3")
            return vertices, indices.reshape(-1, 3)
        if len(indices) < 3:
            return None
        if mode == _FAN:
            return vertices, np.stack([np.full(len(indices) - 2, indices[0]), indices[1:-1], indices[2:]], axis=1)
        faces = np.stack([indices[:-2], indices[1:-1], indices[2:]], axis=1)
        faces[1::2] = faces[1::2, ::-1]
        return vertices, faces


def _natural(entry: dict, name: str) -> int:
    """A count or an offset; 0 where it is missing."""
    value = entry.get(name, 0)
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise BadMesh("malformed", f"{name} is {value!r}")
    return value


def _list(entry: dict, name: str) -> list:
    value = entry.get(name, [])
    if not isinstance(value, list):
        raise BadMesh("malformed", f"{name} is not a list")
    return value


def _floats(entry: dict, name: str, size: int, default: list[float]) -> np.ndarray:
    value = entry.get(name, default)
    if not isinstance(value, list) or len(value) != size or not all(type(x) in (int, float) for x in value):
        raise BadMesh("malformed", f"{name} of a node is not {size} numbers")
    return np.array([float(x) for x in value])


def _local_transform(node: dict) -> np.ndarray:
    if "matrix" in node:
        return _floats(node, "matrix", 16, []).reshape(4, 4).T  # stored by columns
    x, y, z, w = _floats(node, "rotation", 4, [0.0, 0.0, 0.0, 1.0])
    transform = np.eye(4)
    transform[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    transform[:3, :3] *= _floats(node, "scale", 3, [1.0, 1.0, 1.0])
    transform[:3, 3] = _floats(node, "translation", 3, [0.0, 0.0, 0.0])
    return transform


def read_gltf(data: bytes, max_faces: int) -> RawMesh:
    """Reads the triangles of the default scene (of all meshes where there is no scene), in bind pose, without morphing."""
    text, binary = _chunks(data)
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        is_json = text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
        raise BadMesh("malformed" if is_json else "not_a_mesh", f"JSON: {error}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("asset"), dict):
        raise BadMesh("not_a_mesh", "JSON that is no glTF: it has no 'asset'")
    try:
        return _read_scene(tree, binary, max_faces)
    except (AttributeError, TypeError, OverflowError) as error:  # an entry of another JSON type than the specification's
        raise BadMesh("malformed", f"an entry is of the wrong type: {error}") from error


def _read_scene(tree: dict, binary: bytes | None, max_faces: int) -> RawMesh:
    document = _Document(tree, binary)
    scene = SceneBuilder(max_faces)
    primitives: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}

    def place(index: object, transform: np.ndarray) -> None:
        mesh = document.entry("meshes", index)
        if index not in primitives:
            read = (document.primitive(primitive) for primitive in _list(mesh, "primitives"))
            primitives[index] = [geometry for geometry in read if geometry is not None]
        for vertices, faces in primitives[index]:
            scene.add(vertices, faces, transform)

    nodes = _list(tree, "nodes")
    if _list(tree, "scenes"):
        roots = _list(document.entry("scenes", tree.get("scene", 0)), "nodes")
    else:
        below = {child for node in nodes if isinstance(node, dict) for child in _list(node, "children")}
        roots = [index for index in range(len(nodes)) if index not in below]
    if not nodes:
        for index in range(len(_list(tree, "meshes"))):
            place(index, np.eye(4))
    stack = [(index, np.eye(4), 0) for index in reversed(roots)]
    while stack:
        index, outer, depth = stack.pop()
        scene.visit(depth)
        node = document.entry("nodes", index)
        with np.errstate(over="ignore", invalid="ignore"):
            transform = outer @ _local_transform(node)
        if "mesh" in node:
            place(node["mesh"], transform)
        stack.extend((child, transform, depth + 1) for child in reversed(_list(node, "children")))
    return scene.mesh()
