"""Losses: the source system's pairwise cosine loss, and those of pytorch-metric-learning."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from cad_models.common.contrastive import gather, gather_with_gradient
from cad_models.histograms.recipe import HistogramLoss

_PER_OBJECT = ("normalized_softmax", "arcface")
"""Losses that are a mean over objects, given the vectors of the classes: objects need not see each other."""


def pairwise_cosine_loss(embeddings: Float[Tensor, "n dim"], labels: Int64[Tensor, " n"]) -> Float[Tensor, ""]:
    """Mean over all ordered pairs, an object with itself included, of (1 - cos) / 2 for equal classes and (1 + cos) / 2 for different ones.

    The source system's loss (prod-stories HW5), which ran two nested loops over the batch. In [0, 1].

    Args:
        embeddings: Unit rows.
    """
    same = labels[:, None] == labels[None, :]
    sign = torch.where(same, -1.0, 1.0).to(embeddings.dtype)
    return ((1 + sign * (embeddings @ embeddings.T)) / 2).mean()


class MetricLoss(nn.Module):
    """One of the losses for one network.

    On several workers every object of the whole batch takes part, gathered with gradient.

    Args:
        num_classes: Classes that labels number.
        dim: Width of the embeddings.
    """

    def __init__(self, config: HistogramLoss, num_classes: int, dim: int):
        super().__init__()
        from pytorch_metric_learning import losses, reducers

        self.config = config
        self.library: nn.Module | None = None
        per_object = {"num_classes": num_classes, "embedding_size": dim, "reducer": reducers.DoNothingReducer()}
        if config.kind == "normalized_softmax":
            self.library = losses.NormalizedSoftmaxLoss(temperature=config.temperature, **per_object)
        elif config.kind == "arcface":
            self.library = losses.ArcFaceLoss(margin=config.margin_deg, scale=1 / config.temperature, **per_object)
        elif config.kind == "proxy_anchor":
            self.library = losses.ProxyAnchorLoss(num_classes=num_classes, embedding_size=dim, margin=config.margin)
        elif config.kind == "supcon":
            self.library = losses.SupConLoss(temperature=config.temperature)
        elif config.kind == "multi_similarity":
            self.library = losses.MultiSimilarityLoss()
        elif config.kind == "triplet":
            self.library = losses.TripletMarginLoss(margin=config.margin)

    def forward(
        self,
        embeddings: Float[Tensor, "n dim"],
        labels: Int64[Tensor, " n"],
        other: Int64[Tensor, " n"] | None = None,
        share: Float[Tensor, " n"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of a batch.

        Args:
            embeddings: Unit rows.
            labels: From 0; all of them must be known classes.
            other: For mixed objects, the second class of each; `share` is that of the first. Only for losses that allow mixup.
        """
        if self.config.kind in _PER_OBJECT:
            losses = self._per_object(embeddings, labels)
            if other is not None and share is not None:
                losses = share * losses + (1 - share) * self._per_object(embeddings, other)
            return losses.mean()
        embeddings, labels = gather_with_gradient(embeddings), gather(labels)
        if self.library is None:
            return pairwise_cosine_loss(embeddings, labels)
        # Without a single pair to learn from the library returns a constant; every parameter must get a gradient.
        return self.library(embeddings, labels) + 0 * embeddings.sum()

    def _per_object(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self.library(embeddings, labels)["loss"]["losses"]
