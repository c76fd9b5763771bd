"""Joining or starting Ray, and asking for no more than can ever be had."""

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rayjobs.capacity import Capacity, Node, cluster_capacity, room

# Ray's own defaults, for jobs, tests and workers alike, where the user has set nothing. Why each: see the comments.
_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every line is printed twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",  # one report is consumed per interval: the default of 2 s delays every epoch
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # jobs show their own progress
    "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "300",  # a starved pipeline ends with an error that names the operator
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep meaning what they meant to the user
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_ARENA_MAX": "2",  # glibc gives each thread an arena that keeps what was freed in it: workers would grow with the data they have seen
}
# On a cluster that this process joins: a node that is still to come takes minutes, and other jobs may hold what is there.
_JOINED = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "900"}
LOSSES_WITHOUT_PROGRESS = 6
"""One after the other, with no evaluation in between, so many losses of a training's or a trial's processes are taken for bad luck; one more, and something
in it ends them. Machines that come and go make any number with progress in between."""
# Of the AWS variables those that say where, not who: a runtime environment is shown in dashboards and logs, so credentials do not travel in it.
# The nodes have their own (cluster/README.md).
_STORAGE_PLACES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """How much of a cluster a job asks for; changes no figure beyond rounding (cache_gb changes the order of batches)."""

    num_workers: int = 1
    """Training processes (DDP), or the most processes of prepare and embed. 0 = training: in this process, without Ray; prepare, embed: as many
    as there are cores (or GPUs), more as the cluster grows."""
    cpus_per_worker: float = 0.0
    """CPUs that each worker holds; 0 = a fitting share of what the cluster has or may grow to."""
    use_gpu: bool | None = None
    """Whether each worker holds a GPU; unset = if the cluster has, or may grow to, one for each."""
    threads_per_worker: int = 0
    """Compute threads of a worker; 0 = its share of the CPUs."""
    cache_gb: float = 0.25
    """Training and evaluation splits up to this size (in GB, each) are read once and held in memory; larger ones stream."""
    reader_threads: int | None = None
    """Threads of each worker that read a streamed split ahead; 0 = Ray Data tasks on any node's cores do. Unset = 2 threads on a single machine, Ray
    Data on a cluster of several."""
    memory_gb: float = 4.0
    """Memory, in GB, that parsing and rendering one object may take."""
    timeout_s: float = 120.0
    """Seconds that parsing and rendering one object may take."""

    def __post_init__(self) -> None:
        if self.reader_threads is not None and self.reader_threads < 0:
            raise ValueError(f"--scale.reader-threads {self.reader_threads} must be at least 0 (0 = tasks of Ray Data)")


@dataclass(frozen=True, kw_only=True)
class TrainScaleConfig(ScaleConfig):
    """As `ScaleConfig`, for one training."""

    min_workers: int = 0
    """Start with as many workers as there is room for, from this to --scale.num-workers; go on with fewer after a loss, grow when nodes come. The
    global batches stay the same, so only numbers of workers are used that share them alike (of 8: 1, 2, 4, 8). 0 = always --scale.num-workers."""
    resize_s: float = 60.0
    """With --scale.min-workers: train at least so long before a restart with more workers, which costs about ten seconds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.min_workers <= max(self.num_workers, 0):
            raise ValueError(
                f"--scale.min-workers {self.min_workers} must be from 0 to --scale.num-workers ({self.num_workers}): it is the least of them to train with"
            )
        if self.resize_s < 0:
            raise ValueError(f"--scale.resize-s {self.resize_s:g} must be at least 0")


def set_defaults() -> None:
    """Set the environment that Ray reads at import and start; a user's own values win. Call before the first ``ray`` call."""
    for name, value in {**_ENVIRONMENT, **(_JOINED if os.environ.get("RAY_ADDRESS") else {})}.items():
        os.environ.setdefault(name, value)


def forwarded_environment() -> dict[str, str]:
    """What a cluster's workers get of this process's environment: settings, no credentials. A local Ray's inherit all of it."""
    named = (*_ENVIRONMENT, *_STORAGE_PLACES)
    return {name: value for name, value in os.environ.items() if name in named or name.startswith(("CAD_", "OMP_"))}


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names (a submitted job always has one), else start a local one that ends with this process.

    The local one has at least 6 logical CPUs: Ray counts slots, not cores, and a driver, its workers and a data task each hold one.
    """
    set_defaults()
    import ray  # late: --help needs this module's configs, not Ray

    if ray.is_initialized():
        return
    settings = {"log_to_driver": os.environ.get("CAD_WORKER_LOGS") == "1", "logging_level": "warning"}
    # Workers see the cluster's environment, not this shell's: hand them what changes their behaviour.
    runtime_env = {"env_vars": forwarded_environment()}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(runtime_env=runtime_env, **settings)
        return
    # Ray says at every start that it protects a local cluster by a token; it should, and it needs no saying.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    for attempt in (1, 2, 3):
        try:
            ray.init(
                address="local",
                num_cpus=max(6, 3 * (os.cpu_count() or 1)),
                include_dashboard=True,  # Ray Train reads its workers' state through it
                dashboard_host="127.0.0.1",
                runtime_env=runtime_env,
                **settings,
            )
            return
        except Exception as error:  # Ray raises a bare Exception when its processes take longer than 30 s to start
            if attempt == 3 or "timed out during startup" not in str(error):
                raise
            print("Ray did not start in time on this busy machine: trying again", file=sys.stderr, flush=True)
            ray.shutdown()


@dataclass(frozen=True, kw_only=True)
class WorkerPlan:
    """What the workers of one training get."""

    num_workers: int
    cpus_per_worker: float
    use_gpu: bool
    threads_per_worker: int
    min_workers: int = 0
    """Training may go on with as few as that; 0 = it may not."""
    asked_workers: int = 0
    """With ``min_workers``: how many were asked for, be there room for them or not; the global batches are those of so many."""
    resize_s: float = 60.0
    """Least seconds between growing and growing again."""

    def with_workers(self, number: int) -> "WorkerPlan":
        """The same for a fixed number of workers."""
        return replace(self, num_workers=number, min_workers=0)

    @property
    def resources_per_worker(self) -> dict[str, float]:
        """As Ray Train takes it."""
        return {"CPU": self.cpus_per_worker, **({"GPU": 1.0} if self.use_gpu else {})}


def concurrent_trainings(scale: ScaleConfig) -> int:
    """Trainings of this scale that the cluster has, or may get, room for at once, at least one; needs Ray."""
    capacity = cluster_capacity()
    share, num_workers = scale.cpus_per_worker or 1.0, max(1, scale.num_workers)
    gpus = sum(int(node.gpus) for node in capacity.most)
    on_gpu = scale.use_gpu if scale.use_gpu is not None else gpus >= num_workers
    if os.environ.get("RAY_ADDRESS"):
        fitting = room(capacity.most, share, 1.0 if on_gpu else 0.0)
        fitting = min(fitting, int((sum(node.cpus for node in capacity.most) - _DATA_CPUS) // share))
    else:  # a local Ray counts more slots than cores
        fitting = min([int((os.cpu_count() or 1) // share), *([gpus] if on_gpu else [])])
    return max(1, fitting // num_workers)


def plan_workers(scale: ScaleConfig, *, concurrent_trainings: int = 1) -> WorkerPlan:
    """Fit workers into the cluster as it is or may grow, keeping one CPU for the driver's and Ray Data's tasks.

    Raises:
        ValueError: the request can never be met; says what was asked, what there is and may come, and what would fit.
    """
    return fit_workers(scale, cluster_capacity(), concurrent_trainings=concurrent_trainings, joined=bool(os.environ.get("RAY_ADDRESS")))


def plan_elastic(scale: TrainScaleConfig) -> WorkerPlan:
    """`plan_workers` for a training that may have fewer workers than it asks for: the most that ever fit.

    Raises:
        ValueError: not even --scale.min-workers do.
    """
    if scale.min_workers == 0:
        return plan_workers(scale)
    return elastic_plan(scale, cluster_capacity(), joined=bool(os.environ.get("RAY_ADDRESS")))


def elastic_plan(scale: TrainScaleConfig, capacity: Capacity, *, joined: bool) -> WorkerPlan:
    """`plan_elastic` for a given cluster."""
    for number in range(scale.num_workers, scale.min_workers - 1, -1):
        try:
            plan = fit_workers(replace(scale, num_workers=number), capacity, concurrent_trainings=1, joined=joined)
        except ValueError:
            if number == scale.min_workers:
                raise
            continue
        return replace(plan, min_workers=scale.min_workers, asked_workers=scale.num_workers, resize_s=scale.resize_s)
    raise AssertionError("min_workers is at most num_workers")


def fit_workers(scale: ScaleConfig, capacity: Capacity, *, concurrent_trainings: int, joined: bool) -> WorkerPlan:
    """`plan_workers` for a given cluster.

    Args:
        joined: Whether the CPUs of its nodes are cores; those of a local Ray are slots.
    """
    nodes = capacity.most
    num_workers = max(1, scale.num_workers)
    wanted = num_workers * concurrent_trainings
    asked = f"--scale.num-workers {num_workers}{_times(concurrent_trainings)}"
    gpus = sum(int(node.gpus) for node in nodes)
    use_gpu = scale.use_gpu if scale.use_gpu is not None else 0 < wanted <= gpus
    if use_gpu and wanted > gpus:
        raise ValueError(
            f"{asked} with --scale.use-gpu True needs {wanted} GPUs, the cluster has {capacity.describe()}: "
            + _fewer(gpus, num_workers, concurrent_trainings, "leave --scale.use-gpu out")
            + _growth_hint(capacity, joined)
        )
    gpus_each = 1.0 if use_gpu else 0.0
    most = _largest_share(nodes, wanted, gpus_each)
    share = scale.cpus_per_worker or most
    if share == 0.0 or room(nodes, share, gpus_each) < wanted or share * wanted > sum(node.cpus for node in nodes) - _DATA_CPUS + _ROUNDING:
        each = f" at {share:g} CPUs each" if share else ""
        on = " beside a GPU" if use_gpu else ""
        largest = max((node.cpus for node in nodes if node.gpus >= gpus_each), default=0.0)
        if most:
            remedy = f"use --scale.cpus-per-worker {most:g} (no node has more than {largest:g} CPUs{on}) or fewer workers"
        else:
            remedy = _fewer(_most_workers(nodes, gpus_each), num_workers, concurrent_trainings, "add nodes")
        raise ValueError(
            f"{asked}{each} needs {share * wanted:g} CPUs{on}, and one for data; the cluster has {capacity.describe()}: {remedy}"
            + _growth_hint(capacity, joined)
        )
    return WorkerPlan(
        num_workers=num_workers,
        cpus_per_worker=share,
        use_gpu=use_gpu,
        threads_per_worker=scale.threads_per_worker or _threads(nodes, wanted, num_workers, share, gpus_each, joined),
    )


# For Ray Data and for what starts and watches the trainings: without it they would wait for each other for ever.
_DATA_CPUS = 1.0
_ROUNDING = 1e-6


def _largest_share(nodes: Sequence[Node], wanted: int, gpus: float) -> float:
    """The most CPUs, in hundredths up to 1, that each of so many workers can hold; 0 = they do not fit at all."""
    spare = sum(node.cpus for node in nodes) - _DATA_CPUS
    for hundredths in range(100, 0, -1):
        share = hundredths / 100
        if share * wanted <= spare + _ROUNDING and room(nodes, share, gpus) >= wanted:
            return share
    return 0.0


def _most_workers(nodes: Sequence[Node], gpus: float) -> int:
    spare = sum(node.cpus for node in nodes) - _DATA_CPUS
    return max(0, min(room(nodes, 0.01, gpus), int(spare * 100)))


def _fewer(most: int, num_workers: int, concurrent_trainings: int, else_: str) -> str:
    """What would fit, in the user's flags."""
    if most >= num_workers:
        return f"ask for at most {most // num_workers} trainings at once (--search.max-concurrent, --max-concurrent), for fewer workers, or {else_}"
    if most >= concurrent_trainings:
        return f"ask for at most {most // concurrent_trainings} workers, or {else_}"
    return else_


def _growth_hint(capacity: Capacity, joined: bool) -> str:
    if capacity.groups or not joined:
        return ""
    return "; if an autoscaler may add nodes, say which in CAD_NODE_GROUPS (see cluster/README.md)"


def _threads(nodes: Sequence[Node], wanted: int, num_workers: int, share: float, gpus: float, joined: bool) -> int:
    """Compute threads of a worker: its part of the cores of a node that holds as many of them as it can."""
    cores = os.cpu_count() or 1
    if not joined:
        return max(1, cores // wanted) if not gpus else max(1, min(8, cores // num_workers))
    # Only the driver's own machine is known to have other than the counted CPUs: what nodes declare is what counts.
    of_each = [node.cpus / min(wanted, fitting) for node in nodes if (fitting := node.room(share, gpus)) > 0]
    threads = max(1, int(min(of_each)))
    if len(nodes) == 1:
        # This very machine, which may declare more CPUs than it has cores: a submitted training has the threads of one that is run directly, and its numbers.
        threads = min(threads, max(1, cores // wanted))
    return min(8, threads) if gpus else threads


def _times(concurrent: int) -> str:
    return f" x {concurrent} trainings at once" if concurrent > 1 else ""
