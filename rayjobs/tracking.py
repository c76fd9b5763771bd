"""MLflow runs: opening the store, and runs that survive a killed driver.

Training workers never open MLflow. Rank 0 writes ``<run folder>/metrics.jsonl``; a thread of the driver
(`rayjobs.courier`) follows these files and delivers new lines. Registered models: `rayjobs.registry`.
"""

import functools
import importlib.metadata
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cad_models.folder import without_credentials
from rayjobs.cli import TrackingConfig

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from mlflow import MlflowClient

T = TypeVar("T")

METRICS_FILE = "metrics.jsonl"
RUN_KEY_TAG = "cad.run_key"

# A store that does not answer must cost a job seconds, not MLflow's four minutes for each call; and nothing is reported
# to anybody.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
}

# MLflow's own limits of one log_batch call.
_METRICS_PER_CALL, _PARAMS_PER_CALL, _PARAM_LENGTH = 1_000, 100, 6_000


class TrackingError(ValueError):
    """The tracking store cannot be used for what was asked; the message names it and the remedy."""


# --- the store --------------------------------------------------------------------------------------------------------
class Tracking:
    """One MLflow store with the experiment and the registered model's name of a task.

    Logging methods never raise: what cannot be delivered is counted and told. Cheap to make: contacts nothing until it
    is needed.
    """

    def __init__(self, *, uri: str, experiment: str, registered_model: str, artifacts: str | None = None) -> None:
        self.uri = uri
        self.shown_uri = without_credentials(uri)
        """For messages."""
        self.experiment = experiment
        self.registered_model = registered_model
        self._artifacts = artifacts
        self._lock = threading.RLock()
        self._client: MlflowClient | None = None
        self._experiment_id: str | None = None
        self._told = False

    @property
    def client(self) -> "MlflowClient":
        """MLflow's client for this store."""
        with self._lock:
            import mlflow

            if self._client is None or mlflow.get_tracking_uri() != self.uri:
                # The registry of an SQLite store looks models up in the process's own store, whatever the client was told. MLflow also puts it
                # into the environment, where it would outlive this object.
                given = os.environ.get("MLFLOW_TRACKING_URI")
                mlflow.set_tracking_uri(self.uri)
                if given is None:
                    os.environ.pop("MLFLOW_TRACKING_URI", None)
                else:
                    os.environ["MLFLOW_TRACKING_URI"] = given
            if self._client is None:
                self._client = mlflow.MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
            return self._client

    @property
    def experiment_id(self) -> str:
        """The experiment's id; it is created when missing. Raises MLflow's and connection errors."""
        with self._lock:
            if self._experiment_id is None:
                with exclusive(self.uri):
                    found = self.client.get_experiment_by_name(self.experiment)
                    if found is not None and found.lifecycle_stage != "active":
                        self.client.restore_experiment(found.experiment_id)
                    self._experiment_id = found.experiment_id if found is not None else self._created_experiment()
            return self._experiment_id

    def _created_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        try:
            return self.client.create_experiment(self.experiment, artifact_location=self._artifacts)
        except MlflowException:
            # Another process was faster (a server has no lock of ours).
            found = self.client.get_experiment_by_name(self.experiment)
            if found is None:
                raise
            return found.experiment_id

    def required(self, what: str, call: Callable[[], T]) -> T:
        """``call()``; a store that does not answer raises TrackingError saying ``what`` could not be done."""
        for attempt in (1, 2, 3):
            try:
                return call()
            except _store_errors() as error:
                if attempt == 3 or not _may_pass(error):
                    raise TrackingError(
                        f"cannot {what}: the tracking store {self.shown_uri} says {_short(error)}; check MLFLOW_TRACKING_URI, or unset it to use "
                        "the embedded store, and run the same command again"
                    ) from error
                time.sleep(attempt)
        raise AssertionError("unreachable")

    def attempt(self, what: str, call: Callable[[], T]) -> T | None:
        """``call()``, or None after one line on stderr when the store does not answer: training goes on without it."""
        try:
            return call()
        except _store_errors() as error:
            with self._lock:
                told, self._told = self._told, True
            if not told:
                print(
                    f"tracking: cannot {what} at {self.shown_uri} ({_short(error)}); going on, figures are kept in {METRICS_FILE} files",
                    file=sys.stderr,
                    flush=True,
                )
            return None

    def start_run(
        self,
        key: str,
        *,
        name: str,
        parent: "TrackedRun | None" = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        dataset: "DatasetSource | None" = None,
        open_now: bool = True,
    ) -> "TrackedRun":
        """The run of this key: the one that an earlier start of the same command began, else a new one. Never raises
        for a store that is down: the run then opens later, with the first delivery that succeeds.

        Args:
            key: What makes it the same run, as task, recipe digest and dataset digest; kept in the tag ``cad.run_key``.
            name: For people.
            parent: The run of the search that it is a trial of.
            params: Flat or nested recipe values; nested ones get dotted names.
            tags: Further tags.
            dataset: What it trains on.
            open_now: False = the `MetricsCourier` that follows it opens it, beside what its caller does: MLflow takes seconds to load.
        """
        run = TrackedRun(
            self,
            key=key,
            name=name,
            parent=parent,
            params=flattened(params or {}),
            tags=dict(tags or {}),
            dataset=dataset,
        )
        if open_now:
            run.open()
        return run


def open_tracking(config: TrackingConfig, task: str) -> Tracking:
    """The store that MLFLOW_TRACKING_URI names, else the embedded one: SQLite and local files below ``config.folder``.

    An SQLite store is initialised under a file lock, so that any number of processes may open a fresh one at once.

    Raises:
        TrackingError: the embedded store's folder cannot be written.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI", ""), None
    if not uri:
        folder = Path(config.folder).expanduser().absolute()
        uri, artifacts = f"sqlite:///{folder}/mlflow.db", (folder / "artifacts").as_uri()
    if _database(uri) is not None:
        _initialise(uri)
    return Tracking(
        uri=uri,
        experiment=config.experiment or f"cad-{task}",
        registered_model=config.registered_model or f"cad-{task}",
        artifacts=artifacts,
    )


def _database(uri: str) -> Path | None:
    """The file of an SQLite store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


@functools.cache
def exclusive(uri: str) -> "AbstractContextManager[Any]":
    """A lock between processes (re-entrant within a thread) for steps that must not happen twice at once; none for a server, which has its own."""
    import contextlib

    from filelock import FileLock

    database = _database(uri)
    return contextlib.nullcontext() if database is None else FileLock(f"{database}.lock", timeout=300)


def _initialise(uri: str) -> None:
    """Create an SQLite store's tables once: MLflow's migrations, run by two processes at once, destroy the database."""
    from filelock import Timeout

    database = _database(uri)
    ready = database.with_name(database.name + ".ready")
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(uri):
            installed = importlib.metadata.version("mlflow")  # without loading it
            if database.exists() and ready.exists() and ready.read_text() == installed:
                return
            if database.exists() and database.stat().st_size > 0:
                # Another MLflow wrote it: bring its tables up to date.
                command = [sys.executable, "-m", "mlflow", "db", "upgrade", uri]
                subprocess.run(command, capture_output=True, text=True, check=True)
            else:
                from mlflow import MlflowClient

                MlflowClient(tracking_uri=uri, registry_uri=uri).search_experiments(max_results=1)
            ready.write_text(installed)
    except (OSError, Timeout, subprocess.CalledProcessError) as error:
        raise TrackingError(
            f"the embedded tracking store {database} cannot be opened ({error}): choose a writable --tracking.folder"
        ) from error


def _store_errors() -> tuple[type[Exception], ...]:
    import requests
    from filelock import Timeout
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, requests.RequestException, SQLAlchemyError, OSError, Timeout)


def _may_pass(error: Exception) -> bool:
    """Whether the same call may succeed a second later: a locked database, a connection that broke."""
    import requests
    from sqlalchemy.exc import OperationalError

    text = str(error)
    return isinstance(error, OperationalError | requests.RequestException) or "database is locked" in text or "INTERNAL_ERROR" in text


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return without_credentials(f"{type(error).__name__}: {lines[0][:200] if lines else ''}")


# --- runs -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class DatasetSource:
    """The dataset of a run, as MLflow shows it."""

    uri: str
    digest: str
    profile: Mapping[str, Any] = field(default_factory=dict)
    """Facts worth seeing, as objects and splits."""


class TrackedRun:
    """An MLflow run that may open later than it starts. Methods never raise for a store that is down."""

    def __init__(
        self,
        tracking: Tracking,
        *,
        key: str,
        name: str,
        parent: "TrackedRun | None",
        params: dict[str, str],
        tags: dict[str, str],
        dataset: DatasetSource | None,
    ) -> None:
        self._tracking, self.key, self.name = tracking, key, name
        self._parent, self._params, self._tags, self._dataset = parent, params, tags, dataset
        self._run_id: str | None = None
        self._lock = threading.Lock()
        self.reused = False
        """Whether an earlier start of the same command began it."""

    @property
    def run_id(self) -> str | None:
        """MLflow's id; None as long as the store could not be reached."""
        return self._run_id

    def open(self) -> str | None:
        """Find or create the run; its id, or None when the store does not answer."""
        with self._lock:
            if self._run_id is None:
                self._run_id = self._tracking.attempt(f"open run {self.name}", self._found_or_created)
            return self._run_id

    def _found_or_created(self) -> str:
        client, experiment_id = self._tracking.client, self._tracking.experiment_id
        tags = {**_git_tags(), **self._tags, RUN_KEY_TAG: self.key, "mlflow.runName": self.name}
        if self._parent is not None:
            parent_id = self._parent.open()
            if parent_id is None:
                raise OSError(f"its parent {self._parent.name} is not open")
            tags["mlflow.parentRunId"] = parent_id
        with exclusive(self._tracking.uri):
            found = client.search_runs(
                [experiment_id],
                f"tags.`{RUN_KEY_TAG}` = '{_quoted(self.key)}'",
                max_results=1,
                order_by=["attributes.start_time ASC"],
            )
            if found:
                run_id, self.reused = found[0].info.run_id, True
                client.update_run(run_id, status="RUNNING")
            else:
                run_id = client.create_run(experiment_id, tags=tags, run_name=self.name).info.run_id
        self._describe(run_id)
        return run_id

    def _describe(self, run_id: str) -> None:
        """Parameters and dataset; again at every start, for an earlier one may have been killed in between (equal
        values are no change)."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        client = self._tracking.client
        params = [Param(name, value) for name, value in sorted(self._params.items())]
        for start in range(0, len(params), _PARAMS_PER_CALL):
            client.log_batch(run_id, params=params[start : start + _PARAMS_PER_CALL])
        if self._dataset is not None:
            source = json.dumps({"uri": self._dataset.uri})
            profile = json.dumps(dict(self._dataset.profile), sort_keys=True)
            # MLflow keeps 36 characters of a digest.
            dataset = Dataset(
                name=Path(self._dataset.uri).name or "dataset",
                digest=self._dataset.digest[:36],
                source_type="local" if "://" not in self._dataset.uri else self._dataset.uri.split("://")[0],
                source=source,
                profile=profile,
            )
            client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> bool:
        """Log figures that are in no metrics file, as the result of a search. Whether it could be done."""
        return self.deliver([{"step": step, "metrics": dict(metrics)}])

    def deliver(self, lines: Iterable[Mapping[str, Any]]) -> bool:
        """Log lines of a metrics file: ``{"step", "epoch", "metrics"}``. Whether it could be done."""
        from mlflow.entities import Metric

        run_id = self.open()
        if run_id is None:
            return False

        def send() -> bool:
            for line in lines:
                stamp = int(1_000 * float(line.get("time") or time.time()))
                values = {tracked_name(name): value for name, value in sorted(line["metrics"].items()) if _is_number(value)}
                if "epoch" in line:
                    # Last: a step whose epoch is in the run's history was delivered whole.
                    values["epoch"] = line["epoch"]
                batch = [Metric(name, float(value), stamp, int(line["step"])) for name, value in values.items()]
                for start in range(0, len(batch), _METRICS_PER_CALL):
                    self._tracking.client.log_batch(run_id, metrics=batch[start : start + _METRICS_PER_CALL])
            return True

        return bool(self._tracking.attempt(f"log metrics of {self.name}", send))

    def delivered_steps(self) -> set[int] | None:
        """The steps whose evaluation the run has; None when the store does not answer."""
        run_id = self.open()
        if run_id is None:
            return None
        history = self._tracking.attempt(f"read run {self.name}", lambda: self._tracking.client.get_metric_history(run_id, "epoch"))
        return None if history is None else {metric.step for metric in history}

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        run_id = self.open()
        if run_id is not None:
            from mlflow.entities import RunTag

            entities = [RunTag(name, str(value)) for name, value in tags.items()]
            self._tracking.attempt(f"tag run {self.name}", lambda: self._tracking.client.log_batch(run_id, tags=entities))

    def log_artifact(self, path: Path, folder: str | None = None) -> bool:
        """Upload a file, or a folder with all below it. Whether it could be done."""
        run_id = self.open()
        if run_id is None:
            return False
        upload = self._tracking.client.log_artifacts if path.is_dir() else self._tracking.client.log_artifact

        def send() -> bool:
            upload(run_id, str(path), folder)
            return True

        return bool(self._tracking.attempt(f"upload {path.name}", send))

    def log_content(self, name: str, data: bytes) -> bool:
        """Upload ``data`` as a file of that name. Whether it could be done."""
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / name
            path.write_bytes(data)
            return self.log_artifact(path)

    def finish(self, status: str = "FINISHED") -> None:
        """End the run: FINISHED, FAILED, or KILLED (stopped on request; the same command goes on with it)."""
        run_id = self.open()
        if run_id is not None:
            self._tracking.attempt(f"end run {self.name}", lambda: self._tracking.client.set_terminated(run_id, status))


def tracked_name(metric: str) -> str:
    """A metric's name as MLflow accepts it, which allows no ``@``: ``val/recall@3`` -> ``val/recall_at_3``."""
    return re.sub(r"[^\w\-. :/]", "_", metric.replace("@", "_at_"), flags=re.ASCII)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value and abs(value) != float("inf")


def _quoted(value: str) -> str:
    if "'" in value or "`" in value:
        raise ValueError(f"a run key must hold no quotes, got {value!r}")
    return value


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values under dotted names, as MLflow takes parameters: ``{"optim": {"lr": 0.1}}`` -> ``{"optim.lr":
    "0.1"}``."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = (value if isinstance(value, str) else json.dumps(value))[:_PARAM_LENGTH]
    return flat


def _git_tags() -> dict[str, str]:
    """Revision of the checkout that runs, and whether it was changed; nothing where there is no checkout or no git."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return {}
    answers = []
    for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return {}
        answers.append(done.stdout.strip())
    return {"mlflow.source.git.commit": answers[0], "git.changed": "yes" if answers[1] else "no"}
