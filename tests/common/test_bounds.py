"""Bounding boxes against numpy's own minima and maxima."""

import numpy as np
import pytest

from cad_models.common.bounds import bounds, moved_and_scaled


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("num_points", [1, 2, 1_001])
def test_bounds_are_numpys(dtype, num_points):
    points = np.random.default_rng(num_points).normal(size=(num_points, 3)).astype(dtype) * np.array([1, 1e-30, 1e30], dtype)
    for given in (points, points[::-1], np.asfortranarray(points)):
        low, high = bounds(given)
        assert low.dtype == high.dtype == dtype
        np.testing.assert_array_equal(low, points.min(axis=0))
        np.testing.assert_array_equal(high, points.max(axis=0))


@pytest.mark.parametrize("row", [0, 1, 2])
def test_bounds_nan_stays_nan_as_in_numpy(row):
    points = np.arange(9.0).reshape(3, 3)
    points[row, 1] = np.nan
    low, high = bounds(points)
    np.testing.assert_array_equal(low, points.min(axis=0))
    np.testing.assert_array_equal(high, points.max(axis=0))


def test_bounds_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"shape \(0, 3\) has no bounding box"):
        bounds(np.zeros((0, 3)))


def test_moved_and_scaled_has_the_bits_of_numpy():
    generator = np.random.default_rng(5)
    for size in (1e-320, 1e-160, 1.0, 1e160, 1e300):  # subnormal to nearly too large
        points = generator.normal(size=(200, 3)) * size
        shift = points.mean(axis=0)
        for scale in (size, 3 * size, 7.3):
            with np.errstate(under="ignore"):
                np.testing.assert_array_equal(moved_and_scaled(points, shift, scale), (points - shift) / scale)
