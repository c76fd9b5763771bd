"""Point encoder and head: parity with the reference, determinism, gradients, naive counterparts."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from cad_models.alignment.loss import MultiPositiveContrastiveLoss
from cad_models.alignment.model import (
    HeadConfig,
    MixtureOfExperts,
    PointEncoder,
    PointEncoderConfig,
    parameter_groups,
    point_encoder_config,
)
from cad_models.alignment.moe import _RoutedLinear
from cad_models.common.grouping import (
    farthest_points,
    farthest_points_pointnet2,
    nearest_chain,
    nearest_neighbors,
)
from tests.alignment.golden.make_golden import GOLDEN, STAGES, VARIANTS, golden_encoder, golden_points
from tests.shared import shared_path

MINI = PointEncoderConfig(
    width=32, depth=2, num_heads=2, num_groups=8, group_size=6, patch_widths=(8, 16), embed_dim=24, channels="xyz"
)
RECONV2 = dataclasses.replace(MINI, mode="reconv2", centers="fps")


def clouds(batch=3, num_points=64, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(batch, num_points, channels, generator=generator), dim=-1)


def encoder_of(config, seed=0):
    torch.manual_seed(seed)
    return PointEncoder(config).eval()


# Patches


def naive_farthest(points, num_samples, first, pickable):
    order = [first]
    while len(order) < num_samples:
        best, best_distance = 0, -1.0
        for index in range(len(points)):
            if pickable[index]:
                distance = min(((points[index] - points[other]) ** 2).sum().item() for other in order)
                if distance > best_distance:
                    best, best_distance = index, distance
        order.append(best)
    return order


def test_farthest_points_equals_naive_loop():
    points = clouds(2, 30)
    points[:, 7] = points[:, 3]  # equal points: the lower index wins
    for cloud, found in zip(points, farthest_points(points, 12), strict=True):
        first = ((cloud - cloud.mean(0)) ** 2).sum(1).argmax().item()
        assert found.tolist() == naive_farthest(cloud, 12, first, [True] * 30)


def test_farthest_points_pointnet2_never_picks_near_the_origin():
    points = clouds(2, 30) * torch.linspace(0.001, 1, 30).unsqueeze(-1)
    for cloud, found in zip(points, farthest_points_pointnet2(points, 25), strict=True):
        pickable = [(point**2).sum().item() > 1e-3 for point in cloud]
        assert found.tolist() == naive_farthest(cloud, 25, 0, pickable)


def test_farthest_points_pointnet2_equals_reference_indices():
    reference = torch.load(shared_path("golden/fps_knn.pt"), weights_only=True)
    assert torch.equal(farthest_points_pointnet2(reference["xyz"], 128), reference["fps"].long())


def test_farthest_points_of_small_cloud_raises():
    with pytest.raises(ValueError, match="5 centres were asked of clouds with 4 points"):
        farthest_points(clouds(1, 4), 5)


def test_nearest_neighbors_with_ties_equals_sorted_list():
    points = clouds(2, 50).mul(2).round()  # a coarse grid: many points at equal distance
    queries = points[:, :9]
    found = nearest_neighbors(queries, points, 11)
    for b in range(2):
        for q in range(9):
            distance = ((points[b] - queries[b, q]) ** 2).sum(1).tolist()
            assert found[b, q].tolist() == sorted(range(50), key=lambda index: (distance[index], index))[:11]


def test_nearest_chain_equals_naive_walk():
    centers = clouds(3, 20)
    for cloud, found in zip(centers, nearest_chain(centers), strict=True):
        order = [0]
        while len(order) < 20:
            rest = [index for index in range(20) if index not in order]
            order.append(min(rest, key=lambda index: ((cloud[index] - cloud[order[-1]]) ** 2).sum().item()))
        assert found.tolist() == order


# Stored values


@pytest.mark.parametrize("name", VARIANTS)
def test_stages_equal_stored_values(name):
    stored = {key.partition("/")[2]: value for key, value in load_file(GOLDEN).items() if key.startswith(f"{name}/")}
    with torch.no_grad():
        features = golden_encoder(name).encode(golden_points(name))
    assert set(stored) == set(STAGES)
    for stage in STAGES:
        torch.testing.assert_close(getattr(features, stage), stored[stage], atol=1e-5, rtol=1e-5, msg=lambda text, s=stage: f"{s}: {text}")


# Properties of the encoder


@pytest.mark.parametrize("config", [MINI, RECONV2, dataclasses.replace(MINI, drop_path=0.5, patch_dropout=0.5)])
def test_evaluation_twice_is_bit_equal_and_of_unit_length(config):
    encoder, points = encoder_of(config), clouds()
    with torch.no_grad():
        first, second = encoder(points), encoder(points)
    assert torch.equal(first, second)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("config", [MINI, RECONV2])
def test_evaluation_does_not_depend_on_the_rest_of_the_batch(config):
    encoder, points = encoder_of(config), clouds(5)
    other = torch.cat([points[:1], clouds(4, seed=9)])
    with torch.no_grad():
        assert torch.equal(encoder(points)[0], encoder(other)[0])
        torch.testing.assert_close(encoder(points[:1])[0], encoder(points)[0], atol=1e-6, rtol=0)


def test_training_mode_of_fixed_encoder_does_not_depend_on_the_rest_of_the_batch():
    encoder, points = encoder_of(MINI).train(), clouds(4)
    torch.testing.assert_close(encoder(points[:2]), encoder(points)[:2], atol=1e-6, rtol=0)


def test_frozen_patches_keep_their_statistics_in_training():
    torch.manual_seed(0)
    frozen = PointEncoder(dataclasses.replace(RECONV2, stop_gradient=True)).train()
    before = {name: buffer.clone() for name, buffer in frozen.named_buffers()}
    points = clouds(4)
    torch.testing.assert_close(frozen(points[:2]), frozen(points)[:2], atol=1e-6, rtol=0)
    assert before and all(torch.equal(before[name], buffer) for name, buffer in frozen.named_buffers())
    learning = encoder_of(RECONV2).train()
    learning(points)
    assert learning.patch_embed.first[1].running_mean.abs().max() > 0


def test_fixed_encoder_does_not_depend_on_the_order_of_points_behind_the_centres():
    encoder, points = encoder_of(MINI), clouds()
    shuffled = torch.cat([points[:, :8], points[:, 8:].flip(1)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(encoder(points), encoder(shuffled), atol=1e-6, rtol=0)


def test_prefix_of_farthest_point_order_equals_computing_the_centres():
    points = clouds()
    order = farthest_points(points, 64)
    ordered = torch.stack([cloud[index] for cloud, index in zip(points, order, strict=True)])
    with torch.no_grad():
        prefix = encoder_of(MINI)(ordered)
        computed = encoder_of(dataclasses.replace(MINI, centers="fps"))(points)
    torch.testing.assert_close(prefix, computed, atol=1e-6, rtol=0)


def test_embedding_is_mean_image_token_plus_weighted_mean_text_token():
    features = encoder_of(MINI).encode(clouds())
    expected = features.image_tokens.mean(1) + 0.3 * features.text_tokens.mean(1)
    torch.testing.assert_close(features.embedding, expected / expected.norm(dim=1, keepdim=True), atol=1e-6, rtol=0)


def test_queries_of_fixed_encoder_are_distinct_from_the_start():
    encoder = encoder_of(MINI)
    tokens = encoder.encode(clouds()).image_tokens
    (tokens * torch.randn(1, 1, 24)).sum().backward()
    # Equal queries would give equal tokens and equal gradients: distances of 0.
    apart = torch.triu_indices(13, 13, offset=1).unbind(0)
    assert torch.cdist(tokens[0], tokens[0])[apart].min() > 1e-2
    gradients = encoder.queries.grad[0, :13]
    assert torch.cdist(gradients, gradients)[apart].min() > 1e-2 * gradients.norm(dim=1).mean()


def test_patch_embedding_split_equals_concatenation():
    encoder = encoder_of(MINI)
    groups, _ = encoder.group(clouds())
    embed = encoder.patch_embed
    feature = embed.first(groups)
    concatenated = torch.cat([feature.amax(2, keepdim=True).expand_as(feature), feature], dim=-1)
    torch.testing.assert_close(embed(groups), embed.second(concatenated).amax(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        MINI,
        dataclasses.replace(MINI, num_text_queries=0, channels="xyz+normals", patch_dropout=0.5),
        dataclasses.replace(MINI, layer_scale=1e-5),
        RECONV2,
        dataclasses.replace(RECONV2, causal=True, stop_gradient=True),
    ],
)
def test_every_trainable_parameter_gets_a_gradient(config):
    encoder = encoder_of(config).train()
    (encoder(clouds(channels=config.num_channels)) * torch.randn(24)).sum().backward()
    without = [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


@pytest.mark.parametrize("config", [MINI, RECONV2, dataclasses.replace(RECONV2, causal=True)])
def test_encoder_under_bfloat16_autocast_is_near_float32_and_of_unit_length(config):
    encoder, points = encoder_of(config), clouds()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = encoder(points)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.norm(dim=1), torch.ones(3), atol=1e-6, rtol=0)
    assert (half * encoder(points)).sum(dim=1).min() > 0.999


def test_patch_dropout_leaves_patches_out_in_training_only():
    encoder = encoder_of(dataclasses.replace(MINI, patch_dropout=0.75))
    assert encoder.encode(clouds()).tokens.shape[1] == 8
    assert encoder.train().encode(clouds()).tokens.shape[1] == 2


def test_drop_path_keeps_the_mean():
    encoder = encoder_of(dataclasses.replace(MINI, depth=2, drop_path=0.5)).train()
    drop = encoder.local_blocks[-1].drop_path
    torch.manual_seed(0)
    dropped = drop(torch.ones(20_000, 1))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)


def test_encoder_wrong_columns_or_too_few_points_raise_with_the_remedy():
    encoder = encoder_of(MINI)
    with pytest.raises(ValueError, match="6 columns, channels='xyz' needs 3"):
        encoder(clouds(channels=6))
    with pytest.raises(ValueError, match="7 points, fewer than num_groups = 8"):
        encoder(clouds(num_points=7))
    with pytest.raises(ValueError, match="6 neighbours were asked of clouds with 5 points"):
        encoder_of(dataclasses.replace(MINI, num_groups=4))(clouds(num_points=5))


@pytest.mark.parametrize(
    "changes", [{"num_heads": 5}, {"drop_path": 1.0}, {"causal": True}, {"patch_widths": ()}, {"num_groups": 0}]
)
def test_point_encoder_config_contradictions_raise(changes):
    with pytest.raises(ValueError):
        dataclasses.replace(MINI, **changes)


def test_published_sizes_have_the_published_parameter_counts():
    # Local and cross blocks of anchor sizes in millions of parameters: small 21.3, base 85.1, large 302.3.
    for size, millions in (("small", 21.3), ("base", 85.1), ("large", 302.3)):
        with torch.device("meta"):
            encoder = PointEncoder(point_encoder_config(size))
        for blocks in (encoder.local_blocks, encoder.cross_blocks):
            assert sum(p.numel() for p in blocks.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


# Head


def naive_head(head, x):
    """One row and one expert at a time."""
    rows = []
    for row in x:
        if head.config.num_experts == 1:
            y = head.weight[0] @ row + head.bias[0]
        else:
            logits = head.gate.weight @ F.layer_norm(row, row.shape, head.gate_norm.weight, head.gate_norm.bias)
            gate = (logits + head.gate.bias).softmax(0)
            chosen = gate.topk(head.config.top_k or len(gate)).indices.tolist()
            y = sum(gate[e] * (head.weight[e] @ row + head.bias[e]) for e in chosen)
            if head.config.residual:
                y = y + head.residual_weight @ row + head.residual_bias
            elif head.config.top_k:
                left = 1 - sum(gate[e] for e in chosen)
                y = y + left * (head.shared.weight @ row + head.shared.bias)
        rows.append(y / y.norm())
    return torch.stack(rows)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("config", [(1, 0), (4, 0), (4, 1), (4, 2), (8, 3)])
def test_head_value_and_gradients_equal_naive_experts(config, residual):
    torch.manual_seed(0)
    head = MixtureOfExperts(HeadConfig(num_experts=config[0], top_k=config[1], residual=residual), in_dim=10, embed_dim=6)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(17, 10, requires_grad=True)
    weight = torch.randn(17, 6)
    inputs = [x, *head.parameters()]
    actual, expected = head(x)[0], naive_head(head, x)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        torch.autograd.grad((actual * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        atol=5e-6,
        rtol=1e-5,
    )


@pytest.mark.parametrize("top_k", [1, 2])
def test_routed_gradients_equal_finite_differences_also_where_an_expert_has_no_rows(top_k):
    generator = torch.Generator().manual_seed(1)
    x, weight, bias, values = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in ((5, 3), (4, 2, 3), (4, 2), (5, top_k))
    )
    experts = torch.tensor([[0, 3], [3, 1], [0, 1], [1, 0], [3, 0]])[:, :top_k]  # none to expert 2
    assert torch.autograd.gradcheck(lambda *inputs: _RoutedLinear.apply(*inputs, experts), (x, weight, bias, values))


@pytest.mark.parametrize("top_k", [1, 2])
def test_sparse_head_takes_no_rows_and_computes_in_bfloat16_under_autocast(top_k):
    torch.manual_seed(0)
    head = MixtureOfExperts(HeadConfig(num_experts=4, top_k=top_k), in_dim=10, embed_dim=6)
    y = head(torch.zeros(0, 10))[0]
    y.sum().backward()
    assert y.shape == (0, 6) and float(head.weight.grad.abs().max()) == 0
    x = torch.randn(40, 10)
    whole = head(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = head(x)[0]
    assert rough.dtype == torch.float32 and 0 < float((rough - whole).detach().abs().max()) < 0.05
    rough.sum().backward()
    assert head.weight.grad.dtype == torch.float32 and bool(head.weight.grad.isfinite().all())


@pytest.mark.parametrize("config", [(4, 0), (4, 1), (4, 2)])
def test_residual_head_starts_as_the_linear_head_of_the_same_seed(config):
    x = torch.randn(17, 10)
    torch.manual_seed(3)
    linear = MixtureOfExperts(HeadConfig(num_experts=1), in_dim=10, embed_dim=6)
    torch.manual_seed(3)
    head = MixtureOfExperts(HeadConfig(num_experts=config[0], top_k=config[1], residual=True), in_dim=10, embed_dim=6)
    assert torch.equal(head(x)[0], linear(x)[0])
    # What stands at zero still learns: the experts at once, the gate from the second step on.
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    target = torch.randn(17, 6)
    for _ in range(2):
        optimizer.zero_grad()
        (head(x)[0] * target).sum().backward()
        optimizer.step()
    assert head.weight.abs().max() > 1e-3 and head.gate.weight.grad.abs().max() > 1e-5


def test_residual_changes_nothing_of_a_head_with_one_expert():
    torch.manual_seed(3)
    plain = MixtureOfExperts(HeadConfig(num_experts=1), in_dim=10, embed_dim=6)
    torch.manual_seed(3)
    residual = MixtureOfExperts(HeadConfig(num_experts=1, residual=True), in_dim=10, embed_dim=6)
    assert plain.state_dict().keys() == residual.state_dict().keys()
    assert all(torch.equal(plain.state_dict()[name], value) for name, value in residual.state_dict().items())


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("config", [(1, 0), (4, 0), (16, 1), (16, 2)])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_head_every_parameter_gets_a_gradient_also_without_rows(config, rows, residual):
    head = MixtureOfExperts(HeadConfig(num_experts=config[0], top_k=config[1], residual=residual), in_dim=10, embed_dim=6)
    embedding, scalars = head(torch.randn(rows, 10))
    (embedding.sum() + scalars["loss"]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_head_top_1_gate_learns_from_the_embedding():
    torch.manual_seed(0)
    head = MixtureOfExperts(HeadConfig(num_experts=4, top_k=1), in_dim=10, embed_dim=6)
    (head(torch.randn(17, 10))[0] * torch.randn(17, 6)).sum().backward()
    assert head.gate.weight.grad.abs().max() > 1e-3


def test_head_auxiliary_losses_have_their_definition_and_even_load_gives_one():
    torch.manual_seed(0)
    config = HeadConfig(num_experts=4, top_k=1, router_z_weight=0.5, balance_weight=2.0)
    head = MixtureOfExperts(config, in_dim=10, embed_dim=6)
    torch.nn.init.normal_(head.gate.weight)
    x = torch.randn(50, 10)
    _, scalars = head(x)
    logits = head.gate(head.gate_norm(x))
    probability = logits.softmax(1)
    load = F.one_hot(probability.argmax(1), 4).float().mean(0)
    router_z = logits.logsumexp(1).square().mean()
    balance = 4 * (load * probability.mean(0)).sum()
    torch.testing.assert_close(scalars["router_z"], router_z.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(scalars["balance"], balance.detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(scalars["loss"], 0.5 * router_z + 2 * balance, atol=1e-5, rtol=0)
    torch.testing.assert_close(scalars["max_expert_load"], load.max())
    torch.nn.init.zeros_(head.gate.weight)
    head.config = HeadConfig(num_experts=4)
    assert head(x)[1]["balance"].item() == pytest.approx(1, abs=1e-6)


def test_head_reports_experts_that_get_nothing():
    head = MixtureOfExperts(HeadConfig(num_experts=4, top_k=1), in_dim=10, embed_dim=6)
    head.gate.bias.data[2] = 100.0
    scalars = head(torch.randn(9, 10))[1]
    assert scalars["num_dead_experts"].item() == 3
    assert scalars["max_expert_load"].item() == 1
    assert scalars["gate_entropy"].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("arguments", [{"num_experts": 0}, {"num_experts": 4, "top_k": 4}, {"balance_weight": -1.0}])
def test_head_config_contradictions_raise(arguments):
    with pytest.raises(ValueError):
        HeadConfig(**arguments)


# Together


class Learner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = PointEncoder(MINI)
        self.head = MixtureOfExperts(HeadConfig(num_experts=4), in_dim=10, embed_dim=24)
        self.loss = MultiPositiveContrastiveLoss(learned=True)


def test_parameter_groups_cover_every_parameter_once_and_decay_matrices_only():
    learner = Learner()
    learner.encoder.query_norm.requires_grad_(False)
    groups = {group["name"]: group for group in parameter_groups(learner, lr=1e-4, head_lr=1e-3, weight_decay=0.05)}
    names = {id(p): name for name, p in learner.named_parameters()}
    found = {name: [names[id(p)] for p in group["params"]] for name, group in groups.items()}
    trainable = [name for name, p in learner.named_parameters() if p.requires_grad]
    assert sorted(sum(found.values(), [])) == sorted(trainable)
    assert set(found["head"]) == {"head.weight", "head.gate.weight"}
    assert set(found["head_no_decay"]) == {
        "head.bias",
        "head.gate.bias",
        "head.gate_norm.weight",
        "head.gate_norm.bias",
        "loss.log_scale",
    }
    assert "encoder.queries" in found["encoder_no_decay"]
    assert all(name.endswith("weight") for name in found["encoder"])
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "encoder": (1e-4, 0.05),
        "encoder_no_decay": (1e-4, 0.0),
        "head": (1e-3, 0.05),
        "head_no_decay": (1e-3, 0.0),
    }


def test_learner_overfits_one_batch():
    torch.manual_seed(0)
    learner = Learner().train()
    points, views = clouds(8), torch.randn(8, 3, 10)
    view_mask, group = torch.ones(8, 3, dtype=torch.bool), torch.arange(8)
    optimizer = torch.optim.AdamW(parameter_groups(learner, lr=3e-3, head_lr=3e-3, weight_decay=0.0))
    losses = []
    for _ in range(90):
        image = learner.head(views.flatten(0, 1))[0].unflatten(0, (8, 3))
        loss = learner.loss(learner.encoder(points), image, view_mask, group)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Three views share the probability, so the least possible loss is log(3) / 2 = 0.549.
    assert losses[0] > 2 and losses[-1] < 0.62
