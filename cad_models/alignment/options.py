"""Flags of ``infer.py`` for this room. Imports nothing heavy, so that ``--help`` is quick."""

from dataclasses import dataclass

from cad_models.config import check
from cad_models.task import InferOptions


@dataclass(frozen=True, kw_only=True)
class AlignmentOptions(InferOptions):
    """What ``infer.py`` may be asked of the search between images and meshes."""

    scale_aware: float = 0.5
    """Mesh to mesh: weight, 0 to 1, of size and proportions in file units (sides, area, volume, distances between surface points) against that of the
    shape embedding; 0 = shape alone, so that a scaled copy is found as well."""

    def __post_init__(self) -> None:
        check(0 <= self.scale_aware <= 1, "options.scale_aware", self.scale_aware, "in [0, 1]")
