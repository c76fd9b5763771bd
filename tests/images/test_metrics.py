"""Metrics by hand, ensemble rules by definition, fits against brute force."""

import numpy as np
import pytest

from cad_models.images import ensembling
from cad_models.images.ensembling import RULES, combine, fit, fit_stack, fit_weights, tune_factors
from cad_models.images.metrics import calibration, chance_metrics, classification_metrics, mean_roc_auc


def softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def members_and_label(num_members=3, num_objects=200, num_classes=3, seed=0, noise=(0.5, 1.0, 3.0)):
    rng = np.random.default_rng(seed)
    label = rng.choice(num_classes, num_objects, p=np.array([0.7, 0.2, 0.1])[:num_classes] / sum([0.7, 0.2, 0.1][:num_classes]))
    members = [softmax(1.5 * np.eye(num_classes)[label] + noise[m] * rng.normal(size=(num_objects, num_classes))) for m in range(num_members)]
    return members, label


# --- metrics ------------------------------------------------------------------------------------------------------------------------------
def test_metrics_of_a_worked_example():
    # Answers 0 0 1 1 against labels 0 1 1 2: class 0 P 1/2 R 1, class 1 P 1/2 R 1/2, class 2 P 0 R 0.
    probabilities = np.array([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.1, 0.7, 0.2], [0.2, 0.5, 0.3]])
    found = classification_metrics(probabilities, np.array([0, 1, 1, 2]))
    assert found["accuracy"] == 0.5
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert found["macro_precision"] == pytest.approx((1 / 2 + 1 / 2 + 0) / 3) and found["macro_recall"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert found["min_class_f1"] == 0
    assert found["log_loss"] == pytest.approx(-np.log([0.8, 0.3, 0.7, 0.3]).mean())
    # Class 0: 0.8 against 0.6 0.1 0.2 -> 1. Class 1: {0.3 0.7} against {0.1 0.5}: 3 of 4. Class 2: 0.3 against 0.1 0.1 0.2 -> 1.
    assert found["roc_auc"] == pytest.approx((1 + 3 / 4 + 1) / 3)
    # Confidences 0.8 right, 0.6 wrong, 0.7 right, 0.5 wrong, each in a bin of its own.
    assert found["ece"] == pytest.approx((0.2 + 0.6 + 0.3 + 0.5) / 4)


def test_metrics_of_one_class_or_certain_mistakes_stay_finite():
    certain = np.array([[1.0, 0.0], [1.0, 0.0]])
    for label in ([0, 0], [1, 1], [0, 1]):
        assert all(np.isfinite(v) for v in classification_metrics(certain, np.array(label)).values())
    assert mean_roc_auc(certain, np.array([1, 1])) == 0.5


def test_calibration_puts_full_certainty_into_the_last_bin():
    found = calibration(np.array([[1.0, 0.0], [0.999, 0.001], [0.5, 0.5]]), np.array([0, 1, 0]))
    assert found.count[-1] == 2 and found.count.sum() == 3 and found.accuracy[-1] == 0.5


def test_chance_answers_the_most_frequent_class():
    found = chance_metrics(np.array([0, 0, 0, 1]), 2)
    assert found["accuracy"] == 0.75 and found["roc_auc"] == 0.5 and found["macro_f1"] == pytest.approx(6 / 7 / 2)


# --- rules --------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_probabilities(rule):
    members, label = members_and_label()
    found = combine(members, rule=rule, weights=[1.0, 2.0, 1.0], fitted=fit(members, label, rule=rule))
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-9)
    assert (found >= 0).all() and found.shape == members[0].shape


def test_soft_is_the_weighted_mean_and_hard_the_majority():
    a, b, c = np.array([[0.9, 0.1, 0.0]]), np.array([[0.3, 0.7, 0.0]]), np.array([[0.4, 0.6, 0.0]])
    np.testing.assert_allclose(combine([a, b], rule="soft", weights=[3.0, 1.0]), [[0.75, 0.25, 0.0]])
    assert combine([a, b, c], rule="soft").argmax() == 0 and combine([a, b, c], rule="hard").argmax() == 1
    np.testing.assert_allclose(combine([a, b, c], rule="hard"), [[1 / 3, 2 / 3, 0]], atol=1e-5)
    assert combine([a, b], rule="hard").argmax() == 0  # one vote each: the mean decides


def test_fitted_weights_are_the_likeliest_mean():
    members, label = members_and_label(2, 400)
    weights = fit_weights(np.stack(members), label)

    def penalised(w: float) -> float:
        likelihood = sum(v * m[np.arange(len(label)), label] for v, m in zip((w, 1 - w), members, strict=True))
        return float(np.log(likelihood).sum() + ensembling._PRIOR_WEIGHTS / 2 * (np.log(w) + np.log(1 - w)))

    best = max(np.linspace(0.001, 0.999, 999), key=penalised)
    assert weights.sum() == pytest.approx(1) and weights[0] == pytest.approx(best, abs=2e-3)


def test_useless_member_gets_little_weight():
    rng = np.random.default_rng(1)
    members, label = members_and_label(2, 600, noise=(0.3, 0.3))
    members.append(softmax(3 * rng.normal(size=members[0].shape)))
    assert fit(members, label, rule="weighted")["weights"][2] < 0.1
    assert abs(fit(members, label, rule="stacked")["coefficients"][2]) < 0.1


def test_stack_is_at_the_minimum_of_its_objective():
    members, label = members_and_label(2, 300)
    stacked = np.stack(members)
    a, b = fit_stack(stacked, label)

    def objective(a, b):
        p = combine(members, rule="stacked", fitted={"coefficients": a, "biases": b})
        return -np.log(p[np.arange(len(label)), label]).sum() + 0.5 * (((a - 0.5) ** 2).sum() + (b**2).sum())

    at = objective(a, b)
    rng = np.random.default_rng(0)
    assert all(objective(a + 0.02 * rng.normal(size=2), b + 0.02 * rng.normal(size=3)) >= at - 1e-6 for _ in range(50))
    assert at < objective(np.full(2, 0.5), np.zeros(3))


def test_tuned_factors_help_macro_f1_and_agree_with_the_threshold():
    from sklearn.metrics import f1_score

    members, label = members_and_label(1, 500, num_classes=2, noise=(2.0,))
    fitted = fit(members, label, rule="tuned")
    before = f1_score(label, members[0].argmax(1), average="macro")
    answer = combine(members, rule="tuned", fitted=fitted).argmax(1)
    np.testing.assert_array_equal(answer, members[0][:, 1] > fitted["threshold"])
    thresholds = 1 / (1 + np.exp(np.linspace(-2, 2, 41)))
    best = max(f1_score(label, members[0][:, 1] > t, average="macro") for t in thresholds)
    assert f1_score(label, answer, average="macro") == pytest.approx(best) and best > before


def test_tuned_factors_of_perfect_answers_change_nothing():
    label = np.array([0, 1, 2, 0])
    np.testing.assert_array_equal(tune_factors(np.eye(3)[label] * 0.9 + 0.1 / 3, label), np.zeros(3))


@pytest.mark.parametrize("rule", ["weighted", "stacked", "tuned"])
def test_rule_that_was_not_fitted_is_refused(rule):
    with pytest.raises(ValueError, match=f"--combine {rule} needs what is fitted on validation predictions"):
        combine([np.eye(2)], rule=rule)


def test_wrong_members_rules_and_weights_are_refused():
    with pytest.raises(ValueError, match="'softt' is none of soft, hard"):
        combine([np.eye(2)], rule="softt")
    with pytest.raises(ValueError, match="other|different pictures or classes"):
        combine([np.eye(2), np.eye(3)], rule="soft")
    with pytest.raises(ValueError, match="weights must be 1 positive"):
        combine([np.eye(2)], rule="soft", weights=[-1.0])
