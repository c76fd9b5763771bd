"""Row 5. The point encoder forward and backward on one thread: ReConV2 base with 1,024 points, small with 10,000.

Rival: the published architecture as its own code runs it (ShapeLLM, arXiv:2402.17766), on the same weights: farthest points in a loop, neighbours by
expanded squares and topk, 1 × 1 convolutions over [patches, channels, points], the maximum repeated and concatenated, attention as written.
"""

import dataclasses
import math
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Comparison, Settings, compared, product_flops, row_main, seconds_in_turn
from benchmarks.plain_patches import plain_patches
from benchmarks.point_groups import clouds
from cad_models.alignment.model_config import PointEncoderConfig, released_config
from cad_models.alignment.point_encoder import PointEncoder


def naive_groups(points: Tensor, config: PointEncoderConfig) -> tuple[Tensor, Tensor]:
    """Patches and centres; farthest points by the rules of pointnet2_ops, the chain of centres by a loop."""
    batch, rows = len(points), torch.arange(len(points))
    skipped = points[..., :3].square().sum(dim=-1) <= 1e-3
    first = torch.zeros(batch, dtype=torch.long)
    groups, centers = plain_patches(points, config.num_groups, config.group_size, first=first, skipped=skipped)
    if config.causal:
        apart = torch.cdist(centers, centers)
        apart[:, torch.arange(config.num_groups), torch.arange(config.num_groups)] = float("inf")
        current, order = torch.zeros(batch, dtype=torch.long), [torch.zeros(batch, dtype=torch.long)]
        for _ in range(config.num_groups - 1):
            apart[rows, :, current] = float("inf")
            current = apart[rows, current].argmin(dim=-1)
            order.append(current)
        chain = torch.stack(order, dim=1)
        groups, centers = groups[rows[:, None], chain], centers[rows[:, None], chain]
    return groups, centers


def _convolved(layer: nn.Module, feature: Tensor) -> Tensor:
    return F.conv1d(feature, layer.weight.unsqueeze(-1), layer.bias) if isinstance(layer, nn.Linear) else layer(feature)


def _attended(q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor | None) -> Tensor:
    q, k, v = (x.reshape(*x.shape[:2], num_heads, -1).permute(0, 2, 1, 3) for x in (q, k, v))
    weights = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    if mask is not None:
        weights = weights.masked_fill(~mask, -math.inf)
    return (weights.softmax(dim=-1) @ v).transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)


def _block(block: nn.Module, x: Tensor, *, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    attention, normed = block.attn, block.norm1(x)
    if context is None:
        q, k, v = attention.qkv(normed).chunk(3, dim=-1)
    else:
        q = attention.q(normed)
        k, v = attention.kv(block.norm1(context)).chunk(2, dim=-1)
    x = x + block.ls1(attention.proj(_attended(q, k, v, attention.num_heads, mask)))
    return x + block.ls2(block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x)))))


def naive(encoder: PointEncoder, points: Tensor) -> Tensor:
    """The encoder's embedding [batch, embed_dim] by plain code on its weights."""
    config = encoder.config
    groups, centers = naive_groups(points, config)
    batch, num_groups, group_size, channels = groups.shape
    feature = groups.reshape(batch * num_groups, group_size, channels).transpose(2, 1)
    for layer in encoder.patch_embed.first:
        feature = _convolved(layer, feature)
    highest = torch.max(feature, dim=2, keepdim=True)[0]
    feature = torch.cat([highest.expand(-1, -1, group_size), feature], dim=1)
    for layer in encoder.patch_embed.second:
        feature = _convolved(layer, feature)
    x = torch.max(feature, dim=2)[0].reshape(batch, num_groups, -1)
    position, mask = encoder.position(centers), None
    if config.causal:
        x = torch.cat([encoder.start_token.expand(batch, -1, -1), x[:, :-1]], dim=1)
        position = torch.cat([encoder.start_position.expand(batch, -1, -1), position[:, :-1]], dim=1)
        mask = torch.ones(num_groups, num_groups, dtype=torch.bool).tril()
    queries = encoder.queries.expand(batch, -1, -1)
    for local, cross in zip(encoder.local_blocks, encoder.cross_blocks, strict=True):
        x = _block(local, x + position, mask=mask)
        queries = _block(cross, queries, context=x)
    queries = encoder.query_norm(queries)
    image = F.normalize(encoder.image_proj(queries[:, : config.num_image_queries]), dim=-1).mean(dim=1)
    text = F.normalize(encoder.text_proj(queries[:, config.num_image_queries :]), dim=-1).mean(dim=1)
    return F.normalize(image + config.text_weight * text, dim=-1)


def _step(encoder: PointEncoder, points: Tensor, upstream: Tensor, kind: str) -> Tensor:
    encoder.zero_grad(set_to_none=True)
    embedding = encoder(points) if kind == "ours" else naive(encoder, points)
    embedding.backward(upstream)
    return embedding.detach()


def check_equal(encoder: PointEncoder, points: Tensor, upstream: Tensor) -> None:
    """Raises AssertionError unless embeddings and gradients agree."""
    running = {name: value.clone() for name, value in encoder.state_dict().items() if "running" in name}
    reference = _step(encoder, points, upstream, "ours")
    gradients = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    encoder.load_state_dict(running, strict=False)
    found = _step(encoder, points, upstream, "naive")
    similarity = (found * reference).sum(dim=-1).min().item()
    assert similarity > 1 - 1e-4, f"cosine of the embeddings {similarity}"
    # Biases before a BatchNorm have no gradient but rounding: what counts is the error beside the whole gradient.
    whole = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for name, p in encoder.named_parameters():
        if name in gradients:
            error = (p.grad - gradients[name]).norm()
            assert error < 0.01 * gradients[name].norm() + 1e-4 * whole, f"gradient of {name} is off by {error:.3g}"


def _products(encoder: PointEncoder, points: Tensor) -> float:
    """Floating-point operations of one step's matrix products, counted by torch while it runs."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter:
        encoder(points).sum().backward()
    encoder.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def run(settings: Settings) -> list[Comparison]:
    """Time both sizes."""
    torch.set_num_threads(1)
    flops = product_flops()
    found = []
    for name, num_points, batch in (("base_1k", 1_024, settings.pick(2, 1)), ("small", settings.pick(10_000, 2_000), 1)):
        config = dataclasses.replace(released_config(name), drop_path=0.0, stop_gradient=False)
        if settings.quick:
            config = dataclasses.replace(config, depth=2, num_groups=64)
        torch.manual_seed(0)
        encoder = PointEncoder(config).train()
        points = clouds(batch, num_points)
        if config.num_channels == 6:
            points = torch.cat([points, torch.full_like(points, 0.4)], dim=-1)
        upstream = torch.randn(batch, config.embed_dim, generator=torch.Generator().manual_seed(1))
        check_equal(encoder, points, upstream)
        work = _products(encoder, points)
        rivals = {kind: lambda kind=kind, e=encoder, p=points, u=upstream: _step(e, p, u, kind) for kind in ("ours", "naive")}
        seconds = seconds_in_turn(rivals, rounds=settings.pick(3, 1), warm=False)
        what = f"point encoder {name.removesuffix('_1k')}, {num_points:,} points, batch {batch}, forward + backward"
        limit = {"limit_share": work / flops / statistics.median(seconds["ours"]), "limit": "of its matrix products at peak"}
        found.append(compared(5, what, "published architecture in plain torch", seconds["ours"], seconds["naive"], at_least=1.5, **limit))
    return found


if __name__ == "__main__":
    row_main(run)
