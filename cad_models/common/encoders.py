"""Frozen image encoders by name: ``hog`` (no weights, for CPUs) and ``timm:<model>[@file.safetensors]``. Heavy libraries come late.

Every encoder sees images through `cad_models.common.images.prepare_image` (foreground, square crop), then through its own preprocessing.
"""

import difflib
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float, UInt8

from cad_models.common.images import prepare_image

if TYPE_CHECKING:
    import torch

Image = UInt8[np.ndarray, "height width 3"]

# What the descriptors are made of; part of the digest, so that old embeddings are not mixed with new ones.
_HOG = {"size": 128, "orientations": 9, "pixels_per_cell": 16, "cells_per_block": 2}


class ImageEncoder(ABC):
    """A frozen encoder. An image's embedding depends on that image alone."""

    name: str
    """As given to `build_encoder`."""
    width: int
    """Length of an embedding."""
    digest: str
    """Identifies encoder, weights and preprocessing; goes into checkpoint signatures."""
    input_size: int
    """Width and height, in pixels, of the square that the encoder sees."""

    def encode(self, images: Sequence[Image]) -> Float[np.ndarray, "images features"]:
        """Embeddings, float32, of images of any size."""
        return self.encode_squares([prepare_image(image, size=self.input_size) for image in images])

    def encode_squares(self, squares: Sequence[Image]) -> Float[np.ndarray, "images features"]:
        """Embeddings, float32, of what `prepare_image` made at ``input_size``: for callers that prepare in threads of their own."""
        return self._encode(list(squares)) if squares else np.zeros((0, self.width), dtype=np.float32)

    @abstractmethod
    def _encode(self, images: list[Image]) -> Float[np.ndarray, "images features"]:
        """Embeddings of squares of ``input_size``."""


class HogEncoder(ImageEncoder):
    """Histograms of oriented gradients (Dalal & Triggs, CVPR 2005) of the grey image, by scikit-image; unit length."""

    def __init__(self) -> None:
        self.name = "hog"
        self.input_size = _HOG["size"]
        cells = _HOG["size"] // _HOG["pixels_per_cell"]
        blocks = cells - _HOG["cells_per_block"] + 1
        self.width = blocks**2 * _HOG["cells_per_block"] ** 2 * _HOG["orientations"]
        self.digest = _digest("hog", *map(str, _HOG.values()))

    def _encode(self, images: list[Image]) -> Float[np.ndarray, "images features"]:
        from skimage.feature import hog

        rows = np.empty((len(images), self.width), dtype=np.float32)
        for row, image in zip(rows, images, strict=True):
            row[:] = hog(
                image.mean(axis=2) / 255,
                orientations=_HOG["orientations"],
                pixels_per_cell=(_HOG["pixels_per_cell"],) * 2,
                cells_per_block=(_HOG["cells_per_block"],) * 2,
            )
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


class TimmEncoder(ImageEncoder):
    """A timm model without its classifier, frozen, behind timm's own preprocessing for that model.

    Args:
        name: ``timm:<model>`` (weights from timm's hub) or ``timm:<model>@<file>.safetensors``.
        device: Where it computes.
        dtype: auto = bfloat16 on a GPU, float32 on a CPU.

    Raises:
        ValueError: unknown model, weights that cannot be had, or a file that does not fit the model.
    """

    def __init__(self, name: str, *, device: str = "cpu", dtype: Literal["auto", "float32", "bfloat16"] = "auto") -> None:
        import timm
        import torch

        self.name = name
        model_name, _, file = name.removeprefix("timm:").partition("@")
        base = model_name.split(".")[0]
        if base not in timm.list_models():
            close = difflib.get_close_matches(base, timm.list_models(), n=3)
            raise ValueError(f"--encoder {name}: timm has no model {base!r}{'; did you mean ' + ', '.join(close) + '?' if close else ''}")
        if file:
            model = timm.create_model(model_name, pretrained=False, num_classes=0)
            self.digest = _digest(name.partition("@")[0], _load_weights(model, Path(file), name))
        else:
            model = _pretrained(model_name, name)
            self.digest = _digest(name, _weights_digest(model))
        config = timm.data.resolve_model_data_config(model)
        self.input_size = int(config["input_size"][1])
        self.width = int(model.head_hidden_size)
        # The squares already have the model's size: of its transform remain scaling to [0, 1] and normalisation.
        self._mean = torch.tensor(config["mean"]).view(3, 1, 1)
        self._std = torch.tensor(config["std"]).view(3, 1, 1)
        self._device = torch.device(device)
        self._dtype = torch.bfloat16 if dtype == "bfloat16" or (dtype == "auto" and self._device.type == "cuda") else torch.float32
        self._model = model.eval().requires_grad_(False).to(self._device, self._dtype)
        # On a CPU matrix products of different heights differ in the last bits: one image at a time keeps embeddings independent of the batch.
        self._batch_size = 64 if self._device.type == "cuda" else 1

    def _encode(self, images: list[Image]) -> Float[np.ndarray, "images features"]:
        import torch

        pieces = []
        with torch.inference_mode():
            for start in range(0, len(images), self._batch_size):
                batch = torch.stack([self.preprocessed(image) for image in images[start : start + self._batch_size]])
                pieces.append(self._model(batch.to(self._device, self._dtype)).float().cpu().numpy())
        return np.concatenate(pieces)

    def preprocessed(self, image: Image) -> "torch.Tensor":
        """A square image as the model wants it: float32 [3, size, size]."""
        import torch

        return (torch.from_numpy(image).permute(2, 0, 1).float() / 255 - self._mean) / self._std


def build_encoder(name: str, *, device: str = "cpu", dtype: Literal["auto", "float32", "bfloat16"] = "auto") -> ImageEncoder:
    """The encoder of that name.

    Raises:
        ValueError: no such encoder, or its weights cannot be had; says what would do.
    """
    if name == "hog":
        return HogEncoder()
    if name.startswith("timm:"):
        return TimmEncoder(name, device=device, dtype=dtype)
    raise ValueError(f"--encoder {name!r} is unknown{_hint(name)}: {encoder_names_help()}")


def encoder_names_help() -> str:
    """The valid forms of an encoder's name."""
    return "use hog (no weights needed) or timm:<model>[@file.safetensors], as timm:eva02_large_patch14_448.mim_m38m_ft_in22k_in1k"


def encoder_folder(name: str) -> str:
    """A safe folder name for an encoder's embeddings; different names give different folders."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name.partition("@")[0]).strip(".-")
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _hint(name: str) -> str:
    close = difflib.get_close_matches(name, ["hog", "timm:"], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _pretrained(model_name: str, name: str) -> "torch.nn.Module":
    import timm

    try:
        return timm.create_model(model_name, pretrained=True, num_classes=0)
    except Exception as error:  # the hub client raises its own, requests' and socket errors alike; all mean the same to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"--encoder {name}: timm cannot fetch these weights ({reason[:200]}). Without a network, download them elsewhere and give the file: "
            f"--encoder timm:{model_name}@/path/to/model.safetensors"
        ) from error


def _load_weights(model: "torch.nn.Module", path: Path, name: str) -> str:
    """Load a safetensors file into a timm model; returns the file's SHA-256."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        raise ValueError(
            f"--encoder {name}: {path} is not a .safetensors file; pickled weights (.pth, .bin) are never read: convert them first"
        )
    try:
        state = load_file(path)
    except FileNotFoundError as error:
        raise ValueError(f"--encoder {name}: there is no file {path}") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"--encoder {name}: {path} is not a valid safetensors file ({error})") from error
    own = model.state_dict()
    # Released files carry the classifier that num_classes=0 leaves out.
    state = {key: value for key, value in state.items() if key in own or not key.startswith(("head.", "fc.", "classifier.", "head_dist."))}
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    different = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if missing or unknown or different:
        problems = [
            f"{title} {', '.join(keys[:3])}"
            for title, keys in (("lacks", missing), ("has the unknown", unknown), ("has other shapes of", different))
            if keys
        ]
        raise ValueError(f"--encoder {name}: {path} does not fit this model: it {'; it '.join(problems)}")
    model.load_state_dict(state)
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _weights_digest(model: "torch.nn.Module") -> str:
    import torch

    total = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        total.update(key.encode())
        total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
