"""Units of work through a Ray Data actor pool: any number of workers, in any order, lost workers replaced."""

import logging
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rayjobs.capacity import Capacity, cluster_capacity, room
from rayjobs.cli import EXIT_STOPPED

# More blocks cost driver time, fewer leave workers idle at the end.
_MAX_BLOCKS = 2_000
_MOST_WORKERS = 10_000


@dataclass(frozen=True, kw_only=True)
class PoolSize:
    """How many workers, and what each holds."""

    min_workers: int
    max_workers: int
    cpus: float
    gpus: float


def plan_pool(num_units: int, *, num_workers: int, cpus_per_worker: float, use_gpu: bool | None) -> PoolSize:
    """A pool that fits the cluster as it is and may grow with it.

    Args:
        num_workers: The most workers; 0 = one for each core (or GPU), more as the cluster grows.
        cpus_per_worker: 0 = one.
        use_gpu: Whether each worker holds a GPU; None = if there is one.

    Raises:
        ValueError: GPUs are asked for and there are and will be none, or no node has or will have that many CPUs.
    """
    return fit_pool(
        num_units,
        cluster_capacity(),
        num_workers=num_workers,
        cpus_per_worker=cpus_per_worker,
        use_gpu=use_gpu,
        joined=bool(os.environ.get("RAY_ADDRESS")),
    )


def fit_pool(num_units: int, capacity: Capacity, *, num_workers: int, cpus_per_worker: float, use_gpu: bool | None, joined: bool) -> PoolSize:
    """`plan_pool` for a given cluster.

    Args:
        joined: Whether the CPUs of its nodes are cores; those of a local Ray are slots.
    """
    hint = "" if capacity.groups or not joined else "; if an autoscaler may add nodes, say which in CAD_NODE_GROUPS (see cluster/README.md)"
    with_gpu = [node for node in capacity.most if node.gpus >= 1]
    if use_gpu and not with_gpu:
        raise ValueError(f"--scale.use-gpu True: the cluster has {capacity.describe()}, no GPU; leave it out to work on CPUs{hint}")
    on_gpu = bool(with_gpu) if use_gpu is None else use_gpu
    usable = with_gpu if on_gpu else capacity.most
    gpus_each = 1.0 if on_gpu else 0.0
    # A local Ray counts more slots than cores; a cluster's nodes count their cores.
    cores = {node: node.cpus if joined else float(os.cpu_count() or 1) for node in usable}
    share = cpus_per_worker or (1.0 if not on_gpu else max(1.0, min(8.0, *(cores[node] // node.gpus - 1.0 for node in usable))))
    if room(usable, share, gpus_each) < 1:
        largest = max((node.cpus for node in usable), default=0.0)
        raise ValueError(
            f"--scale.cpus-per-worker {share:g}: no node {'with a GPU ' if on_gpu else ''}has more than {largest:g} CPUs, the cluster has "
            f"{capacity.describe()}{hint}"
        )
    now = room(capacity.present, share, gpus_each) if joined or on_gpu else int((os.cpu_count() or 1) // share)
    now = max(1, now)
    # Where nobody said how far the cluster may grow, Ray Data asks for more and takes what comes.
    most = num_workers or (max(now, room(usable, share, gpus_each) if capacity.groups else _MOST_WORKERS) if joined else now)
    most = max(1, min(most, num_units))
    return PoolSize(min_workers=min(now, most), max_workers=most, cpus=share, gpus=gpus_each)


def run_units(units: Sequence[dict[str, Any]], worker: type, arguments: tuple, pool: PoolSize, *, longest_unit_s: float) -> Iterator[dict[str, Any]]:
    """Apply ``worker(*arguments)`` to every unit and yield what it returns, as soon as it is there, in no order.

    Args:
        units: Dicts of plain values.
        worker: Class with ``__call__(unit) -> dict``; one instance a process. Its work must be idempotent: a unit whose worker died is given
            to another.
        longest_unit_s: A pipeline in which nothing has come out for longer than this (and five minutes) is taken as stuck.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    dataset = ray.data.from_items(list(units), override_num_blocks=min(len(units), _MAX_BLOCKS))
    units_per_block = -(-len(units) // _MAX_BLOCKS)
    dataset.context.execution_no_progress_timeout_s = 300.0 + longest_unit_s * units_per_block * 2
    strategy = ray.data.ActorPoolStrategy(min_size=pool.min_workers, max_size=pool.max_workers, initial_size=pool.min_workers)
    mapped = dataset.map(
        worker,
        fn_constructor_args=arguments,
        compute=strategy,
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
    )
    yield from mapped.iter_rows()


def connect_stoppable() -> None:
    """Join or start Ray, such that SIGTERM ends the job at once with `EXIT_STOPPED`: finished units are kept, the same command goes on."""
    from rayjobs.resources import connect

    def stop(signum: int, frame: Any) -> None:
        print("stopped; the same command goes on from what is finished", flush=True)
        raise SystemExit(EXIT_STOPPED)

    signal.signal(signal.SIGTERM, stop)
    connect()
    # Joining Ray sets a handler of its own.
    signal.signal(signal.SIGTERM, stop)
