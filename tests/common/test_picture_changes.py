"""Turned, badly boxed and redrawn pictures: against pictures made by hand."""

import numpy as np
import pytest

from cad_models.common.images import foreground_mask, prepare_image
from cad_models.common.picture_changes import PictureChange, boxed, turned

GRAY = 200


def plate(height: int = 20, width: int = 40, *, background: int = GRAY) -> np.ndarray:
    """A dark plate in the middle of a plain picture of 100 x 120 pixels, its right half darker."""
    image = np.full((100, 120, 3), background, dtype=np.uint8)
    top, left = (100 - height) // 2, (120 - width) // 2
    image[top : top + height, left : left + width] = 80
    image[top : top + height, 60 : left + width] = 30
    return image


def extent(image: np.ndarray) -> tuple[int, int]:
    mask = foreground_mask(image)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)


def test_quarter_turn_is_counter_clockwise_and_keeps_every_pixel():
    np.testing.assert_array_equal(turned(plate(), 90.0), np.rot90(plate()))


def test_turned_picture_is_whole_and_filled_with_the_background():
    image = turned(plate(), 30.0)
    assert image.shape[0] > 100 and (image[0, 0] == GRAY).all()
    height, width = extent(image)
    # A 20 x 40 box turned by 30 degrees.
    assert height == pytest.approx(20 * np.cos(np.pi / 6) + 40 * 0.5, abs=2) and width == pytest.approx(40 * np.cos(np.pi / 6) + 20 * 0.5, abs=2)


def test_exact_box_is_the_square_around_the_object():
    cut = boxed(plate(), scale=1.0, right=0.0, down=0.0)
    np.testing.assert_array_equal(cut, plate()[30:70, 40:80])


def test_small_and_shifted_boxes_cut_the_object_off():
    np.testing.assert_array_equal(boxed(plate(), scale=0.5, right=0.25, down=0.0), plate()[40:60, 60:80])
    assert extent(boxed(plate(), scale=1.0, right=0.0, down=-0.5))[0] == 10


def test_box_beyond_the_picture_is_filled_with_the_background():
    cut = boxed(plate(), scale=4.0, right=0.0, down=0.0)
    assert cut.shape == (160, 160, 3) and (cut[0] == GRAY).all()
    np.testing.assert_array_equal(cut[30:130, 20:140], plate())


def test_drawn_boxes_lie_within_the_stated_range():
    change = PictureChange(max_box_change=0.3)
    sides = [change(plate(), np.random.default_rng(seed)).shape[0] for seed in range(200)]
    assert 0.7 * 40 <= min(sides) < 0.75 * 40 and 1.25 * 40 < max(sides) <= 1.3 * 40


def test_same_generator_gives_the_same_bytes_and_another_does_not():
    change = PictureChange(max_roll_deg=180.0, max_box_change=0.3, max_gamma=1.5, change_lines=True)
    first, again, other = (change(plate(), np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert first.shape != other.shape or (first != other).any()


def test_gamma_and_lines_change_greys_but_not_the_frame():
    image = PictureChange(max_gamma=2.0)(plate(), np.random.default_rng(0))
    assert image.shape == plate().shape and (np.unique(image) != np.unique(plate())).any()
    assert (image == image[0, 0]).sum() == (plate() == GRAY).sum()
    heights = {extent(PictureChange(change_lines=True)(plate(), np.random.default_rng(seed)))[0] for seed in range(30)}
    assert heights == {18, 20, 22}  # thinner, as it was, thicker


def test_no_change_gives_the_picture_itself():
    np.testing.assert_array_equal(PictureChange()(plate(), np.random.default_rng(0)), plate())


def test_changed_pictures_of_any_kind_can_be_prepared():
    change = PictureChange(max_roll_deg=180.0, max_box_change=0.9)
    tiny = np.zeros((1, 1, 3), dtype=np.uint8)
    for image in (plate(), np.full((30, 40, 3), 255, np.uint8), tiny):
        for seed in range(20):
            assert prepare_image(change(image, np.random.default_rng(seed)), size=32).shape == (32, 32, 3)


@pytest.mark.parametrize("values", [{"max_roll_deg": 181.0}, {"max_roll_deg": -1.0}, {"max_box_change": 1.0}, {"max_gamma": 0.5}])
def test_values_out_of_range_raise(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        PictureChange(**values)
