"""Patches of point clouds: farthest point sampling, nearest neighbours, nearest-neighbour chains. Plain PyTorch on any
device; float32 clouds on a CPU go through compiled searches with the same results, an order of magnitude faster.

Distances are sums of squared differences, never ``a² - 2ab + b²``: they do not cancel, and a cloud's result does not
depend on the other clouds of the batch.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

# Bound on the elements of one block of distances: on a CPU the block and its keys stay in the cache (twice as fast as
# blocks of 2^24), on a GPU few launches matter more.
_BLOCK_ELEMENTS_CPU = 1 << 20
_BLOCK_ELEMENTS_ACCELERATOR = 1 << 26


def squared_distances(
    queries: Float[Tensor, "batch num_queries 3"], points: Float[Tensor, "batch num_points 3"]
) -> Float[Tensor, "batch num_queries num_points"]:
    """Squared Euclidean distance of every query to every point of the same cloud."""
    # One coordinate at a time: no [batch, queries, points, 3] intermediate, and the sum is always ((x + y) + z).
    qx, qy, qz = queries.unsqueeze(2).unbind(-1)
    px, py, pz = points.unsqueeze(1).unbind(-1)
    return (qx - px).square_().add_((qy - py).square_()).add_((qz - pz).square_())


@torch.no_grad()
def farthest_points(
    points: Float[Tensor, "batch num_points 3"], num_samples: int
) -> Int64[Tensor, "batch num_samples"]:
    """Indices of farthest point sampling, first the point farthest from the centroid; ties go to the lowest index.

    Raises ``ValueError`` when a cloud has fewer points than ``num_samples``.
    """
    centroid = points.mean(dim=1, keepdim=True)
    first = squared_distances(centroid, points).squeeze(1).argmax(dim=1)
    return _farthest(points, num_samples, first, pickable=None)


@torch.no_grad()
def farthest_points_pointnet2(
    points: Float[Tensor, "batch num_points 3"], num_samples: int
) -> Int64[Tensor, "batch num_samples"]:
    """Farthest point sampling by the rules of pointnet2_ops, for checkpoints trained with it.

    Index 0 comes first, points with ``|p|² <= 1e-3`` are never picked after it, ties go to the lowest index.
    Raises ``ValueError`` when a cloud has fewer points than ``num_samples``.
    """
    x, y, z = points.unbind(-1)
    first = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    return _farthest(points, num_samples, first, pickable=x * x + y * y + z * z > 1e-3)


def _farthest(points: Tensor, num_samples: int, first: Tensor, pickable: Tensor | None) -> Tensor:
    num_points = points.shape[1]
    if num_points < num_samples:
        raise ValueError(
            f"{num_samples} centres were asked of clouds with {num_points} points: give more points or fewer groups"
        )
    if _compiled(points):
        return _farthest_compiled(points, num_samples, first, pickable)
    # Structure of arrays: 4 times faster on a CPU than [batch, num_points, 3].
    x, y, z = (column.contiguous() for column in points.unbind(-1))
    nearest = torch.full_like(x, torch.inf)
    if pickable is not None:
        # Below every distance, so never the maximum; where nothing else is left, argmax gives index 0, as
        # pointnet2_ops does.
        nearest = nearest.masked_fill(~pickable, -1.0)
    picked = first.unsqueeze(1)
    order = [picked]
    for _ in range(num_samples - 1):
        distance = (x - x.gather(1, picked)).square_()
        distance.add_((y - y.gather(1, picked)).square_()).add_((z - z.gather(1, picked)).square_())
        torch.minimum(nearest, distance, out=nearest)
        picked = nearest.argmax(dim=1, keepdim=True)
        order.append(picked)
    return torch.cat(order, dim=1)


@torch.no_grad()
def nearest_neighbors(
    queries: Float[Tensor, "batch num_queries 3"], points: Float[Tensor, "batch num_points 3"], num_neighbors: int
) -> Int64[Tensor, "batch num_queries num_neighbors"]:
    """Indices of each query's nearest points of its cloud, nearest first; ties go to the lowest index.

    Raises ``ValueError`` when a cloud has fewer points than ``num_neighbors``.
    """
    batch, num_points, _ = points.shape
    if num_points < num_neighbors:
        raise ValueError(f"{num_neighbors} neighbours were asked of clouds with {num_points} points: lower group_size")
    if _compiled(points) and _compiled(queries):
        return _nearest_compiled(queries, points, num_neighbors)
    index = torch.arange(num_points, device=points.device)
    block_elements = _BLOCK_ELEMENTS_CPU if points.device.type == "cpu" else _BLOCK_ELEMENTS_ACCELERATOR
    rows = max(1, block_elements // max(1, batch * num_points))
    found = []
    for block in queries.split(rows, dim=1):
        distance = squared_distances(block, points)
        # The bits of a non-negative float order as integers do; with the index below them no two keys are equal,
        # so that the choice among points at equal distance (duplicated vertices) is the same everywhere.
        key = distance.view(torch.int32).to(torch.int64).mul_(num_points).add_(index)
        found.append(key.topk(num_neighbors, dim=-1, largest=False, sorted=True).values.remainder_(num_points))
    return torch.cat(found, dim=1)


def _compiled(points: Tensor) -> bool:
    """Whether the compiled searches take these points; not finite ones are left to torch, whose order of NaN they do not know."""
    return points.device.type == "cpu" and points.dtype == torch.float32 and bool(torch.isfinite(points).all())


def _farthest_compiled(points: Tensor, num_samples: int, first: Tensor, pickable: Tensor | None) -> Tensor:
    from cad_models.common.point_blocks import cut_into_blocks, farthest_in_blocks  # numba: not for those who only need torch

    clouds, starts_at = np.ascontiguousarray(points.numpy()), first.numpy()
    order = np.empty((len(clouds), num_samples), np.int64)

    def sample(i: int) -> None:
        columns, index, starts, lows, highs = cut_into_blocks(clouds[i])
        distances = np.full(len(index), np.float32(np.inf))
        if pickable is not None:
            distances[~pickable[i].numpy()[index]] = -1.0
        position = int(np.flatnonzero(index == starts_at[i])[0])
        farthest_in_blocks(columns, index, starts, lows, highs, position, distances, False, order[i])

    _each(sample, len(clouds))
    return torch.from_numpy(order)


def _nearest_compiled(queries: Tensor, points: Tensor, num_neighbors: int) -> Tensor:
    from cad_models.common.point_blocks import cut_into_blocks, nearest_in_blocks

    asked, clouds = np.ascontiguousarray(queries.numpy()), np.ascontiguousarray(points.numpy())
    found = np.empty((*asked.shape[:2], num_neighbors), np.int64)

    def search(i: int) -> None:
        nearest_in_blocks(*cut_into_blocks(clouds[i]), asked[i], found[i])

    _each(search, len(clouds))
    return torch.from_numpy(found)


def _each(work: Callable[[int], None], count: int) -> None:
    """``work(0) ... work(count - 1)`` on as many threads as torch uses: the compiled searches let go of Python's lock."""
    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        for i in range(count):
            work(i)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, range(count)):
            pass


@torch.no_grad()
def nearest_chain(centers: Float[Tensor, "batch num_centers 3"]) -> Int64[Tensor, "batch num_centers"]:
    """Order of the centres as a greedy chain: from index 0 always on to the nearest one not visited yet."""
    batch, num_centers, _ = centers.shape
    distance = squared_distances(centers, centers)
    current = torch.zeros(batch, 1, dtype=torch.int64, device=centers.device)
    order = [current]
    visited = torch.zeros(batch, num_centers, device=centers.device, dtype=centers.dtype)
    for _ in range(num_centers - 1):
        visited.scatter_(1, current, torch.inf)
        row = distance.gather(1, current.unsqueeze(-1).expand(-1, -1, num_centers)).squeeze(1)
        current = (row + visited).argmin(dim=1, keepdim=True)
        order.append(current)
    return torch.cat(order, dim=1)


def gather_points(
    points: Float[Tensor, "batch num_points channels"], index: Int64[Tensor, "batch ..."]
) -> Float[Tensor, "batch ... channels"]:
    """The rows ``index`` of each cloud."""
    batch, num_points, channels = points.shape
    offset = torch.arange(batch, device=points.device).mul_(num_points).view(-1, *[1] * (index.dim() - 1))
    return points.reshape(-1, channels).index_select(0, (index + offset).flatten()).view(*index.shape, channels)
