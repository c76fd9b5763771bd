"""The members of an ensemble in one process: files that were read -> embeddings."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cad_models.alignment.answers import ReadSettings
from cad_models.alignment.options import AlignmentOptions
from cad_models.alignment.view_cache import ViewCache
from cad_models.common.images import prepare_image, turned_squares
from cad_models.task import Columns, Predictor

if TYPE_CHECKING:
    from cad_models.checkpoint import Member
    from cad_models.common.encoders import ImageEncoder

# Inputs of one forward pass on a GPU. On a CPU it is one: matrix products of another shape sum in another order, and an answer would depend on
# what else was asked.
_GPU_BATCH = 64


class AlignmentPredictor(Predictor):
    """Embeds images and meshes with every member; members that share an encoder share its work.

    Raises:
        ValueError: an encoder is not there, or is not the one that a member was trained with.
    """

    def __init__(self, members: "Sequence[Member]", *, device: str = "cpu", options: AlignmentOptions | None = None) -> None:
        from cad_models.common.encoders import build_encoder

        self._members, self._device, self._options = list(members), device, options or AlignmentOptions()
        self._encoders: dict[str, ImageEncoder] = {}
        for member in members:
            name, digest = member.signature["encoder"], member.signature["encoder_digest"]
            if digest in self._encoders:
                continue
            encoder = build_encoder(name, device=device)
            if encoder.digest != digest:
                raise ValueError(
                    f"member {member.digest[:12]} was trained on embeddings of {name} with digest {digest}, the encoder here has digest "
                    f"{encoder.digest}: use the same weights, or train on embeddings of this encoder"
                )
            self._encoders[digest] = encoder
        self.seconds = {"encode images": 0.0, "embed": 0.0}
        if self._options.cache:
            self._cache = ViewCache(self._options.cache, num_views=self._options.gallery_views, view_size=self._view_size)
            self._cache.check_writable()
            self.seconds["write cache"] = 0.0

    @property
    def _view_size(self) -> int:
        # As the views that the members were trained on; of unlike ones the largest.
        return max((member.recipe.data.image_size for member in self._members), default=224)

    @property
    def settings(self) -> ReadSettings:
        read: dict[int, int] = {}
        for signature in (member.signature for member in self._members):
            stored = signature["num_stored_points"]
            read[stored] = max(read.get(stored, 0), signature["num_points"])
        return ReadSettings(
            num_points=tuple(sorted(read.items())),
            num_views=self._options.gallery_views,
            view_size=self._view_size,
            num_rolls=self._options.query_rolls,
            cache=self._options.cache,
            encoder_digests=tuple(self._encoders),
        )

    def predict(self, batch: Sequence[Columns]) -> list[list[np.ndarray]]:
        """An input is an image or a mesh by the columns that it has.

        Returns:
            For each input each member's unit embedding, float32 [dim], of a turned image one a position, [rolls, dim], of a mesh with several
            vectors one a side, [sides, dim]. Where meshes are rendered, then:
            of a mesh each member's embeddings of its views, float16 [views, dim]; and last, of each encoder (in the order of the members), its frozen
            embeddings, float16, of a mesh's views [views, width], of an image [rolls, width]. Of a mesh that was measured instead: its measures.
        """
        size = 1 if self._device == "cpu" else _GPU_BATCH
        outputs: list[list[np.ndarray]] = [[] for _ in batch]
        for kind, embed in (("image", self._embed_images), ("mesh", self._embed_meshes)):
            positions = [i for i, columns in enumerate(batch) if _holds(columns) == kind]
            for start in range(0, len(positions), size):
                chosen = positions[start : start + size]
                for i, found in zip(chosen, embed([batch[i] for i in chosen]), strict=True):
                    outputs[i] = found
        return outputs

    def _embed_images(self, batch: list[Columns]) -> list[list[np.ndarray]]:
        counts = [int(columns.get("num_rolls", 1)) for columns in batch]
        frozen = {}
        for digest, encoder in self._encoders.items():
            started = time.perf_counter()
            squares = [turned_squares(columns["image"], count, size=encoder.input_size) for columns, count in zip(batch, counts, strict=True)]
            frozen[digest] = self._encoded(encoder, [square for turned in squares for square in turned], started)
        started = time.perf_counter()
        rows = [self._projected(member, frozen[member.signature["encoder_digest"]]) for member in self._members]
        self.seconds["embed"] += time.perf_counter() - started
        ends = np.cumsum(counts)[:-1]
        heads, raws = ([np.split(array, ends) for array in arrays] for arrays in (rows, frozen.values()))
        return [
            [(head[i][0] if counts[i] == 1 else head[i]) for head in heads] + ([raw[i] for raw in raws] if self._options.gallery_views else [])
            for i in range(len(batch))
        ]

    def _embed_meshes(self, batch: list[Columns]) -> list[list[np.ndarray]]:
        started = time.perf_counter()
        rows = []
        shared: dict[tuple, Any] = {}
        for member in self._members:
            signature, learner = member.signature, member.learner
            channels = 6 if "normals" in signature["channels"] else 3
            points = [columns[f"points/{signature['num_stored_points']}"][: signature["num_points"], :channels] for columns in batch]
            clouds = np.ascontiguousarray(np.stack(points))
            key = signature["num_stored_points"], signature["num_points"], channels, type(learner.point_encoder)
            if key not in shared:  # what weights do not change is computed once
                shared[key] = self._tensor(learner.cad_features, clouds)
            rows.append(self._run(functools.partial(learner.stored_cad, features=shared[key]), clouds))
        self.seconds["embed"] += time.perf_counter() - started
        found = [[row[i] for row in rows] for i in range(len(batch))]
        for outputs, columns in zip(found, batch, strict=True):
            if "measures" in columns:
                outputs.append(columns["measures"])
            elif self._options.gallery_views:
                outputs += self._embed_views(columns)
        return found

    def _embed_views(self, columns: Columns) -> list[np.ndarray]:
        frozen = {}
        for digest, encoder in self._encoders.items():
            if "views" in columns:
                started = time.perf_counter()
                squares = [prepare_image(view, size=encoder.input_size) for view in columns["views"]]
                frozen[digest] = self._encoded(encoder, squares, started)
                if self._options.cache:
                    started = time.perf_counter()
                    self._cache.write(columns["sha256"].tobytes().hex(), digest, frozen[digest])
                    self.seconds["write cache"] += time.perf_counter() - started
            else:
                frozen[digest] = columns[f"frozen_views/{digest}"]
        started = time.perf_counter()
        rows = [self._projected(member, frozen[member.signature["encoder_digest"]]).astype(np.float16) for member in self._members]
        self.seconds["embed"] += time.perf_counter() - started
        return [*rows, *frozen.values()]

    def _encoded(self, encoder: "ImageEncoder", squares: list[np.ndarray], started: float) -> np.ndarray:
        # Embeddings are stored as float16: rounding here too gives a query the very vector that evaluation would give it.
        frozen = encoder.encode_squares(squares).astype(np.float16)
        self.seconds["encode images"] += time.perf_counter() - started
        return frozen

    def _projected(self, member: "Member", frozen: np.ndarray) -> np.ndarray:
        return self._run(member.learner.embed_images, frozen.astype(np.float32))

    def _run(self, function: Callable[..., Any], array: np.ndarray) -> np.ndarray:
        return self._tensor(function, array).float().cpu().numpy()

    def _tensor(self, function: Callable[..., Any], array: np.ndarray) -> Any:
        import torch

        with torch.inference_mode():
            return function(torch.from_numpy(array).to(self._device))


def _holds(columns: Columns) -> str:
    return "image" if "image" in columns else "mesh"
