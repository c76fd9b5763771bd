"""Cameras: convention, spread of the gallery views, distance of the query views from them."""

import json
import math

import numpy as np
import pytest

from cad_models.common.cameras import Camera, angle_between_deg, query_cameras, ring_cameras


@pytest.mark.parametrize(
    ("azimuth", "elevation", "roll", "expected"),
    [
        (0.0, 0.0, 0.0, [[0, 1, 0], [0, 0, 1], [1, 0, 0]]),
        (90.0, 0.0, 0.0, [[-1, 0, 0], [0, 0, 1], [0, 1, 0]]),
        (0.0, 90.0, 0.0, [[0, 1, 0], [-1, 0, 0], [0, 0, 1]]),
        (0.0, 0.0, 90.0, [[0, 0, 1], [0, -1, 0], [1, 0, 0]]),  # the camera lies on its left side: its right points up
    ],
)
def test_camera_axes_match_the_stated_convention(azimuth, elevation, roll, expected):
    axes = Camera(azimuth_deg=azimuth, elevation_deg=elevation, roll_deg=roll).axes()
    np.testing.assert_allclose(axes, expected, atol=1e-12)


def test_camera_dict_survives_json_unchanged():
    for camera in [*ring_cameras(5), *query_cameras(5, 3, max_roll_deg=180.0)]:
        assert Camera.from_dict(json.loads(json.dumps(camera.to_dict()))) == camera


def test_camera_refuses_values_out_of_range():
    with pytest.raises(ValueError, match="elevation_deg is 91"):
        Camera(azimuth_deg=0.0, elevation_deg=91.0)
    with pytest.raises(ValueError, match="azimuth_deg is nan"):
        Camera(azimuth_deg=math.nan, elevation_deg=0.0)
    with pytest.raises(ValueError, match="zoom"):
        Camera.from_dict({"azimuth_deg": 0.0, "elevation_deg": 0.0, "zoom": 2.0})


def test_ring_cameras_leave_no_direction_far_from_a_camera():
    cameras = ring_cameras(24)
    assert len(cameras) == 24
    directions = np.stack([camera.direction() for camera in cameras])
    apart = [angle_between_deg(a, b) for i, a in enumerate(cameras) for b in cameras[:i]]
    assert min(apart) >= 36.0
    probes = np.random.default_rng(0).normal(size=(20_000, 3))
    probes /= np.linalg.norm(probes, axis=1, keepdims=True)
    nearest = np.degrees(np.arccos(np.clip((probes @ directions.T).max(axis=1), -1, 1)))
    assert nearest.max() <= 32.0


def test_query_cameras_stay_apart_from_ring_cameras_and_upright():
    for seed in range(50):
        for camera in query_cameras(3, seed):
            assert camera.roll_deg == 0.0
            assert min(angle_between_deg(camera, other) for other in ring_cameras()) >= 10.0


def test_query_cameras_repeat_by_seed_and_differ_between_seeds():
    assert query_cameras(4, 7) == query_cameras(4, 7)
    assert query_cameras(6, 7)[:4] == query_cameras(4, 7)  # more views extend the same sequence
    assert query_cameras(4, 7) != query_cameras(4, 8)
    assert len({camera.roll_deg for camera in query_cameras(4, 7, max_roll_deg=180.0)}) == 4


def test_query_cameras_cover_both_hemispheres_and_all_quarters():
    directions = np.stack([query_cameras(1, seed)[0].direction() for seed in range(400)])
    assert np.abs(directions.mean(axis=0)).max() < 0.1
    assert np.abs(np.cov(directions.T) - np.eye(3) / 3).max() < 0.07


def test_query_cameras_without_room_raise():
    with pytest.raises(ValueError, match="lower min_angle_deg"):
        query_cameras(1, 0, apart_from=ring_cameras(24), min_angle_deg=60.0)
