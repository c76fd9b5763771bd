"""Search space -> registered members: Ray Tune + Optuna, one Ray Train run a trial, then the best as an ensemble.

    python rayjobs/tune.py --task alignment --dataset ds/ --search.num-samples 64
    python rayjobs/tune.py --task alignment --dataset ds/ --search.num-samples 64 --search.max-concurrent 4 --scale.num-workers 2
    python rayjobs/tune.py --task alignment --dataset ds/ --smoke --search.num-samples 4 --scale.num-workers 0   # trials without Ray Train

The recipe's flags are the base recipe: the first trial, which the search then varies. Killed or stopped (Ctrl-C, SIGTERM), the same command goes
on: finished trials are kept, begun ones resume from their last checkpoint. A greater --search.num-samples extends the same search.

Submitted as a job, the program runs in a copy of the working directory that is deleted some day: give absolute paths or URIs as --dataset,
--output and --tracking.folder.
"""

import os
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import tyro

from cad_models.config import Recipe, digest, json_digest, replace_all, to_dict
from cad_models.dataset import Folder
from cad_models.task import Score
from cad_models.tasks import TASKS
from rayjobs.cli import EXIT_STOPPED, RecipeFlags, TrackingConfig, check_rule, run_job
from rayjobs.resources import ScaleConfig, WorkerPlan
from rayjobs.search import SearchConfig, Trial
from rayjobs.tracked_runs import ChildRun, TrackedRuns

if TYPE_CHECKING:
    from rayjobs.courier import MetricsCourier
    from rayjobs.live_runs import LiveSearch
    from rayjobs.tracking import TrackedRun, Tracking

# A trial's own process only starts and watches its workers.
_TRIAL_CPUS = 0.01


@dataclass(frozen=True, kw_only=True)
class TuneJob:
    """One search."""

    task: str
    """Which room: see cad_models/tasks.py."""
    recipe: RecipeFlags
    smoke: bool = False
    """The task's smoke recipe: the same code in seconds on a CPU."""
    dataset: str = tyro.MISSING
    """The dataset folder (path or URI) that prepare.py and embed.py made."""
    output: str = "outputs/searches"
    """Folder (path or URI, shared by all nodes) for searches; this one's is <output>/<name>."""
    name: str = ""
    """The search's name; empty = from the digests of base recipe, dataset and search, so that the same command resumes the same search."""
    ensemble_size: int = 5
    """Best trials that are registered; the ensemble is chosen among them."""
    combine: str = ""
    """The ensemble's rule, one of the task's; empty = its first. Rules that need it are fitted on the validation split."""
    replace_champion: bool = False
    """Move the alias champion also when the present one cannot be measured on this dataset's validation split."""
    search: SearchConfig = SearchConfig()
    scale: ScaleConfig = ScaleConfig()
    """Of each trial; --scale.num-workers 0 trains in the trial's own process, without Ray Train."""
    tracking: TrackingConfig = TrackingConfig()


def main(job: TuneJob) -> int:
    """Search, tell, register."""
    _check(job)
    _warn_of_relative_paths(job)
    from rayjobs.actor_pool import connect_stoppable
    from rayjobs.courier import MetricsCourier
    from rayjobs.folder_lock import locked
    from rayjobs.resources import plan_workers
    from rayjobs.search import claim, default_name, search_identity
    from rayjobs.tracking import DatasetSource, open_tracking
    from rayjobs.train import loop_config

    task = TASKS[job.task]
    tracking = open_tracking(job.tracking, job.task)
    connect_stoppable()
    in_process = job.scale.num_workers == 0
    scale = replace(job.scale, num_workers=1, use_gpu=False) if in_process else job.scale
    plan = plan_workers(scale, concurrent_trainings=job.search.max_concurrent)
    base = loop_config(
        task_name=job.task, recipe=job.recipe, dataset_uri=job.dataset, output=job.output, name="base", scale=job.scale, plan=plan
    )
    dataset = base.train.dataset
    identity = search_identity(task, job.recipe, dataset.digest, job.search)
    folder = Folder(f"{job.output}/{job.name or default_name(identity)}")
    with ExitStack() as stack:
        stack.enter_context(locked(folder, ".lock", "tune"))
        claim(folder, identity, type(job.recipe))
        folder.delete("STOP")
        folder.delete("ray")
        print(f"search: {folder.uri}", flush=True)
        run = tracking.start_run(
            json_digest(["tune", job.task, folder.uri]),
            name=folder.uri.rsplit("/", 1)[1],
            params={**to_dict(job.recipe), "search": to_dict(job.search)},
            tags={"cad.task": job.task, "cad.run_folder": folder.uri, "cad.recipe_digest": digest(job.recipe), "cad.kind": "search"},
            dataset=DatasetSource(uri=job.dataset, digest=dataset.digest),
        )
        courier = stack.enter_context(MetricsCourier())
        tracked = stack.enter_context(TrackedTrials(job, folder, tracking, run, courier))
        live, signalled = _searched(job, folder, base, plan, in_process, tracked)
        if live.stopping:
            tracked.interrupt_unfinished(live)
            run.finish("KILLED")
            print(f"stopped; running trials left checkpoints in {folder.path('trials')}: the same command goes on from there", flush=True)
            return 130 if signalled == signal.SIGINT else EXIT_STOPPED
        tracked.drain()
        return _concluded(job, folder, base, plan, live, tracking, run)


def _check(job: TuneJob) -> None:
    if job.combine:
        check_rule(job.task, job.combine)
    for flag, value in {
        "--search.num-samples": job.search.num_samples,
        "--search.max-concurrent": job.search.max_concurrent,
        "--ensemble-size": job.ensemble_size,
    }.items():
        if value < 1:
            raise ValueError(f"{flag} {value}: at least 1 is needed")
    for flag, value in {"--search.num-startup-trials": job.search.num_startup_trials, "--search.grace-epochs": job.search.grace_epochs}.items():
        if value < 0:
            raise ValueError(f"{flag} {value}: must not be negative")


def _warn_of_relative_paths(job: TuneJob) -> None:
    """A submitted job's working directory is a copy that Ray deletes."""
    if "/runtime_resources/working_dir_files/" not in os.getcwd() + "/":
        return
    given = {"--output": job.output, "--tracking.folder": "" if os.environ.get("MLFLOW_TRACKING_URI") else job.tracking.folder}
    for flag, value in given.items():
        if value and "://" not in value and not os.path.isabs(os.path.expanduser(value)):
            print(
                f"warning: {flag} {value} lies in Ray's copy of the working directory ({os.getcwd()}), which is deleted with the cluster's session: "
                "give an absolute path or a URI to keep it",
                file=sys.stderr,
                flush=True,
            )


# --- searching ------------------------------------------------------------------------------------------------------------------------------
def _searched(
    job: TuneJob, folder: Folder, base: Any, plan: WorkerPlan, in_process: bool, tracked: "TrackedTrials"
) -> tuple["LiveSearch", int]:
    """Run what is left of the search; also the signal that asked it to stop, or 0."""
    from rayjobs.live_runs import LiveSearch
    from rayjobs.trials import TrialSetting, run_trials, stopping_on_signals

    shown = _Lines(job.search, TASKS[job.task].score)

    def ended(trial: Trial) -> None:
        tracked.end_trial(live, trial)
        shown.show(trial, live.journal.trials)

    live = LiveSearch(
        folder=folder, task=TASKS[job.task], base=job.recipe, config=job.search, on_start=tracked.start_trial, on_end=ended
    )
    earlier = live.journal.trials[: job.search.num_samples]
    reused, resumed = sum(trial.finished for trial in earlier), sum(not trial.finished for trial in earlier)
    if earlier:
        print(f"{reused} finished trials reused, {resumed} begun ones go on, of {job.search.num_samples}", flush=True)
    else:
        _tell_if_outside(job.recipe, job.task)
    tracked.adopt(live)
    setting = TrialSetting(
        folder=folder.uri, base=replace(base, report=False), plan=None if in_process else plan, cache_bytes=int(job.scale.cache_gb * 1e9)
    )
    own = {"CPU": plan.cpus_per_worker if in_process else _TRIAL_CPUS}
    with stopping_on_signals(live) as received:
        run_trials(live, setting, own, max_concurrent=job.search.max_concurrent)
    if live.exhausted:
        print(f"the search space holds no further recipe: {len(live.journal.trials)} trials instead of {job.search.num_samples}", flush=True)
    elif live.num_left() and not live.stopping:
        raise ValueError(f"Ray Tune ended with {live.num_left()} trials not run; the same command goes on with them")
    return live, received[0] if received else 0


def _tell_if_outside(recipe: Recipe, task: str) -> None:
    from rayjobs.search import base_params

    if base_params(TASKS[task], recipe) is None:
        print(
            "the base recipe has values that the search space cannot give: it is tried first, but the sampler learns nothing from it", flush=True
        )


class _Lines:
    """A line for every trial that ended."""

    def __init__(self, config: SearchConfig, score: Score) -> None:
        self._config, self._score = config, score
        self._started, self._count = time.monotonic(), 0

    def show(self, trial: Trial, trials: list[Trial]) -> None:
        """Tell what became of a trial, the best so far and the time that is left."""
        from rayjobs.progress import duration
        from rayjobs.search import best_trials

        self._count += 1
        done = sum(t.finished for t in trials)
        left = (time.monotonic() - self._started) / self._count * (self._config.num_samples - done)
        result = trial.reason if trial.state == "failed" else f"{self._score.name} {trial.score:.4f} after {trial.num_epochs} epochs"
        best = best_trials(trials, self._score, 1)
        told = f", best {best[0].score:.4f} (trial {best[0].number})" if best else ""
        print(f"{done}/{self._config.num_samples} trial {trial.number} {trial.state}: {result}{told}, {duration(left)} left", flush=True)


# --- tracking -------------------------------------------------------------------------------------------------------------------------------
class TrackedTrials(TrackedRuns):
    """Every trial as a child run."""

    def __init__(self, job: TuneJob, folder: Folder, tracking: "Tracking", parent: "TrackedRun", courier: "MetricsCourier") -> None:
        super().__init__(tracking, parent, courier)
        self._job, self._folder = job, folder

    def adopt(self, live: "LiveSearch") -> None:
        """End the runs of trials that finished just before an earlier driver was killed."""
        for trial in live.journal.trials:
            if trial.finished and not trial.run_id:
                self.end_trial(live, trial)

    def start_trial(self, trial: Trial) -> None:
        """Begin (or go on with) a trial's run."""
        self.start(self._child(trial))

    def end_trial(self, live: "LiveSearch", trial: Trial) -> None:
        """Deliver a trial's figures and end its run."""
        self.end(self._child(trial), trial.state, trial.reason, on_id=partial(live.journal.note_run, trial.number))

    def interrupt_unfinished(self, live: "LiveSearch") -> None:
        """Mark the runs of unfinished trials as stopped."""
        done = {_run_name(trial) for trial in live.journal.trials if trial.finished}
        self.interrupt(done.__contains__)

    def _child(self, trial: Trial) -> ChildRun:
        return ChildRun(
            key=json_digest(["trial", self._folder.uri, trial.digest]),
            name=_run_name(trial),
            folder=self._folder / f"trials/{trial.digest}",
            params=to_dict(replace_all(self._job.recipe, trial.values)),
            tags={"cad.task": self._job.task, "cad.recipe_digest": trial.digest, "cad.kind": "trial"},
        )


def _run_name(trial: Trial) -> str:
    return f"trial-{trial.number:03d}"


# --- the end --------------------------------------------------------------------------------------------------------------------------------
def _concluded(
    job: TuneJob, folder: Folder, base: Any, plan: WorkerPlan, live: "LiveSearch", tracking: "Tracking", run: "TrackedRun"
) -> int:
    """Table, registry, champion, page."""
    from rayjobs.search import best_trials
    from rayjobs.search_report import count_by_state, report_page, table_csv, table_text

    task = TASKS[job.task]
    trials = live.journal.trials[: job.search.num_samples]
    folder.write_bytes("trials.csv", table_csv(trials, job.recipe))
    table = table_text(trials, job.recipe, task.score)
    print(f"\n{table}\n\n{count_by_state(trials)}", flush=True)
    title = folder.uri.rsplit("/", 1)[1]
    best = best_trials(trials, task.score, job.ensemble_size)
    notes = [f"{task.score.name} ({task.score.mode}imised), {count_by_state(trials)}"]
    if best:
        notes += _registered(job, folder, base, plan, live, best, tracking, run)
    folder.write_bytes("report.html", report_page(trials, job.recipe, task, title=title, notes=notes).encode())
    for name in ("trials.csv", "report.html"):
        run.log_content(name, folder.read_bytes(name))
    if not best:
        run.finish("FAILED")
        print(
            f"error: none of {len(trials)} trials is complete; the reasons are in the table above and in {folder.path('trials.csv')}",
            file=sys.stderr,
        )
        return 1
    run.finish()
    print(f"table: {folder.path('trials.csv')}\nplots: {folder.path('report.html')}", flush=True)
    return 0


def _registered(
    job: TuneJob,
    folder: Folder,
    base: Any,
    plan: WorkerPlan,
    live: "LiveSearch",
    best: list[Trial],
    tracking: "Tracking",
    run: "TrackedRun",
) -> list[str]:
    """Measure, register, crown; returns the lines for the report."""
    from rayjobs.champion import Candidate, Measuring, enrol, select
    from rayjobs.search_report import beside_the_base_recipe, member_table

    task = TASKS[job.task]
    measuring = Measuring(
        base=base,
        num_tasks=job.search.max_concurrent * max(1, job.scale.num_workers),
        cpus_per_task=plan.cpus_per_worker,
        use_gpu=plan.use_gpu,
        cache_bytes=int(job.scale.cache_gb * 1e9),
    )
    search = folder.uri.rsplit("/", 1)[1]
    candidates = [
        Candidate(
            name=f"trial {trial.number}",
            folder=f"trials/{trial.digest}",
            run_id=live.journal.trials[trial.number].run_id,
            tags={"search": search, "trial": str(trial.number)},
        )
        for trial in best
    ]
    selection = select(folder, task, candidates, measuring, rule=job.combine or task.combine_rules[0])
    figures = member_table(selection, task.score)
    print(f"\n{figures}\n", flush=True)
    told = enrol(tracking, folder, task, candidates, selection, measuring, run_id=run.run_id, replace_champion=job.replace_champion)
    print(told, flush=True)
    run.log_metrics({f"ensemble/{name}": value for name, value in selection["metrics"].items()})
    beside = beside_the_base_recipe(folder, live.journal.trials[0], best[0], task.score)
    print(beside, flush=True)
    return [figures, told, beside]


if __name__ == "__main__":
    run_job(TuneJob, main)
