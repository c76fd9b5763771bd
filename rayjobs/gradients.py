"""Gradients of a batch, at once or in micro-batches: gradient caching after Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited
Peak Performance Setup" (arXiv:2101.06983).

A contrastive loss compares all objects of a batch, so its gradient is no sum over micro-batches, as gradient accumulation would take it. But the
embeddings of all objects are small; what fills the memory is the encoder's graph. So the embeddings are computed without a graph, the loss gives their
gradients, and the encoder runs again, one micro-batch with its graph at a time, to pass them on. The result is exactly the gradient of the whole batch.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cad_models.learner import EmbeddingLearner

# Elements of one all-reduce: large enough for the network, small beside the weights.
_BUCKET_ELEMENTS = 1 << 24


def checked_micro_batch_size(learner: nn.Module, micro_batch_size: int) -> int:
    """The size itself. Raises ValueError where micro-batches are asked of a learner that has no embeddings to cache."""
    if micro_batch_size and not isinstance(learner, EmbeddingLearner):
        raise ValueError(
            f"--optim.micro-batch-size {micro_batch_size}: this task's loss is not computed from embeddings, so a batch cannot be taken in pieces; leave it "
            "out, or use a smaller --batch-size"
        )
    return micro_batch_size


def cached_backward(
    learner: nn.Module, batch: dict[str, Tensor], micro_batch_size: int, *, seed: Callable[[int], None], autocast: Callable[[], torch.autocast]
) -> dict[str, Tensor]:
    """Adds the gradients of the loss of ``batch`` to the parameters' and returns the learner's scalars, in the memory of ``micro_batch_size`` objects.

    On several workers the gradients end as the workers' mean, as after DistributedDataParallel's backward pass; the learner must not be wrapped in it.
    BatchNorm normalises over a micro-batch, here as everywhere; its running statistics move once, as in one pass.

    Args:
        learner: An `EmbeddingLearner`.
        batch: Tensors whose first axis is the object.
        seed: ``seed(i)`` seeds all generators for micro-batch ``i``: both passes then drop the same.
        autocast: Makes the context of a forward pass.
    """
    num_objects = len(next(iter(batch.values())))
    pieces = [slice(start, start + micro_batch_size) for start in range(0, num_objects, micro_batch_size)]
    running = [buffer.clone() for buffer in learner.buffers()]
    embedded: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for i, piece in enumerate(pieces):
            seed(i)
            with autocast():
                embedded.append(learner.embed(_rows(batch, piece)))
        for buffer, before in zip(learner.buffers(), running, strict=True):
            buffer.copy_(before)
    whole = {name: torch.cat([part[name] for part in embedded]).requires_grad_() for name in embedded[0]}
    with autocast():
        scalars = learner.loss_from(whole, batch)
    scalars["loss"].backward()
    for i, piece in enumerate(pieces):
        seed(i)
        with autocast():
            again = learner.embed(_rows(batch, piece))
        torch.autograd.backward([again[name] for name in whole], [whole[name].grad[piece] for name in whole])
    if dist.is_initialized() and dist.get_world_size() > 1:
        average_gradients(learner.parameters())
        same_everywhere(learner.buffers())
    return {name: value.detach() for name, value in scalars.items()}


def _rows(batch: dict[str, Tensor], piece: slice) -> dict[str, Tensor]:
    return {name: tensor[piece] for name, tensor in batch.items()}


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces each parameter's gradient by its mean over all workers."""
    for bucket in _buckets([p for p in parameters if p.grad is not None]):
        flat = torch.cat([p.grad.flatten() for p in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for p, mean in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            p.grad.copy_(mean.view_as(p))


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    size = 0
    for p in parameters:
        if bucket and (size + p.numel() > _BUCKET_ELEMENTS or p.grad.dtype != bucket[0].grad.dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += p.numel()
    if bucket:
        yield bucket


def same_everywhere(tensors: Iterable[Tensor]) -> None:
    """Gives all workers rank 0's values."""
    for tensor in tensors:
        dist.broadcast(tensor.detach(), src=0)


def seed_of_step(*numbers: int) -> None:
    """Seeds torch's generators from numbers such as (seed, step, rank): what a step draws must not depend on what was drawn before."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def autocast_for(precision: str, device: torch.device) -> Callable[[], torch.autocast]:
    """Makes the context of a forward pass in a recipe's ``precision``."""
    half = precision == "bfloat16" or (precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16, enabled=half)
