"""Random changes of training pictures: drawn with one generator a picture, applied in compiled code outside Python's lock.

Distributions and arithmetic are torchvision's on Pillow images (``RandomResizedCrop``, ``RandomHorizontalFlip``, ``RandomRotation``, ``ColorJitter``,
``RandomAdjustSharpness``), to the last bit where a picture is stored at its own size; tests compare. A picture's changes depend on its generator alone,
so neither on its neighbours nor on the number of workers or threads.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import no_type_check

import numpy as np
from jaxtyping import Float64, Int32, UInt8
from numba import njit

from cad_models.images.recipe import AugmentConfig

_CROP_ATTEMPTS = 10
_MIN_ASPECT, _MAX_ASPECT = 3 / 4, 4 / 3

# Columns of the parameters of a picture.
X, Y, WIDTH, HEIGHT, FLIP, ANGLE, FIRST, SECOND, THIRD, BRIGHTNESS, CONTRAST, SATURATION, SHARPNESS = range(13)

# Pillow's resize computes in integers of so many fractional bits.
_BITS = 32 - 8 - 2


def draw_parameters(config: AugmentConfig, width: int, height: int, rng: np.random.Generator) -> Float64[np.ndarray, "13"]:
    """What is done to one picture.

    Args:
        config: Resolved (`AugmentConfig.resolved`).
        width: Of the original picture, in pixels; with ``height`` the aspect and grid that crops are drawn in.

    Returns:
        ``X, Y, WIDTH, HEIGHT`` of the crop as shares of the picture, ``FLIP`` 0 or 1, ``ANGLE`` in degrees counter-clockwise, the order of
        brightness (0), contrast (1) and saturation (2) in ``FIRST, SECOND, THIRD``, and the factors; a factor of 1 changes nothing.
    """
    parameters = np.array([0, 0, 1, 1, 0, 0, 0, 1, 2, 1, 1, 1, 1], dtype=np.float64)
    if config.min_crop_area < 1:
        x, y, w, h = _draw_crop(config.min_crop_area, width, height, rng)
        parameters[:4] = x / width, y / height, w / width, h / height
    if config.flip_probability > 0:
        parameters[FLIP] = rng.random() < config.flip_probability
    if config.max_rotation_deg > 0:
        parameters[ANGLE] = rng.uniform(-config.max_rotation_deg, config.max_rotation_deg)
    spans = (config.brightness, config.contrast, config.saturation)
    if any(spans):
        parameters[FIRST : THIRD + 1] = rng.permutation(3)
        for column, span in zip((BRIGHTNESS, CONTRAST, SATURATION), spans, strict=True):
            parameters[column] = rng.uniform(max(0.0, 1 - span), 1 + span)
    if config.sharpness_probability > 0 and rng.random() < config.sharpness_probability:
        parameters[SHARPNESS] = config.sharpness
    return parameters


def _draw_crop(min_area: float, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, width and height in pixels (Szegedy et al., arXiv:1409.4842; the fallback is the largest centred crop of an allowed aspect)."""
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * rng.uniform(min_area, 1.0)
        aspect = math.exp(rng.uniform(math.log(_MIN_ASPECT), math.log(_MAX_ASPECT)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h
    w, h = width, height
    if width / height < _MIN_ASPECT:
        h = round(width / _MIN_ASPECT)
    elif width / height > _MAX_ASPECT:
        w = round(height * _MAX_ASPECT)
    return (width - w) // 2, (height - h) // 2, w, h


def draw_salt_pepper(max_share: float, size: int, rng: np.random.Generator) -> tuple[Int32[np.ndarray, " pixels"], UInt8[np.ndarray, " pixels"]]:
    """Positions (row by row) of the pixels of a ``size`` x ``size`` picture that become 0 or 255, and which; their share is drawn from 0 to ``max_share``."""
    count = int(rng.uniform(0, max_share) * size * size)
    positions = rng.choice(size * size, count, replace=False, shuffle=False).astype(np.int32)
    return positions, (rng.random(count) < 0.5).astype(np.uint8) * np.uint8(255)


def augmented(
    pixels: UInt8[np.ndarray, "batch stored stored 3"],
    sizes: Int32[np.ndarray, "batch 2"],
    image_size: int,
    config: AugmentConfig,
    rngs: Sequence[np.random.Generator],
    *,
    num_threads: int = 1,
) -> UInt8[np.ndarray, "batch 3 size size"]:
    """Training pictures.

    Args:
        pixels: Stored pictures, squeezed to squares.
        sizes: Original width and height of each, in pixels.
        image_size: Width and height of the result, in pixels.
        rngs: One generator a picture.
        num_threads: Changes the time only.
    """
    config = config.resolved()
    parameters = np.stack([draw_parameters(config, int(w), int(h), rng) for (w, h), rng in zip(sizes, rngs, strict=True)])
    out = transformed(pixels, parameters, image_size, num_threads=num_threads)
    if config.max_salt_pepper > 0:
        for picture, rng in zip(out, rngs, strict=True):
            positions, values = draw_salt_pepper(config.max_salt_pepper, image_size, rng)
            picture.reshape(3, -1)[:, positions] = values
    return out


def resized(pixels: UInt8[np.ndarray, "batch stored stored 3"], image_size: int, *, num_threads: int = 1) -> UInt8[np.ndarray, "batch 3 size size"]:
    """Evaluation pictures: antialiased bilinear, nothing random."""
    whole = np.tile(draw_parameters(AugmentConfig(preset="none").resolved(), 1, 1, np.random.default_rng(0)), (len(pixels), 1))
    return transformed(pixels, whole, image_size, num_threads=num_threads)


def transformed(
    pixels: UInt8[np.ndarray, "batch stored stored 3"], parameters: Float64[np.ndarray, "batch 13"], image_size: int, *, num_threads: int = 1
) -> UInt8[np.ndarray, "batch 3 size size"]:
    """Pictures changed as `draw_parameters` says."""
    out = np.empty((len(pixels), 3, image_size, image_size), dtype=np.uint8)
    pixels = np.ascontiguousarray(pixels)
    if num_threads <= 1 or len(pixels) < 2 * num_threads:
        _transform(pixels, parameters, out)
    else:
        bounds = np.linspace(0, len(pixels), num_threads + 1).astype(int)
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(lambda a, b: _transform(pixels[a:b], parameters[a:b], out[a:b]), bounds[:-1], bounds[1:]))
    return out


@njit(cache=True, nogil=True)
@no_type_check  # type checkers would wrap what numba must compile
def _transform(pixels, parameters, out):
    """Crop and resize, flip, rotate, colours, sharpness of each picture, in this order; ``out`` is channels first."""
    size = out.shape[2]
    cropped, other = np.empty((size, size, 3), np.uint8), np.empty((size, size, 3), np.uint8)
    for n in range(len(pixels)):
        p = parameters[n]
        stored = pixels.shape[1]
        _resize(pixels[n], p[X] * stored, p[Y] * stored, p[WIDTH] * stored, p[HEIGHT] * stored, cropped)
        if p[FLIP] > 0.5:
            cropped[:] = cropped[:, ::-1]
        picture = cropped
        if p[ANGLE] != 0.0:
            _rotate(cropped, p[ANGLE], other)
            picture = other
        for k in range(FIRST, THIRD + 1):
            which = int(p[k])
            factor = p[BRIGHTNESS + which]
            if factor != 1.0:
                if which == 0:
                    _brighten(picture, factor)
                elif which == 1:
                    _contrast(picture, factor)
                else:
                    _saturate(picture, factor)
        if p[SHARPNESS] != 1.0:
            _sharpen(picture, p[SHARPNESS], out[n])
        else:
            for c in range(3):
                for y in range(size):
                    for x in range(size):
                        out[n, c, y, x] = picture[y, x, c]


@njit(cache=True, nogil=True)
@no_type_check
def _taps(start, length, low, high, size):
    """First source pixel, number of source pixels and integer weights of each of ``size`` pixels, for a triangle filter over [start, start + length).

    Source pixels outside [low, high) do not count.
    """
    scale = length / size
    filter_scale = max(scale, 1.0)
    most = int(math.ceil(filter_scale)) * 2 + 1
    first, count = np.empty(size, np.int64), np.empty(size, np.int64)
    weights, values = np.zeros((size, most), np.int32), np.empty(most, np.float64)
    for i in range(size):
        center = start + (i + 0.5) * scale
        begin = max(int(center - filter_scale + 0.5), low)
        end = min(int(center + filter_scale + 0.5), high)
        total = 0.0
        for k in range(end - begin):
            values[k] = max(0.0, 1.0 - abs((k + begin - center + 0.5) / filter_scale))
            total += values[k]
        for k in range(end - begin):
            weights[i, k] = int(0.5 + values[k] / total * (1 << _BITS))
        first[i], count[i] = begin, end - begin
    return first, count, weights


@njit(cache=True, nogil=True)
@no_type_check
def _resize(source, x, y, width, height, out):
    """The box of ``source`` as ``out``, antialiased, rows then columns, each rounded to bytes."""
    size, stored = out.shape[0], source.shape[0]
    # A share of the picture times its size may miss a whole number by rounding.
    left, top = int(math.floor(x + 1e-6)), int(math.floor(y + 1e-6))
    right, bottom = min(stored, int(math.ceil(x + width - 1e-6))), min(stored, int(math.ceil(y + height - 1e-6)))
    if abs(width - size) < 1e-6 and abs(height - size) < 1e-6 and abs(x - left) < 1e-6 and abs(y - top) < 1e-6:
        out[:] = source[top:bottom, left:right]
        return
    half = 1 << (_BITS - 1)
    first, count, weights = _taps(x, width, left, right, size)
    rows = np.empty((bottom - top, size * 3), np.uint8)
    for row in range(bottom - top):
        line = source[top + row]
        for i in range(size):
            red = green = blue = half
            for k in range(count[i]):
                w, at = weights[i, k], first[i] + k
                red += line[at, 0] * w
                green += line[at, 1] * w
                blue += line[at, 2] * w
            rows[row, 3 * i], rows[row, 3 * i + 1], rows[row, 3 * i + 2] = red >> _BITS, green >> _BITS, blue >> _BITS
    first, count, weights = _taps(y, height, top, bottom, size)
    total = np.empty(size * 3, np.int32)
    flat = out.reshape(size, size * 3)
    for i in range(size):
        total[:] = half
        for k in range(count[i]):
            w = weights[i, k]
            line = rows[first[i] + k - top]
            for j in range(size * 3):
                total[j] += np.int32(line[j]) * w
        for j in range(size * 3):
            flat[i, j] = total[j] >> _BITS


@njit(cache=True, nogil=True)
@no_type_check
def _rotate(source, angle_deg, out):
    """Counter-clockwise about the centre, nearest pixel, black outside."""
    size = source.shape[0]
    angle = -math.radians(angle_deg % 360.0)
    # Rounded as Pillow does, so that the same pixels are nearest.
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    center = size / 2.0
    dx = cos * -center + sin * -center + center
    dy = -sin * -center + cos * -center + center
    # In 1/65536 of a pixel, as Pillow steps through the rows.
    along, across = _fixed(cos), _fixed(sin)
    start_x, start_y = _fixed(dx + cos * 0.5 + sin * 0.5), _fixed(dy - sin * 0.5 + cos * 0.5)
    for y in range(size):
        for x in range(size):
            sx, sy = (start_x + x * along + y * across) >> 16, (start_y - x * across + y * along) >> 16
            if 0 <= sx < size and 0 <= sy < size:
                out[y, x, 0], out[y, x, 1], out[y, x, 2] = source[sy, sx, 0], source[sy, sx, 1], source[sy, sx, 2]
            else:
                out[y, x, 0] = out[y, x, 1] = out[y, x, 2] = 0


@njit(cache=True, nogil=True, inline="always")
@no_type_check
def _fixed(value):
    return int(math.floor(value * 65536.0 + 0.5))


@njit(cache=True, nogil=True, inline="always")
@no_type_check
def _blend(degenerate, value, factor):
    """``degenerate`` + factor * difference, cut to a byte as Pillow does (in float32)."""
    mixed = np.float32(degenerate) + np.float32(factor) * np.float32(np.int32(value) - np.int32(degenerate))
    return np.uint8(min(max(mixed, np.float32(0.0)), np.float32(255.0)))


@njit(cache=True, nogil=True, inline="always")
@no_type_check
def _grey(red, green, blue):
    return (np.int32(red) * 19595 + np.int32(green) * 38470 + np.int32(blue) * 7471 + 0x8000) >> 16


@njit(cache=True, nogil=True)
@no_type_check
def _brighten(picture, factor):
    flat = picture.reshape(-1)
    table = np.empty(256, np.uint8)
    for value in range(256):
        table[value] = _blend(0, value, factor)
    for i in range(len(flat)):
        flat[i] = table[flat[i]]


@njit(cache=True, nogil=True)
@no_type_check
def _contrast(picture, factor):
    pixels = picture.reshape(-1, 3)
    total = 0
    for i in range(len(pixels)):
        total += _grey(pixels[i, 0], pixels[i, 1], pixels[i, 2])
    mean = int(total / len(pixels) + 0.5)
    flat = picture.reshape(-1)
    table = np.empty(256, np.uint8)
    for value in range(256):
        table[value] = _blend(mean, value, factor)
    for i in range(len(flat)):
        flat[i] = table[flat[i]]


@njit(cache=True, nogil=True)
@no_type_check
def _saturate(picture, factor):
    pixels = picture.reshape(-1, 3)
    for i in range(len(pixels)):
        grey = _grey(pixels[i, 0], pixels[i, 1], pixels[i, 2])
        for c in range(3):
            pixels[i, c] = _blend(grey, pixels[i, c], factor)


@njit(cache=True, nogil=True)
@no_type_check
def _sharpen(picture, factor, out):
    """Away from the smoothed picture (3 x 3, centre 5, sum 13); the rim stays. ``out`` is channels first."""
    size = picture.shape[0]
    for c in range(3):
        for y in range(size):
            for x in range(size):
                value = np.int32(picture[y, x, c])
                if 0 < y < size - 1 and 0 < x < size - 1:
                    total = 4 * value
                    for j in range(y - 1, y + 2):
                        total += np.int32(picture[j, x - 1, c]) + np.int32(picture[j, x, c]) + np.int32(picture[j, x + 1, c])
                    smooth = int(np.float32(total) / np.float32(13.0) + np.float32(0.5))
                    out[c, y, x] = _blend(smooth, value, factor)
                else:
                    out[c, y, x] = value
