"""The state of a search and its two rules: which recipe comes next, and which trial is not worth going on with.

Both rules are pure functions of the trials so far (and of a seed), and the trials so far are one file, ``<search>/trials.jsonl``. A search whose
driver was killed therefore goes on as if nothing had happened: with one trial at a time it ends with the very same trials. No Ray here.
"""

import json
import math
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cad_models.config import Recipe, differences, digest, from_dict, json_digest, paths, replace_all, to_dict
from cad_models.dataset import Folder
from cad_models.task import Score, Task

if TYPE_CHECKING:
    import optuna

# Asynchronous successive halving: at each rung the best third goes on, and rungs are a factor of three apart.
_REDUCTION = 3
_MEDIAN_MIN_TRIALS = 3
# Draws of a recipe that was not tried yet, first by TPE, then at random, before the space counts as exhausted.
_ATTEMPTS = 50


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How recipes are searched."""

    num_samples: int = 64
    """Trials in all, the base recipe included. May be raised later: the same search then goes on."""
    max_concurrent: int = 1
    """Trials at once. With 1 the search is deterministic: each suggestion knows all results before it."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    """How unpromising trials are stopped early: asynchronous successive halving (Li et al. 2020), the median rule (Golovin et al. 2017), not at all. The base
    recipe is trained to its end under any rule."""
    num_startup_trials: int = 10
    """Random trials before TPE models the results."""
    grace_epochs: int = 0
    """No trial is stopped before this epoch; 0 = an eighth of the epochs."""
    seed: int = 0
    """Seeds the sampler."""

    def grace(self, num_epochs: int) -> int:
        """Epochs before which no trial is stopped."""
        return self.grace_epochs or max(1, math.ceil(num_epochs / 8))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One recipe of a search and what came of it."""

    number: int
    """From 0; 0 is the base recipe."""
    digest: str
    """The recipe's digest: names the trial's folder."""
    values: dict[str, Any]
    """Dotted recipe path -> value, where the trial differs from the base recipe."""
    params: dict[str, Any]
    """Optuna's parameters; empty for a base recipe that lies outside of the space."""
    distributions: dict[str, str] = field(default_factory=dict)
    """Optuna's distribution of each parameter, as JSON."""
    state: Literal["running", "complete", "pruned", "failed"] = "running"
    score: float | None = None
    """The best over its epochs."""
    scores: dict[int, float] = field(default_factory=dict)
    """Epoch -> score of every evaluation that counted."""
    num_epochs: int = 0
    reason: str = ""
    """Why it failed."""
    seconds: float = 0.0
    """Wall-clock time, over all starts that ended in an orderly way."""
    run_id: str = ""
    """Its MLflow run, once that was ended."""

    @property
    def finished(self) -> bool:
        """Whether nothing is left to be done for it."""
        return self.state != "running"


class SearchError(ValueError):
    """A search cannot go on as asked; the message names both sides."""


class Journal:
    """The trials of a search, kept in its folder; every change is on disk before the call returns. Threads may share it."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._lock = threading.RLock()
        self._trials: list[Trial] = []
        if folder.exists("trials.jsonl"):
            lines = folder.read_bytes("trials.jsonl").decode().splitlines()
            self._trials = [_trial_from(json.loads(line)) for line in lines]

    @property
    def trials(self) -> list[Trial]:
        """By number."""
        return list(self._trials)

    def put(self, trial: Trial) -> None:
        """Add the next trial or replace one."""
        with self._lock:
            if trial.number == len(self._trials):
                self._trials.append(trial)
            else:
                self._trials[trial.number] = trial
            lines = [json.dumps(asdict(t), sort_keys=True) + "\n" for t in self._trials]
            self._folder.write_bytes("trials.jsonl", "".join(lines).encode())

    def note_run(self, number: int, run_id: str) -> None:
        """Remember a trial's MLflow run as ended."""
        with self._lock:
            self.put(replace(self._trials[number], run_id=run_id))


def _trial_from(values: dict[str, Any]) -> Trial:
    # JSON's keys are strings.
    return Trial(**{**values, "scores": {int(epoch): score for epoch, score in values["scores"].items()}})


# --- what makes it the same search ----------------------------------------------------------------------------------------------------------
def search_identity(task: Task, recipe: Recipe, dataset_digest: str, config: SearchConfig) -> dict[str, Any]:
    """What fixes the sequence of a search's trials, as JSON. The number of trials and how many run at once are no part of it."""
    return {
        "task": task.name,
        "recipe": to_dict(recipe),
        "dataset_digest": dataset_digest,
        "score": {"name": task.score.name, "mode": task.score.mode},
        "search": {
            "scheduler": config.scheduler,
            "num_startup_trials": config.num_startup_trials,
            "grace_epochs": config.grace(recipe.schedule.num_epochs),
            "seed": config.seed,
        },
    }


def default_name(identity: Mapping[str, Any]) -> str:
    """A search's name from what makes it the same search."""
    return f"{identity['task']}-{json_digest(dict(identity), length=8)}"


def claim(folder: Folder, identity: dict[str, Any], recipe_type: type[Recipe]) -> None:
    """Begin a search in ``folder``, or go on with the one that is there.

    Raises:
        SearchError: another search is there; names both sides of each difference.
    """
    if not folder.exists("search.json"):
        folder.write_json("search.json", identity)
        return
    before = folder.read_json("search.json")
    if before["task"] == identity["task"]:
        # An earlier version may have written it, without fields that were added since.
        before["recipe"] = to_dict(from_dict(recipe_type, before["recipe"]))
    if before == identity:
        return
    changes = []
    if before["task"] != identity["task"]:
        changes = [f"task: {before['task']} -> {identity['task']}"]
    elif before["recipe"] != identity["recipe"]:
        changes = differences(from_dict(recipe_type, before["recipe"]), from_dict(recipe_type, identity["recipe"]))
    for name in ("dataset_digest", "score", "search"):
        if before[name] != identity[name]:
            changes.append(f"{name}: {before[name]} -> {identity[name]}")
    raise SearchError(
        f"{folder.uri} holds another search ({'; '.join(changes)}): choose another --name, or leave --name out to get one from recipe and dataset"
    )


# --- which recipe comes next ----------------------------------------------------------------------------------------------------------------
def next_trial(task: Task, base: Recipe, config: SearchConfig, trials: Sequence[Trial]) -> Trial | None:
    """The trial after ``trials``: the base recipe first, then `Task.points_to_evaluate`, then what Optuna's multivariate TPE suggests. A pure function
    of its arguments.

    Running trials count as results that are no better than the worst so far (constant liar), so that concurrent ones do not crowd.

    Returns:
        None when the space seems to hold no recipe that was not tried.
    """
    number = len(trials)
    if number == 0:
        params = base_params(task, base)
        if params is None:
            return Trial(number=0, digest=digest(base), values={}, params={})
        return _drawn(task, base, config, trials, 0, fixed=params)
    tried = {trial.digest for trial in trials}
    for recipe in known_points(task, base):
        params = None if digest(recipe) in tried else base_params(task, recipe)
        trial = None if params is None else _drawn(task, base, config, trials, 0, fixed=params)
        # A space without some path of the point gives another recipe.
        if trial is not None and trial.digest == digest(recipe):
            return trial
    for attempt in range(2 * _ATTEMPTS):
        trial = _drawn(task, base, config, trials, attempt)
        if trial.digest not in tried:
            return trial
    return None


def _drawn(
    task: Task, base: Recipe, config: SearchConfig, trials: Sequence[Trial], attempt: int, fixed: dict[str, Any] | None = None
) -> Trial:
    import optuna

    number = len(trials)
    # A generator of its own for every draw: the n-th suggestion depends on the results before it, not on how often the driver was started.
    seed = int(np.random.SeedSequence((config.seed, number, attempt)).generate_state(1)[0])
    sampler = _sampler(config, seed) if attempt < _ATTEMPTS else optuna.samplers.RandomSampler(seed=seed)
    study = as_study(trials, task.score, sampler=sampler)
    if fixed is not None:
        study.enqueue_trial(fixed)
    asked = study.ask()
    left_alone = switched_off(task, base)
    recipe = replace_all(base, {path: value for path, value in task.search_space(asked).items() if path not in left_alone})
    before = paths(base)
    after = paths(recipe)
    return Trial(
        number=number,
        digest=digest(recipe),
        values={path: after[path] for path in after if after[path] != before[path]},
        # What was left alone is no parameter of this search: neither the sampler nor a report should see values that nothing had.
        params={name: value for name, value in asked.params.items() if name not in left_alone},
        distributions={name: optuna.distributions.distribution_to_json(d) for name, d in asked.distributions.items() if name not in left_alone},
    )


def _sampler(config: SearchConfig, seed: int) -> "optuna.samplers.BaseSampler":
    import warnings

    import optuna

    with warnings.catch_warnings():
        # group: parameters that exist for some choices only are modelled together with those they occur with.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=config.num_startup_trials,
            multivariate=True,
            group=True,
            constant_liar=True,
        )


def as_study(trials: Sequence[Trial], score: Score, *, sampler: Any = None) -> "optuna.Study":
    """The trials as an Optuna study in memory, for samplers and plots."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    states = optuna.trial.TrialState
    names = {"running": states.RUNNING, "complete": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}
    study = optuna.create_study(direction="maximize" if score.mode == "max" else "minimize", sampler=sampler)
    for trial in trials:
        study.add_trial(
            optuna.trial.create_trial(
                state=names[trial.state],
                params=trial.params,
                distributions={n: optuna.distributions.json_to_distribution(d) for n, d in trial.distributions.items()},
                value=trial.score if trial.state in ("complete", "pruned") else None,
                # Of running ones nothing is known: their scores so far depend on how far they happen to be.
                intermediate_values=trial.scores if trial.finished else {},
            )
        )
    return study


class _OutsideSpace(Exception):
    """The base recipe's value is none that the space can give."""


def switched_off(task: Task, base: Recipe) -> set[str]:
    """The searched paths that a search of this base recipe leaves as they are (`Task.searched_where_on`)."""
    values = paths(base)
    return {path for path in task.searched_where_on if not values[path]}


def known_points(task: Task, base: Recipe) -> list[Recipe]:
    """`Task.points_to_evaluate` on top of a base recipe, without what a search of it leaves alone."""
    left_alone = switched_off(task, base)
    return [replace_all(base, {path: value for path, value in point.items() if path not in left_alone}) for point in task.points_to_evaluate]


class _Recorder:
    """Stands in for an ``optuna.Trial`` and answers with the base recipe's values. Parameters that are no path of the recipe (as a share of
    something) are answered from a script of choices; what those in ``free`` are answered does not matter and is not kept."""

    def __init__(self, values: Mapping[str, Any], script: Sequence[int], free: Collection[str]) -> None:
        self._values, self._script, self._free = values, script, free
        self.params: dict[str, Any] = {}
        self.num_options: list[int] = []

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        if name in self._free:
            return choices[0]
        if name in self._values:
            return self._keep(name, self._values[name], self._values[name] in choices)
        position = len(self.num_options)
        self.num_options.append(len(choices))
        return self._keep(name, choices[self._script[position] if position < len(self._script) else 0], True)

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False) -> float:
        if name in self._free:
            return low
        value = self._value(name)
        return self._keep(name, float(value), low <= value <= high)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        if name in self._free:
            return low
        value = self._value(name)
        return self._keep(name, int(value), low <= value <= high and (int(value) - low) % step == 0)

    def _value(self, name: str) -> Any:
        if name not in self._values:
            raise _OutsideSpace
        return self._values[name]

    def _keep(self, name: str, value: Any, inside: bool) -> Any:
        if not inside:
            raise _OutsideSpace
        self.params[name] = value
        return value


def base_params(task: Task, base: Recipe) -> dict[str, Any] | None:
    """The parameters with which a task's search space gives the base recipe itself; None when it cannot."""
    values, free = paths(base), switched_off(task, base)
    script: list[int] | None = []
    while script is not None:
        recorder = _Recorder(values, script, free)
        try:
            suggested = task.search_space(recorder)
        except _OutsideSpace:
            suggested = None
        if suggested is not None and all(values.get(path) == value for path, value in suggested.items() if path not in free):
            return recorder.params
        script = _next_script(script, recorder.num_options)
    return None


def _next_script(script: Sequence[int], num_options: Sequence[int]) -> list[int] | None:
    """The next combination of choices, the last choice first; None after the last one."""
    digits = [*script, *[0] * (len(num_options) - len(script))][: len(num_options)]
    while digits:
        digits[-1] += 1
        if digits[-1] < num_options[len(digits) - 1]:
            return digits
        digits.pop()
    return None


# --- which trial stops early ----------------------------------------------------------------------------------------------------------------
def should_stop(
    rule: str, score: Score, scores: Mapping[int, float], others: Sequence[Mapping[int, float]], *, grace: int, num_epochs: int
) -> bool:
    """Whether a trial is to be stopped after its latest evaluation.

    Args:
        rule: ``asha``, ``median`` or ``none``.
        scores: The trial's own evaluations so far, epoch -> score.
        others: The other trials' evaluations so far; failed ones are left out by the caller.
        grace: No trial stops before this epoch.
        num_epochs: Epochs of a whole training; who has come so far is not stopped.
    """
    epoch = max(scores)
    if rule == "none" or epoch < grace or epoch >= num_epochs:
        return False
    sign = 1.0 if score.mode == "max" else -1.0
    own = {e: sign * s for e, s in scores.items()}
    theirs = [{e: sign * s for e, s in other.items()} for other in others]
    return _asha_stops(own, theirs, grace) if rule == "asha" else _median_stops(own, theirs, grace)


def _asha_stops(own: Mapping[int, float], others: Sequence[Mapping[int, float]], grace: int) -> bool:
    """Asynchronous successive halving: the first evaluation at or after a rung must be among the best third of all that came so far."""
    epoch = max(own)
    rung = grace * _REDUCTION ** math.floor(math.log(epoch / grace, _REDUCTION) + 1e-9)
    if _first_at(own, rung) != epoch:
        return False
    # With evaluations several epochs apart a rung may be jumped over: the highest one reached counts.
    reached = [other[at] for other in others if (at := _first_at(other, rung)) is not None]
    if not reached:
        return False
    value = own[epoch]
    return not math.isfinite(value) or value < float(np.percentile(reached, 100 * (1 - 1 / _REDUCTION)))


def _first_at(scores: Mapping[int, float], rung: int) -> int | None:
    return min((epoch for epoch in scores if epoch >= rung), default=None)


def _median_stops(own: Mapping[int, float], others: Sequence[Mapping[int, float]], grace: int) -> bool:
    """Median rule: the best so far must not be worse than the median of the others' means up to the same epoch."""
    epoch = max(own)
    means = []
    for other in others:
        until = [score for at, score in other.items() if grace <= at <= epoch]
        if until and max(other) >= epoch:
            means.append(float(np.mean(until)))
    if len(means) < _MEDIAN_MIN_TRIALS:
        return False
    best = max((score for score in own.values() if math.isfinite(score)), default=-math.inf)
    return best < float(np.median(means))


# --- a trial's end --------------------------------------------------------------------------------------------------------------------------
def ended(
    trial: Trial, state: str, score: Score, *, scores: Mapping[int, float], seconds: float, best: float | None = None, reason: str = ""
) -> Trial:
    """The trial with what came of it.

    Args:
        best: Its score, where the training says it (complete trials); None = the best of ``scores``.
    """
    finite = {epoch: value for epoch, value in sorted(scores.items()) if math.isfinite(value)}
    if best is None and finite:
        best = max(finite.values()) if score.mode == "max" else min(finite.values())
    if state in ("complete", "pruned") and best is None:
        state, reason = "failed", f"no finite {score.name} in {len(scores)} evaluations"
    return replace(
        trial,
        state=state,
        score=None if state == "failed" else best,
        scores=finite,
        num_epochs=max(scores, default=0),
        reason=reason,
        seconds=trial.seconds + seconds,
    )


def best_trials(trials: Sequence[Trial], score: Score, count: int) -> list[Trial]:
    """The best complete trials, best first; of equal ones the earlier."""
    complete = [trial for trial in trials if trial.state == "complete"]
    sign = -1.0 if score.mode == "max" else 1.0
    return sorted(complete, key=lambda trial: (sign * trial.score, trial.number))[:count]
