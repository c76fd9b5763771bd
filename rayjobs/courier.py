"""The courier that brings metrics from the files of runs to MLflow.

A store that is down costs nothing but delay: lines stay in their file and are delivered when it is back, or by the next start of the same command.
"""

import json
import sys
import threading
from collections.abc import Iterable
from typing import Any

from cad_models.dataset import Folder
from rayjobs.tracking import METRICS_FILE, TrackedRun


class MetricsCourier:
    """Opens runs and brings them the lines of their ``metrics.jsonl`` files, in a thread of the driver; a context manager.

    A line is ``{"step": int, "epoch": int, "metrics": {...}}`` and may have ``"time"`` (seconds since the epoch). The
    file may be rewritten with more lines; each step is delivered once, over any number of driver restarts: a run's own
    history says which it has.

    Args:
        runs: Pairs (run folder by path or URI, run); :meth:`follow` adds more.
        every_s: Seconds between two looks.
    """

    def __init__(self, runs: Iterable[tuple[str, TrackedRun]] = (), *, every_s: float = 2.0) -> None:
        self._every_s = every_s
        self._lock = threading.Lock()
        self._rounds = threading.Lock()
        self._followed: list[_Followed] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="metrics-courier", daemon=True)
        for folder, run in runs:
            self.follow(folder, run)

    def follow(self, run_folder: str, run: TrackedRun) -> None:
        """Follow one more run's file; it need not exist yet."""
        with self._lock:
            self._followed.append(_Followed(Folder(run_folder), run))

    def __enter__(self) -> "MetricsCourier":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        missing = self.close()
        if missing:
            print(
                f"tracking: {missing} evaluations could not be delivered; they are in the {METRICS_FILE} of their run folders, and the next start "
                "of the same command delivers them",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> int:
        """Stop the thread after a last round; how many lines could not be delivered."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        return self.flush()

    def flush(self) -> int:
        """Deliver what is there now; how many lines could not be."""
        with self._lock:
            followed = list(self._followed)
        with self._rounds:
            return sum(item.deliver() for item in followed)

    def _work(self) -> None:
        with self._lock:
            followed = list(self._followed)
        for item in followed:
            item.open()
        while not self._end.wait(self._every_s):
            missing = self.flush()
            if missing:
                # Each failing round costs the store's timeouts; do not spend the driver's time on them.
                self._end.wait(15 * self._every_s)


class _Followed:
    """One file and what its run has of it."""

    def __init__(self, folder: Folder, run: TrackedRun) -> None:
        self._folder, self._run = folder, run
        self._delivered: set[int] | None = None
        self._seen = b""

    def open(self) -> None:
        self._run.open()

    def deliver(self) -> int:
        try:
            data = self._folder.read_bytes(METRICS_FILE)
        except FileNotFoundError:
            return 0
        except OSError as error:
            print(f"tracking: {self._folder.path(METRICS_FILE)} cannot be read ({error})", file=sys.stderr, flush=True)
            return 0
        if data == self._seen:
            return 0
        lines = _lines(data)
        if self._delivered is None:
            self._delivered = self._run.delivered_steps()
            if self._delivered is None:
                return len(lines)
        new = [line for line in lines if line["step"] not in self._delivered]
        for position, line in enumerate(new):
            if not self._run.deliver([line]):
                return len(new) - position
            self._delivered.add(line["step"])
        self._seen = data
        return 0


def _lines(data: bytes) -> list[dict[str, Any]]:
    """The file's whole lines; a last one that is still being written is left for later."""
    lines = []
    for text in data.decode(errors="replace").splitlines():
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict) and {"step", "epoch", "metrics"} <= value.keys():
            lines.append(value)
    return lines
