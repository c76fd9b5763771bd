"""Embeddings of rendered views on disk, so that the next question about the same meshes renders nothing.

One safetensors file a mesh, named by a digest of everything that its numbers depend on: the mesh file's SHA-256, number and size of the views, the
renderer, and the frozen encoder. Files appear whole or not at all; several processes may use one folder.
"""

import numpy as np
from jaxtyping import Float16

from cad_models.config import json_digest
from cad_models.dataset import Folder

# To be raised when views come to look otherwise: cameras, shading, cropping.
_VIEWS_VERSION = 1


class ViewCache:
    """See the module's docstring.

    Args:
        uri: Folder (path or URI); it is made when the first file is written.
        num_views: Of each mesh.
        view_size: Pixels a side.
    """

    def __init__(self, uri: str, *, num_views: int, view_size: int) -> None:
        self._folder = Folder(uri)
        self._num_views = num_views
        self._settings = {"views": num_views, "size": view_size, "version": _VIEWS_VERSION}

    def read(self, sha256: str, encoder_digest: str) -> Float16[np.ndarray, "views width"] | None:
        """A mesh's views; None where they are not there, or their file is broken (which is written anew then)."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            views = load(self._folder.read_bytes(self._name(sha256, encoder_digest)))["views"]
        except (FileNotFoundError, SafetensorError, KeyError):
            return None
        return views if views.dtype == np.float16 and views.ndim == 2 and len(views) == self._num_views else None

    def write(self, sha256: str, encoder_digest: str, views: Float16[np.ndarray, "views width"]) -> None:
        """Keep a mesh's views. Raises OSError where the folder cannot be written."""
        from safetensors.numpy import save

        self._folder.write_bytes(self._name(sha256, encoder_digest), save({"views": np.ascontiguousarray(views)}))

    def _name(self, sha256: str, encoder_digest: str) -> str:
        digest = json_digest({**self._settings, "mesh": sha256, "encoder": encoder_digest}, length=40)
        return f"{digest[:2]}/{digest[2:]}.safetensors"
