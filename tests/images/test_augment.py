"""Compiled augmentation against torchvision on Pillow images: values for given parameters, distributions for the presets."""

import numpy as np
import pytest
import torchvision.transforms.functional as tf
from PIL import Image
from torchvision.transforms import ColorJitter, RandomResizedCrop, RandomRotation

from cad_models.images import augment
from cad_models.images.augment import augmented, draw_parameters, draw_salt_pepper, resized, transformed
from cad_models.images.recipe import AugmentConfig

PRESETS = ("none", "baseline", "ensemble_1", "ensemble_2")


def pictures(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Smooth and noisy at once, so that both rounding and edges matter."""
    rng = np.random.default_rng(seed)
    small = [Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((size, size), Image.Resampling.BICUBIC) for _ in range(count)]
    noise = rng.integers(-20, 21, (count, size, size, 3))
    return np.clip(np.stack([np.array(p) for p in small]).astype(int) + noise, 0, 255).astype(np.uint8)


def reference(pixels: np.ndarray, p: np.ndarray, size: int) -> np.ndarray:
    """The same by torchvision, one step after the other; the crop must lie on whole pixels."""
    stored = pixels.shape[0]
    x, y, w, h = (int(round(v * stored)) for v in p[:4])
    image = tf.resized_crop(Image.fromarray(pixels), y, x, h, w, [size, size])
    if p[augment.FLIP]:
        image = tf.hflip(image)
    if p[augment.ANGLE]:
        image = tf.rotate(image, float(p[augment.ANGLE]))
    for which in p[augment.FIRST : augment.THIRD + 1].astype(int):
        image = (tf.adjust_brightness, tf.adjust_contrast, tf.adjust_saturation)[which](image, float(p[augment.BRIGHTNESS + which]))
    if p[augment.SHARPNESS] != 1:
        image = tf.adjust_sharpness(image, float(p[augment.SHARPNESS]))
    return np.array(image).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [48, 96, 131])
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_at_stored_size_equals_torchvision_to_the_bit(preset, size):
    stored = 96
    pixels = pictures(12, stored)
    config = AugmentConfig(preset=preset).resolved()
    parameters = np.stack([draw_parameters(config, stored, stored, np.random.default_rng(i)) for i in range(len(pixels))])
    parameters[0, augment.SHARPNESS] = 2.0
    found = transformed(pixels, parameters, size)
    for picture, p, got in zip(pixels, parameters, found, strict=True):
        np.testing.assert_array_equal(got, reference(picture, p, size))


def test_crop_of_a_squeezed_picture_keeps_the_original_aspect():
    # A circle of a 200 x 100 picture is an ellipse once stored; a crop of w x h original pixels takes w/200 and h/100 of it.
    config = AugmentConfig(preset="custom", min_crop_area=0.3)
    draws = np.stack([draw_parameters(config, 200, 100, np.random.default_rng(i)) for i in range(500)])
    aspect = draws[:, augment.WIDTH] * 200 / (draws[:, augment.HEIGHT] * 100)
    assert aspect.min() >= 0.74 and aspect.max() <= 1.36
    assert (draws[:, augment.X] + draws[:, augment.WIDTH] <= 1 + 1e-12).all() and (draws[:, :4] >= 0).all()


@pytest.mark.parametrize(("width", "height"), [(256, 256), (180, 240), (400, 90), (60, 300)])
def test_crops_are_distributed_as_torchvisions(width, height):
    import torch

    torch.manual_seed(0)
    image = Image.new("RGB", (width, height))
    theirs = np.array([RandomResizedCrop.get_params(image, [0.8, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)], dtype=float)  # top, left, h, w
    config = AugmentConfig(preset="ensemble_2").resolved()
    ours = np.stack([draw_parameters(config, width, height, np.random.default_rng(i))[:4] for i in range(3000)]) * [width, height, width, height]
    for a, b, extent in ((0, 1, width), (1, 0, height), (2, 3, width), (3, 2, height)):
        left, right = np.sort(ours[:, a]), np.sort(theirs[:, b])
        # Largest distance of the two empirical distributions over quantiles; sampling noise of 3,000 is about 2 % of the extent at most.
        assert np.abs(left - right).max() <= 0.06 * extent and abs(left.mean() - right.mean()) <= 0.01 * extent + 0.5


def test_other_changes_are_distributed_as_torchvisions():
    import torch

    torch.manual_seed(0)
    config = AugmentConfig(preset="ensemble_2").resolved()
    draws = np.stack([draw_parameters(config, 128, 128, np.random.default_rng(i)) for i in range(4000)])
    assert draws[:, augment.FLIP].mean() == pytest.approx(0.5, abs=0.03)
    assert (draws[:, augment.SHARPNESS] == 2.0).mean() == pytest.approx(0.3, abs=0.03)
    assert set(draws[:, augment.SHARPNESS]) == {1.0, 2.0}
    theirs = [ColorJitter.get_params((0.8, 1.2), (0.8, 1.2), (0.8, 1.2), None) for _ in range(4000)]
    quantiles = np.linspace(0, 1, 11)
    for column, index in ((augment.BRIGHTNESS, 1), (augment.CONTRAST, 2), (augment.SATURATION, 3)):
        expected = np.quantile([float(t[index]) for t in theirs], quantiles)
        np.testing.assert_allclose(np.quantile(draws[:, column], quantiles), expected, atol=0.02)
    angles = np.quantile([RandomRotation.get_params([-15.0, 15.0]) for _ in range(4000)], quantiles)
    np.testing.assert_allclose(np.quantile(draws[:, augment.ANGLE], quantiles), angles, atol=1.2)
    orders = {tuple(int(i) for i in d[augment.FIRST : augment.THIRD + 1]) for d in draws}
    assert len(orders) == 6


def test_preset_none_only_resizes():
    pixels = pictures(3, 64)
    sizes = np.full((3, 2), 64, dtype=np.int32)
    config = AugmentConfig(preset="none")
    found = augmented(pixels, sizes, 40, config, [np.random.default_rng(i) for i in range(3)])
    np.testing.assert_array_equal(found, resized(pixels, 40))
    np.testing.assert_array_equal(found[1], np.array(tf.resize(Image.fromarray(pixels[1]), [40, 40])).transpose(2, 0, 1))
    np.testing.assert_array_equal(resized(pixels, 64), pixels.transpose(0, 3, 1, 2))


def test_augmentation_does_not_depend_on_neighbours_or_threads():
    pixels, sizes = pictures(9, 64), np.full((9, 2), 64, dtype=np.int32)
    config = AugmentConfig(preset="ensemble_2", max_salt_pepper=0.2)

    def of(chosen, threads):
        rngs = [np.random.default_rng(i) for i in chosen]
        return augmented(pixels[chosen], sizes[chosen], 48, config, rngs, num_threads=threads)

    whole = of(list(range(9)), 1)
    np.testing.assert_array_equal(whole, of(list(range(9)), 3))
    np.testing.assert_array_equal(whole[[7, 2]], of([7, 2], 1))
    assert not np.array_equal(whole[0], resized(pixels, 48)[0])


def test_salt_and_pepper_has_the_drawn_share_and_both_values():
    shares = []
    for seed in range(200):
        positions, values = draw_salt_pepper(0.4, 32, np.random.default_rng(seed))
        assert len(set(positions.tolist())) == len(positions) and set(values.tolist()) <= {0, 255}
        shares.append(len(positions) / 32**2)
    assert max(shares) <= 0.4 and np.mean(shares) == pytest.approx(0.2, abs=0.02)
    _, values = draw_salt_pepper(1.0, 64, np.random.default_rng(0))
    assert values.mean() / 255 == pytest.approx(0.5, abs=0.05)


def test_preset_with_other_fields_is_refused():
    with pytest.raises(ValueError, match="--data.augment.flip-probability is 0.5.*custom"):
        AugmentConfig(preset="baseline", flip_probability=0.5)
    assert AugmentConfig(preset="baseline").resolved() == AugmentConfig(
        preset="custom", min_crop_area=0.9, flip_probability=0.5, max_rotation_deg=15.0
    )
