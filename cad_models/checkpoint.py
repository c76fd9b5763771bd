"""The checkpoint folder, and members: trained weights together with all that is needed to use them.

::

    <checkpoint>/
      recipe.json              {"task": ..., "recipe": {...}}
      signature.json           encoder name, digest and width, point count, channels, axis convention, dataset digest
      metrics.json             what the last evaluation said
      <artifact>.safetensors   one each, as moe.safetensors and pc_encoder.safetensors
      trainer_state.pt         only in checkpoints to resume from: optimisers, step, raw weights beside their average

Nothing is ever unpickled: weights are safetensors, and ``trainer_state.pt`` is read with ``weights_only=True``.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from cad_models.config import Recipe, from_dict, to_dict
from cad_models.folder import Folder
from cad_models.learner import Learner
from cad_models.task import Task
from cad_models.tasks import TASKS

_DESCRIPTIONS = ("recipe.json", "signature.json")


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and both sides of a mismatch."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One trained model, ready to predict (evaluation mode)."""

    task: Task
    recipe: Recipe
    signature: dict[str, Any]
    metrics: dict[str, float]
    digest: str
    """Of recipe, signature and weights: the same digest gives the same answers."""
    learner: Learner


def write_member(
    directory: Path,
    *,
    task: Task,
    recipe: Recipe,
    signature: dict[str, Any],
    metrics: dict[str, float],
    artifacts: dict[str, dict[str, torch.Tensor]],
) -> None:
    """Write a member's files into ``directory`` (created; the caller makes the whole folder appear at once by renaming)."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "recipe.json", {"task": task.name, "recipe": to_dict(recipe)})
    write_json(directory / "signature.json", signature)
    write_json(directory / "metrics.json", metrics)
    for name, state in artifacts.items():
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        (directory / f"{name}.safetensors").write_bytes(save(tensors))


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys; NaN and infinity become null."""
    path.write_text(json.dumps(_finite(value), indent=1, sort_keys=True) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    return value


def member_digest(directory: Path) -> str:
    """SHA-256 over the files that decide a member's answers: recipe, signature and weights.

    Raises:
        CheckpointError: a file is missing.
    """
    total = hashlib.sha256()
    weights = sorted(path.name for path in directory.glob("*.safetensors"))
    if not weights:
        raise CheckpointError(f"{directory} holds no *.safetensors: not a checkpoint folder")
    for name in (*_DESCRIPTIONS, *weights):
        try:
            data = (directory / name).read_bytes()
        except FileNotFoundError as error:
            raise CheckpointError(f"{directory} has no {name}: not a complete checkpoint folder") from error
        total.update(f"{name}\0{len(data)}\0".encode())
        total.update(data)
    return total.hexdigest()


def load_member(directory: Path, *, device: str = "cpu", digest: str | None = None) -> Member:
    """The member in a checkpoint folder.

    Args:
        digest: The digest that it must have, where one is known (from a registry); None = whatever it has.

    Raises:
        CheckpointError: a file is missing, broken or of another task or shape, or the digest differs.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a checkpoint folder: there is no such folder")
    found = member_digest(directory)
    if digest is not None and found != digest:
        raise CheckpointError(
            f"{directory}: its files have digest {found[:16]}…, registered was {digest[:16]}…: they were changed; register it again or restore it"
        )
    described = _read_json(directory / "recipe.json")
    task = TASKS.get(described.get("task"))
    if task is None:
        raise CheckpointError(f"{directory / 'recipe.json'} names the task {described.get('task')!r}; known are {', '.join(sorted(TASKS))}")
    recipe = _read_recipe(directory / "recipe.json", task)
    signature = _read_json(directory / "signature.json")
    metrics = _read_json(directory / "metrics.json") if (directory / "metrics.json").exists() else {}
    learner = task.learner(recipe, signature)
    artifacts = {name: read_weights(directory / f"{name}.safetensors") for name in learner.artifacts()}
    try:
        learner.load_artifacts(artifacts)
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    learner.to(device).eval()
    return Member(task=task, recipe=recipe, signature=signature, metrics=metrics, digest=found, learner=learner)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file's tensors. Raises CheckpointError naming the file when it is missing or is something else (as a pickle)."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error}); pickled weights (.pth, .bin) are never read") from error


def start_from(learner: Learner, uri: str) -> None:
    """Give a learner the weights in the folder (path or URI) of ``--init-from``; what the folder does not hold stays as initialised.

    Raises:
        CheckpointError: there is no such folder, or its ``*.safetensors`` are none, broken, unknown to the task or of another shape.
    """
    try:
        with Folder(uri).fetched("") as directory:
            artifacts = {path.stem: read_weights(path) for path in sorted(directory.glob("*.safetensors"))}
    except FileNotFoundError as error:
        raise CheckpointError(f"--init-from {uri}: there is no such folder") from error
    if not artifacts:
        raise CheckpointError(f"--init-from {uri} holds no *.safetensors: give a checkpoint folder, or one that an import command wrote")
    try:
        learner.start_from(artifacts)
    except ValueError as error:
        raise CheckpointError(f"--init-from {uri}: {error}") from error


def gather_files(pair: str, into: Path) -> Path:
    """A checkpoint folder from files given one by one, as ``moe.safetensors:pc_encoder.safetensors``.

    ``recipe.json`` and ``signature.json`` are taken from the folder of the first file; the files may carry any name that begins with their
    artifact's (``moe_recall@3.safetensors``).

    Raises:
        CheckpointError: a file or a description is missing, or a name begins with no artifact of the task.
    """
    files = [Path(name) for name in pair.split(":")]
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"--model {pair}: {path} is missing")
        if path.suffix != ".safetensors":
            raise CheckpointError(f"--model {pair}: {path} is not a .safetensors file; pickled weights (.pth, .bin) are never read")
    into.mkdir(parents=True, exist_ok=True)
    for name in (*_DESCRIPTIONS, "metrics.json"):
        beside = files[0].parent / name
        if beside.exists():
            (into / name).write_bytes(beside.read_bytes())
        elif name in _DESCRIPTIONS:
            raise CheckpointError(f"--model {pair}: {name} must lie beside {files[0]}: it says how the weights were made")
    task = TASKS.get(_read_json(into / "recipe.json").get("task"))
    if task is None:
        raise CheckpointError(f"--model {pair}: {files[0].parent / 'recipe.json'} names no known task")
    recipe = _read_recipe(into / "recipe.json", task)
    names = sorted(task.learner(recipe, _read_json(into / "signature.json")).artifacts(), key=len, reverse=True)
    for path in files:
        name = next((n for n in names if path.name.startswith(n)), None)
        if name is None:
            raise CheckpointError(f"--model {pair}: the name of {path} begins with none of {', '.join(sorted(names))}")
        target = into / f"{name}.safetensors"
        if target.exists():
            raise CheckpointError(f"--model {pair}: two files for {name}")
        os.symlink(path.resolve(), target)
    missing = [n for n in names if not (into / f"{n}.safetensors").exists()]
    if missing:
        raise CheckpointError(f"--model {pair}: no file for {', '.join(missing)}")
    return into


def _read_recipe(path: Path, task: Task) -> Recipe:
    try:
        return from_dict(type(task.recipe), _read_json(path)["recipe"])
    except KeyError as error:
        raise CheckpointError(f"{path} holds no recipe") from error
    except ValueError as error:
        raise CheckpointError(f"{path} does not fit this version of the program: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, it holds a {type(value).__name__}")
    return value
