"""Networks and losses as one module: what the training loop drives and what a checkpoint holds."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from cad_models.histograms.loss import MetricLoss
from cad_models.histograms.model import Perceptrons
from cad_models.histograms.recipe import HistogramRecipe
from cad_models.learner import Learner, check_fit
from cad_models.task import Predictions

_FLATTEST = 0.1  # of the mean deviation: an input that hardly varies must not be blown up


class HistogramLearner(nn.Module, Learner):
    """Unit vectors of shapes, near for shapes of one class.

    Args:
        in_dim: Width of the features.
        num_classes: Classes of the dataset.
    """

    adapt_objects = None

    def __init__(self, recipe: HistogramRecipe, in_dim: int, num_classes: int):
        super().__init__()
        self.recipe = recipe
        model = recipe.model
        self.networks = Perceptrons(in_dim, model)
        self.losses = nn.ModuleList(MetricLoss(recipe.loss, num_classes, model.embed_dim) for _ in range(model.num_networks))
        # Mean embedding of each class's training objects, unit; zero for a class without any. See `remember`.
        self.register_buffer("centres", torch.zeros(num_classes, model.num_networks * model.embed_dim), persistent=False)

    def optimizers(self, recipe: HistogramRecipe) -> dict[str, torch.optim.Optimizer]:
        """AdamW: the networks with ``lr`` (no decay of biases), the losses' class vectors with ``head_lr``."""
        optim = recipe.optim
        named = list(self.networks.named_parameters())
        groups = [
            {"params": [p for n, p in named if n.endswith("weight")], "lr": optim.lr, "weight_decay": optim.weight_decay},
            {"params": [p for n, p in named if not n.endswith("weight")], "lr": optim.lr, "weight_decay": 0.0},
        ]
        if proxies := list(self.losses.parameters()):
            groups.append({"params": proxies, "lr": optim.head_lr, "weight_decay": 0.0})
        return {"model": torch.optim.AdamW(groups)}

    @torch.no_grad()
    def adapt(self, batches: Iterator[dict[str, Tensor]]) -> None:
        """Standardise the inputs over the train split."""
        if not self.recipe.model.standardize:
            return
        count, mean, squares = 0, torch.zeros_like(self.networks.input_mean, dtype=torch.float64), 0.0
        for batch in batches:  # Chan's update of mean and sum of squared deviations: one pass, no cancellation
            rows = batch["features"].double()
            delta = rows.mean(dim=0) - mean
            total = count + len(rows)
            squares = squares + (rows - rows.mean(dim=0)).square().sum(dim=0) + delta.square() * (count * len(rows) / total)
            mean = mean + delta * (len(rows) / total)
            count = total
        if count < 2:
            return
        std = (squares / count).sqrt()
        self.networks.input_mean.copy_(mean)
        self.networks.input_std.copy_(std.clamp(min=max(1e-6, _FLATTEST * float(std.mean()))))

    def forward(self, batch: dict[str, Tensor], turn: str) -> dict[str, Tensor]:
        """Mean of the networks' losses."""
        features, labels = batch["features"], batch["label"]
        mixup, count = self.recipe.loss.mixup, self.recipe.model.num_networks
        given = features.expand(count, *features.shape)
        if mixup > 0:
            # Each network mixes in its own way: they learn from different data, as an ensemble should.
            order = torch.rand(count, len(features), device=features.device).argsort(dim=1)
            share = torch.distributions.Beta(mixup, mixup).sample((count, len(features))).to(features.device)
            given = share[..., None] * given + (1 - share[..., None]) * features[order]
            embeddings = self.networks(given)
            losses = [loss(z, labels, labels[o], s) for loss, z, o, s in zip(self.losses, embeddings, order, share, strict=True)]
        else:
            losses = [loss(z, labels) for loss, z in zip(self.losses, self.networks(given), strict=True)]
        return {"loss": torch.stack(losses).mean()}

    def predict(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``embedding`` float32 [n, networks * dim] (unit rows), ``label`` and ``group`` int64 [n] of each object, ``num_clusters`` int64 [n], the
        same everywhere."""
        labels = batch["label"]
        clusters = torch.full_like(labels, self.recipe.clustering.num_clusters)
        return {"embedding": self.embed(batch["features"]), "label": labels, "group": batch["group"], "num_clusters": clusters}

    def embed(self, features: Float[Tensor, "n in_dim"]) -> Float[Tensor, "n dim"]:
        """Unit rows: the networks' vectors, concatenated, so that the cosine of two objects is the mean of the networks' cosines."""
        count = self.recipe.model.num_networks
        vectors = self.networks(features.expand(count, *features.shape)).float()
        return vectors.transpose(0, 1).reshape(len(features), -1) / count**0.5

    @torch.no_grad()
    def remember(self, reference: Predictions) -> None:
        """Keep the class centres of the train split, by which a lone checkpoint tells the class of a shape."""
        from cad_models.histograms.metrics import class_centres

        centres = class_centres(reference["embedding"], reference["label"], len(self.centres))
        self.centres.copy_(torch.from_numpy(np.asarray(centres, dtype=np.float32)))

    def artifacts(self) -> dict[str, dict[str, Tensor]]:
        """``networks`` (with the standardisation of their inputs), ``classes`` (centres and the losses' class vectors)."""
        classes = {"centres": self.centres} | {f"losses.{name}": value for name, value in self.losses.state_dict().items()}
        return {"networks": dict(self.networks.state_dict()), "classes": classes}

    def load_artifacts(self, artifacts: Mapping[str, dict[str, Tensor]]) -> None:
        """Raises ValueError naming file and keys that are missing, unknown or of another shape."""
        for name, own in self.artifacts().items():
            check_fit(f"{name}.safetensors", artifacts[name], own)
        state = {f"networks.{key}": value for key, value in artifacts["networks"].items()}
        classes = dict(artifacts["classes"])
        with torch.no_grad():
            self.centres.copy_(classes.pop("centres"))
        self.load_state_dict(state | classes)


def build(recipe: HistogramRecipe, signature: dict[str, Any]) -> HistogramLearner:
    """The learner for data of this signature."""
    return HistogramLearner(recipe, signature["feature_width"], len(signature["class_names"]))
