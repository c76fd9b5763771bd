"""Training on as many workers as the cluster has room for: it goes on with fewer after a loss, and grows when nodes come.

Every attempt has a fixed number of workers, one of those that share the same global batches in the same order (`worker_numbers`); so the loss does not
depend on how the cluster fared. Between attempts the workers' room is held by placement groups: what they ask for is what an autoscaler brings, and
what they have is certain to be there, even while Ray still takes a lost node for alive. To grow, the workers are asked
to save and leave; no step is repeated. After a loss, training goes on from the last checkpoint.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cad_models.dataset import Folder
from cad_models.order import num_shards
from rayjobs.resources import LOSSES_WITHOUT_PROGRESS, WorkerPlan

if TYPE_CHECKING:
    from rayjobs.loop import LoopConfig

_POLL_S = 0.5
# When some workers have room and more is on its way: how long it must have been quiet before training starts with what there is.
_SETTLE_S = 10.0
_LONGEST_WAIT_S = 900.0
_TOLD_EVERY_S = 30.0
# For the tasks of Ray Data that read for a streamed training: without it the workers would take what these need.
_DATA_CPUS = 0.5


def worker_numbers(loop: "LoopConfig", least: int, most: int) -> tuple[int, ...]:
    """The numbers of workers from ``least`` to ``most`` that train on the very same global batches as ``most`` do, ascending.

    Raises:
        ValueError: ``most`` cannot share the batch.
    """
    from rayjobs.batching import fitting_batch_size

    def batches(number: int) -> tuple[int, int]:
        size = fitting_batch_size(loop.recipe, loop.train, number)
        return size, num_shards(size, number)

    wanted, found = batches(most), [most]
    for number in range(least, most):
        try:
            if batches(number) == wanted:
                found.append(number)
        except ValueError:  # they cannot share it equally
            continue
    return tuple(sorted(found))


class Reservation:
    """Room in the cluster for some of several numbers of workers; more of it becomes ready as the cluster grows.

    Args:
        numbers: Numbers of workers, ascending.
        present: Workers that have their room already.
        plan: What each worker takes.
    """

    def __init__(self, numbers: Sequence[int], plan: WorkerPlan, *, present: int = 0) -> None:
        self._plan, self._left, self._held = plan, list(numbers), present
        self._steps: list[tuple[int, Any]] = []
        self._ask()

    def _ask(self) -> None:
        """Ask for what the next number needs beyond the one before. One step after the other: asked for at once, a later one may get the room that
        an earlier one waits for, and both wait for ever."""
        from ray.util.placement_group import placement_group

        number = self._left.pop(0)
        bundles = [dict(self._plan.resources_per_worker) for _ in range(number - self._held)]
        if not self._steps:
            bundles.append({"CPU": _DATA_CPUS})
        self._steps.append((number, placement_group(bundles)))
        self._held = number

    def ready(self) -> int:
        """The largest number for which there is room now; 0 = for none."""
        from ray.util.placement_group import placement_group_table

        held = 0
        for number, group in self._steps:
            if placement_group_table(group).get("state") != "CREATED":
                return held
            held = number
        if self._left:
            self._ask()
        return held

    def release(self) -> None:
        """Give the room back."""
        from ray.util.placement_group import remove_placement_group

        for _, group in self._steps:
            remove_placement_group(group)
        self._steps = []


def settled(readings: Iterator[tuple[float, int]], most: int, settle_s: float) -> int:
    """The number that a reservation comes to: ``most`` at once, less when it has not changed for ``settle_s``.

    Args:
        readings: (seconds, number that is ready), as long as it is worth waiting.

    Returns:
        0 when the readings ended with none.
    """
    held, since = 0, 0.0
    for now, number in readings:
        if number != held:
            held, since = number, now
        if held == most or (held and now - since >= settle_s):
            break
    return held


class _Growth:
    """While fewer workers train than could: asks for room for more, and when there is, asks those that train to save and leave."""

    def __init__(self, folder: Folder, numbers: Sequence[int], present: int, plan: WorkerPlan, every_s: float) -> None:
        self._folder, self._numbers, self._present, self._plan, self._every_s = folder, numbers, present, plan, every_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._progress_before = b""

    def __enter__(self) -> "_Growth":
        if self._numbers:
            self._progress_before = self._progress()
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        if self._numbers:
            self._thread.join()

    def _progress(self) -> bytes:
        return self._folder.read_bytes("progress.json") if self._folder.exists("progress.json") else b""

    def _watch(self) -> None:
        # Workers that are only starting have no room yet: what they are about to take would look free.
        while self._progress() == self._progress_before:
            if self._done.wait(_POLL_S):
                return
        # A restart costs some seconds: not before training has gone on for a while.
        if self._done.wait(self._every_s):
            return
        reservation = Reservation(self._numbers, self._plan, present=self._present)
        try:
            number = settled(self._readings(reservation), self._numbers[-1], _SETTLE_S)
        finally:
            reservation.release()
        if number and not self._done.is_set():
            self._folder.write_bytes("RESIZE", str(number).encode())

    def _readings(self, reservation: Reservation) -> Iterator[tuple[float, int]]:
        while not self._done.wait(_POLL_S):
            yield time.monotonic(), reservation.ready()


def fit_elastic(
    loop: "LoopConfig", plan: WorkerPlan, attempt: Callable[[WorkerPlan], None], *, num_evaluations: Callable[[], int], tell: Callable[[str], None]
) -> None:
    """Train to the end or to a stop request on between ``plan.min_workers`` and ``plan.num_workers`` workers.

    Args:
        attempt: Trains with a fixed number of workers, until the end, or until one of the files STOP and RESIZE asks it to leave.
        num_evaluations: How many evaluations are done: losses without a new one between them (`LOSSES_WITHOUT_PROGRESS`) end the training.
        tell: Shows a line to the user.

    Raises:
        ray.train.TrainingFailedError: workers were lost again and again without progress.
        ValueError: no room for the least number of workers came in 15 minutes, or no number that fits shares the batches.
    """
    from ray.train import TrainingFailedError

    # Of what was asked for, not of what fits: the same command trains on the same batches on every cluster.
    sharing = worker_numbers(loop, plan.min_workers, plan.asked_workers)
    numbers = [number for number in sharing if number <= plan.num_workers]
    if not numbers:
        raise ValueError(
            f"there is, and will be, room for {_workers(plan.num_workers)}, but the batches of --scale.num-workers {plan.asked_workers} can be shared only by "
            f"{', '.join(map(str, sharing))}: lower --scale.min-workers ({plan.min_workers}) or --scale.num-workers"
        )
    folder, failures, done = Folder(loop.run_folder), 0, num_evaluations()
    while True:
        folder.delete("RESIZE")
        number = _room(folder, numbers, plan, tell)
        if number == 0:  # asked to stop while waiting
            return
        tell(f"training with {_workers(number)}" + (f" of at most {numbers[-1]}: more as nodes come" if number < numbers[-1] else ""))
        more = [n for n in numbers if n > number]
        try:
            with _Growth(folder, more, number, plan, plan.resize_s):
                attempt(plan.with_workers(number))
        except TrainingFailedError as error:
            progress, done = num_evaluations() > done, num_evaluations()
            failures = 1 if progress else failures + 1
            if failures > LOSSES_WITHOUT_PROGRESS:
                raise
            tell(f"lost a worker ({reason_of(error)}): going on from the last checkpoint with what there is")
            continue
        if folder.exists("RESIZE") and not any(folder.exists(name) for name in ("result.json", "error.json", "STOP")):
            tell(f"room for {folder.read_bytes('RESIZE').decode()} workers: saved, starting again with them")
            continue
        folder.delete("RESIZE")
        return


def _room(folder: Folder, numbers: Sequence[int], plan: WorkerPlan, tell: Callable[[str], None]) -> int:
    reservation, started = Reservation(numbers, plan), time.monotonic()

    def readings() -> Iterator[tuple[float, int]]:
        told = started
        while not folder.exists("STOP"):
            now = time.monotonic()
            number = reservation.ready()
            if number == 0 and now - started > _LONGEST_WAIT_S:
                raise ValueError(
                    f"no room for {_workers(numbers[0])} (--scale.min-workers {plan.min_workers}, {plan.cpus_per_worker:g} CPUs"
                    f"{', 1 GPU' if plan.use_gpu else ''} each) came in {_LONGEST_WAIT_S / 60:.0f} minutes: see what `ray status` says of the cluster"
                )
            if number == 0 and now - told > _TOLD_EVERY_S:
                told = now
                tell(f"waiting for room for {_workers(numbers[0])} since {now - started:.0f} s")
            yield now, number
            time.sleep(_POLL_S)

    try:
        number = settled(readings(), numbers[-1], _SETTLE_S)
    finally:
        reservation.release()
    return 0 if folder.exists("STOP") else number


def _workers(number: int) -> str:
    return f"{number} worker" + ("s" if number != 1 else "")


def reason_of(error: Exception) -> str:
    """What Ray Train says of a failure, in a line: of the workers that failed the first, with what it raised."""
    rank, cause = min(getattr(error, "worker_failures", {}).items(), default=(None, error), key=lambda failure: failure[0])
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
    # The last line of a traceback is the exception; Ray's own messages begin with what matters.
    text = lines[-1] if any(line.startswith("Traceback") for line in lines) else lines[0]
    return ("" if rank is None else f"rank {rank}: ") + text[:200]


def tell_on_stderr(line: str) -> None:
    """A line of its own beside a progress line that may be there."""
    start = "\r\033[K" if sys.stderr.isatty() else ""
    print(f"{start}{line}", file=sys.stderr, flush=True)
