"""Histograms over pairs of points: against loops, turned, mirrored in their normals; and the network on them."""

import numpy as np
import pytest
import torch

from cad_models.alignment.learner import AlignmentLearner
from cad_models.alignment.model import PointEncoder, PointEncoderConfig, parameter_groups
from cad_models.alignment.pair_histogram import WIDTH, PairEmbedding, pair_histogram
from cad_models.alignment.recipe import AlignmentModel, AlignmentRecipe


def clouds(num_clouds: int = 3, num_points: int = 40, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(num_clouds, num_points, 3, generator=generator)
    points = points / points.norm(dim=-1).amax(dim=1)[:, None, None]
    normals = torch.nn.functional.normalize(torch.randn(num_clouds, num_points, 3, generator=generator), dim=-1)
    return torch.cat([points, normals], dim=-1)


def shares(value: float, bins: int) -> np.ndarray:
    result = np.zeros(bins)
    place = min(max(value, 0.0), 1.0) * (bins - 1)
    lower = min(int(place), bins - 2)
    result[lower], result[lower + 1] = lower + 1 - place, place - lower
    return result


def slow_pair_histogram(cloud: np.ndarray) -> np.ndarray:
    """One pair at a time."""
    n = len(cloud)
    surflets, steep, distances, count = np.zeros((8, 4, 4, 4)), np.zeros((8, 6)), np.zeros(32), 0
    for stride in sorted({max(1, round((k + 0.5) * n / 2 / 12)) for k in range(12)}):
        for i in range(n):
            p, q = cloud[i], cloud[(i + stride) % n]
            line = q[:3] - p[:3]
            length = np.linalg.norm(line)
            one, other = sorted(abs(np.dot(x[3:], line / length)) for x in (p, q))
            near = shares(length / 2, 8)
            surflets += np.einsum("a,b,c,d->abcd", near, shares(one, 4), shares(other, 4), shares(abs(np.dot(p[3:], q[3:])), 4))
            steep += np.outer(near, shares(abs(line[2]) / length, 6))
            distances += shares(length / 2, 32)
            count += 1
    return np.sqrt(np.concatenate([surflets.ravel(), steep.ravel(), distances]) / count)


@pytest.mark.parametrize("num_points", [40, 7])  # fewer points than different strides
def test_pair_histogram_equals_a_loop_over_pairs(num_points):
    points = clouds(num_points=num_points)
    found = pair_histogram(points)
    assert found.shape == (3, WIDTH) and found.dtype == torch.float32
    for row, cloud in zip(found, points, strict=True):
        np.testing.assert_allclose(row.numpy(), slow_pair_histogram(cloud.double().numpy()), atol=2e-4)


def test_turning_about_the_vertical_and_flipping_normals_change_nothing_but_tilting_does():
    points = clouds()
    first = pair_histogram(points)
    turn = torch.tensor([[0.6, -0.8, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    turned = torch.cat([points[..., :3] @ turn.T, -points[..., 3:] @ turn.T], dim=-1)
    torch.testing.assert_close(pair_histogram(turned), first, atol=1e-4, rtol=0)
    assert (pair_histogram(points[..., [2, 0, 1, 5, 3, 4]]) - first).abs().max() > 0.01


def test_one_point_many_times_gives_finite_features():
    assert pair_histogram(clouds(1, 1).repeat(1, 20, 1)).isfinite().all()


def test_standardised_features_have_mean_zero_and_no_bin_is_blown_up():
    embedding, points = PairEmbedding(5), clouds(200)
    embedding.standardise(points)
    features = (pair_histogram(points) - embedding.mean) / embedding.std
    assert features.mean(dim=0).abs().max() < 1e-4 and features.std(dim=0).max() < 1.01
    same = PairEmbedding(5)
    same.standardise(points[:1].repeat(4, 1, 1))
    assert same(points).isfinite().all()


def test_encoder_adds_the_pairs_embedding_to_its_own_as_unit_vectors():
    torch.manual_seed(0)
    config = {"width": 16, "depth": 1, "num_heads": 2, "num_groups": 8, "group_size": 4, "embed_dim": 6}
    encoder = PointEncoder(PointEncoderConfig(**config, pair_histogram=True)).eval()
    points = clouds()
    found = encoder.encode(points)
    tokens = found.image_tokens.mean(dim=1) + 0.3 * found.text_tokens.mean(dim=1)
    expected = tokens + torch.nn.functional.normalize(encoder.pairs(points), dim=-1)
    torch.testing.assert_close(found.embedding, torch.nn.functional.normalize(expected, dim=-1))
    plain = PointEncoder(PointEncoderConfig(**config))
    assert {name for name in encoder.state_dict() if not name.startswith("pairs.")} == set(plain.state_dict())
    encoder.train()(points).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    groups = {group["name"]: group["params"] for group in parameter_groups(encoder, lr=1.0, head_lr=2.0, weight_decay=0.1)}
    assert sum(map(len, groups.values())) == len(list(encoder.parameters()))
    assert {id(p) for name in ("head", "head_no_decay") for p in groups[name]} == {id(p) for p in encoder.pairs.parameters()}


def test_pairs_need_normals():
    with pytest.raises(ValueError, match="needs channels='xyz\\+normals', not 'xyz'"):
        PointEncoderConfig(channels="xyz", pair_histogram=True)


@pytest.mark.parametrize("model", [{"size": "pairs"}, {"size": "tiny", "pair_histogram": True}])
def test_learner_with_pairs_adapts_learns_and_survives_its_own_files(model):
    recipe = AlignmentRecipe(model=AlignmentModel(embed_dim=8, num_points=64, num_experts=2, **model))
    torch.manual_seed(0)
    learner = AlignmentLearner(recipe, 5)
    views = torch.randn(6, 3, 5)
    batch = {"points": clouds(6, 64), "group": torch.arange(6), "views": views, "view_mask": torch.ones(6, 3, dtype=torch.bool)}
    learner.adapt(iter([{**batch, "query_views": views, "query_mask": batch["view_mask"]}]))
    features = learner.point_encoder.pairs
    assert features.mean.abs().max() > 0.1 and not torch.equal(features.std, torch.ones(WIDTH))
    learner(batch, "model")["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learner.parameters())
    other = AlignmentLearner(recipe, 5)
    other.load_artifacts(learner.artifacts())
    assert torch.equal(other.eval().embed_cad(batch["points"]), learner.eval().embed_cad(batch["points"]))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"size": "pairs", "channels": "xyz"}, "--model.channels is 'xyz': it must be xyz\\+normals with --model.size pairs"),
        ({"pair_histogram": True, "channels": "xyz"}, "xyz\\+normals with --model.pair-histogram"),
        ({"size": "recon_base_1k", "channels": "xyz", "embed_dim": 1280, "pair_histogram": True}, "--model.channels is 'xyz'"),
    ],
)
def test_recipe_refuses_pairs_without_normals(model, message):
    with pytest.raises(ValueError, match=message):
        AlignmentModel(**model)
