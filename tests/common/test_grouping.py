"""The compiled searches for patches against torch's plain loops, which see every point."""

import numpy as np
import pytest
import torch

from cad_models.common import grouping
from cad_models.common.grouping import farthest_points, farthest_points_pointnet2, nearest_neighbors


def _cloud(kind: str, num_points: int, rng: np.random.Generator) -> np.ndarray:
    if kind == "surface":
        points = rng.normal(size=(num_points, 3))
        return points / np.linalg.norm(points, axis=1, keepdims=True)
    if kind == "grid":  # many equal distances
        return rng.integers(-3, 4, (num_points, 3)) / 4
    if kind == "twins":  # fewer places than samples
        return rng.normal(size=(5, 3))[rng.integers(0, 5, num_points)]
    if kind == "line":
        return np.outer(np.linspace(-1, 1, num_points), [1.0, 0.0, 0.0])
    assert kind == "far"
    return 1e4 + rng.normal(size=(num_points, 3))


@pytest.fixture
def clouds(request):
    kind, num_points = request.param
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.stack([_cloud(kind, num_points, rng) for _ in range(3)]).astype(np.float32))


_KINDS = pytest.mark.parametrize(
    "clouds", [(kind, n) for kind in ("surface", "grid", "twins", "line", "far") for n in (40, 1000)], indirect=True, ids=str
)


@_KINDS
@pytest.mark.parametrize("sample", [farthest_points, farthest_points_pointnet2])
def test_compiled_farthest_points_equal_the_plain_loop(clouds, sample, monkeypatch):
    found = sample(clouds, 33)
    monkeypatch.setattr(grouping, "_compiled", lambda points: False)
    assert torch.equal(found, sample(clouds, 33))


@_KINDS
@pytest.mark.parametrize("num_neighbors", [1, 32, 40])
def test_compiled_neighbors_equal_the_plain_search(clouds, num_neighbors, monkeypatch):
    queries = torch.cat([clouds[:, :20], clouds[:, :3] + 0.3, 10 * clouds[:, 5:6]], dim=1)
    found = nearest_neighbors(queries, clouds, num_neighbors)
    monkeypatch.setattr(grouping, "_compiled", lambda points: False)
    assert torch.equal(found, nearest_neighbors(queries, clouds, num_neighbors))


def test_compiled_searches_on_threads_and_strided_points_equal_one_thread():
    wide = torch.randn(7, 500, 6, generator=torch.Generator().manual_seed(0))
    points, before = wide[..., 3:], torch.get_num_threads()
    expected = farthest_points(points.clone(), 40), nearest_neighbors(points[:, :40].clone(), points.clone(), 16)
    try:
        torch.set_num_threads(3)
        found = farthest_points(points, 40), nearest_neighbors(points[:, :40], points, 16)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_points_that_are_not_finite_are_searched_by_torch(value, monkeypatch):
    points = torch.randn(2, 60, 3, generator=torch.Generator().manual_seed(0))
    points[0, 7, 1] = value
    found = farthest_points(points, 10), nearest_neighbors(points[:, :4], points, 8)
    monkeypatch.setattr(grouping, "_compiled", lambda points: False)
    assert torch.equal(found[0], farthest_points(points, 10)) and torch.equal(found[1], nearest_neighbors(points[:, :4], points, 8))


def test_float64_points_keep_their_precision():
    points = torch.tensor([[[0.0, 0, 0], [1.0, 0, 0], [1.0 + 1e-12, 0, 0], [0.5, 0, 0]]], dtype=torch.float64)
    assert farthest_points(points, 2).tolist() == [[0, 2]]
