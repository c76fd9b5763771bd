"""COLLADA 1.4 and 1.5 (.dae): triangles, polylists, polygons, strips and fans, placed by the scene's nodes."""

from collections.abc import Iterator
from xml.etree import ElementTree

import numpy as np

from cad_models.common.mesh_formats import BadMesh, RawMesh
from cad_models.common.mesh_formats.numbers import numbers_of
from cad_models.common.mesh_formats.polygons import triangulated
from cad_models.common.mesh_formats.scene import SceneBuilder
from cad_models.common.mesh_formats.xml import parse_xml

_Geometry = list[tuple[np.ndarray, np.ndarray]]  # (float64 [V, 3], int64 [F, 3]) of each primitive


def _numbers(element: ElementTree.Element | None, what: str) -> np.ndarray:
    text = (element.text or "") if element is not None else ""
    encoded = text.encode()
    numbers, _, end = numbers_of(encoded)
    if encoded[end:].strip():
        raise BadMesh("malformed", f"{what}: not a number: {encoded[end : end + 20]!r}")
    return numbers


def _integers(element: ElementTree.Element | None, what: str) -> np.ndarray:
    numbers = _numbers(element, what)
    if not (np.abs(numbers) < 1e15).all():  # also false for NaN
        raise BadMesh("malformed", f"{what}: not all integers")
    return numbers.astype(np.int64)


def _integer_attribute(element: ElementTree.Element, name: str, default: int) -> int:
    text = element.get(name, str(default))
    if not (text.strip().isascii() and text.strip().isdigit() and len(text) < 19):
        raise BadMesh("malformed", f"<{element.tag} {name}={text[:30]!r}>: not a count")
    return int(text)


def _positions(mesh: ElementTree.Element, by_id: dict[tuple[str, str], ElementTree.Element]) -> dict[str, np.ndarray]:
    """id of each <vertices> -> its positions, float64 [V, 3]."""
    positions = {}
    for vertices in mesh.findall("vertices"):
        for entry in vertices.findall("input"):
            if entry.get("semantic") != "POSITION":
                continue
            source = by_id.get(("source", entry.get("source", "").lstrip("#")))
            array = source.find("float_array") if source is not None else None
            if array is None:
                raise BadMesh("malformed", f"positions {entry.get('source')!r} are not defined")
            values = _numbers(array, "float_array")
            declared = _integer_attribute(array, "count", len(values))
            if declared > len(values):
                raise BadMesh("truncated", f"float_array declares {declared} numbers and has {len(values)}")
            accessor = source.find("technique_common/accessor")
            stride = _integer_attribute(accessor, "stride", 1) if accessor is not None else 3
            offset = _integer_attribute(accessor, "offset", 0) if accessor is not None else 0
            if stride < 3:
                raise BadMesh("malformed", f"positions have {stride} coordinates")
            rows = max(0, (len(values) - offset) // stride)
            positions[vertices.get("id", "")] = values[offset : offset + rows * stride].reshape(rows, stride)[:, :3]
    return positions


def _polygons(primitive: ElementTree.Element, stride: int, offset: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(sizes, corners) of the polygons of one primitive element; see ``triangulated``."""
    kind = primitive.tag
    lists = [_integers(element, f"<p> of <{kind}>") for element in primitive.iter("p")]
    for indices in lists:
        if len(indices) % stride:
            raise BadMesh("malformed", f"<p> of <{kind}> has {len(indices)} indices, not a multiple of {stride}")
    rings = [indices.reshape(-1, stride)[:, offset] for indices in lists]
    if kind in ("triangles", "polylist"):
        corners = np.concatenate(rings) if rings else np.empty(0, np.int64)
        if kind == "triangles":
            if len(corners) % 3:
                raise BadMesh("malformed", f"<triangles> with {len(corners)} corners, not a multiple of 3")
            sizes = np.full(len(corners) // 3, 3)
        else:
            sizes = _integers(primitive.find("vcount"), "<vcount>")
            if (sizes < 0).any() or sizes.sum() != len(corners):
                raise BadMesh("malformed", f"<vcount> sums to {sizes.sum()}, <p> has {len(corners)} corners")
        declared = _integer_attribute(primitive, "count", len(sizes))
        if declared > len(sizes):
            raise BadMesh("truncated", f"<{kind}> declares {declared} and has {len(sizes)}")
        yield sizes, corners
    elif kind == "polygons":
        yield np.array([len(ring) for ring in rings], np.int64), np.concatenate([*rings, np.empty(0, np.int64)])
    else:
        for ring in rings:
            if len(ring) < 3:
                continue
            if kind == "trifans":
                triangles = np.stack([np.full(len(ring) - 2, ring[0]), ring[1:-1], ring[2:]], axis=1)
            else:  # tristrips: every second triangle runs the other way round
                triangles = np.stack([ring[:-2], ring[1:-1], ring[2:]], axis=1)
                triangles[1::2] = triangles[1::2, ::-1]
            yield np.full(len(triangles), 3), triangles.reshape(-1)


class _Document:
    def __init__(self, root: ElementTree.Element, max_faces: int):
        # By kind, too: exporters give a node and its scene, or a geometry and its node, the same id.
        self.by_id = {(element.tag, element.get("id")): element for element in root.iter() if element.get("id")}
        self.root = root
        self.max_faces = max_faces
        self.scene = SceneBuilder(max_faces)
        self._geometries: dict[int, _Geometry] = {}

    def find(self, kind: str, url: str | None) -> ElementTree.Element | None:
        """The ``<kind id=...>`` that ``#id`` names; None, with a warning, if it is not in this file."""
        if url is None or not url.startswith("#"):
            self.scene.warnings.append(f"reference {url!r} to another file ignored")
            return None
        element = self.by_id.get((kind, url[1:]))
        if element is None:
            self.scene.warnings.append(f"reference {url!r} names nothing in this file")
        return element

    def geometry(self, element: ElementTree.Element) -> _Geometry:
        """The triangles of a <geometry>, read once."""
        if id(element) in self._geometries:
            return self._geometries[id(element)]
        primitives: _Geometry = []
        mesh = element.find("mesh")
        if mesh is None:
            mesh = element.find("convex_mesh")
        if mesh is not None:
            positions = _positions(mesh, self.by_id)
            for primitive in mesh:
                if primitive.tag not in ("triangles", "polylist", "polygons", "tristrips", "trifans"):
                    continue
                inputs = primitive.findall("input")
                stride = 1 + max((_integer_attribute(entry, "offset", 0) for entry in inputs), default=0)
                entry = next((entry for entry in inputs if entry.get("semantic") == "VERTEX"), None)
                if entry is None or entry.get("source", "").lstrip("#") not in positions:
                    raise BadMesh("malformed", f"<{primitive.tag}> has no positions")
                vertices = positions[entry.get("source", "").lstrip("#")]
                if any(True for _ in primitive.iter("h")):
                    self.scene.warnings.append("polygons with holes: the holes are filled")
                for sizes, corners in _polygons(primitive, stride, _integer_attribute(entry, "offset", 0)):
                    faces = triangulated(vertices, sizes, corners, self.max_faces, self.scene.warnings)
                    primitives.append((vertices, faces))
        self._geometries[id(element)] = primitives
        return primitives

    def place(self, element: ElementTree.Element, transform: np.ndarray) -> None:
        for vertices, faces in self.geometry(element):
            self.scene.add(vertices, faces, transform)

    def place_nodes(self, roots: list[ElementTree.Element]) -> None:
        """Places what ``roots`` and all nodes below them instantiate."""
        stack = [(node, np.eye(4), 0) for node in reversed(roots)]
        while stack:
            node, outer, depth = stack.pop()
            self.scene.visit(depth)
            with np.errstate(over="ignore", invalid="ignore"):
                transform = outer @ _local_transform(node)
            below = []
            for child in node:
                if child.tag == "node":
                    below.append(child)
                elif child.tag == "instance_node":
                    below.append(self.find("node", child.get("url")))
                elif child.tag == "instance_geometry":
                    geometry = self.find("geometry", child.get("url"))
                    if geometry is not None:
                        self.place(geometry, transform)
                elif child.tag == "instance_controller":
                    controller = self.find("controller", child.get("url"))
                    skin = controller.find("skin") if controller is not None else None
                    geometry = self.find("geometry", skin.get("source")) if skin is not None else None
                    if geometry is not None:  # in bind pose: joints are ignored
                        bind = _matrix(skin.find("bind_shape_matrix")) if skin.find("bind_shape_matrix") is not None else np.eye(4)
                        self.place(geometry, transform @ bind)
            stack.extend((child, transform, depth + 1) for child in reversed(below) if child is not None)


def _matrix(element: ElementTree.Element) -> np.ndarray:
    values = _numbers(element, f"<{element.tag}>")
    if len(values) != 16:
        raise BadMesh("malformed", f"<{element.tag}> has {len(values)} numbers, not 16")
    return values.reshape(4, 4)


def _local_transform(node: ElementTree.Element) -> np.ndarray:
    """Product of a node's transform elements, in their order; float64 [4, 4]."""
    transform = np.eye(4)
    for element in node:
        step = np.eye(4)
        if element.tag == "matrix":
            step = _matrix(element)
        elif element.tag in ("translate", "scale", "rotate"):
            values = _numbers(element, f"<{element.tag}>")
            if len(values) != (4 if element.tag == "rotate" else 3):
                raise BadMesh("malformed", f"<{element.tag}> has {len(values)} numbers")
            if element.tag == "translate":
                step[:3, 3] = values
            elif element.tag == "scale":
                step[[0, 1, 2], [0, 1, 2]] = values
            else:
                step[:3, :3] = _rotation(values[:3], np.deg2rad(values[3]))
        else:
            continue  # <lookat> and <skew> do not occur at geometry
        with np.errstate(over="ignore", invalid="ignore"):
            transform = transform @ step
    return transform


def _rotation(axis: np.ndarray, angle: float) -> np.ndarray:
    """Rodrigues' formula; float64 [3, 3]. A zero axis turns nothing."""
    length = np.linalg.norm(axis)
    if length == 0:
        return np.eye(3)
    x, y, z = axis / length
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def read_dae(data: bytes, max_faces: int) -> RawMesh:
    """Reads a COLLADA file in its own unit and axes. Without a scene every geometry is taken as it stands, with a warning."""
    builder = ElementTree.TreeBuilder()
    parse_xml(data, builder.start, builder.end, builder.data)
    root = builder.close()
    if root.tag != "COLLADA":
        raise BadMesh("not_a_mesh", f"the root element is <{root.tag}>, not <COLLADA>")
    document = _Document(root, max_faces)
    instance = root.find("scene/instance_visual_scene")
    visual_scene = document.find("visual_scene", instance.get("url")) if instance is not None else None
    if visual_scene is not None:
        document.place_nodes(visual_scene.findall("node"))
    else:
        document.scene.warnings.append("no scene: all geometries are taken as they stand")
        for geometry in root.iterfind("library_geometries/geometry"):
            document.place(geometry, np.eye(4))
    return document.scene.mesh()
