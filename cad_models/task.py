"""The contract `Task`: what a job may ask of any room. What the training loop may ask of any model is `cad_models.learner.Learner`.

A room (``cad_models/<name>/``) implements both; ``rayjobs/`` knows no room by name. A new task is one room plus one line in ``tasks.py``.

How a job uses a task::

    prepare   list_raw -> inspect (parallel, isolated) -> duplicates -> splits -> prepare (parallel, isolated) -> part files
    embed     the views of a part -> frozen encoder -> embeddings of the same part
    train     examples (parallel) -> collate -> Learner.forward ... Learner.predict -> evaluate; report. --run: runs; --seeds: fit_rule, combine
    tune      search_space -> recipes -> train; fit_rule + combine + evaluate decide about the champion
    infer     list_requests -> read_input (parallel, isolated) -> Predictor.predict -> rank -> submission; flags of its own: infer_options
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cad_models.config import Recipe
from cad_models.learner import Learner, Predictions

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from cad_models.checkpoint import Member

Columns = dict[str, np.ndarray]
"""Model-ready arrays of some objects: name -> array whose first axis is the object."""

SECONDS = "seconds/"
"""Begins the names of those entries of what `Task.read_input` gives that tell what it cost, by stage."""

LABEL_INDEX = "label_index"
"""A column of ``objects/`` that no file holds: int64, the position of the object's label in `Manifest.class_names` (sorted), -1 without a label. Whoever
names it in `Task.columns` gets it in `Task.examples`."""


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
    shape: np.ndarray | None = None
    """float16 [n, 3]: what :meth:`Task.near_duplicates` compares; None = it takes no part."""
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
    """Column of the number of embeddings."""
    change: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None
    """What each image (uint8 [height, width, 3]) becomes before it is prepared for the encoder: picklable, and its ``repr`` tells all that it depends
    on. The generator is seeded by the image's bytes. None = the image as it is."""
    copies: int = 1
    """Changed versions of each image: those of the first image, then those of the second, and so on."""


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


@dataclass(frozen=True, kw_only=True)
class NamedRun:
    """A training that people ask for by name: ``train.py --run <name>``."""

    changes: Mapping[str, Any]
    """Dotted recipe path -> value, on top of the task's recipe."""
    seeds: tuple[int, ...] = ()
    """One member a seed (``--seeds``); empty = one run with the recipe's own seed."""
    note: str = ""
    """One line for ``--list-runs``: what it is, where it was published."""


@dataclass(frozen=True, kw_only=True)
class InferOptions:
    """What a user may ask of a task's inference beyond the jobs' own flags: a room's subclass adds fields with defaults, each becomes a flag
    ``--options.<field>``. Small and picklable."""


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
        """For each input each member's output, and after these whatever :meth:`Task.rank` needs beside them: float32 or float16 arrays of any shape. On a
        CPU an input's outputs depend on that input alone, bit for bit."""


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
    searched_where_on: frozenset[str] = frozenset()
    """Searched paths that a search leaves alone where the base recipe has them at 0 (off): the data may lack what they need."""
    points_to_evaluate: tuple[Mapping[str, Any], ...] = ()
    """Changes of the recipe (dotted path -> value) that were good elsewhere: a search tries them right after the base recipe, as far as its space can
    give them. The name is Ray Tune's."""
    split_names: tuple[str, ...] = ("train", "val", "test")
    reference_split: str = ""
    """Split whose predictions :meth:`evaluate` wants beside those of the split that it measures, as ``train`` for nearest neighbours; "" = none. Costs
    a prediction of that split at every evaluation, held in memory whole."""
    history_columns: Mapping[str, str] = MappingProxyType({})
    """Columns of a run's ``training_history.csv`` after ``epoch``: name -> metric, as ``{"train_loss": "train/loss"}``; empty = every metric, with
    ``_`` for ``/``."""
    report_splits: tuple[str, ...] = ()
    """Splits whose predictions :meth:`report` wants, as ``("val", "test")``; empty = the task has no report. Empty splits are left out, and the
    reference split is added."""
    runs: Mapping[str, NamedRun] = MappingProxyType({})
    """Trainings by name, for ``train.py --run``."""
    combine_rules: tuple[str, ...]
    """Ensemble rules that :meth:`combine` and :meth:`rank` know, for ``--combine``; the first is the default."""
    fitted_rules: tuple[str, ...] = ()
    """Those among them that cannot do without what :meth:`fit_rule` found on validation predictions, as ``stacked``."""
    infer_options: type[InferOptions] = InferOptions
    """Flags ``--options.*`` of ``infer.py``; every field needs a default."""
    signature_notes: tuple[str, ...] = ("dataset_digest",)
    """Entries of :meth:`signature` that tell where a checkpoint comes from and need not agree with the data it meets."""
    preview_source: tuple[str, str] | None = None
    """Folder and column of encoded images (binary, or list<binary>) for ``prepare.py --preview``; None = the first of ``embed_columns``, if any."""
    requirements: tuple[str, ...] = ()
    """Distributions that :meth:`predictor` imports beyond numpy, torch and pillow, as ``scikit-learn``; a registered version names them."""

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

    def near_duplicates(self, inspections: Sequence[Inspection]) -> list[tuple[int, int, float]]:
        """Pairs (i < j) of objects that are almost or exactly the same, and how far apart they are, the closest first."""
        return []

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
    """What ``embed.py`` encodes always; empty for a task without frozen embeddings."""

    def changed_embed_columns(self, recipe: Recipe) -> tuple[EmbedColumn, ...]:
        """What it encodes besides, where the recipe asks for it: changed versions of the images, for augmentation or for harder queries. Only what
        :meth:`columns` asks of the recipe that trains is read."""
        return ()

    # train --------------------------------------------------------------------------------------------------------------------------------
    @abstractmethod
    def columns(self, recipe: Recipe) -> dict[str, list[str]]:
        """Folder -> columns that :meth:`examples` reads; folder ``embeddings`` means the chosen encoder's, and ``objects`` may name `LABEL_INDEX`."""

    @abstractmethod
    def examples(self, tables: "dict[str, pa.Table]", recipe: Recipe) -> Columns:
        """Co-partitioned tables of one part -> model-ready arrays, no larger than the model needs. Runs in parallel, without torch."""

    @abstractmethod
    def collate(self, columns: Columns, recipe: Recipe, *, rngs: Sequence[np.random.Generator] | None) -> "dict[str, torch.Tensor]":
        """Arrays -> tensors of a batch. ``rngs``: one generator an object for augmentation, so that an object's augmentation does not depend
        on its neighbours or on the number of workers; None = evaluation, nothing random."""

    @abstractmethod
    def learner(self, recipe: Recipe, signature: dict[str, Any]) -> Learner:
        """A freshly initialised learner (seeded by the caller) for data of this signature."""

    @abstractmethod
    def signature(self, recipe: Recipe, dataset: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint must agree in with the data it meets: encoder name, digest and width, point count, channels, axis
        convention, dataset digest, class names. JSON values.

        Args:
            dataset: The manifests: ``manifest`` (`Manifest`: ``class_names`` and ``class_counts("train")`` tell of labels) and ``embeddings``
                (`EmbeddingsManifest`, None where :meth:`columns` asks for none).
        """

    @abstractmethod
    def evaluate(self, predictions: Predictions, reference: Predictions | None = None) -> dict[str, float]:
        """Metrics of a whole split (never a mean over batches), without the split's prefix: ``image_to_mesh/recall@3``.

        Args:
            predictions: Of the split that is measured.
            reference: Of ``reference_split``, by the same learner or ensemble; None for tasks that name none.
        """

    def details(self, predictions: Predictions, *, class_names: Sequence[str] = ()) -> dict[str, float]:
        """Further figures, of the test split when a run or a search ends: bounds of intervals as ``<metric>_low``, ``<metric>_high``, classes by name."""
        return {}

    def references(self, columns: Columns, recipe: Recipe, reference: Columns | None = None) -> dict[str, dict[str, float]]:
        """Baselines that need no training, on a whole split: name -> metrics named as :meth:`evaluate` names them.

        Args:
            columns: Of the split that is measured, as :meth:`examples` gives them.
            reference: Of ``reference_split``; None for tasks that name none.
        """
        return {}

    def report(
        self, predictions: Mapping[str, Predictions], *, recipe: Recipe, signature: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> dict[str, bytes]:
        """Pictures and pages about a run's best checkpoint: file name -> content, written to ``<run>/report/``. Name the page ``index.html``; it must
        stand alone (no network). Deterministic.

        Args:
            predictions: By split: ``report_splits`` and ``reference_split``.
            signature: Of the run: class names and whatever else :meth:`signature` holds.
            metrics: Of the best checkpoint, ``<split>/<name>``, test split included.
        """
        return {}

    def baseline_recipes(self, recipe: Recipe) -> dict[str, Recipe]:
        """Baselines that are trained like the recipe itself: name -> recipe."""
        return {}

    def fit_rule(self, members: Sequence[Predictions], *, rule: str) -> dict[str, Any]:
        """What an ensemble rule learns from the members' predictions of the validation split: weights, a stacking model's coefficients, a decision
        threshold. JSON values; stored with the registered ensemble and handed to :meth:`combine` and :meth:`rank` as ``fitted``. Called for every
        rule, for single members too; {} = nothing to fit."""
        return {}

    @abstractmethod
    def combine(
        self,
        members: Sequence[Predictions],
        *,
        rule: str | None = None,
        weights: Sequence[float] | None = None,
        fitted: Mapping[str, Any] | None = None,
    ) -> Predictions:
        """The ensemble rule: the members' predictions of the same objects -> one.

        Args:
            rule: One of ``combine_rules``; None = the first.
            weights: One a member; None = equal.
            fitted: What :meth:`fit_rule` said of these members and this rule; None or {} = nothing was fitted.
        """

    # infer --------------------------------------------------------------------------------------------------------------------------------
    @abstractmethod
    def list_requests(
        self, queries: str | Sequence[str], gallery: str | None, *, direction: str = "auto", options: InferOptions | None = None
    ) -> Requests:
        """What a folder of queries (or a list of files) asks of a folder of gallery files; cheap: reads no file contents.

        Args:
            gallery: None where the user named none; a task whose answers are labels needs none.
            options: An instance of ``infer_options``; None = its defaults.

        Raises:
            ValueError: a folder is not there, or nothing in them makes a search; the message says what was found.
        """

    @abstractmethod
    def predictor(self, members: "Sequence[Member]", *, device: str = "cpu", options: InferOptions | None = None) -> Predictor:
        """The members, ready to work on inputs. Raises ValueError for a member that cannot be served here, as for want of its encoder, and for members
        that do not go together, as classifiers of other classes."""

    @abstractmethod
    def read_input(self, item: Input, settings: Any) -> Columns | Reject:
        """The arrays that a `Predictor` of these settings needs of one file, and its picture as ``thumbnail`` (a JPEG's bytes as uint8 [n], empty where
        there is none). ``seconds/<stage>``, if any, tell what reading it cost. Runs in a process that may be lost."""

    @abstractmethod
    def rank(
        self,
        search: Search,
        outputs: "Mapping[int, list[np.ndarray]]",
        *,
        rule: str,
        weights: Sequence[float],
        top_k: int,
        fitted: Mapping[str, Any] | None = None,
        signatures: Sequence[Mapping[str, Any]] = (),
        options: InferOptions | None = None,
    ) -> list[Answer]:
        """The best answers of every query, by query and rank.

        Args:
            outputs: `Predictor.predict` by position in `Requests.inputs`; files that were rejected are missing.
            rule: One of ``combine_rules``.
            weights: One a member.
            fitted: As in :meth:`combine`.
            signatures: One a member: class names and whatever else :meth:`signature` holds.
            options: As in :meth:`list_requests`.
        """

    @abstractmethod
    def submission(self, answers: Sequence[Answer], *, options: InferOptions | None = None) -> list[list[str]]:
        """The answers as the rows of a CSV file, header first, in the form that the task's users expect."""
