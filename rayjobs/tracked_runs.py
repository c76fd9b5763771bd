"""The trainings of a search, or of an ensemble's seeds, as child runs of one MLflow run."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from cad_models.dataset import Folder
from rayjobs.courier import MetricsCourier
from rayjobs.tracking import TrackedRun, Tracking


@dataclass(frozen=True, kw_only=True)
class ChildRun:
    """One training, as MLflow is to show it."""

    key: str
    """What makes it the same run at a restart."""
    name: str
    folder: Folder
    params: Mapping[str, Any]
    tags: Mapping[str, str] = field(default_factory=dict)
    with_files: bool = False
    """Whether best checkpoint and report are uploaded too; the history always is."""


class TrackedRuns:
    """Child runs by name. Calls to the store are made by one thread, so that a slow store delays no training; a context manager."""

    def __init__(self, tracking: Tracking, parent: TrackedRun, courier: MetricsCourier) -> None:
        self._tracking, self._parent, self._courier = tracking, parent, courier
        self._runs: dict[str, TrackedRun] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tracking")
        self._pending: list[Any] = []

    def __enter__(self) -> "TrackedRuns":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def start(self, child: ChildRun) -> None:
        """Begin (or go on with) a run."""
        self._pending.append(self._thread.submit(self._run, child))

    def end(self, child: ChildRun, state: str, reason: str = "", *, on_id: Callable[[str], None] = lambda run_id: None) -> None:
        """Deliver a training's figures and end its run.

        Args:
            state: ``complete``, ``pruned`` or ``failed``.
            on_id: Called, in the store's thread, with the id of the run that was ended.
        """
        self._pending.append(self._thread.submit(self._end, child, state, reason, on_id))

    def interrupt(self, finished: Callable[[str], bool]) -> None:
        """Mark the runs of those names as stopped that are not ``finished``."""
        self.drain()
        self._courier.flush()
        for name, run in self._runs.items():
            if not finished(name):
                run.finish("KILLED")

    def drain(self) -> None:
        """Wait until all that was asked for is delivered, or given up."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def _run(self, child: ChildRun) -> TrackedRun:
        if child.name not in self._runs:
            tags = {"cad.run_folder": child.folder.uri, **child.tags}
            self._runs[child.name] = self._tracking.start_run(
                child.key, name=child.name, parent=self._parent, params=child.params, tags=tags
            )
            self._courier.follow(child.folder.uri, self._runs[child.name])
        return self._runs[child.name]

    def _end(self, child: ChildRun, state: str, reason: str, on_id: Callable[[str], None]) -> None:
        run = self._run(child)
        self._courier.flush()
        if state == "complete":
            log_result(run, child.folder, with_files=child.with_files)
        # MLflow knows no pruned runs: they ended as they should, and the tag tells the rest.
        run.set_tags({"cad.state": state, **({"cad.reason": reason} if reason else {})})
        run.finish("FAILED" if state == "failed" else "FINISHED")
        if run.run_id is not None:
            on_id(run.run_id)


def log_result(run: TrackedRun, folder: Folder, *, with_files: bool = True) -> dict[str, Any]:
    """Log what a finished training left: final figures, history, and with ``with_files`` the best checkpoint and the report.

    Returns:
        Its ``result.json``.
    """
    from rayjobs.history import CSV_NAME, PNG_NAME

    result = folder.read_json("result.json")
    run.log_metrics(result["metrics"], step=result["num_steps"])
    run.set_tags({"cad.ended": result.get("ended", "")})
    for name in (CSV_NAME, PNG_NAME):
        if folder.exists(name):  # a run of an earlier version has none
            run.log_content(name, folder.read_bytes(name))
    if with_files:
        with folder.fetched(result["best"]) as directory:
            run.log_artifact(directory, "best")
        if folder.exists("report"):
            with folder.fetched("report") as directory:
                run.log_artifact(directory, "report")
    return result
