"""Ranks and average precision against sorting by hand, with ties, exclusions and several right answers."""

import numpy as np
import pytest

from cad_models.common.score_ranks import average_precisions, score_ranks


def by_hand(scores, relevant, allowed):
    """Sort one row: best score first, among equal ones the wrong answers first."""
    row = sorted((-s, r) for s, r, a in zip(scores, relevant, allowed, strict=True) if a)
    places = [place for place, (_, right) in enumerate(row, start=1) if right]
    return places[0], sum(k / place for k, place in enumerate(places, start=1)) / len(places)


@pytest.mark.parametrize("seed", range(5))
def test_ranks_and_average_precisions_equal_sorting_by_hand(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, (30, 12)).astype(np.float64) / 7  # many ties
    relevant, allowed = rng.uniform(size=(30, 12)) < 0.3, rng.uniform(size=(30, 12)) < 0.8
    relevant[:, 0] = allowed[:, 0] = True
    wanted = [by_hand(*rows) for rows in zip(scores.tolist(), relevant.tolist(), allowed.tolist(), strict=True)]
    assert score_ranks(scores, relevant, allowed).tolist() == [rank for rank, _ in wanted]
    np.testing.assert_allclose(average_precisions(scores, relevant, allowed), [precision for _, precision in wanted], rtol=1e-12)


def test_constant_scores_give_the_worst_rank():
    relevant = np.array([[True, False, False, True]])
    assert score_ranks(np.zeros((1, 4)), relevant).tolist() == [3]
    assert average_precisions(np.zeros((1, 4)), relevant)[0] == pytest.approx((1 / 3 + 2 / 4) / 2)


def test_scores_that_differ_beyond_float32_are_ties():
    scores = np.array([[1.0 + 1e-12, 1.0]])
    assert score_ranks(scores, np.array([[True, False]])).tolist() == [2]


def test_query_whose_only_right_answer_is_excluded_is_refused():
    relevant = np.array([[True, False], [False, True]])
    with pytest.raises(ValueError, match="query 1 has no relevant item"):
        score_ranks(np.ones((2, 2)), relevant, np.array([[True, True], [True, False]]))
