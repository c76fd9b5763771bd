"""Seeded changes of a picture, as a user's query differs from a gallery view: turned, badly boxed, drawn with other lines. Numpy, Pillow.

They come before `cad_models.common.images.prepare_image`, so that what follows a change is what follows the reading of a user's file.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cad_models.common.images import foreground_mask


@dataclass(frozen=True, kw_only=True)
class PictureChange:
    """A random change of a picture. Values, picklable: what it is stands in its ``repr``.

    Raises ValueError for values out of range.
    """

    max_roll_deg: float = 0.0
    """In-plane rotation, drawn from ± this, 0 to 180 (180 = free); the corners are filled with the colour of the border."""
    max_box_change: float = 0.0
    """The picture is cut to the square around the object with its side scaled by a factor from 1 ± this and its centre moved, along each axis, by at
    most half of this share of the side: 0.3 at its worst cuts 30 % of the object off. 0 to below 1; 0 = the picture is not cut."""
    max_gamma: float = 1.0
    """Grey values go to the power of a factor drawn log-uniformly from [1 / max_gamma, max_gamma]; 1 = off."""
    change_lines: bool = False
    """Dark lines become one pixel thicker on each side, or thinner, or stay: a third of the pictures each."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_roll_deg <= 180:
            raise ValueError(f"max_roll_deg is {self.max_roll_deg}: give 0 to 180")
        if not 0 <= self.max_box_change < 1:
            raise ValueError(f"max_box_change is {self.max_box_change}: give 0 to below 1")
        if not self.max_gamma >= 1:
            raise ValueError(f"max_gamma is {self.max_gamma}: give 1 or more")

    def __call__(self, image: UInt8[np.ndarray, "_ _ 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "_ _ 3"]:
        """The changed picture, of another size where it was turned or cut; the same generator state gives the same bytes."""
        if self.change_lines:
            image = _redrawn(image, int(rng.integers(3)))
        if self.max_gamma > 1:
            power = float(np.exp(rng.uniform(-1, 1) * np.log(self.max_gamma)))
            image = np.rint(255 * (np.arange(256) / 255) ** power).astype(np.uint8)[image]
        if self.max_roll_deg > 0:
            image = turned(image, float(rng.uniform(-self.max_roll_deg, self.max_roll_deg)))
        if self.max_box_change > 0:
            scale = 1.0 + rng.uniform(-self.max_box_change, self.max_box_change)
            right, down = rng.uniform(-0.5, 0.5, 2) * self.max_box_change
            image = boxed(image, scale=float(scale), right=float(right), down=float(down))
        return image


def turned(image: UInt8[np.ndarray, "height width 3"], angle_deg: float) -> UInt8[np.ndarray, "_ _ 3"]:
    """The picture turned counter-clockwise, whole: as large as it needs to be, its corners filled with the border's median colour."""
    picture = Image.fromarray(image)
    return np.array(picture.rotate(angle_deg, resample=Image.Resampling.BILINEAR, expand=True, fillcolor=_border_colour(image)))


def boxed(image: UInt8[np.ndarray, "height width 3"], *, scale: float, right: float, down: float) -> UInt8[np.ndarray, "side side 3"]:
    """The picture cut to a square box that misses the object's own.

    Args:
        scale: Side of the box in sides of the smallest square around the object.
        right: Shift of the box's centre in the same unit.
        down: The same, downwards.
    """
    mask = foreground_mask(image)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    tight = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    side = max(1, round(scale * tight))
    top = round((rows[0] + rows[-1] + 1 - side) / 2 + down * tight)
    left = round((columns[0] + columns[-1] + 1 - side) / 2 + right * tight)
    cut = np.empty((side, side, 3), dtype=np.uint8)
    cut[:] = _border_colour(image)  # where the box reaches beyond the picture
    y, x = slice(max(0, top), min(len(image), top + side)), slice(max(0, left), min(image.shape[1], left + side))
    if y.start < y.stop and x.start < x.stop:
        cut[y.start - top : y.stop - top, x.start - left : x.stop - left] = image[y, x]
    return cut


def _redrawn(image: np.ndarray, how: int) -> np.ndarray:
    if how == 0:
        return image
    # A minimum spreads what is dark, a maximum what is light; over 3 x 3 pixels, first down, then across. (Pillow's filters sort, 50 times slower.)
    extreme = np.minimum if how == 1 else np.maximum
    result = image.copy()
    extreme(result[1:], image[:-1], out=result[1:])
    extreme(result[:-1], image[1:], out=result[:-1])
    down = result.copy()
    extreme(result[:, 1:], down[:, :-1], out=result[:, 1:])
    extreme(result[:, :-1], down[:, 1:], out=result[:, :-1])
    return result


def _border_colour(image: np.ndarray) -> tuple[int, int, int]:
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    red, green, blue = np.rint(np.median(border, axis=0)).astype(int).tolist()
    return red, green, blue
