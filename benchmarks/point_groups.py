"""Row 4. Patches of point clouds: 512 farthest points of 10,000 and their 32 nearest neighbours, for a batch of 16 clouds, on one thread.

Rivals: the loop that point-cloud research code has in plain torch, and the fastest libraries we know (fpsample's bucket search on a k-d tree, and
pykdtree). Also the way that training takes: clouds stored in farthest-point order, where the centres are a prefix and only neighbours are searched.
"""

import statistics

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import Comparison, Settings, compared, copy_bandwidth, row_main, seconds_in_turn
from benchmarks.plain_patches import plain_patches
from cad_models.common.grouping import farthest_points, gather_points, nearest_neighbors

NUM_CENTERS, GROUP_SIZE = 512, 32


def clouds(batch: int, num_points: int, seed: int = 0) -> Tensor:
    """Points on the surfaces of boxes of random extents, float32 [batch, num_points, 3] within the unit sphere."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(-1, 1, (batch, num_points, 3))
    side = rng.integers(0, 3, (batch, num_points))
    np.put_along_axis(points, side[..., None], np.sign(np.take_along_axis(points, side[..., None], 2)), 2)
    points *= rng.uniform(0.2, 1.0, (batch, 1, 3)) / 3**0.5
    return torch.from_numpy(points.astype(np.float32))


def ours(points: Tensor) -> Tensor:
    """Groups [batch, centres, group_size, 3] relative to their centres."""
    centers = gather_points(points, farthest_points(points, NUM_CENTERS))
    groups = gather_points(points, nearest_neighbors(centers, points, GROUP_SIZE))
    return groups.sub_(centers.unsqueeze(2))


def ours_stored_order(ordered: Tensor) -> Tensor:
    """The same of clouds in farthest-point order, as prepare stores them."""
    centers = ordered[:, :NUM_CENTERS]
    groups = gather_points(ordered, nearest_neighbors(centers, ordered, GROUP_SIZE))
    return groups.sub_(centers.unsqueeze(2))


def naive(points: Tensor) -> Tensor:
    """Groups as research code makes them."""
    first = (points - points.mean(dim=1, keepdim=True)).square().sum(dim=-1).argmax(dim=-1)
    return plain_patches(points, NUM_CENTERS, GROUP_SIZE, first=first)[0]


def libraries(points: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and groups by fpsample (k-d line buckets, height 5) and pykdtree, cloud by cloud."""
    import fpsample
    from pykdtree.kdtree import KDTree

    centers = torch.empty(len(points), NUM_CENTERS, 3)
    groups = torch.empty(len(points), NUM_CENTERS, GROUP_SIZE, 3)
    for i, cloud in enumerate(points.numpy()):
        own = cloud[fpsample.bucket_fps_kdline_sampling(cloud, NUM_CENTERS, h=5).astype(np.int64)]
        neighbor = KDTree(cloud).query(own, k=GROUP_SIZE)[1].astype(np.int64)
        centers[i], groups[i] = torch.from_numpy(own), torch.from_numpy(cloud[neighbor] - own[:, None])
    return centers, groups


def check_equal(found: Tensor, wanted: Tensor, *, where: str) -> None:
    """Raises AssertionError unless each patch holds the same points, up to the choice among equally distant ones and rounding."""
    a, b = found.norm(dim=-1).sort(dim=-1).values, wanted.norm(dim=-1).sort(dim=-1).values
    # Expanded squares cancel: a distance near 0 is off by up to 1e-3 there, and a tie between centres may fall the other way.
    close = ((a - b).abs().amax(dim=-1) < 2e-3).float().mean().item()
    assert close > 0.98, f"{where}: only {100 * close:.1f} % of the patches agree"


def check_libraries(points: Tensor) -> None:
    """Raises AssertionError unless the libraries' centres cover the clouds as ours do (their bucket search starts elsewhere), and their
    neighbours are ours of the same centres."""
    centers, groups = libraries(points)
    own = gather_points(points, farthest_points(points, NUM_CENTERS))
    for cloud, theirs, mine in zip(points, centers, own, strict=True):
        radius, expected = (torch.cdist(cloud, c).amin(dim=1).max().item() for c in (theirs, mine))
        assert radius < 1.1 * expected, f"fpsample leaves a hole of {radius:.4f}, ours of {expected:.4f}"
    same = gather_points(points, nearest_neighbors(centers, points, GROUP_SIZE)).sub_(centers.unsqueeze(2))
    check_equal(same, groups, where="pykdtree")


def run(settings: Settings) -> list[Comparison]:
    """Time the three, and the stored order."""
    torch.set_num_threads(1)
    points = clouds(settings.pick(16, 2), settings.pick(10_000, 2_000))
    order = farthest_points(points, NUM_CENTERS)
    rest = torch.ones(points.shape[:2], dtype=torch.bool).scatter_(1, order, False)
    ordered = torch.stack([torch.cat([cloud[first], cloud[mask]]) for cloud, first, mask in zip(points, order, rest, strict=True)])
    reference = ours(points)
    check_equal(naive(points), reference, where="naive")
    check_equal(ours_stored_order(ordered), reference, where="stored order")
    check_libraries(points)
    sizes = f"{points.shape[1]:,} → {NUM_CENTERS} × {GROUP_SIZE}, batch {len(points)}"
    rivals = {
        "ours": lambda: ours(points),
        "stored": lambda: ours_stored_order(ordered),
        "naive": lambda: naive(points),
        "libraries": lambda: libraries(points),
    }
    seconds = seconds_in_turn(rivals, rounds=settings.pick(5, 1))
    # The least that has to move: the points read once, the groups written once.
    floor = (points.nbytes + reference.nbytes) / copy_bandwidth()
    share = floor / statistics.median(seconds["ours"])
    bound = {"limit_share": share, "limit": "of copying points and groups once"}
    return [
        compared(4, f"FPS + grouping, {sizes}", "naive torch loop", seconds["ours"], seconds["naive"], at_least=5, **bound),
        compared(4, f"FPS + grouping, {sizes}", "fpsample + pykdtree", seconds["ours"], seconds["libraries"], at_least=1, **bound),
        compared(4, f"grouping of clouds stored in FPS order, {sizes}", "naive torch loop", seconds["stored"], seconds["naive"]),
    ]


if __name__ == "__main__":
    row_main(run)
