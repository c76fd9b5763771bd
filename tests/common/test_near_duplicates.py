"""Near duplicates: small changes and motions are found, other parts are not; the search against comparing everything."""

import itertools

import numpy as np
import pytest

from cad_models.alignment.parts import generate_part
from cad_models.common import near_duplicates as module
from cad_models.common.meshes import Mesh, load_mesh, normalized
from cad_models.common.near_duplicates import CLOSE, near_duplicates, shape_points
from cad_models.common.points import sample_surface
from tests.shared import shared_path


def box(x=1.0, y=0.6, z=0.3, *, steps=1) -> Mesh:
    """A box whose faces are grids of ``steps`` x ``steps`` squares."""
    vertices, faces = [], []
    for axis, side in itertools.product(range(3), (-1, 1)):
        u, v = (axis + 1) % 3, (axis + 2) % 3
        start = len(vertices)
        for i, j in itertools.product(range(steps + 1), repeat=2):
            point = np.zeros(3)
            point[axis], point[u], point[v] = side, 2 * i / steps - 1, 2 * j / steps - 1
            vertices.append(point * (x, y, z))
        for i, j in itertools.product(range(steps), repeat=2):
            a = start + i * (steps + 1) + j
            b, c, d = a + steps + 1, a + steps + 2, a + 1
            faces += [(a, b, c), (a, c, d)] if side > 0 else [(a, c, b), (a, d, c)]
    return Mesh(vertices=np.array(vertices), faces=np.array(faces), warnings=())


def moved(mesh: Mesh, matrix, shift=(0.0, 0.0, 0.0)) -> Mesh:
    return Mesh(vertices=mesh.vertices @ np.array(matrix, dtype=float).T + shift, faces=mesh.faces, warnings=())


def shape_of(mesh: Mesh, seed=0):
    return shape_points(sample_surface(normalized(mesh), 2_048, seed)[0])


def part(index) -> Mesh:
    made = generate_part(index, 0)
    return Mesh(vertices=made.vertices, faces=made.faces, warnings=())


def pairs(*shapes, most=CLOSE):
    return [(i, j) for i, j, _ in near_duplicates(np.stack(shapes), most)]


def test_other_triangulation_size_and_place_of_a_part_is_a_near_duplicate():
    assert pairs(shape_of(box()), shape_of(moved(box(steps=9), 25.4 * np.eye(3), (4, -7, 100)), seed=3)) == [(0, 1)]


@pytest.mark.parametrize("index", [0, 3, 11])
@pytest.mark.parametrize("matrix", [[[0, -1, 0], [1, 0, 0], [0, 0, 1]], [[0, 0, 1], [1, 0, 0], [0, 1, 0]], [[-1, 0, 0], [0, 1, 0], [0, 0, 1]]])
def test_parts_turned_and_mirrored_along_the_axes_are_near_duplicates(index, matrix):
    original = part(index)
    assert pairs(shape_of(original), shape_of(moved(original, matrix), seed=1)) == [(0, 1)]


def test_small_change_is_found_and_a_large_one_is_not():
    shapes = [shape_of(box(1.0, 0.6, 0.3)), shape_of(box(1.0, 0.61, 0.3), seed=1), shape_of(box(1.0, 0.9, 0.3), seed=2), shape_of(box(1.0, 0.3, 0.2), seed=3)]
    assert pairs(*shapes) == [(0, 1)]


def test_generated_parts_of_other_families_are_no_near_duplicates():
    families, shapes = set(), []
    for index in range(40):
        made = generate_part(index, 0)
        if made.family not in families:
            families.add(made.family)
            shapes.append(shape_of(part(index), seed=index))
    assert len(shapes) >= 15
    assert pairs(*shapes) == []


def test_identical_shapes_have_distance_zero_and_come_first():
    a, b = shape_of(box()), shape_of(box(1.0, 0.61, 0.3), seed=1)
    found = near_duplicates(np.stack([a, b, a]))
    assert found[0] == (0, 2, 0.0) and {(i, j) for i, j, _ in found} == {(0, 1), (0, 2), (1, 2)}


def test_search_equals_comparing_everything(monkeypatch):
    shapes = [shape_of(box(1.0, 0.2 + 0.02 * i, 0.3), seed=i) for i in range(14)]
    found = near_duplicates(np.stack(shapes))
    monkeypatch.setattr(module, "_candidates", lambda d2, axes: list(itertools.combinations(range(len(d2)), 2)))
    assert found == near_duplicates(np.stack(shapes)) and len(found) >= 5


def test_cluster_larger_than_the_candidates_hangs_together(monkeypatch):
    monkeypatch.setattr(module, "_MOST_CANDIDATES", 2)
    shapes = [shape_of(box(), seed=i) for i in range(8)]
    joined = set()
    for i, j, _ in near_duplicates(np.stack(shapes)):
        joined |= {i, j}
    assert joined == set(range(8))


@pytest.mark.parametrize("count", [0, 1])
def test_one_part_has_no_near_duplicate(count):
    assert near_duplicates(np.zeros((count, 512, 3), dtype=np.float16)) == []


def test_too_few_points_raise():
    with pytest.raises(ValueError, match="100 points, 512 are needed"):
        shape_points(np.zeros((100, 3), dtype=np.float32))


def test_real_versions_of_a_part_are_found_and_others_are_not():
    folder = shared_path("data/meshes")
    names = [
        "jig_guide/mgn9_rail_guide__669494f.stl",
        "jig_guide/rail_installation_guide_offset__3338f36.stl",
        "electronics_bracket/pcb_din_clip__c4488ba.stl",
        "electronics_bracket/wago_221_415_mount_3by5__7496078.stl",
    ]
    shapes = []
    for name in names:
        path = next(folder.rglob(name.rsplit("/", 1)[1]))
        shapes.append(shape_of(load_mesh(path.read_bytes(), path.suffix.lower())))
    assert pairs(*shapes) == [(0, 1)]
