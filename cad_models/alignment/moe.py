"""Image head: a mixture of linear experts from the frozen encoder's width to the common embedding."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cad_models.alignment.model_config import HeadConfig
from cad_models.common.contrastive import sum_with_gradient

# An expert that gets less than this share of an even load counts as dead.
_DEAD_SHARE = 0.01


class MixtureOfExperts(nn.Module):
    """Linear experts weighted by a gate (layer norm, linear, softmax), result of unit length.

    - ``num_experts=1``: one linear layer, no gate.
    - dense (``top_k=0``): ``Σ_e g_e (W_e x + b_e)`` over all experts, one wide matrix product.
    - sparse: each row goes to its ``top_k`` experts with their softmax weights; the weight that is left goes to one
      shared expert that sees every row (DeepSeekMoE, arXiv:2401.06066). Weights therefore sum to 1 in every case, and
      the gate learns also with ``top_k=1``, where renormalised weights would be constant.
    - ``residual``: ``W x + b`` plus what the experts give, all of which start at zero: at first, and from the same seed, it is the head with one
      expert, bit for bit; what the gate learns comes on top (upcycling, arXiv:2212.05055, from an untrained layer). It takes the shared expert's place.

    Every parameter gets a gradient in every step, also that of an expert without rows, so data-parallel training
    needs no search for unused parameters. The statistics of the auxiliary losses are those of the whole batch over
    all processes.
    """

    def __init__(self, config: HeadConfig, *, in_dim: int, embed_dim: int):
        super().__init__()
        self.config = config
        num_experts = config.num_experts
        residual = config.residual and num_experts > 1
        self.residual_weight = self.residual_bias = None
        if residual:
            self.residual_weight = nn.Parameter(torch.empty(embed_dim, in_dim))
            self.residual_bias = nn.Parameter(torch.zeros(embed_dim))
            nn.init.trunc_normal_(self.residual_weight, std=in_dim**-0.5)
        self.weight = nn.Parameter(torch.empty(num_experts, embed_dim, in_dim))
        self.bias = nn.Parameter(torch.zeros(num_experts, embed_dim))
        if residual:
            nn.init.zeros_(self.weight)
        else:
            nn.init.trunc_normal_(self.weight, std=in_dim**-0.5)
        self.gate_norm = self.gate = self.shared = None
        if num_experts > 1:
            self.gate_norm = nn.LayerNorm(in_dim)
            self.gate = nn.Linear(in_dim, num_experts)
            nn.init.trunc_normal_(self.gate.weight, std=0.02)
            nn.init.zeros_(self.gate.bias)
        if config.top_k and not residual:
            self.shared = nn.Linear(in_dim, embed_dim)
            nn.init.trunc_normal_(self.shared.weight, std=in_dim**-0.5)
            nn.init.zeros_(self.shared.bias)

    def forward(self, x: Float[Tensor, "rows in_dim"]) -> tuple[Float[Tensor, "rows embed_dim"], dict[str, Tensor]]:
        """Embeddings in float32, and scalars: ``loss`` (auxiliary, to be added to the task's), ``router_z`` and
        ``balance`` before their weights, ``gate_entropy`` in nats, ``min_expert_load`` and ``max_expert_load``
        (shares of the total weight or, if sparse, of the assignments), ``num_dead_experts``.
        """
        if self.gate is None:
            return _unit(F.linear(x, self.weight[0], self.bias[0])), _constant_scalars(x)
        logits = self.gate(self.gate_norm(x)).float()
        probability = logits.softmax(dim=-1)
        if self.config.top_k:
            chosen = probability.topk(self.config.top_k, dim=-1)
            y = self._sparse(x, chosen.values, chosen.indices)
            load = torch.bincount(chosen.indices.flatten(), minlength=self.config.num_experts).to(probability.dtype)
        else:
            y = self._dense(x, probability)
            load = probability.detach().sum(dim=0)
        if self.residual_weight is not None:
            y = y + F.linear(x, self.residual_weight, self.residual_bias)
        return _unit(y), self._scalars(logits, probability, load)

    def _dense(self, x: Tensor, probability: Tensor) -> Tensor:
        y = F.linear(x, self.weight.flatten(0, 1), self.bias.flatten()).unflatten(-1, (self.config.num_experts, -1))
        return torch.bmm(probability.to(y.dtype).unsqueeze(1), y).squeeze(1)

    def _sparse(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        rows, top_k = experts.shape
        # Sorted by expert, each expert's rows are one matrix product. unbind, because indexing the weight once an
        # expert makes a full-size gradient each time.
        order = experts.flatten().argsort(stable=True)
        counts = torch.bincount(experts.flatten(), minlength=self.config.num_experts).tolist()
        dispatched = x.unsqueeze(1).expand(-1, top_k, -1).flatten(0, 1)[order]
        parts = zip(dispatched.split(counts), self.weight.unbind(0), self.bias.unbind(0), strict=True)
        y = torch.cat([F.linear(part, weight, bias) for part, weight, bias in parts])
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        routed = torch.bmm(weights.to(y.dtype).unsqueeze(1), y[inverse].view(rows, top_k, y.shape[-1])).squeeze(1)
        if self.shared is None:
            return routed
        return routed + (1 - weights.sum(dim=1, keepdim=True)).to(y.dtype) * self.shared(x)

    def _scalars(self, logits: Tensor, probability: Tensor, load: Tensor) -> dict[str, Tensor]:
        num_experts = self.config.num_experts
        sums = torch.cat(
            [
                logits.logsumexp(dim=-1).square().sum().view(1),
                logits.new_tensor([len(logits)]),
                probability.sum(dim=0),
                load,
            ]
        )
        # Both losses are of the whole batch. Not in evaluation, where ranks may have unequal numbers of batches.
        if self.training and (self.config.router_z_weight or self.config.balance_weight):
            sums = sum_with_gradient(sums)
        z_sum, num_rows, probability_sum, load = sums.split([1, 1, num_experts, num_experts])
        num_rows = num_rows.detach().clamp(min=1)
        share = load.detach() / load.detach().sum().clamp(min=1e-9)
        router_z = (z_sum / num_rows).squeeze(0)
        balance = num_experts * (share * probability_sum / num_rows).sum()
        return {
            "loss": self.config.router_z_weight * router_z + self.config.balance_weight * balance,
            "router_z": router_z.detach(),
            "balance": balance.detach(),
            "gate_entropy": torch.special.entr(probability.detach()).sum(dim=-1).mean(),
            "min_expert_load": share.min(),
            "max_expert_load": share.max(),
            "num_dead_experts": (share < _DEAD_SHARE / num_experts).sum().to(share.dtype),
        }


def _unit(y: Tensor) -> Tensor:
    return F.normalize(y.float(), dim=-1)


def _constant_scalars(x: Tensor) -> dict[str, Tensor]:
    zero, one = x.new_zeros((), dtype=torch.float32), x.new_ones((), dtype=torch.float32)
    return {
        "loss": zero,
        "router_z": zero,
        "balance": one,
        "gate_entropy": zero,
        "min_expert_load": one,
        "max_expert_load": one,
        "num_dead_experts": zero,
    }
