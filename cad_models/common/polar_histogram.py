"""A description of a picture that in-plane rotation does not change: oriented gradients on a polar grid, and how they vary around it."""

import numpy as np
from jaxtyping import Float

NUM_RINGS = 8
NUM_SECTORS = 32
NUM_DIRECTIONS = 8
NUM_FREQUENCIES = 9
"""Of the variation around a ring that are kept: 0 (the mean) to 8 periods a turn."""
WIDTH = NUM_RINGS * NUM_FREQUENCIES * NUM_DIRECTIONS

# The grid ends at this many root-mean-square radii of the object: a thin bar's ends lie at 1.7, a disc's rim at 1.4.
_RADII = 2.4
# Grey values from here on are the page.
_PAGE = 250.0


def polar_histogram(grey: Float[np.ndarray, "size size"]) -> Float[np.ndarray, " features"]:
    """Of a dark object on a white page: float32 [576], of unit length; zeros for a page without an object or an object without gradients.

    Gradients vote, by their magnitude, for rings around the object's centroid (in units of its root-mean-square radius), sectors, and the gradient's
    direction relative to the ray from the centroid; each vote is shared between neighbours. Turning the picture shifts the sectors and changes nothing
    else, and the magnitudes of a Fourier transform along them do not see a shift (Fourier descriptors; cf. Fourier HOG, Liu et al., IJCV 106, 2014).
    Square roots are taken of the histogram's shares (Hellinger kernel), as in HOG here.

    Args:
        grey: 0 to 255, at least 3 x 3.
    """
    features = np.zeros(WIDTH, dtype=np.float32)
    y, x = np.nonzero(grey < _PAGE)
    if len(y) == 0:
        return features
    centre_y, centre_x = y.mean(), x.mean()
    radius = np.sqrt(((y - centre_y) ** 2 + (x - centre_x) ** 2).mean())
    down, right = np.zeros_like(grey), np.zeros_like(grey)
    down[1:-1] = grey[2:] - grey[:-2]
    right[:, 1:-1] = grey[:, 2:] - grey[:, :-2]
    y, x = np.nonzero((down != 0) | (right != 0))
    if len(y) == 0 or radius == 0:
        return features
    down, right = down[y, x].astype(np.float64), right[y, x].astype(np.float64)
    angle = np.arctan2(centre_y - y, x - centre_x)
    relative = np.arctan2(-down, right) - angle
    votes = np.zeros((NUM_RINGS + 2) * NUM_SECTORS * NUM_DIRECTIONS)
    rings = _shared(np.hypot(y - centre_y, x - centre_x) / radius / _RADII * NUM_RINGS - 0.5)
    sectors = _shared(angle / (2 * np.pi) * NUM_SECTORS)
    directions = _shared(relative / (2 * np.pi) * NUM_DIRECTIONS)
    magnitude = np.hypot(down, right)
    for ring, ring_share in rings:
        # A rim of one ring on either side takes what lies beyond, and is thrown away.
        place = np.clip(ring + 1, 0, NUM_RINGS + 1) * NUM_SECTORS
        for sector, sector_share in sectors:
            cell = (place + sector % NUM_SECTORS) * NUM_DIRECTIONS
            weight = magnitude * ring_share * sector_share
            for direction, direction_share in directions:
                votes += np.bincount(cell + direction % NUM_DIRECTIONS, weights=weight * direction_share, minlength=len(votes))
    histogram = votes.reshape(NUM_RINGS + 2, NUM_SECTORS, NUM_DIRECTIONS)[1:-1]
    total = histogram.sum()
    if total == 0:
        return features
    spectrum = np.abs(np.fft.rfft(np.sqrt(histogram / total), axis=1)[:, :NUM_FREQUENCIES]).ravel()
    return (spectrum / np.linalg.norm(spectrum)).astype(np.float32)


def _shared(position: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The two bins on either side of each position, and its share in each."""
    lower = np.floor(position)
    share = position - lower
    lower = lower.astype(np.int64)
    return [(lower, 1 - share), (lower + 1, share)]
