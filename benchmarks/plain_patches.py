"""Patches of point clouds as research code on PointNet++ and Point-BERT makes them in plain torch: the peer of several rows."""

import torch
from torch import Tensor


def plain_patches(points: Tensor, num_groups: int, group_size: int, *, first: Tensor, skipped: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distances to all points for every pick, a masked update, expanded squares and topk.

    Args:
        points: [batch, n, 3 or more]: coordinates, then anything.
        first: int64 [batch], the first pick.
        skipped: bool [batch, n], points that are never picked; None = all may be.

    Returns:
        Groups [batch, num_groups, group_size, 3 or more], coordinates relative to their centres, and the centres [batch, num_groups, 3].
    """
    xyz, rows = points[..., :3].contiguous(), torch.arange(len(points))
    chosen = torch.zeros(len(points), num_groups, dtype=torch.long)
    distance = torch.full(xyz.shape[:2], 1e10)
    if skipped is not None:
        distance[skipped] = -1.0
    farthest = first
    for i in range(num_groups):
        chosen[:, i] = farthest
        to_center = torch.sum((xyz - xyz[rows, farthest].unsqueeze(1)) ** 2, dim=-1)
        closer = to_center < distance
        distance[closer] = to_center[closer]
        farthest = torch.max(distance, dim=-1)[1]
    centers = xyz[rows[:, None], chosen]
    squares = -2 * centers @ xyz.transpose(1, 2)
    squares += torch.sum(centers**2, dim=-1)[:, :, None]
    squares += torch.sum(xyz**2, dim=-1)[:, None, :]
    neighbor = torch.topk(squares, group_size, dim=-1, largest=False)[1]
    groups = points[rows[:, None, None], neighbor]
    return torch.cat([groups[..., :3] - centers.unsqueeze(2), groups[..., 3:]], dim=-1), centers
