"""Contrastive loss between CAD models and their images: any number of images a model, any number of processes."""

import math
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from cad_models.alignment.sides import pooled, similarity
from cad_models.common.contrastive import gather, gather_with_gradient, rank, two_way_logsumexp, world_size


class MultiPositiveContrastiveLoss(nn.Module):
    """Mean of two InfoNCE losses, CAD model to image and image to CAD model; embeddings are expected to be of unit
    length.

    With s = scale · cosine, V_i the views of object i, and sums over everything that is not a duplicate of object i:

    A model may have several vectors, one a side: its cosine with an image is then the soft maximum of theirs
    (`cad_models.alignment.sides`).

    - CAD to image, mean over the objects that have a view. ``positives="outside"`` (L_out of SupCon,
      arXiv:2004.11362; StableRep, arXiv:2306.00984): ``-1/|V_i| Σ_v log(exp s_iv / Σ_all exp s_i·)``: every view is
      pulled. ``"inside"``: ``-log(Σ_v exp s_iv / Σ_all exp s_i·)``: satisfied by the easiest view. With one view both
      are cross-entropy.
    - image to CAD model, mean over all images: cross-entropy over the objects.

    Objects of one ``group`` (exact duplicates) are left out of each other's sums. On several processes each gives its
    own objects, in any number, and gets the loss of the whole batch; averaged gradients equal those of one process
    with the whole batch.

    ``temperature`` is the initial one (scale = 1 / temperature), ``learned`` makes its logarithm a parameter,
    ``max_scale`` bounds the scale from above. Raises ``ValueError`` for a temperature that is not positive or whose
    scale is beyond ``max_scale``.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        learned: bool = False,
        max_scale: float = 100.0,
        positives: Literal["outside", "inside"] = "outside",
    ):
        super().__init__()
        if not temperature > 0 or 1 / temperature > max_scale * (1 + 1e-6):
            raise ValueError(
                f"temperature {temperature} is not usable: it must be at least 1 / max_scale = {1 / max_scale:.4g}"
            )
        if positives not in ("outside", "inside"):
            raise ValueError(f"positives is {positives!r}: choose 'outside' or 'inside' (the logarithm)")
        self.max_scale = max_scale
        self.positives = positives
        log_scale = torch.tensor(-math.log(temperature))
        if learned:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale, persistent=False)

    @property
    def scale(self) -> Float[Tensor, ""]:
        """The scale in use, at most ``max_scale``."""
        # A clamp within the graph would give no gradient beyond the bound, and the scale could never come back.
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(self.max_scale))
        return self.log_scale.exp()

    def forward(
        self,
        cad: Float[Tensor, "objects *sides dim"],
        image: Float[Tensor, "objects views dim"],
        view_mask: Bool[Tensor, "objects views"],
        group: Int64[Tensor, " objects"],
    ) -> Float[Tensor, ""]:
        """The loss of the whole batch, the same value on every rank.

        ``view_mask`` is true where there is a view; what ``image`` holds elsewhere does not matter (it must be finite).
        Objects without a view take part as wrong answers only; without any view at all the loss is 0.
        """
        dtype = torch.promote_types(torch.promote_types(cad.dtype, image.dtype), torch.float32)
        with torch.autocast(cad.device.type, enabled=False):
            return self._forward(cad.to(dtype), image.to(dtype), view_mask, group)

    def _forward(self, cad: Tensor, image: Tensor, view_mask: Tensor, group: Tensor) -> Tensor:
        # Views that exist: the columns of the similarity matrix. CAD models need no gathering: each rank has the rows
        # of its own.
        columns, owner, column_group, mask_all, first = _everywhere(image, view_mask, group)
        num_local = len(image)
        num_images = mask_all.sum()
        num_objects = mask_all.any(dim=1).sum()
        scale = self.scale.to(cad.dtype)
        whose = {
            "row_owner": torch.arange(first, first + num_local, device=cad.device),
            "column_owner": owner,
            "row_group": group,
            "column_group": column_group,
        }
        sided = cad.dim() == 3
        row_lse, column_lse = (_two_way_logsumexp_of_sides if sided else two_way_logsumexp)(cad, columns, scale, **whose)
        if world_size() > 1:
            column_lse = gather_with_gradient(column_lse.unsqueeze(0)).logsumexp(dim=0)
        own_column = (owner >= first) & (owner < first + num_local)

        # Logits of the positives.
        own = scale * (pooled(torch.einsum("osd,ovd->ovs", cad, image)) if sided else torch.einsum("od,ovd->ov", cad, image))
        if self.positives == "outside":
            num_views = view_mask.sum(dim=1).clamp(min=1)
            attracted = own.masked_fill(~view_mask, 0.0).sum(dim=1) / num_views
        else:
            attracted = own.masked_fill(~view_mask, torch.finfo(own.dtype).min).logsumexp(dim=1)
        has_view = view_mask.any(dim=1)
        # torch.where would let the -inf of an object that has nothing to compare with through to the gradient.
        cad_to_image = (row_lse[has_view] - attracted[has_view]).sum() / num_objects.clamp(min=1)
        image_to_cad = (column_lse[own_column] - own[view_mask]).sum() / num_images.clamp(min=1)
        return _with_value_of_all(world_size() * (cad_to_image + image_to_cad) / 2)

    def between_images(
        self,
        image: Float[Tensor, "objects views dim"],
        view_mask: Bool[Tensor, "objects views"],
        group: Int64[Tensor, " objects"],
    ) -> Float[Tensor, ""]:
        """A loss among images alone, of the whole batch: ``-log(Σ_w≠v exp s_vw / (Σ_w≠v exp s_vw + Σ_others exp s_v·))``, mean over all images.

        Positives are the object's other views, inside the logarithm: the most alike is enough, as for a search that takes the best view. Others are the
        images of all objects that are no duplicates. Images without a positive are left out; without any the loss is 0.
        """
        dtype = torch.promote_types(image.dtype, torch.float32)
        with torch.autocast(image.device.type, enabled=False):
            image, scale = image.to(dtype), self.scale.to(dtype)
            columns, owner, column_group, mask_all, _ = _everywhere(image, view_mask, group)
            num_views = mask_all.sum(dim=1)
            num_images = num_views[num_views > 1].sum()
            rows, row_object = image[view_mask], view_mask.nonzero()[:, 0]
            # Rows of an owner that no column has: all of their own group is left out, and what is left are the others.
            others, _ = two_way_logsumexp(
                rows,
                columns,
                scale,
                row_owner=torch.full_like(row_object, -1),
                column_owner=owner,
                row_group=group[row_object],
                column_group=column_group,
            )
            own = scale * torch.einsum("ovd,owd->ovw", image, image)
            itself = torch.eye(own.shape[1], dtype=torch.bool, device=own.device)
            lowest = torch.finfo(own.dtype).min
            alike = own.masked_fill(itself | ~view_mask.unsqueeze(1), lowest).logsumexp(dim=2)[view_mask]
            counted = view_mask.sum(dim=1)[row_object] > 1
            return _with_value_of_all(world_size() * F.softplus(others[counted] - alike[counted]).sum() / num_images.clamp(min=1))


def _two_way_logsumexp_of_sides(
    cad: Float[Tensor, "rows sides dim"],
    columns: Float[Tensor, "columns dim"],
    scale: Tensor,
    *,
    row_owner: Tensor,
    column_owner: Tensor,
    row_group: Tensor,
    column_group: Tensor,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " columns"]]:
    """As `two_way_logsumexp`, of models with several vectors. The scores are held whole, the cosines of their sides are not."""
    left_out = (row_group[:, None] == column_group[None, :]) & (row_owner[:, None] != column_owner[None, :])
    # Not -inf, whose gradient is NaN where nothing is left.
    logits = (scale * similarity(cad, columns)).masked_fill(left_out, torch.finfo(columns.dtype).min)
    return logits.logsumexp(dim=1), logits.logsumexp(dim=0)


def _everywhere(image: Tensor, view_mask: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """The views of all ranks that exist, flat (with gradient), and what is known of them.

    Returns:
        ``(columns [views, dim], owner [views], group [views], mask [objects, views], first)``: an owner is a row of ``mask``, which holds all ranks'
        objects, this rank's from row ``first`` on.
    """
    num_local, num_local_views, _ = image.shape
    max_objects, max_views = _largest_over_ranks(num_local, num_local_views, image.device)
    padding = (0, max_views - num_local_views, 0, max_objects - num_local)
    mask_all = gather(F.pad(view_mask, padding))  # [W * max_objects, max_views]
    group_all = gather(F.pad(group, (0, padding[-1])))
    # The images are what is large: they are copied only where there is something to add or to leave out.
    image_all = gather_with_gradient((F.pad(image, (0, 0, *padding)) if any(padding) else image).flatten(0, 1))
    column = mask_all.flatten().nonzero().squeeze(1)
    owner = column // max_views
    return image_all if len(column) == len(image_all) else image_all[column], owner, group_all[owner], mask_all, rank() * max_objects


def _with_value_of_all(loss: Tensor) -> Tensor:
    """This rank's share of a loss, scaled by the number of ranks: the value of the whole batch, with the gradient of the share."""
    if world_size() == 1:
        return loss
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return loss + (mean / world_size() - loss.detach())


def _largest_over_ranks(num_objects: int, num_views: int, device: torch.device) -> tuple[int, int]:
    if world_size() == 1:
        return num_objects, num_views
    sizes = torch.tensor([num_objects, num_views], device=device)
    dist.all_reduce(sizes, op=dist.ReduceOp.MAX)
    return tuple(sizes.tolist())
