"""What contrastive losses over several processes need: gathering with gradient, and log-sum-exps of a tiled
similarity matrix.

Convention: rank *r* of *W* computes a loss ``L_r`` whose mean over the ranks is the loss ``L`` of the whole batch.
Data-parallel training averages gradients, and the backward of a gather *sums* over the ranks what they have derived
for a row; both together give the gradient of ``L``, as if one process had the whole batch (open_clip's ``local_loss``
with ``gather_with_grad``; DisCo-CLIP, arXiv:2304.08480). Without a process group every function here is the
one-process case.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows and columns of a tile of logits: 25 MB on a CPU, whose matrix products like them large; and enough to fill a GPU.
_TILE_CPU = (512, 12288)
_TILE_ACCELERATOR = (4096, 16384)
# Logits up to this size are exponentiated as they are: e^±40 and the sum of 10^8 of them are far from float32's ends, and
# a float32 product is as exact there as anywhere.
_PLAIN_EXP = 40.0
# Elements of tiles that are kept for the backward, a quarter of a GB of float32; beyond them tiles are computed again.
_KEPT_ELEMENTS = 1 << 26


def world_size() -> int:
    """Number of processes of the default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank in the default group; 0 without one."""
    return dist.get_rank() if world_size() > 1 else 0


def gather_with_gradient(x: Tensor) -> Tensor:
    """Concatenation over the ranks along axis 0; the backward sums each rank's rows' gradients over all ranks.

    Every rank must give the same shape.
    """
    return _Gather.apply(x) if world_size() > 1 else x


def sum_with_gradient(x: Tensor) -> Tensor:
    """Elementwise sum over the ranks; the backward sums the gradients over all ranks."""
    return _Sum.apply(x) if world_size() > 1 else x


def gather(x: Tensor) -> Tensor:
    """Concatenation over the ranks along axis 0, without gradient; every rank must give the same shape."""
    if world_size() == 1:
        return x
    # Bytes, because not every backend gathers booleans.
    whole = torch.empty((world_size() * len(x), *x.shape[1:]), dtype=x.dtype, device=x.device)
    dist.all_gather_into_tensor(whole.view(torch.uint8), x.contiguous().view(torch.uint8))
    return whole


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        whole = torch.empty((world_size() * len(x), *x.shape[1:]), dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(whole, x.contiguous())
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        rows = len(grad) // world_size()
        if dist.get_backend() == "nccl":
            own = torch.empty((rows, *grad.shape[1:]), dtype=grad.dtype, device=grad.device)
            dist.reduce_scatter_tensor(own, grad.contiguous())
            return own
        # Not every gloo can reduce and scatter.
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[rank() * rows : (rank() + 1) * rows]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def two_way_logsumexp(
    rows: Float[Tensor, "rows dim"],
    columns: Float[Tensor, "columns dim"],
    scale: Float[Tensor, ""],
    *,
    row_owner: Int64[Tensor, " rows"],
    column_owner: Int64[Tensor, " columns"],
    row_group: Int64[Tensor, " rows"],
    column_group: Int64[Tensor, " columns"],
    tile: tuple[int, int] | None = None,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " columns"]]:
    """Log-sum-exp of ``scale * rows @ columns.T`` along its rows and along its columns, from one pass over its tiles.

    Pairs of one group but of different owners (duplicates of an object) are left out of both sums, as if their logit
    were -inf; a row or column with nothing left is -inf. The matrix is never held whole: at most
    a quarter of a GB of its tiles is kept for the backward, which computes the others again (Inf-CL, arXiv:2410.17243), so memory
    grows with rows + columns. Differentiable once, in ``rows``, ``columns`` and ``scale``; logits are float32 (float64
    for float64 input), also under autocast. ``tile`` is (rows, columns) of a tile.
    """
    if tile is None:
        tile = _TILE_CPU if rows.device.type == "cpu" else _TILE_ACCELERATOR
    dtype = torch.promote_types(torch.promote_types(rows.dtype, columns.dtype), torch.float32)
    rows, columns, scale = rows.to(dtype), columns.to(dtype), scale.to(dtype)
    # By Cauchy-Schwarz; of unit vectors the scale itself.
    with torch.no_grad():
        largest = scale.abs() * _longest(rows) * _longest(columns)
    function = _TwoWayLogSumExpOfSmallLogits if largest <= _PLAIN_EXP else _TwoWayLogSumExp
    return function.apply(rows, columns, scale, row_owner, column_owner, row_group, column_group, tile)


class _TwoWayLogSumExp(torch.autograd.Function):
    """For logits that may be large: every exponential is taken relative to a maximum, tiles are computed twice."""

    @staticmethod
    def forward(ctx, rows, columns, scale, row_owner, column_owner, row_group, column_group, tile):
        with torch.autocast(rows.device.type, enabled=False):
            row_lse = rows.new_full((len(rows),), -torch.inf)
            column_lse = rows.new_full((len(columns),), -torch.inf)
            duplicates = _Duplicates(row_owner, column_owner, row_group, column_group)
            for r, c in _tiles(len(rows), len(columns), tile):
                logits = duplicates.mask_(_logits(rows[r], columns[c], scale), r, c)
                row_lse[r] = torch.logaddexp(row_lse[r], _logsumexp(logits, 1))
                column_lse[c] = torch.logaddexp(column_lse[c], _logsumexp(logits, 0))
        ctx.save_for_backward(rows, columns, scale, row_lse, column_lse)
        ctx.duplicates, ctx.tile = duplicates, tile
        return row_lse, column_lse

    @staticmethod
    @once_differentiable
    def backward(ctx, row_grad, column_grad):
        rows, columns, scale, row_lse, column_lse = ctx.saved_tensors
        # Where nothing is left every logit is -inf; a finite stand-in gives exp(-inf) = 0 instead of exp(-inf + inf).
        row_lse = row_lse.masked_fill(row_lse.isneginf(), 0.0)
        column_lse = column_lse.masked_fill(column_lse.isneginf(), 0.0)
        rows_grad, columns_grad = torch.zeros_like(rows), torch.zeros_like(columns)
        with torch.autocast(rows.device.type, enabled=False):
            for r, c in _tiles(len(rows), len(columns), ctx.tile):
                logits = ctx.duplicates.mask_(_logits(rows[r], columns[c], scale), r, c)
                weight = (logits - row_lse[r].unsqueeze(1)).exp_().mul_(row_grad[r].unsqueeze(1))
                weight.add_(logits.sub_(column_lse[c]).exp_().mul_(column_grad[c]))
                rows_grad[r].addmm_(weight, columns[c])
                columns_grad[c].addmm_(weight.T, rows[r])
            scale_grad = (rows_grad * rows).sum()
        return rows_grad.mul_(scale), columns_grad.mul_(scale), scale_grad, None, None, None, None, None


class _TwoWayLogSumExpOfSmallLogits(torch.autograd.Function):
    """For logits within ``_PLAIN_EXP``: one exponential an element serves both directions and, where it is kept, the backward."""

    @staticmethod
    def forward(ctx, rows, columns, scale, row_owner, column_owner, row_group, column_group, tile):
        with torch.autocast(rows.device.type, enabled=False):
            row_sum, column_sum = rows.new_zeros(len(rows)), rows.new_zeros(len(columns))
            duplicates = _Duplicates(row_owner, column_owner, row_group, column_group)
            kept, room = [], _KEPT_ELEMENTS
            for r, c in _tiles(len(rows), len(columns), tile):
                powers = duplicates.mask_(_logits(rows[r], columns[c], scale), r, c).exp_()
                # Products with ones: on a CPU many times faster than torch.sum, whose threads wait for one another.
                row_sum[r].addmv_(powers, powers.new_ones(powers.shape[1]))
                column_sum[c].addmv_(powers.T, powers.new_ones(len(powers)))
                if powers.numel() <= room:
                    kept.append(powers)
                    room -= powers.numel()
                else:
                    room = 0  # what is kept are the first tiles, so that their number tells which
        ctx.save_for_backward(rows, columns, scale, row_sum, column_sum, *kept)
        ctx.duplicates, ctx.tile = duplicates, tile
        return row_sum.log(), column_sum.log()

    @staticmethod
    @once_differentiable
    def backward(ctx, row_grad, column_grad):
        rows, columns, scale, row_sum, column_sum, *kept = ctx.saved_tensors
        # Where nothing is left every power is 0, and what it is multiplied by must only be finite.
        row_share = scale * row_grad / row_sum.masked_fill(row_sum == 0, 1.0)
        column_share = scale * column_grad / column_sum.masked_fill(column_sum == 0, 1.0)
        if not (len(rows) and len(columns)):
            return torch.zeros_like(rows), torch.zeros_like(columns), torch.zeros_like(scale), *[None] * 5
        rows_grad, columns_grad = torch.empty_like(rows), torch.empty_like(columns)
        with torch.autocast(rows.device.type, enabled=False):
            for i, (r, c) in enumerate(_tiles(len(rows), len(columns), ctx.tile)):
                powers = (
                    kept[i] if i < len(kept) else ctx.duplicates.mask_(_logits(rows[r], columns[c], scale), r, c).exp_()
                )
                weight = (row_share[r].unsqueeze(1) + column_share[c]).mul_(powers)
                # The first tile of a row or column overwrites what was there, which saves filling it with zeros.
                rows_grad[r].addmm_(weight, columns[c], beta=float(c.start > 0))
                columns_grad[c].addmm_(weight.T, rows[r], beta=float(r.start > 0))
            scale_grad = (rows_grad * rows).sum() / scale
        return rows_grad, columns_grad, scale_grad, None, None, None, None, None


class _Duplicates:
    """Masks pairs of one group and different owners; costs nothing where there are none, the usual case."""

    def __init__(self, row_owner: Tensor, column_owner: Tensor, row_group: Tensor, column_group: Tensor):
        self.row_owner, self.column_owner, self.row_group, self.column_group = (
            row_owner,
            column_owner,
            row_group,
            column_group,
        )
        pairs = torch.stack([torch.cat([row_group, column_group]), torch.cat([row_owner, column_owner])], dim=1).unique(
            dim=0
        )
        self.present = len(pairs[:, 0].unique()) < len(pairs)

    def mask_(self, logits: Tensor, r: slice, c: slice) -> Tensor:
        if not self.present:
            return logits
        same_group = self.row_group[r].unsqueeze(1) == self.column_group[c]
        return logits.masked_fill_(same_group & (self.row_owner[r].unsqueeze(1) != self.column_owner[c]), -torch.inf)


def _longest(vectors: Tensor) -> Tensor:
    # vector_norm of whole rows makes no copy of them.
    return torch.linalg.vector_norm(vectors, dim=1).max() if len(vectors) else vectors.new_zeros(())


def _logits(rows: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
    return (rows * scale) @ columns.T


def _logsumexp(logits: Tensor, axis: int) -> Tensor:
    # torch.logsumexp takes four times as long on a CPU, as long as the matrix product before it.
    highest = logits.amax(axis, keepdim=True)
    highest.masked_fill_(highest.isneginf(), 0.0)
    return (logits - highest).exp_().sum(axis).log_().add_(highest.squeeze(axis))


def _tiles(num_rows: int, num_columns: int, tile: tuple[int, int]):
    for r in range(0, num_rows, tile[0]):
        for c in range(0, num_columns, tile[1]):
            yield slice(r, r + tile[0]), slice(c, c + tile[1])
