"""The recipe of the alignment task: what fixes its numbers. Imports no torch, so that ``--help`` is quick."""

from dataclasses import dataclass
from typing import Literal

from cad_models.config import OptimConfig, Recipe, ScheduleConfig, added_later, check


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Training-time changes of a point cloud."""

    max_scale: float = 1.25
    """Each axis is scaled by a factor drawn log-uniformly from [1/max_scale, max_scale]; 1 = off."""
    max_shift: float = 0.1
    """Each axis is shifted by at most this much, in radii of the object; 0 = off."""
    max_rotation_deg: float = 0.0
    """Rotation about the vertical axis, drawn from ± this; 0 = off (parts are stored upright, and so are their views)."""

    def __post_init__(self) -> None:
        check(self.max_scale >= 1, "data.augment.max_scale", self.max_scale, "at least 1")
        check(self.max_shift >= 0, "data.augment.max_shift", self.max_shift, "at least 0")
        check(self.max_rotation_deg >= 0, "data.augment.max_rotation_deg", self.max_rotation_deg, "at least 0")


QUERY_CONDITIONS: dict[str, tuple[float, float]] = {"roll": (180.0, 0.0), "crop": (0.0, 0.3), "roll_crop": (180.0, 0.3)}
"""Harder conditions of a query image: name -> largest in-plane rotation in degrees, largest change of the box around the object
(`cad_models.common.picture_changes.PictureChange`). As the image is: upright, with an exact box."""


@dataclass(frozen=True, kw_only=True)
class AlignmentData:
    """What is made of the raw files, and what training reads of it."""

    num_points: int = 10_000
    """Surface points stored for each object."""
    num_views: int = 24
    """Views rendered for training and for galleries."""
    num_query_views: int = 6
    """Views rendered from further cameras, for evaluation only."""
    image_size: int = 224
    """Width and height of rendered views, in pixels."""
    encoder: str = "auto"
    """Which frozen embeddings to read: the name given to embed.py; auto = the only ones that the dataset has."""
    views_per_step: int = 0
    """Views of each object drawn for a training step; 0 = all."""
    augment: AugmentConfig = AugmentConfig()
    query_conditions: bool = added_later(False)
    """Evaluate also with query images that are turned freely, boxed badly (± 30 %), and both; embed.py stores their embeddings."""
    augmented_views: int = added_later(0)
    """Turned, badly boxed and differently drawn versions of each gallery view whose embeddings embed.py stores, for training; 0 = none."""
    augmented_share: float = added_later(0.0)
    """Probability that a view in a training step is one of its changed versions; needs embeddings with --data.augmented-views of at least 1."""

    def __post_init__(self) -> None:
        for name in ("num_points", "num_views", "num_query_views"):
            check(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "at least 1")
        check(self.image_size >= 16, "data.image_size", self.image_size, "at least 16 pixels")
        check(self.views_per_step >= 0, "data.views_per_step", self.views_per_step, "at least 0 (0 = all)")
        check(self.augmented_views >= 0, "data.augmented_views", self.augmented_views, "at least 0 (0 = none)")
        check(0 <= self.augmented_share <= 1, "data.augmented_share", self.augmented_share, "in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class AlignmentModel:
    """Point encoder (ReConV2 style) and image head (mixture of experts)."""

    size: Literal[
        "pairs", "projection", "tiny", "small", "base", "large",
        "recon_small", "recon_small_1k", "recon_base", "recon_base_1k", "recon_large", "recon_large_1k", "recon_giant",
    ] = "tiny"  # fmt: skip
    """Point encoder; projection describes small pictures of the points from 24 sides (give it all stored points), pairs reads histograms over pairs of
    points alone, tiny is a transformer for CPUs, small, base and large are ReConV2's sizes. recon_* are its released checkpoints to the last detail,
    defects included: to start from one with --init-from."""
    channels: Literal["xyz", "xyz+normals", "xyz+color"] = "xyz+normals"
    """What the encoder sees of each point. xyz+color gives every point the gray by which ReConV2 stands for a missing colour."""
    num_points: int = 1_024
    """Points that the encoder reads (a prefix of the stored farthest-point order); 0 = as many as suit it: 10,000 for projection, else 1,024."""
    embed_dim: int = 512
    """Width of the shared embedding space."""
    num_experts: int = 4
    """Experts of the image head; 1 = one linear layer."""
    top_k: int = 0
    """Experts used for each image; 0 = all, weighted by a soft gate."""
    residual_head: bool = added_later(False)
    """Whether the experts start at zero and add to a linear path, so that the head starts as a linear layer."""
    pair_histogram: bool = added_later(False)
    """Whether histograms over pairs of points (distances, angles of normals) add to the mesh's embedding; needs --model.channels xyz+normals."""
    side_vectors: bool | None = added_later(False)
    """With --model.size projection: keep one vector for each of the 24 sides of a mesh, of which the best counts, instead of their mean. Finds more; a
    mesh takes 12 times the space, and comparing it 24 times the work. Unset = if the size has them."""
    drop_path: float = 0.0
    """Largest probability of skipping a residual branch in training; at 0 (and patch_dropout 0) the numbers do not depend on the workers."""
    patch_dropout: float = 0.0
    """Share of the point patches left out in training; evaluation sees all."""

    @property
    def num_read_points(self) -> int:
        """``num_points``, resolved."""
        return self.num_points or (10_000 if self.size == "projection" else 1_024)

    @property
    def has_side_vectors(self) -> bool:
        """``side_vectors``, resolved."""
        return self.size == "projection" if self.side_vectors is None else self.side_vectors

    def __post_init__(self) -> None:
        check(self.num_points >= 0, "model.num_points", self.num_points, "at least 0 (0 = as many as suit the encoder)")
        if self.pair_histogram or self.size in ("pairs", "projection"):
            asked = "--model.pair-histogram" if self.pair_histogram else f"--model.size {self.size}"
            check(self.channels == "xyz+normals", "model.channels", self.channels, f"xyz+normals with {asked} (or take another --model.size)")
        if self.side_vectors:
            check(self.size == "projection", "model.size", self.size, "projection with --model.side-vectors (the others have one vector a mesh)")
        if self.size.startswith("recon_"):
            channels = "xyz" if self.size.endswith("_1k") else "xyz+color"
            check(self.channels == channels, "model.channels", self.channels, f"{channels} for --model.size {self.size}")
            check(not self.pair_histogram, "model.pair_histogram", self.pair_histogram, f"False for --model.size {self.size}")
            check(self.embed_dim == 1_280, "model.embed_dim", self.embed_dim, f"1280 for --model.size {self.size}")


@dataclass(frozen=True, kw_only=True)
class AlignmentLoss:
    """Multi-positive contrastive loss, both directions."""

    temperature: float = 0.07
    """Initial (and, unless learned, constant) temperature."""
    learned_temperature: bool = False
    """Whether the temperature is trained."""
    balance_weight: float = 0.0
    """Weight of the experts' load-balance loss."""
    router_z_weight: float = added_later(0.0)
    """Weight of the gate's z-loss, which keeps its logits small (ST-MoE: 1e-3)."""
    image_weight: float = added_later(0.0)
    """Weight of the loss between images: views of one object attract each other against those of other objects, so that the head serves as a metric
    between pictures too."""

    def __post_init__(self) -> None:
        for name in ("balance_weight", "router_z_weight", "image_weight"):
            check(getattr(self, name) >= 0, f"loss.{name}", getattr(self, name), "at least 0")


@dataclass(frozen=True, kw_only=True)
class AlignmentRecipe(Recipe):
    """Everything that fixes the numbers of an alignment run."""

    data: AlignmentData = AlignmentData()
    model: AlignmentModel = AlignmentModel()
    loss: AlignmentLoss = AlignmentLoss()


RECIPE = AlignmentRecipe(
    batch_size=32,
    optim=OptimConfig(lr=5e-4, head_lr=2e-3, weight_decay=0.05, grad_clip_norm=10.0, ema_decay=0.99),
    schedule=ScheduleConfig(num_epochs=24, num_warmup_epochs=2.0),
    data=AlignmentData(query_conditions=True, augmented_views=3, augmented_share=0.5, views_per_step=8),
    model=AlignmentModel(size="projection", side_vectors=None, num_points=0, residual_head=True),
    loss=AlignmentLoss(image_weight=0.3),
)
"""Defaults that reproduce the figures in this room's README on two CPU cores."""

SMOKE = AlignmentRecipe(
    batch_size=8,
    optim=OptimConfig(lr=1e-3, head_lr=2e-3, ema_decay=0.9),
    schedule=ScheduleConfig(num_epochs=2, num_warmup_epochs=0.5),
    data=AlignmentData(num_points=512, num_views=6, num_query_views=3, image_size=96),
    model=AlignmentModel(num_points=256, embed_dim=64, num_experts=2),
)
"""The same code in seconds."""
