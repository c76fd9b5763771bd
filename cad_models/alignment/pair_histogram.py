"""What the pairs of a cloud's points say of the whole shape, and a small network that turns it into an embedding.

Local patches tell a transformer little of the whole from few training objects; histograms over pairs of points do, without anything to be learnt:
surflet-pair relations (Wahl et al., 3DIM 2003; Rusu et al., ICRA 2009), the steepness of the pairs, distances (D2: Osada et al., 2002).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

NUM_DISTANCES, NUM_ANGLES, NUM_STEEPNESSES, NUM_FINE_DISTANCES = 8, 4, 6, 32
WIDTH = NUM_DISTANCES * NUM_ANGLES**3 + NUM_DISTANCES * NUM_STEEPNESSES + NUM_FINE_DISTANCES

# Pairs are of points this many places apart, for so many different distances in the order of the points.
_NUM_STRIDES = 12
# Of a cloud's points, which come in farthest-point order: the first so many stand for all of them.
_MOST_POINTS = 512
_HIDDEN = 512


@torch.no_grad()
def pair_histogram(points: Float[Tensor, "batch num_points 6"]) -> Float[Tensor, "batch features"]:
    """Square roots of the shares of three histograms, side by side: float32 [batch, 592]. It gives no gradient to the points.

    Over pairs of points: distance x the smaller and the larger of the normals' angles to the line between them x the angle between the normals; distance x
    the line's angle to the vertical; distance. Of angles the absolute cosine counts, so normals may point to either side. Every pair is shared between
    neighbouring bins. Turning a cloud about the vertical changes nothing.

    Args:
        points: Coordinates within the unit sphere, +z up, and unit normals.
    """
    points = points[:, :_MOST_POINTS].float()
    num_points = points.shape[1]
    strides = sorted({max(1, round((k + 0.5) * num_points / 2 / _NUM_STRIDES)) for k in range(_NUM_STRIDES)})
    first = points.repeat(1, len(strides), 1)
    second = torch.cat([points.roll(-stride, dims=1) for stride in strides], dim=1)
    between = second[..., :3] - first[..., :3]
    distance = between.norm(dim=-1)
    direction = between / distance.clamp(min=1e-6).unsqueeze(-1)
    one, other = ((cloud[..., 3:6] * direction).sum(-1).abs() for cloud in (first, second))
    normals = (first[..., 3:6] * second[..., 3:6]).sum(-1).abs()
    near = _shares(distance / 2, NUM_DISTANCES)
    angles = [_shares(x, NUM_ANGLES) for x in (torch.minimum(one, other), torch.maximum(one, other), normals)]
    histograms = [
        _joint(_outer(near, angles[0]), _outer(angles[1], angles[2])),
        _joint(near, _shares(direction[..., 2].abs(), NUM_STEEPNESSES)),
        _shares(distance / 2, NUM_FINE_DISTANCES).mean(dim=1),
    ]
    return torch.cat(histograms, dim=1).clamp(min=0).sqrt()


def _shares(values: Tensor, num_bins: int) -> Tensor:
    """[..., num_bins]: each value's share in the bins, whose centres lie evenly from 0 to 1; values beyond count as the nearest."""
    centres = torch.arange(num_bins, device=values.device)
    return (1 - (values.clamp(0, 1).unsqueeze(-1) * (num_bins - 1) - centres).abs()).clamp(min=0)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2)


def _joint(a: Tensor, b: Tensor) -> Tensor:
    """[batch, bins of a * bins of b]: the mean outer product over the pairs, as one matrix product."""
    return (a.transpose(1, 2) @ b).flatten(1) / a.shape[1]


class PairEncoder(nn.Module):
    """A point encoder of pair histograms alone: several times as fast as the smallest transformer, and better from a few hundred objects."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.pairs = PairEmbedding(embed_dim)

    def forward(self, points: Float[Tensor, "batch num_points 6"]) -> Float[Tensor, "batch embed_dim"]:
        """Embeddings of unit length in float32."""
        return F.normalize(self.pairs(points).float(), dim=-1)

    def adapt(self, points: Float[Tensor, "batch num_points 6"]) -> None:
        """Standardise by training objects."""
        self.pairs.standardise(points)


class PairEmbedding(nn.Module):
    """Pair histograms, standardised, through two layers."""

    def __init__(self, embed_dim: int):
        super().__init__()
        # Set from training objects before the first step (`standardise`): the histograms' bins differ in size and hardly vary around their means.
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("std", torch.ones(WIDTH))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, _HIDDEN), nn.LayerNorm(_HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, embed_dim))

    def forward(self, points: Float[Tensor, "batch num_points 6"]) -> Float[Tensor, "batch embed_dim"]:
        """Embeddings, not of unit length."""
        return self.mlp((pair_histogram(points) - self.mean) / self.std)

    @torch.no_grad()
    def standardise(self, points: Float[Tensor, "batch num_points 6"]) -> None:
        """Take mean and deviation of the histograms from training objects."""
        found = torch.cat([pair_histogram(part) for part in points.split(32)])
        std = found.std(dim=0, unbiased=False)
        self.mean.copy_(found.mean(dim=0))
        # A bin that hardly varies among these objects must not be blown up.
        self.std.copy_(std.clamp(min=max(1e-6, 0.1 * float(std.mean()))))
