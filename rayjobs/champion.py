"""From trained members (a search's best trials, an ensemble's seeds) to the registry: members, the ensemble chosen among them, and the question who is champion.

Choices are made on the validation split; the test split is only told. Everything here may be done twice: predictions are made once and their
figures kept in their folder, versions are found again by their content, and the alias moves only for something strictly better.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch

from cad_models.checkpoint import load_member, member_digest
from cad_models.config import json_digest
from cad_models.dataset import DatasetError, Folder
from cad_models.ensemble import pack, read_ensemble, unpack
from cad_models.task import Predictions, Score, Task
from cad_models.tasks import TASKS
from rayjobs.loop import LoopConfig
from rayjobs.predictions import final_figures, named_metrics, predict_split
from rayjobs.trials import trial_loop

if TYPE_CHECKING:
    from rayjobs.registry import Registry, Version
    from rayjobs.tracking import Tracking

SPLITS = ("val", "test")
_ALIAS = "champion"


# --- predictions ----------------------------------------------------------------------------------------------------------------------------
class CannotBeMeasured(ValueError):
    """A member does not fit the dataset's embeddings or points."""


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """How members' predictions are made; picklable."""

    base: LoopConfig
    """Of the search's base recipe, with its streams."""
    num_tasks: int
    """Ray tasks at once; 0 = in this process, without Ray."""
    cpus_per_task: float
    use_gpu: bool
    cache_bytes: int

    def splits(self, *wanted: str) -> list[str]:
        """The ``wanted`` ones that hold objects, and the task's reference split."""
        names = dict.fromkeys((*wanted, TASKS[self.base.task].reference_split))
        return [split for split in names if split and getattr(self.base, split).num_rows]


def predict_members(members: Sequence[dict[str, bytes]], measuring: Measuring, splits: Sequence[str]) -> list[dict[str, Predictions]]:
    """Each member's predictions of whole splits, read part by part, by Ray tasks or in this process.

    Args:
        members: Checkpoint folders as file name -> content.

    Raises:
        CannotBeMeasured: a member needs other embeddings or points than the dataset has; names both sides.
    """
    if measuring.num_tasks == 0:
        return _predict(list(members), measuring, list(splits))
    task = ray.remote(_predict).options(num_cpus=measuring.cpus_per_task, num_gpus=1 if measuring.use_gpu else 0, max_retries=3, name="predict val and test of a member")
    shares = [list(range(start, len(members), measuring.num_tasks)) for start in range(min(measuring.num_tasks, len(members)))]
    shared = ray.put(measuring)
    references = [task.remote([members[i] for i in share], shared, list(splits)) for share in shares]
    results: list[dict[str, Predictions]] = [{} for _ in members]
    try:
        for share, predicted in zip(shares, ray.get(references), strict=True):
            for i, of_member in zip(share, predicted, strict=True):
                # Ray's arrays are read-only views of the object store.
                results[i] = {split: {name: np.array(column) for name, column in of_split.items()} for split, of_split in of_member.items()}
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, CannotBeMeasured):
            raise CannotBeMeasured(str(error.cause)) from error
        raise
    return results


def _predict(members: list[dict[str, bytes]], measuring: Measuring, splits: list[str]) -> list[dict[str, Predictions]]:
    device = torch.device("cuda" if measuring.use_gpu else "cpu")
    torch.set_num_threads(measuring.base.num_threads)
    results = []
    for files in members:
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch)
            unpack(files, directory)
            member = load_member(directory, device=str(device))
        try:
            loop = trial_loop(measuring.base, member.recipe, measuring.base.run_folder, cache_bytes=measuring.cache_bytes)
        except DatasetError as error:
            raise CannotBeMeasured(str(error)) from error
        both = {name: (member.signature.get(name), loop.signature.get(name)) for name in {*member.signature, *loop.signature}}
        unlike = [f"{name} {a!r} -> {b!r}" for name, (a, b) in sorted(both.items()) if a != b and name not in member.task.signature_notes]
        if unlike:
            raise CannotBeMeasured(f"it was trained for other inputs than this dataset has ({'; '.join(unlike)})")
        results.append({s: predict_split(member.task, member.recipe, member.learner, getattr(loop, s), device, more=True) for s in splits})
    return results


# --- choosing -------------------------------------------------------------------------------------------------------------------------------
def choose_members(
    predictions: Sequence[Any], combine: Callable[[Sequence[Any]], Any], score_of: Callable[[Any], float], score: Score
) -> tuple[list[int], float]:
    """Greedy forward selection (Caruana et al. 2004, without repetition): the best member, then whichever adds most, as long as one adds anything.

    Args:
        predictions: The members', of the same objects.
        combine: The ensemble rule, from some members' predictions (or a single one's) to theirs together.
        score_of: What to improve.

    Returns:
        Positions in the order of choice, and the score of their combination.
    """
    chosen: list[int] = []
    best: float | None = None
    while True:
        gains = []
        for i in range(len(predictions)):
            if i not in chosen:
                tried = [predictions[k] for k in (*chosen, i)]
                gains.append((score_of(combine(tried)), i))
        pick: tuple[float, int] | None = None
        for value, i in gains:  # of equal ones the first: the better trial
            if score.better(value, best if pick is None else pick[0]):
                pick = (value, i)
        if pick is None:
            break
        best, position = pick
        chosen.append(position)
    if best is None:
        raise ValueError(f"no member has a finite {score.name}")
    return chosen, best


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A finished training whose best checkpoint may be registered."""

    name: str
    """For tables, as ``trial 3`` or ``seed 76``."""
    folder: str
    """The run's folder, relative to that of the search or the seeds."""
    run_id: str = ""
    """Its MLflow run."""
    tags: dict[str, str] = field(default_factory=dict)
    """For its registered version."""


def select(folder: Folder, task: Task, candidates: Sequence[Candidate], measuring: Measuring, *, rule: str, take_all: bool = False) -> dict[str, Any]:
    """Measure the candidates' best checkpoints, alone and as an ensemble; kept in ``selection.json``, so that it is done once.

    Args:
        rule: The ensemble rule; fitted, where there is something to fit, on the validation split.
        take_all: The ensemble is all of them; otherwise those that `choose_members` chooses.

    Returns:
        ``members`` (one dict a candidate: name, folder, member_digest, best, what was fitted for it alone, metrics), ``chosen`` (positions in it), ``rule``, ``fitted``, ``score``
        and ``metrics`` of the ensemble.
    """
    results = [folder.read_json(f"{candidate.folder}/result.json") for candidate in candidates]
    key = json_digest([[r["member_digest"] for r in results], measuring.base.train.dataset.digest, task.score.name, rule, take_all])
    if folder.exists("selection.json"):
        before = folder.read_json("selection.json")
        if before["key"] == key:
            return before
    packed = []
    for candidate, result in zip(candidates, results, strict=True):
        with folder.fetched(f"{candidate.folder}/{result['best']}") as directory:
            packed.append(pack(directory))
    predicted = predict_members(packed, measuring, measuring.splits(*SPLITS))

    def score_of(predictions: dict[str, Predictions]) -> float:
        return metrics_of(task, predictions, ["val"])[task.score.name]

    if take_all:
        chosen = list(range(len(predicted)))
    else:
        without_test = [{split: of_split for split, of_split in of_member.items() if split != "test"} for of_member in predicted]
        chosen, _ = choose_members(without_test, lambda members: combined(task, members, rule, fitted=fit(task, members, rule)), score_of, task.score)
    fitted = fit(task, [predicted[i] for i in chosen], rule)
    together = combined(task, [predicted[i] for i in chosen], rule, fitted=fitted)
    alone = [fit(task, [of_member], task.combine_rules[0]) for of_member in predicted]
    selection = {
        "key": key,
        "members": [
            {
                "name": candidate.name,
                "folder": candidate.folder,
                "member_digest": result["member_digest"],
                "best": result["best"],
                "fitted": of_rule,
                "metrics": metrics_of(task, combined(task, [of_member], task.combine_rules[0], fitted=of_rule)),
            }
            for candidate, result, of_member, of_rule in zip(candidates, results, predicted, alone, strict=True)
        ],
        "chosen": chosen,
        "rule": rule,
        "fitted": fitted,
        "score": score_of(together),
        "metrics": metrics_of(task, together),
    }
    folder.write_json("selection.json", selection)
    return selection


def fit(task: Task, members: Sequence[dict[str, Predictions]], rule: str) -> dict[str, Any]:
    """`Task.fit_rule` on the members' validation predictions."""
    return task.fit_rule([member["val"] for member in members], rule=rule)


def combined(
    task: Task,
    members: Sequence[dict[str, Predictions]],
    rule: str,
    weights: Sequence[float] | None = None,
    fitted: Mapping[str, Any] | None = None,
) -> dict[str, Predictions]:
    """The members' predictions together, split by split; a single member's as they are, unless something was fitted for it."""
    if len(members) == 1 and not fitted:
        return members[0]
    return {split: task.combine([member[split] for member in members], rule=rule, weights=weights, fitted=fitted) for split in members[0]}


def metrics_of(task: Task, predictions: dict[str, Predictions], splits: Sequence[str] = SPLITS) -> dict[str, float]:
    """Metrics of those ``splits`` that are there, ``<split>/<name>``; the reference split is what they are measured against."""
    reference = predictions.get(task.reference_split)
    found: dict[str, float] = {}
    for split in splits:
        if split in predictions:
            figures = final_figures(task, predictions[split], reference) if split == "test" else named_metrics(task, predictions[split], split, reference)
            found |= figures
    return found


# --- registering ----------------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Crowning:
    """What became of the alias."""

    moved: bool
    """Whether this ensemble is champion now and was not before."""
    told: str
    """One line for people."""


def enrol(
    tracking: "Tracking",
    folder: Folder,
    task: Task,
    candidates: Sequence[Candidate],
    selection: dict[str, Any],
    measuring: Measuring,
    *,
    run_id: str | None,
    replace_champion: bool,
) -> str:
    """Register what :func:`select` measured, and crown the ensemble if it is better; lines for people."""
    from rayjobs.registry import Registry

    registry = Registry(tracking)
    versions, ensemble = register(registry, folder, task, candidates, selection, run_id=run_id)
    members = ", ".join(f"{entry['name']} = version {v.version}" for entry, v in zip(selection["members"], versions, strict=True))
    verdict = crown(registry, ensemble, folder, task, measuring, selection["score"], replace_champion=replace_champion)
    return f"registered {registry.name}: {members}, ensemble = version {ensemble.version}\n{verdict.told}"


def register(
    registry: "Registry", folder: Folder, task: Task, candidates: Sequence[Candidate], selection: dict[str, Any], *, run_id: str | None
) -> tuple[list["Version"], "Version"]:
    """Register the measured members and the chosen ensemble; what is registered already is found again.

    Returns:
        A version for each of ``selection["members"]``, and the ensemble's.
    """
    tags = {"task": task.name, "score_name": task.score.name}
    versions = []
    for entry, candidate in zip(selection["members"], candidates, strict=True):
        with folder.fetched(f"{entry['folder']}/{entry['best']}") as directory:
            if member_digest(directory) != entry["member_digest"]:
                raise ValueError(f"{folder.path(entry['folder'])} was changed after its training: delete it and run again")
            score, fitted = entry["metrics"][task.score.name], entry.get("fitted", {})
            told = {**tags, **candidate.tags}
            versions.append(registry.register_member(directory, score=score, fitted=fitted, run_id=candidate.run_id or None, tags=told))
    ensemble = registry.register_ensemble(
        [versions[i] for i in selection["chosen"]],
        score=selection["score"],
        rule=selection["rule"],
        fitted=selection["fitted"],
        run_id=run_id,
        tags={**tags, "search": folder.uri.rsplit("/", 1)[1], "dataset_digest": versions[0].tags.get("dataset_digest", "")},
    )
    return versions, ensemble


def crown(
    registry: "Registry", ensemble: "Version", search: Folder, task: Task, measuring: Measuring, value: float, *, replace_champion: bool
) -> Crowning:
    """Let ``champion`` name the ensemble if it is strictly better than the present champion on the same validation split.

    Args:
        value: The ensemble's score there.
        replace_champion: Move it also when the present champion cannot be measured on this split.
    """
    name = f"{registry.name}@{_ALIAS}"
    while True:
        present = registry.alias(_ALIAS)
        if present is None:
            verdict = Crowning(moved=True, told=f"{name} is version {ensemble.version}: there was none before")
        elif present.version == ensemble.version:
            return Crowning(moved=False, told=f"{name} is version {ensemble.version}, this very ensemble, already")
        else:
            verdict = _compared(registry, present, ensemble, search, task, measuring, value, replace_champion)
        if not verdict.moved:
            return verdict
        again = registry.alias(_ALIAS)
        # Measuring takes time, in which another search may have moved it.
        if (again.version if again else None) == (present.version if present else None):
            registry.move_alias(ensemble, _ALIAS)
            return verdict


def _compared(
    registry: "Registry",
    present: "Version",
    ensemble: "Version",
    search: Folder,
    task: Task,
    measuring: Measuring,
    value: float,
    replace_champion: bool,
) -> Crowning:
    name, score = f"{registry.name}@{_ALIAS}", task.score
    try:
        champion = measured_champion(registry, present, search, task, measuring)
    except CannotBeMeasured as error:
        told = f"version {present.version} cannot be measured on this validation split: {error}"
        if replace_champion:
            return Crowning(moved=True, told=f"{name} moved from version {present.version} to {ensemble.version} (--replace-champion; {told})")
        return Crowning(
            moved=False, told=f"{name} stays version {present.version}; {told}. --replace-champion moves it to version {ensemble.version}"
        )
    sides = f"{score.name} {value:.4f} of version {ensemble.version} against {champion:.4f} of version {present.version}, same split"
    if score.better(value, champion):
        return Crowning(moved=True, told=f"{name} moved from version {present.version} to {ensemble.version}: {sides}")
    return Crowning(moved=False, told=f"{name} stays version {present.version}: {sides}")


def measured_champion(registry: "Registry", present: "Version", search: Folder, task: Task, measuring: Measuring) -> float:
    """The present champion's score on this search's validation split; kept in ``champion.json``, so that it is measured once."""
    key = json_digest([present.digest, measuring.base.train.dataset.digest, task.score.name])
    if search.exists("champion.json"):
        before = search.read_json("champion.json")
        if before["key"] == key:
            return before["score"]
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "ensemble"
        registry.gather([present.uri], directory)
        entry = read_ensemble(directory)
        if entry.task != task.name:
            raise CannotBeMeasured(f"it is of task {entry.task}, not {task.name}")
        packed = list(_packed_members(directory, len(entry.members)))
    predicted = predict_members(packed, measuring, measuring.splits("val"))
    together = combined(task, predicted, entry.rule, [member.weight for member in entry.members], entry.fitted)
    value = metrics_of(task, together)[task.score.name]
    search.write_json("champion.json", {"key": key, "version": present.version, "score": value})
    return value


def _packed_members(directory: Path, count: int) -> Iterator[dict[str, bytes]]:
    for i in range(count):
        yield pack(directory / "members" / str(i))

