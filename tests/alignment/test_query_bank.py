"""Query-bank normalisation against its definition, one score at a time."""

import math

import numpy as np
import pytest

from cad_models.alignment.query_bank import bank_normalised


def test_bank_normalised_equals_the_definition():
    rng = np.random.default_rng(0)
    scores, bank = rng.uniform(-1, 1, (7, 5)), rng.uniform(-1, 1, (3, 5))
    hubs = {max(range(5), key=lambda j: row[j]) for row in bank}
    found = bank_normalised(scores, bank, temperature=0.2)
    changed = 0
    for i in range(7):
        best = max(range(5), key=lambda j: scores[i, j])
        for j in range(5):
            expected = math.exp(scores[i, j] / 0.2)
            if best in hubs:
                expected /= sum(math.exp(row[j] / 0.2) for row in bank)
                changed += 1
            assert math.exp(found[i, j]) == pytest.approx(expected, rel=1e-9)
    assert 0 < changed < 35


def test_object_that_attracts_every_query_no_longer_wins():
    scores = np.array([[0.9, 0.8, 0.1], [0.9, 0.1, 0.8]])
    bank = np.array([[0.95, 0.2, 0.1], [0.95, 0.1, 0.2]])
    assert scores.argmax(axis=1).tolist() == [0, 0]
    assert bank_normalised(scores, bank).argmax(axis=1).tolist() == [1, 2]


def test_answers_do_not_depend_on_the_other_queries_or_overflow():
    rng = np.random.default_rng(1)
    scores, bank = rng.uniform(-1, 1, (6, 4)), rng.uniform(-1, 1, (9, 4))
    together = bank_normalised(scores, bank, temperature=1e-4)
    assert np.isfinite(together).all()
    np.testing.assert_array_equal(bank_normalised(scores[2:3], bank, temperature=1e-4)[0], together[2])


def test_empty_bank_and_bad_temperature_raise():
    with pytest.raises(ValueError, match="no queries"):
        bank_normalised(np.ones((1, 2)), np.ones((0, 2)))
    with pytest.raises(ValueError, match="above 0"):
        bank_normalised(np.ones((1, 2)), np.ones((1, 2)), temperature=0.0)
