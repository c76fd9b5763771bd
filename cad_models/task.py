"""The two contracts: `Task`, what a job may ask of any room, and `Learner`, what the training loop may ask of any model.

A room (``cad_models/<name>/``) implements both; ``rayjobs/`` knows no room by name. A new task is one room plus one line in ``tasks.py``.

How a job uses a task::

    prepare   list_raw -> inspect (parallel, isolated) -> duplicates -> splits -> prepare (parallel, isolated) -> part files
    embed     the views of a part -> frozen encoder -> embeddings of the same part
    train     examples (parallel) -> collate -> Learner.forward ... Learner.predict -> evaluate
    tune      search_space -> recipes -> train; combine + evaluate decide about the champion
    infer     list_requests -> read_input (parallel, isolated) -> Predictor.predict -> rank -> submission
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cad_models.config import Recipe

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from cad_models.checkpoint import Member

Columns = dict[str, np.ndarray]
"""Model-ready arrays of some objects: name -> array whose first axis is the object."""

ADAPT_OBJECTS = 256
"""Most training objects that `Learner.adapt` sees."""

Predictions = dict[str, np.ndarray]
"""What a learner says of a whole split (or of a gallery): name -> array whose first axis is the object."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """The one number that ranks checkpoints, trials and members."""

    name: str
    """Metric name with its split, as ``val/recall@3``."""
    mode: Literal["max", "min"] = "max"

    def better(self, value: float, than: float | None) -> bool:
        """Whether ``value`` is strictly better; anything finite is better than None."""
        if not np.isfinite(value):
            return False
        return than is None or (value > than if self.mode == "max" else value < than)


@dataclass(frozen=True, kw_only=True)
class RawItem:
    """One object as the user gave it, before any heavy work."""

    object_id: str
    """Unique within a dataset."""
    source: str
    """What to call it in messages and in the quarantine: a path relative to ``--source``, or ``builtin:<index>``."""
    uri: str
    """Where its bytes are: a path or URI; for generated objects the generator's arguments."""
    label: str = ""
    """Class or category, where there is one."""
    images: tuple[str, ...] = ()
    """Paths of the user's own views, in view order; empty = render them."""
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What one cheap look at an object gives; enough to find duplicates and to split."""

    sha256: str
    """Of the source bytes."""
    size: int
    """Exact duplicates agree in it (for meshes: the number of faces)."""
    complexity: float
    """Positive; splits may be stratified by its quantiles (for meshes: vertices x faces)."""
    signature: np.ndarray
    """float64 [K]: equal, up to rounding, for exact duplicates and only for them."""
    inputs: str = ""
    """Digest of the other files that :meth:`Task.prepare` reads (the user's images); another digest remakes the object."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A prepared object: the values of one row of ``objects/`` and of one row of ``views/``."""

    objects: dict[str, Any]
    views: dict[str, Any] = field(default_factory=dict)
    rejects: list[tuple[str, "Reject"]] = field(default_factory=list)
    """Pairs (source, Reject) for what was left out of the object, as one broken image of 24."""


@dataclass(frozen=True, kw_only=True)
class Reject:
    """An object that cannot be used: goes to ``quarantine.parquet`` and never stops a job."""

    reason: str
    """One of ``cad_models.dataset.REASONS``."""
    detail: str


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a source holds."""

    items: list[RawItem]
    rejects: list[tuple[str, Reject]] = field(default_factory=list)
    """Pairs (source, Reject) already known from the listing, as an image without a model."""
    num_ignored: int = 0
    """Files of kinds that the task does not read."""


@dataclass(frozen=True, kw_only=True)
class EmbedColumn:
    """A column of encoded images that ``embed.py`` turns into a column of embeddings."""

    source: tuple[str, str]
    """Folder and column of the images, as ``("views", "images")``: list<binary>, encoded images."""
    name: str
    """Column of the embeddings: float16 [images, width]."""
    count: str
    """Column of the number of images."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """One file that ``infer.py`` reads."""

    kind: str
    """What the task makes of it, as ``image`` or ``mesh``."""
    source: str
    """What to call it in messages and in the quarantine."""
    uri: str
    """Its path or URI."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One query, or one object of a gallery."""

    entry_id: str
    """Unique among the search's queries, or its gallery."""
    inputs: tuple[int, ...]
    """Positions in `Requests.inputs`: several when an object is given by several views."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """Queries, and the gallery that their answers are chosen from."""

    direction: str
    """As ``image_to_mesh``."""
    queries: tuple[Entry, ...]
    gallery: tuple[Entry, ...] = ()
    """Empty where answers are no files, as the labels of a classifier."""


@dataclass(frozen=True, kw_only=True)
class Requests:
    """What a user asks of ``infer.py``: files, each named once, and what is to be found among them."""

    inputs: tuple[Input, ...]
    searches: tuple[Search, ...]
    num_ignored: int = 0
    """Files of kinds that no search reads."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer to one query."""

    direction: str
    query: str
    rank: int
    """From 1."""
    answer: str
    score: float
    """Higher is better; comparable within a query."""


class Predictor(ABC):
    """The members of an ensemble in one process: what a file that was read is to each of them."""

    seconds: dict[str, float]
    """Time spent so far in each stage of :meth:`predict`, as ``{"encode images": 1.5}``."""

    @property
    @abstractmethod
    def settings(self) -> Any:
        """What `Task.read_input` must know of the members; small and picklable."""

    @abstractmethod
    def predict(self, batch: Sequence[Columns]) -> list[list[np.ndarray]]:
        """For each input each member's output, float32 [width]. On a CPU an input's outputs depend on that input alone, bit for bit."""


class Learner(ABC):
    """Model plus losses, mixed into a ``torch.nn.Module``; DDP wraps it whole.

    Every parameter that takes part in ``forward`` must receive a gradient in every step (multiply unused experts by 0).
    """

    turns: tuple[str, ...] = ("model",)
    """Optimisers in their order within a step; ``("discriminator", "generator")`` for an adversarial task."""

    @abstractmethod
    def optimizers(self, recipe: Recipe) -> "dict[str, torch.optim.Optimizer]":
        """One optimiser per turn. Each parameter group carries its peak ``lr``; the loop scales all by the schedule."""

    def adapt(self, batch: "dict[str, torch.Tensor]") -> None:  # noqa: B027  (most models need no such start)
        """Data-dependent initialisation from the first training objects (collated as for evaluation, at most `ADAPT_OBJECTS`); called once,
        before a fresh run, with the same batch on every worker."""

    @abstractmethod
    def forward(self, batch: "dict[str, torch.Tensor]", turn: str) -> "dict[str, torch.Tensor]":
        """``{"loss": scalar, ...}``; the other scalars are logged. On several workers: this worker's share, such that the mean of the
        workers' gradients is the gradient of the whole batch's loss."""

    @abstractmethod
    def predict(self, batch: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        """Deterministic outputs, first axis = object; what `Task.evaluate` reads once a split is complete."""

    @abstractmethod
    def artifacts(self) -> "dict[str, dict[str, torch.Tensor]]":
        """The named files of a checkpoint: ``{"moe": state_dict, "pc_encoder": state_dict}``; all weights, each once."""

    @abstractmethod
    def load_artifacts(self, artifacts: "Mapping[str, dict[str, torch.Tensor]]") -> None:
        """The inverse of :meth:`artifacts`. Raises ValueError naming file and key when names or shapes differ."""


class Task(ABC):
    """What a job may ask of any room. Final classes; no state beyond the class attributes."""

    name: str
    recipe: Recipe
    """Defaults that reproduce the figure in the room's README."""
    smoke: Recipe
    """The same code, seconds on a CPU."""
    score: Score
    best_metrics: dict[str, str]
    """Best checkpoints to keep beside the last: folder name -> metric, as ``{"mean": "val/recall@3"}``; ``score`` must be
    among them, and all are better in its direction."""
    search_space: Callable[[Any], dict[str, Any]]
    """``search_space(trial)`` suggests values with an ``optuna.Trial`` and returns dotted recipe path -> value."""
    split_names: tuple[str, ...] = ("train", "val", "test")

    # prepare ------------------------------------------------------------------------------------------------------------------------------
    @abstractmethod
    def list_raw(self, source: str) -> Listing:
        """List a source; cheap: reads no file contents. ``builtin:<N>`` must work. Raises ValueError for a source that is not there."""

    @abstractmethod
    def inspect(self, item: RawItem, recipe: Recipe) -> Inspection | Reject:
        """Parse an object once; runs in parallel, in a process that may be lost."""

    @abstractmethod
    def duplicates(self, inspections: Sequence[Inspection]) -> list[int]:
        """For each object the index of the first member of its group of exact duplicates (its own index when it has none)."""

    @abstractmethod
    def prepare(self, item: RawItem, recipe: Recipe) -> Row | Reject:
        """The heavy work; runs in parallel, in a process that may be lost; the same item gives the same bytes."""

    @abstractmethod
    def prepare_settings(self, recipe: Recipe) -> dict[str, Any]:
        """The recipe's values on which :meth:`prepare` depends, as JSON; another value means other part files."""

    @abstractmethod
    def schemas(self, recipe: Recipe) -> "dict[str, pa.Schema]":
        """Folder name -> columns that :meth:`prepare` fills, ``{"objects": ..., "views": ...}``. The job adds object_id, group_id, split,
        label, source and sha256 to ``objects`` and object_id to the others."""

    # embed --------------------------------------------------------------------------------------------------------------------------------
    embed_columns: tuple[EmbedColumn, ...] = ()
    """What ``embed.py`` encodes; empty for a task without frozen embeddings."""

    # train --------------------------------------------------------------------------------------------------------------------------------
    @abstractmethod
    def columns(self, recipe: Recipe) -> dict[str, list[str]]:
        """Folder -> columns that :meth:`examples` reads; folder ``embeddings`` means the chosen encoder's."""

    @abstractmethod
    def examples(self, tables: "dict[str, pa.Table]", recipe: Recipe) -> Columns:
        """Co-partitioned tables of one part -> model-ready arrays, no larger than the model needs. Runs in parallel, without torch."""

    @abstractmethod
    def collate(self, columns: Columns, recipe: Recipe, *, rngs: Sequence[np.random.Generator] | None) -> "dict[str, torch.Tensor]":
        """Arrays -> tensors of a batch. ``rngs``: one generator an object for augmentation, so that an object's augmentation does not depend
        on its neighbours or on the number of workers; None = evaluation, nothing random."""

    @abstractmethod
    def learner(self, recipe: Recipe, signature: dict[str, Any]) -> "Learner":
        """A freshly initialised learner (seeded by the caller) for data of this signature."""

    @abstractmethod
    def signature(self, recipe: Recipe, dataset: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint must agree in with the data it meets: encoder name, digest and width, point count, channels, axis
        convention, dataset digest. ``dataset`` holds the manifests (``manifest`` and ``embeddings``)."""

    @abstractmethod
    def evaluate(self, predictions: Predictions) -> dict[str, float]:
        """Metrics of a whole split (never a mean over batches), without the split's prefix: ``image_to_mesh/recall@3``."""

    def references(self, columns: Columns, recipe: Recipe) -> dict[str, dict[str, float]]:
        """Baselines that need no training, on a whole split: name -> metrics named as :meth:`evaluate` names them."""
        return {}

    def baseline_recipes(self, recipe: Recipe) -> dict[str, Recipe]:
        """Baselines that are trained like the recipe itself: name -> recipe."""
        return {}

    @abstractmethod
    def combine(self, members: Sequence[Predictions], *, rule: str = "concatenate", weights: Sequence[float] | None = None) -> Predictions:
        """The ensemble rule: the members' predictions of the same objects -> one."""

    # infer --------------------------------------------------------------------------------------------------------------------------------
    @abstractmethod
    def list_requests(self, queries: str | Sequence[str], gallery: str | None, *, direction: str = "auto") -> Requests:
        """What a folder of queries (or a list of files) asks of a folder of gallery files; cheap: reads no file contents.

        Raises:
            ValueError: a folder is not there, or nothing in them makes a search; the message says what was found.
        """

    @abstractmethod
    def predictor(self, members: "Sequence[Member]", *, device: str = "cpu") -> Predictor:
        """The members, ready to work on inputs. Raises ValueError for a member that cannot be served here, as for want of its encoder."""

    @abstractmethod
    def read_input(self, item: Input, settings: Any) -> Columns | Reject:
        """The arrays that a `Predictor` of these settings needs of one file, and its picture as ``thumbnail`` (a JPEG's bytes as uint8 [n]).
        Runs in a process that may be lost."""

    @abstractmethod
    def rank(
        self, search: Search, outputs: "Mapping[int, list[np.ndarray]]", *, rule: str, weights: Sequence[float], top_k: int
    ) -> list[Answer]:
        """The best answers of every query, by query and rank.

        Args:
            outputs: `Predictor.predict` by position in `Requests.inputs`; files that were rejected are missing.
            weights: One a member.
        """

    @abstractmethod
    def submission(self, answers: Sequence[Answer]) -> list[list[str]]:
        """The answers as the rows of a CSV file, header first, in the form that the task's users expect."""
