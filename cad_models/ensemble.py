"""Ensembles: the folder of one, and one loaded, ready to answer.

::

    <ensemble>/
      ensemble.json            task, rule of combination and what was fitted for it; of each member: digest, weight, and the name that it was registered under
      members/<i>/             checkpoint folders of `cad_models.checkpoint`, without what only a resumed training reads

A trained member is an ensemble of one. The folder is self-contained: with it the answers are pinned.
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cad_models.checkpoint import CheckpointError, Member, load_member, member_digest
from cad_models.common.isolation import Isolated, Lost
from cad_models.config import json_digest
from cad_models.task import SECONDS, Answer, InferOptions, Input, Reject, Requests, Task
from cad_models.tasks import TASKS

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class MemberEntry:
    """One member as ``ensemble.json`` pins it."""

    digest: str
    """`member_digest` of its folder."""
    weight: float = 1.0
    name: str = ""
    """As ``models:/cad-alignment/3``; empty for a member of its own version."""


@dataclass(frozen=True, kw_only=True)
class EnsembleEntry:
    """``ensemble.json``."""

    task: str
    rule: str
    members: tuple[MemberEntry, ...]
    fitted: dict[str, Any] = field(default_factory=dict)
    """What `Task.fit_rule` found on validation predictions; empty where the rule has nothing to fit."""

    @property
    def digest(self) -> str:
        """Identifies the answers: task, rule, what was fitted, and each member's digest and share, whatever names they carry."""
        total = sum(member.weight for member in self.members)
        shares = [[member.digest, round(member.weight / total, 12)] for member in self.members]
        return json_digest([self.task, self.rule, shares, *([self.fitted] if self.fitted else [])], length=64)


def write_ensemble(
    directory: Path,
    members: Sequence[Path],
    *,
    rule: str | None = None,
    weights: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    fitted: Mapping[str, Any] | None = None,
) -> EnsembleEntry:
    """Write an ensemble's folder from checkpoint folders; ``ensemble.json`` comes last.

    Args:
        rule: None = the task's first.
        fitted: What `Task.fit_rule` said of these members and this rule.

    Raises:
        CheckpointError: no member, an incomplete one, or members of several tasks.
        ValueError: weights that are not positive or not one a member; a rule that the task does not have, or that needs to be fitted and was not.
    """
    weights = check_weights(len(members), weights)
    tasks = {}
    entries = []
    directory.mkdir(parents=True, exist_ok=True)
    for i, (source, weight) in enumerate(zip(members, weights, strict=True)):
        digest = member_digest(source)
        tasks[_task_name(source)] = source
        target = directory / "members" / str(i)
        shutil.copytree(source, target, ignore=_not_of_a_member)
        entries.append(MemberEntry(digest=digest, weight=weight, name=names[i] if names else ""))
    if len(tasks) != 1:
        found = ", ".join(f"{name} ({folder})" for name, folder in sorted(tasks.items()))
        raise CheckpointError(f"an ensemble's members must be of one task, these are of {found or 'none: it has no members'}")
    name = next(iter(tasks))
    entry = EnsembleEntry(task=name, rule=_usable_rule(name, rule, fitted), members=tuple(entries), fitted=dict(fitted or {}))
    described = {
        "schema_version": SCHEMA_VERSION,
        "task": entry.task,
        "rule": entry.rule,
        **({"fitted": entry.fitted} if entry.fitted else {}),
        "members": [{"digest": m.digest, "weight": m.weight, "name": m.name} for m in entry.members],
    }
    (directory / "ensemble.json").write_text(json.dumps(described, indent=1, sort_keys=True) + "\n")
    return entry


def _usable_rule(task: str, rule: str | None, fitted: Mapping[str, Any] | None) -> str:
    if task not in TASKS:
        raise CheckpointError(f"the members are of the task {task!r}; known are {', '.join(sorted(TASKS))}")
    rules, need = TASKS[task].combine_rules, TASKS[task].fitted_rules
    rule = rule or rules[0]
    if rule not in rules:
        raise ValueError(f"--combine {rule!r} is no ensemble rule of --task {task}: it has {', '.join(rules)}")
    if rule in need and not fitted:
        raise ValueError(
            f"--combine {rule} needs what was fitted on validation predictions, and these models come without it: name an ensemble that was registered "
            f"with this rule (tune.py --combine {rule}, or train.py --seeds ... --combine {rule} --register), or choose one of "
            f"{', '.join(r for r in rules if r not in need)}"
        )
    return rule


def _not_of_a_member(folder: str, names: list[str]) -> list[str]:
    """What a checkpoint folder may hold beside a member: the trainer's state, temporary files, notes of whoever."""
    return [name for name in names if name not in ("recipe.json", "signature.json", "metrics.json") and not name.endswith(".safetensors")]


def check_weights(count: int, weights: Sequence[float] | None) -> list[float]:
    """One positive weight a member; None = equal ones. Raises ValueError."""
    if weights is None:
        return [1.0] * count
    if len(weights) != count or not all(0 < w < float("inf") for w in weights):
        raise ValueError(f"--weights must be {count} positive numbers, one for each model, got {' '.join(map(str, weights)) or 'none'}")
    return [float(w) for w in weights]


def _task_name(member: Path) -> str:
    try:
        return str(json.loads((member / "recipe.json").read_text())["task"])
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{member / 'recipe.json'} cannot be read ({error}): not a checkpoint folder") from error


def is_ensemble(directory: Path) -> bool:
    """Whether it is an ensemble's folder (rather than a checkpoint's)."""
    return (directory / "ensemble.json").is_file()


def read_ensemble(directory: Path) -> EnsembleEntry:
    """``ensemble.json``, with every member's files checked against the digests that it pins.

    Raises:
        CheckpointError: it is missing or broken, or a member's files were changed.
    """
    path = directory / "ensemble.json"
    try:
        value = json.loads(path.read_text())
        entry = EnsembleEntry(
            task=value["task"],
            rule=value["rule"],
            members=tuple(MemberEntry(**member) for member in value["members"]),
            fitted=dict(value.get("fitted", {})),
        )
        version = value["schema_version"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: not an ensemble's folder, or not a complete one") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is broken ({type(error).__name__}: {error})") from error
    if version != SCHEMA_VERSION:
        raise CheckpointError(f"{path} has schema version {version!r}, this program reads {SCHEMA_VERSION}")
    for i, member in enumerate(entry.members):
        found = member_digest(directory / "members" / str(i))
        if found != member.digest:
            raise CheckpointError(
                f"{directory / 'members' / str(i)}: its files have digest {found[:16]}…, {path} pins {member.digest[:16]}…: they were "
                "changed; restore them or register again"
            )
    return entry


def pack(directory: Path) -> dict[str, bytes]:
    """An ensemble's files by relative name, to be sent to workers that share no disk with the driver."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def unpack(files: Mapping[str, bytes], directory: Path) -> None:
    """The inverse of :func:`pack`."""
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Members used together."""

    task: Task
    rule: str
    members: tuple[Member, ...]
    weights: tuple[float, ...]
    names: tuple[str, ...]
    fitted: Mapping[str, Any] = field(default_factory=dict)


def load_ensemble(directory: Path, *, device: str = "cpu") -> Ensemble:
    """The ensemble in a folder, digests checked.

    Raises:
        CheckpointError: broken, changed, or of an unknown task.
    """
    entry = read_ensemble(directory)
    if entry.task not in TASKS:
        raise CheckpointError(f"{directory / 'ensemble.json'} names the task {entry.task!r}; known are {', '.join(sorted(TASKS))}")
    members = [load_member(directory / "members" / str(i), device=device, digest=m.digest) for i, m in enumerate(entry.members)]
    return Ensemble(
        task=TASKS[entry.task],
        rule=entry.rule,
        members=tuple(members),
        weights=tuple(m.weight for m in entry.members),
        names=tuple(m.name or f"member {m.digest[:12]}" for m in entry.members),
        fitted=entry.fitted,
    )


# --- answering ----------------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Processed:
    """One input file, read and seen by every member."""

    outputs: list[np.ndarray]
    """As `Predictor.predict` gives them; empty when rejected."""
    thumbnail: bytes
    """JPEG; empty when rejected."""
    reject: Reject | None = None


class InputProcessor:
    """An ensemble in one process, and a child process that reads files and may be lost; a context manager.

    Args:
        timeout_s: For reading one file.
        memory_limit_bytes: That reading one file may take.
        options: Of the task's ``infer_options``; None = its defaults.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        *,
        device: str = "cpu",
        timeout_s: float = 120.0,
        memory_limit_bytes: int = 4 << 30,
        options: InferOptions | None = None,
    ) -> None:
        self._task = ensemble.task.name
        self._predictor = ensemble.task.predictor(ensemble.members, device=device, options=options)
        self._reader = Isolated("cad_models.tasks:read_input", timeout_s=timeout_s, memory_limit_bytes=memory_limit_bytes)
        self._read_seconds: Counter[str] = Counter()
        # A photograph may take a hundred megabytes once it is decoded: where batches bring nothing, one at a time.
        self._step = 1 if device == "cpu" else 16

    def __enter__(self) -> "InputProcessor":
        self._reader.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._reader.__exit__(kind, error, trace)

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent so far in each stage; ``hand over`` is what the reading process does not name: what was read, on its way to this one."""
        named = sum(seconds for stage, seconds in self._read_seconds.items() if stage)
        return {"hand over": self._read_seconds[""] - named, **{k: s for k, s in self._read_seconds.items() if k}, **self._predictor.seconds}

    def process(self, inputs: Sequence[Input]) -> list[Processed]:
        """Read the files and run the members on them; a file that cannot be read is rejected and stops nothing."""
        return [row for start in range(0, len(inputs), self._step) for row in self._processed(inputs[start : start + self._step])]

    def _processed(self, inputs: Sequence[Input]) -> list[Processed]:
        started = time.perf_counter()
        read = [self._read(item) for item in inputs]
        self._read_seconds[""] += time.perf_counter() - started
        for columns in read:
            if not isinstance(columns, Reject):
                stages = [name for name in columns if name.startswith(SECONDS)]
                self._read_seconds.update({name.removeprefix(SECONDS): float(columns.pop(name)) for name in stages})
        good = [columns for columns in read if not isinstance(columns, Reject)]
        outputs = iter(self._predictor.predict(good))
        return [
            Processed(outputs=[], thumbnail=b"", reject=columns)
            if isinstance(columns, Reject)
            else Processed(outputs=next(outputs), thumbnail=columns["thumbnail"].tobytes())
            for columns in read
        ]

    def _read(self, item: Input) -> dict[str, np.ndarray] | Reject:
        try:
            return self._reader(self._task, item, self._predictor.settings)
        except Lost as error:
            return Reject(reason=error.reason, detail=error.detail)


def answer(
    ensemble: Ensemble, requests: Requests, processor: InputProcessor, *, top_k: int, options: InferOptions | None = None
) -> tuple[list[Answer], list[tuple[Input, Reject]]]:
    """The answers to all searches, computed in this process, and the files that could not be read; ``options`` as the requests and the processor had."""
    outputs: dict[int, list[np.ndarray]] = {}
    rejects = []
    for position, item in enumerate(requests.inputs):
        (processed,) = processor.process([item])
        if processed.reject is None:
            outputs[position] = processed.outputs
        else:
            rejects.append((item, processed.reject))
    return ranked(ensemble, requests, outputs, top_k=top_k, options=options), rejects


def ranked(
    ensemble: Ensemble, requests: Requests, outputs: Mapping[int, list[np.ndarray]], *, top_k: int, options: InferOptions | None = None
) -> list[Answer]:
    """The answers to all searches from the members' outputs; ``options`` as the requests had."""
    found: list[Answer] = []
    for search in requests.searches:
        found += ensemble.task.rank(
            search,
            outputs,
            rule=ensemble.rule,
            weights=ensemble.weights,
            top_k=top_k,
            fitted=ensemble.fitted,
            signatures=[member.signature for member in ensemble.members],
            options=options,
        )
    return found
