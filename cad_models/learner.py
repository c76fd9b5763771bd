"""The contract `Learner`: what the training loop may ask of any model. What a job may ask of any room is `cad_models.task.Task`."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from cad_models.config import Recipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Predictions = dict[str, np.ndarray]
"""What a learner says of a whole split (or of a gallery): name -> array whose first axis is the object."""

ADAPT_BATCH = 256
"""Objects in a batch that `Learner.adapt` sees (fewer in the last one)."""


class Learner(ABC):
    """Model plus losses, mixed into a ``torch.nn.Module``; DDP wraps it whole.

    Every parameter that takes part in ``forward`` must receive a gradient in every step (multiply unused experts by 0).
    """

    turns: tuple[str, ...] = ("model",)
    """Optimisers in their order within a step; ``("discriminator", "generator")`` for an adversarial task."""
    adapt_objects: int | None = 0
    """Training objects that :meth:`adapt` sees: the first so many in dataset order, None = the whole train split, 0 = it is not called."""

    @abstractmethod
    def optimizers(self, recipe: Recipe) -> "dict[str, torch.optim.Optimizer]":
        """One optimiser per turn. Each parameter group carries its peak ``lr``; the loop scales all by the schedule."""

    def adapt(self, batches: "Iterator[dict[str, Tensor]]") -> None:  # noqa: B027  (most models need no such start)
        """Data-dependent initialisation from the train split: called once, before a fresh run, on every worker with the same batches.

        Args:
            batches: Batches of `ADAPT_BATCH` objects in dataset order, collated as for evaluation; at most ``adapt_objects`` objects in all. An
                iterator: a whole split need not fit into memory.
        """

    def remember(self, reference: Predictions) -> None:  # noqa: B027  (most models need nothing of it)
        """Keep what a checkpoint must know of the task's ``reference_split`` beyond its weights, as class centres. Called before a checkpoint is written
        at an evaluation, on the worker that writes it, with this learner's predictions of that split. It must not change what is predicted, and what it
        keeps belongs to `artifacts`, not to ``state_dict`` (which the loop averages)."""

    @abstractmethod
    def forward(self, batch: "dict[str, Tensor]", turn: str) -> "dict[str, Tensor]":
        """``{"loss": scalar, ...}``; the other scalars are logged. On several workers: this worker's share, such that the mean of the
        workers' gradients is the gradient of the whole batch's loss."""

    @abstractmethod
    def predict(self, batch: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """Deterministic outputs, first axis = object; what `Task.evaluate` reads once a split is complete."""

    def predict_more(self, batch: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """What else of a split's objects `Task.details` and `Task.fit_rule` read beside :meth:`predict`: costly or large, therefore asked for once, when a
        run or a search ends, and not at every evaluation. First axis = object; of a large split only the first objects are asked, about a thousand."""
        return {}

    @abstractmethod
    def artifacts(self) -> "dict[str, dict[str, Tensor]]":
        """The named files of a checkpoint: ``{"moe": state_dict, "pc_encoder": state_dict}``; all weights, each once."""

    @abstractmethod
    def load_artifacts(self, artifacts: "Mapping[str, dict[str, Tensor]]") -> None:
        """The inverse of :meth:`artifacts`. Raises ValueError naming file and key when names or shapes differ."""

    def start_from(self, artifacts: "Mapping[str, dict[str, Tensor]]") -> None:
        """Begin with another checkpoint's weights: some of the named files or all. Raises ValueError naming what does not fit."""
        own = self.artifacts()
        if unknown := artifacts.keys() - own.keys():
            raise ValueError(f"{', '.join(sorted(unknown))}: this task's files are {', '.join(sorted(own))}")
        self.load_artifacts({**own, **artifacts})


class EmbeddingLearner(Learner):
    """Its loss compares embeddings of objects: the loop may take a batch in pieces (``--optim.micro-batch-size``) and get the whole batch's gradient.
    ``forward(batch, turn)`` is ``loss_from(embed(batch), batch)``; there is one turn."""

    @abstractmethod
    def embed(self, batch: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """The costly part: embeddings by name, first axis = object. A row depends on its object alone (but for what BatchNorm does)."""

    @abstractmethod
    def loss_from(self, embedded: "dict[str, Tensor]", batch: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """What :meth:`forward` returns, from the embeddings and whatever else of the batch is cheap."""


def check_fit(file: str, given: "Mapping[str, Tensor]", own: "Mapping[str, Tensor]", *, most: int = 5) -> None:
    """Raises ValueError, naming ``file`` and up to ``most`` keys, when the tensors of a file are not those that a recipe makes, by name and shape."""
    problems = [f"lacks {key}" for key in own.keys() - given.keys()]
    problems += [f"has the unknown {key}" for key in given.keys() - own.keys()]
    problems += [
        f"{key} has shape {list(given[key].shape)}, the recipe makes {list(own[key].shape)}"
        for key in own.keys() & given.keys()
        if given[key].shape != own[key].shape
    ]
    if problems:
        raise ValueError(f"{file} does not fit: {'; '.join(sorted(problems)[:most])}")
