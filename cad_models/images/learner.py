"""Normalisation, classifier and loss as one module: what the training loop drives and what a checkpoint holds."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from cad_models.images.loss import balanced_weights, classification_loss
from cad_models.images.model import InputNormaliser, build_classifier, normalisation_of
from cad_models.images.recipe import ImagesRecipe
from cad_models.learner import Learner, check_fit

_FILE = "classifier"


class ImagesLearner(nn.Module, Learner):
    """A classifier of the classes that the signature names.

    Args:
        class_counts: Pictures of each class in the train split.
    """

    def __init__(self, recipe: ImagesRecipe, class_counts: list[int]):
        super().__init__()
        mean, std = normalisation_of(recipe.model)
        with_high_pass = recipe.model.num_channels == 4
        self.normaliser = InputNormaliser(mean, std, with_high_pass=with_high_pass)
        self.classifier = build_classifier(recipe.model, len(class_counts))
        weights = balanced_weights(class_counts) if recipe.loss.class_weights == "balanced" else torch.ones(len(class_counts))
        # Not saved: it follows from recipe and data, and predicting does not need it.
        self.register_buffer("class_weights", weights, persistent=False)
        self.label_smoothing = recipe.loss.label_smoothing
        # Statistics of the train split alone, all of it.
        self.adapt_objects = None if with_high_pass else 0

    def optimizers(self, recipe: ImagesRecipe) -> dict[str, torch.optim.Optimizer]:
        """AdamW (Adam at weight decay 0): the last layers with ``head_lr``, the others with ``lr``; no decay for 1-D parameters."""
        optim = recipe.optim
        head = _head_parameters(self.classifier)
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for parameter in self.parameters():
            lr = optim.head_lr if id(parameter) in head else optim.lr
            decay = optim.weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((lr, decay), []).append(parameter)
        listed = [{"params": parameters, "lr": lr, "weight_decay": decay} for (lr, decay), parameters in groups.items()]
        return {"model": torch.optim.AdamW(listed, fused=True)}

    def adapt(self, batches: Iterator[dict[str, Tensor]]) -> None:
        """Take the high-pass channel's statistics from the train split."""
        self.normaliser.fit(batch["pixels"] for batch in batches)

    def forward(self, batch: dict[str, Tensor], turn: str) -> dict[str, Tensor]:
        """Cross-entropy, and accuracy and macro-F1 of the augmented pictures of this worker's share; their means over an epoch are telemetry, not metrics."""
        logits = self.classifier(self.normaliser(batch["pixels"]))
        loss = classification_loss(logits, batch["label"], self.class_weights, label_smoothing=self.label_smoothing)
        answer = logits.detach().argmax(dim=1)
        return {"loss": loss, "accuracy": (answer == batch["label"]).float().mean(), "macro_f1": _macro_f1(answer, batch["label"], logits.shape[1])}

    def predict(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``probabilities`` float32 [n, classes] and ``label`` int64 [n]."""
        return {"probabilities": self.probabilities(batch["pixels"]), "label": batch["label"]}

    def probabilities(self, pixels: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Softmax of the logits, float32."""
        return self.classifier(self.normaliser(pixels)).float().softmax(dim=1)

    def artifacts(self) -> dict[str, dict[str, Tensor]]:
        """``classifier``: weights, BatchNorm statistics and normalisation."""
        return {_FILE: dict(self.state_dict())}

    def load_artifacts(self, artifacts: Mapping[str, dict[str, Tensor]]) -> None:
        """Raises ValueError naming keys that are missing, unknown or of another shape."""
        given = artifacts[_FILE]
        check_fit(f"{_FILE}.safetensors", given, self.state_dict())
        self.load_state_dict(dict(given))


def _macro_f1(answer: Int64[Tensor, " batch"], label: Int64[Tensor, " batch"], num_classes: int) -> Float[Tensor, ""]:
    """Over the classes that occur, without waiting for a GPU."""
    hit = torch.where(answer == label, label, num_classes)
    answers, labels, hits = (torch.nn.functional.one_hot(x, num_classes + 1).sum(dim=0)[:-1] for x in (answer, label, hit))
    seen = answers + labels > 0
    return (2 * hits / (answers + labels).clamp(min=1)).sum() / seen.sum()


def _head_parameters(classifier: nn.Module) -> set[int]:
    # timm's models name their last layer themselves; the small CNNs call theirs head.
    head = classifier.get_classifier() if callable(getattr(classifier, "get_classifier", None)) else classifier.head
    return {id(parameter) for parameter in head.parameters()}


def build(recipe: ImagesRecipe, signature: dict[str, Any]) -> ImagesLearner:
    """The learner for data of this signature. Raises ValueError naming both sides where recipe and signature differ."""
    for name, wanted in (("image_size", recipe.data.image_size), ("num_channels", recipe.model.num_channels)):
        if signature[name] != wanted:
            raise ValueError(f"the recipe's {name} is {wanted!r}, the signature says {signature[name]!r}")
    return ImagesLearner(recipe, list(signature["class_counts"]))
