"""The recipe of the histograms task: what fixes its numbers. Imports no torch, so that ``--help`` is quick."""

from dataclasses import dataclass
from typing import Literal

from cad_models.config import OptimConfig, Recipe, ScheduleConfig, check

InputName = Literal["model", "hull", "distributions", "affine"]
Encoding = Literal["raw", "sqrt", "sqrt+cumulative"]


@dataclass(frozen=True, kw_only=True)
class HistogramData:
    """What is made of the raw files, and what training reads of it."""

    log2_chords: int = 14
    """Chords cast for the histograms of a mesh: 2 to this power, a tenth of which are too short to count."""
    inputs: tuple[InputName, ...] = ("affine",)
    """What the model sees, one after the other: model, hull = the four histograms of that part; distributions = D1, D2, A3; affine = the same in the
    affine frame. The last two need meshes."""
    bins: Literal[8, 16, 32, 64, 128] = 32
    """Bins of each histogram that the model sees (inputs model and hull)."""
    encoding: Encoding = "sqrt"
    """raw; sqrt = square roots (Hellinger), which make differences of small bins count; sqrt+cumulative = beside them the running sums, whose
    differences are the earth mover's."""

    def __post_init__(self) -> None:
        check(4 <= self.log2_chords <= 20, "data.log2_chords", self.log2_chords, "in 4 … 20")
        check(len(self.inputs) > 0, "data.inputs", self.inputs, "at least one of model, hull, distributions, affine")
        check(len(set(self.inputs)) == len(self.inputs), "data.inputs", self.inputs, "each input once")


@dataclass(frozen=True, kw_only=True)
class HistogramModel:
    """Small networks side by side, each from the inputs to a unit vector; the embedding is all of them, concatenated."""

    width: int = 128
    """Units of a hidden layer."""
    depth: int = 2
    """Hidden layers."""
    embed_dim: int = 32
    """Width of each network's unit vector."""
    activation: Literal["none", "relu", "gelu"] = "gelu"
    """After each hidden layer; none = a linear map, as published."""
    residual: bool = True
    """Add a hidden layer's input to its output, but for the first."""
    num_networks: int = 4
    """Networks side by side, trained at once: an ensemble in one member."""
    standardize: bool = True
    """Give the first layer inputs of mean 0 and deviation 1 (over the train split)."""
    dropout: float = 0.1
    """Probability that a hidden unit is left out in training."""
    input_dropout: float = 0.0
    """The same for an input."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "embed_dim", "num_networks"):
            check(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "at least 1")
        for name in ("dropout", "input_dropout"):
            check(0 <= getattr(self, name) < 1, f"model.{name}", getattr(self, name), "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class HistogramLoss:
    """What draws shapes of a class together; each network has its own."""

    kind: Literal["pairwise_cosine", "normalized_softmax", "arcface", "proxy_anchor", "supcon", "multi_similarity", "triplet"] = "normalized_softmax"
    """pairwise_cosine = the source system's; the others are pytorch-metric-learning's. The first three after it learn a vector for every class."""
    temperature: float = 0.0625
    """Of normalized_softmax and supcon."""
    margin: float = 0.2
    """Of triplet (in Euclidean distance) and proxy_anchor (in cosine)."""
    margin_deg: float = 15.0
    """Of arcface, in degrees."""
    mixup: float = 0.0
    """Mix pairs of training objects, with shares drawn from Beta(mixup, mixup); 0 = off. With normalized_softmax and arcface only."""

    def __post_init__(self) -> None:
        check(self.temperature > 0, "loss.temperature", self.temperature, "above 0")
        check(self.margin >= 0, "loss.margin", self.margin, "at least 0")
        check(0 <= self.margin_deg < 90, "loss.margin_deg", self.margin_deg, "in [0, 90)")
        check(self.mixup >= 0, "loss.mixup", self.mixup, "at least 0 (0 = off)")
        if self.mixup > 0 and self.kind not in ("normalized_softmax", "arcface"):
            raise ValueError(f"--loss.mixup {self.mixup:g} needs a loss that is a sum over objects: --loss.kind normalized_softmax or arcface, not {self.kind}")


@dataclass(frozen=True, kw_only=True)
class ClusteringConfig:
    """Agglomerative clustering of the embeddings (cosine distance, complete linkage)."""

    num_clusters: int = 0
    """Clusters; 0 = as many as the split has classes."""

    def __post_init__(self) -> None:
        check(self.num_clusters >= 0, "clustering.num_clusters", self.num_clusters, "at least 0 (0 = the number of classes)")


@dataclass(frozen=True, kw_only=True)
class HistogramRecipe(Recipe):
    """Everything that fixes the numbers of a histograms run."""

    data: HistogramData = HistogramData()
    model: HistogramModel = HistogramModel()
    loss: HistogramLoss = HistogramLoss()
    clustering: ClusteringConfig = ClusteringConfig()


RECIPE = HistogramRecipe(
    batch_size=64,
    optim=OptimConfig(lr=2e-3, head_lr=2e-2, weight_decay=0.05, grad_clip_norm=10.0, ema_decay=0.99),
    schedule=ScheduleConfig(num_epochs=12, num_warmup_epochs=2.0, eval_every_epochs=4),
)
"""Defaults that reproduce the figures in this room's README on two CPU cores."""

SMOKE = HistogramRecipe(
    batch_size=8,
    optim=OptimConfig(lr=2e-3, head_lr=2e-2, ema_decay=0.9),
    schedule=ScheduleConfig(num_epochs=2, num_warmup_epochs=0.5),
    data=HistogramData(log2_chords=10),
    model=HistogramModel(width=32, depth=1, embed_dim=8, num_networks=2),
)
"""The same code in seconds."""

SOURCE_BASELINE = {
    "data.inputs": ["model"],
    "data.encoding": "raw",
    "model.width": 32,
    "model.depth": 4,
    "model.embed_dim": 16,
    "model.activation": "none",
    "model.residual": False,
    "model.num_networks": 1,
    "model.standardize": False,
    "model.dropout": 0.0,
    "loss.kind": "pairwise_cosine",
    "optim.lr": 1e-3,
    "optim.weight_decay": 0.0,
    "optim.grad_clip_norm": 0.0,
    "optim.ema_decay": 0.0,
    "schedule.num_epochs": 400,
    "schedule.num_warmup_epochs": 0.0,
    "schedule.min_lr_ratio": 1.0,
    "schedule.eval_every_epochs": 20,
    "batch_size": 8,
}
"""The source system's published model: 128 -> 4 x 32 -> 16 without activations, pairwise cosine loss, batches of 8, the checkpoint of epoch 400."""

SOURCE_WITH_ACTIVATIONS = SOURCE_BASELINE | {"model.activation": "relu", "model.standardize": True}
"""The same network and loss as they are usually meant: ReLU after the hidden layers, standardised inputs."""

PUBLISHED_HISTOGRAMS = {
    "data.inputs": ["model", "hull"],
    "model.width": 64,
    "model.dropout": 0.3,
    "model.input_dropout": 0.1,
    "loss.temperature": 0.125,
    "optim.lr": 3e-3,
    "optim.ema_decay": 0.0,
    "schedule.num_epochs": 200,
    "schedule.num_warmup_epochs": 20.0,
    "schedule.min_lr_ratio": 0.0,
    "schedule.eval_every_epochs": 20,
}
"""For the source system's few JSON files; see the README for how it was chosen."""
