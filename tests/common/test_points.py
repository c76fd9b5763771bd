import inspect

import numpy as np
import pytest
from scipy.stats import chi2

from cad_models.common.meshes import Mesh
from cad_models.common.points import fps_order, sample_surface, seed_of, side_by_side


def naive_fps(points, num_ordered):
    """The definition, a row of distances at a time."""
    centred = points - points.mean(axis=0, dtype=np.float64).astype(np.float32)
    newest = int((centred**2).sum(axis=1).argmax())
    order, nearest = [], np.full(len(points), np.inf, np.float32)
    for _ in range(num_ordered):
        order.append(newest)
        x, y, z = (points - points[newest]).T
        nearest = np.minimum(nearest, x * x + y * y + z * z)
        nearest[order] = -1
        newest = int(nearest.argmax())  # the first of equal ones
    return np.array(order)


@pytest.fixture(scope="module")
def terrain():
    """400 triangles of very unequal areas over a 10 x 10 grid with random heights; no two face the same way."""
    rng = np.random.default_rng(5)
    side = np.cumsum(rng.uniform(0.05, 1.0, 15))
    x, y = np.meshgrid(side, side, indexing="ij")
    vertices = np.stack([x, y, rng.normal(size=x.shape)], axis=-1).reshape(-1, 3)
    corner = np.arange(15 * 15).reshape(15, 15)
    a, b, c, d = corner[:-1, :-1], corner[1:, :-1], corner[1:, 1:], corner[:-1, 1:]
    faces = np.concatenate([np.stack([a, b, c], -1).reshape(-1, 3), np.stack([a, c, d], -1).reshape(-1, 3)])
    return Mesh(vertices, faces.astype(np.int32))


def areas_and_normals(mesh):
    a, b, c = (mesh.vertices[mesh.faces[:, corner]] for corner in range(3))
    cross = np.cross(b - a, c - a)
    length = np.linalg.norm(cross, axis=1)
    return length / 2, cross / length[:, None]


def face_of(points, normals, mesh):
    """The face of each point: the one whose normal agrees best."""
    return (normals.astype(np.float64) @ areas_and_normals(mesh)[1].T).argmax(axis=1)


def test_sample_surface_counts_by_face_follow_the_areas(terrain):
    areas, _ = areas_and_normals(terrain)
    num_points = 40_000
    points, normals = sample_surface(terrain, num_points, seed=1)
    counts = np.bincount(face_of(points, normals, terrain), minlength=len(areas))
    expected = num_points * areas / areas.sum()
    # Strata: a face gets its share of slices, and a part of the two that it shares with its neighbours.
    assert np.abs(counts - expected).max() < 2
    assert ((counts - expected) ** 2 / expected).sum() < chi2.ppf(0.999, len(areas) - 1)


def test_sample_surface_is_uniform_within_a_face():
    """Barycentric halves and quarters of one triangle have equal shares."""
    triangle = Mesh(np.array([[0.0, 0, 0], [4, 0, 0], [0, 2, 0]]), np.array([[0, 1, 2]], np.int32))
    points, normals = sample_surface(triangle, 20_000, seed=2)
    s, t = points[:, 0] / 4, points[:, 1] / 2
    assert (s >= 0).all() and (t >= 0).all() and (s + t <= 1 + 1e-6).all()
    quarter = np.where(s > 0.5, 0, np.where(t > 0.5, 1, np.where(s + t < 0.5, 2, 3)))
    counts = np.bincount(quarter, minlength=4)
    assert ((counts - 5000) ** 2 / 5000).sum() < chi2.ppf(0.999, 3)
    np.testing.assert_array_equal(normals, np.tile(np.float32([0, 0, 1]), (20_000, 1)))


def test_sample_surface_points_lie_on_faces_whose_normals_they_carry(terrain):
    points, normals = sample_surface(terrain, 5000, seed=3)
    _, face_normals = areas_and_normals(terrain)
    face = face_of(points, normals, terrain)
    np.testing.assert_allclose(normals, face_normals[face], atol=1e-6)
    offset = points.astype(np.float64) - terrain.vertices[terrain.faces[face, 0]]
    assert np.abs((offset * face_normals[face]).sum(axis=1)).max() < 2e-6
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-6)


def test_sample_surface_same_seed_same_bytes_other_seed_other_points(terrain):
    first, again, other = (sample_surface(terrain, 500, seed) for seed in (7, 7, 8))
    assert first[0].tobytes() == again[0].tobytes() and first[1].tobytes() == again[1].tobytes()
    assert not np.array_equal(first[0], other[0])
    assert first[0].dtype == first[1].dtype == np.float32


def test_sample_surface_golden_bytes_do_not_change_between_machines():
    """A cube-like corner of three triangles; digits from numpy's PCG64 and plain arithmetic, so any machine must give them."""
    mesh = Mesh(np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]), np.array([[0, 1, 2], [0, 2, 3], [0, 3, 1]], np.int32))
    points, _ = sample_surface(mesh, 3, seed=0)
    u = np.random.default_rng(0).random((3, 3))
    s, t = (np.where(u[:, 1] + u[:, 2] > 1, 1 - u[:, column], u[:, column]) for column in (1, 2))
    expected = [[s[0], t[0], 0], [0, s[1], t[1]], [t[2], 0, s[2]]]
    np.testing.assert_allclose(points, expected, atol=1e-7)


@pytest.mark.parametrize("scale, offset", [(1e30, 0.0), (1e-25, 0.0), (1.0, 1e5)])
def test_sample_surface_at_any_scale_gives_the_same_points_scaled(terrain, scale, offset):
    points, normals = sample_surface(terrain, 300, seed=4)
    moved = Mesh(terrain.vertices * scale + offset, terrain.faces)
    far_points, far_normals = sample_surface(moved, 300, seed=4)
    np.testing.assert_allclose((far_points.astype(np.float64) - offset) / scale, points, atol=1e-5 + 1e-7 * offset / scale)
    np.testing.assert_allclose(far_normals, normals, atol=1e-5)


def test_sample_surface_skips_faces_without_area_even_at_the_ends():
    vertices = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    mesh = Mesh(vertices, np.array([[0, 0, 1], [0, 1, 2], [1, 1, 2]], np.int32))
    points, normals = sample_surface(mesh, 50, seed=0)
    assert np.isfinite(points).all()
    np.testing.assert_array_equal(normals, np.tile(np.float32([0, 0, 1]), (50, 1)))


def test_sample_surface_without_points_is_refused(terrain):
    with pytest.raises(ValueError, match="num_points is 0"):
        sample_surface(terrain, 0, seed=0)


@pytest.mark.parametrize("num_points, num_ordered", [(1, 1), (2, 2), (63, 63), (1000, 1000), (2500, 700)])
def test_fps_order_equals_naive_loop(num_points, num_ordered):
    points = np.random.default_rng(num_points).normal(size=(num_points, 3)).astype(np.float32)
    order = fps_order(points, num_ordered)
    np.testing.assert_array_equal(order[:num_ordered], naive_fps(points, num_ordered))


def test_fps_order_ties_and_twins_go_to_the_lowest_index():
    """Points of a small integer grid: thousands of equal distances and of equal points."""
    points = np.random.default_rng(0).integers(0, 5, (1500, 3)).astype(np.float32)
    np.testing.assert_array_equal(fps_order(points), naive_fps(points, 1500))


def test_fps_order_on_a_plane_and_in_one_point_equals_naive_loop():
    flat = np.random.default_rng(1).normal(size=(400, 3)).astype(np.float32) * np.float32([1, 1, 0])
    np.testing.assert_array_equal(fps_order(flat), naive_fps(flat, 400))
    np.testing.assert_array_equal(fps_order(np.ones((200, 3), np.float32)), np.arange(200))


def test_fps_order_is_a_permutation_and_keeps_the_rest_in_order():
    points = np.random.default_rng(2).normal(size=(900, 3)).astype(np.float32)
    order = fps_order(points, 100)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(900))
    assert (np.diff(order[100:]) > 0).all()
    np.testing.assert_array_equal(order[:100], fps_order(points)[:100])


@pytest.mark.parametrize("num_ordered", [0, 11])
def test_fps_order_beyond_the_points_is_refused(num_ordered):
    with pytest.raises(ValueError, match="num_ordered"):
        fps_order(np.zeros((10, 3), np.float32), num_ordered)


def test_fps_order_of_non_finite_points_is_refused():
    with pytest.raises(ValueError, match="finite"):
        fps_order(np.full((3, 3), np.nan, np.float32))


def test_seed_of_is_stable_and_depends_on_both():
    assert seed_of("part/a.stl", 0) == seed_of("part/a.stl", 0)
    assert len({seed_of(name, seed) for name in ("a", "b", "деталь") for seed in range(100)}) == 300
    assert all(0 <= seed_of("a", seed) < 1 << 63 for seed in range(100))
    assert seed_of("part/a.stl", 0) == 2695420528711231369


def test_side_by_side_is_numpys_concatenation():
    rng = np.random.default_rng(3)
    points, normals = (rng.normal(size=(3, 50, 3)).astype(np.float32) for _ in range(2))
    for a, b in ((points, normals), (points[:, :7], normals[:, :7]), (points[:0], normals[:0])):
        np.testing.assert_array_equal(side_by_side(a, b), np.concatenate([a, b], axis=2))


def test_side_by_side_of_unequal_clouds_is_refused():
    with pytest.raises(ValueError, match="prepare the dataset again"):
        inspect.unwrap(side_by_side)(np.zeros((2, 8, 3), np.float32), np.zeros((2, 4, 3), np.float32))
