"""Measures in file units against geometry that is known, and their similarity against a loop."""

import math

import numpy as np
import pytest

from cad_models.alignment.descriptors import NUM_MEASURES, measures, similarity
from cad_models.common.meshes import Mesh

_CORNERS = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=np.float64)
_QUADS = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
_FACES = np.array([t for a, b, c, d in _QUADS for t in ((a, b, c), (a, c, d))], dtype=np.int32)


def box(*sides: float, shift: float = 0.0) -> Mesh:
    return Mesh(_CORNERS * sides + shift, _FACES)


def drawn(*shape: int, seed: int = 0, unknown: float = 0.2) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.normal(3.0, 0.1, shape).astype(np.float32)
    values[rng.uniform(size=shape[0]) < unknown, 4] = np.nan
    return values


def test_measures_of_a_box_are_its_sides_area_volume_and_distances():
    found = measures(box(2.0, 20.0, 7.0, shift=31.0))
    assert found.dtype == np.float32 and found.shape == (NUM_MEASURES,)
    np.testing.assert_allclose(found[:3], np.log([20.0, 7.0, 2.0]), atol=1e-6)
    assert found[3] == pytest.approx(math.log(2 * (2 * 20 + 20 * 7 + 2 * 7)) / 2, abs=1e-6)
    assert found[4] == pytest.approx(math.log(2 * 20 * 7) / 3, abs=1e-6)
    # D2 by another way: independent points, a side of the box in proportion to its area, all pairs.
    rng = np.random.default_rng(1)
    sides, points = np.array([2.0, 20.0, 7.0]), []
    areas = np.array([sides[1] * sides[2], sides[0] * sides[2], sides[0] * sides[1]])
    for axis in rng.choice(3, size=1_000, p=areas / areas.sum()):
        point = rng.uniform(size=3)
        point[axis] = rng.integers(0, 2)
        points.append(point * sides)
    lengths = [math.dist(p, q) for i, p in enumerate(points) for q in points[:i]]
    np.testing.assert_allclose(found[5:], np.log(np.quantile(lengths, (np.arange(16) + 0.5) / 16)), atol=0.04)
    assert (np.diff(found[5:]) > 0).all()


@pytest.mark.parametrize("scale", [25.4, 1e-3, 1e150, 1e-150])
def test_measures_of_a_scaled_part_differ_by_the_logarithm_of_the_scale(scale):
    np.testing.assert_allclose(measures(box(2.0 * scale, 3.0 * scale, 5.0 * scale)), measures(box(2.0, 3.0, 5.0)) + math.log(scale), rtol=1e-6, atol=2e-5)


def test_measures_of_a_part_on_its_side_are_nearly_the_same():
    upright, lying = measures(box(2.0, 3.0, 5.0)), measures(box(5.0, 2.0, 3.0))
    np.testing.assert_allclose(upright[:5], lying[:5], atol=1e-6)
    # Another sample of the same distribution: its ends scatter most.
    assert np.abs(upright[5:] - lying[5:]).mean() < 0.01
    np.testing.assert_allclose(upright[6:], lying[6:], atol=0.03)


def test_measures_of_open_and_flat_meshes_have_no_volume_and_stay_finite():
    lid_off = Mesh(_CORNERS.copy(), _FACES[2:])
    sheet = Mesh(np.array([[0.0, 0, 0], [4, 0, 0], [4, 3, 0], [0, 3, 0]]), np.array([[0, 1, 2], [0, 2, 3]], dtype=np.int32))
    for mesh in (lid_off, sheet):
        found = measures(mesh)
        assert np.isnan(found[4]) and np.isfinite(np.delete(found, 4)).all()
    assert measures(sheet)[0] == pytest.approx(math.log(4), abs=1e-6)


def test_similarity_equals_a_loop_that_leaves_unknown_volumes_out():
    queries, gallery = drawn(7, NUM_MEASURES, seed=1), drawn(9, NUM_MEASURES, seed=2)
    found = similarity(queries, gallery)
    assert np.isnan(queries[:, 4]).any() and np.isnan(gallery[:, 4]).any()
    for i, a in enumerate(queries.tolist()):
        for j, b in enumerate(gallery.tolist()):
            parts = [abs(a[k] - b[k]) for k in range(5)] + [sum(abs(a[k] - b[k]) for k in range(5, 21)) / 16]
            known = [1 / (1 + d / 0.05) for d in parts if not math.isnan(d)]
            assert found[i, j] == pytest.approx(sum(known) / len(known), abs=1e-9)


def test_similarity_is_one_for_itself_symmetric_and_the_same_in_blocks(monkeypatch):
    rows = drawn(12, NUM_MEASURES)
    found = similarity(rows, rows)
    np.testing.assert_array_equal(np.diag(found), 1.0)
    np.testing.assert_array_equal(found, found.T)
    assert ((found > 0) & (found <= 1)).all()
    monkeypatch.setattr("cad_models.alignment.descriptors._BLOCK_ELEMENTS", 30)
    np.testing.assert_array_equal(similarity(rows, rows), found)


def test_similarity_one_side_of_another_length_costs_a_sixth_and_not_more():
    part = measures(box(2.0, 3.0, 5.0))
    longer = part.copy()
    longer[0] += 5.0
    much_longer = longer.copy()
    much_longer[0] += 100.0
    near, far = similarity(part[None], np.stack([longer, much_longer]))[0]
    assert 5 / 6 < far < near < 5 / 6 + 0.01
