"""Predictions and metrics of whole splits, on one worker or on all of a training's."""

import itertools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from cad_models.common.memory import RegularRelease, release_freed_memory
from cad_models.config import Recipe
from cad_models.task import Columns, Predictions, Task
from rayjobs.columns_on_disk import GrowingColumns
from rayjobs.streams import ROW_KEY, SplitStream

_EVAL_BATCH = 64
MORE_OBJECTS = 256
"""Objects of a split for which `Learner.predict_more` is asked: what it gives may be large, and memory must not grow with the dataset."""


def split_metrics(
    task: Task,
    recipe: Recipe,
    learner: nn.Module,
    stream: SplitStream,
    device: torch.device,
    split: str,
    *,
    reference: SplitStream | None = None,
    group: Any = None,
) -> dict[str, float]:
    """Metrics of a whole split, ``<split>/<name>``; on several workers each predicts its parts, and rank 0 gets the metrics (others an empty dict).

    Args:
        reference: The task's reference split, which is predicted too, and which the learner gets to see (`Learner.remember`); None for a task
            without one.
    """
    predictions = predict_split(task, recipe, learner, stream, device, group=group)
    beside = None if reference is None else predict_split(task, recipe, learner, reference, device, group=group)
    if beside is not None:
        learner.remember(beside)
    return {} if predictions is None else named_metrics(task, predictions, split, beside)


def named_metrics(task: Task, predictions: Predictions, split: str, reference: Predictions | None = None) -> dict[str, float]:
    """`Task.evaluate` with the split's prefix."""
    return {f"{split}/{name}": float(value) for name, value in task.evaluate(predictions, reference).items()}


def final_figures(
    task: Task, predictions: Predictions, reference: Predictions | None = None, signature: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, float]:
    """`Task.evaluate` and `Task.details` of the test split, ``test/<name>``."""
    details = task.details(predictions, class_names=signature.get("class_names", ()))
    details = {f"test/{name}": float(value) for name, value in details.items()}
    return named_metrics(task, predictions, "test", reference) | details


def fitted_alone(task: Task, predicted: Mapping[str, Predictions]) -> Predictions:
    """A single member's predictions of the test split, with what the task's first rule finds on those of the validation split."""
    rule = task.combine_rules[0]
    fitted = task.fit_rule([predicted["val"]], rule=rule)
    return task.combine([predicted["test"]], rule=rule, fitted=fitted) if fitted else predicted["test"]


def predict_split(
    task: Task, recipe: Recipe, learner: nn.Module, stream: SplitStream, device: torch.device, *, more: bool = False, group: Any = None
) -> Predictions | None:
    """Predictions of a whole split in dataset order (None on workers other than rank 0). Batches never cross parts, so the result does not
    depend on the number of workers.

    Args:
        more: With what `Learner.predict_more` adds, for the first parts of the split that hold `MORE_OBJECTS` together: these columns may be shorter.
    """
    if stream.num_rows == 0:
        raise ValueError(
            f"the {stream.split} split of --dataset {stream.dataset.uri} is empty: prepare with a larger --split.{stream.split}-fraction or more objects"
        )
    was_training = learner.training
    learner.eval()
    whole, costly = GrowingColumns(), GrowingColumns()
    end = stream.key_after(MORE_OBJECTS) if more else 0
    release = RegularRelease()
    parts = stream.parts(rank(), world_size())
    with torch.inference_mode():
        # As many rounds on every worker: after each, rank 0 gets the others' parts, so that none keeps more than one.
        for _ in range(-(-sum(map(bool, stream.part_rows)) // world_size())):
            pieces: list[tuple[Columns, Columns]] = []
            for columns in itertools.islice(parts, 1):
                keys = columns.pop(ROW_KEY)
                for start in range(0, len(keys), _EVAL_BATCH):
                    chunk = {name: column[start : start + _EVAL_BATCH] for name, column in columns.items()}
                    batch = {n: t.to(device) for n, t in task.collate(chunk, recipe, rngs=None).items()}
                    predicted = {n: _array(t) for n, t in learner.predict(batch).items()}
                    added = learner.predict_more(batch) if keys[start] < end else {}
                    pieces.append((predicted, {n: _array(t) for n, t in added.items()}))
            for piece, more_of_it in _gathered(pieces, group):
                whole.append(piece)
                costly.append(more_of_it)
            release()
    release_freed_memory()
    learner.train(was_training)
    return None if rank() else whole.arrays() | costly.arrays()


def _gathered(pieces: list[Any], group: Any) -> list[Any]:
    """On rank 0 those of all workers, in the order of their ranks; nothing on the others."""
    if group is None:
        return pieces
    gathered: list[Any] | None = [None] * world_size() if rank() == 0 else None
    # Pickled by torch.distributed, between the processes of this one run only.
    dist.gather_object(pieces, gathered, dst=0, group=group)
    return [] if gathered is None else [piece for of_worker in gathered for piece in of_worker]


def _array(tensor: torch.Tensor) -> np.ndarray:
    """As numpy: numbers as float32, but for what a learner keeps small as float16."""
    return (tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float16 else tensor).cpu().numpy()


def rank() -> int:
    """This worker's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Workers of this training."""
    return dist.get_world_size() if dist.is_initialized() else 1
