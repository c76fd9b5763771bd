"""A search's rules against slow and obvious ones, its survival of kills, and its end: ensemble, champion, table, page."""

import csv
import inspect
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cad_models.alignment.recipe import RECIPE, SMOKE
from cad_models.alignment.task import AlignmentTask
from cad_models.config import Recipe, digest, replace_all, to_dict
from cad_models.dataset import Folder
from cad_models.task import Score
from rayjobs import champion, search_report
from rayjobs.champion import CannotBeMeasured, choose_members, crown
from rayjobs.live_runs import LiveSearch
from rayjobs.search import (
    Journal,
    SearchConfig,
    SearchError,
    Trial,
    base_params,
    best_trials,
    claim,
    ended,
    next_trial,
    search_identity,
    should_stop,
    switched_off,
)
from tests.synthetic import make_dataset

REPOSITORY = Path(__file__).resolve().parents[2]
MAX, MIN = Score(name="val/recall@3", mode="max"), Score(name="val/loss", mode="min")
BASE = replace(RECIPE, schedule=replace(RECIPE.schedule, num_epochs=9))
CONFIG = SearchConfig(num_samples=9, num_startup_trials=3, grace_epochs=1, seed=5)


class TinySpace(AlignmentTask):
    """The task with a space of three recipes."""

    search_space = staticmethod(lambda trial: {"model.num_experts": trial.suggest_categorical("model.num_experts", [1, 2, 4])})


@dataclass(frozen=True, kw_only=True)
class PairedRecipe(Recipe):
    """A recipe whose values must fit each other."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")


def curve(recipe_json, epochs):
    """Scores of a made-up training: a function of the recipe alone."""
    lr, head_lr = recipe_json["optim"]["lr"], recipe_json["optim"]["head_lr"]
    top = 0.9 - 0.1 * abs(math.log10(lr / 6e-4)) - 0.2 * abs(math.log10(head_lr / 15e-4)) - 0.02 * abs(recipe_json["model"]["num_experts"] - 8)
    return {epoch: top * (1 - math.exp(-epoch * (0.3 + recipe_json["loss"]["temperature"]))) for epoch in epochs}


def drive(folder, config, *, die_after=None):
    """Run a search one trial at a time, as Ray Tune would; with ``die_after`` stop dead after so many reports."""
    live = LiveSearch(
        folder=Folder(str(folder)), task=AlignmentTask(), base=BASE, config=config, on_start=lambda t: None, on_end=lambda t: None
    )
    reports = itertools.count(1)
    for i in itertools.count():
        asked = live.suggest(f"tune-{i}")
        if asked is None:
            return live
        scores = curve(asked["recipe"], range(1, BASE.schedule.num_epochs + 1))
        for epoch, score in scores.items():
            stop = live.observe(f"tune-{i}", {"epoch": epoch, "score": score})
            if die_after is not None and next(reports) > die_after:
                return None
            if stop:
                break
        else:
            live.observe(f"tune-{i}", {"outcome": "complete", "best": max(scores.values())})
        live.end(f"tune-{i}")


def outcome(folder):
    """Everything about the trials but the time they took."""
    return [replace(trial, seconds=0.0) for trial in Journal(Folder(str(folder))).trials]


# --- the sequence ---------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_search_killed_again_and_again_ends_with_the_same_trials(tmp_path, scheduler):
    config = replace(CONFIG, scheduler=scheduler)
    drive(tmp_path / "whole", config)
    for reports in (1, 9, 4, 17, 12):
        drive(tmp_path / "killed", config, die_after=reports)
    drive(tmp_path / "killed", config)
    whole = outcome(tmp_path / "whole")
    assert outcome(tmp_path / "killed") == whole
    assert len(whole) == 9 and len({trial.digest for trial in whole}) == 9
    assert {trial.state for trial in whole} == {"complete", "pruned"}


def test_search_with_more_samples_extends_the_trials_it_has(tmp_path):
    drive(tmp_path / "grown", replace(CONFIG, num_samples=4))
    before = outcome(tmp_path / "grown")
    drive(tmp_path / "grown", CONFIG)
    drive(tmp_path / "whole", CONFIG)
    assert outcome(tmp_path / "grown")[:4] == before
    assert outcome(tmp_path / "grown") == outcome(tmp_path / "whole")


def test_search_with_two_trials_at_once_and_killed_loses_none_and_repeats_none(tmp_path):
    def live():
        return LiveSearch(
            folder=Folder(str(tmp_path)), task=AlignmentTask(), base=BASE, config=CONFIG, on_start=lambda t: None, on_end=lambda t: None
        )

    first = live()
    begun = [first.suggest("a"), first.suggest("b")]
    first.observe("a", {"outcome": "complete", "best": 0.5})
    first.end("a")
    second = live()
    again = [second.suggest("c"), second.suggest("d")]
    assert again[0] == begun[1]
    assert again[1]["digest"] not in {trial["digest"] for trial in begun}
    assert [trial.state for trial in second.journal.trials] == ["complete", "running", "running"]


def sequence(count):
    """The digests of a search's first trials, all complete."""
    trials = []
    for _ in range(count):
        trial = next_trial(AlignmentTask(), BASE, CONFIG, trials)
        score = curve(to_dict(replace_all(BASE, trial.values)), [5])
        trials.append(ended(trial, "complete", MAX, scores=score, seconds=0.0))
    return [trial.digest for trial in trials]


def test_next_trial_in_another_process_is_the_same():
    sources = "\n".join(inspect.getsource(function) for function in (curve, sequence))
    script = f"""
import math
from dataclasses import replace
from cad_models.alignment.recipe import RECIPE
from cad_models.alignment.task import AlignmentTask
from cad_models.config import replace_all, to_dict
from cad_models.task import Score
from rayjobs.search import SearchConfig, ended, next_trial
MAX = {MAX!r}
BASE = replace(RECIPE, schedule=replace(RECIPE.schedule, num_epochs=9))
CONFIG = {CONFIG!r}
{sources}
print(" ".join(sequence(7)))
"""
    here = " ".join(sequence(7))
    for seed in ("1", "2"):  # of Python's hashes, on which the order of sets depends
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == here, done.stderr


def test_next_trial_seeds_differ_in_their_suggestions():
    done = []
    for _ in range(1 + len(AlignmentTask.points_to_evaluate)):
        done.append(ended(next_trial(AlignmentTask(), BASE, CONFIG, done), "complete", MAX, scores={1: 0.5}, seconds=0.0))
    one, other = (next_trial(AlignmentTask(), BASE, replace(CONFIG, seed=seed), done) for seed in (0, 1))
    assert one.digest != other.digest


def test_next_trial_first_is_the_base_recipe():
    trial = next_trial(AlignmentTask(), BASE, CONFIG, [])
    assert trial.digest == digest(BASE) and trial.values == {}
    assert trial.params == {
        "model.num_experts": 4,
        "loss.image_weight": 0.3,
        "loss.temperature": 0.07,
        "optim.lr": 5e-4,
        "optim.head_lr": 2e-3,
        "optim.weight_decay": 0.05,
        "optim.ema_decay": 0.99,
        "data.augment.max_scale": 1.25,
        "data.augmented_share": 0.5,
        "data.views_per_step": 8,
        "top_k_share": "all",
    }


def test_next_trial_base_outside_the_space_is_still_the_first():
    assert base_params(AlignmentTask(), SMOKE) is None  # experts without the residual path are no choice
    trial = next_trial(AlignmentTask(), SMOKE, CONFIG, [])
    assert trial.digest == digest(SMOKE) and trial.params == {}
    second = next_trial(AlignmentTask(), SMOKE, CONFIG, [ended(trial, "complete", MAX, scores={1: 0.1}, seconds=0.0)])
    assert second.values["optim.ema_decay"] in (0.9, 0.95, 0.99)
    assert "data.augmented_share" not in second.values  # SMOKE's data has no changed views


def test_switched_off_leaves_the_base_recipe_alone_and_inside_the_space():
    without = replace(RECIPE, data=replace(RECIPE.data, augmented_views=0, augmented_share=0.0))
    assert switched_off(AlignmentTask(), without) == {"data.augmented_share"} and switched_off(AlignmentTask(), RECIPE) == set()
    trials = []
    for _ in range(8):
        trials.append(ended(next_trial(AlignmentTask(), without, CONFIG, trials), "complete", MAX, scores={1: 0.1}, seconds=0.0))
    assert trials[0].digest == digest(without) and trials[0].params["optim.lr"] == 5e-4
    assert all(replace_all(without, trial.values).data.augmented_share == 0 for trial in trials)
    assert all("data.augmented_share" not in trial.params and trial.distributions.keys() == trial.params.keys() for trial in trials)


def test_next_trial_after_the_base_recipe_tries_what_was_good_elsewhere():
    def values(base, count):
        trials = []
        for _ in range(count):
            trials.append(ended(next_trial(AlignmentTask(), base, CONFIG, trials), "complete", MAX, scores={1: 0.1}, seconds=0.0))
            assert trials[-1].digest == digest(replace_all(base, trials[-1].values))
        return [trial.values for trial in trials]

    points = [{"data.views_per_step": 0, "optim.weight_decay": 5.0}, {"data.views_per_step": 0, "optim.weight_decay": 5.0, "data.augmented_share": 0.25}]
    base, *found, drawn = values(RECIPE, 4)
    assert base == {} and found == points
    assert drawn not in points and drawn["data.augmented_share"] > 0
    # What the base recipe has already is no trial of its own, and what it has switched off stays off.
    assert values(replace_all(RECIPE, points[0]), 2) == [{}, {"data.augmented_share": 0.25}]
    without = replace(RECIPE, data=replace(RECIPE.data, augmented_views=0, augmented_share=0.0))
    _, first, second = values(without, 3)
    assert first == points[0] and second not in points
    # Points that the space cannot give are left out.
    assert values(SMOKE, 2)[1] not in points


def test_live_search_trains_the_base_recipe_to_its_end_whatever_the_rule_says(tmp_path):
    live = LiveSearch(
        folder=Folder(str(tmp_path)), task=AlignmentTask(), base=BASE, config=replace(CONFIG, max_concurrent=4), on_start=lambda t: None, on_end=lambda t: None
    )
    names = ["a", "b", "c", "d"]
    for name in names:
        live.suggest(name)
    for name, score in (("b", 0.9), ("c", 0.8)):
        live.observe(name, {"epoch": 1, "score": score})
    assert not live.observe("a", {"epoch": 1, "score": 0.01})
    assert live.observe("d", {"epoch": 1, "score": 0.02})


@pytest.mark.parametrize(("top_k", "share"), [(0, "all"), (2, "half"), (1, "one"), (3, None)])
def test_base_params_solves_for_parameters_that_are_no_path(top_k, share):
    params = base_params(AlignmentTask(), replace(RECIPE, model=replace(RECIPE.model, top_k=top_k)))
    assert (None if params is None else params["top_k_share"]) == share


def test_next_trial_small_space_is_exhausted_without_repeats():
    trials = []
    while (trial := next_trial(TinySpace(), BASE, CONFIG, trials)) is not None:
        trials.append(ended(trial, "complete", MAX, scores={1: 0.5}, seconds=0.0))
    assert sorted(replace_all(BASE, trial.values).model.num_experts for trial in trials) == [1, 2, 4]


def test_replace_all_needs_values_to_fit_only_together():
    base = replace(PairedRecipe(), low=3.0, high=4.0)
    assert replace_all(base, {"low": 6.0, "high": 7.0}) == PairedRecipe(low=6.0, high=7.0)
    with pytest.raises(ValueError, match="low"):
        replace_all(base, {"low": 6.0})
    with pytest.raises(ValueError, match="lower"):
        replace_all(base, {"lower": 6.0})


def test_next_trial_one_expert_never_keeps_the_top_k_of_the_base_recipe():
    base = replace(RECIPE, model=replace(RECIPE.model, top_k=2))
    trials, singles = [], 0
    for number in range(12):
        trial = next_trial(AlignmentTask(), base, replace(CONFIG, num_startup_trials=99), trials)
        model = replace_all(base, trial.values).model
        singles += model.num_experts == 1
        assert model.top_k == 0 or model.top_k < model.num_experts
        trials.append(ended(trial, "complete", MAX, scores={1: number / 12}, seconds=0.0))
    assert singles > 0


def test_claim_another_base_recipe_names_both_sides(tmp_path):
    folder = Folder(str(tmp_path))
    claim(folder, search_identity(AlignmentTask(), BASE, "abc", CONFIG), type(BASE))
    claim(folder, search_identity(AlignmentTask(), BASE, "abc", replace(CONFIG, num_samples=99, max_concurrent=3)), type(BASE))
    written = folder.read_json("search.json")
    del written["recipe"]["schedule"]["patience_evals"]  # as an earlier version left it
    folder.write_json("search.json", written)
    claim(folder, search_identity(AlignmentTask(), BASE, "abc", CONFIG), type(BASE))
    other = replace(BASE, optim=replace(BASE.optim, lr=0.125))
    with pytest.raises(SearchError, match=r"optim.lr: 0.0005 -> 0.125.*dataset_digest: abc -> def"):
        claim(folder, search_identity(AlignmentTask(), other, "def", CONFIG), type(BASE))


# --- stopping early -------------------------------------------------------------------------------------------------------------------------
def curves(seed, mode, count=14, epochs=27):
    """Random curves that get better."""
    rng = np.random.default_rng(seed)
    sign = 1.0 if mode == "max" else -1.0
    return [{e: sign * float(s) for e, s in enumerate(np.sort(rng.uniform(size=epochs)) * rng.uniform(0.5, 1), 1)} for _ in range(count)]


def stopped_epochs(rule, score, grace, made):
    """The epoch in which each trial ends, one after the other."""
    seen, ends = [], []
    for whole in made:
        scores = {}
        for epoch, value in whole.items():
            scores[epoch] = value
            if should_stop(rule, score, scores, seen, grace=grace, num_epochs=max(whole)):
                break
        seen.append(scores)
        ends.append(epoch)
    return ends


def ray_epochs(scheduler, made):
    """The same with one of Ray Tune's schedulers."""
    controller = SimpleNamespace(get_live_trials=list)
    ends = []
    for i, whole in enumerate(made):
        trial = type("Trial", (), {"trial_id": str(i)})()
        scheduler.on_trial_add(controller, trial)
        for epoch, value in whole.items():
            verdict = scheduler.on_trial_result(controller, trial, {"epoch": epoch, "score": value})
            if verdict == "STOP" and epoch < max(whole):
                break
        ends.append(epoch)
    return ends


@pytest.mark.parametrize("mode", ["max", "min"])
def test_should_stop_asha_agrees_with_ray_tune(mode):
    from ray.tune.schedulers import AsyncHyperBandScheduler

    for seed in range(5):
        made = curves(seed, mode)
        reference = AsyncHyperBandScheduler("epoch", "score", mode, max_t=27, grace_period=2, reduction_factor=3)
        ends = stopped_epochs("asha", replace(MAX, mode=mode), 2, made)
        assert ends == ray_epochs(reference, made)
        assert min(ends) == 2 and max(ends) == 27


@pytest.mark.parametrize("mode", ["max", "min"])
def test_should_stop_median_agrees_with_ray_tune(mode):
    from ray.tune.schedulers import MedianStoppingRule

    for seed in range(5):
        made = curves(seed, mode)
        reference = MedianStoppingRule("epoch", "score", mode, grace_period=3, min_samples_required=3)
        ends = stopped_epochs("median", replace(MAX, mode=mode), 3, made)
        assert ends == ray_epochs(reference, made)
        assert len(set(ends)) > 1


def test_should_stop_before_grace_at_the_end_or_without_rule_never():
    bad, good = {1: 0.1, 2: 0.1, 3: 0.1}, [{1: 0.9, 2: 0.9, 3: 0.9}] * 5
    for rule in ("asha", "median"):
        assert should_stop(rule, MAX, bad, good, grace=3, num_epochs=9)
        assert not should_stop(rule, MAX, bad, good, grace=4, num_epochs=9)
        assert not should_stop(rule, MAX, bad, good, grace=3, num_epochs=3)
        assert not should_stop(rule, MIN, bad, good, grace=3, num_epochs=9)
    assert not should_stop("none", MAX, bad, good, grace=1, num_epochs=9)


def test_should_stop_asha_with_sparse_evaluations_uses_the_first_at_or_after_a_rung():
    others = [{5: 0.5, 10: 0.9}, {5: 0.6, 10: 0.8}]
    assert should_stop("asha", MAX, {5: 0.4}, others, grace=4, num_epochs=40)
    assert not should_stop("asha", MAX, {5: 0.7, 10: 0.1}, others, grace=4, num_epochs=40)  # no rung between 5 and 10


# --- what becomes of trials -----------------------------------------------------------------------------------------------------------------
def begun(number, **changes):
    return Trial(number=number, digest=f"d{number}", values={}, params={}, **changes)


def test_ended_without_a_finite_score_is_failed():
    trial = ended(begun(0), "complete", MAX, scores={1: math.nan}, seconds=2.0)
    assert trial.state == "failed" and trial.score is None and trial.scores == {} and "val/recall@3" in trial.reason


def test_ended_score_is_the_best_in_the_score_direction():
    scores = {1: 0.3, 2: 0.5, 3: 0.4}
    assert ended(begun(0), "pruned", MAX, scores=scores, seconds=0.0).score == 0.5
    assert ended(begun(0), "pruned", MIN, scores=scores, seconds=0.0).score == 0.3


def test_best_trials_takes_complete_ones_only_and_the_earlier_of_equal_ones():
    trials = [
        begun(0, state="complete", score=0.5),
        begun(1, state="pruned", score=0.9),
        begun(2, state="complete", score=0.7),
        begun(3, state="failed"),
        begun(4, state="complete", score=0.7),
    ]
    assert [t.number for t in best_trials(trials, MAX, 2)] == [2, 4]
    assert [t.number for t in best_trials(trials, MIN, 9)] == [0, 2, 4]


def test_live_search_failed_trial_is_recorded_and_the_search_goes_on(tmp_path):
    ends = []
    live = LiveSearch(
        folder=Folder(str(tmp_path)), task=AlignmentTask(), base=BASE, config=CONFIG, on_start=lambda t: None, on_end=ends.append
    )
    live.suggest("a")
    live.observe("a", {"epoch": 1, "score": 0.99})
    live.observe("a", {"outcome": "failed", "reason": "gradients are nan"})
    live.end("a")
    assert ends[0].state == "failed" and ends[0].reason == "gradients are nan" and ends[0].score is None
    assert live.suggest("b") is not None
    # A failed trial's scores are no bar for others.
    assert not live.observe("b", {"epoch": 1, "score": 0.01})
    assert Journal(Folder(str(tmp_path))).trials[0] == ends[0]


def test_live_search_lost_process_is_a_failed_trial(tmp_path):
    live = LiveSearch(
        folder=Folder(str(tmp_path)), task=AlignmentTask(), base=BASE, config=CONFIG, on_start=lambda t: None, on_end=lambda t: None
    )
    live.suggest("a")
    live.end("a")
    assert live.journal.trials[0].state == "failed" and "lost" in live.journal.trials[0].reason


def test_live_search_asked_to_stop_leaves_running_trials_to_go_on(tmp_path):
    live = LiveSearch(
        folder=Folder(str(tmp_path)), task=AlignmentTask(), base=BASE, config=CONFIG, on_start=lambda t: None, on_end=lambda t: None
    )
    asked = live.suggest("a")
    (tmp_path / asked["folder"]).mkdir(parents=True)  # it has begun
    live.ask_to_stop()
    assert (tmp_path / "trials" / asked["digest"] / "STOP").exists() and (tmp_path / "STOP").exists()
    live.observe("a", {"outcome": "stopped"})
    live.end("a")
    assert live.suggest("b") is None
    assert not live.journal.trials[0].finished and live.num_left() == CONFIG.num_samples


# --- ensemble and champion ------------------------------------------------------------------------------------------------------------------
def votes(*members):
    """Predictions that are right (1) or wrong (0) about objects; combined by majority."""
    return [{"right": np.array(member, dtype=np.float64)} for member in members]


def majority(members):
    return {"right": np.mean([m["right"] for m in members], axis=0)}


def share(predictions):
    return float((predictions["right"] > 0.5).mean())


def test_choose_members_adds_whichever_helps_most():
    members = votes([1, 1, 1, 0.2, 0.2, 0.4], [1, 1, 0, 0, 0, 0], [0.4, 0.4, 0.4, 1, 1, 0.7], [1, 1, 0, 0, 0, 1])
    chosen, value = choose_members(members, majority, share, MAX)
    assert chosen == [0, 2] and value == 1.0  # 0, 2 and 3 alone have 3 of 6 each: the first counts


def test_choose_members_equal_gain_adds_nobody():
    chosen, value = choose_members(votes([1, 1, 0], [1, 1, 0]), majority, share, MAX)
    assert chosen == [0] and value == pytest.approx(2 / 3)


def test_choose_members_smaller_is_better_picks_the_smallest():
    chosen, value = choose_members(votes([1, 1, 1], [0, 0, 1]), majority, share, MIN)
    assert chosen == [1] and value == pytest.approx(1 / 3)


class FakeRegistry:
    """A registry in memory, with an alias."""

    name = "cad-alignment"

    def __init__(self, present=None):
        self.present = present

    def alias(self, name):
        return self.present

    def move_alias(self, version, name):
        self.present = version


def version(number):
    return SimpleNamespace(version=str(number), digest=f"content-{number}")


def crowned(monkeypatch, present, champion_score, value, *, replace_champion=False, mode="max"):
    def measured(*arguments):
        if isinstance(champion_score, Exception):
            raise champion_score
        return champion_score

    monkeypatch.setattr(champion, "measured_champion", measured)
    registry = FakeRegistry(present)
    task = SimpleNamespace(score=replace(MAX, mode=mode))
    verdict = crown(registry, version(9), None, task, None, value, replace_champion=replace_champion)
    return registry.present.version, verdict


def test_crown_first_ensemble_becomes_champion(monkeypatch):
    assert crowned(monkeypatch, None, 0.0, 0.1)[0] == "9"


@pytest.mark.parametrize(("champion_score", "value", "mode", "winner"), [
    (0.5, 0.6, "max", "9"), (0.5, 0.5, "max", "3"), (0.6, 0.5, "max", "3"), (0.5, 0.4, "min", "9"), (0.5, math.nan, "max", "3"),
])  # fmt: skip
def test_crown_moves_only_for_something_strictly_better(monkeypatch, champion_score, value, mode, winner):
    found, verdict = crowned(monkeypatch, version(3), champion_score, value, mode=mode)
    assert found == winner and verdict.moved == (winner == "9")
    assert "same split" in verdict.told and "version 3" in verdict.told


def test_crown_unmeasurable_champion_stays_unless_told_otherwise(monkeypatch):
    reason = CannotBeMeasured("encoder 'hog' -> 'timm:x'")
    found, verdict = crowned(monkeypatch, version(3), reason, 0.9)
    assert found == "3" and "encoder 'hog' -> 'timm:x'" in verdict.told and "--replace-champion" in verdict.told
    assert crowned(monkeypatch, version(3), reason, 0.9, replace_champion=True)[0] == "9"


def test_crown_present_ensemble_is_not_measured_again(monkeypatch):
    found, verdict = crowned(monkeypatch, version(9), AssertionError("measured"), 0.9)
    assert found == "9" and not verdict.moved and "already" in verdict.told


def test_best_trial_is_told_beside_the_base_recipe(tmp_path):
    folder = Folder(str(tmp_path))
    base, other = (begun(number, state="complete", score=value) for number, value in enumerate((0.7, 0.75)))
    folder.write_json("trials/d0/result.json", {"metrics": {"val/recall@3": 0.7, "test/recall@3": 0.65, "val/loss": 1.0}})
    folder.write_json("trials/d1/result.json", {"metrics": {"val/recall@3": 0.75, "test/recall@3": 0.6, "val/loss": 2.0}})
    assert search_report.beside_the_base_recipe(folder, base, other, MAX) == (
        "best trial (1) against the base recipe (trial 0): val/recall@3 0.7500 against 0.7000, test/recall@3 0.6000 against 0.6500"
    )
    assert search_report.beside_the_base_recipe(folder, base, base, MAX) == "no trial was better than the base recipe (trial 0)"
    assert "trial 0) is failed" in search_report.beside_the_base_recipe(folder, replace(base, state="failed"), other, MAX)
    # Without a test split, or the base recipe's folder, there is nothing to tell of it.
    folder.write_json("trials/d1/result.json", {"metrics": {"val/recall@3": 0.75}})
    assert search_report.beside_the_base_recipe(folder, base, other, MAX).endswith("val/recall@3 0.7500 against 0.7000")
    folder.write_json("trials/d1/result.json", {"metrics": {"val/recall@3": 0.75, "test/recall@3": 0.6}})
    folder.delete("trials/d0")
    assert search_report.beside_the_base_recipe(folder, base, other, MAX).endswith("val/recall@3 0.7500 against 0.7000")


# --- table and page -------------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    drive(folder, CONFIG)
    trials = Journal(Folder(str(folder))).trials
    failed = replace(trials[-1], state="failed", score=None, reason='loss is <nan> & "inf"')
    return [*trials[:-1], failed]


def test_table_csv_gives_back_every_recipe_and_score(searched):
    rows = list(csv.DictReader(io.StringIO(search_report.table_csv(searched, BASE).decode())))
    for trial, row in zip(searched, rows, strict=True):
        recipe = replace_all(BASE, trial.values)
        assert (int(row["trial"]), row["state"], row["recipe"]) == (trial.number, trial.state, digest(recipe))
        assert float(row["optim.lr"]) == recipe.optim.lr and int(row["model.num_experts"]) == recipe.model.num_experts
        assert (float(row["score"]) if row["score"] else None) == trial.score
    assert rows[-1]["reason"] == 'loss is <nan> & "inf"'


def test_table_text_has_the_best_complete_trial_first_and_failures_last(searched):
    lines = search_report.table_text(searched, BASE, MAX).splitlines()
    best = best_trials(searched, MAX, 1)[0]
    assert lines[1].split()[:2] == [str(best.number), "complete"]
    assert lines[-1].split()[1] == "failed" and lines[-1].endswith('loss is <nan> & "inf"')


def test_report_page_is_self_contained_and_escapes_text(searched):
    page = search_report.report_page(searched, BASE, AlignmentTask(), title="a <search>", notes=["x < y"])
    assert page.count('class="plotly-graph-div"') == 3
    assert page == search_report.report_page(searched, BASE, AlignmentTask(), title="a <search>", notes=["x < y"])
    assert not re.search(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)\s*=\s*["']?(?:https?:)?//""", page)
    assert "a &lt;search&gt;" in page and "x &lt; y" in page and "loss is &lt;nan&gt;" in page


def test_report_page_without_any_complete_trial_has_the_table_alone():
    page = search_report.report_page([begun(0, state="failed", reason="no luck")], BASE, AlignmentTask(), title="t", notes=[])
    assert "no luck" in page and "plotly-graph-div" not in page


# --- the whole, with Ray --------------------------------------------------------------------------------------------------------------------
def tune(dataset, folder, *flags):
    """A search with small trials in their own processes, as a process of its own."""
    command = [sys.executable, "rayjobs/tune.py", "--task", "alignment", "--smoke", "--dataset", str(dataset), "--output", str(folder)]
    command += ["--tracking.folder", str(folder / "mlflow"), "--scale.num-workers", "0", "--search.num-startup-trials", "2", *flags]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, process, seconds=300.0):
    """Until the condition holds or the process ends."""
    until = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.2)


def versions(folder, kind):
    """Registered versions, and which is champion."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}", f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}")
    found = [int(v.version) for v in client.search_model_versions(f"name = 'cad-alignment' and tags.kind = '{kind}'")]
    return sorted(found), int(client.get_model_version_by_alias("cad-alignment", "champion").version)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_tune_killed_twice_then_stopped_completes_with_the_undisturbed_table_and_no_duplicates(tmp_path):
    dataset = tmp_path / "ds"
    make_dataset(str(dataset), 40)
    flags = ["--search.num-samples", "4", "--ensemble-size", "2", "--schedule.num-epochs", "3"]

    def table(name):
        rows = list(csv.DictReader((tmp_path / name / "trials.csv").open()))
        return [{column: value for column, value in row.items() if column != "seconds"} for row in rows]

    whole = tune(dataset, tmp_path, "--name", "whole", *flags)
    output, _ = whole.communicate(timeout=600)
    assert whole.returncode == 0, output
    members, first_champion = versions(tmp_path, "member")
    # On 8 objects the better of two may be as good as both together.
    assert len(members) in (1, 2) and versions(tmp_path, "ensemble")[0] == [first_champion]

    journal = tmp_path / "killed" / "trials.jsonl"
    for done in (0, 1):
        process = tune(dataset, tmp_path, "--name", "killed", *flags)
        wait_for(lambda done=done: _half_done(journal) and journal.read_text().count('"complete"') >= done, process)
        process.kill()  # -9
        process.communicate()
    before = journal.stat().st_mtime_ns
    process = tune(dataset, tmp_path, "--name", "killed", *flags)
    # It writes the journal anew: then it searches, and no longer only starts.
    wait_for(lambda: journal.stat().st_mtime_ns != before and _half_done(journal), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode in (0, 75), output  # 0: it was faster
    process = tune(dataset, tmp_path, "--name", "killed", *flags)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "finished trials reused" in output
    assert table("killed") == table("whole")
    # The same recipes on the same data give the same members: nothing new to register, and nobody to crown.
    assert versions(tmp_path, "member") == (members, first_champion)
    assert versions(tmp_path, "ensemble")[0] == [first_champion]

    worse = tune(dataset, tmp_path, "--search.num-samples", "1", "--schedule.num-epochs", "1", "--optim.lr", "1e-9", "--optim.head-lr", "1e-9")
    output, _ = worse.communicate(timeout=600)
    assert worse.returncode == 0, output
    assert "stays version" in output and versions(tmp_path, "ensemble")[1] == first_champion


def _half_done(journal):
    """Whether a trial is between its first evaluation and its end."""
    if not journal.exists():
        return False
    running = [json.loads(line) for line in journal.read_text().splitlines() if '"running"' in line]
    return any((journal.parent / "trials" / trial["digest"] / "metrics.jsonl").exists() for trial in running)
