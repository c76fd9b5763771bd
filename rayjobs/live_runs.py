"""Trainings under way, as those see them who decide what comes next and what stops early: a search with its journal, or the seeds of an ensemble."""

import collections
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray

from cad_models.config import Recipe, replace_all, to_dict
from cad_models.dataset import Folder
from cad_models.task import Score, Task
from rayjobs.leftovers import free_leftovers
from rayjobs.search import Journal, SearchConfig, Trial, ended, next_trial, should_stop
from rayjobs.telemetry import show

_STOP_AGAIN_S = 1.0
_SHOWN_EVERY_S = 5.0
_FREED_EVERY_S = 5.0


class LiveRuns(ABC):
    """Trainings under way, between who decides about them and Ray Tune.

    Args:
        folder: Of them all; a file named STOP in it ends them.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._looked_at = self._asked_at = self._freed_at = 0.0
        self.stopping = False
        """Whether the user asked to stop."""

    @abstractmethod
    def num_left(self) -> int:
        """Trainings that are to be started or to go on."""

    @abstractmethod
    def suggest(self, tune_id: str) -> dict[str, Any] | None:
        """`rayjobs.trials.run_trial`'s configuration of the next training, known as ``tune_id`` from here on; None = there is no more."""

    @abstractmethod
    def observe(self, tune_id: str, result: dict[str, Any]) -> bool:
        """Take a report; whether the training is to be stopped."""

    @abstractmethod
    def end(self, tune_id: str) -> None:
        """Record what became of a training; one that was stopped on request stays unfinished."""

    @abstractmethod
    def running(self) -> list[str]:
        """Folders of those that were suggested and did not end."""

    def ask_to_stop(self) -> None:
        """Let what runs stop with a checkpoint, and begin no more."""
        self.stopping = True
        self._folder.write_bytes("STOP", b"")
        self.remind()

    def look(self) -> bool:
        """Whether to stop; also the user's STOP file asks for it."""
        if not self.stopping and self._folder.exists("STOP"):
            self.ask_to_stop()
        return self.stopping

    def remind(self) -> None:
        """Look now and then, and ask the running trainings once more: one that was just starting has not seen the first request."""
        now = time.monotonic()
        if now - self._freed_at >= _FREED_EVERY_S and ray.is_initialized():
            self._freed_at = now
            # A look that fails, as while Ray's own store restarts, must not end a search: there is another in five seconds.
            with contextlib.suppress(Exception):
                free_leftovers()
        if now - self._looked_at >= _STOP_AGAIN_S:
            self._looked_at = now
            self.look()
        if not self.stopping or now - self._asked_at < _STOP_AGAIN_S:
            return
        self._asked_at = now
        for name in self.running():
            folder = self._folder / name
            if folder.exists():  # who has not begun yet sees the STOP above, and leaves nothing behind
                folder.write_bytes("STOP", b"")


class LiveSearch(LiveRuns):
    """A search under way, between its journal and Ray Tune.

    Args:
        on_start: Called with each trial that starts or goes on.
        on_end: Called with each trial that ended.
    """

    def __init__(
        self,
        *,
        folder: Folder,
        task: Task,
        base: Recipe,
        config: SearchConfig,
        on_start: Callable[[Trial], None],
        on_end: Callable[[Trial], None],
    ) -> None:
        super().__init__(folder)
        self._task, self._base, self._config = task, base, config
        self._on_start, self._on_end = on_start, on_end
        self.journal = Journal(folder)
        self._live: dict[str, int] = {}
        self._scores: dict[int, dict[int, float]] = {trial.number: dict(trial.scores) for trial in self.journal.trials}
        self._outcomes: dict[str, dict[str, Any]] = {}
        self._pruned: set[str] = set()
        self._started: dict[str, float] = {}
        self._shown_at = 0.0
        self.exhausted = False
        """Whether the space holds no further recipe."""

    @property
    def score(self) -> Score:
        """What ranks trials."""
        return self._task.score

    def num_left(self) -> int:
        """Trials that are to be started or to go on."""
        return self._config.num_samples - sum(trial.finished for trial in self.journal.trials[: self._config.num_samples])

    def suggest(self, tune_id: str) -> dict[str, Any] | None:
        """The configuration of the next trial: first those that an earlier driver began; None = there is no more."""
        trial = None if self.look() else self._next()
        if trial is None:
            return None
        self._live[tune_id] = trial.number
        self._started[tune_id] = time.monotonic()
        # Told again by the trial itself, so that the rule sees its evaluations in their order.
        self._scores[trial.number] = {}
        self._on_start(trial)
        return {"digest": trial.digest, "folder": f"trials/{trial.digest}", "recipe": to_dict(replace_all(self._base, trial.values))}

    def _next(self) -> Trial | None:
        trials, live = self.journal.trials, set(self._live.values())
        begun = [trial for trial in trials[: self._config.num_samples] if not trial.finished and trial.number not in live]
        if begun:
            return begun[0]
        if len(trials) >= self._config.num_samples:
            return None
        trial = next_trial(self._task, self._base, self._config, trials)
        if trial is None:
            self.exhausted = True
            return None
        self.journal.put(trial)
        return trial

    def observe(self, tune_id: str, result: dict[str, Any]) -> bool:
        """Take a report; whether the trial is to be stopped."""
        number = self._live[tune_id]
        if "outcome" in result:
            self._outcomes[tune_id] = result
            return False
        if "score" not in result or result["epoch"] in self._scores[number]:
            return False
        self._scores[number][result["epoch"]] = result["score"]
        failed = {trial.number for trial in self.journal.trials if trial.state == "failed"}
        # The base recipe is trained to its end whatever the rule says: what a search is worth is seen beside it.
        stop = number != 0 and should_stop(
            self._config.scheduler,
            self.score,
            self._scores[number],
            [scores for other, scores in self._scores.items() if other != number and other not in failed and scores],
            grace=self._config.grace(self._base.schedule.num_epochs),
            num_epochs=self._base.schedule.num_epochs,
        )
        if stop:
            self._pruned.add(tune_id)
        return stop

    def end(self, tune_id: str) -> None:
        """Record what became of a trial; one that was stopped on request stays unfinished."""
        number = self._live.pop(tune_id, None)
        if number is None:
            return
        trial, outcome = self.journal.trials[number], self._outcomes.get(tune_id, {})
        kind = "pruned" if tune_id in self._pruned else outcome.get("outcome", "failed")
        seconds = time.monotonic() - self._started[tune_id]
        if kind == "stopped" or (self.stopping and not outcome and tune_id not in self._pruned):
            self.journal.put(replace(trial, seconds=trial.seconds + seconds))
            return
        reason = outcome.get("reason", "its process was lost too often") if kind == "failed" else ""
        trial = ended(
            trial, kind, self.score, scores=self._scores[number], seconds=seconds, best=outcome.get("best"), reason=reason
        )
        self.journal.put(trial)
        self._on_end(trial)

    def remind(self) -> None:
        """As `LiveRuns.remind`; and shows the search's state to Prometheus."""
        now = time.monotonic()
        if now - self._shown_at >= _SHOWN_EVERY_S:
            self._shown_at = now
            self._show()
        super().remind()

    def _show(self) -> None:
        tags = {"task": self._task.name, "search": self._folder.uri.rsplit("/", 1)[1]}
        trials = self.journal.trials[: self._config.num_samples]
        live = set(self._live.values())
        counts = collections.Counter("running" if trial.number in live else trial.state for trial in trials if trial.finished or trial.number in live)
        counts["left"] = self._config.num_samples - sum(counts.values())
        for state in ("left", "running", "complete", "pruned", "failed"):
            show({"cad_search_trials": counts[state]}, **tags, state=state)
        found = [trial.score for trial in trials if trial.score is not None]
        if found:
            show({"cad_search_best_score": max(found) if self.score.mode == "max" else min(found)}, **tags)

    def running(self) -> list[str]:
        return [f"trials/{self.journal.trials[number].digest}" for number in list(self._live.values())]
