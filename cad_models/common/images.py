"""Images from strangers: safe decoding, the foreground, a square crop. Numpy, Pillow; scipy late.

`prepare_image` is the one path by which query images and gallery views reach an encoder, in embedding, evaluation and inference alike.
"""

import io

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_REASONS: tuple[str, ...] = (
    "empty_file",
    "lfs_pointer",
    "not_an_image",
    "unsupported_image",
    "image_too_large",
    "truncated_image",
    "corrupt_image",
)
"""Why `decode_image` refuses; the reasons of `BadImage`."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""Raster formats that are read; everything else Pillow knows stays closed (EPS would start a program)."""

MAX_PIXELS = 64_000_000

_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"GIF87a", b"GIF89a")

# A pixel of the object differs from the background by more than this in one channel (of 255): above JPEG's ringing on a white page.
_MIN_CONTRAST = 16
# Border pixels within this of the border's median colour are background; the rest is an object that the picture cuts off.
_BORDER_TOLERANCE = 40
# Pieces smaller than this share of the largest are dust or letters, gaps smaller than this share of the object are gloss.
_SPECK_SHARE = 0.01
# The foreground is looked for in pictures of at most this many pixels a side (or four times the wanted size).
_MAX_SIDE = 1024


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
    """The picture in a PNG, JPEG, WEBP, BMP, TIFF or GIF file (first frame or page), upright (EXIF), in RGB on white.

    Transparency is composited on white; palette, grey, CMYK and 16-bit images are converted; numbers of 32 bits are taken as 0..1, 0..255
    or 0..65535, whichever holds them.

    Args:
        max_pixels: Larger pictures are refused by their header, before anything is decompressed. Pillow's own limit, 178 million, stays.

    Raises:
        BadImage: not such a file, broken, or too large.
    """
    if not data:
        raise BadImage("empty_file", "the file has no bytes")
    if data.startswith(b"version https://git-lfs"):
        raise BadImage("lfs_pointer", "a Git LFS pointer, not the picture itself: run `git lfs pull` where it came from")
    # Whatever a decoder raises on bytes from a stranger (OSError, SyntaxError, struct.error, zlib.error, MemoryError ...) speaks of the bytes.
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        if data.startswith(_SIGNATURES):
            raise BadImage("corrupt_image", f"it begins like an image, but its header ({len(data)} bytes in the file) cannot be read") from error
        raise BadImage("not_an_image", f"it begins with the bytes {data[:8]!r}: give {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage("image_too_large", str(error)) from error
    except Exception as error:
        raise BadImage("corrupt_image", f"its header cannot be read: {_first_line(error)}") from error
    width, height = picture.size
    if width * height > max_pixels:
        raise BadImage("image_too_large", f"{width} x {height} pixels are more than {max_pixels:,}: scale it down")
    try:
        picture.load()
        return _rgb_on_white(ImageOps.exif_transpose(picture))
    except BadImage:
        raise
    except Exception as error:
        told = _first_line(error)
        cut = isinstance(error, EOFError) or any(word in told.lower() for word in ("truncated", "unexpected end", "not enough", "premature"))
        raise BadImage("truncated_image" if cut else "corrupt_image", f"its {width} x {height} pixels cannot be decoded: {told}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _rgb_on_white(picture: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    mode = picture.mode
    if mode == "F" or mode.startswith("I"):
        # Pillow would clip these to 255.
        values = np.nan_to_num(np.asarray(picture).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        peak = values.max(initial=0.0)
        if mode.startswith("I;16"):
            top = 65535.0
        else:
            top = next((limit for limit in (1.0 if mode == "F" else 255.0, 255.0, 65535.0) if peak <= limit), peak)
        grey = np.rint(np.clip(values / top, 0.0, 1.0) * 255.0).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if mode in ("LAB", "HSV"):
        raise BadImage("unsupported_image", f"its colours are {mode}: save it as RGB or grey")
    if mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info:
        layer = picture.convert("LA").convert("RGBA") if mode == "La" else picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return np.array(picture.convert("RGB"))


def encode_png(image: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """A PNG file; the same image gives the same bytes (with the same Pillow). Fast rather than small."""
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, format="PNG", compress_level=1)
    return sink.getvalue()


def foreground_mask(image: UInt8[np.ndarray, "height width 3"]) -> Bool[np.ndarray, "height width"]:
    """Where the object is: pixels unlike the background, without specks.

    The background is a colour gradient (a plane in each channel) fitted to the border, so a lit or vignetted backdrop is one as well. Openings
    that show it are not part of the object; small gaps are, for they are gloss. Where the border is no backdrop (a photo of a full scene) or
    nothing stands out from it, the whole image is foreground. Deterministic.
    """
    height, width = image.shape[:2]
    whole = np.ones((height, width), dtype=bool)
    fitted = _background(image)
    if fitted is None:
        return whole
    background, spread = fitted
    mask = _without_specks(_distance(image, background) > max(_MIN_CONTRAST, spread))
    return mask if mask.any() else whole


def _background(image: np.ndarray) -> tuple[np.ndarray, float] | None:
    """Colours of the backdrop, float32 broadcastable to the image, and how far its own pixels lie from them; None without a backdrop."""
    height, width = image.shape[:2]
    border = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]]).astype(np.float32)
    distance = _distance(border, np.median(border, axis=0))
    plain = distance <= _BORDER_TOLERANCE
    if plain.mean() < 0.5:
        return None
    if distance[plain].max() <= 1:
        return np.median(border[plain], axis=0), 0.0  # a plain page, as nearly always: nothing to fit
    y, x = np.linspace(-1, 1, height, dtype=np.float32), np.linspace(-1, 1, width, dtype=np.float32)
    ys = np.concatenate([np.full(width, -1), np.full(width, 1), y[1:-1], y[1:-1]])
    xs = np.concatenate([x, x, np.full(max(0, height - 2), -1), np.full(max(0, height - 2), 1)])
    terms = np.stack([np.ones_like(xs), ys, xs], axis=1)[plain]
    plane = np.linalg.lstsq(terms.astype(np.float64), border[plain].astype(np.float64), rcond=None)[0].astype(np.float32)
    residual = _distance(border[plain], terms.astype(np.float32) @ plane)
    background = plane[0] + y[:, None, None] * plane[1] + x[None, :, None] * plane[2]
    # Noise and texture of the backdrop: twice what nine of ten border pixels show.
    return background, 2.0 * float(np.quantile(residual, 0.9))


def _distance(pixels: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """The largest difference among the three channels, float32. By channel: numpy is slow at reducing an axis of three."""
    channels = (np.abs(pixels[..., c] - colors[..., c].astype(np.float32)) for c in range(3))
    return np.maximum(np.maximum(next(channels), next(channels)), next(channels))


def _without_specks(mask: np.ndarray) -> np.ndarray:
    """The mask without its small pieces and small gaps."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return mask
    # Beyond the mask's box, and a rim around it, there is nothing to tell apart: what reaches the rim is the outside.
    box = (slice(max(0, rows[0] - 1), rows[-1] + 2), slice(max(0, columns[0] - 1), columns[-1] + 2))
    cleaned = np.zeros_like(mask)
    cleaned[box] = _cleaned(mask[box])
    return cleaned


def _cleaned(mask: np.ndarray) -> np.ndarray:
    from scipy import ndimage

    pieces, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if count > 1:
        sizes = np.bincount(pieces.ravel(), minlength=count + 1)
        sizes[0] = 0
        mask = (sizes >= _SPECK_SHARE * sizes.max())[pieces] & mask
    gaps, count = ndimage.label(~mask)
    if count > 1:
        sizes = np.bincount(gaps.ravel(), minlength=count + 1)
        small = sizes <= _SPECK_SHARE * mask.sum()
        small[0] = False
        small[np.concatenate([gaps[0], gaps[-1], gaps[:, 0], gaps[:, -1]])] = False
        mask = mask | small[gaps]
    return mask


def square_crop(
    image: UInt8[np.ndarray, "height width 3"],
    mask: Bool[np.ndarray, "height width"],
    *,
    size: int,
    margin: float = 0.05,
    background: int = 255,
) -> UInt8[np.ndarray, "size size 3"]:
    """The square around the mask, centred on its box, everything outside the mask painted over. Antialiased when shrinking, bicubic when enlarging.

    Args:
        size: Width and height of the result, in pixels.
        margin: Empty rim left and right (or above and below) of the mask's longer side, as a share of ``size``: 0 to below 0.5.
        background: Grey value, 0..255, outside the mask.

    Raises:
        ValueError: the mask is empty, or ``margin`` out of range.
    """
    if not 0.0 <= margin < 0.5:
        raise ValueError(f"margin is {margin}: give a share from 0 to below 0.5")
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        raise ValueError("the mask is empty: there is nothing to crop to")
    box = (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
    height, width = box[0].stop - box[0].start, box[1].stop - box[1].start
    side = max(height, width) / (1.0 - 2.0 * margin)
    # Only the box enters the canvas, so the result does not depend on where in the picture the object was.
    length = int(np.ceil(side)) + 2
    top, left = (length - height) // 2, (length - width) // 2
    canvas = np.full((length, length, 3), background, dtype=np.uint8)
    np.copyto(canvas[top : top + height, left : left + width], image[box], where=mask[box][:, :, None])
    x, y = left + (width - side) / 2.0, top + (height - side) / 2.0
    return np.array(Image.fromarray(canvas).resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side)))


def prepare_image(image: UInt8[np.ndarray, "height width 3"], *, size: int, margin: float = 0.05) -> UInt8[np.ndarray, "size size 3"]:
    """The object alone on a white square: how every image, query or gallery view, is shown to an encoder.

    Args:
        size: Width and height of the result, in pixels.
        margin: Empty rim around the object, as a share of ``size``.
    """
    image = _reduced(image, size)
    return square_crop(image, foreground_mask(image), size=size, margin=margin)


def _reduced(image: np.ndarray, size: int) -> np.ndarray:
    excess = max(image.shape[:2]) // max(_MAX_SIDE, 4 * size)
    return np.array(Image.fromarray(image).reduce(excess)) if excess > 1 else image


def turned_squares(image: UInt8[np.ndarray, "height width 3"], count: int, *, size: int) -> list[UInt8[np.ndarray, "size size 3"]]:
    """The object of a picture, turned in its plane by ``360 / count`` degrees at a time (counter-clockwise), each alone on a white square.

    The first is what :func:`prepare_image` gives. Foreground and background are told apart once, in the picture as it is.

    Args:
        size: Width and height of the results, in pixels.
    """
    squares = [prepare_image(image, size=size)]
    if count == 1:
        return squares
    # Twice the wanted size: turning it costs little sharpness, and little time.
    mask = foreground_mask(_reduced(image, size))
    upright = square_crop(_reduced(image, size), mask, size=2 * size)
    shape = square_crop(np.repeat((255 * ~mask).astype(np.uint8)[:, :, None], 3, axis=2), mask, size=2 * size)
    for turn in range(1, count):
        degrees = 360.0 * turn / count
        turned, outside = (
            np.array(Image.fromarray(picture).rotate(degrees, Image.Resampling.BICUBIC, expand=True, fillcolor=(255, 255, 255)))
            for picture in (upright, shape)
        )
        squares.append(square_crop(turned, outside[:, :, 0] < 128, size=size))
    return squares
