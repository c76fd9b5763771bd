"""``builtin:N``: generated pictures of seven kinds of figure, seeded. Learnable, not trivial: any colour, size, place and turn, cluttered backgrounds, weak
contrast, salt-and-pepper noise on half of them; classes are of unequal size, and some differ by a detail only (disc and ring, square and frame)."""

import io
import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFilter

CLASSES = ("cross", "disc", "frame", "ring", "square", "star", "triangle")
_SHARES = (0.10, 0.22, 0.10, 0.15, 0.18, 0.10, 0.15)
_SCALE = 3  # drawn larger, then reduced: smooth edges


def class_of(index: int, seed: int) -> str:
    """The class of picture ``index``, without drawing it."""
    return CLASSES[int(_rng(index, seed).choice(len(CLASSES), p=_SHARES))]


def generate_picture(index: int, seed: int, *, max_noise: float = 0.1) -> UInt8[np.ndarray, "height width 3"]:
    """Picture ``index``: 112 to 192 pixels a side, not always square. The same arguments give the same pixels.

    Args:
        max_noise: Largest share of pixels made black or white.
    """
    rng = _rng(index, seed)
    name = CLASSES[int(rng.choice(len(CLASSES), p=_SHARES))]
    height, width = (int(v) for v in rng.integers(112, 193, 2))
    picture = _background(width, height, rng)
    behind = np.asarray(picture.resize((1, 1), Image.Resampling.BOX))[0, 0].astype(float)
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(1, 5))):  # clutter: strokes of any colour
        (x0, x1), (y0, y1) = rng.uniform(0, width, 2) * _SCALE, rng.uniform(0, height, 2) * _SCALE
        draw.line((x0, y0, x1, y1), fill=tuple(int(v) for v in rng.integers(0, 256, 3)), width=int(rng.integers(1, 4) * _SCALE))
    color = rng.integers(0, 256, 3).astype(float)
    while np.abs(color - behind).max() < 80:
        color = rng.integers(0, 256, 3).astype(float)
    radius = rng.uniform(0.22, 0.42) * min(width, height)
    x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
    _draw_figure(picture, name, x * _SCALE, y * _SCALE, radius * _SCALE, rng.uniform(0, 2 * math.pi), tuple(int(v) for v in color), rng)
    picture = picture.resize((width, height), Image.Resampling.BOX)
    if rng.random() < 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 1.5))))
    pixels = np.array(picture)
    share = rng.uniform(0, max_noise) if rng.random() < 0.5 else 0.0
    noisy = rng.random((height, width)) < share
    pixels[noisy] = rng.integers(0, 2, (int(noisy.sum()), 1)) * 255
    return pixels


def encoded_picture(index: int, seed: int, *, quality: int = 92) -> bytes:
    """:func:`generate_picture` as a JPEG file."""
    sink = io.BytesIO()
    Image.fromarray(generate_picture(index, seed)).save(sink, format="JPEG", quality=quality)
    return sink.getvalue()


def _rng(index: int, seed: int) -> np.random.Generator:
    return np.random.default_rng((seed, index))


def _background(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Soft blotches of two or more colours, _SCALE times as large as wanted."""
    cells = int(rng.integers(2, 6))
    base, spread = rng.uniform(40, 215, 3), rng.uniform(3, 20)
    colors = np.clip(base + rng.normal(0, spread, (cells, cells, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(colors).resize((width * _SCALE, height * _SCALE), Image.Resampling.BICUBIC)


def _draw_figure(
    picture: Image.Image, name: str, x: float, y: float, radius: float, turn: float, color: tuple[int, ...], rng: np.random.Generator
) -> None:
    hole = rng.uniform(0.45, 0.7)
    mask = Image.new("L", picture.size, 0)
    draw = ImageDraw.Draw(mask)

    def polygon(points: list[tuple[float, float]], fill: int) -> None:
        draw.polygon([(x + px * math.cos(turn) - py * math.sin(turn), y + px * math.sin(turn) + py * math.cos(turn)) for px, py in points], fill=fill)

    def disc(r: float, fill: int) -> None:
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)

    def square(r: float, fill: int) -> None:
        polygon([(-r, -r), (r, -r), (r, r), (-r, r)], fill)

    if name in ("disc", "ring"):
        disc(radius, 255)
        if name == "ring":
            disc(radius * hole, 0)
    elif name in ("square", "frame"):
        square(radius * 0.85, 255)
        if name == "frame":
            square(radius * 0.85 * hole, 0)
    elif name == "cross":
        arm = radius * rng.uniform(0.2, 0.4)
        polygon([(-radius, -arm), (radius, -arm), (radius, arm), (-radius, arm)], 255)
        polygon([(-arm, -radius), (arm, -radius), (arm, radius), (-arm, radius)], 255)
    else:
        corners = 3 if name == "triangle" else 5
        inner = rng.uniform(0.4, 0.5)
        points = []
        for k in range(corners):
            angle = 2 * math.pi * k / corners
            points.append((radius * math.cos(angle), radius * math.sin(angle)))
            if name == "star":
                between = angle + math.pi / corners
                points.append((radius * inner * math.cos(between), radius * inner * math.sin(between)))
        polygon(points, 255)
    picture.paste(color, (0, 0), mask)
