"""One member a seed: ``train.py --seeds 76 100 123``, parallel Ray Train runs of one recipe on one dataset, then their ensemble.

::

    <output>/<name>/
      seed_<s>/          a run's folder each, see rayjobs/loop.py
      selection.json     figures of the members and of the ensemble on the common val and test splits
      STOP               asks all seeds to stop, with checkpoints; who has not begun leaves nothing
"""

import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cad_models.config import Recipe, digest, json_digest, to_dict
from cad_models.dataset import Folder
from cad_models.tasks import TASKS
from rayjobs.champion import Candidate, Measuring, enrol, select
from rayjobs.cli import EXIT_STOPPED
from rayjobs.courier import MetricsCourier
from rayjobs.folder_lock import locked
from rayjobs.live_runs import LiveRuns
from rayjobs.loop import LoopConfig, check_recipe
from rayjobs.resources import WorkerPlan, concurrent_trainings, connect, plan_workers
from rayjobs.search_report import member_table
from rayjobs.tracked_runs import ChildRun, TrackedRuns
from rayjobs.tracking import DatasetSource, TrackedRun, Tracking, open_tracking
from rayjobs.train import TrainJob, loop_config
from rayjobs.trials import TrialSetting, run_here, run_trials, stopping_on_signals

if TYPE_CHECKING:
    from cad_models.task import Task

# A seed's own process only starts and watches its workers.
_SEED_CPUS = 0.01


@dataclass(frozen=True, kw_only=True)
class SeedResult:
    """What became of a seed that ended."""

    state: str
    """``complete`` or ``failed``."""
    reason: str = ""
    """Why it failed."""


class LiveSeeds(LiveRuns):
    """The seeds of one recipe under way. The run folders are the only state: what is finished there is done.

    Args:
        folder: Of all seeds.
        recipe: Its seed is replaced.
        on_start: Called with each seed that starts or goes on.
        on_end: Called with each seed that ended, but for those that were stopped on request.
    """

    def __init__(
        self,
        *,
        folder: Folder,
        recipe: Recipe,
        seeds: Sequence[int],
        on_start: Callable[[int], None],
        on_end: Callable[[int, SeedResult], None],
    ) -> None:
        super().__init__(folder)
        self._recipe, self._on_start, self._on_end = recipe, on_start, on_end
        self.results: dict[int, SeedResult] = {s: SeedResult(state="complete") for s in seeds if folder.exists(f"{seed_folder(s)}/result.json")}
        """Of the seeds that ended, in an earlier start or in this one."""
        self._waiting = [seed for seed in seeds if seed not in self.results]
        self._live: dict[str, int] = {}
        self._outcomes: dict[str, dict[str, Any]] = {}

    def num_left(self) -> int:
        return len(self._waiting)

    def suggest(self, tune_id: str) -> dict[str, Any] | None:
        if self.look() or not self._waiting:
            return None
        seed = self._live[tune_id] = self._waiting.pop(0)
        self._on_start(seed)
        return {"folder": seed_folder(seed), "recipe": to_dict(replace(self._recipe, seed=seed))}

    def observe(self, tune_id: str, result: dict[str, Any]) -> bool:
        if "outcome" in result:
            self._outcomes[tune_id] = result
        return False

    def end(self, tune_id: str) -> None:
        seed = self._live.pop(tune_id, None)
        if seed is None:
            return
        outcome = self._outcomes.get(tune_id, {})
        kind = outcome.get("outcome", "stopped" if self.stopping else "failed")
        if kind == "stopped":
            return
        result = SeedResult(state=kind, reason=outcome.get("reason", "its process was lost too often") if kind == "failed" else "")
        self.results[seed] = result
        self._on_end(seed, result)

    def running(self) -> list[str]:
        return [seed_folder(seed) for seed in list(self._live.values())]


def seed_folder(seed: int) -> str:
    """A seed's run folder, relative to that of all."""
    return f"seed_{seed}"


def train_seeds(job: TrainJob) -> int:
    """Train every seed, tell each one's figures and the ensemble's, register them if asked; the exit status."""
    task = TASKS[job.task]
    tracking = open_tracking(job.tracking, job.task)
    plan, max_concurrent = None, 1
    if job.scale.num_workers > 0:
        connect()
        max_concurrent = min(len(job.seeds), job.max_concurrent or concurrent_trainings(job.scale))
        plan = plan_workers(job.scale, concurrent_trainings=max_concurrent)
    base = _base_loop(job, plan)
    folder = Folder(base.run_folder)
    for seed in job.seeds:
        if folder.exists(f"{seed_folder(seed)}/recipe.json"):
            recipe = replace(job.recipe, seed=seed)
            check_recipe(replace(base, recipe=recipe, run_folder=folder.path(seed_folder(seed))))
    with ExitStack() as stack:
        stack.enter_context(locked(folder, ".lock", "train"))
        folder.delete("STOP")
        folder.delete("ray")
        print(f"seeds: {folder.uri}", flush=True)
        run = tracking.start_run(
            json_digest(["seeds", job.task, folder.uri]),
            name=folder.uri.rsplit("/", 1)[1],
            params={**to_dict(replace(job.recipe, seed=0)), "seed": "", "seeds": " ".join(map(str, sorted(job.seeds)))},
            tags={"cad.task": job.task, "cad.run_folder": folder.uri, "cad.kind": "seeds", **({"cad.run": job.run} if job.run else {})},
            dataset=DatasetSource(uri=job.dataset, digest=base.train.dataset.digest),
        )
        courier = stack.enter_context(MetricsCourier())
        tracked = stack.enter_context(TrackedRuns(tracking, run, courier))
        setting = TrialSetting(folder=folder.uri, base=base, plan=plan, cache_bytes=int(job.scale.cache_gb * 1e9))
        live, received = _trained(job, folder, setting, tracked, max_concurrent)
        left = [seed for seed in job.seeds if seed not in live.results]
        if left:
            tracked.interrupt(lambda name: live.results.get(int(name.removeprefix("seed_"))) is not None)
            run.finish("KILLED")
            names = " ".join(map(str, left))
            print(f"stopped; seeds not finished: {names}; what has begun left a checkpoint, and the same command goes on from there", flush=True)
            return 130 if signal.SIGINT in received else EXIT_STOPPED
        tracked.drain()
        return _concluded(job, task, folder, setting, live, tracking, run, max_concurrent)


def _base_loop(job: TrainJob, plan: WorkerPlan | None) -> LoopConfig:
    recipe = replace(job.recipe, seed=0)  # so that further seeds find the same folder
    base = loop_config(
        task_name=job.task,
        recipe=recipe,
        dataset_uri=job.dataset,
        output=job.output,
        name=job.name,
        scale=job.scale,
        plan=plan,
        checkpoint_every_steps=job.checkpoint_every_steps,
    )
    return base if job.name else replace(base, run_folder=f"{base.run_folder}-seeds")


def _trained(
    job: TrainJob, folder: Folder, setting: TrialSetting, tracked: TrackedRuns, max_concurrent: int
) -> tuple[LiveSeeds, list[int]]:
    """Train what is left; also the signals that asked to stop."""
    score = TASKS[job.task].score.name

    def child(seed: int) -> ChildRun:
        recipe = replace(job.recipe, seed=seed)
        return ChildRun(
            key=json_digest(["seed", folder.uri, seed]),
            name=seed_folder(seed),
            folder=folder / seed_folder(seed),
            params=to_dict(recipe),
            tags={"cad.task": job.task, "cad.recipe_digest": digest(recipe), "cad.kind": "seed"},
            with_files=True,
        )

    def ended(seed: int, result: SeedResult) -> None:
        tracked.end(child(seed), result.state, result.reason)
        told = result.reason
        if result.state == "complete":
            written = folder.read_json(f"{seed_folder(seed)}/result.json")
            told = f"{score} {written['score']:.4f}, {written['num_epochs']} epochs ({written['ended']})"
        print(f"{len(live.results)}/{len(job.seeds)} seed {seed} {result.state}: {told}", flush=True)

    live = LiveSeeds(
        folder=folder, recipe=job.recipe, seeds=job.seeds, on_start=lambda seed: tracked.start(child(seed)), on_end=ended
    )
    if live.results:
        print(f"finished seeds reused: {' '.join(map(str, live.results))}", flush=True)
    for seed in live.results:
        tracked.end(child(seed), "complete")
    with stopping_on_signals(live) as received:
        if setting.plan is None:
            run_here(live, setting)
        else:
            run_trials(live, setting, {"CPU": _SEED_CPUS}, max_concurrent=max_concurrent)
    return live, received


def _concluded(
    job: TrainJob,
    task: "Task",
    folder: Folder,
    setting: TrialSetting,
    live: LiveSeeds,
    tracking: Tracking,
    run: TrackedRun,
    max_concurrent: int,
) -> int:
    """Table, registry, champion."""
    failed = {seed: result.reason for seed, result in live.results.items() if result.state == "failed"}
    done = [seed for seed in job.seeds if seed not in failed]
    for seed, reason in failed.items():
        print(f"error: seed {seed} failed: {reason}", file=sys.stderr)
    if done:
        plan = setting.plan
        measuring = Measuring(
            base=setting.base,
            num_tasks=max_concurrent * plan.num_workers if plan else 0,
            cpus_per_task=plan.cpus_per_worker if plan else 1.0,
            use_gpu=bool(plan and plan.use_gpu),
            cache_bytes=setting.cache_bytes,
        )
        candidates = [Candidate(name=f"seed {s}", folder=seed_folder(s), tags={"seed": str(s)}) for s in done]
        selection = select(folder, task, candidates, measuring, rule=job.combine or task.combine_rules[0], take_all=True)
        print(f"\n{member_table(selection, task.score)}\n\ncombined by {selection['rule']}", flush=True)
        for seed in done:
            if (folder / seed_folder(seed)).exists("report"):
                print(f"report of seed {seed}: {folder.path(f'{seed_folder(seed)}/report')}")
        run.log_metrics({f"ensemble/{name}": value for name, value in selection["metrics"].items()})
        if job.register and not failed:
            told = enrol(tracking, folder, task, candidates, selection, measuring, run_id=run.run_id, replace_champion=job.replace_champion)
            print(told, flush=True)
    if failed:
        not_registered = "; nothing was registered" if job.register else ""
        print(
            f"error: {len(failed)} of {len(job.seeds)} seeds failed{not_registered}: the same command tries them again, or leave them out of --seeds",
            file=sys.stderr,
        )
        run.finish("FAILED")
        return 1
    run.finish()
    return 0
