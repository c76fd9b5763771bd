"""Ray-cast histograms against geometry that is known in closed form, and against slow ray casting."""

import numpy as np
import pytest

from cad_models.common.meshes import BadMesh, Mesh
from cad_models.histograms.bounding_ball import smallest_enclosing_ball
from cad_models.histograms.primitives import CLASSES, generate_shape, random_rotation
from cad_models.histograms.shape_histograms import (
    BINS,
    KINDS,
    PARTS,
    SHORTEST_CHORD,
    chords,
    convex_hull,
    measure,
    shape_histograms,
    surface_points,
)


def cube(half=(1.0, 1.0, 1.0)):
    vertices, faces = convex_hull(np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * np.array(half))
    return vertices, faces


def ball(rings=48):
    angle, turn = np.linspace(0, np.pi, rings), np.linspace(0, 2 * np.pi, 2 * rings, endpoint=False)
    points = [(np.sin(a) * np.cos(t), np.sin(a) * np.sin(t), np.cos(a)) for a in angle for t in turn]
    return convex_hull(np.unique(np.round(points, 12), axis=0))


def slow_first_hits(corners, starts, directions):
    """Moeller-Trumbore, every triangle with every ray."""
    best = np.full(len(starts), np.inf)
    for a, b, c in corners:
        p = np.cross(directions, c - a)
        det = p @ (b - a)
        with np.errstate(divide="ignore", invalid="ignore"):
            t = starts - a
            u = np.einsum("ni,ni->n", t, p) / det
            q = np.cross(t, b - a)
            v = np.einsum("ni,ni->n", directions, q) / det
            depth = q @ (c - a) / det
        hit = (np.abs(det) > 1e-12) & (u >= 0) & (v >= 0) & (u + v <= 1) & (depth > 0)
        best = np.where(hit & (depth < best), depth, best)
    return best


@pytest.mark.parametrize("index", range(len(CLASSES)))
def test_invariants_of_every_class_hold(index):
    shape = generate_shape(index, 3, CLASSES)
    found = shape_histograms(Mesh(shape.vertices, shape.faces.astype(np.int32)), log2_chords=11)
    assert list(found) == [(part, kind, bins) for part in PARTS for bins in BINS for kind in KINDS]
    for part in PARTS:
        for bins in BINS:
            outer, absolute = found[part, "strict_outer", bins], found[part, "strict_outer_absolute", bins]
            for kind in ("strict_outer", "missed", "concentric_sphere"):
                assert found[part, kind, bins].sum() == pytest.approx(1)
            assert absolute == pytest.approx(outer * absolute.sum())
            assert 0 < absolute.sum() < 1
        # Bins are nested: two of 128 make one of 64.
        for kind in KINDS:
            assert found[part, kind, 128].reshape(64, 2).sum(axis=1) == pytest.approx(found[part, kind, 64])
    convex = shape.label not in ("Torus", "Tube")
    same = np.abs(found["model", "strict_outer_absolute", 32] - found["hull", "strict_outer_absolute", 32]).sum()
    assert same < 0.01 if convex else same > 0.02


def test_sphere_lies_in_one_shell_and_is_hit_at_once():
    vertices, faces = ball()
    found = shape_histograms(Mesh(vertices * 7 + 100, faces.astype(np.int32)), log2_chords=11)
    assert found["model", "concentric_sphere", 64][-1] == 1
    # A chord at the shortest length meets a polyhedron of this fineness less than 2 % of the diameter deep, if at all.
    assert found["model", "strict_outer", 32][0] > 0.98
    assert found["model", "strict_outer_absolute", 32].sum() > 0.98


def test_share_of_hits_is_the_ratio_of_the_surfaces():
    # Cauchy: uniform chords meet a convex body within the sphere with probability area / area of the sphere. The short ones, a share of
    # SHORTEST_CHORD^2, are left out here; of them only those about the eight corners would have hit.
    vertices, faces = cube()
    measured = measure(vertices, faces, log2_chords=16)
    share = len(measured.depths) / (len(measured.depths) + len(measured.missed))
    assert share == pytest.approx(24 / (4 * np.pi * 3) / (1 - SHORTEST_CHORD**2), abs=0.015)


def test_depths_equal_slow_ray_casting():
    shape = generate_shape(4, 0)  # a torus
    measured = measure(shape.vertices, shape.faces, log2_chords=7)
    centre, radius = smallest_enclosing_ball(shape.vertices)
    rays = chords(7)
    slow = slow_first_hits((shape.vertices[shape.faces] - centre) / (2 * radius), rays.starts.astype(float), rays.directions.astype(float))
    hit = slow <= rays.lengths
    assert hit.sum() == len(measured.depths) and 10 < hit.sum() < len(hit) - 10
    np.testing.assert_allclose(measured.depths, slow[hit], atol=2e-5)
    np.testing.assert_allclose(measured.missed, rays.lengths[~hit])


def test_rotation_translation_and_uniform_scale_hardly_change_anything():
    shape = generate_shape(1, 5)
    rng = np.random.default_rng(0)
    moved = shape.vertices @ random_rotation(rng).T * 1e-3 + 5
    one, two = measure(shape.vertices, shape.faces), measure(moved, shape.faces)
    for kind in KINDS:
        assert np.abs(one.histogram(kind, 16) - two.histogram(kind, 16)).sum() < 0.04, kind
    assert np.abs(one.histogram("concentric_sphere", 16) - two.histogram("concentric_sphere", 16)).sum() < 1e-6


def test_chords_are_uniform_and_long_enough():
    rays = chords(14)
    np.testing.assert_allclose(np.linalg.norm(rays.starts, axis=1), 0.5, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rays.starts + rays.directions * rays.lengths[:, None], axis=1), 0.5, rtol=1e-5)
    assert rays.lengths.min() >= SHORTEST_CHORD
    # Uniform ends: the squared length is uniform.
    shares, _ = np.histogram(rays.lengths**2, bins=10, range=(SHORTEST_CHORD**2, 1))
    assert np.abs(shares / shares.mean() - 1).max() < 0.04


def test_surface_points_follow_the_area():
    vertices, faces = cube((1.0, 2.0, 3.0))
    points = surface_points(vertices[faces])
    on_x = np.isclose(np.abs(points[:, 0]), 1)
    assert on_x.mean() == pytest.approx(24 / (24 + 12 + 8), abs=2e-3)
    assert points[on_x][:, 1].mean() == pytest.approx(0, abs=0.02) and np.abs(points[on_x][:, 1]).mean() == pytest.approx(1, abs=0.02)


def test_flat_or_single_point_shapes_are_refused_with_a_reason():
    square = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=float)
    with pytest.raises(BadMesh, match="flat"):
        shape_histograms(Mesh(square, np.array([[0, 1, 2], [0, 2, 3]], dtype=np.int32)))
    with pytest.raises(BadMesh, match="one point"):
        measure(np.zeros((3, 3)), np.array([[0, 1, 2]]))


def test_unknown_kind_of_histogram_names_those_there_are():
    vertices, faces = cube()
    with pytest.raises(ValueError, match="concentric_sphere"):
        measure(vertices, faces, log2_chords=4).histogram("outer", 8)


# --- the ball -------------------------------------------------------------------------------------------------------------------------------
def test_smallest_ball_of_known_points():
    for points, radius in (
        ([[1, 2, 3]], 0.0),
        ([[0, 0, 0], [2, 0, 0]], 1.0),
        ([[0, 0, 0], [2, 0, 0], [1, 0.5, 0]], 1.0),  # the third lies within
        ([[1, 0, 0], [-0.5, np.sqrt(0.75), 0], [-0.5, -np.sqrt(0.75), 0]], 1.0),
        ([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.sqrt(3)),
    ):
        assert smallest_enclosing_ball(np.array(points, dtype=float))[1] == pytest.approx(radius)
    with pytest.raises(ValueError):
        smallest_enclosing_ball(np.zeros((0, 3)))


def test_smallest_ball_of_random_points_is_small_and_holds_them():
    from scipy.optimize import minimize

    rng = np.random.default_rng(1)
    for _ in range(20):
        points = rng.standard_normal((int(rng.integers(2, 60)), 3)) * rng.uniform(0.1, 5, 3)
        centre, radius = smallest_enclosing_ball(points)
        assert np.linalg.norm(points - centre, axis=1).max() <= radius * (1 + 1e-9)
        start, options = points.mean(axis=0), {"xatol": 1e-7, "fatol": 1e-9}
        best = minimize(lambda c, p: np.linalg.norm(p - c, axis=1).max(), start, args=(points,), method="Nelder-Mead", options=options)
        assert radius <= best.fun + 1e-6
