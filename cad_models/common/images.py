"""Images from strangers: safe decoding, the foreground, a square crop. Numpy and Pillow; scipy late.

`prepare_image` is the one path by which query images and gallery views reach an encoder, in embedding, evaluation and inference alike.
"""

import io
import struct
import warnings

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

IMAGE_REASONS: tuple[str, ...] = ("empty_file", "lfs_pointer", "not_an_image", "truncated_image", "image_too_large", "unsupported_image")
"""Why `decode_image` refuses; the reasons of `BadImage`."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""Raster formats that are read; everything else Pillow knows stays closed (EPS would start a program)."""

MAX_PIXELS = 64_000_000

# Distance in RGB (of 441 at most) from which a pixel differs from the background: above JPEG's ringing on a white page.
_BACKGROUND_DISTANCE = 24.0
# Larger pictures are shrunk by a whole factor before anything else is done with them; four times what the largest encoder sees.
_LARGEST_SIDE = 2048
# Specks smaller than this share of the largest piece are dust, not parts of the object.
_SPECK_SHARE = 0.01


class BadImage(ValueError):
    """An image that cannot be used.

    Attributes:
        reason: One of `IMAGE_REASONS`.
        detail: What was wrong, for people.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "height width 3"]:
    """The picture in a PNG, JPEG, WEBP, BMP, TIFF or GIF (first frame) file, upright (EXIF), as RGB on white.

    Transparency is composited on white; 16-bit, palette, grey and CMYK images are converted. Colour profiles are not applied.

    Args:
        max_pixels: Larger pictures are refused by their header, before anything is decompressed.

    Raises:
        BadImage: not such a file, broken, or too large.
    """
    if not data:
        raise BadImage("empty_file", "the file has no bytes")
    if data.startswith(b"version https://git-lfs"):
        raise BadImage("lfs_pointer", "a Git LFS pointer, not the picture itself: run `git lfs pull` where it came from")
    try:
        with warnings.catch_warnings():
            # Pillow warns of bombs at its own limit; ours is checked below.
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise BadImage("not_an_image", f"no {', '.join(FORMATS)} begins with the bytes {data[:8]!r}") from error
    except Image.DecompressionBombError as error:
        raise BadImage("image_too_large", str(error)) from error
    except (OSError, ValueError, SyntaxError, struct.error, OverflowError, MemoryError, EOFError, KeyError, IndexError, TypeError) as error:
        raise BadImage("truncated_image", f"its header cannot be read: {error}") from error
    width, height = picture.size
    if width * height > max_pixels:
        raise BadImage("image_too_large", f"{width} x {height} pixels are more than {max_pixels:,}")
    if width < 1 or height < 1:
        raise BadImage("not_an_image", f"it is {width} x {height} pixels large")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture.load()
            picture = ImageOps.exif_transpose(picture)
            return _on_white(picture)
    except Image.DecompressionBombError as error:
        raise BadImage("image_too_large", str(error)) from error
    except (OSError, ValueError, SyntaxError, struct.error, OverflowError, MemoryError, EOFError, KeyError, IndexError, TypeError) as error:
        raise BadImage("truncated_image", f"its picture cannot be decoded: {error}") from error


def _on_white(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, dtype=np.float64)
        # 16-bit files use the whole range; Pillow would clip them to white.
        top = (
            65535.0
            if picture.mode.startswith("I") and values.max(initial=0) > 255
            else 255.0
            if picture.mode != "F"
            else max(values.max(), 1e-9)
        )
        grey = np.clip(values / top * 255, 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, layer)
    return np.array(picture.convert("RGB"))


def encode_png(image: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """A PNG file; the same image gives the same bytes."""
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, format="PNG", compress_level=1)
    return sink.getvalue()


def foreground_mask(image: UInt8[np.ndarray, "height width 3"]) -> Bool[np.ndarray, "height width"]:
    """Where the object is: pixels unlike the border's colour, holes filled, specks dropped.

    The background is the median colour of the one-pixel border. Where nothing (or nearly everything at the border) differs from it, as in a photo
    with a busy background, the whole image counts as foreground.
    """
    from scipy import ndimage

    height, width = image.shape[:2]
    border = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]]).astype(np.int32)
    background = np.median(border, axis=0)
    if np.mean(_distance(border, background) > _BACKGROUND_DISTANCE) > 0.5:
        return np.ones((height, width), dtype=bool)
    mask = _distance(image.astype(np.int32), background) > _BACKGROUND_DISTANCE
    if not mask.any():
        return np.ones((height, width), dtype=bool)
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if count > 1:
        sizes = np.bincount(labels.ravel())[1:]
        kept = np.flatnonzero(sizes >= _SPECK_SHARE * sizes.max()) + 1
        if len(kept) < count:
            mask = np.isin(labels, kept)
    return ndimage.binary_fill_holes(mask)


def _distance(pixels: np.ndarray, color: np.ndarray) -> np.ndarray:
    return np.sqrt(((pixels - color) ** 2).sum(axis=-1))


def square_crop(
    image: UInt8[np.ndarray, "height width 3"], mask: Bool[np.ndarray, "height width"], *, size: int, margin: float = 0.05
) -> UInt8[np.ndarray, "size size 3"]:
    """The square around the mask, centred on its bounding box, the background outside the mask's box filled with the border's colour.

    Args:
        size: Width and height of the result, in pixels.
        margin: Empty rim on each side, as a share of the result's width.

    Raises:
        ValueError: the mask is empty.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        raise ValueError("the mask is empty: there is nothing to crop to")
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    side = max(bottom - top, right - left) / (1 - 2 * margin)
    center_y, center_x = (top + bottom) / 2, (left + right) / 2
    y, x = int(np.floor(center_y - side / 2)), int(np.floor(center_x - side / 2))
    length = max(1, int(np.ceil(side)))
    canvas = np.empty((length, length, 3), dtype=np.uint8)
    border = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
    canvas[:] = np.median(border, axis=0).astype(np.uint8)
    y0, y1, x0, x1 = max(0, y), min(image.shape[0], y + length), max(0, x), min(image.shape[1], x + length)
    canvas[y0 - y : y1 - y, x0 - x : x1 - x] = image[y0:y1, x0:x1]
    if length == size:
        return canvas
    # Antialiased when shrinking; bicubic when enlarging.
    return np.array(Image.fromarray(canvas).resize((size, size), Image.Resampling.BICUBIC))


def prepare_image(image: UInt8[np.ndarray, "height width 3"], *, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Foreground mask, then square crop: how every image, query or gallery view, is shown to an encoder.

    Pictures with a side beyond 2,048 pixels are shrunk first: a photograph's mask would take gigabytes, and the square around a picture
    of 20,000 x 10 pixels far more.
    """
    factor = -(-max(image.shape[:2]) // _LARGEST_SIDE)
    if factor > 1:
        image = np.array(Image.fromarray(image).reduce(factor))
    return square_crop(image, foreground_mask(image), size=size)


# Pillow must never fill in what a truncated file lacks.
ImageFile.LOAD_TRUNCATED_IMAGES = False
