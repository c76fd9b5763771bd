"""Generated shapes: closed, right, seeded, without duplicates."""

from collections import Counter

import numpy as np
import pytest

from cad_models.common.meshes import Mesh, geometry_signature, group_duplicates, mesh_facts, read_mesh
from cad_models.histograms.primitives import CLASSES, SOURCE_CLASSES, _primitive, generate_shape, random_rotation, write_shapes


@pytest.mark.parametrize("index", range(len(CLASSES)))
def test_every_class_is_closed_and_wound_outwards(index):
    shape = generate_shape(index, 0, CLASSES)
    facts = mesh_facts(Mesh(shape.vertices, shape.faces.astype(np.int32)))
    assert shape.label == CLASSES[index] and facts.watertight and facts.num_bodies == 1
    corners = shape.vertices[shape.faces] - shape.vertices.mean(axis=0)
    assert np.linalg.det(corners).sum() / 6 == pytest.approx(facts.volume, rel=1e-6)  # positive: outward


def test_primitives_have_the_volumes_of_their_formulas():
    rng = np.random.default_rng(0)
    expected = {"Cube": 8, "Cylinder": 2 * np.pi, "Cone": 2 * np.pi / 3, "Sphere": 4 * np.pi / 3, "Pyramid": 8 / 3}
    for label, volume in expected.items():
        vertices, faces = _primitive(label, rng)
        assert np.linalg.det(vertices[faces]).sum() / 6 == pytest.approx(volume, rel=0.03), label
    vertices, _ = _primitive("Cube", rng)
    assert np.abs(vertices).max(axis=1) == pytest.approx(1)  # sides along the axes, so that a scale makes boxes


def test_unknown_class_names_those_there_are():
    with pytest.raises(ValueError, match="Torus"):
        _primitive("Teapot", np.random.default_rng(0))


def test_same_seed_gives_the_same_bytes_and_another_seed_others():
    one, two, other = generate_shape(7, 1), generate_shape(7, 1), generate_shape(7, 2)
    assert one.vertices.tobytes() == two.vertices.tobytes() and one.faces.tobytes() == two.faces.tobytes()
    assert one.label == other.label and one.vertices.tobytes() != other.vertices.tobytes()


def test_classes_are_equally_frequent_and_no_shape_is_another_ones_duplicate():
    shapes = [generate_shape(i, 0) for i in range(100)]
    assert Counter(s.label for s in shapes) == dict.fromkeys(SOURCE_CLASSES, 20)
    signatures = [geometry_signature(Mesh(s.vertices, s.faces.astype(np.int32))) for s in shapes]
    assert group_duplicates(signatures, [len(s.faces) for s in shapes]).tolist() == list(range(100))


def test_rotations_are_rotations_and_uniform():
    rng = np.random.default_rng(0)
    turned = np.stack([random_rotation(rng) for _ in range(4000)])
    np.testing.assert_allclose(turned @ turned.transpose(0, 2, 1), np.broadcast_to(np.eye(3), turned.shape), atol=1e-12)
    assert np.linalg.det(turned) == pytest.approx(1)
    # Each image of an axis is uniform on the sphere: mean 0, second moments 1/3.
    np.testing.assert_allclose(turned.mean(axis=0), 0, atol=0.05)
    np.testing.assert_allclose((turned**2).mean(axis=0), 1 / 3, atol=0.03)


def test_written_shapes_read_back_with_their_classes(tmp_path):
    write_shapes(tmp_path, 5, 3)
    lines = (tmp_path / "classes.tsv").read_text().splitlines()
    assert [line.split("\t")[1] for line in lines] == list(SOURCE_CLASSES)
    mesh = read_mesh(tmp_path / "Torus" / "shape-000004.stl")
    shape = generate_shape(4, 3)
    np.testing.assert_array_equal(np.sort(mesh.vertices[mesh.faces], axis=None), np.sort(shape.vertices[shape.faces], axis=None))
