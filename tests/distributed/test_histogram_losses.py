"""The metric losses on two gloo processes against one process with the whole batch: value and averaged gradients."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from cad_models.histograms.loss import MetricLoss
from cad_models.histograms.recipe import HistogramLoss

KINDS = ("pairwise_cosine", "normalized_softmax", "proxy_anchor", "supcon", "multi_similarity")
WORLD_SIZE = 2


class SmallModel(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.tower = nn.Linear(6, 5)
        self.loss = MetricLoss(HistogramLoss(kind=kind), 3, 5)
        self.double()

    def forward(self, rows, labels):
        return self.loss(normalize(self.tower(rows), dim=1), labels)


def whole_batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 6, generator=generator, dtype=torch.float64), torch.arange(12) % 3


def run_rank(rank, rendezvous, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD_SIZE)
    rows, labels = (tensor[rank * 6 : rank * 6 + 6] for tensor in whole_batch())
    for kind in KINDS:
        model = SmallModel(kind)
        parallel = DistributedDataParallel(model)  # kept: its hooks average the gradients
        loss = parallel(rows, labels)
        loss.backward()
        torch.save((loss.detach(), [p.grad for p in model.parameters()]), f"{results}/{kind}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_losses_on_two_workers_equal_one_worker_with_the_whole_batch(tmp_path):
    mp.spawn(run_rank, args=(tmp_path / "rendezvous", tmp_path), nprocs=WORLD_SIZE)
    for kind in KINDS:
        model = SmallModel(kind)
        loss = model(*whole_batch())
        loss.backward()
        shares = [torch.load(tmp_path / f"{kind}-{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]
        assert float(sum(value for value, _ in shares) / WORLD_SIZE) == pytest.approx(float(loss.detach()), abs=1e-9), kind
        for _, gradients in shares:  # averaged by DDP: the same on every worker
            for own, whole in zip(gradients, model.parameters(), strict=True):
                assert float((own - whole.grad).abs().max()) < 1e-7, kind
