"""Flags of ``infer.py`` for this room. Imports nothing heavy, so that ``--help`` is quick."""

from dataclasses import dataclass

from cad_models.config import check
from cad_models.dataset import Folder
from cad_models.task import InferOptions


@dataclass(frozen=True, kw_only=True)
class AlignmentOptions(InferOptions):
    """What ``infer.py`` may be asked of a search between pictures and meshes, or between meshes."""

    gallery_views: int = 0
    """Render every mesh from so many cameras and compare pictures with these views too, through the trained head and as the frozen encoder sees them; the
    three scores are fused. 24 is what the weights were fitted with; 0 = the learned score alone, without rendering."""
    query_rolls: int = 1
    """Turn each query picture in its plane in so many equal steps, and let the best count; 1 = as it is."""
    cache: str = ""
    """Folder (path or URI) that keeps the rendered views' embeddings, so that a mesh is rendered once for any number of questions; empty = none."""
    scale_aware: float = 0.5
    """Mesh to mesh: weight, 0 to 1, of size and proportions in file units (sides, area, volume, distances between surface points) against that of the
    shape embedding; 0 = shape alone, so that a scaled copy is found as well."""

    def __post_init__(self) -> None:
        check(0 <= self.gallery_views <= 1_000, "options.gallery_views", self.gallery_views, "from 0 (no rendering) to 1000")
        check(1 <= self.query_rolls <= 360, "options.query_rolls", self.query_rolls, "from 1 (as it is) to 360")
        check(0 <= self.scale_aware <= 1, "options.scale_aware", self.scale_aware, "in [0, 1]")
        if self.cache and not self.gallery_views:
            raise ValueError(f"--options.cache {self.cache} keeps rendered views, and there are none: add --options.gallery-views 24, or leave it out")
        if self.cache:
            # Workers run elsewhere than the driver: only absolute paths mean the same to both.
            object.__setattr__(self, "cache", Folder(self.cache).uri)
