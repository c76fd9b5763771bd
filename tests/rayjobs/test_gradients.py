"""Gradient caching: gradients of micro-batches against those of the whole batch, alone, in a training and over two workers."""

import functools

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from cad_models.alignment.learner import AlignmentLearner
from cad_models.alignment.recipe import AlignmentLoss, AlignmentModel, AlignmentRecipe
from cad_models.config import replace_all
from cad_models.learner import EmbeddingLearner
from rayjobs.gradients import autocast_for, average_gradients, cached_backward, checked_micro_batch_size, seed_of_step
from rayjobs.loop import Training
from tests.rayjobs.test_loop import RECIPE, config_of, flat, weights
from tests.synthetic import make_dataset

FLOAT32 = autocast_for("float32", torch.device("cpu"))
SEED = functools.partial(seed_of_step, 1, 2, 3)


def learner_of(**model) -> AlignmentLearner:
    torch.manual_seed(0)
    recipe = AlignmentRecipe(
        model=AlignmentModel(embed_dim=12, channels="xyz", num_experts=4, top_k=1, **model),
        loss=AlignmentLoss(learned_temperature=True, balance_weight=0.3),
    )
    return AlignmentLearner(recipe, 7).train()


def batch_of(num_objects=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(num_objects, 4, generator=generator) < 0.7
    mask[:, 0] = True
    group = torch.arange(num_objects)
    group[-1] = 0
    return {
        "points": F.normalize(torch.randn(num_objects, 64, 3, generator=generator), dim=-1),
        "group": group,
        "views": torch.randn(num_objects, 4, 7, generator=generator),
        "view_mask": mask,
    }


def gradients(learner):
    found = {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}
    learner.zero_grad(set_to_none=True)
    return found


def assert_equal_gradients(actual, expected, tolerance=1e-6):
    assert actual.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        assert (actual[name] - gradient).abs().max() <= tolerance * largest, name


@pytest.mark.parametrize("size", [1, 4, 9, 100])
def test_cached_gradients_equal_those_of_the_whole_batch(size):
    learner, batch = learner_of(), batch_of()
    SEED(0)
    scalars = learner(batch, "model")
    scalars["loss"].backward()
    expected = gradients(learner)
    cached = cached_backward(learner, batch, size, seed=SEED, autocast=FLOAT32)
    assert_equal_gradients(gradients(learner), expected)
    assert cached.keys() == scalars.keys()
    for name, value in scalars.items():
        torch.testing.assert_close(cached[name], value.detach(), atol=1e-6, rtol=1e-6)


def test_cached_gradients_with_dropout_equal_one_graph_over_the_same_draws():
    learner, batch = learner_of(drop_path=0.5, patch_dropout=0.5), batch_of()
    parts = []
    for i, start in enumerate(range(0, 9, 4)):
        SEED(i)
        parts.append(learner.embed({name: tensor[start : start + 4] for name, tensor in batch.items()})["cad"])
    learner.loss_from({"cad": torch.cat(parts)}, batch)["loss"].backward()
    expected = gradients(learner)
    cached_backward(learner, batch, 4, seed=SEED, autocast=FLOAT32)
    actual = gradients(learner)
    assert_equal_gradients(actual, expected)
    SEED(7)  # other draws give other gradients: the comparison above can fail
    cached_backward(learner, batch, 4, seed=lambda i: SEED(10 + i), autocast=FLOAT32)
    with pytest.raises(AssertionError):
        assert_equal_gradients(gradients(learner), expected, tolerance=1e-3)


def test_cached_gradients_add_to_those_that_are_there():
    learner, batch = learner_of(), batch_of()
    cached_backward(learner, batch, 4, seed=SEED, autocast=FLOAT32)
    once = gradients(learner)
    for _ in range(2):
        cached_backward(learner, batch, 4, seed=SEED, autocast=FLOAT32)
    assert_equal_gradients(gradients(learner), {name: 2 * gradient for name, gradient in once.items()})


class Normalised(nn.Module, EmbeddingLearner):
    """An embedding behind a BatchNorm; counts the largest graph by the rows that it embeds at once."""

    def __init__(self):
        super().__init__()
        self.norm, self.rows = nn.BatchNorm1d(3), []

    def embed(self, batch):
        self.rows.append(len(batch["x"]))
        return {"x": self.norm(batch["x"])}

    def loss_from(self, embedded, batch):
        return {"loss": torch.cdist(embedded["x"], embedded["x"]).pow(2).mean()}

    def forward(self, batch, turn):
        return self.loss_from(self.embed(batch), batch)

    def optimizers(self, recipe): ...
    def predict(self, batch): ...
    def artifacts(self): ...
    def load_artifacts(self, artifacts): ...


def test_running_statistics_move_once_a_micro_batch_and_never_more_rows_at_once():
    learner, x = Normalised().train(), torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    cached_backward(learner, {"x": x}, 4, seed=SEED, autocast=FLOAT32)
    expected = nn.BatchNorm1d(3).train()
    for piece in x.split(4):
        expected(piece)
    for actual, wanted in zip(learner.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(actual, wanted)
    assert learner.rows == [4, 4, 2] * 2


def test_micro_batches_of_a_learner_without_embeddings_are_refused():
    with pytest.raises(ValueError, match="--optim.micro-batch-size 4: this task's loss is not computed from embeddings"):
        checked_micro_batch_size(nn.Linear(1, 1), 4)
    assert checked_micro_batch_size(nn.Linear(1, 1), 0) == 0
    assert checked_micro_batch_size(learner_of(), 4) == 4


# --- in the loop --------------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(str(tmp_path_factory.mktemp("data") / "ds"), 40, recipe=RECIPE).uri


def test_training_in_micro_batches_ends_with_the_same_weights(dataset, tmp_path):
    recipe = replace_all(RECIPE, {"schedule.num_epochs": 1, "schedule.num_warmup_epochs": 0.5})
    for name, size in (("whole", 0), ("pieces", 3)):
        Training(config_of(dataset, tmp_path / name, replace_all(recipe, {"optim.micro_batch_size": size}))).run()
    a, b = (flat(weights(tmp_path / name / "last")) for name in ("whole", "pieces"))
    assert float((a - b).norm() / a.norm()) < 1e-6


def _average_rank(rank, rendezvous, config, out):
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        training = Training(config)
        training._resume()
        columns = next(iter(config.train.batches(0, training.batch_size, rank, 2)))
        batch = next(iter(training._collated(iter([columns]))))
        seed = functools.partial(seed_of_step, 0, 0, rank)
        cached_backward(training.learner, batch, 3, seed=seed, autocast=FLOAT32)
        torch.save({n: p.grad for n, p in training.learner.named_parameters()}, f"{out}-{rank}.pt")
        # Buckets of any size: a parameter larger than the rest, and one without gradient.
        p = [nn.Parameter(torch.zeros(n)) for n in (5, 1, 3)]
        p[0].grad, p[2].grad = torch.full((5,), 1.0 + rank), torch.full((3,), -2.0 * rank)
        average_gradients(p)
        assert p[0].grad.tolist() == [1.5] * 5 and p[1].grad is None and p[2].grad.tolist() == [-1.0] * 3
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_in_micro_batches_have_the_gradients_of_one_with_the_whole_batch(dataset, tmp_path):
    recipe = replace_all(RECIPE, {"loss.balance_weight": 0.0})
    config = config_of(dataset, tmp_path / "run", recipe)
    mp.spawn(_average_rank, args=(str(tmp_path / "rendezvous"), config, str(tmp_path / "two")), nprocs=2)
    training = Training(config_of(dataset, tmp_path / "one", recipe))
    training._resume()
    columns = next(iter(config.train.batches(0, training.batch_size, 0, 1)))
    training.learner(next(iter(training._collated(iter([columns])))), "model")["loss"].backward()
    expected = flat({n: p.grad for n, p in training.learner.named_parameters()})
    for rank in range(2):
        actual = flat(torch.load(f"{tmp_path}/two-{rank}.pt", weights_only=True))
        assert float((actual - expected).norm() / expected.norm()) < 1e-6
