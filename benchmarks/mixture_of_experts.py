"""Row 7. The image head's sparse mixture of experts, forward and backward: 3,072 rows (128 objects × 24 views), 1,024 → 1,280, on one thread.

Rivals compute the same function: dense over all experts with zero weights for those not chosen, and the loop that masks each expert's rows.
Routing is compared by itself (that is what the aims are about) and within the whole head, whose shared expert every rival needs as well.
"""

import statistics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Comparison, Settings, compared, product_flops, row_main, seconds_in_turn
from cad_models.alignment.model_config import HeadConfig
from cad_models.alignment.moe import MixtureOfExperts


class _NoSharedExpert(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(1)


def naive(head: MixtureOfExperts, x: Tensor, *, kind: str) -> Tensor:
    """The head's function by ``dense`` weights over all experts, or by a ``masked`` loop over them."""
    probability = head.gate(head.gate_norm(x)).softmax(dim=-1)
    values, chosen = probability.topk(head.config.top_k, dim=-1)
    if kind == "dense":
        weights = torch.zeros_like(probability).scatter(1, chosen, values)
        every = torch.stack([F.linear(x, weight, bias) for weight, bias in zip(head.weight.unbind(0), head.bias.unbind(0), strict=True)], dim=1)
        y = (weights.unsqueeze(-1) * every).sum(dim=1)
    else:
        y = x.new_zeros(len(x), head.weight.shape[1])
        for expert in range(head.config.num_experts):
            row, slot = (chosen == expert).nonzero(as_tuple=True)
            y = y.index_add(0, row, values[row, slot, None] * F.linear(x[row], head.weight[expert], head.bias[expert]))
    y = y + (1 - values.sum(dim=1, keepdim=True)) * head.shared(x)
    return F.normalize(y, dim=-1)


def step(head: MixtureOfExperts, x: Tensor, kind: str, upstream: Tensor) -> Tensor:
    """Output by ``ours``, ``dense`` or ``masked``; the gradients of ``upstream`` are in the head's parameters."""
    head.zero_grad(set_to_none=True)
    y = head(x)[0] if kind == "ours" else naive(head, x, kind=kind)
    y.backward(upstream)
    return y.detach()


def check_equal(head: MixtureOfExperts, x: Tensor, upstream: Tensor) -> None:
    """Raises AssertionError unless outputs and gradients of all three agree."""
    reference = step(head, x, "ours", upstream)
    gradients = [p.grad.clone() for p in head.parameters()]
    for kind in ("dense", "masked"):
        torch.testing.assert_close(step(head, x, kind, upstream), reference, rtol=1e-4, atol=1e-5)
        for found, wanted in zip((p.grad for p in head.parameters()), gradients, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * max(1.0, wanted.abs().max().item()))


def run(settings: Settings) -> list[Comparison]:
    """Time routing alone and the whole head for 4 and 16 experts, top-1 and top-2."""
    torch.set_num_threads(1)
    rows, in_dim, width = settings.pick((3072, 1024, 1280), (512, 128, 160))
    generator = torch.Generator().manual_seed(0)
    x, upstream = torch.randn(rows, in_dim, generator=generator), torch.randn(rows, width, generator=generator)
    # Forward and the weights' gradient; the frozen input needs none.
    product_s = 2 * 2 * rows * in_dim * width / product_flops()
    found = []
    for num_experts in (4, 16):
        for top_k in (1, 2):
            torch.manual_seed(0)
            head = MixtureOfExperts(HeadConfig(num_experts=num_experts, top_k=top_k), in_dim=in_dim, embed_dim=width)
            nn.init.normal_(head.gate.weight, std=0.2)  # a gate that has learned: uneven loads
            check_equal(head, x[:256], upstream[:256])
            for routing in (True, False) if top_k == 1 else (True,):
                if routing:
                    shared, head.shared = head.shared, _NoSharedExpert()
                kinds = ("ours", "dense", "masked") if routing else ("ours", "dense")
                rivals = {kind: lambda kind=kind, head=head: step(head, x, kind, upstream) for kind in kinds}
                seconds = seconds_in_turn(rivals, rounds=settings.pick(3, 1), warm=False)
                if routing:
                    head.shared = shared
                units = top_k + (not routing)
                what = f"{'routing' if routing else 'whole head'}, {num_experts} experts, top-{top_k}"
                share = {"limit_share": units * product_s / statistics.median(seconds["ours"]), "limit": "of its products at peak"}
                aim = {1: {4: 3.0, 16: 7.0}}.get(top_k, {}).get(num_experts) if routing else None
                dense_units = num_experts + (not routing)
                note = f"the arithmetic allows {dense_units / units:.2g}"
                found.append(compared(7, what, "dense over all experts", seconds["ours"], seconds["dense"], at_least=aim, note=note, **share))
                if routing:
                    found.append(compared(7, what, "masked loop", seconds["ours"], seconds["masked"], at_least=1.1, **share))
    return found


if __name__ == "__main__":
    row_main(run)
