"""Recipes: what fixes the numbers of a run. Frozen dataclasses, JSON and back, and changes by dotted path.

A *recipe* holds everything that changes results (model, optimiser, schedule, data choices, seed). Resources, paths and tracking belong to the
*job* (``rayjobs/cli.py``) and never change a figure.
"""

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


def check(valid: bool, path: str, value: Any, allowed: str) -> None:
    """Raise ValueError, naming the value and its flag, unless ``valid``; NaN is never valid, as every comparison with it is false."""
    if not valid:
        raise ValueError(f"--{path.replace('_', '-')} is {value!r}: it must be {allowed}")


def added_later(default: Any) -> Any:
    """A field that configs written by an earlier version do not have: :func:`from_dict` gives it its default, which must mean what was done before."""
    return dataclasses.field(default=default, metadata={"added_later": True})


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with one learning rate for the encoder and one for the head."""

    lr: float = 3e-4
    """Peak learning rate of the encoder."""
    head_lr: float = 1e-3
    """Peak learning rate of the head (and of a learned temperature)."""
    weight_decay: float = 0.05
    """Decoupled weight decay; never applied to 1-D parameters, tokens and gates' norms."""
    grad_clip_norm: float = 10.0
    """Largest global gradient norm; 0 = no clipping."""
    ema_decay: float = 0.99
    """Decay per step of the weights' exponential moving average, which is what gets evaluated and saved; 0 = off."""
    micro_batch_size: int = added_later(0)
    """Objects that a worker computes gradients of at once: a batch of any size then needs the memory of so many (gradient caching), for one more
    forward pass; 0 = the whole batch at once."""

    def __post_init__(self) -> None:
        for name in ("lr", "head_lr", "weight_decay", "grad_clip_norm"):
            check(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "at least 0")
        check(0 <= self.ema_decay < 1, "optim.ema_decay", self.ema_decay, "in [0, 1)")
        check(self.micro_batch_size >= 0, "optim.micro_batch_size", self.micro_batch_size, "at least 0 (0 = the whole batch at once)")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Linear warm-up, then cosine, per step."""

    num_epochs: int = 40
    """Passes over the training split."""
    num_warmup_epochs: float = 2.0
    """Length of the linear warm-up, in epochs (fractions count)."""
    min_lr_ratio: float = 0.01
    """Final learning rate as a share of the peak."""
    eval_every_epochs: int = 1
    """Evaluate (and keep the best) every so many epochs; the last epoch is always evaluated."""
    patience_evals: int = added_later(0)
    """End the training after so many evaluations in a row without a better score; 0 = train to the last epoch."""

    def __post_init__(self) -> None:
        check(self.num_epochs >= 1, "schedule.num_epochs", self.num_epochs, "at least 1")
        check(self.num_warmup_epochs >= 0, "schedule.num_warmup_epochs", self.num_warmup_epochs, "at least 0")
        check(0 <= self.min_lr_ratio <= 1, "schedule.min_lr_ratio", self.min_lr_ratio, "in [0, 1]")
        check(self.eval_every_epochs >= 1, "schedule.eval_every_epochs", self.eval_every_epochs, "at least 1")
        check(self.patience_evals >= 0, "schedule.patience_evals", self.patience_evals, "at least 0 (0 = off)")
        if not self.num_warmup_epochs < self.num_epochs:
            raise ValueError(
                f"--schedule.num-warmup-epochs {self.num_warmup_epochs:g} does not fit into --schedule.num-epochs {self.num_epochs}: it must be less; "
                "shorten the warm-up or train longer"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every task's recipe has; a room adds its ``model``, ``data`` and ``loss`` parts in a subclass."""

    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    batch_size: int = 32
    """Objects in an optimiser step, over all workers."""
    seed: int = 0
    """Seeds initialisation, order, augmentation and dropout."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward pass; auto = bfloat16 on GPUs that have it, float32 elsewhere. Losses are float32 always."""
    init_from: str = added_later("")
    """Folder (path or URI) of safetensors whose weights a fresh training starts from: a checkpoint, or some of its files; empty = random weights."""

    def __post_init__(self) -> None:
        check(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        check(self.seed >= 0, "seed", self.seed, "at least 0")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type, values: Any, *, where: str = "") -> Any:
    """Rebuild ``cls`` from :func:`to_dict`'s output; every field must be there (but those `added_later`) and of its type.

    Raises:
        ValueError: unknown or missing field, or a value of another type; the message names the path.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where.rstrip('.') or cls.__name__}: expected the fields of {cls.__name__}, got {values!r}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise ValueError(f"{where}{key}: {cls.__name__} has no such field{_close(key, names)}")
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in values and not f.metadata.get("added_later")]
    if missing:
        raise ValueError(f"{where or cls.__name__}: missing {', '.join(missing)}")
    return cls(**{name: _convert(hints[name], values[name], f"{where}{name}") for name in names if name in values})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        return from_dict(hint, value, where=where + ".")
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{where}: {value!r} is none of {', '.join(map(repr, typing.get_args(hint)))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        inner = typing.get_args(hint)[0]
        return tuple(_convert(inner, item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin in (types.UnionType, typing.Union):
        errors = []
        for option in typing.get_args(hint):
            try:
                return _convert(option, value, where)
            except ValueError as error:
                errors.append(str(error))
        raise ValueError("; ".join(errors))
    if hint is type(None):
        if value is not None:
            raise ValueError(f"{where}: expected nothing, got {value!r}")
        return None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def digest(config: Any, *, length: int = 12) -> str:
    """A short stable hash of a config: the same values give the same digest on every machine."""
    return json_digest(to_dict(config), length=length)


def json_digest(value: Any, *, length: int = 12) -> str:
    """A short stable hash of JSON values, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def value_at(config: Any, path: str) -> Any:
    """The value at a dotted path, as ``value_at(recipe, "optim.lr")``."""
    for name in path.split("."):
        _check_field(config, name, path)
        config = getattr(config, name)
    return config


def replace_at(config: Any, path: str, value: Any) -> Any:
    """A copy with one value changed, as ``replace_at(recipe, "optim.lr", 3e-4)``.

    Raises:
        ValueError: no such path, or a value of another type.
    """
    return _replaced(config, path.split("."), value, path)


def _replaced(config: Any, names: list[str], value: Any, path: str) -> Any:
    name, *rest = names
    _check_field(config, name, path)
    if rest:
        return dataclasses.replace(config, **{name: _replaced(getattr(config, name), rest, value, path)})
    hint = typing.get_type_hints(type(config))[name]
    return dataclasses.replace(config, **{name: _convert(hint, value, path)})


def replace_all(config: Any, values: Mapping[str, Any]) -> Any:
    """A copy with other values at dotted paths, all exchanged at once: only together they need to be valid.

    Raises:
        ValueError: no such path, a value of another type, or one that does not go with the others.
    """
    tree = to_dict(config)
    for path, value in values.items():
        value_at(config, path)  # refuses a path that is not there
        *parents, name = path.split(".")
        inner = tree
        for parent in parents:
            inner = inner[parent]
        inner[name] = value
    return from_dict(type(config), tree)


def paths(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf as dotted path -> value, in field order."""
    leaves: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            leaves |= paths(value, f"{prefix}{field.name}.")
        else:
            leaves[prefix + field.name] = value
    return leaves


def differences(left: Any, right: Any) -> list[str]:
    """Lines ``path: left -> right`` for every leaf that differs; for errors that name both sides."""
    a, b = paths(left), paths(right)
    return [f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in sorted(a | b) if a.get(key) != b.get(key)]


def _check_field(config: Any, name: str, path: str) -> None:
    names = [f.name for f in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else []
    if name not in names:
        raise ValueError(f"{path}: {type(config).__name__} has no field {name!r}{_close(name, names)}")


def _close(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=2)
    return f"; did you mean {' or '.join(close)}?" if close else f" (it has {', '.join(names)})"
