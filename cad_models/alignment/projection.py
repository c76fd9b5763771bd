"""A point encoder that looks at a cloud from many sides: points projected into small pictures, described by oriented gradients, read by one layer.

Projecting points is how SimpleView (Goyal et al., ICML 2021) and PointCLIP (Zhang et al., CVPR 2022) read clouds with networks for pictures. A few hundred
objects do not train such a network; they do train a linear layer on histograms of oriented gradients, which every object gives from every side.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cad_models.alignment.pair_histogram import PairEmbedding
from cad_models.alignment.projection_kernel import describe, draw
from cad_models.common.cameras import ring_cameras

NUM_CAMERAS = 24
SIZE = 48
"""Width and height of a projected picture, in pixels."""

_NUM_CELLS, _NUM_DIRECTIONS = 8, 16
_NUM_RINGS, _NUM_SECTORS, _NUM_RELATIVE, _NUM_FREQUENCIES = 8, 32, 8, 9
WIDTH = _NUM_CELLS**2 * _NUM_DIRECTIONS + _NUM_RINGS * _NUM_FREQUENCIES * _NUM_RELATIVE

# Cameras stand where the unit sphere just fits an angle of view of 30 degrees, as those of rendered views do.
_CAMERA_DISTANCE = 4.0
# The part fills the picture but for this many pixels at each border.
_BORDER = 3
# Largest tangent of a surface's slant that widens its tolerance: beyond it, points seen edge-on would show through what hides them.
_STEEPEST = 5.0
# The polar grid ends at this many root-mean-square radii.
_RADII = 2.4
# Lighter pixels are the page.
_LEAST = 0.02
_PAIRS_WEIGHT = 0.5
# In the plain code: their pictures and votes take about 0.3 GB.
_OBJECTS_AT_ONCE = 16


def projected_pictures(points: Float[Tensor, "batch num_points 6"], axes: Float[Tensor, "views 3 3"]) -> Float[Tensor, "batch views size size"]:
    """Darkness, 0 (page) to 1, of clouds seen by cameras: the part fills the picture, hidden points do not show, surfaces facing the camera are lightest.

    Args:
        points: Coordinates within the unit sphere and normals, which may point to either side.
        axes: Of each camera, in rows: right, up, and the direction from the object to the camera.
    """
    batch, num_points, _ = points.shape
    num_views = len(axes)
    seen = torch.einsum("vij,bnj->bvin", axes, points[..., :3])
    facing = torch.einsum("vj,bnj->bvn", axes[:, 2], points[..., 3:6]).abs()
    depth = seen[:, :, 2]
    plane = seen[:, :, :2] / (_CAMERA_DISTANCE - depth).unsqueeze(2)
    low, high = plane.amin(dim=-1, keepdim=True), plane.amax(dim=-1, keepdim=True)
    extent = (high - low).amax(dim=2, keepdim=True).clamp(min=1e-6)
    place = (plane - (low + high) / 2) / extent * (SIZE - 2 * _BORDER) + SIZE / 2
    column, row = place[:, :, 0].long().clamp(0, SIZE - 1), (SIZE - place[:, :, 1]).long().clamp(0, SIZE - 1)
    pixel = (row * SIZE + column).flatten(0, 1)
    depth, shade = depth.flatten(0, 1), 1 - 0.7 * facing.flatten(0, 1)
    rows = batch * num_views
    nearest = depth.new_full((rows, SIZE * SIZE), -2.0).scatter_reduce(1, pixel, depth, "amax")
    nearest = F.max_pool2d(nearest.view(rows, 1, SIZE, SIZE), 3, stride=1, padding=1).view(rows, -1)
    # A surface seen at a slant falls away within a pixel: the more, the less it faces the camera.
    steep = ((1 - facing**2).clamp(min=0).sqrt() / facing.clamp(min=0.05)).clamp(max=_STEEPEST)
    tolerance = (extent[:, :, :, 0] * _CAMERA_DISTANCE / (SIZE - 2 * _BORDER) * (0.5 + 1.5 * steep)).flatten(0, 1)
    visible = (depth > nearest.gather(1, pixel) - tolerance).to(depth.dtype)
    weight = depth.new_zeros(rows, SIZE * SIZE).scatter_add_(1, pixel, visible).view(rows, 1, SIZE, SIZE)
    total = depth.new_zeros(rows, SIZE * SIZE).scatter_add_(1, pixel, visible * shade).view(rows, 1, SIZE, SIZE)
    # Pixels between points take the mean of their neighbours; then a little blur, as a lens has.
    kernel = depth.new_tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel).view(1, 1, 3, 3) / 16
    mean = torch.where(weight > 0, total / weight.clamp(min=1), F.conv2d(total, kernel, padding=1) / F.conv2d(weight, kernel, padding=1).clamp(min=1e-6))
    covered = F.avg_pool2d((weight > 0).to(depth.dtype), 3, stride=1, padding=1)
    picture = torch.where((weight > 0) | (covered > 0.5), mean, 0.0)
    return F.conv2d(picture, kernel, padding=1).view(batch, num_views, SIZE, SIZE)


def described(pictures: Float[Tensor, "rows size size"]) -> Float[Tensor, "rows features"]:
    """Two descriptions side by side, each of unit length: gradients on a square grid, and on a polar one that does not change when a picture is turned."""
    right, down = torch.zeros_like(pictures), torch.zeros_like(pictures)
    right[:, :, 1:-1] = pictures[:, :, 2:] - pictures[:, :, :-2]
    down[:, 1:-1] = pictures[:, 2:] - pictures[:, :-2]
    magnitude, direction = torch.hypot(right, down), torch.atan2(down, -right)
    return _read(_square(magnitude, direction), _polar(pictures, magnitude, direction))


def plain_features(points: Float[Tensor, "batch num_points 6"], axes: Float[Tensor, "views 3 3"]) -> Float[Tensor, "batch views features"]:
    """`projected_features` in plain torch, for accelerators; in float32 whatever the autocast, for points must not move between pixels."""
    with torch.autocast(points.device.type, enabled=False):
        found = [described(projected_pictures(part, axes).flatten(0, 1)) for part in points.float().split(_OBJECTS_AT_ONCE)]
    return torch.cat(found).unflatten(0, (len(points), -1))


@torch.no_grad()
def projected_features(points: Float[Tensor, "batch num_points 6"], axes: Float[Tensor, "views 3 3"]) -> Float[Tensor, "batch views features"]:
    """`described` of `projected_pictures`, float32 [batch, views, 1600]; on a CPU by compiled code. It gives no gradient to the points."""
    points = points.float()
    if points.device.type != "cpu":
        return plain_features(points, axes)
    if len(points) == 0:
        return points.new_zeros(0, len(axes), WIDTH)
    clouds, cameras = points.numpy(), axes.numpy()

    def of(cloud: np.ndarray) -> Tensor:
        pictures = draw(cloud, cameras, SIZE, _BORDER, _CAMERA_DISTANCE, _STEEPEST)
        grids = (_NUM_CELLS, _NUM_DIRECTIONS, _NUM_RINGS, _NUM_SECTORS, _NUM_RELATIVE, _NUM_FREQUENCIES)
        return torch.from_numpy(describe(pictures, *grids, _RADII, _LEAST))

    # The compiled code runs beside other threads; each cloud's numbers depend on that cloud alone.
    num_threads = min(torch.get_num_threads(), len(clouds))
    if num_threads <= 1:
        return torch.stack([of(cloud) for cloud in clouds])
    with ThreadPoolExecutor(num_threads) as pool:
        return torch.stack(list(pool.map(of, clouds)))


def _square(magnitude: Tensor, direction: Tensor) -> Tensor:
    size = magnitude.shape[-1]
    position = (torch.arange(size, device=magnitude.device) + 0.5) / size * _NUM_CELLS - 0.5
    shares = (1 - (position - torch.arange(_NUM_CELLS, device=magnitude.device)[:, None]).abs()).clamp(min=0)
    turn = direction / (2 * math.pi) * _NUM_DIRECTIONS
    lower = turn.floor()
    share = turn - lower
    lower = lower.long() % _NUM_DIRECTIONS
    votes = magnitude.new_zeros(len(magnitude), _NUM_DIRECTIONS, size, size)
    votes.scatter_(1, lower.unsqueeze(1), (magnitude * (1 - share)).unsqueeze(1))
    votes.scatter_(1, ((lower + 1) % _NUM_DIRECTIONS).unsqueeze(1), (magnitude * share).unsqueeze(1))
    return shares @ votes @ shares.T


def _polar(pictures: Tensor, magnitude: Tensor, direction: Tensor) -> Tensor:
    rows, size, _ = pictures.shape
    inside = (pictures > _LEAST).to(pictures.dtype)
    y, x = (torch.arange(size, device=pictures.device, dtype=pictures.dtype).view(shape) for shape in ((1, -1, 1), (1, 1, -1)))
    count = inside.sum(dim=(1, 2), keepdim=True).clamp(min=1)
    centre_y, centre_x = (inside * y).sum(dim=(1, 2), keepdim=True) / count, (inside * x).sum(dim=(1, 2), keepdim=True) / count
    squared = (y - centre_y) ** 2 + (x - centre_x) ** 2
    radius = ((inside * squared).sum(dim=(1, 2), keepdim=True) / count).sqrt().clamp(min=1e-6)
    angle = torch.atan2(centre_y - y.expand_as(pictures), x.expand_as(pictures) - centre_x)
    ring = squared.sqrt() / radius / _RADII * _NUM_RINGS - 0.5
    sector = angle / (2 * math.pi) * _NUM_SECTORS
    relative = (direction - angle) / (2 * math.pi) * _NUM_RELATIVE
    histogram = pictures.new_zeros(rows, (_NUM_RINGS + 2) * _NUM_SECTORS * _NUM_RELATIVE)
    for ring_bin, ring_share in _shared(ring):
        place = (ring_bin + 1).clamp(0, _NUM_RINGS + 1) * _NUM_SECTORS
        for sector_bin, sector_share in _shared(sector):
            cell = (place + sector_bin % _NUM_SECTORS) * _NUM_RELATIVE
            for relative_bin, relative_share in _shared(relative):
                vote = magnitude * ring_share * sector_share * relative_share
                histogram.scatter_add_(1, (cell + relative_bin % _NUM_RELATIVE).flatten(1), vote.flatten(1))
    return histogram.view(rows, _NUM_RINGS + 2, _NUM_SECTORS, _NUM_RELATIVE)


def _read(square: Tensor, polar: Tensor) -> Tensor:
    """The description of histograms on both grids: square roots of their shares (Hellinger kernel); along the polar sectors, magnitudes of frequencies."""
    cells = square.flatten(1)
    cells = (cells / cells.sum(dim=1, keepdim=True).clamp(min=1e-12)).sqrt()
    rings = polar[:, 1:-1]  # without the rims, which took what lies beyond
    rings = (rings / rings.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)).sqrt()
    spectrum = torch.fft.rfft(rings, dim=2)[:, :, :_NUM_FREQUENCIES].abs()
    return torch.cat([cells, F.normalize(spectrum.flatten(1), dim=1)], dim=1)


def _shared(position: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The two bins on either side of each position, and its share in each."""
    lower = position.floor()
    share = position - lower
    lower = lower.long()
    return [(lower, 1 - share), (lower + 1, share)]


class ProjectionEncoder(nn.Module):
    """Descriptions of a cloud's projected pictures through one linear layer, the mean over all cameras, and pair histograms.

    Args:
        side_vectors: Keep a vector for each camera instead of their mean.
    """

    def __init__(self, embed_dim: int, *, side_vectors: bool = False):
        super().__init__()
        self.side_vectors = side_vectors
        axes = torch.tensor([camera.axes().tolist() for camera in ring_cameras(NUM_CAMERAS)], dtype=torch.float32)
        self.register_buffer("axes", axes, persistent=False)
        # Set from training objects before the first step (`adapt`).
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("std", torch.ones(WIDTH))
        self.proj = nn.Linear(WIDTH, embed_dim)
        self.pairs = PairEmbedding(embed_dim)

    def features(self, points: Float[Tensor, "batch num_points 6"]) -> Float[Tensor, "batch views features"]:
        """What `forward` costs, and no weight changes: the members of an ensemble can share it."""
        return projected_features(points, self.axes)

    def forward(
        self, points: Float[Tensor, "batch num_points 6"], features: Float[Tensor, "batch views features"] | None = None
    ) -> Float[Tensor, "batch *sides embed_dim"]:
        """Embeddings of unit length in float32. ``features``: `features` of the same points, where they are known."""
        features = self.features(points) if features is None else features
        views = F.normalize(self.proj((features - self.mean) / self.std).float(), dim=-1)
        if not self.side_vectors:
            views = views.mean(dim=1, keepdim=True)
        found = F.normalize(views + _PAIRS_WEIGHT * F.normalize(self.pairs(points).float(), dim=-1).unsqueeze(1), dim=-1)
        return found if self.side_vectors else found.squeeze(1)

    @torch.no_grad()
    def adapt(self, points: Float[Tensor, "batch num_points 6"]) -> None:
        """Standardise by training objects."""
        self.pairs.standardise(points)
        found = projected_features(points, self.axes).flatten(0, 1)
        std = found.std(dim=0, unbiased=False)
        self.mean.copy_(found.mean(dim=0))
        # A width that hardly varies among these objects must not be blown up.
        self.std.copy_(std.clamp(min=max(1e-6, 0.1 * float(std.mean()))))
