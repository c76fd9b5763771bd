"""Networks, losses and the learner."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from cad_models.config import replace_all
from cad_models.histograms.learner import HistogramLearner
from cad_models.histograms.loss import MetricLoss, pairwise_cosine_loss
from cad_models.histograms.metrics import class_centres
from cad_models.histograms.model import Perceptrons
from cad_models.histograms.recipe import RECIPE, SOURCE_BASELINE, HistogramLoss, HistogramModel

KINDS = ["pairwise_cosine", "normalized_softmax", "arcface", "proxy_anchor", "supcon", "multi_similarity", "triplet"]


def unit(n, dim, seed=0, dtype=torch.float64):
    return functional.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=1)


def loop_loss(embeddings, labels):
    """As the source system wrote it: two loops over the batch."""
    total = 0
    for i in range(len(labels)):
        for j in range(len(labels)):
            dot = (embeddings[i] * embeddings[j]).sum()
            total = total + ((1 - dot) / 2 if labels[i] == labels[j] else (1 + dot) / 2)
    return total / len(labels) ** 2


def test_pairwise_cosine_loss_equals_its_loop_in_value_and_gradient():
    labels = torch.tensor([0, 1, 0, 2, 2, 1, 0])
    one, two = unit(7, 5).requires_grad_(), unit(7, 5).requires_grad_()
    fast, slow = pairwise_cosine_loss(one, labels), loop_loss(two, labels)
    fast.backward()
    slow.backward()
    assert float(fast.detach()) == pytest.approx(float(slow.detach()), abs=1e-12)
    assert float((one.grad - two.grad).abs().max()) < 1e-12
    perfect = torch.eye(3, dtype=torch.float64)[[0, 0, 1]] * torch.tensor([1.0, 1.0, -1.0])[:, None]
    assert float(pairwise_cosine_loss(perfect, torch.tensor([0, 0, 1]))) == pytest.approx(4 / 9 / 2)  # orthogonal classes cost 1/2 each


def test_source_model_has_the_published_parameters_and_is_a_linear_map():
    recipe = replace_all(RECIPE, SOURCE_BASELINE)
    torch.manual_seed(0)
    network = Perceptrons(128, recipe.model).eval()
    assert sum(p.numel() for p in network.parameters()) == 7_824
    layers = [nn.Linear(128, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 16)]
    for layer, own in zip(layers, [*network.layers, network.head], strict=True):
        layer.weight.data, layer.bias.data = own.weight[0].T.detach(), own.bias[0, 0].detach()
    x = torch.rand(9, 128)
    expected = functional.normalize(nn.Sequential(*layers)(x), dim=1)
    torch.testing.assert_close(network(x[None])[0], expected, rtol=1e-5, atol=1e-6)


def test_networks_side_by_side_are_independent_and_rows_have_norm_one():
    config = HistogramModel(width=16, depth=3, embed_dim=4, num_networks=3, dropout=0.0)
    torch.manual_seed(0)
    network = Perceptrons(10, config).eval()
    x = torch.rand(3, 5, 10)
    found = network(x)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3, 5))
    single = Perceptrons(10, HistogramModel(width=16, depth=3, embed_dim=4, num_networks=1, dropout=0.0)).eval()
    for number in range(3):
        single.load_state_dict({k: v if k.startswith("input_") else v[number : number + 1] for k, v in network.state_dict().items()})
        torch.testing.assert_close(single(x[number : number + 1])[0], found[number])


def test_layers_start_as_torch_linear_does():
    torch.manual_seed(0)
    weight = Perceptrons(100, HistogramModel(width=200, depth=1)).layers[0].weight
    assert float(weight.detach().abs().max()) == pytest.approx(0.1, rel=1e-3) and float(weight.detach().std()) == pytest.approx(0.1 / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_every_loss_falls_when_classes_come_together(kind):
    torch.manual_seed(0)
    loss = MetricLoss(HistogramLoss(kind=kind), 3, 8)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    mixed, apart = unit(6, 8, dtype=torch.float32), torch.eye(8)[[0, 0, 1, 1, 2, 2]]
    if loss.library is not None:
        for proxies in loss.library.parameters():  # class vectors where the classes are
            proxies.data = torch.eye(8)[:3].T.clone() if kind != "proxy_anchor" else torch.eye(8)[:3].clone()
    assert float(loss(apart, labels).detach()) < float(loss(mixed, labels).detach())


@pytest.mark.parametrize("kind", KINDS)
def test_batch_without_a_pair_still_gives_a_gradient(kind):
    embeddings = unit(1, 8, dtype=torch.float32).requires_grad_()
    loss = MetricLoss(HistogramLoss(kind=kind), 3, 8)(embeddings, torch.tensor([1]))
    loss.backward()
    assert embeddings.grad is not None and torch.isfinite(embeddings.grad).all()


def test_normalized_softmax_is_cross_entropy_of_cosines():
    torch.manual_seed(0)
    loss = MetricLoss(HistogramLoss(kind="normalized_softmax", temperature=0.1), 3, 8)
    rows, labels = unit(6, 8, dtype=torch.float32), torch.tensor([0, 1, 2, 0, 1, 2])
    cosines = rows @ functional.normalize(loss.library.W, dim=0)
    torch.testing.assert_close(loss(rows, labels), functional.cross_entropy(cosines / 0.1, labels))


def test_mixed_objects_cost_the_shares_of_both_classes():
    torch.manual_seed(0)
    loss = MetricLoss(HistogramLoss(kind="normalized_softmax"), 3, 8)
    rows, labels, other = unit(4, 8, dtype=torch.float32), torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 0, 2])
    share = torch.tensor([1.0, 0.5, 0.25, 0.0])
    each = [s * loss(r[None], a[None]) + (1 - s) * loss(r[None], b[None]) for r, a, b, s in zip(rows, labels, other, share, strict=True)]
    torch.testing.assert_close(loss(rows, labels, other, share), torch.stack(each).mean())


# --- the learner --------------------------------------------------------------------------------------------------------------------------
def learner(**changes):
    recipe = replace_all(RECIPE, {"model.width": 16, "model.embed_dim": 4, "model.num_networks": 2, **changes})
    torch.manual_seed(0)
    return HistogramLearner(recipe, 10, 3)


def test_adapt_standardises_over_all_batches_together():
    model, rng = learner(), np.random.default_rng(0)
    rows = torch.from_numpy((rng.standard_normal((50, 10)) * np.linspace(1, 3, 10) + 1e3).astype(np.float32))
    rows[:, 4] = 7.0
    model.adapt(iter({"features": part} for part in rows.split(16)))
    mean, std = rows.double().mean(dim=0), rows.double().std(dim=0, correction=0)
    torch.testing.assert_close(model.networks.input_mean.double(), mean, rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(model.networks.input_std[:4], std[:4], rtol=1e-4)
    assert float(model.networks.input_std[4]) == pytest.approx(0.1 * float(std.mean()), rel=1e-4)  # flat: not blown up


def test_cosine_of_two_embeddings_is_the_mean_of_the_networks():
    model = learner().eval()
    x = torch.rand(2, 10)
    vectors = model.networks(x.expand(2, 2, 10))
    embedded = model.embed(x).detach()
    assert float(embedded[0] @ embedded[1]) == pytest.approx(float((vectors[:, 0] * vectors[:, 1]).sum(-1).mean().detach()), abs=1e-6)


def test_remembered_centres_travel_with_the_checkpoint_and_change_no_prediction():
    model = learner().eval()
    batch = {"features": torch.rand(12, 10), "label": torch.arange(12) % 3, "group": torch.arange(12)}
    before = model.predict(batch)["embedding"]
    rows = before.detach().numpy()
    model.remember({"embedding": rows, "label": batch["label"].numpy()})
    assert torch.equal(model.predict(batch)["embedding"], before)
    assert "centres" not in model.state_dict()
    other = learner(seed=1)
    other.load_artifacts({name: {k: v.clone() for k, v in tensors.items()} for name, tensors in model.artifacts().items()})
    np.testing.assert_allclose(other.centres.numpy(), class_centres(rows, batch["label"].numpy(), 3), atol=1e-6)
    assert torch.equal(other.eval().predict(batch)["embedding"], before)


def test_weights_of_another_recipe_are_refused_by_name():
    with pytest.raises(ValueError, match="networks.safetensors.*head.weight"):
        learner().load_artifacts(learner(**{"model.embed_dim": 5}).artifacts())


def test_mixup_trains_and_evaluation_stays_deterministic():
    model = learner(**{"loss.mixup": 0.4}).train()
    batch = {"features": torch.rand(8, 10), "label": torch.arange(8) % 3, "group": torch.arange(8)}
    optimizer = model.optimizers(model.recipe)["model"]
    losses = []
    for _ in range(60):
        loss = model(batch, "model")["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    model.eval()
    assert torch.equal(model.predict(batch)["embedding"], model.predict(batch)["embedding"])
