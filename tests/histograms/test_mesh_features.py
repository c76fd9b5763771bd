"""The affine frame and shape distributions, against Monte Carlo and against what no affine map may change."""

import numpy as np
import pytest

from cad_models.common.meshes import BadMesh
from cad_models.histograms.mesh_features import DISTRIBUTIONS, affine_frame, hull_moments, shape_distributions
from cad_models.histograms.primitives import CLASSES, generate_shape


def test_moments_of_a_box_are_those_of_the_formula():
    rng = np.random.default_rng(0)
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=float)
    inner = rng.uniform(-1, 1, (30, 3))
    centroid, covariance = hull_moments(np.concatenate([corners, inner]) * [1, 2, 3] + [10, 0, -5])
    np.testing.assert_allclose(centroid, [10, 0, -5], atol=1e-12)
    np.testing.assert_allclose(covariance, np.diag([1, 4, 9]) / 3, atol=1e-12)


def test_moments_of_a_tetrahedron_equal_monte_carlo():
    rng = np.random.default_rng(0)
    corners = rng.standard_normal((4, 3))
    shares = rng.dirichlet(np.ones(4), 400_000)
    samples = shares @ corners
    centroid, covariance = hull_moments(corners)
    np.testing.assert_allclose(centroid, samples.mean(axis=0), atol=5e-3)
    np.testing.assert_allclose(covariance, np.cov(samples.T), atol=5e-3)


@pytest.mark.parametrize("index", range(len(CLASSES)))
def test_affine_distributions_do_not_feel_an_affine_map(index):
    shape = generate_shape(index, 1, CLASSES)
    rng = np.random.default_rng(index)
    matrix = rng.standard_normal((3, 3)) + 2 * np.eye(3)
    moved = shape.vertices @ matrix.T + [1, -2, 3]
    before, after = (shape_distributions(v, shape.faces, affine=True) for v in (shape.vertices, moved))
    assert np.abs(before - after).sum(axis=1).max() < 0.02
    # A non-uniform scale does change the classical ones.
    before, after = (shape_distributions(v, shape.faces, affine=False) for v in (shape.vertices, shape.vertices * [1, 1, 6]))
    assert np.abs(before - after).sum(axis=1).max() > 0.1


def test_classical_distributions_do_not_feel_rotation_and_uniform_scale():
    shape = generate_shape(2, 1)
    turned = shape.vertices[:, [1, 2, 0]] * 1000 + 7
    one, two = (shape_distributions(v, shape.faces, affine=False) for v in (shape.vertices, turned))
    assert np.abs(one - two).sum() < 1e-2
    np.testing.assert_allclose(one.sum(axis=1), 1)


def test_distributions_of_a_sphere_are_those_of_the_formula():
    from tests.histograms.test_shape_histograms import ball

    vertices, faces = ball()
    found = dict(zip(DISTRIBUTIONS, shape_distributions(vertices, faces, affine=True), strict=True))
    # A solid unit ball has variance 1/5 on every axis: in the affine frame the radius is sqrt(5) = 2.236, in bin 35 of 64 up to 4.
    assert found["d1"][34:37].sum() > 0.999 and found["d1"].argmax() == 35
    # The distance of two points on a sphere has the density d / (2 r^2) up to 2 r.
    edges = np.arange(65) * 6 / 64
    expected = np.diff(np.minimum(edges / (2 * np.sqrt(5)), 1) ** 2)
    assert np.abs(found["d2"] - expected).sum() < 0.05


def test_flat_shapes_are_refused():
    square = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=float)
    with pytest.raises(BadMesh, match="flat"):
        affine_frame(square)
    with pytest.raises(BadMesh, match="one point"):
        affine_frame(np.ones((4, 3)))


def test_nearest_class_mean_of_affine_distributions_tells_generated_shapes_apart():
    classes = CLASSES[:5]
    shapes = [generate_shape(i, 9) for i in range(100)]
    rows = np.stack([np.sqrt(shape_distributions(s.vertices, s.faces, affine=True)).ravel() for s in shapes])
    labels = np.array([classes.index(s.label) for s in shapes])
    means = np.stack([rows[:50][labels[:50] == c].mean(axis=0) for c in range(5)])
    predicted = np.linalg.norm(rows[50:, None] - means[None], axis=2).argmin(axis=1)
    assert (predicted == labels[50:]).mean() >= 0.96
