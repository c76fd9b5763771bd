"""Ensemble rules: the members' probabilities of the same pictures -> one. Members may differ in model, channels and image size; only classes must agree.

======== ============================================================ ==================================
rule     probabilities                                                fitted on the validation split
======== ============================================================ ==================================
soft     (weighted) mean of the members'                              nothing
hard     share of the members' votes; ties by the mean                nothing
weighted mean with fitted weights                                     one weight a member
stacked  softmax of sum a_m log p_m + b                               one coefficient a member, one bias a class
tuned    soft, times a factor a class                                 one factor a class, for macro-F1
======== ============================================================ ==================================
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

RULES = ("soft", "hard", "weighted", "stacked", "tuned")
FITTED_RULES = ("weighted", "stacked", "tuned")

_FLOOR = 1e-6  # of a probability, before a logarithm
_TIE = 1e-6  # what the mean counts beside a vote

# Pictures that the prior of the fits counts for: small validation splits must not decide alone.
_PRIOR_WEIGHTS = 10.0
_PRIOR_STACK = 1.0
_MAX_LOG_FACTOR, _NUM_FACTORS, _NUM_ROUNDS = 2.0, 41, 3


def combine(
    members: Sequence[Float[np.ndarray, "objects classes"]],
    *,
    rule: str,
    weights: Sequence[float] | None = None,
    fitted: Mapping[str, Any] | None = None,
) -> Float[np.ndarray, "objects classes"]:
    """The ensemble's probabilities, float64, rows summing to 1.

    Args:
        weights: One a member, for soft, hard and tuned; None = equal. The fitted weights of weighted are multiplied by them, stacked ignores them.
        fitted: What :func:`fit` gave.

    Raises:
        ValueError: unknown rule, members of other classes, weights that do not fit, or a rule that was not fitted.
    """
    if rule not in RULES:
        raise ValueError(f"--combine {rule!r} is none of {', '.join(RULES)}")
    stacked = np.stack([np.asarray(m, dtype=np.float64) for m in members]) if len({np.shape(m) for m in members}) == 1 else None
    if stacked is None:
        raise ValueError(f"members answer for different pictures or classes: {', '.join(str(np.shape(m)) for m in members)}")
    share = _shares(len(members), weights)
    if rule == "hard":
        votes = np.eye(stacked.shape[2])[stacked.argmax(axis=2)]
        return (_mean(votes, share) + _TIE * _mean(stacked, share)) / (1 + _TIE)
    if rule == "soft":
        return _mean(stacked, share)
    fitted = fitted or {}
    wanted = {"weighted": "weights", "stacked": "coefficients", "tuned": "log_factors"}[rule]
    if wanted not in fitted:
        raise ValueError(
            f"--combine {rule} needs what is fitted on validation predictions: use an ensemble that was registered with it, or --combine soft or hard"
        )
    if rule == "weighted":
        return _mean(stacked, _shares(len(members), np.asarray(fitted["weights"]) * share))
    if rule == "stacked":
        return _stack(stacked, np.asarray(fitted["coefficients"]), np.asarray(fitted["biases"]))
    return _scaled(_mean(stacked, share), np.asarray(fitted["log_factors"]))


def fit(members: Sequence[Float[np.ndarray, "objects classes"]], label: Int[np.ndarray, " objects"], *, rule: str) -> dict[str, Any]:
    """What a rule learns from the members' probabilities of labelled pictures that they were not trained on; {} for soft and hard."""
    stacked = np.stack([np.asarray(m, dtype=np.float64) for m in members])
    if rule == "weighted":
        return {"weights": fit_weights(stacked, label).tolist()}
    if rule == "stacked":
        coefficients, biases = fit_stack(stacked, label)
        return {"coefficients": coefficients.tolist(), "biases": biases.tolist()}
    if rule == "tuned":
        mean = _mean(stacked, _shares(len(members), None))
        log_factors = tune_factors(mean, label)
        found: dict[str, Any] = {"log_factors": log_factors.tolist()}
        if mean.shape[1] == 2:
            # The second class is answered when its probability is above this.
            found["threshold"] = float(1 / (1 + np.exp(log_factors[1] - log_factors[0])))
        return found
    return {}


def fit_weights(members: Float[np.ndarray, "members objects classes"], label: Int[np.ndarray, " objects"]) -> Float[np.ndarray, " members"]:
    """Weights of the mean that is most likely to give the labels, by expectation maximisation; they sum to 1. A Dirichlet prior of `_PRIOR_WEIGHTS` pictures
    holds them towards equal ones."""
    likelihood = np.maximum(members[:, np.arange(len(label)), label], _FLOOR)
    weights = np.full(len(members), 1 / len(members))
    for _ in range(200):
        joint = weights[:, None] * likelihood
        weights = (joint / joint.sum(axis=0)).sum(axis=1) + _PRIOR_WEIGHTS / len(members)
        weights /= weights.sum()
    return weights


def fit_stack(
    members: Float[np.ndarray, "members objects classes"], label: Int[np.ndarray, " objects"]
) -> tuple[Float[np.ndarray, " members"], Float[np.ndarray, " classes"]]:
    """Coefficients and biases of the log-linear pool: logistic regression on the members' log-probabilities with one coefficient a member (not one a
    member and pair of classes: validation splits are small), held towards the plain geometric mean by a unit Gaussian prior."""
    from scipy.optimize import minimize

    num_members, num_objects, num_classes = members.shape
    logs = np.log(np.maximum(members, _FLOOR))
    start = np.concatenate([np.full(num_members, 1 / num_members), np.zeros(num_classes)])
    target = np.eye(num_classes)[label]

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        a, b = parameters[:num_members], parameters[num_members:]
        logits = np.tensordot(a, logs, axes=1) + b
        logits -= logits.max(axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        residual = np.exp(log_p) - target
        away = parameters - start
        gradient = np.concatenate([np.einsum("mnc,nc->m", logs, residual), residual.sum(axis=0)]) + _PRIOR_STACK * away
        return float(-(log_p * target).sum() + 0.5 * _PRIOR_STACK * away @ away), gradient

    found = minimize(objective, start, jac=True, method="L-BFGS-B").x
    return found[:num_members], found[num_members:]


def tune_factors(probabilities: Float[np.ndarray, "objects classes"], label: Int[np.ndarray, " objects"]) -> Float[np.ndarray, " classes"]:
    """Logarithm of a factor for each class's probability such that the answers' macro-F1 is best: a decision threshold, for any number of classes.

    One class after the other over a grid of ± `_MAX_LOG_FACTOR`; among equals the one that changes least.
    """
    grid = np.linspace(-_MAX_LOG_FACTOR, _MAX_LOG_FACTOR, _NUM_FACTORS)
    grid = grid[np.argsort(np.abs(grid), kind="stable")]
    logs = np.log(np.maximum(probabilities, _FLOOR))
    factors = np.zeros(probabilities.shape[1])
    best = _macro_f1(logs, label)
    # Of two classes only the difference counts.
    classes = range(1, 2) if len(factors) == 2 else range(len(factors))
    for _ in range(_NUM_ROUNDS):
        before = best
        for c in classes:
            for value in grid:
                trial = factors.copy()
                trial[c] = value
                score = _macro_f1(logs + trial, label)
                if score > best + 1e-12:
                    best, factors = score, trial
        if best == before:
            break
    return factors


def _macro_f1(scores: np.ndarray, label: np.ndarray) -> float:
    """As scikit-learn's, ten times faster: the grid asks thousands of times."""
    answer, num_classes = scores.argmax(axis=1), scores.shape[1]
    right = np.bincount(label[answer == label], minlength=num_classes)
    total = np.bincount(label, minlength=num_classes) + np.bincount(answer, minlength=num_classes)
    return float(np.mean(2 * right[total > 0] / total[total > 0]))


def _shares(count: int, weights: Any) -> np.ndarray:
    given = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)
    if given.shape != (count,) or not np.all(np.isfinite(given)) or np.any(given <= 0):
        raise ValueError(f"weights must be {count} positive numbers, one a member, got {None if weights is None else list(weights)}")
    return given / given.sum()


def _mean(members: np.ndarray, share: np.ndarray) -> np.ndarray:
    return np.tensordot(share, members, axes=1)


def _stack(members: np.ndarray, coefficients: np.ndarray, biases: np.ndarray) -> np.ndarray:
    return _softmax(np.tensordot(coefficients, np.log(np.maximum(members, _FLOOR)), axes=1) + biases)


def _scaled(probabilities: np.ndarray, log_factors: np.ndarray) -> np.ndarray:
    return _softmax(np.log(np.maximum(probabilities, _FLOOR)) + log_factors)


def _softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)
