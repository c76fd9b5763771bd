"""Raw pictures -> rows, rows -> model-ready arrays, arrays -> batches, for the images task. No torch until a batch is made."""

import hashlib
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8
from PIL import Image

from cad_models.common.images import BadImage, decode_image
from cad_models.dataset import DatasetError, tensor_field, to_numpy
from cad_models.images.recipe import ImagesRecipe
from cad_models.images.sources import read_uri
from cad_models.task import LABEL_INDEX, Columns, Inspection, RawItem, Reject, Row

if TYPE_CHECKING:
    import torch

# A picture too flat or long to crop from is a mistake of whoever cut it.
_MIN_SIDE = 4


# --- one picture --------------------------------------------------------------------------------------------------------------------------
def read_picture(item: RawItem) -> tuple[UInt8[np.ndarray, "height width 3"], str]:
    """A picture's pixels, upright (EXIF), RGB on white, and the SHA-256 of its source bytes.

    Raises:
        BadImage: the file is not a usable picture.
        OSError: it cannot be read.
    """
    if item.uri.startswith("builtin:"):
        from cad_models.images.patterns import generate_picture

        index, seed = map(int, item.uri.removeprefix("builtin:").split(":"))
        pixels = generate_picture(index, seed)
        return pixels, hashlib.sha256(pixels.tobytes()).hexdigest()
    data = read_uri(item.uri)
    pixels = decode_image(data)
    if min(pixels.shape[:2]) < _MIN_SIDE:
        raise BadImage("unsupported_image", f"{pixels.shape[1]} x {pixels.shape[0]} pixels: a side of at least {_MIN_SIDE} is needed")
    return pixels, hashlib.sha256(data).hexdigest()


def rejected(error: Exception) -> Reject:
    """The reject for what `read_picture` raises."""
    if isinstance(error, BadImage):
        return Reject(reason="bad_image", detail=f"{error.reason}: {error.detail}")
    return Reject(reason="unreadable", detail=str(error))


def inspect_item(item: RawItem) -> Inspection | Reject:
    """Decode a picture once: pictures of equal pixels are duplicates, whatever their files; the class decides the stratum."""
    try:
        pixels, sha256 = read_picture(item)
    except (BadImage, OSError) as error:
        return rejected(error)
    digest = hashlib.sha256(np.array(pixels.shape).tobytes() + pixels.tobytes()).digest()
    return Inspection(
        sha256=sha256,
        size=pixels.shape[0] * pixels.shape[1],
        complexity=class_number(item.label),
        # Whole numbers below 2**48, which float64 holds exactly.
        signature=np.array([int.from_bytes(digest[i : i + 6], "big") for i in range(0, 30, 6)], dtype=np.float64),
        inputs=hashlib.sha256(item.label.encode()).hexdigest(),
    )


def class_number(label: str) -> float:
    """A positive number of its own for each class: splits stratified by "complexity" are then stratified by class."""
    return 1.0 + int.from_bytes(hashlib.sha256(label.encode()).digest()[:4], "big")


def squeezed(pixels: UInt8[np.ndarray, "height width 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The whole picture as a square, antialiased bilinear, as ``torchvision.transforms.Resize((size, size))`` on a Pillow image."""
    return np.array(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))


def prepare_item(item: RawItem, recipe: ImagesRecipe) -> Row | Reject:
    """Decode and squeeze a picture, once for all epochs."""
    try:
        pixels, sha256 = read_picture(item)
    except (BadImage, OSError) as error:
        return rejected(error)
    stored = squeezed(pixels, recipe.data.stored_size)
    height, width = pixels.shape[:2]
    return Row(
        objects={"pixels": stored, "width": width, "height": height, "label": item.label, "sha256": sha256},
        views={"image": thumbnail(pixels, 128)},
    )


def thumbnail(pixels: UInt8[np.ndarray, "height width 3"], size: int) -> bytes:
    """A JPEG of at most ``size`` pixels a side, for people."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((size, size))
    sink = io.BytesIO()
    picture.save(sink, format="JPEG", quality=85)
    return sink.getvalue()


def schemas(recipe: ImagesRecipe) -> dict[str, pa.Schema]:
    """Columns that :func:`prepare_item` fills."""
    size = recipe.data.stored_size
    objects = pa.schema([tensor_field("pixels", "uint8", (size, size, 3)), ("width", pa.int64()), ("height", pa.int64())])
    return {"objects": objects, "views": pa.schema([("image", pa.binary())])}


# --- training -----------------------------------------------------------------------------------------------------------------------------
def examples(tables: dict[str, pa.Table], recipe: ImagesRecipe) -> Columns:
    """``pixels`` uint8 [n, stored, stored, 3], ``size`` int32 [n, 2] (original width and height), ``label`` int64 [n]."""
    objects = tables["objects"]
    pixels = to_numpy(objects, "pixels")
    if pixels.shape[1] < recipe.data.image_size:
        raise DatasetError(
            f"--data.image-size {recipe.data.image_size} is more than the {pixels.shape[1]} pixels that the dataset stores: prepare it again with "
            f"--data.stored-size {recipe.data.image_size} or more, or train with a smaller --data.image-size"
        )
    size = np.stack([objects.column(name).to_numpy() for name in ("width", "height")], axis=1).astype(np.int32)
    return {"pixels": pixels, "size": size, "label": objects.column(LABEL_INDEX).to_numpy().astype(np.int64)}


def collate(columns: Columns, recipe: ImagesRecipe, *, rngs: Sequence[np.random.Generator] | None) -> "dict[str, torch.Tensor]":
    """``pixels`` uint8 [n, 3, size, size] (bytes: a quarter of the traffic; the learner normalises) and ``label`` int64 [n]."""
    import torch

    from cad_models.images.augment import augmented, resized

    data, num_threads = recipe.data, torch.get_num_threads()
    if rngs is None:
        pixels = resized(columns["pixels"], data.image_size, num_threads=num_threads)
    else:
        pixels = augmented(columns["pixels"], columns["size"], data.image_size, data.augment, rngs, num_threads=num_threads)
    return {"pixels": torch.from_numpy(pixels), "label": torch.from_numpy(np.array(columns["label"]))}
