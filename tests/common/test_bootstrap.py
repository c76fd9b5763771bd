"""Bootstrap intervals: against a loop over resamples, the binomial distribution, and their own promises."""

import numpy as np
import pytest

from cad_models.common import bootstrap
from cad_models.common.bootstrap import ratio_intervals


def test_intervals_equal_a_loop_over_resamples():
    rng = np.random.default_rng(3)
    counts = rng.integers(1, 7, (20, 3)).astype(float)
    hits = np.floor(rng.random((20, 3)) * (counts + 1))
    draws = np.random.default_rng(5).multinomial(20, np.full(20, 1 / 20), size=200)
    found = [[sum(w * h for w, h in zip(draw, hits[:, f], strict=True)) / (draw @ counts[:, f]) for f in range(3)] for draw in draws]
    low, high = ratio_intervals(hits, counts, seed=5, num_resamples=200, coverage=0.9)
    np.testing.assert_allclose(low, np.quantile(found, 0.05, axis=0), atol=1e-12)
    np.testing.assert_allclose(high, np.quantile(found, 0.95, axis=0), atol=1e-12)


def test_interval_of_a_share_has_the_binomial_width_and_covers_it():
    rng = np.random.default_rng(0)
    hits = (rng.random((400, 1)) < 0.3).astype(float)
    low, high = ratio_intervals(hits, np.ones((400, 1)))
    share = hits.mean()
    assert low < share < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(share * (1 - share) / 400), rel=0.1)


def test_interval_draws_whole_objects_not_their_queries():
    # 50 objects whose 8 queries are all right or all wrong: no more than 50 independent things were seen.
    hits = np.repeat([[0.0], [8.0]], 25, axis=0)
    low, high = ratio_intervals(hits, np.full((50, 1), 8.0))
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 50), rel=0.12)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        hits = (rng.random((120, 1)) < 0.5).astype(float)
        low, high = ratio_intervals(hits, np.ones((120, 1)), seed=trial, num_resamples=300)
        covered += low[0] <= 0.5 <= high[0]
    assert 0.88 <= covered / 200 <= 0.99


def test_same_seed_same_bounds_whatever_the_blocks(monkeypatch):
    hits, counts = np.random.default_rng(0).random((30, 2)), np.ones((30, 2))
    first = ratio_intervals(hits, counts, seed=1)
    monkeypatch.setattr(bootstrap, "_BLOCK_ELEMENTS", 70)
    np.testing.assert_allclose(ratio_intervals(hits, counts, seed=1), first, atol=1e-12)
    assert np.abs(np.array(ratio_intervals(hits, counts, seed=2)) - first).max() > 0


def test_resamples_without_anything_to_count_do_not_count():
    counts = np.zeros((3, 1))
    counts[0] = 1.0
    low, high = ratio_intervals(counts, counts)
    assert (low[0], high[0]) == (1.0, 1.0)


@pytest.mark.parametrize("arrays", [(np.zeros((0, 1)), np.zeros((0, 1))), (np.zeros((2, 1)), np.zeros((2, 1)))])
def test_nothing_to_measure_raises(arrays):
    with pytest.raises(ValueError, match="one shape|nothing to count"):
        ratio_intervals(*arrays)
