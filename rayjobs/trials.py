"""Many trainings as Ray Tune runs them, the trials of a search or the seeds of an ensemble: one Ray Train run each, in a folder of its own, resumed
by itself.

Ray Tune places, watches, restarts and stops them. What comes next and what stops early is asked of a `rayjobs.live_runs.LiveRuns`: for a search of `rayjobs.search`,
whose journal is the only state that counts. Ray Tune's own snapshots are never read.
"""

import contextlib
import itertools
import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from cad_models.config import Recipe, from_dict
from cad_models.dataset import Folder
from cad_models.tasks import TASKS
from rayjobs.live_runs import LiveRuns
from rayjobs.loop import LoopConfig
from rayjobs.resources import LOSSES_WITHOUT_PROGRESS, WorkerPlan
from rayjobs.streams import SplitStream, open_dataset, read_examples
from rayjobs.train import evaluations, fit

_WIND_DOWN_S = "120"
_POLL_S = 0.3


# --- in the trial's process -----------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class TrialSetting:
    """What all trials share; picklable."""

    folder: str
    """The folder of the search, or of the seeds."""
    base: LoopConfig
    """Of the base recipe."""
    plan: WorkerPlan | None
    """Workers of each trial; None = the trial's own process."""
    cache_bytes: int
    attempt: str = ""
    """Identifies the driver's start; what was lost with an earlier driver does not count against a trial."""


def run_trial(config: dict[str, Any], setting: TrialSetting) -> None:
    """What Ray Tune starts: one training to its end, to a stop request, or to a failure, which is reported and not raised.

    Args:
        config: ``recipe`` as JSON and ``folder``, relative to the setting's.
    """
    # A trial that is stopped early lets its workers end before its process takes the next trial.
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", _WIND_DOWN_S)
    tune.report(outcome_of(config, setting, tune.report))


def outcome_of(
    config: dict[str, Any],
    setting: TrialSetting,
    report: Callable[[dict[str, Any]], None],
    *,
    poll: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Train what ``config`` says; ``{"outcome": "complete", "best"}``, ``{"outcome": "stopped"}`` or ``{"outcome": "failed", "reason"}``.

    Args:
        report: Gets ``{"epoch", "score"}`` of every evaluation; after a restart also of earlier ones.
        poll: Called now and then, in this thread, while a training without workers runs in another; None = it runs in this thread.
    """
    folder = Folder(setting.folder) / config["folder"]
    score = TASKS[setting.base.task].score.name
    told = 0

    def tell() -> None:
        nonlocal told
        for line in evaluations(folder)[told:]:
            told += 1
            report({"epoch": int(line["epoch"]), "score": float(line["metrics"][score])})
        if poll is not None:
            poll()

    try:
        tell()
        if setting.attempt and _lost_too_often(folder, setting.attempt, told):
            return {"outcome": "failed", "reason": f"its process was lost {LOSSES_WITHOUT_PROGRESS + 1} times without an evaluation in between"}
        return _trained(config, setting, folder, tell, beside=setting.plan is not None or poll is not None)
    except Exception as error:  # one trial must not stop the others: the reason is recorded, and shown in the table
        return {"outcome": "failed", "reason": _reason(error)}


def _lost_too_often(folder: Folder, attempt: str, num_evaluations: int) -> bool:
    """Count this start of a trial, and say whether it is one too many: on machines that come and go any number is fine while it gets on."""
    now = {"attempt": attempt, "num_evaluations": num_evaluations}
    before = folder.read_json("starts.json") if folder.exists("starts.json") else {}
    starts = before["starts"] + 1 if {name: before.get(name) for name in now} == now else 1
    folder.write_json("starts.json", {**now, "starts": starts})
    return starts > LOSSES_WITHOUT_PROGRESS + 1


def _trained(config: dict[str, Any], setting: TrialSetting, folder: Folder, tell: Callable[[], None], *, beside: bool) -> dict[str, Any]:
    if Folder(setting.folder).exists("STOP"):
        return {"outcome": "stopped"}
    recipe = from_dict(type(setting.base.recipe), config["recipe"])
    loop = trial_loop(setting.base, recipe, folder.uri, cache_bytes=setting.cache_bytes)
    if beside:
        finished = _fit_beside(loop, setting.plan, folder, tell)
    else:
        finished = fit(loop, None, report=lambda metrics: tell(), quiet=True)
    if not finished:
        return {"outcome": "stopped"}
    return {"outcome": "complete", "best": float(folder.read_json("result.json")["score"])}


def _fit_beside(loop: LoopConfig, plan: WorkerPlan | None, folder: Folder, tell: Callable[[], None]) -> bool:
    """Train in a second thread while this one reports: every evaluation reaches Ray Tune, in order, and waits for its verdict."""
    box: dict[str, Any] = {}

    def work() -> None:
        try:
            box["finished"] = fit(loop, plan, quiet=True)
        except BaseException as error:  # raised again by the thread that waits
            box["error"] = error

    thread = threading.Thread(target=work, name="training", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_POLL_S)
            tell()
    except SystemExit:
        # Ray Tune stops a trial by ending this thread within its report. The workers must end too, and give back what they hold.
        folder.write_bytes("STOP", b"")
        thread.join()
        raise
    tell()
    if "error" in box:
        raise box["error"]
    return box["finished"]


def _reason(error: Exception) -> str:
    """One line; a Ray Train error's cause lies at the end of its chain."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    text = lines[-1].strip() if lines else ""
    return text if isinstance(cause, ValueError) else f"{type(cause).__name__}: {text}"


def trial_loop(base: LoopConfig, recipe: Recipe, run_folder: str, *, cache_bytes: int) -> LoopConfig:
    """The loop of one trial. Where its recipe reads the same arrays as the base recipe's, it shares what that holds in the object store."""
    task = TASKS[base.task]
    dataset = open_dataset(base.train.dataset.uri, task, recipe)
    streams = {split: getattr(base, split) for split in ("train", "val", "test")}
    if _same_examples(streams["train"], SplitStream(dataset=dataset, recipe=recipe, split="train")):
        streams = {split: replace(stream, recipe=recipe) for split, stream in streams.items()}
    else:
        streams = {split: SplitStream(dataset=dataset, recipe=recipe, split=split) for split in streams}
        if base.train.blocks or base.train.streamed:
            streams = {split: stream.cached(cache_bytes, base.train.reader_threads) for split, stream in streams.items()}
    return replace(
        base, recipe=recipe, signature=task.signature(recipe, dataset.signature_inputs), run_folder=Folder(run_folder).uri, **streams
    )


def _same_examples(left: SplitStream, right: SplitStream) -> bool:
    """Whether two streams give the same arrays: compared on one part, for `Task.examples` is a pure function of tables and recipe."""
    if left.dataset != right.dataset:
        return False
    part = next(p for p, rows in enumerate(left.part_rows) if rows)
    a, b = (read_examples(stream.dataset, stream.recipe, stream.split, part) for stream in (left, right))
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]) for name in a)


# --- in the driver --------------------------------------------------------------------------------------------------------------------------
class _Unsaved:
    """Ray Tune pickles what it is given into its experiment folder; the search's journal is the state, so there is nothing to keep."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Suggestions(_Unsaved, Searcher):
    def __init__(self, live: LiveRuns) -> None:
        super().__init__()
        self._runs = live

    def suggest(self, trial_id: str) -> Any:
        return self._runs.suggest(trial_id) or Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """The scheduler takes every result, also those that stop a trial."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._runs.end(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


class _Verdicts(_Unsaved, FIFOScheduler):
    def __init__(self, live: LiveRuns) -> None:
        super().__init__()
        self._runs = live

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return TrialScheduler.STOP if self._runs.observe(trial.trial_id, result) else TrialScheduler.CONTINUE


class _Reminder(_Unsaved, tune.Callback):
    def __init__(self, live: LiveRuns) -> None:
        self._runs = live

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._runs.remind()


def run_trials(live: LiveRuns, setting: TrialSetting, resources: dict[str, float], *, max_concurrent: int) -> None:
    """Run what is left, until all is complete or the user asks to stop.

    Args:
        resources: What a trial's own process holds; its workers hold theirs beside it.
    """
    if live.num_left() == 0:
        return
    for name, value in {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the run folders have all figures
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours stops the trials with a checkpoint
        "TUNE_MAX_PENDING_TRIALS_PG": str(max_concurrent),
        "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "600",
    }.items():
        os.environ.setdefault(name, value)
    # It looks for the files of the loggers that are switched off above.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    folder = Folder(setting.folder)
    attempt = f"{folder.uri.rsplit('/', 1)[1]}-{uuid.uuid4().hex[:8]}"
    setting = replace(setting, attempt=attempt)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, setting=setting), resources),
        tune_config=tune.TuneConfig(
            search_alg=_Suggestions(live),
            scheduler=_Verdicts(live),
            num_samples=live.num_left(),
            max_concurrent_trials=max_concurrent,
            # Starting a process and importing torch takes longer than a small trial.
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=attempt,
            storage_path=folder.path("ray"),
            callbacks=[_Reminder(live)],
            failure_config=tune.FailureConfig(max_failures=-1),  # `_lost_too_often` ends it
            verbose=0,
        ),
    )
    try:
        tuner.fit()
        live.look()  # the trainings may have seen the STOP file first
    finally:
        if ray.is_initialized():
            folder.delete("ray")
        sys.stdout.flush()


def run_here(live: LiveRuns, setting: TrialSetting) -> None:
    """The same in this process, one training after the other, without Ray."""
    for number in itertools.count():
        name = str(number)
        config = live.suggest(name)
        if config is None:
            break
        live.observe(name, outcome_of(config, setting, partial(live.observe, name), poll=live.remind))
        live.end(name)
    live.look()


@contextlib.contextmanager
def stopping_on_signals(live: LiveRuns) -> Iterator[list[int]]:
    """SIGTERM or Ctrl-C lets the trainings stop with a checkpoint; the second one ends the program at once. Yields the signals received."""
    received: list[int] = []

    def ask(signum: int, frame: Any) -> None:
        received.append(signum)
        for name, handler in before.items():
            signal.signal(name, handler)
        print("\nstopping: running trainings write checkpoints (once more to end at once)", file=sys.stderr, flush=True)
        live.ask_to_stop()

    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    if threading.current_thread() is threading.main_thread():
        for name in before:
            signal.signal(name, ask)
    try:
        yield received
    finally:
        if threading.current_thread() is threading.main_thread():
            for name, handler in before.items():
                signal.signal(name, handler)
