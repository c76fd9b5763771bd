"""Frozen image encoders by name: ``hog`` and ``hog_polar`` (no weights, for CPUs) and ``timm:<model>[@file.safetensors]``. Heavy libraries come late.

Every encoder sees images through `cad_models.common.images.prepare_image` (foreground, square crop), then through its own preprocessing, so
that queries and gallery views cannot be treated differently.
"""

import difflib
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, UInt8

from cad_models.common import polar_histogram
from cad_models.common.images import prepare_image

if TYPE_CHECKING:
    import torch

Image = UInt8[np.ndarray, "_ _ 3"]  # images of one call may differ in size

_GPU_BATCH = 64


class ImageEncoder(ABC):
    """A frozen encoder. An image's embedding depends on that image alone: on a CPU bit for bit, whatever else is in the call."""

    name: str
    """As given to `build_encoder`."""
    width: int
    """Length of an embedding."""
    digest: str
    """Identifies architecture, weights and preprocessing (not the file they came from); goes into checkpoint signatures."""
    input_size: int
    """Width and height, in pixels, of the square that the encoder sees."""

    def encode(self, images: Sequence[Image]) -> Float[np.ndarray, "images features"]:
        """Embeddings (float32, not normalised) of decoded images of any size. Do not crop them before: that is done here."""
        return self.encode_squares([prepare_image(image, size=self.input_size) for image in images])

    def encode_squares(self, squares: Sequence[Image]) -> Float[np.ndarray, "images features"]:
        """Embeddings (float32, not normalised) of what `prepare_image` made at ``input_size``: for callers that prepare in threads of their own.

        Raises:
            ValueError: a picture is no square of ``input_size``.
        """
        for square in squares:
            if square.shape != (self.input_size, self.input_size, 3):
                raise ValueError(f"encoder {self.name} got a picture {square.shape}: prepare_image(image, size={self.input_size}) makes squares of it")
        return self._encode(squares) if len(squares) else np.zeros((0, self.width), dtype=np.float32)

    @abstractmethod
    def _encode(self, squares: Sequence[Image]) -> Float[np.ndarray, "images features"]:
        """Embeddings of at least one square of ``input_size``."""


class HogEncoder(ImageEncoder):
    """Histograms of oriented gradients: 8 x 8 cells of 16 directions on 128 x 128 pixels, unit length.

    After Dalal & Triggs (CVPR 2005), with what matching views of one part needs: a vote is shared between neighbouring directions and cells
    (a part seen from 20 degrees aside shifts its edges), directions are signed (a part is darker than the page), and the histogram is one
    block compared by its square roots (Hellinger kernel: Arandjelovic & Zisserman, CVPR 2012).
    """

    num_cells = 8
    num_directions = 16

    def __init__(self) -> None:
        self.name = "hog"
        self.input_size = 128
        self.width = self.num_cells**2 * self.num_directions
        self.digest = _digest("hog", self.input_size, self.num_cells, self.num_directions, "signed trilinear hellinger")
        # Share of each pixel row (or column) in each cell: 1 at the cell's centre, 0 at its neighbours' centres.
        position = (np.arange(self.input_size) + 0.5) / self.input_size * self.num_cells - 0.5
        self._cell_shares = np.maximum(0, 1 - np.abs(position - np.arange(self.num_cells)[:, None])).astype(np.float32)

    def _encode(self, squares: Sequence[Image]) -> Float[np.ndarray, "images features"]:
        return np.stack([self.describe(square) for square in squares])

    def describe(self, image: UInt8[np.ndarray, "128 128 3"]) -> Float[np.ndarray, " features"]:
        """The descriptor of a square: cells row by row, directions counter-clockwise from +x within each; zeros for a blank image."""
        size, num_directions = self.input_size, self.num_directions
        grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
        down, right = np.zeros_like(grey), np.zeros_like(grey)
        down[1:-1] = grey[2:] - grey[:-2]
        right[:, 1:-1] = grey[:, 2:] - grey[:, :-2]
        pixels = np.flatnonzero((down != 0) | (right != 0))  # most of a drawing is flat
        down, right = down.ravel()[pixels], right.ravel()[pixels]
        magnitude = np.hypot(right, down)
        position = np.arctan2(-down, right) / np.float32(2 * np.pi) * num_directions
        lower = np.floor(position)
        share = position - lower
        lower = lower.astype(np.int64) % num_directions
        votes = np.zeros((num_directions, size * size), dtype=np.float32)
        votes[lower, pixels] = magnitude * (1 - share)
        votes[(lower + 1) % num_directions, pixels] = magnitude * share
        cells = self._cell_shares @ votes.reshape(num_directions, size, size) @ self._cell_shares.T
        total = cells.sum()
        return np.sqrt(cells / total if total > 0 else cells).transpose(1, 2, 0).ravel()


class HogPolarEncoder(ImageEncoder):
    """HOG beside `polar_histogram`, which does not change when the picture is turned: finds a part that was photographed at any roll.

    The two blocks have lengths 0.3 and 1, so that the cosine of two embeddings counts mostly the second; a trained head weighs them anew.
    """

    hog_length = 0.3

    def __init__(self) -> None:
        self._hog = HogEncoder()
        self.name = "hog_polar"
        self.input_size = self._hog.input_size
        self.width = self._hog.width + polar_histogram.WIDTH
        polar = [polar_histogram.NUM_RINGS, polar_histogram.NUM_SECTORS, polar_histogram.NUM_DIRECTIONS, polar_histogram.NUM_FREQUENCIES]
        self.digest = _digest("hog_polar", self._hog.digest, self.hog_length, *polar, "magnitudes hellinger")

    def _encode(self, squares: Sequence[Image]) -> Float[np.ndarray, "images features"]:
        grey = (square.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32) for square in squares)
        polar = np.stack([polar_histogram.polar_histogram(image) for image in grey])
        return np.concatenate([self.hog_length * self._hog.encode_squares(squares), polar], axis=1).astype(np.float32)


class TimmEncoder(ImageEncoder):
    """A timm model without its classifier, frozen, behind timm's own normalisation for that model.

    Args:
        name: ``timm:<model>`` (weights from timm's hub) or ``timm:<model>@<file>.safetensors``.
        device: Where it computes.
        dtype: Of matrix products; auto = bfloat16 on a GPU, float32 on a CPU.

    Raises:
        ValueError: unknown model, weights that cannot be had, or a file that does not fit the model.
    """

    def __init__(self, name: str, *, device: str = "cpu", dtype: Literal["auto", "float32", "bfloat16"] = "auto") -> None:
        import torch
        from timm.data import resolve_model_data_config

        self.name = name
        model_name, _, file = name.removeprefix("timm:").partition("@")
        _check_timm_name(model_name, name)
        model = _with_file(model_name, Path(file), name) if file else _pretrained(model_name, name)
        config = resolve_model_data_config(model)
        self.digest = _digest("timm", model_name.partition(".")[0], json.dumps(config, sort_keys=True), _weights_digest(model))
        self.width = int(model.head_hidden_size)
        self.input_size = int(config["input_size"][-1])
        # The rest of timm's transform for the model: the square is already scaled and framed, so its resize and centre crop (which would cut
        # the object's ends off) fall away.
        self._mean, self._std = (torch.tensor(config[key], device=device)[:, None, None] for key in ("mean", "std"))
        self._device = torch.device(device)
        on_gpu = self._device.type == "cuda"
        self._bfloat16 = dtype == "bfloat16" or (dtype == "auto" and on_gpu)
        self._model = model.eval().requires_grad_(False).to(self._device)
        if self._bfloat16:
            # Norms and the residual stream stay in float32 under autocast; casting these weights once saves doing it for every batch.
            for module in self._model.modules():
                if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                    module.to(torch.bfloat16)
        # On a CPU, matrix products of different heights differ in the last bits: one image at a time keeps embeddings independent of the
        # batch (and large models are no slower).
        self._batch_size = _GPU_BATCH if on_gpu else 1

    def _encode(self, squares: Sequence[Image]) -> Float[np.ndarray, "images features"]:
        import torch

        outputs = []
        with torch.inference_mode(), torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16):
            for start in range(0, len(squares), self._batch_size):
                inputs = self.preprocessed(squares[start : start + self._batch_size])
                outputs.append(self._model(inputs).float())  # read back at the end, so that a GPU need not wait between batches
        return torch.cat(outputs).cpu().numpy()

    def preprocessed(self, squares: Sequence[Image]) -> "torch.Tensor":
        """What the model is given for squares of ``input_size``: float32 [squares, 3, input_size, input_size], on the encoder's device."""
        import torch

        pixels = torch.from_numpy(np.stack(squares)).to(self._device)  # as bytes: a quarter of the traffic
        return pixels.permute(0, 3, 1, 2).contiguous().float().div(255).sub(self._mean).div(self._std)


def build_encoder(name: str, *, device: str = "cpu", dtype: Literal["auto", "float32", "bfloat16"] = "auto") -> ImageEncoder:
    """The encoder of that name, ready to encode.

    Args:
        device: torch's name of a device; ``hog`` always computes on the CPU.
        dtype: Of a timm model's matrix products; auto = bfloat16 on a GPU, float32 on a CPU.

    Raises:
        ValueError: no such encoder, or its weights cannot be had; says what would do.
    """
    if name == "hog":
        return HogEncoder()
    if name == "hog_polar":
        return HogPolarEncoder()
    if name.startswith("timm:"):
        return TimmEncoder(name, device=device, dtype=dtype)
    raise ValueError(f"encoder {name!r} is unknown{_close_to(name)}: {encoder_names_help()}")


def encoder_names_help() -> str:
    """The valid forms of an encoder's name."""
    return "use hog or hog_polar (no weights needed) or timm:<model>[@file.safetensors], as timm:eva02_large_patch14_448.mim_m38m_ft_in22k_in1k"


def encoder_folder(name: str) -> str:
    """A safe folder name for an encoder's embeddings; different names give different folders."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name.partition("@")[0]).strip(".-")
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _close_to(name: str) -> str:
    """A question after a name that nobody knows; timm is imported, for its names, only now."""
    if close := difflib.get_close_matches(name.lower(), ["hog", "hog_polar"], n=1):
        return f"; did you mean {close[0]}?"
    import timm

    # People forget the prefix, or write timm/<model> as the hub does.
    model = re.sub(r"^timm[/.\-_ ]+", "", name)
    close = difflib.get_close_matches(model.partition("@")[0].partition(".")[0], timm.list_models(), n=3, cutoff=0.7)
    return f"; did you mean {', '.join(f'timm:{match}' for match in close)}?" if close else ""


def _check_timm_name(model_name: str, name: str) -> None:
    import timm

    architecture, _, tag = model_name.partition(".")
    known = timm.list_models()
    if architecture not in known:
        close = difflib.get_close_matches(architecture, known, n=3)
        hint = f": did you mean {', '.join(close)}?" if close else "; timm.list_models() lists them"
        raise ValueError(f"encoder {name!r}: timm has no model {architecture!r}{hint}")
    tags = sorted(full.partition(".")[2] for full in timm.list_pretrained(architecture))
    if tag and tag not in tags:
        raise ValueError(f"encoder {name!r}: timm has no weights {tag!r} of {architecture}: choose one of {', '.join(tags) or '(none)'}")


def _pretrained(model_name: str, name: str) -> "torch.nn.Module":
    import timm

    try:
        return timm.create_model(model_name, pretrained=True, num_classes=0)
    except Exception as error:  # the hub's, the transport's and the system's errors have no common class; all mean that the weights did not come
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"encoder {name!r}: timm cannot get these weights ({reason}). Without a network, download the model's .safetensors file "
            f"elsewhere and name it: timm:{model_name}@/path/to/model.safetensors"
        ) from error


def _with_file(model_name: str, path: Path, name: str) -> "torch.nn.Module":
    """The model with the weights of a safetensors file, which must have all of them and, but for a classifier, no others."""
    import timm
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        raise ValueError(
            f"encoder {name!r}: {path} is no .safetensors file. Pickled weights (.pth, .pt, .bin) can run code and are never read: "
            "convert them with safetensors.torch.save_file where you trust them"
        )
    if not path.is_file():
        raise ValueError(f"encoder {name!r}: there is no file {path}")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"encoder {name!r}: {path} cannot be read as safetensors ({error}): fetch it again") from error
    model = timm.create_model(model_name, pretrained=False, num_classes=0)
    own = model.state_dict()
    classifiers: Any = model.pretrained_cfg.get("classifier") or ()
    prefixes = tuple(f"{layer}." for layer in ((classifiers,) if isinstance(classifiers, str) else classifiers))
    state = {key: value for key, value in state.items() if key in own or not key.startswith(prefixes)}
    problems = {
        "is missing": sorted(own.keys() - state.keys()),
        "does not belong to it": sorted(state.keys() - own.keys()),
        "has another shape": sorted(
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}" for key in own.keys() & state.keys() if own[key].shape != state[key].shape
        ),
    }
    told = [f"{', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''} {what}" for what, keys in problems.items() if keys]
    if told:
        raise ValueError(f"encoder {name!r}: {path} does not fit {model_name}: {'; '.join(told)}. Is it the file of this model, from timm?")
    model.load_state_dict(state)
    return model


def _weights_digest(model: "torch.nn.Module") -> str:
    import torch

    total = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        total.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]
