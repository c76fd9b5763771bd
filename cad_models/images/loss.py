"""Cross-entropy over the whole batch, on however many workers it lies."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from cad_models.common.contrastive import sum_with_gradient, world_size


def balanced_weights(counts: Sequence[int]) -> Float[Tensor, " classes"]:
    """Weights inverse to the classes' numbers of pictures, such that the mean weight of a picture is 1; 0 for a class without any."""
    count = torch.tensor(list(counts), dtype=torch.float64)
    present = count > 0
    return torch.where(present, count.sum() / (int(present.sum()) * count.clamp(min=1)), 0.0).float()


def classification_loss(
    logits: Float[Tensor, "batch classes"],
    target: Int64[Tensor, " batch"],
    weights: Float[Tensor, " classes"],
    *,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Weighted mean cross-entropy, as ``torch.nn.CrossEntropyLoss`` has it on one process.

    On W workers: this worker's share, such that the mean over the workers is the whole batch's loss. The divisor is the weight of the whole batch, so a
    worker whose pictures weigh more counts for more.
    """
    logits = logits.float()
    log_p = F.log_softmax(logits, dim=1)
    own = weights[target]
    hit = -(own * log_p.gather(1, target[:, None])[:, 0]).sum()
    # torch smooths towards all classes, each with its own weight.
    spread = -(log_p * weights).sum() / logits.shape[1]
    total = sum_with_gradient(own.sum().detach())
    return world_size() * ((1 - label_smoothing) * hit + label_smoothing * spread) / total.clamp(min=1e-12)
