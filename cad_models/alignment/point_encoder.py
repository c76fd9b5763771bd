"""Point cloud encoder after ReConV2 (ShapeLLM, arXiv:2402.17766): patches, local blocks, and queries that read every
layer.

A cloud is cut into patches (farthest points and their neighbours), each becomes a token (a small PointNet), local
blocks attend among the tokens, and after each of them a cross block lets the image and text queries read the tokens.
The embedding is the mean image token plus ``text_weight`` times the mean text token, of unit length.

Shape letters in comments: B clouds, G patches, S points of a patch, D width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cad_models.alignment.model_config import PointEncoderConfig
from cad_models.alignment.pair_histogram import PairEmbedding
from cad_models.common.grouping import (
    farthest_points,
    farthest_points_pointnet2,
    gather_points,
    nearest_chain,
    nearest_neighbors,
)

_MLP_RATIO = 4
# Octaves of the sine positions: wavelengths from the whole cloud (2 in the unit sphere) to 1/16 of that, about the
# size of a patch.
_NUM_OCTAVES = 5


@dataclass(frozen=True, kw_only=True)
class PointFeatures:
    """The encoder's stages for a batch of clouds."""

    groups: Float[Tensor, "batch num_groups group_size channels"]
    """Points of each patch, coordinates relative to its centre."""
    centers: Float[Tensor, "batch num_groups 3"]
    """Centres of the patches."""
    tokens: Float[Tensor, "batch num_groups width"]
    """Patch tokens before the first block."""
    local: Float[Tensor, "batch num_groups width"]
    """Tokens after the last local block (in causal mode: of the start token and all patches but the last)."""
    queries: Float[Tensor, "batch num_queries width"]
    """Global tokens, the image queries' first."""
    image_tokens: Float[Tensor, "batch num_image_queries embed_dim"]
    """Projected image tokens, each of unit length."""
    text_tokens: Float[Tensor, "batch num_text_queries embed_dim"]
    """Projected text tokens, each of unit length."""
    embedding: Float[Tensor, "batch embed_dim"]
    """The cloud's embedding, of unit length."""


class PointEncoder(nn.Module):
    """Point clouds to unit vectors; in evaluation nothing is random, and a result does not depend on the batch."""

    def __init__(self, config: PointEncoderConfig):
        super().__init__()
        self.config = config
        width, depth = config.width, config.depth
        # A cloud's surface is divided among the patches, so their radius goes with 1/sqrt(num_groups). The released
        # checkpoints take the coordinates relative to the centre as they are; scaled to about 1, they weigh as much
        # as normals.
        self.group_scale = math.sqrt(config.num_groups) if config.mode == "fixed" else 1.0
        self.patch_embed = _PatchEmbedding(config)
        self.position = _position(config)
        if config.causal:
            self.start_token = nn.Parameter(torch.randn(1, 1, width))
            self.start_position = nn.Parameter(torch.randn(1, 1, width))
        self.queries = nn.Parameter(torch.empty(1, config.num_image_queries + config.num_text_queries, width))
        rates = [config.drop_path * layer / max(1, depth - 1) for layer in range(depth)]
        self.local_blocks = nn.ModuleList(_Block(config, _SelfAttention, rate) for rate in rates)
        self.cross_blocks = nn.ModuleList(_Block(config, _CrossAttention, rate) for rate in rates)
        self.local_norm = nn.LayerNorm(width) if config.mode == "reconv2" else nn.Identity()
        self.query_norm = nn.LayerNorm(width)
        self.image_proj = nn.Linear(width, config.embed_dim)
        self.text_proj = nn.Linear(width, config.embed_dim) if config.num_text_queries else None
        self.pairs = PairEmbedding(config.embed_dim) if config.pair_histogram else None
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # The usual 0.02 at width 768, and as much variance as that in narrow layers.
                nn.init.trunc_normal_(module.weight, std=(3 * module.in_features) ** -0.5)
                nn.init.zeros_(module.bias)
        # Distinct from the start: queries that begin equal (zero) get equal gradients and stay equal.
        nn.init.trunc_normal_(self.queries, std=0.02)
        # The embedding does not pass through these parameters, and data-parallel training needs a gradient for every
        # other one.
        if self.config.mode == "reconv2":
            self.local_norm.requires_grad_(False)
        if self.config.stop_gradient:
            for module in (self.patch_embed, self.position, self.local_blocks):
                module.requires_grad_(False)
            if self.config.causal:
                self.start_token.requires_grad_(False)
                self.start_position.requires_grad_(False)

    def train(self, mode: bool = True) -> "PointEncoder":
        """As for any module, but frozen patches stay in evaluation: their BatchNorm must neither drift nor see the batch."""
        super().train(mode)
        if self.config.stop_gradient:
            self.patch_embed.eval()
        return self

    def forward(self, points: Float[Tensor, "batch num_points channels"]) -> Float[Tensor, "batch embed_dim"]:
        """Embeddings of unit length in float32; see :meth:`encode` for the input and its errors."""
        return self.encode(points).embedding

    def encode(self, points: Float[Tensor, "batch num_points channels"]) -> PointFeatures:
        """All stages for clouds centred in the unit sphere, columns as ``config.channels`` says.

        Raises ``ValueError`` for another number of columns, or fewer points than ``num_groups`` or ``group_size``.
        """
        groups, centers = self.group(points)
        if self.training and self.config.patch_dropout:
            groups, centers = _drop_patches(groups, centers, self.config.patch_dropout)
        scaled = groups
        if self.group_scale != 1.0:
            scaled = torch.cat([groups[..., :3] * self.group_scale, groups[..., 3:]], dim=-1)
        tokens = self.patch_embed(scaled)
        x, position, mask = tokens, self.position(centers).to(tokens.dtype), None
        if self.config.causal:
            batch, length, _ = x.shape
            x = torch.cat([self.start_token.to(x.dtype).expand(batch, -1, -1), x[:, :-1]], dim=1)
            start = self.start_position.to(position.dtype).expand(batch, -1, -1)
            position = torch.cat([start, position[:, :-1]], dim=1)
            mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        queries = self.queries.expand(len(x), -1, -1)
        for local_block, cross_block in zip(self.local_blocks, self.cross_blocks, strict=True):
            # The position is added again before every block, as in ReConV2.
            x = local_block(x + position, mask=mask)
            queries = cross_block(queries, context=x.detach() if self.config.stop_gradient else x)
        queries = self.query_norm(queries)
        image_tokens = F.normalize(self.image_proj(queries[:, : self.config.num_image_queries]).float(), dim=-1)
        embedding = image_tokens.mean(dim=1)
        text_tokens = image_tokens[:, :0]
        if self.text_proj is not None:
            text_tokens = F.normalize(self.text_proj(queries[:, self.config.num_image_queries :]).float(), dim=-1)
            embedding = embedding + self.config.text_weight * text_tokens.mean(dim=1)
        if self.pairs is not None:
            embedding = embedding + F.normalize(self.pairs(points).float(), dim=-1)
        return PointFeatures(
            groups=groups,
            centers=centers,
            tokens=tokens,
            local=self.local_norm(x),
            queries=queries,
            image_tokens=image_tokens,
            text_tokens=text_tokens,
            embedding=F.normalize(embedding, dim=-1),
        )

    @torch.no_grad()
    def adapt(self, points: Float[Tensor, "batch num_points channels"]) -> None:
        """Centre the projections' outputs over training objects, and standardise the pair histograms; see `AlignmentLearner.adapt`."""
        was_training = self.training
        self.eval()
        queries = torch.cat([self.encode(part).queries for part in points.split(32)])
        num_image_queries = self.config.num_image_queries
        for projection, part in ((self.image_proj, queries[:, :num_image_queries]), (self.text_proj, queries[:, num_image_queries:])):
            if projection is not None:
                projection.bias -= projection(part).mean(dim=(0, 1))
        if self.pairs is not None:
            self.pairs.standardise(points)
        self.train(was_training)

    @torch.no_grad()
    def group(
        self, points: Float[Tensor, "batch num_points channels"]
    ) -> tuple[Float[Tensor, "batch num_groups group_size channels"], Float[Tensor, "batch num_groups 3"]]:
        """Patches, coordinates relative to their centres, and the centres; the points get no gradient."""
        config = self.config
        if points.shape[-1] != config.num_channels:
            raise ValueError(
                f"the points have {points.shape[-1]} columns, channels={config.channels!r} needs {config.num_channels}: "
                "prepare them with the same channels as the encoder"
            )
        points = points.float()
        xyz = points[..., :3]
        if config.centers == "prefix":
            if xyz.shape[1] < config.num_groups:
                raise ValueError(
                    f"the clouds have {xyz.shape[1]} points, fewer than num_groups = {config.num_groups}: lower it"
                )
            centers = xyz[:, : config.num_groups]
        else:
            sample = farthest_points_pointnet2 if config.mode == "reconv2" else farthest_points
            centers = gather_points(xyz, sample(xyz, config.num_groups))
        if config.causal:
            centers = gather_points(centers, nearest_chain(centers))
        groups = gather_points(points, nearest_neighbors(centers, xyz, config.group_size))
        groups[..., :3] -= centers.unsqueeze(2)
        return groups, centers


class _PatchEmbedding(nn.Module):
    """Mini-PointNet: MLP, maximum, concatenation with it, MLP, maximum (Point-BERT, arXiv:2111.14819)."""

    def __init__(self, config: PointEncoderConfig):
        super().__init__()
        norm = nn.BatchNorm1d if config.mode == "reconv2" else nn.LayerNorm
        layers: list[nn.Module] = [nn.Linear(config.num_channels, config.patch_widths[0])]
        for before, after in zip(config.patch_widths, config.patch_widths[1:], strict=False):
            layers += [norm(before), nn.ReLU(), nn.Linear(before, after)]
        hidden = 2 * config.patch_widths[-1]
        # Indices are those of the released checkpoints: Linear, norm, ReLU, Linear.
        self.first = nn.Sequential(*layers)
        self.second = nn.Sequential(nn.Linear(hidden, hidden), norm(hidden), nn.ReLU(), nn.Linear(hidden, config.width))

    def forward(
        self, groups: Float[Tensor, "batch num_groups group_size channels"]
    ) -> Float[Tensor, "batch num_groups width"]:
        batch, num_groups, group_size, channels = groups.shape
        # Rows are points: BatchNorm1d and LayerNorm both norm over what they should.
        feature = self.first(groups.reshape(-1, channels))
        # max, not amax: its backward writes one element a patch and channel, three times faster on a CPU.
        patch = feature.view(batch * num_groups, group_size, -1).max(dim=1).values
        # Linear([max, local]) = W_max max + W_local local + b, where the first term is the same for all points of a
        # patch: compute it once a patch, exactly, instead of once a point.
        concat, *rest = self.second
        w_max, w_local = concat.weight.split(feature.shape[-1], dim=1)
        per_patch = F.linear(patch, w_max, concat.bias)
        feature = F.linear(feature, w_local).view(batch * num_groups, group_size, -1) + per_patch.unsqueeze(1)
        feature = feature.flatten(0, 1)
        for layer in rest:
            feature = layer(feature)
        return feature.view(batch, num_groups, group_size, -1).max(dim=2).values


class _FourierPosition(nn.Module):
    """Coordinates, and their sines and cosines at real octaves, through a two-layer MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(_NUM_OCTAVES), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(3 + 6 * _NUM_OCTAVES, 128), nn.GELU(), nn.Linear(128, width))

    def forward(self, centers: Float[Tensor, "batch num_groups 3"]) -> Float[Tensor, "batch num_groups width"]:
        angles = (centers.unsqueeze(-1) * self.frequencies).flatten(-2)
        return self.mlp(torch.cat([centers, angles.sin(), angles.cos()], dim=-1))


class _SinePosition(nn.Module):
    """The sine position of the released causal checkpoints: of one frequency, 6 distinct columns repeated."""

    def __init__(self, width: int):
        super().__init__()
        self.num_pairs = width // 6
        self.num_padding = width - 6 * self.num_pairs

    def forward(self, centers: Float[Tensor, "batch num_groups 3"]) -> Float[Tensor, "batch num_groups width"]:
        angles = 2 * math.pi * centers
        pair = torch.stack([angles.sin(), angles.cos()], dim=-1)  # [B, G, 3, 2]
        return F.pad(pair.repeat(1, 1, 1, self.num_pairs).flatten(-2), (0, self.num_padding))


def _position(config: PointEncoderConfig) -> nn.Module:
    if config.mode == "fixed":
        return _FourierPosition(config.width)
    if config.causal:
        return _SinePosition(config.width)
    return nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, config.width))


class _SelfAttention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "batch length width"], mask: Bool[Tensor, "length length"] | None) -> Tensor:
        q, k, v = (_split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(_merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))


class _CrossAttention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "batch num_queries width"], context: Float[Tensor, "batch length width"]
    ) -> Tensor:
        q = _split_heads(self.q(x), self.num_heads)
        k, v = (_split_heads(part, self.num_heads) for part in self.kv(context).chunk(2, dim=-1))
        return self.proj(_merge_heads(F.scaled_dot_product_attention(q, k, v)))


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class _LayerScale(nn.Module):
    def __init__(self, width: int, value: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _DropPath(nn.Module):
    """Stochastic depth: leaves out a residual branch of whole samples, in training only (arXiv:1603.09382)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(keep).div_(keep)


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    """Pre-norm transformer block; a cross block norms its queries and its context by the same norm, as ReConV2 does."""

    def __init__(
        self, config: PointEncoderConfig, attention: type[_SelfAttention] | type[_CrossAttention], drop_path: float
    ):
        super().__init__()
        scale = config.layer_scale
        self.norm1 = nn.LayerNorm(config.width)
        self.attn = attention(config.width, config.num_heads)
        self.ls1 = _LayerScale(config.width, scale) if scale else nn.Identity()
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = _Mlp(config.width, config.mlp_width or _MLP_RATIO * config.width)
        self.ls2 = _LayerScale(config.width, scale) if scale else nn.Identity()
        self.drop_path = _DropPath(drop_path)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        attended = self.attn(self.norm1(x), mask if context is None else self.norm1(context))
        x = x + self.drop_path(self.ls1(attended))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


def _drop_patches(groups: Tensor, centers: Tensor, share: float) -> tuple[Tensor, Tensor]:
    batch, num_groups = centers.shape[:2]
    num_kept = max(1, round(num_groups * (1 - share)))
    kept = torch.rand(batch, num_groups, device=centers.device).topk(num_kept, dim=1).indices.sort(dim=1).values
    rows = torch.arange(batch, device=centers.device).unsqueeze(1)
    return groups[rows, kept], centers[rows, kept]
