"""Sizes of the point encoder and of the image head: plain settings, so that reading them needs no torch."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

Size = Literal["tiny", "small", "base", "large"]
Channels = Literal["xyz", "xyz+normals", "xyz+color", "xyz+normals+color"]
ReleasedName = Literal["small", "small_1k", "base", "base_1k", "large", "large_1k", "giant"]

NUM_CHANNELS: dict[str, int] = {"xyz": 3, "xyz+normals": 6, "xyz+color": 6, "xyz+normals+color": 9}


@dataclass(frozen=True, kw_only=True)
class PointEncoderConfig:
    """Architecture of a :class:`~cad_models.alignment.point_encoder.PointEncoder`; the defaults are the tiny one, for
    CPUs.

    Raises ``ValueError`` where two fields contradict each other.
    """

    width: int = 128
    """Width of every token."""
    depth: int = 3
    """Number of layers; each has one local block and one cross block."""
    num_heads: int = 2
    """Attention heads; divides ``width``."""
    mlp_width: int = 0
    """Hidden width of the blocks' MLPs; 0 = four times ``width``."""
    num_groups: int = 64
    """Patches a cloud is divided into."""
    group_size: int = 16
    """Points of one patch, its centre included."""
    patch_widths: tuple[int, ...] = (32, 64)
    """Widths of the patch network before its first maximum; ReConV2 has (128, 256) or (256, 512, 1024)."""
    num_image_queries: int = 13
    """Queries whose tokens answer for images."""
    num_text_queries: int = 3
    """Queries whose tokens answer for text; 0 leaves them out."""
    text_weight: float = 0.3
    """Weight of the mean text token beside the mean image token in the embedding."""
    embed_dim: int = 256
    """Width of the embedding; 1280 in ReConV2."""
    channels: Channels = "xyz+normals"
    """What the columns of the input are, in this order; normals and colours enter as they are."""
    centers: Literal["prefix", "fps"] = "prefix"
    """prefix: the first ``num_groups`` points are the centres (clouds in farthest-point order); fps: compute them."""
    drop_path: float = 0.0
    """Stochastic depth of the last layer, growing linearly from 0 at the first; in training only."""
    patch_dropout: float = 0.0
    """Share of the patches left out at random; in training only."""
    mode: Literal["fixed", "reconv2"] = "fixed"
    """reconv2: BatchNorm, positions and sampling rules of the released checkpoints; fixed: without their defects."""
    causal: bool = False
    """reconv2 only: patches in a nearest-neighbour chain behind a start token, each attending to earlier ones alone."""
    layer_scale: float = 0.0
    """Initial LayerScale factor of every residual branch; 0 = no LayerScale."""
    pair_histogram: bool = False
    """Add to the embedding what a small network makes of histograms over pairs of points; needs normals."""
    stop_gradient: bool = False
    """reconv2 only: the queries send no gradient into the local blocks, which therefore stay as loaded."""

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}: change one of them")
        for name in ("width", "depth", "num_heads", "num_groups", "group_size", "num_image_queries", "embed_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1 is needed")
        if self.num_text_queries < 0:
            raise ValueError(
                f"num_text_queries is {self.num_text_queries}: 0 leaves them out, less has no meaning"
            )
        if self.mlp_width < 0:
            raise ValueError(f"mlp_width is {self.mlp_width}: 0 means four times the width, less has no meaning")
        if not self.patch_widths:
            raise ValueError("patch_widths is empty: give at least one width, such as 128,256")
        for name in ("drop_path", "patch_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it is a share in [0, 1)")
        if self.pair_histogram and self.channels != "xyz+normals":
            raise ValueError(f"pair_histogram reads coordinates and normals: it needs channels='xyz+normals', not {self.channels!r}")
        if self.mode == "fixed" and (self.causal or self.stop_gradient):
            raise ValueError("causal and stop_gradient reproduce released checkpoints: they need mode='reconv2'")

    @property
    def num_channels(self) -> int:
        """Columns of the input points."""
        return NUM_CHANNELS[self.channels]


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The image head: a mixture of linear experts; raises ``ValueError`` where the fields contradict each other."""

    num_experts: int = 8
    """Linear experts; 1 = one linear layer without a gate."""
    top_k: int = 0
    """Experts a row is sent to; 0 = all of them, weighted by the gate (dense)."""
    router_z_weight: float = 0.0
    """Weight of the router z-loss, mean logsumexp² of the gate's logits (ST-MoE, arXiv:2202.08906: 1e-3)."""
    balance_weight: float = 0.0
    """Weight of the load-balancing loss, 1 for an even load (Switch, arXiv:2101.03961: 1e-2)."""
    residual: bool = False
    """A linear path that every row takes, to which the experts add; they start at zero, so that the head starts as a linear layer. With one expert, which
    is a linear layer, it changes nothing."""

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ValueError(f"num_experts is {self.num_experts}: 1 (a linear layer) is the least")
        if not 0 <= self.top_k < max(self.num_experts, 1):
            raise ValueError(
                f"top_k is {self.top_k} with {self.num_experts} experts: it must be less, and 0 means all of them"
            )
        if self.router_z_weight < 0 or self.balance_weight < 0:
            raise ValueError("router_z_weight and balance_weight are weights of losses: they cannot be negative")


_RECONV2_PATCHES = {"num_groups": 512, "group_size": 32, "patch_widths": (128, 256), "embed_dim": 1280}
_SIZES: dict[str, PointEncoderConfig] = {
    "tiny": PointEncoderConfig(),
    "small": PointEncoderConfig(width=384, depth=12, num_heads=6, drop_path=0.1, **_RECONV2_PATCHES),
    "base": PointEncoderConfig(width=768, depth=12, num_heads=12, drop_path=0.1, **_RECONV2_PATCHES),
    "large": PointEncoderConfig(width=1024, depth=24, num_heads=16, drop_path=0.2, **_RECONV2_PATCHES),
}


def point_encoder_config(size: Size, **changes) -> PointEncoderConfig:
    """The settings of a size, with some fields changed. Raises ``ValueError`` for an unknown size."""
    if size not in _SIZES:
        raise ValueError(f"unknown point encoder size {size!r}: choose one of {', '.join(_SIZES)}")
    return dataclasses.replace(_SIZES[size], **changes)


# Only ever released as a recipe: its MLPs are 48/11 of the width, as in the ViT-g it grew from.
_GIANT = PointEncoderConfig(width=1408, depth=40, num_heads=16, mlp_width=6144, **_RECONV2_PATCHES)


def released_config(name: ReleasedName) -> PointEncoderConfig:
    """Settings of a released ReConV2 checkpoint (ShapeLLM, arXiv:2402.17766), to be loaded with :func:`cad_models.alignment.released.load_reconv2`.

    ``small``, ``base``, ``large`` and ``giant`` take 10,000 coloured points; the ``_1k`` ones take 1,024 points without
    colour.
    """
    size, _, points = name.partition("_")
    if size not in ("small", "base", "large", "giant") or points not in ("", "1k") or name == "giant_1k":
        raise ValueError(f"unknown released point encoder {name!r}: choose small, base, large (alone or with _1k) or giant")
    common = {
        "mode": "reconv2",
        "centers": "fps",
        "drop_path": 0.1,
        # The small ones grew from a DINOv2 ViT, which has LayerScale.
        "layer_scale": 1e-5 if size == "small" else 0.0,
    }
    if size == "giant":
        return dataclasses.replace(_GIANT, **common, channels="xyz+color", stop_gradient=True)
    if points == "1k":
        patch_widths = (128, 256) if size == "small" else (256, 512, 1024)
        return point_encoder_config(
            size, **common, channels="xyz", num_groups=64, patch_widths=patch_widths, causal=True, stop_gradient=True
        )
    return point_encoder_config(size, **common, channels="xyz+color")
