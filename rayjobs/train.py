"""Parquet -> checkpoints and an MLflow run: one training of one recipe, on any number of workers (Ray Train, DDP).

    python rayjobs/train.py --task alignment --dataset ds/
    python rayjobs/train.py --task alignment --dataset ds/ --model.num-experts 8 --optim.lr 3e-4 --scale.num-workers 8
    python rayjobs/train.py --task alignment --dataset ds/ --smoke --scale.num-workers 0        # in this process, without Ray
    python rayjobs/train.py --task alignment --dataset ds/ --seeds 76 100 123 --register        # one member a seed, then their ensemble
    python rayjobs/train.py --task alignment --list-runs                                        # trainings by name: --run NAME

Killed or stopped (Ctrl-C, SIGTERM, a file named STOP in the run's folder), the same command goes on where it was.
"""

import contextlib
import csv
import dataclasses
import functools
import io
import json
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tyro

from cad_models.config import Recipe, digest, json_digest, to_dict
from cad_models.dataset import Folder
from cad_models.tasks import TASKS
from rayjobs.cli import EXIT_STOPPED, RecipeFlags, TrackingConfig, UsageError, check_rule, run_job
from rayjobs.resources import LOSSES_WITHOUT_PROGRESS, ScaleConfig, TrainScaleConfig, WorkerPlan

if TYPE_CHECKING:
    from rayjobs.loop import LoopConfig


FIGURES_NAME = "figures.csv"
"""In a run's folder: all test figures of the run and, where they were asked for, of the baselines."""


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One training."""

    task: str
    """Which room: see cad_models/tasks.py."""
    recipe: RecipeFlags
    smoke: bool = False
    """The task's smoke recipe: the same code in seconds on a CPU."""
    dataset: str = tyro.MISSING
    """The dataset folder (path or URI) that prepare.py and embed.py made."""
    run: str = ""
    """One of the task's named runs: its recipe and seeds, which other flags still change."""
    list_runs: bool = False
    """Tell the task's named runs, and end."""
    dry_run: bool = False
    """Tell the full command line and the recipe, and end; needs no dataset."""
    seeds: tuple[int, ...] = ()
    """Train one member a seed, in <output>/<name>/seed_<s>/, and tell each one's figures and their ensemble's; empty = one run, with --seed."""
    max_concurrent: int = 0
    """Seeds at once; 0 = as many as the cluster has room for."""
    combine: str = ""
    """Rule of the seeds' ensemble, one of the task's; empty = its first. Rules that need it are fitted on the validation split."""
    register: bool = False
    """Register the seeds' members and their ensemble; the alias champion moves only to something better, as in tune.py."""
    replace_champion: bool = False
    """Move the alias champion also when the present one cannot be measured on this dataset's validation split."""
    output: str = "outputs/runs"
    """Folder (path or URI, shared by all nodes) for runs; this one's is <output>/<name>."""
    name: str = ""
    """The run's name; empty = from the digests of recipe and dataset, so that the same command resumes the same run."""
    baselines: bool = False
    """Compare with the task's baselines on the test split: those that need no training, and those that do (trained as runs of their own)."""
    checkpoint_every_steps: int = 0
    """Checkpoint within an epoch too, every so many steps; 0 = at the ends of epochs only."""
    scale: TrainScaleConfig = TrainScaleConfig()
    tracking: TrackingConfig = TrackingConfig()


def main(job: TrainJob) -> int:
    """Train, track, tell."""
    from rayjobs.named_runs import dry_run_text, runs_text

    if job.list_runs:
        print(runs_text(TASKS[job.task]))
        return 0
    check_flags(job)
    if job.dry_run:
        print(dry_run_text(job))
        return 0
    if job.seeds:
        from rayjobs.seeds import train_seeds

        return train_seeds(job)
    return _train_one(job)


def check_flags(job: TrainJob) -> None:
    """Raises UsageError for flags that exclude or need each other."""
    if job.combine:
        check_rule(job.task, job.combine)
    if not job.seeds:
        for flag, value in {"--combine": job.combine, "--register": job.register, "--max-concurrent": job.max_concurrent}.items():
            if value:
                raise UsageError(f"{flag} is about the members of --seeds: give --seeds, or leave {flag} out")
    if len(set(job.seeds)) < len(job.seeds) or any(seed < 0 for seed in job.seeds):
        raise UsageError(f"--seeds {' '.join(map(str, job.seeds))}: seeds must be different numbers of at least 0")
    if job.seeds and job.baselines:
        raise UsageError("--baselines compares one run: leave --seeds or --baselines out")
    if job.seeds and job.scale.min_workers:
        raise UsageError("--scale.min-workers is for one training: leave --seeds or --scale.min-workers out")
    if job.max_concurrent < 0:
        raise UsageError(f"--max-concurrent {job.max_concurrent} must be at least 0 (0 = as many as there is room for)")


def _train_one(job: TrainJob) -> int:
    from rayjobs.courier import MetricsCourier
    from rayjobs.resources import connect, plan_elastic
    from rayjobs.tracked_runs import log_result
    from rayjobs.tracking import DatasetSource, open_tracking

    plan = None
    if job.scale.num_workers > 0:
        connect()
        plan = plan_elastic(job.scale)
    loop = _loop_config(job, plan)
    folder = Folder(loop.run_folder)
    print(f"run: {folder.uri}", flush=True)
    tracking = open_tracking(job.tracking, job.task)
    run = tracking.start_run(
        json_digest([job.task, folder.uri]),
        name=folder.uri.rsplit("/", 1)[1],
        params=to_dict(job.recipe),
        tags={"cad.task": job.task, "cad.run_folder": folder.uri, "cad.recipe_digest": digest(job.recipe)},
        dataset=DatasetSource(uri=job.dataset, digest=loop.train.dataset.digest),
        open_now=plan is None,  # else while workers start
    )
    with MetricsCourier([(loop.run_folder, run)]):
        finished = fit(loop, plan)
    if not finished:
        run.finish("KILLED")
        print(f"stopped with a checkpoint in {folder.path('last')}: the same command goes on from there", flush=True)
        return EXIT_STOPPED
    result = log_result(run, folder)
    run.finish()
    table = {"this run": _split_figures(result["metrics"], "test")}
    if job.baselines:
        table |= _references(loop)
        for name, recipe in TASKS[job.task].baseline_recipes(job.recipe).items():
            print(f"baseline: {name}", file=sys.stderr, flush=True)
            twin = dataclasses.replace(job, recipe=recipe, name=f"{job.name}-{name.replace(' ', '-')}" if job.name else "")
            twin_loop = _loop_config(twin, plan)
            if not fit(twin_loop, plan):
                return EXIT_STOPPED
            table[name] = _split_figures(Folder(twin_loop.run_folder).read_json("result.json")["metrics"], "test")
    print_result(result, folder, table)
    return 0


def _references(loop: "LoopConfig") -> dict[str, dict[str, float]]:
    from rayjobs.streams import concatenated

    columns = concatenated(list(loop.test.parts(0, 1)))
    beside = None if loop.reference is None else concatenated(list(loop.reference.parts(0, 1)))
    return TASKS[loop.task].references(columns, loop.recipe, beside)


def _split_figures(metrics: dict[str, float], split: str) -> dict[str, float]:
    return {name.removeprefix(f"{split}/"): value for name, value in metrics.items() if name.startswith(f"{split}/")}


def _loop_config(job: TrainJob, plan: WorkerPlan | None) -> "LoopConfig":
    return loop_config(
        task_name=job.task,
        recipe=job.recipe,
        dataset_uri=job.dataset,
        output=job.output,
        name=job.name,
        scale=job.scale,
        plan=plan,
        checkpoint_every_steps=job.checkpoint_every_steps,
    )


def loop_config(
    *,
    task_name: str,
    recipe: Recipe,
    dataset_uri: str,
    output: str,
    name: str,
    scale: ScaleConfig,
    plan: WorkerPlan | None,
    checkpoint_every_steps: int = 0,
) -> "LoopConfig":
    """All that the loop needs, checked against the dataset. Caches the splits in Ray's object store where they fit.

    Raises:
        ValueError: dataset, embeddings and recipe do not fit each other.
    """
    from rayjobs.loop import LoopConfig
    from rayjobs.streams import SplitStream, open_dataset

    task = TASKS[task_name]
    dataset = open_dataset(dataset_uri, task, recipe)
    streams = {split: SplitStream(dataset=dataset, recipe=recipe, split=split) for split in ("train", "val", "test")}
    if plan is not None:
        streams = {split: stream.cached(int(scale.cache_gb * 1e9), scale.reader_threads) for split, stream in streams.items()}
    return LoopConfig(
        task=task_name,
        recipe=recipe,
        signature=task.signature(recipe, dataset.signature_inputs),
        **streams,
        run_folder=Folder(f"{output}/{name or f'{task_name}-{digest(recipe, length=8)}-{json_digest(dataset.digest, length=8)}'}").uri,
        num_threads=plan.threads_per_worker if plan else (scale.threads_per_worker or 1),
        checkpoint_every_steps=checkpoint_every_steps,
    )


def fit(
    loop: "LoopConfig", plan: WorkerPlan | None, *, report: Callable[[dict[str, float]], None] | None = None, quiet: bool = False
) -> bool:
    """Train until the end (True) or a stop request (False); resumes what the run's folder holds.

    Args:
        plan: Workers to use; None = this process.
        report: Called with the metrics after each evaluation, when training in this process.
        quiet: Show no progress.

    Raises:
        ValueError: what is wrong with the request, or that training diverged.
    """
    from rayjobs.loop import Training, check_recipe

    folder = Folder(loop.run_folder)
    for leftover in ("STOP", "RESIZE", "error.json"):
        folder.delete(leftover)
    if folder.exists("result.json"):
        # Also a finished run must be the one that was asked for.
        check_recipe(loop)
        if not quiet:
            print(f"{folder.uri} is finished: reused", file=sys.stderr)
        return True
    with _stopping(folder), contextlib.nullcontext() if quiet else _shown(folder):
        if plan is None:
            Training(loop, report=report or (lambda metrics: None)).run()
        else:
            _fit_on_workers(loop, plan, folder)
    if folder.exists("error.json"):
        raise ValueError(folder.read_json("error.json")["error"])
    return folder.exists("result.json")


def _fit_on_workers(loop: "LoopConfig", plan: WorkerPlan, folder: Folder) -> None:
    from ray.train import TrainingFailedError

    from rayjobs.elastic import fit_elastic, reason_of, tell_on_stderr

    try:
        if plan.min_workers:
            attempt = functools.partial(_fit_workers, loop, max_failures=0)
            fit_elastic(loop, plan, attempt, num_evaluations=lambda: len(evaluations(folder)), tell=tell_on_stderr)
        else:
            _fit_while_it_gets_on(loop, plan, folder)
    except TrainingFailedError as error:
        raise ValueError(
            f"the workers failed again and again without an evaluation in between: {reason_of(error)} (CAD_TRACEBACK=1 shows all); what is finished "
            "is kept, and the same command goes on from there"
        ) from error


def _fit_while_it_gets_on(loop: "LoopConfig", plan: WorkerPlan, folder: Folder) -> None:
    """Ray Train restarts lost workers a few times; where that is not enough, again, as long as evaluations are made in between.

    Its controller, and the actors around it, it does not restart: when one of them was lost with its node or process, a few times even without progress.
    """
    from ray.train import ControllerError, TrainingFailedError

    failures = 0
    while True:
        done = len(evaluations(folder))
        try:
            return _fit_workers(loop, plan)
        except TrainingFailedError as error:
            failures = 0 if len(evaluations(folder)) > done else failures + 1
            if failures > (LOSSES_WITHOUT_PROGRESS if isinstance(error, ControllerError) else 0):
                raise


def _fit_workers(loop: "LoopConfig", plan: WorkerPlan, *, max_failures: int = LOSSES_WITHOUT_PROGRESS) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from rayjobs.capacity import cluster_capacity
    from rayjobs.leftovers import free_leftovers
    from rayjobs.loop import train_loop_per_worker

    class Trainer(TorchTrainer):
        """Without the process that watches for room left over (see `rayjobs.leftovers`), and without the one that deals out Ray Data sets: a worker makes
        its own stream (`rayjobs.streams`), which can be resumed at any step. Either takes seconds to start."""

        def _create_default_callbacks(self) -> list[Any]:
            unused = ("PlacementGroupCleanerCallback", "DatasetsCallback")
            return [callback for callback in super()._create_default_callbacks() if type(callback).__name__ not in unused]

    free_leftovers()
    folder = Folder(loop.run_folder)
    trainer = Trainer(
        train_loop_per_worker,
        train_loop_config={"loop": loop},
        torch_config=TorchConfig(timeout_s=300),
        scaling_config=ScalingConfig(num_workers=plan.num_workers, use_gpu=plan.use_gpu, resources_per_worker=plan.resources_per_worker),
        run_config=RunConfig(
            # Checkpoints are the run folder's: Ray's own record of an earlier attempt must not stand in the way of this one.
            # Its name is what the dashboard shows.
            name=f"{folder.uri.rsplit('/', 1)[1]}-{uuid.uuid4().hex[:8]}",
            storage_path=folder.path("ray"),
            failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=max_failures),
        ),
    )
    try:
        # A search's trial, in an actor, does not know how its cluster may grow.
        in_driver = ray.get_runtime_context().get_actor_id() is None
        with _watching_for_lost_nodes(not in_driver or len(cluster_capacity().most) > 1):
            trainer.fit()
    finally:
        folder.delete("ray")


@contextlib.contextmanager
def _watching_for_lost_nodes(wanted: bool) -> Iterator[None]:
    """Ray Train's process that asks whether a node of the workers is about to be taken away, and takes seconds to start. Where all of the cluster is one
    machine, that would take the driver too. A user's own setting wins."""
    name = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
    if wanted or name in os.environ:
        yield
        return
    os.environ[name] = "0"
    try:
        yield
    finally:
        del os.environ[name]


@contextlib.contextmanager
def _stopping(folder: Folder) -> Iterator[None]:
    """SIGTERM asks the run to stop with a checkpoint (the second one ends it at once)."""

    def ask(signum: int, frame: Any) -> None:
        folder.write_bytes("STOP", b"")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _shown(folder: Folder) -> Iterator[None]:
    """Show a run's progress: a line for each evaluation, and on a terminal a living one in between."""
    from rayjobs.progress import duration

    done = threading.Event()
    started = time.monotonic()
    terminal = sys.stderr.isatty()
    seen = len(evaluations(folder))

    def show() -> None:
        nonlocal seen
        while True:
            ended = done.wait(1.0)
            lines = evaluations(folder)
            for line in lines[seen:]:
                metrics = line["metrics"]
                text = ", ".join(f"{name} {metrics[name]:.4g}" for name in _told(metrics))
                print(f"{chr(13) + chr(27) + '[K' if terminal else ''}epoch {line['epoch']}: {text}", file=sys.stderr, flush=True)
            seen = max(seen, len(lines))
            if ended:
                return
            if terminal and folder.exists("progress.json"):
                now = folder.read_json("progress.json")
                fraction = (now["epoch"] + now["step"] / max(1, now["num_steps"])) / now["num_epochs"]
                left = (time.monotonic() - started) * (1 - fraction) / fraction if fraction > 0 else float("nan")
                loss = "" if now["loss"] is None else f", loss {now['loss']:.4g}"
                print(
                    f"\r\033[Kepoch {now['epoch'] + 1}/{now['num_epochs']}, step {now['step']}/{now['num_steps']}{loss}, "
                    f"{now['objects_per_s']:.0f} objects/s, {duration(left)} left",
                    end="",
                    file=sys.stderr,
                    flush=True,
                )

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)


def evaluations(folder: Folder) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in folder.read_bytes("metrics.jsonl").decode().splitlines()]
    except FileNotFoundError:
        return []


def _told(metrics: dict[str, float]) -> list[str]:
    wanted = ["train/loss", *sorted(n for n in metrics if n.startswith("best/")), "train/objects_per_s"]
    scores = [n.removeprefix("best/") for n in wanted if n.startswith("best/")]
    return [n for n in [wanted[0], *scores, *wanted[1:]] if n in metrics]


def print_result(result: dict[str, Any], folder: Folder, table: dict[str, dict[str, float]]) -> None:
    """The test figures of a run's best checkpoint beside those of the baselines, and where everything lies."""
    ended = f" after {result['num_epochs']} epochs, {result['ended']}" if "ended" in result else ""
    print(f"best {result['score_name']}: {result['score']:.4f}{ended}")
    if table["this run"]:
        from rayjobs.search_report import with_bounds

        bounds = {f"{name}_{side}" for name in table["this run"] for side in ("low", "high")}
        every = sorted(table["this run"].keys() - bounds, key=_natural)
        others = [figures for column, figures in table.items() if column != "this run"]
        # What can be compared, and what has no deeper path: all figures of all categories would hide these.
        names = [name for name in every if name.count("/") <= 1 or any(name in figures for figures in others)]
        cells = [[with_bounds(figures, name) if name in figures else "" for figures in table.values()] for name in names]
        width = max(len("test split"), *map(len, names))
        widths = [max(14, *map(len, column)) for column in zip(list(table), *cells, strict=True)]
        print("test split".ljust(width) + "".join(f"  {column:>{w}}" for column, w in zip(table, widths, strict=True)))
        for name, row in zip(names, cells, strict=True):
            print(name.ljust(width) + "".join(f"  {cell:>{w}}" for cell, w in zip(row, widths, strict=True)))
        if bounds & table["this run"].keys():
            print("[low, high]: 95 % confidence intervals")
        folder.write_bytes(FIGURES_NAME, _figures_csv(table))
        print(f"{f'{len(every) - len(names)} more figures' if len(every) > len(names) else 'these figures'}: {folder.path(FIGURES_NAME)}")
    print(f"best checkpoint: {folder.path(result['best'])}\nlast checkpoint: {folder.path('last')}")
    if folder.exists("report"):
        pages = [name for name in folder.names("report") if name.endswith(".html")]
        print(f"report: {folder.path('/'.join(['report', *pages[:1]]))}")
    sys.stdout.flush()


def _figures_csv(table: dict[str, dict[str, float]]) -> bytes:
    """One row a figure and bound, one column a run or baseline; empty where a column has no such figure."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(["figure", *table])
    for name in sorted({name for figures in table.values() for name in figures}, key=_natural):
        writer.writerow([name, *(figures.get(name, "") for figures in table.values())])
    return sink.getvalue().encode()


def _natural(name: str) -> list[Any]:
    return [(0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in re.split(r"(\d+)", name)]


if __name__ == "__main__":
    run_job(TrainJob, main)
