"""Stored histograms -> what the model sees."""

import numpy as np
from jaxtyping import Float

from cad_models.common.meshes import Mesh
from cad_models.dataset import DatasetError
from cad_models.histograms.mesh_features import DISTRIBUTIONS, NUM_BINS, shape_distributions
from cad_models.histograms.published import Histograms
from cad_models.histograms.recipe import HistogramData
from cad_models.histograms.shape_histograms import BINS, KINDS, PARTS, shape_histograms

HISTOGRAM_SHAPE = (len(PARTS), len(KINDS), sum(BINS))
"""Of a stored object: for every part and kind the histograms with 8, 16, 32, 64 and 128 bins, one after the other. NaN = not given."""
DISTRIBUTION_SHAPE = (2, len(DISTRIBUTIONS), NUM_BINS)
"""Classical and in the affine frame; D1, D2, A3. NaN = not given (an object without a mesh)."""


def stored_histograms(histograms: Histograms) -> Float[np.ndarray, "2 4 248"]:
    """float32, `HISTOGRAM_SHAPE`."""
    stored = np.full(HISTOGRAM_SHAPE, np.nan, dtype=np.float32)
    for (part, kind, bins), values in histograms.items():
        stored[PARTS.index(part), KINDS.index(kind), _slice(bins)] = values
    return stored


def given_histograms(stored: Float[np.ndarray, "2 4 248"]) -> Histograms:
    """The inverse of :func:`stored_histograms`: what is not NaN, in the published order."""
    found = {(part, kind, bins): stored[p, k, _slice(bins)] for p, part in enumerate(PARTS) for bins in BINS for k, kind in enumerate(KINDS)}
    return {key: values for key, values in found.items() if not np.isnan(values).any()}


def _slice(bins: int) -> slice:
    start = sum(BINS[: BINS.index(bins)])
    return slice(start, start + bins)


def mesh_histograms(mesh: Mesh, log2_chords: int) -> tuple[Float[np.ndarray, "2 4 248"], Float[np.ndarray, "2 3 64"]]:
    """All that is stored of a mesh, float32.

    Raises:
        BadMesh: a flat mesh, which has no hull with a volume.
    """
    vertices, faces = np.asarray(mesh.vertices, dtype=np.float64), np.asarray(mesh.faces)
    distributions = [shape_distributions(vertices, faces, affine=affine) for affine in (False, True)]
    return stored_histograms(shape_histograms(mesh, log2_chords=log2_chords)), np.stack(distributions).astype(np.float32)


def features(
    histograms: Float[np.ndarray, "n 2 4 248"], distributions: Float[np.ndarray, "n 2 3 64"], data: HistogramData
) -> Float[np.ndarray, "n width"]:
    """The model's inputs, float32 [n, `feature_width`].

    Raises:
        DatasetError: an object lacks what ``data.inputs`` names.
    """
    blocks = []
    for name in data.inputs:
        if name in PARTS:
            block = histograms[:, PARTS.index(name), :, _slice(data.bins)]
        else:
            block = distributions[:, int(name == "affine")]
        if np.isnan(block).any():
            raise DatasetError(_missing(name, data, bool(np.isnan(distributions).all())))
        blocks.extend(_encoded(block, data.encoding))
    return np.ascontiguousarray(np.concatenate(blocks, axis=1), dtype=np.float32)


def _encoded(block: np.ndarray, encoding: str) -> list[np.ndarray]:
    flat = block.reshape(len(block), -1)
    if encoding == "raw":
        return [flat]
    if encoding == "sqrt":
        return [np.sqrt(flat)]
    return [np.sqrt(flat), block.cumsum(axis=-1).reshape(len(block), -1)]


def feature_width(data: HistogramData) -> int:
    """Width of :func:`features`."""
    width = sum(len(KINDS) * data.bins if name in PARTS else len(DISTRIBUTIONS) * NUM_BINS for name in data.inputs)
    return 2 * width if data.encoding == "sqrt+cumulative" else width


def _missing(name: str, data: HistogramData, without_meshes: bool) -> str:
    if name in PARTS:
        return f"--data.inputs {name}: an object has no {name} histograms with {data.bins} bins (printed tables hold model with 32 only)"
    remedy = "use --data.inputs model hull (tables: model)" if without_meshes else "leave out the objects that are histogram files"
    return f"--data.inputs {name} needs meshes, and an object was given as a histogram file: {remedy}"
