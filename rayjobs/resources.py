"""Joining or starting Ray, and asking for no more than can ever be had."""

import logging
import os
import sys
from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """How much of a cluster a job asks for; changes no figure beyond rounding (cache_gb changes the order of batches)."""

    num_workers: int = 1
    """Training processes (DDP), or the most processes of prepare and embed. 0 = training: in this process, without Ray; prepare, embed: as many
    as there are cores (or GPUs), more as the cluster grows."""
    cpus_per_worker: float = 0.0
    """CPUs that each worker holds; 0 = a fitting share of what the cluster has."""
    use_gpu: bool | None = None
    """Whether each worker holds a GPU; unset = if the cluster has one for each."""
    threads_per_worker: int = 0
    """Compute threads of a worker; 0 = its share of the CPUs."""
    cache_gb: float = 0.25
    """Training and evaluation splits up to this size (in GB, each) are read once and held in memory; larger ones stream."""
    memory_gb: float = 4.0
    """Memory, in GB, that parsing and rendering one object may take."""
    timeout_s: float = 120.0
    """Seconds that parsing and rendering one object may take."""


def set_defaults() -> None:
    """Set the environment that Ray reads at import and start; a user's own values win. Call before the first ``ray`` call."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


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
    forwarded = {k: v for k, v in os.environ.items() if k in _ENVIRONMENT or k.startswith(("CAD_", "OMP_", "AWS_"))}
    runtime_env = {"env_vars": forwarded}
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

    @property
    def resources_per_worker(self) -> dict[str, float]:
        """As Ray Train takes it."""
        return {"CPU": self.cpus_per_worker, **({"GPU": 1.0} if self.use_gpu else {})}


def concurrent_trainings(scale: ScaleConfig) -> int:
    """Trainings of this scale that the cluster has room for at once, at least one; needs Ray."""
    import ray

    total = ray.cluster_resources()
    # A local Ray counts more slots than cores; a cluster's nodes count their cores.
    cpus = total.get("CPU", 1.0) - 1.0 if os.environ.get("RAY_ADDRESS") else float(os.cpu_count() or 1)
    fitting = [int(cpus // (scale.num_workers * (scale.cpus_per_worker or 1.0)))]
    gpus = int(total.get("GPU", 0))
    if scale.use_gpu or (scale.use_gpu is None and gpus >= scale.num_workers):
        fitting.append(gpus // scale.num_workers)
    return max(1, min(fitting))


def plan_workers(scale: ScaleConfig, *, concurrent_trainings: int = 1) -> WorkerPlan:
    """Fit workers into the cluster, keeping one CPU for the driver's and Ray Data's tasks.

    Raises:
        ValueError: the request can never be met by the nodes that are up; says what was asked, what there is and what would fit.
    """
    import ray

    total = ray.cluster_resources()
    cpus, gpus = total.get("CPU", 0.0), int(total.get("GPU", 0))
    num_workers = max(1, scale.num_workers)
    wanted = num_workers * concurrent_trainings
    use_gpu = scale.use_gpu if scale.use_gpu is not None else 0 < wanted <= gpus
    if use_gpu and wanted > gpus:
        raise ValueError(
            f"--scale.num-workers {num_workers}{_times(concurrent_trainings)} with --scale.use-gpu needs {wanted} GPUs, the cluster has {gpus}: "
            f"ask for at most {gpus // concurrent_trainings} workers or leave --scale.use-gpu out"
        )
    spare = cpus - 1.0
    share = scale.cpus_per_worker or min(1.0, max(0.01, int(100 * spare / wanted) / 100))
    if share * wanted > spare:
        raise ValueError(
            f"--scale.num-workers {num_workers}{_times(concurrent_trainings)} at {share:g} CPUs each needs {share * wanted:g} CPUs beside one for data, "
            f"the cluster has {cpus:g}: use --scale.cpus-per-worker {max(0.01, int(100 * spare / wanted) / 100):g} or fewer workers"
        )
    cores = os.cpu_count() or 1
    threads = scale.threads_per_worker or max(1, cores // wanted if not use_gpu else min(8, cores // max(1, num_workers)))
    return WorkerPlan(num_workers=num_workers, cpus_per_worker=share, use_gpu=use_gpu, threads_per_worker=threads)


def _times(concurrent: int) -> str:
    return f" x {concurrent} trials at once" if concurrent > 1 else ""
