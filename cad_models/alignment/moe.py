"""Image head: a mixture of linear experts from the frozen encoder's width to the common embedding."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        routed = _RoutedLinear.apply(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype), weights.to(dtype), experts)
        if self.shared is None:
            return routed
        return routed + (1 - weights.sum(dim=1, keepdim=True)).to(routed.dtype) * self.shared(x)

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


class _RoutedLinear(torch.autograd.Function):
    """``Σ_k v_k (W_e x + b_e)`` over the chosen experts ``e = experts[row, k]`` of each row.

    Rows are sorted by expert, so that each expert is one matrix product; products are written where they belong, forward and backward: autograd
    would copy every expert's gradient once more into that of all of them.
    """

    @staticmethod
    def forward(
        ctx,
        x: Float[Tensor, "rows in_dim"],
        weight: Float[Tensor, "experts out_dim in_dim"],
        bias: Float[Tensor, "experts out_dim"],
        values: Float[Tensor, "rows k"],
        experts: Int64[Tensor, "rows k"],
    ) -> Float[Tensor, "rows out_dim"]:
        with torch.autocast(x.device.type, enabled=False):
            top_k = experts.shape[1]
            order = experts.flatten().argsort(stable=True)
            row = order // top_k
            counts = torch.bincount(experts.flatten(), minlength=len(weight)).tolist()
            dispatched, y = x.index_select(0, row), x.new_empty(len(order), weight.shape[1])
            for e, (part, result) in enumerate(zip(dispatched.split(counts), y.split(counts), strict=True)):
                torch.addmm(bias[e], part, weight[e].T, out=result)
            routed = _back_in_place(y * values.flatten()[order].unsqueeze(1), row, order, top_k)
        ctx.save_for_backward(dispatched, y, weight, values, order, row)
        ctx.counts = counts
        return routed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dispatched, y, weight, values, order, row = ctx.saved_tensors
        top_k = values.shape[1]
        with torch.autocast(grad.device.type, enabled=False):
            per_row = grad.index_select(0, row)
            values_grad = torch.empty_like(values).view(-1).index_copy_(0, order, torch.linalg.vecdot(per_row, y)).view_as(values)
            per_row.mul_(values.flatten()[order].unsqueeze(1))
            weight_grad, bias_grad = torch.empty_like(weight), weight.new_empty(weight.shape[:2])
            for e, (part, of_part) in enumerate(zip(dispatched.split(ctx.counts), per_row.split(ctx.counts), strict=True)):
                torch.mm(of_part.T, part, out=weight_grad[e])
                torch.sum(of_part, dim=0, out=bias_grad[e])
            x_grad = None
            if ctx.needs_input_grad[0]:  # not for frozen embeddings
                moved = torch.empty_like(dispatched)
                for e, (of_part, result) in enumerate(zip(per_row.split(ctx.counts), moved.split(ctx.counts), strict=True)):
                    torch.mm(of_part, weight[e], out=result)
                x_grad = _back_in_place(moved, row, order, top_k)
        return x_grad, weight_grad, bias_grad, values_grad, None


def _back_in_place(sorted_rows: Tensor, row: Tensor, order: Tensor, top_k: int) -> Tensor:
    """Sums over the choices of each row of what is sorted by expert; in one order, whatever the device."""
    placed = torch.empty_like(sorted_rows)
    if top_k == 1:
        return placed.index_copy_(0, row, sorted_rows)
    return placed.index_copy_(0, order, sorted_rows).view(-1, top_k, sorted_rows.shape[1]).sum(dim=1)


def _unit(y: Tensor) -> Tensor:
    y = y.float()
    # As F.normalize, whose division and its gradient go over the whole matrix three times more.
    return y * torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp_min(1e-12).reciprocal()


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
