"""Small untrained members for tests."""

from pathlib import Path

import torch

from cad_models.checkpoint import write_member
from cad_models.config import replace_at
from cad_models.tasks import TASKS

TASK = TASKS["alignment"]
IMAGE_WIDTH = 32


def write_tiny_member(
    directory: Path, *, seed: int = 0, encoder: str = "hog", encoder_digest: str = "0" * 12, image_width: int = IMAGE_WIDTH, **changes: object
) -> Path:
    """A checkpoint folder with weights drawn from ``seed``; ``changes`` are recipe paths with ``__`` for the dot."""
    recipe = TASK.smoke
    for path, value in changes.items():
        recipe = replace_at(recipe, path.replace("__", "."), value)
    signature = {
        "axes": "z-up, centred on the surface's centroid, radius 1",
        "channels": recipe.model.channels,
        "num_points": recipe.model.num_read_points,
        "num_stored_points": recipe.data.num_points,
        "encoder": encoder,
        "encoder_digest": encoder_digest,
        "image_width": image_width,
        "dataset_digest": "d" * 12,
    }
    torch.manual_seed(seed)
    learner = TASK.learner(recipe, signature)
    metrics = {"val/recall@3": 0.5}
    write_member(directory, task=TASK, recipe=recipe, signature=signature, metrics=metrics, artifacts=learner.artifacts())
    return directory
