"""Meshes with several vectors, one a side: a picture shows a part from one side, and the best of them should count.

The score of a picture and a mesh is a soft maximum of its cosines with the mesh's sides, ``log(mean(exp(20 · cosine))) / 20`` (the late interaction of ColBERT,
O. Khattab and M. Zaharia, SIGIR 2020, with log-mean-exp pooling in the place of its maximum, so that in training every side gets a gradient). A mesh
with one vector has that vector's cosine.
"""

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cad_models.common.mapped import forget_pages

SHARPNESS = 20.0
"""Between the mean of the cosines (0) and their maximum (infinity)."""

# Bound on the cosines of one block: 34 MB in float64, 67 MB in a training step's float32.
_BLOCK_ELEMENTS = 1 << 22
_TRAINING_BLOCK_ELEMENTS = 1 << 24


def pooled(cosines: Float[Tensor, "*rows sides"]) -> Float[Tensor, "*rows"]:
    """The soft maximum over the sides; between the cosines' mean and their maximum."""
    # From -20 to 20: nothing overflows, and nothing need be taken off first.
    return (SHARPNESS * cosines).exp().mean(dim=-1).log() / SHARPNESS


def similarity(meshes: Float[Tensor, "meshes sides dim"], pictures: Float[Tensor, "pictures dim"]) -> Float[Tensor, "meshes pictures"]:
    """Scores with gradient, in the memory of a part of their cosines: larger ones are computed again for the backward pass."""
    step = max(1, _TRAINING_BLOCK_ELEMENTS // max(1, meshes.shape[1] * len(pictures)))
    parts = meshes.split(step)
    if len(parts) == 1:
        return _similarity(meshes, pictures)
    return torch.cat([checkpoint(_similarity, part, pictures, use_reentrant=False) for part in parts])


def _similarity(meshes: Tensor, pictures: Tensor) -> Tensor:
    return pooled(torch.einsum("osd,pd->ops", meshes, pictures))


def scores(pictures: Float[np.ndarray, "pictures dim"], meshes: Float[np.ndarray, "meshes *sides dim"]) -> Float32[np.ndarray, "pictures meshes"]:
    """Scores of unit vectors (or of what an ensemble makes of them): the soft maximum over a mesh's sides; of meshes with one vector the inner product.

    Summed in float64 and rounded to float32, so that equal vectors have equal scores however the work is cut.
    """
    pictures = pictures.astype(np.float64)
    if meshes.ndim == 2:
        return (pictures @ meshes.astype(np.float64).T).astype(np.float32)
    num_meshes, num_sides, width = meshes.shape
    found = np.empty((len(pictures), num_meshes), dtype=np.float32)
    step = max(1, _BLOCK_ELEMENTS // max(1, num_sides * width))
    for start in range(0, num_meshes, step):
        block = meshes[start : start + step].astype(np.float64).reshape(-1, width)
        height = max(1, _BLOCK_ELEMENTS // len(block))
        for top in range(0, len(pictures), height):
            cosines = (pictures[top : top + height] @ block.T).reshape(-1, len(block) // num_sides, num_sides)
            found[top : top + height, start : start + step] = np.log(np.exp(SHARPNESS * cosines).mean(axis=2)) / SHARPNESS
        forget_pages(meshes)
    return found


def as_one(meshes: Float[np.ndarray, "meshes *sides dim"]) -> Float[np.ndarray, "meshes dim"]:
    """One vector a mesh: the mean of its sides, as long as theirs are together in the mean (unit for unit sides)."""
    if meshes.ndim == 2:
        return meshes
    mean = meshes.astype(np.float64).mean(axis=1)
    length = np.sqrt((meshes.astype(np.float64) ** 2).sum(axis=2).mean(axis=1, keepdims=True))
    return (mean * (length / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12))).astype(np.float32)
