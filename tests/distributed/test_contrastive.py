"""Two gloo processes against one process with the whole batch: value and averaged gradients to 1e-6."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cad_models.alignment.loss import MultiPositiveContrastiveLoss
from cad_models.alignment.model import HeadConfig, MixtureOfExperts
from cad_models.common.contrastive import gather, gather_with_gradient, sum_with_gradient

WORLD_SIZE = 2


class SmallModel(nn.Module):
    """Two towers and the loss, in float64, so that 1e-6 is a statement about the method and not about rounding."""

    def __init__(self, sides=()):
        super().__init__()
        torch.manual_seed(0)
        self.tower = nn.Sequential(nn.Linear(6, 5 * math.prod(sides)), nn.Unflatten(1, (*sides, 5)))
        self.head = MixtureOfExperts(
            HeadConfig(num_experts=4, top_k=1, balance_weight=0.1, router_z_weight=0.01), in_dim=7, embed_dim=5
        )
        self.loss = MultiPositiveContrastiveLoss(0.1, learned=True)
        self.double()

    def forward(self, points, views, view_mask, group):
        cad = F.normalize(self.tower(points), dim=-1)
        flat, scalars = self.head(views[view_mask])
        image = cad.new_zeros(*view_mask.shape, cad.shape[-1])
        image[view_mask] = flat.to(image.dtype)
        return self.loss(cad, image, view_mask, group) + 0.5 * self.loss.between_images(image, view_mask, group) + scalars["loss"]


def whole_batch():
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    views = torch.randn(7, 4, 7, generator=generator, dtype=torch.float64)
    view_mask = torch.rand(7, 4, generator=generator) < 0.7
    view_mask[:, 0] = True
    view_mask[2] = False  # an object without views
    view_mask[4:, 3] = False  # so that the second rank has fewer views
    group = torch.arange(7)
    group[5] = group[1]  # duplicates on different ranks
    return points, views, view_mask, group


def share_of(rank, batch, counts):
    start = sum(counts[:rank])
    points, views, view_mask, group = (tensor[start : start + counts[rank]] for tensor in batch)
    num_views = int(view_mask.sum(dim=1).max()) if counts[rank] else 1
    num_views = max(num_views, 1 + int(view_mask.any(dim=0).nonzero().max()))
    return points, views[:, :num_views], view_mask[:, :num_views], group


def train_rank(rank, rendezvous, counts, sides, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD_SIZE)
    try:
        model = DistributedDataParallel(SmallModel(sides))
        loss = model(*share_of(rank, whole_batch(), counts))
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.module.named_parameters()}
        torch.save({"loss": loss.detach(), "gradients": gradients}, f"{results}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def gather_rank(rank, rendezvous, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD_SIZE)
    try:
        x = (torch.arange(6.0).view(3, 2) + 10 * rank).requires_grad_()
        whole = gather_with_gradient(x)
        # Rank r weighs the gathered elements by (r + 1) * 1..12, so the sum over ranks is 3 * 1..12.
        (whole * torch.arange(1.0, 13.0).view(6, 2) * (rank + 1)).sum().backward()
        y = torch.tensor([1.0 + rank], requires_grad=True)
        total = sum_with_gradient(y)
        (total * (rank + 1)).backward()
        flags = gather(torch.tensor([[True, rank == 1]]))
        saved = {"whole": whole.detach(), "x": x.grad, "total": total.detach(), "y": y.grad, "flags": flags}
        torch.save(saved, f"{results}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_ranks(function, tmp_path, *arguments):
    mp.spawn(function, args=(tmp_path / "rendezvous", *arguments, tmp_path), nprocs=WORLD_SIZE)
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]


@pytest.mark.slow
def test_gather_and_sum_over_two_processes_have_summed_gradients(tmp_path):
    for rank, found in enumerate(run_ranks(gather_rank, tmp_path)):
        expected = torch.cat([torch.arange(6.0).view(3, 2), torch.arange(6.0).view(3, 2) + 10])
        assert torch.equal(found["whole"], expected)
        assert torch.equal(found["x"], 3 * torch.arange(1.0, 13.0).view(6, 2)[3 * rank : 3 * rank + 3])
        assert found["total"].item() == 3.0
        assert found["y"].item() == 3.0
        assert found["flags"].tolist() == [[True, False], [True, True]]


@pytest.mark.slow
@pytest.mark.parametrize(("counts", "sides"), [((4, 3), ()), ((6, 1), ()), ((6, 1), (3,))])
def test_loss_of_two_processes_equals_one_process_with_the_whole_batch(tmp_path, counts, sides):
    model = SmallModel(sides)
    loss = model(*whole_batch())
    loss.backward()
    for found in run_ranks(train_rank, tmp_path, counts, sides):
        torch.testing.assert_close(found["loss"], loss.detach(), atol=1e-6, rtol=0)
        for name, parameter in model.named_parameters():
            difference = (found["gradients"][name] - parameter.grad).abs().max().item()
            assert difference <= 1e-6, f"{name}: {difference}"
            assert parameter.grad.abs().max() > 1e-4 or name == "head.bias", f"{name} hardly has a gradient to compare"
