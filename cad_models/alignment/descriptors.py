"""Measures of a part in file units, and how alike two parts are by them: what an embedding of normalised points cannot know is the size.

Every measure is the logarithm of a length, so that a part scaled by s differs from itself by log s in each: the sides of the bounding box (sorted: which
axis is up does not count), the root of the surface's area, the cube root of the volume (unknown where the mesh encloses none), and the distribution of
distances between two random points of the surface (D2 of R. Osada et al., "Shape Distributions", 2002), as quantiles.
"""

import functools

import numpy as np
from jaxtyping import Float, Float32

from cad_models.common.bounds import bounds
from cad_models.common.meshes import Mesh, mesh_facts, normalized
from cad_models.common.points import sample_surface

NUM_MEASURES = 21
"""Three sides, area, volume, 16 quantiles of D2."""

_NUM_POINTS = 2_048
_NUM_PAIRS = 32_768
_NUM_QUANTILES = NUM_MEASURES - 5
# A sheet without thickness still has a logarithm: sides below this share of the longest count as this.
_THINNEST = 1e-3
# Difference of logarithms at which a measure's similarity is one half: 5 %. Between 2 % and 10 % the figures of the README change by less than their
# intervals; wider, versions of a part that differ in one side only are lost among parts that differ a little in all of them.
_HALF = 0.05
# Elements of a block of differences.
_BLOCK_ELEMENTS = 1 << 20


def measures(mesh: Mesh) -> Float32[np.ndarray, " 21"]:
    """Logarithms of a part's lengths in file units: sides of the bounding box, longest first [3]; root of the area; cube root of the volume, NaN where
    the mesh is not closed; the 1/32, 3/32 ... 31/32 quantiles of D2 [16]. The same mesh gives the same bytes."""
    # Measured in the unit sphere, where nothing overflows; the size comes in as one more logarithm.
    unit = normalized(mesh)
    facts = mesh_facts(unit)
    sides = np.sort(facts.extents)[::-1]
    low, high = bounds(mesh.vertices)
    log_size = np.log(2.0) + np.log((high / 2 - low / 2).max()) - np.log(sides[0])
    points, _ = sample_surface(unit, _NUM_POINTS, 0)
    first, second = _pairs()
    distances = np.linalg.norm(points[first].astype(np.float64) - points[second], axis=1)
    d2 = np.quantile(distances, (np.arange(_NUM_QUANTILES) + 0.5) / _NUM_QUANTILES)
    volume = np.cbrt(facts.volume) if facts.volume > 0 else np.nan
    lengths = np.concatenate([np.maximum(sides, _THINNEST * sides[0]), [np.sqrt(facts.area), volume], np.maximum(d2, _THINNEST * sides[0])])
    return (np.log(lengths) + log_size).astype(np.float32)


@functools.cache
def _pairs() -> tuple[np.ndarray, np.ndarray]:
    """Pairs of two different points, the same for every part."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, _NUM_POINTS, _NUM_PAIRS)
    return first, (first + rng.integers(1, _NUM_POINTS, _NUM_PAIRS)) % _NUM_POINTS


def similarity(queries: Float32[np.ndarray, "queries 21"], gallery: Float32[np.ndarray, "gallery 21"]) -> Float[np.ndarray, "queries gallery"]:
    """How alike parts are in size and proportions, float64 in (0, 1]; 1 = the same in all measures.

    The mean over six measures (three sides, area, volume, D2) of 1 / (1 + difference / 5 %), where the difference is that of the logarithms, for D2 the
    mean over its quantiles. A robust kernel: a version of a part that differs in one side by a factor of two loses a sixth, not everything. A volume that
    is unknown on either side is left out of the mean.
    """
    found = np.empty((len(queries), len(gallery)))
    rows = max(1, _BLOCK_ELEMENTS // max(1, len(gallery)))
    columns = np.ascontiguousarray(gallery.T.astype(np.float64))
    for start in range(0, len(queries), rows):
        block = queries[start : start + rows].astype(np.float64)
        difference = [np.abs(block[:, i, None] - columns[i]) for i in range(NUM_MEASURES - _NUM_QUANTILES)]
        d2 = np.zeros_like(difference[0])
        for i in range(NUM_MEASURES - _NUM_QUANTILES, NUM_MEASURES):
            d2 += np.abs(block[:, i, None] - columns[i])
        total, count = np.zeros_like(d2), np.zeros_like(d2)
        for values in (*difference, d2 / _NUM_QUANTILES):
            known = ~np.isnan(values)
            total += np.where(known, 1 / (1 + values / _HALF), 0.0)
            count += known
        found[start : start + rows] = total / count
    return found
