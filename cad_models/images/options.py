"""Flags of ``infer.py`` for this room. Imports nothing heavy, so that ``--help`` is quick."""

from dataclasses import dataclass
from typing import Literal

from cad_models.task import InferOptions


@dataclass(frozen=True, kw_only=True)
class ImagesOptions(InferOptions):
    """What ``infer.py`` may be asked of a classifier."""

    tta: Literal["none", "flip", "crops"] = "none"
    """Answer for several versions of each picture and take the mean: flip = itself and mirrored; crops = these and five crops of 0.9 of it, each mirrored too."""
    order: Literal["numeric", "file"] = "numeric"
    """Order of the ids in the CSV: numeric = numbers by value, then the rest by name; file = as the files are listed."""
    probabilities: bool = False
    """Add a column p_<class> to the CSV for each class among the --top-k best of a picture."""
