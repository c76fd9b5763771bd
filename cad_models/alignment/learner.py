"""Point encoder, image head and loss as one module: what the training loop drives and what a checkpoint holds."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cad_models.alignment.loss import MultiPositiveContrastiveLoss
from cad_models.alignment.model import MixtureOfExperts, PointEncoder, parameter_groups
from cad_models.alignment.model_config import HeadConfig, PointEncoderConfig, point_encoder_config, released_config
from cad_models.alignment.pair_histogram import PairEncoder
from cad_models.alignment.projection import ProjectionEncoder
from cad_models.alignment.recipe import AlignmentModel, AlignmentRecipe
from cad_models.learner import ADAPT_BATCH, EmbeddingLearner, check_fit

_FILES = {"moe": "image_head", "pc_encoder": "point_encoder"}
# What ReConV2's training gives clouds without colour, and to every second cloud with one.
_GRAY = 0.4


class AlignmentLearner(nn.Module, EmbeddingLearner):
    """Aligns a point encoder and a head on frozen image embeddings in one space.

    Args:
        image_width: Width of the frozen embeddings.
    """

    adapt_objects = ADAPT_BATCH

    def __init__(self, recipe: AlignmentRecipe, image_width: int):
        super().__init__()
        model = recipe.model
        self.point_encoder = _point_encoder(model)
        self.image_head = MixtureOfExperts(
            HeadConfig(
                num_experts=model.num_experts,
                top_k=model.top_k,
                router_z_weight=recipe.loss.router_z_weight,
                balance_weight=recipe.loss.balance_weight,
                residual=model.residual_head,
            ),
            in_dim=image_width,
            embed_dim=model.embed_dim,
        )
        # Frozen embeddings share a large mean and differ in scale from width to width; the head sees them standardised.
        self.register_buffer("image_mean", torch.zeros(image_width))
        self.register_buffer("image_std", torch.ones(image_width))
        self.loss = MultiPositiveContrastiveLoss(recipe.loss.temperature, learned=recipe.loss.learned_temperature)
        self.image_weight = recipe.loss.image_weight
        self.adds_gray = model.channels == "xyz+color"

    def optimizers(self, recipe: AlignmentRecipe) -> dict[str, torch.optim.Optimizer]:
        """AdamW: head and temperature with ``head_lr``, the point encoder with ``lr``."""
        optim = recipe.optim
        groups = parameter_groups(self, lr=optim.lr, head_lr=optim.head_lr, weight_decay=optim.weight_decay)
        return {"model": torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=True)}

    @torch.no_grad()
    def adapt(self, batches: Iterator[dict[str, Tensor]]) -> None:
        """Standardise the frozen embeddings, and centre the point encoder's projections.

        Without it all objects start with nearly the same embedding (mean cosine 0.96 for the tiny encoder), and a contrastive loss first has
        to get rid of the common part. Data-dependent initialisation as in Salimans & Kingma, arXiv:1602.07868.
        """
        batch = next(batches)  # the only one
        views = batch["query_views"][batch["query_mask"]].double()
        std = views.std(dim=0)
        self.image_mean.copy_(views.mean(dim=0))
        # A width that hardly varies in the sample must not be blown up.
        self.image_std.copy_(std.clamp(min=max(1e-6, 0.1 * float(std.mean()))))
        self.point_encoder.adapt(self._columns(batch["points"]))

    def forward(self, batch: dict[str, Tensor], turn: str) -> dict[str, Tensor]:
        """Contrastive loss of this worker's objects against those of all workers, plus the experts' telemetry."""
        return self.loss_from(self.embed(batch), batch)

    def embed(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``cad`` float32 [n, dim] ([n, sides, dim] with --model.side-vectors): the point encoder is what costs; the head is a few linear layers on frozen embeddings."""
        return {"cad": self.embed_cad(batch["points"])}

    def loss_from(self, embedded: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of the whole batch; the experts' load is balanced over all its views."""
        mask = batch["view_mask"]
        # Only real views go through the head: padding would count in the experts' load.
        projected, telemetry = self.image_head(self._standardised(batch["views"][mask]))
        image = projected.new_zeros(*mask.shape, projected.shape[1])
        image[mask] = projected
        contrastive = self.loss(embedded["cad"], image.float(), mask, batch["group"])
        scalars = {f"moe/{name}": value for name, value in telemetry.items()}
        auxiliary = scalars.pop("moe/loss", None)
        loss = contrastive if auxiliary is None else contrastive + auxiliary
        if self.image_weight > 0:
            between_images = self.loss.between_images(image.float(), mask, batch["group"])
            loss = loss + self.image_weight * between_images
            scalars["image_contrastive"] = between_images.detach()
        return {"loss": loss, "contrastive": contrastive.detach(), "temperature": 1 / self.loss.scale.detach(), **scalars}

    def predict(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``cad`` [n, dim] ([n, sides, dim] float16 with --model.side-vectors), ``query`` [n, views, dim] (zeros where an object has fewer views), ``num_queries``, ``group``, ``label`` [n]; where the batch
        has query images in other conditions, ``query_<condition>`` as ``query``."""
        mask = batch["query_mask"]
        queries = {}
        for name in batch:
            if name.startswith("query_views"):
                projected = self.embed_images(batch[name][mask])
                query = projected.new_zeros(*mask.shape, projected.shape[1])
                query[mask] = projected
                queries[name.replace("query_views", "query")] = query
        return {
            "cad": self.stored_cad(batch["points"]),
            **queries,
            "num_queries": mask.sum(1),
            "group": batch["group"],
            "label": batch["label"],
        }

    def predict_more(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `cad_models.alignment.fusion` compares, as float16: ``view`` [n, views, dim], ``frozen_view`` [n, views, image_width], ``frozen_query``
        [n, queries, image_width] (zeros where an object has fewer; ``frozen_query_<condition>`` likewise), and ``num_views`` [n]."""
        mask, views = batch["view_mask"], batch["views"]
        projected = self.embed_images(views[mask]).half()
        view = projected.new_zeros(*mask.shape, projected.shape[1])
        view[mask] = projected
        # The stored embeddings are float16: nothing is lost.
        queries = {name.replace("query_views", "frozen_query"): batch[name].half() for name in batch if name.startswith("query_views")}
        return {"view": view, "num_views": mask.sum(1), "frozen_view": views.half(), **queries}

    def embed_cad(self, points: Float[Tensor, "batch num_points channels"]) -> Float[Tensor, "batch *sides dim"]:
        """Unit embeddings of point clouds."""
        return self.point_encoder(self._columns(points)).float()

    def cad_features(self, points: Float[Tensor, "batch num_points channels"]) -> Tensor | None:
        """What all learners with this kind of point encoder compute alike; None = nothing."""
        return self.point_encoder.features(self._columns(points)) if isinstance(self.point_encoder, ProjectionEncoder) else None

    def stored_cad(self, points: Float[Tensor, "batch num_points channels"], features: Tensor | None = None) -> Float[Tensor, "batch *sides dim"]:
        """As evaluation and galleries keep them: `embed_cad`, rounded to float16 where a mesh has several vectors, which together are large.

        Args:
            features: `cad_features` of the same points, where they are known.
        """
        found = self.embed_cad(points) if features is None else self.point_encoder(self._columns(points), features).float()
        return found.half() if found.dim() == 3 else found

    def _columns(self, points: Tensor) -> Tensor:
        """The columns that the encoder reads: CAD models have no colour, so every point gets the gray."""
        if not self.adds_gray:
            return points
        return F.pad(points, (0, 3), value=_GRAY)

    def embed_images(self, embeddings: Float[Tensor, "rows image_width"]) -> Float[Tensor, "rows dim"]:
        """Unit embeddings of frozen image embeddings."""
        return self.image_head(self._standardised(embeddings))[0].float()

    def _standardised(self, embeddings: Tensor) -> Tensor:
        return (embeddings - self.image_mean) / self.image_std

    def artifacts(self) -> dict[str, dict[str, Tensor]]:
        """``moe`` (head, standardisation of its input, a learned temperature) and ``pc_encoder``."""
        files = {name: dict(getattr(self, module).state_dict()) for name, module in _FILES.items()}
        files["moe"] |= {"image_mean": self.image_mean, "image_std": self.image_std}
        files["moe"] |= {f"loss.{key}": value for key, value in self.loss.state_dict().items()}
        return files

    def load_artifacts(self, artifacts: Mapping[str, dict[str, Tensor]]) -> None:
        """Raises ValueError naming file and keys that are missing, unknown or of another shape."""
        for name, own in self.artifacts().items():
            check_fit(f"{name}.safetensors", artifacts[name], own)
        state = {f"point_encoder.{key}": value for key, value in artifacts["pc_encoder"].items()}
        own_names = ("image_mean", "image_std", "loss.")
        state |= {key if key.startswith(own_names) else f"image_head.{key}": value for key, value in artifacts["moe"].items()}
        self.load_state_dict(state)


def build(recipe: AlignmentRecipe, signature: dict[str, Any]) -> AlignmentLearner:
    """The learner for data of this signature. Raises ValueError naming both sides where recipe and signature differ."""
    for name, wanted in (("num_points", recipe.model.num_read_points), ("channels", recipe.model.channels)):
        if signature[name] != wanted:
            raise ValueError(f"the recipe's model.{name} is {wanted!r}, the signature says {signature[name]!r}")
    return AlignmentLearner(recipe, signature["image_width"])


def _point_encoder(model: AlignmentModel) -> nn.Module:
    if model.size == "pairs":
        return PairEncoder(model.embed_dim)
    if model.size == "projection":
        return ProjectionEncoder(model.embed_dim, side_vectors=model.has_side_vectors)
    return PointEncoder(_encoder_config(model))


def _encoder_config(model: AlignmentModel) -> PointEncoderConfig:
    dropped = {"drop_path": model.drop_path, "patch_dropout": model.patch_dropout}
    if model.size.startswith("recon_"):
        return dataclasses.replace(released_config(model.size.removeprefix("recon_")), **dropped)
    return point_encoder_config(
        model.size, channels=model.channels, embed_dim=model.embed_dim, pair_histogram=model.pair_histogram, **dropped
    )
