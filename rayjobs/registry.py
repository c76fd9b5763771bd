"""The registered models of a task: trained members, ensembles of them, the alias ``champion``, and loading by name.

Every version is an ensemble's folder (`cad_models.ensemble`), a member's with one member in it. Registering the same content twice gives the
version that is there. A version appears whole or not at all: files first, then the version together with its tags in one call; files whose
registration was killed in between are used or removed by the next one.
"""

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cad_models.ensemble import check_weights, is_ensemble, read_ensemble, write_ensemble
from cad_models.tasks import TASKS
from rayjobs.tracking import Tracking, TrackingError, exclusive

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlflow.entities.model_registry import ModelVersion

# Where an ensemble's folder lies within a model's artifacts.
_ENSEMBLE_PATH = "artifacts/ensemble"

_REQUIREMENTS = ("mlflow", "torch", "numpy", "pandas", "pyarrow", "numba", "scipy", "manifold3d", "pillow")
_REQUIREMENTS += ("safetensors", "timm", "jaxtyping")


@dataclass(frozen=True, kw_only=True)
class Version:
    """A registered version."""

    name: str
    """Registered model."""
    version: str
    kind: str
    """``member`` or ``ensemble``."""
    digest: str
    """Of its content: the same digest gives the same answers."""
    score: float | None
    tags: dict[str, str]

    @property
    def uri(self) -> str:
        """``models:/<name>/<version>``."""
        return f"models:/{self.name}/{self.version}"


class Registry:
    """The registered model of one task. Methods raise TrackingError when the store does not answer."""

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking
        self.name = tracking.registered_model

    def register_member(
        self,
        checkpoint: Path,
        *,
        score: float,
        fitted: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Version:
        """Register a checkpoint folder as a version of kind ``member``.

        Args:
            score: The task's score on the validation split, for the tag of that name.
            fitted: What `Task.fit_rule` said of this member alone and the task's first rule.
            run_id: The MLflow run that trained it.
            tags: Further tags; recipe_digest, dataset_digest, encoder and member_digest are set here.

        Raises:
            CheckpointError: the folder is not a complete checkpoint.
        """
        import json

        from cad_models.config import json_digest

        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "ensemble"
            entry = write_ensemble(directory, [checkpoint], fitted=fitted)
            recipe = json.loads((checkpoint / "recipe.json").read_text())["recipe"]
            signature = json.loads((checkpoint / "signature.json").read_text())
            described = {
                "member_digest": entry.members[0].digest,
                "recipe_digest": json_digest(recipe),
                **{name: str(signature[name]) for name in ("dataset_digest", "encoder") if name in signature},
            }
            return self._register(directory, kind="member", score=score, run_id=run_id, tags={**(tags or {}), **described})

    def register_ensemble(
        self,
        members: Sequence[Version | str],
        *,
        score: float,
        weights: Sequence[float] | None = None,
        rule: str | None = None,
        fitted: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Version:
        """Register versions as one of kind ``ensemble``: a self-contained copy, pinned by version and digest.

        Args:
            members: Versions, or names as ``models:/cad-alignment/3``; a version that is an ensemble gives all its members.
            weights: One for each of ``members``; None = equal.
            rule: One of the task's ``combine_rules``; None = the first.
            fitted: What `Task.fit_rule` said of the members, in this order, and the rule.
            score: The ensemble's score on the validation split.
        """
        names = [member if isinstance(member, str) else member.uri for member in members]
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "ensemble"
            entry = self.gather(names, directory, weights=weights, rule=rule, fitted=fitted)
            described = {"members": " ".join(member.name for member in entry.members)}
            return self._register(directory, kind="ensemble", score=score, run_id=run_id, tags={**(tags or {}), **described})

    def versions(self, kind: str | None = None) -> list[Version]:
        """The versions, oldest first; only those that are ready."""
        condition = f"name = '{self.name}'" + (f" and tags.kind = '{kind}'" if kind else "")
        found = self._tracking.required(f"list versions of {self.name}", lambda: self._all_versions(condition))
        return sorted(map(_version, found), key=lambda version: int(version.version))

    def alias(self, name: str = "champion") -> Version | None:
        """The version that an alias names; None when there is none."""
        from mlflow.exceptions import MlflowException

        def look() -> "ModelVersion | None":
            try:
                return self._tracking.client.get_model_version_by_alias(self.name, name)
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND"):
                    return None
                raise

        found = self._tracking.required(f"read {self.name}@{name}", look)
        return None if found is None else _version(found)

    def move_alias(self, version: Version, name: str = "champion") -> None:
        """Let an alias name this version, from now on."""
        self._tracking.required(
            f"move {self.name}@{name}", lambda: self._tracking.client.set_registered_model_alias(self.name, name, version.version)
        )

    def gather(
        self,
        names: Sequence[str],
        into: Path,
        *,
        weights: Sequence[float] | None = None,
        rule: str | None = None,
        fitted: Mapping[str, Any] | None = None,
    ) -> Any:
        """One ensemble's folder from everything that is named; each name's weight is shared among its members by their own weights.

        Args:
            names, rule, fitted: As :func:`gather_ensemble`.

        Returns:
            Its `EnsembleEntry`.
        """
        return gather_ensemble(names, into, tracking=lambda: self._tracking, weights=weights, rule=rule, fitted=fitted)

    # ----------------------------------------------------------------------------------------------------------------------------------
    def _all_versions(self, condition: str) -> "list[ModelVersion]":
        found, token = [], None
        while True:
            page = self._tracking.client.search_model_versions(condition, max_results=1_000, page_token=token)
            found += [version for version in page if version.status == "READY"]
            token = page.token
            if not token:
                return found

    def _register(self, directory: Path, *, kind: str, score: float, run_id: str | None, tags: dict[str, str]) -> Version:
        content = read_ensemble(directory).digest
        # A member and an ensemble of that member alone answer alike, but are registered for different ends.
        tags = {**tags, "kind": kind, "content_digest": content, "score": repr(float(score))}

        def register() -> "ModelVersion":
            client = self._tracking.client
            self._create_model()
            with exclusive(self._tracking.uri):
                same = f"name = '{self.name}' and tags.kind = '{kind}' and tags.content_digest = '{content}'"
                existing = self._all_versions(same)
                if existing:
                    return min(existing, key=lambda version: int(version.version))
                model_id = self._uploaded(directory, kind=kind, content=content, run_id=run_id)
                return client.create_model_version(self.name, source=f"models:/{model_id}", run_id=run_id, model_id=model_id, tags=tags)

        return _version(self._tracking.required(f"register a version of {self.name}", register))

    def _create_model(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._tracking.client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _uploaded(self, directory: Path, *, kind: str, content: str, run_id: str | None) -> str:
        """The logged model with these files: one whose registration was killed after its upload, else a new one."""
        client, experiment_id = self._tracking.client, self._tracking.experiment_id
        condition = f"tags.content_digest = '{content}' and tags.kind = '{kind}'"
        for model in client.search_logged_models([experiment_id], filter_string=condition):
            if model.status == "READY":
                return model.model_id
            # Killed in the middle of its upload.
            client.delete_logged_model(model.model_id)
        model = client.create_logged_model(
            experiment_id,
            name=f"{self.name}-{kind}",
            source_run_id=run_id,
            tags={"content_digest": content, "kind": kind},
            model_type="cad-ensemble",
        )
        with tempfile.TemporaryDirectory() as folder:
            saved = Path(folder) / "model"
            save_model(directory, saved)
            client.log_model_artifacts(model.model_id, str(saved))
        client.finalize_logged_model(model.model_id, "READY")
        return model.model_id


def save_model(ensemble: Path, target: Path) -> None:
    """Write an ensemble as a folder that plain MLflow loads: code beside weights, no pickle."""
    import importlib.metadata
    import shutil

    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    import cad_models

    here = Path(__file__).resolve().parent
    packages = [*_REQUIREMENTS, *(name for name in TASKS[read_ensemble(ensemble).task].requirements if name not in _REQUIREMENTS)]
    requirements = [f"{name}=={importlib.metadata.version(name)}" for name in packages]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # MLflow wants an example to run the model on; this one needs files of the user's.
        warnings.filterwarnings("ignore", message=".*input example was not provided.*")
        # Without compiled code: it belongs to this machine.
        code = Path(folder) / "cad_models"
        shutil.copytree(Path(cad_models.__file__).parent, code, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        mlflow.pyfunc.save_model(
            target,
            python_model=str(here / "mlflow_model.py"),
            artifacts={"ensemble": str(ensemble)},
            code_paths=[str(code)],
            pip_requirements=requirements,
            signature=ModelSignature(
                inputs=Schema([ColSpec("string", "query"), ColSpec("string", "gallery", required=False)]),
                outputs=Schema(
                    [
                        ColSpec("string", "query"),
                        ColSpec("long", "rank"),
                        ColSpec("string", "answer"),
                        ColSpec("double", "score"),
                        ColSpec("string", "direction"),
                    ]
                ),
                params=ParamSchema([ParamSpec("top_k", "long", 3), ParamSpec("options", "string", "{}")]),
            ),
        )


def _version(found: "ModelVersion") -> Version:
    tags = dict(found.tags)
    try:
        score = float(tags["score"])
    except (KeyError, ValueError):
        score = None
    return Version(
        name=found.name,
        version=str(found.version),
        kind=tags.get("kind", ""),
        digest=tags.get("content_digest", ""),
        score=score,
        tags=tags,
    )


# --- loading by name ----------------------------------------------------------------------------------------------------------------------
def gather_ensemble(
    names: Sequence[str],
    into: Path,
    *,
    tracking: Any,
    weights: Sequence[float] | None = None,
    rule: str | None = None,
    fitted: Mapping[str, Any] | None = None,
) -> Any:
    """One ensemble's folder from everything that is named, digests checked.

    Args:
        names: Each a registry name (``models:/cad-alignment@champion``, ``models:/cad-alignment/3``), an ensemble's folder, a checkpoint folder, or
            files as ``moe.safetensors:pc_encoder.safetensors``.
        tracking: Function that opens the store; called only when a name needs it.
        weights: One a name; shared among its members by their own weights. None = every member its own weight.
        rule: How members are combined; None = the rule of a single name, the task's first for several.
        fitted: What the rule learned from the members; None = what a single name holds for the same rule.

    Returns:
        Its `EnsembleEntry`.

    Raises:
        CheckpointError: something named is missing, broken, changed, or of another task than the rest.
        TrackingError: a registry name that does not exist, or a store that does not answer.
    """
    if not names:
        raise ValueError("--model is missing: name at least one model")
    given = None if weights is None else check_weights(len(names), weights)
    folders: list[Path] = []
    shares: list[float] = []
    labels: list[str] = []
    known_rules: list[tuple[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for i, name in enumerate(names):
            with _located(name, Path(scratch) / str(i), tracking) as (directory, label):
                if is_ensemble(directory):
                    entry = read_ensemble(directory)
                    parts = [directory / "members" / str(k) for k in range(len(entry.members))]
                    own = [member.weight for member in entry.members]
                    # A member of its own version is known by that version, a member of an ensemble by the name that the ensemble pins.
                    known = [member.name or label for member in entry.members]
                    known_rules.append((entry.rule, entry.fitted))
                else:
                    parts, own, known = [directory], [1.0], [label]
                total = sum(own)
                folders += parts
                labels += known
                shares += own if given is None else [given[i] * share / total for share in own]
        if len(names) == 1 and known_rules and rule in (None, known_rules[0][0]):
            rule, own_fitted = known_rules[0]
            fitted = own_fitted if fitted is None else fitted
        return write_ensemble(into, folders, rule=rule, weights=shares, names=labels, fitted=fitted)


@contextmanager
def _located(name: str, scratch: Path, tracking: Any) -> "Iterator[tuple[Path, str]]":
    """A name's folder, and what to call it."""
    from cad_models.checkpoint import CheckpointError, gather_files

    if name.startswith("models:/"):
        yield _downloaded(name, scratch, tracking())
        return
    if ":" in name and not Path(name).exists():
        yield gather_files(name, scratch), name
        return
    directory = Path(name).expanduser()
    if not directory.is_dir():
        raise CheckpointError(
            f"--model {name}: there is no such folder; name models:/<registered model>@<alias>, models:/<registered model>/<version>, a checkpoint "
            "folder, or <artifact>.safetensors:<artifact>.safetensors"
        )
    yield directory, name


def _downloaded(name: str, scratch: Path, tracking: Tracking) -> tuple[Path, str]:
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    model, at, alias = name.removeprefix("models:/").partition("@")
    version = None
    if not at:
        model, slash, version = model.rpartition("/")
        if not slash or not version.isdigit():
            raise TrackingError(f"--model {name}: write models:/<registered model>@<alias> or models:/<registered model>/<version>")
    client = tracking.client

    def look() -> "tuple[ModelVersion, str] | None":
        try:
            found = client.get_model_version_by_alias(model, alias) if at else client.get_model_version(model, version)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND"):
                return None
            raise
        return found, client.get_model_version_download_uri(model, found.version)

    located = tracking.required(f"find {name}", look)
    if located is None:
        raise TrackingError(
            f"--model {name}: the registry {tracking.shown_uri} has no such {'alias' if at else 'version'}{_choices(tracking, model)}"
        )
    found, uri = located
    scratch.mkdir(parents=True)
    directory = tracking.required(
        f"download {name}",
        lambda: Path(
            download_artifacts(artifact_uri=f"{uri.rstrip('/')}/{_ENSEMBLE_PATH}", dst_path=str(scratch), tracking_uri=tracking.uri)
        ),
    )
    return directory, f"models:/{found.name}/{found.version}"


def _choices(tracking: Tracking, model: str) -> str:
    """What there is instead, for the message."""
    from mlflow.exceptions import MlflowException

    try:
        known = [found.name for found in tracking.client.search_registered_models()]
        if model not in known:
            return f"; registered models are: {', '.join(known) or 'none'}"
        aliases = tracking.client.get_registered_model(model).aliases
        versions = sorted(int(v.version) for v in tracking.client.search_model_versions(f"name = '{model}'"))
    except MlflowException:
        return ""
    return f"; {model} has the versions {', '.join(map(str, versions)) or 'none'} and the aliases {', '.join(aliases) or 'none'}"
