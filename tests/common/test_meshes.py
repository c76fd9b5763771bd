import base64
import csv
import io
import json
import math
import pickle
import struct
import time
import zipfile

import numpy as np
import pytest

from cad_models.common.meshes import (
    MESH_REASONS,
    MESH_SUFFIXES,
    BadMesh,
    Mesh,
    geometry_signature,
    group_duplicates,
    load_mesh,
    mesh_facts,
    normalized,
    read_mesh,
)
from tests.shared import shared_path

# --- A small part, written in every format by the plainest means ---------------------------------------------------------------------------

BOX = np.array([[x, y, z] for x in (0.0, 3.0) for y in (0.0, 2.0) for z in (0.0, 1.0)])
QUADS = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
TRIANGLES = np.array([[q[0], q[i], q[i + 1]] for q in QUADS for i in (1, 2)])


def binary_stl(vertices=BOX, faces=TRIANGLES, header=b"made for a test"):
    body = b"".join(struct.pack("<12fH", 0, 0, 0, *vertices[face].astype(np.float32).reshape(-1), 0) for face in faces)
    return header.ljust(80, b"\0") + struct.pack("<I", len(faces)) + body


def ascii_stl(vertices=BOX, faces=TRIANGLES, name="part", number="%.9g"):
    lines = [f"solid {name}"]
    for face in faces:
        lines += ["facet normal 0 0 0", "outer loop"]
        lines += ["vertex " + " ".join(number % x for x in vertices[corner]) for corner in face]
        lines += ["endloop", "endfacet"]
    return "\n".join([*lines, f"endsolid {name}", ""]).encode()


def off(vertices=BOX, polygons=QUADS, header="OFF\n"):
    rows = [" ".join(map(repr, vertex.tolist())) for vertex in vertices]
    rows += [" ".join(map(str, [len(polygon), *polygon])) for polygon in polygons]
    return (f"{header}{len(vertices)} {len(polygons)} 0\n" + "\n".join(rows) + "\n").encode()


def obj(vertices=BOX, polygons=QUADS):
    rows = ["v " + " ".join(map(repr, vertex.tolist())) for vertex in vertices]
    rows += ["f " + " ".join(f"{corner + 1}//1" for corner in polygon) for polygon in polygons]
    return ("# a box\n" + "\n".join(rows) + "\n").encode()


def ply(encoding, vertices=BOX, polygons=QUADS):
    header = (
        f"ply\nformat {encoding} 1.0\ncomment a box\nelement vertex {len(vertices)}\nproperty double x\nproperty double y\nproperty double z\n"
        f"property uchar red\nelement face {len(polygons)}\nproperty list uchar int vertex_indices\nproperty float quality\nend_header\n"
    ).encode()
    if encoding == "ascii":
        rows = [" ".join(map(repr, vertex.tolist())) + " 255" for vertex in vertices]
        rows += [" ".join(map(str, [len(polygon), *polygon])) + " 0.5" for polygon in polygons]
        return header + "\n".join(rows).encode()
    order = "<" if encoding == "binary_little_endian" else ">"
    body = b"".join(struct.pack(order + "3dB", *vertex, 255) for vertex in vertices)
    body += b"".join(struct.pack(f"{order}B{len(polygon)}if", len(polygon), *polygon, 0.5) for polygon in polygons)
    return header + body


def gltf_tree(vertices=BOX, faces=TRIANGLES, nodes=None):
    positions, indices = vertices.astype("<f4").tobytes(), faces.astype("<u2").tobytes()
    tree = {
        "asset": {"version": "2.0"},
        "scenes": [{"nodes": [0]}],
        "nodes": nodes or [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": len(vertices), "type": "VEC3"},
            {"bufferView": 1, "componentType": 5123, "count": 3 * len(faces), "type": "SCALAR"},
        ],
        "bufferViews": [
            {"buffer": 0, "byteLength": len(positions)},
            {"buffer": 0, "byteOffset": len(positions), "byteLength": len(indices)},
        ],
        "buffers": [{"byteLength": len(positions) + len(indices)}],
    }
    return tree, positions + indices


def glb(**options):
    tree, binary = gltf_tree(**options)
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    binary += b"\0" * (-len(binary) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(binary), b"BIN\0") + binary
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def gltf(uri=None):
    tree, binary = gltf_tree()
    tree["buffers"][0]["uri"] = uri or "data:application/octet-stream;base64," + base64.b64encode(binary).decode()
    return json.dumps(tree).encode()


def model_xml(objects=None, build='<item objectid="1"/>', prolog=""):
    points = "".join(f'<vertex x="{x}" y="{y}" z="{z}"/>' for x, y, z in BOX.tolist())
    corners = "".join(f'<triangle v1="{a}" v2="{b}" v3="{c}"/>' for a, b, c in TRIANGLES.tolist())
    box = f'<object id="1" type="model"><mesh><vertices>{points}</vertices><triangles>{corners}</triangles></mesh></object>'
    return (
        f'<?xml version="1.0"?>{prolog}<model unit="millimeter" xmlns="http://schemas.microsoft.com/3dmanufacturing/core/2015/02">'
        f"<resources>{box}{objects or ''}</resources><build>{build}</build></model>"
    ).encode()


def archive(files, compression=zipfile.ZIP_DEFLATED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as target:
        for name, content in files.items():
            target.writestr(name, content)
    return stream.getvalue()


def threemf(**options):
    return archive({"[Content_Types].xml": "<Types/>", "3D/3dmodel.model": model_xml(**options)})


def dae(primitive=None, nodes='<node><instance_geometry url="#box"/></node>', prolog="", scene=True):
    numbers = " ".join(map(repr, BOX.reshape(-1).tolist()))
    counts, corners = " ".join("4" for _ in QUADS), " ".join(f"{corner} 0" for quad in QUADS for corner in quad)
    inputs = '<input semantic="VERTEX" source="#v" offset="0"/><input semantic="NORMAL" source="#n" offset="1"/>'
    primitive = primitive or f'<polylist count="6">{inputs}<vcount>{counts}</vcount><p>{corners}</p></polylist>'
    return (
        f'<?xml version="1.0"?>{prolog}<COLLADA xmlns="http://www.collada.org/2005/11/COLLADASchema" version="1.4.1"><library_geometries>'
        f'<geometry id="box"><mesh><source id="s"><float_array id="a" count="24">{numbers}</float_array><technique_common>'
        '<accessor source="#a" count="8" stride="3"/></technique_common></source>'
        f'<vertices id="v"><input semantic="POSITION" source="#s"/></vertices>{primitive}</mesh></geometry></library_geometries>'
        f'<library_visual_scenes><visual_scene id="box">{nodes}</visual_scene></library_visual_scenes>'
        + ('<scene><instance_visual_scene url="#box"/></scene>' if scene else "")
        + "</COLLADA>"
    ).encode()


SAMPLES = {
    "stl binary": (".stl", binary_stl()),
    "stl ascii": (".stl", ascii_stl()),
    "off": (".off", off()),
    "obj": (".obj", obj()),
    "ply ascii": (".ply", ply("ascii")),
    "ply little": (".ply", ply("binary_little_endian")),
    "ply big": (".ply", ply("binary_big_endian")),
    "glb": (".glb", glb()),
    "gltf": (".gltf", gltf()),
    "3mf": (".3mf", threemf()),
    "dae": (".dae", dae()),
}


def reason_of(data, suffix, **options):
    with pytest.raises(BadMesh) as caught:
        load_mesh(data, suffix, **options)
    assert caught.value.detail
    return caught.value.reason


def triangle_set(mesh):
    """The triangles as a sorted list, each turned so that its smallest corner comes first."""
    rows = []
    for face in mesh.vertices[mesh.faces].round(6).tolist():
        turn = face.index(min(face))
        rows.append(tuple(map(tuple, face[turn:] + face[:turn])))
    return sorted(rows)


# --- Formats ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_load_mesh_every_format_gives_the_same_box(name):
    suffix, data = SAMPLES[name]
    mesh = load_mesh(data, suffix)
    assert mesh.vertices.dtype == np.float64 and mesh.faces.dtype == np.int32
    assert triangle_set(mesh) == triangle_set(Mesh(BOX, TRIANGLES.astype(np.int32)))
    facts = mesh_facts(mesh)
    assert (facts.num_vertices, facts.num_faces, facts.watertight, facts.num_bodies) == (8, 12, True, 1)
    assert facts.volume == pytest.approx(6) and facts.area == pytest.approx(22)
    assert facts.extents == pytest.approx((3, 2, 1))
    assert facts.warnings == ()
    assert load_mesh(data, suffix.upper()).faces.tolist() == mesh.faces.tolist()


@pytest.mark.parametrize("suffix", ["", ".txt", ".stl2", "stl"])
def test_load_mesh_unknown_suffix_is_refused_with_the_known_ones(suffix):
    with pytest.raises(BadMesh, match=r"unsupported_format.*\.stl"):
        load_mesh(binary_stl(), suffix)


def test_read_mesh_takes_any_name_and_case(tmp_path):
    path = tmp_path / "Деталь №5 (копия) 零件 v2.STL"
    path.write_bytes(binary_stl())
    assert len(read_mesh(path).faces) == 12


def test_stl_binary_whose_header_says_solid_is_read_as_binary():
    assert len(load_mesh(binary_stl(header=b"solid facet vertex"), ".stl").faces) == 12


def test_stl_several_solids_are_joined():
    assert len(load_mesh(ascii_stl() + ascii_stl(BOX + 10, name="facet 7 vertex"), ".stl").faces) == 24
    mesh = load_mesh(binary_stl() + binary_stl(BOX + 10), ".stl")
    assert len(mesh.faces) == 24 and mesh_facts(mesh).num_bodies == 2


def test_stl_trailing_bytes_are_tolerated_with_a_warning_up_to_the_facets_own_size():
    mesh = load_mesh(binary_stl() + b"x" * 100, ".stl")
    assert len(mesh.faces) == 12 and "100 bytes" in mesh.warnings[0]
    assert reason_of(binary_stl() + b"x" * 1000, ".stl") == "malformed"


def test_stl_ascii_without_endsolid_is_read_with_a_warning_unless_a_facet_is_cut():
    text = ascii_stl()
    mesh = load_mesh(text[: text.index(b"endsolid")], ".stl")
    assert len(mesh.faces) == 12 and "endsolid" in mesh.warnings[0]
    assert reason_of(text[: text.rindex(b"vertex")], ".stl") == "truncated"


def test_stl_ascii_in_any_case_and_line_ends_is_read():
    for text in (ascii_stl().upper(), ascii_stl().replace(b"\n", b"\r\n"), ascii_stl().replace(b"\n", b"\r"), b"\xef\xbb\xbf\n" + ascii_stl()):
        assert len(load_mesh(text, ".stl").faces) == 12


@pytest.mark.parametrize("word", [b"nan", b"-NaN", b"inf", b"-1.#IND", b"1.#INF", b"1e999", b"-nan(ind)"])
def test_stl_ascii_non_finite_coordinates_are_named(word):
    assert reason_of(ascii_stl().replace(b"vertex 3 2 0", b"vertex 3 " + word + b" 0"), ".stl") == "non_finite"


def test_text_numbers_are_the_correctly_rounded_ones():
    """The compiled scanner against Python's float, bit by bit, over short, long, tiny and huge numbers."""
    rng = np.random.default_rng(0)
    words = [repr(float(x)) for x in rng.normal(size=300) * 10.0 ** rng.integers(-300, 300, 300)]
    words += [f"{x:.{digits}g}" for digits in range(1, 25) for x in rng.normal(size=20)]
    words += [f"{x:.{digits}f}" for digits in range(0, 20) for x in rng.normal(size=20) * 1000]
    words += ["0", "-0.0", "+1", ".5", "5.", "1E+05", "1e-7", "00012.500", "9007199254740993", "0.1e22", "123456789012345678901234567890", "5e-324"]
    words += ["1"] * (-len(words) % 3)
    vertices = np.array([float(word) for word in words]).reshape(-1, 3)
    rows = "\n".join("v " + " ".join(words[i : i + 3]) for i in range(0, len(words), 3))
    faces = "\n".join(f"f {i + 1} {(i + 1) % len(vertices) + 1} {(i + 2) % len(vertices) + 1}" for i in range(len(vertices)))
    mesh = load_mesh(f"{rows}\n{faces}\n".encode(), ".obj")
    np.testing.assert_array_equal(mesh.vertices, vertices)


@pytest.mark.parametrize(
    "header", ["OFF", "OFF\r\n", "OFF # a comment\n\n# another\n", "  \t OFF ", "COFF\n", "NOFF\n", "# before\nOFF\n", "\n\nOFF\n"]
)
def test_off_headers_of_real_files_are_read(header):
    data = off(header=header)
    assert len(load_mesh(data, ".off").faces) == 12
    assert len(load_mesh(data.replace(b"\n", b"\r\n"), ".off").faces) == 12
    assert len(load_mesh(data.replace(b"\n", b" # note\n\n"), ".off").faces) == 12


def test_off_colours_behind_vertices_and_faces_are_ignored():
    data = off(header="COFF\n").replace(b"\n4 ", b" 255 0 0 255\n4 ").replace(b"3.0 2.0 1.0", b"3.0 2.0 1.0 0.5 0.5 0.5")
    assert len(load_mesh(data, ".off").faces) == 12


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"OFF\n353535235358 6 0\n0 0 0\n", "truncated"),
        (b"OFF\n3 999999999999999999 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n", "truncated"),
        (b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 3\n", "index_out_of_range"),
        (b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 -1\n", "index_out_of_range"),
        (b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n999999999 0 1 2\n", "malformed"),
        (b"OFF\n3 1 0\n0 0 0\n1 x 0\n0 1 0\n3 0 1 2\n", "malformed"),
        (b"OFF\n3 2 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n", "truncated"),
        (b"OFF\n3 0 0\n0 0 0\n1 0 0\n0 1 0\n", "no_faces"),
        (b"OFF BINARY\n\0\0\0", "unsupported_format"),
        (b"4OFF\n3 1 0\n", "unsupported_format"),
        (b"hello\n", "not_a_mesh"),
    ],
)
def test_off_broken_is_refused_with_its_reason(data, reason):
    assert reason_of(data, ".off") == reason


def test_obj_negative_indices_count_from_the_vertices_so_far():
    data = b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf -3 -2 -1\nv 0 0 5\nv 1 0 5\nv 0 1 5\nf -3/1/1 -2/2 -1//7\n"
    np.testing.assert_array_equal(load_mesh(data, ".obj").faces, [[0, 1, 2], [3, 4, 5]])


def test_obj_continued_lines_and_ignored_records_are_read():
    data = b"mtllib /etc/passwd\no x\nv 0 0 0 1.0\nvt 0 0\nvn 0 0 1\nv 1 0 0\nv 0 \\\n 1 0\nl 1 2\ng\nusemtl m\ns off\nf 1 2 \\\r\n 3 # face\n"
    mesh = load_mesh(data, ".obj")
    assert mesh.faces.tolist() == [[0, 1, 2]] and mesh.vertices[2].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "lines, reason",
    [
        ("f 1 2 4", "index_out_of_range"),
        ("f 0 1 2", "index_out_of_range"),
        ("f -4 1 2", "index_out_of_range"),
        ("f 1 2 x", "malformed"),
        ("v 1 2\nf 1 2 3", "malformed"),
        ("p 1 2 3", "no_faces"),
        ("f 1 2", "no_faces"),
        ("f 99999999999999999999999 1 2", "malformed"),
    ],
)
def test_obj_broken_is_refused_with_its_reason(lines, reason):
    assert reason_of(f"v 0 0 0\nv 1 0 0\nv 0 1 0\n{lines}\n".encode(), ".obj") == reason


def test_obj_face_with_two_corners_is_dropped_with_a_warning():
    mesh = load_mesh(b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2\nf 1 2 3\n", ".obj")
    assert len(mesh.faces) == 1 and "fewer than 3" in mesh.warnings[0]


@pytest.mark.parametrize("turn", range(7))
@pytest.mark.parametrize("plane", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
@pytest.mark.parametrize("backwards", [False, True])
def test_polygon_concave_is_cut_inside_its_outline(turn, plane, backwards):
    """A comb of area 11: fans would cover what is outside. Area and normals agree with the outline wherever it starts."""
    outline = np.array([[0, 0], [7, 0], [7, 3], [5, 1], [3.5, 4], [2, 1], [0, 3]], float)
    x, y = outline.T
    area = abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2
    corners = np.roll(outline, turn, axis=0)[:: -1 if backwards else 1]
    vertices = np.zeros((7, 3))
    vertices[:, plane[0]], vertices[:, plane[1]] = corners.T
    mesh = load_mesh(off(vertices, [list(range(7))]), ".off")
    a, b, c = (mesh.vertices[mesh.faces[:, corner]] for corner in range(3))
    normals = np.cross(b - a, c - a)
    assert len(mesh.faces) == 5
    assert np.linalg.norm(normals, axis=1).sum() / 2 == pytest.approx(area)
    assert (np.sign(normals[:, plane[2]]) == (-1 if backwards else 1)).all()


def test_polygon_that_crosses_itself_is_cut_and_ends():
    rng = np.random.default_rng(0)
    vertices = np.column_stack([rng.normal(size=(400, 2)), np.zeros(400)])
    mesh = load_mesh(off(vertices, [list(range(400))]), ".off")
    assert len(mesh.faces) + len(mesh.degenerate_faces) == 398


def test_ply_ascii_rows_longer_than_declared_are_read_by_line():
    data = ply("ascii").replace(b" 255\n", b" 255 7 7\n").replace(b" 0.5\n", b" 0.5 1 2 3\n")
    assert len(load_mesh(data, ".ply").faces) == 12


@pytest.mark.parametrize(
    "old, new, reason",
    [
        (b"element vertex 8", b"element vertex 4000000000", "truncated"),
        (b"element face 6", b"element face 99999999999", "too_large"),
        (b"element face 6", b"element face 1000000", "truncated"),
        (b"element face 6", b"element face 0", "no_faces"),
        (b"double x", b"double q", "malformed"),
        (b"double x", b"quadruple x", "malformed"),
        (b"vertex_indices", b"other", "no_faces"),
        (b"end_header", b"end", "truncated"),
    ],
)
@pytest.mark.parametrize("encoding", ["ascii", "binary_little_endian"])
def test_ply_broken_header_is_refused_with_its_reason(encoding, old, new, reason):
    assert reason_of(ply(encoding).replace(old, new), ".ply") == reason


def test_gltf_nested_nodes_place_and_mirror_instances():
    half_turn = [0.0, 0.0, math.sin(math.pi / 2), math.cos(math.pi / 2)]  # about z
    nodes = [
        {"children": [1, 2], "translation": [10, 0, 0]},
        {"mesh": 0, "rotation": half_turn, "scale": [2, 1, 1]},
        {"mesh": 0, "matrix": [-1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 50, 1]},
    ]
    mesh = load_mesh(glb(nodes=nodes), ".glb")
    first, second = mesh.vertices[:8], mesh.vertices[8:]
    np.testing.assert_allclose([first.min(axis=0), first.max(axis=0)], [[4, -2, 0], [10, 0, 1]], atol=1e-6)
    np.testing.assert_allclose([second.min(axis=0), second.max(axis=0)], [[7, 0, 50], [10, 2, 51]], atol=1e-6)
    facts = mesh_facts(mesh)
    assert facts.volume == pytest.approx(12 + 6), "a mirrored instance must not be turned inside out"


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda tree: tree["buffers"][0].update(uri="file:///etc/passwd"), "external_data"),
        (lambda tree: tree["buffers"][0].update(uri="../other.bin"), "external_data"),
        (lambda tree: tree["nodes"].append({"children": [1]}) or tree["scenes"][0].update(nodes=[1]), "malformed"),
        (lambda tree: tree["accessors"][0].update(count=1 << 40), "truncated"),
        (lambda tree: tree["accessors"][0].update(count=-1), "malformed"),
        (lambda tree: tree["accessors"][0].update(count="8"), "malformed"),
        (lambda tree: tree["accessors"][1].update(bufferView=9), "malformed"),
        (lambda tree: tree["meshes"][0]["primitives"][0].update(mode=0), "no_faces"),
        (lambda tree: tree["meshes"][0].update(primitives=7), "malformed"),
        (lambda tree: tree["meshes"][0]["primitives"][0].update(extensions={"KHR_draco_mesh_compression": {}}), "unsupported_format"),
        (lambda tree: tree.update(nodes=None), "malformed"),
        (lambda tree: tree.pop("asset"), "not_a_mesh"),
    ],
)
def test_gltf_broken_is_refused_with_its_reason(change, reason):
    tree, binary = gltf_tree()
    tree["buffers"][0]["uri"] = "data:;base64," + base64.b64encode(binary).decode()
    change(tree)
    assert reason_of(json.dumps(tree).encode(), ".gltf") == reason


def test_gltf_nodes_that_multiply_without_end_are_refused_in_time():
    """Twenty levels of ten children each: 10^20 instances from a kilobyte."""
    nodes = [{"children": [level + 1] * 10} for level in range(20)] + [{"mesh": 0}]
    begin = time.monotonic()
    assert reason_of(glb(nodes=nodes), ".glb", max_faces=20_000) == "too_large"
    assert time.monotonic() - begin < 20


def test_gltf_deep_json_is_refused():
    assert reason_of(b'{"asset":' + b"[" * 100_000, ".gltf") == "malformed"


def test_3mf_components_and_items_are_placed():
    pair = (
        '<object id="2"><components><component objectid="1"/>'
        '<component objectid="1" transform="1 0 0 0 1 0 0 0 1 10 0 0"/></components></object>'
    )
    mesh = load_mesh(threemf(objects=pair, build='<item objectid="2" transform="0 2 0 -2 0 0 0 0 2 0 0 5"/>'), ".3mf")
    assert len(mesh.faces) == 24
    # x' = -2 y, y' = 2 x, z' = 2 z + 5
    np.testing.assert_allclose([mesh.vertices.min(axis=0), mesh.vertices.max(axis=0)], [[-4, 0, 5], [0, 26, 7]])


def test_3mf_production_extension_finds_the_other_part():
    reference = '<object id="9"><components><component objectid="1" p:path="/3D/Objects/a.model" xmlns:p="http://p"/></components></object>'
    root = f"<model><resources>{reference}</resources><build><item objectid='9'/></build></model>"
    mesh = load_mesh(archive({"3D/3dmodel.model": root, "3D/Objects/a.model": model_xml(build="")}), ".3mf")
    assert len(mesh.faces) == 12


@pytest.mark.parametrize(
    "data, reason",
    [
        (threemf(objects='<object id="2"><components><component objectid="2"/></components></object>', build='<item objectid="2"/>'), "malformed"),
        (threemf(build='<item objectid="8"/>'), "malformed"),
        (threemf()[:-30], "truncated"),
        (archive({"a.txt": "hello"}), "not_a_mesh"),
        (archive({"3D/3dmodel.model": model_xml()[:-20]}), "truncated"),
        (archive({"3D/3dmodel.model": model_xml()}, zipfile.ZIP_LZMA), "unsupported_format"),
        (threemf(objects='<object id="2"><mesh><vertices><vertex x="1" y="2"/></vertices></mesh></object>'), "malformed"),
        (threemf(objects='<object id="2"><mesh><vertices><vertex x="a" y="2" z="1"/></vertices></mesh></object>'), "malformed"),
    ],
)
def test_3mf_broken_is_refused_with_its_reason(data, reason):
    assert reason_of(data, ".3mf") == reason


def test_3mf_decompression_bomb_is_refused_by_declared_and_by_real_size():
    bomb = archive({"3D/3dmodel.model": b" " * (64 << 20)})
    assert len(bomb) < 100_000
    begin = time.monotonic()
    assert reason_of(bomb, ".3mf") == "too_large"
    # The same archive, whose directory claims a single kilobyte.
    small = struct.pack("<I", 1024)
    lying = bomb.replace(struct.pack("<I", 64 << 20), small)
    assert reason_of(lying, ".3mf") in ("too_large", "malformed", "truncated")
    assert time.monotonic() - begin < 5


ENTITIES = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;"><!ENTITY c SYSTEM "file:///etc/passwd">]>'


@pytest.mark.parametrize("data, suffix", [(dae(prolog=ENTITIES), ".dae"), (threemf(prolog=ENTITIES), ".3mf")])
def test_xml_entities_are_refused(data, suffix):
    with pytest.raises(BadMesh, match="entities are refused"):
        load_mesh(data, suffix)


def test_xml_nested_without_end_is_refused():
    assert reason_of(b"<COLLADA>" + b"<a>" * 1_000_000, ".dae") == "malformed"


INPUT = '<input semantic="VERTEX" source="#v" offset="0"/>'


@pytest.mark.parametrize(
    "primitive, num_faces",
    [
        (f'<triangles count="2">{INPUT}<p>0 1 3 0 3 2</p></triangles>', 2),
        (f'<polygons count="2">{INPUT}<p>0 1 3 2</p><p>4 6 7</p></polygons>', 3),
        (f'<tristrips count="1">{INPUT}<p>0 1 2 3</p></tristrips>', 2),
        (f'<trifans count="1">{INPUT}<p>0 1 3 2</p></trifans>', 2),
        (f'<lines count="1">{INPUT}<p>0 1</p></lines><triangles count="1">{INPUT}<p>0 1 3</p></triangles>', 1),
    ],
)
def test_dae_every_primitive_is_read(primitive, num_faces):
    assert len(load_mesh(dae(primitive), ".dae").faces) == num_faces


def test_dae_strip_faces_all_look_to_the_same_side():
    mesh = load_mesh(dae(f'<tristrips count="1">{INPUT}<p>0 1 2 3</p></tristrips>'), ".dae")
    a, b, c = (mesh.vertices[mesh.faces[:, corner]] for corner in range(3))
    assert len(set(np.sign(np.cross(b - a, c - a)[:, 0]))) == 1


def test_dae_nodes_apply_their_transforms_in_order():
    nodes = '<node><translate>10 0 0</translate><rotate>0 0 1 90</rotate><node><scale>2 1 1</scale><instance_geometry url="#box"/></node></node>'
    mesh = load_mesh(dae(nodes=nodes), ".dae")  # x' = 10 - y, y' = 2 x
    np.testing.assert_allclose([mesh.vertices.min(axis=0), mesh.vertices.max(axis=0)], [[8, 0, 0], [10, 6, 1]], atol=1e-12)


def test_dae_without_a_scene_takes_all_geometries_with_a_warning():
    mesh = load_mesh(dae(scene=False), ".dae")
    assert len(mesh.faces) == 12 and "no scene" in mesh.warnings[0]


@pytest.mark.parametrize(
    "data, reason",
    [
        (dae(nodes="<node/>"), "no_faces"),
        (dae(nodes='<node id="a"><instance_node url="#a"/></node>'), "malformed"),
        (dae(f'<triangles count="9">{INPUT}<p>0 1 3</p></triangles>'), "truncated"),
        (dae(f'<triangles count="1">{INPUT}<p>0 1 8</p></triangles>'), "index_out_of_range"),
        (dae(f'<triangles count="1">{INPUT}<p>0 1 x</p></triangles>'), "malformed"),
        (dae('<triangles count="1"><input semantic="VERTEX" source="#q" offset="0"/><p>0 1 2</p></triangles>'), "malformed"),
        (dae()[:-100], "truncated"),
        (b"<svg/>", "not_a_mesh"),
    ],
)
def test_dae_broken_is_refused_with_its_reason(data, reason):
    assert reason_of(data, ".dae") == reason


def test_step_is_tessellated_or_its_extra_is_named():
    data = shared_path("data/formats/featuretype.STEP").read_bytes()
    try:
        import cascadio  # noqa: F401
    except ImportError:
        assert reason_of(data, ".step") == "unsupported_format"
        return
    facts = mesh_facts(load_mesh(data, ".stp"))
    assert facts.extents == pytest.approx((127.0, 63.5, 34.925), rel=1e-4)  # the same part as featuretype.STL, 5 x 2.5 x 1.375 inches
    assert 2_000 < facts.num_faces < 50_000


def test_step_without_its_end_is_truncated():
    assert reason_of(b"ISO-10303-21;\nHEADER;\n" + b"#1=CARTESIAN_POINT('',(0.,0.,0.));\n" * 200, ".step") == "truncated"


@pytest.mark.parametrize("suffix", MESH_SUFFIXES)
@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty_file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 99\n", "lfs_pointer"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 200, "not_a_mesh"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not_a_mesh"),
        (b"Just some words, no mesh at all.\n" * 9, "not_a_mesh"),
    ],
)
def test_load_mesh_foreign_content_is_named_for_every_suffix(data, reason, suffix):
    if data.startswith(b"Just") and suffix in (".dae", ".gltf", ".3mf"):
        assert reason_of(data, suffix) in ("malformed", "not_a_mesh")
    else:
        assert reason_of(data, suffix) == reason
    if reason == "lfs_pointer":
        with pytest.raises(BadMesh, match="Git LFS"):
            load_mesh(data, suffix)


def test_load_mesh_more_faces_than_the_limit_are_refused_in_every_format():
    for suffix, data in SAMPLES.values():
        assert reason_of(data, suffix, max_faces=11) == "too_large"
        assert len(load_mesh(data, suffix, max_faces=12).faces) == 12


def test_bad_mesh_survives_pickling_and_has_a_known_reason():
    error = pickle.loads(pickle.dumps(BadMesh("truncated", "cut off")))
    assert (error.reason, error.detail) == ("truncated", "cut off") and error.reason in MESH_REASONS
    assert str(error) == "truncated: cut off"


# --- Fuzz ------------------------------------------------------------------------------------------------------------------------------------


def damaged(data, rng):
    """Cut off, with flipped bytes, with a number made huge, or with a piece in the wrong place."""
    data = bytearray(data)
    kind = rng.integers(4)
    if kind == 0:
        return bytes(data[: rng.integers(len(data))])
    if kind == 1:
        for position in rng.integers(len(data), size=rng.integers(1, 12)):
            data[position] = rng.integers(256)
    elif kind == 2:
        position = int(rng.integers(len(data)))
        data[position : position + 4] = rng.choice([b"\xff\xff\xff\xff", b"9999", b"-1 -", b"\0\0\0\0", b"1e99"])
    else:
        start, length, target = (int(x) for x in rng.integers(len(data), size=3))
        data[target:target] = data[start : start + length % 200]
    return bytes(data)


@pytest.mark.parametrize("name", SAMPLES)
def test_load_mesh_damaged_file_gives_a_mesh_or_bad_mesh(name):
    suffix, data = SAMPLES[name]
    rng = np.random.default_rng(20)
    outcomes = {"mesh": 0, "bad": 0}
    for _ in range(100):
        broken = damaged(data, rng)
        begin = time.monotonic()
        try:
            mesh = load_mesh(broken, suffix)
        except BadMesh as error:
            assert error.reason in MESH_REASONS
            outcomes["bad"] += 1
        else:
            assert len(mesh.faces) and mesh.faces.min() >= 0 and mesh.faces.max() < len(mesh.vertices) and np.isfinite(mesh.vertices).all()
            facts = mesh_facts(mesh)
            assert np.isfinite([facts.volume, facts.area, *facts.extents, *geometry_signature(mesh)]).all()
            assert np.linalg.norm(normalized(mesh).vertices, axis=1).max() == pytest.approx(1)
            outcomes["mesh"] += 1
        assert time.monotonic() - begin < 5
    assert outcomes["bad"] > 10


# --- Checks, facts, normal form ----------------------------------------------------------------------------------------------------------


def test_load_mesh_faces_without_area_are_set_apart_and_close_the_mesh():
    """A box with a T-junction: one edge is split in two on one side, and a flat face closes the slit."""
    vertices = np.vstack([BOX, [[1.5, 0, 0]]])
    faces = [face.tolist() for face in TRIANGLES if not {0, 4} <= set(face.tolist())]
    for face in TRIANGLES.tolist():
        if {0, 4} <= set(face):
            start = next(i for i in range(3) if {face[i], face[(i + 1) % 3]} == {0, 4})
            a, b, c = face[start], face[(start + 1) % 3], face[(start + 2) % 3]
            if len(faces) == 10:  # one of the two faces at the edge 0-4 is split
                faces += [[a, 8, c], [8, b, c], [b, 8, a]]
            else:
                faces.append(face)
    mesh = load_mesh(off(vertices, faces), ".off")
    assert len(mesh.degenerate_faces) == 1 and "without area" in mesh.warnings[0]
    facts = mesh_facts(mesh)
    assert facts.watertight and facts.num_faces == len(faces) == len(mesh.faces) + 1
    assert facts.volume == pytest.approx(6)


def test_load_mesh_vertices_without_a_face_do_not_count():
    data = off(np.vstack([[[1e9, 0, np.nan]], BOX]), [[i + 1 for i in quad] for quad in QUADS])
    mesh = load_mesh(data, ".off")
    assert len(mesh.vertices) == 8 and mesh_facts(mesh).extents == (3, 2, 1)


@pytest.mark.parametrize("scale", [1e-300, 1e-36, 1e-12, 1.0, 1e36, 1e300])
def test_facts_and_normal_form_at_any_scale(scale):
    mesh = load_mesh(off(BOX * scale), ".off")
    facts = mesh_facts(mesh)
    assert facts.watertight and np.isfinite([facts.volume, facts.area]).all()
    if 1e-40 < scale < 1e40:
        assert facts.volume == pytest.approx(6 * scale**3) and facts.area == pytest.approx(22 * scale**2)
    unit = normalized(mesh)
    np.testing.assert_allclose(unit.vertices, (BOX - [1.5, 1, 0.5]) / np.linalg.norm([1.5, 1, 0.5]), atol=1e-12)
    np.testing.assert_allclose(geometry_signature(mesh), geometry_signature(load_mesh(off(), ".off")), atol=1e-9)


def test_load_mesh_far_from_the_origin_warns():
    mesh = load_mesh(binary_stl(BOX * 30 + 5e7), ".stl")
    assert any("from the origin" in warning for warning in mesh.warnings)
    assert not load_mesh(binary_stl(BOX + 100), ".stl").warnings


@pytest.mark.parametrize(
    "vertices, reason",
    [
        (BOX * 0 + 1.5, "zero_extent"),
        (BOX * [1, 0, 0], "zero_area"),
        (BOX[:, :1] * [[1.0, 0.1, 0.7]], "zero_area"),
        (BOX * np.float64(1e30) * 1e30, "non_finite"),
    ],
)
def test_load_mesh_without_a_surface_is_refused(vertices, reason):
    with np.errstate(over="ignore"):  # beyond float32
        assert reason_of(binary_stl(vertices), ".stl") == reason


def test_normalized_centres_the_surface_not_the_vertices():
    """A square, whole and with a fan of small faces in one corner: the centroid must not follow the triangles."""
    coarse = off(np.array([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]), [[0, 1, 2, 3]])
    vertices = [[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0.05, 0.05, 0]]
    fine = off(np.array(vertices), [[0, 1, 4], [1, 2, 4], [2, 3, 4], [3, 0, 4]])
    for data in (coarse, fine):
        mesh = normalized(load_mesh(data, ".off"))
        assert np.linalg.norm(mesh.vertices[:4], axis=1) == pytest.approx([1, 1, 1, 1])


def test_facts_of_open_inverted_and_doubled_surfaces():
    open_box = mesh_facts(load_mesh(off(polygons=QUADS[:-1]), ".off"))
    assert not open_box.watertight and open_box.volume == 0 and any("not watertight" in warning for warning in open_box.warnings)
    inverted = mesh_facts(load_mesh(off(polygons=[quad[::-1] for quad in QUADS]), ".off"))
    assert inverted.watertight and inverted.volume == pytest.approx(6)
    one_turned = mesh_facts(load_mesh(off(polygons=[QUADS[0][::-1], *QUADS[1:]]), ".off"))
    assert one_turned.watertight and one_turned.volume == 0 and any("different sides" in warning for warning in one_turned.warnings)
    four_at_an_edge = mesh_facts(load_mesh(off(np.vstack([BOX, BOX + [3, 2, 0]]), QUADS + [[i + 8 for i in quad] for quad in QUADS]), ".off"))
    assert not four_at_an_edge.watertight and four_at_an_edge.num_bodies == 1


def test_facts_vertices_that_differ_in_the_last_digits_are_one():
    rng = np.random.default_rng(0)
    corners = BOX[TRIANGLES].reshape(-1, 3)
    mesh = Mesh(corners + rng.uniform(-1e-8, 1e-8, corners.shape), np.arange(36, dtype=np.int32).reshape(-1, 3))
    facts = mesh_facts(mesh)
    assert facts.watertight and facts.num_vertices == 8 and facts.volume == pytest.approx(6)
    torn = Mesh(corners + rng.uniform(-1e-4, 1e-4, corners.shape), mesh.faces)
    assert not mesh_facts(torn).watertight


# --- Duplicates ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def part():
    """An irregular surface of 320 faces: a band of a sphere with a random radius at every vertex."""
    rng = np.random.default_rng(3)
    theta, phi = np.meshgrid(np.linspace(0.2, np.pi - 0.2, 11), np.linspace(0, 2 * np.pi, 16, endpoint=False), indexing="ij")
    vertices = np.stack([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), 1.3 * np.cos(theta)], -1).reshape(-1, 3)
    vertices *= rng.uniform(0.8, 1.2, (len(vertices), 1))
    index = np.arange(11 * 16).reshape(11, 16)
    a, b = index[:-1], index[1:]
    faces = np.concatenate(
        [np.stack([a, b, np.roll(b, -1, 1)], -1).reshape(-1, 3), np.stack([a, np.roll(b, -1, 1), np.roll(a, -1, 1)], -1).reshape(-1, 3)]
    )
    return vertices * 20, faces


def groups_of(parts, **options):
    meshes = [load_mesh(data, suffix) for data, suffix in parts]
    return group_duplicates(
        [geometry_signature(mesh) for mesh in meshes], [mesh_facts(mesh).num_faces for mesh in meshes], **options
    ).tolist()


def test_group_duplicates_joins_copies_in_other_order_format_place_and_size(part):
    vertices, faces = part
    rng = np.random.default_rng(0)
    shuffled = np.array([np.roll(face, turn) for face, turn in zip(rng.permutation(faces), rng.integers(3, size=len(faces)), strict=True)])
    renumber = rng.permutation(len(vertices))
    assert groups_of(
        [
            (binary_stl(vertices, faces), ".stl"),
            (binary_stl(vertices, shuffled), ".stl"),
            (binary_stl(vertices / 25.4, faces), ".stl"),
            (binary_stl(vertices * 1000 + [300, -7000, 20000], faces), ".stl"),
            (ascii_stl(vertices, faces, number="%.6e"), ".stl"),
            (off(vertices[np.argsort(renumber)], renumber[faces].tolist()), ".off"),
            (obj(vertices * 1e-9, faces.tolist()), ".obj"),
            (ply("binary_big_endian", vertices, faces[:, ::-1].tolist()), ".ply"),
        ]
    ) == [0] * 8


def test_group_duplicates_keeps_similar_parts_apart(part):
    vertices, faces = part
    moved = vertices.copy()
    moved[40] *= 1.01
    longer = vertices * [1, 1, 1.001]
    turned = vertices @ np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 1.0]])
    parts = [(binary_stl(points, faces), ".stl") for points in (vertices, moved, longer, turned, vertices * [1, 1, -1], vertices * [-1, -1, -1])]
    parts.append((binary_stl(vertices, faces[:-1]), ".stl"))
    assert groups_of(parts) == list(range(7))


@pytest.mark.parametrize("axis", range(3))
def test_group_duplicates_mirror_images_join_only_when_asked(part, axis):
    vertices, faces = part
    mirror = np.ones(3)
    mirror[axis] = -1
    other = vertices.copy()
    other[40] *= 1.01
    parts = [(binary_stl(points, faces), ".stl") for points in (other, vertices, vertices * mirror + 5, other * mirror)]
    assert groups_of(parts) == [0, 1, 2, 3]
    assert groups_of(parts, mirror_images=True) == [0, 1, 1, 0]


def test_group_duplicates_equals_comparing_every_pair():
    rng = np.random.default_rng(1)
    base = rng.normal(size=(12, 145))
    base[:, 0] = 1e-6
    table = base[rng.integers(12, size=200)]
    table[:, 1:] += rng.uniform(-9e-7, 9e-7, (200, 144))
    counts = rng.integers(2, size=200)
    expected = [
        next(j for j in range(i + 1) if counts[i] == counts[j] and np.abs(table[i, 1:] - table[j, 1:]).max() <= 2e-6) for i in range(200)
    ]
    assert group_duplicates(list(table), counts.tolist()).tolist() == expected


def test_group_duplicates_of_nothing_and_of_unequal_lengths():
    assert group_duplicates([], []).tolist() == []
    with pytest.raises(ValueError, match="one each"):
        group_duplicates([np.zeros(145)], [])


# --- Real files ----------------------------------------------------------------------------------------------------------------------------


def manifest(relative):
    with open(shared_path(relative), encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


REJECTED_REASONS = {
    "bad/empty_0_bytes.stl": "empty_file",
    "bad/empty.off": "empty_file",
    "bad/empty_solid_ascii.stl": "no_faces",
    "bad/empty_binary_header.stl": "no_faces",
    "bad/truncated_binary.stl": "truncated",
    "bad/truncated_ascii.stl": "truncated",
    "bad/ascii_nan_inf.stl": "non_finite",
    "bad/binary_nan_inf.stl": "non_finite",
    "bad/lfs_pointer_posing_as.stl": "lfs_pointer",
    "bad/lfs_pointer_real.dae": "lfs_pointer",
    "bad/off_face_index_out_of_range.off": "index_out_of_range",
    "bad/off_wrong_counts.off": "truncated",
    "bad/OutOfMemory.off": "truncated",
    "bad/invalid.off": "malformed",
    "bad/crash.ply": "truncated",
    "bad/malformed.obj": "index_out_of_range",
    "bad/points_only.obj": "no_faces",
    "bad/points_only.ply": "no_faces",
    "bad/huge_facet_count_header.stl": "truncated",
    "bad/text_renamed.stl": "not_a_mesh",
    "bad/png_renamed.stl": "not_a_mesh",
    "bad/html_404_page.stl": "not_a_mesh",
    "bad/all_vertices_same_point.stl": "zero_extent",
    "bad/collinear_zero_area_faces.stl": "zero_area",
    "bad/malformed_xml_real.dae": "malformed",
    "bad/truncated.step": "truncated",
    "bad/truncated.glb": "truncated",
}


def test_bad_files_end_as_the_manifest_says():
    root = shared_path("data/bad").parent
    for row in manifest("data/bad/manifest.csv"):
        begin = time.monotonic()
        try:
            facts = mesh_facts(read_mesh(root / row["path"]))
        except BadMesh as error:
            assert "reject" in row["expected"], row
            assert error.reason == REJECTED_REASONS[row["path"]], (row["path"], str(error))
        else:
            assert row["path"] not in REJECTED_REASONS, row
            assert "accept" in row["expected"].lower() or "load" in row["expected"] or "drop" in row["expected"], row
            if "warn" in row["expected"] or "drop" in row["expected"] or "flag" in row["expected"]:
                assert facts.warnings, row
        assert time.monotonic() - begin < 10, row


def test_format_files_have_the_faces_of_the_manifest():
    root = shared_path("data/formats").parent
    for row in manifest("data/formats/manifest.csv"):
        if row["path"].endswith(".STEP"):
            continue  # its number of faces follows the tolerance
        facts = mesh_facts(read_mesh(root / row["path"]))
        assert facts.num_faces == int(row["faces"]), row
        # The manifest did not merge vertices that differ in texture, so what it calls watertight is, and more may be.
        assert facts.watertight or row["watertight"] == "0", row


@pytest.mark.slow
def test_real_meshes_all_load_and_agree_with_the_manifest():
    root = shared_path("data/meshes").parent
    rows = manifest("data/manifest.csv")
    signatures, counts = [], []
    for row in rows:
        mesh = read_mesh(root / row["path"])
        facts = mesh_facts(mesh)
        assert facts.num_faces == int(row["faces"]), row
        assert len(mesh.degenerate_faces) == int(row["degenerate_faces"]), row
        assert facts.extents == pytest.approx([float(row[f"extent_{axis}"]) for axis in "xyz"], rel=1e-3, abs=2e-4), row
        # COLLADA in the manifest was not merged across primitives and normals.
        assert facts.watertight == (row["watertight"] == "1") or (row["path"].lower().endswith(".dae") and facts.watertight), row
        signatures.append(geometry_signature(mesh))
        counts.append(facts.num_faces)
    groups = group_duplicates(signatures, counts)
    pairs = {rows[i]["path"].split("/")[-1]: rows[group]["path"].split("/")[-1] for i, group in enumerate(groups) if group != i}
    # Compared vertex by vertex: these are equal up to position and float32 rounding. The three latch and lever pairs that the manifest
    # calls duplicates, too, are mirror images.
    assert pairs == {
        "wago_221_415_mount_3x5__7496078.stl": "wago_221_415_mount_3by5__7496078.stl",
        "rail_installation_guide_center__669494f.stl": "mgn9_rail_guide__669494f.stl",
        "round_photography_filter_case_for_step_up_ring_77_to_82mm__52787c4.stl": (
            "round_photography_filter_case_for_step_up_ring_67_to_82mm__ab2b6b6.stl"
        ),
        "belt_clip__e776731.stl": "belt_clip__4e800fc.stl",
        "coroplast_anchor__1d61c35.stl": "coroplast_anchor__d83cf58.stl",
        "gripper_palm__e8bec36.stl": "gripper_palm__5716a18.dae",
    }
