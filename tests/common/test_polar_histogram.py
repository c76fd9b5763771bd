"""The description that rotation does not change: against its definition pixel by pixel, turned, mirrored, empty."""

import numpy as np
import pytest

from cad_models.common.encoders import build_encoder
from cad_models.common.images import prepare_image
from cad_models.common.picture_changes import turned
from cad_models.common.polar_histogram import WIDTH, polar_histogram


def drawing(seed: int, size: int = 64) -> np.ndarray:
    """A page with a grey L of random proportions and a random hole, without symmetry."""
    rng = np.random.default_rng(seed)
    page = np.full((size, size), 255.0, dtype=np.float32)
    long, short, thick = (int(rng.integers(low, high) * size / 64) for low, high in ((36, 48), (18, 30), (8, 14)))
    top, left = (size - long) // 2, (size - short) // 2
    page[top : top + long, left : left + thick] = rng.integers(30, 90)
    page[top : top + thick, left : left + short] = rng.integers(100, 180)
    page[top + long // 2 : top + long // 2 + thick // 3, left + 2 : left + thick - 2] = 255.0
    return page


def slow_polar_histogram(grey: np.ndarray) -> np.ndarray:
    """The definition, one pixel and one vote at a time; the Fourier transform by its sum."""
    size = len(grey)
    ink = [(y, x) for y in range(size) for x in range(size) if grey[y, x] < 250]
    centre = np.mean(ink, axis=0)
    radius = np.sqrt(np.mean([(y - centre[0]) ** 2 + (x - centre[1]) ** 2 for y, x in ink]))
    histogram = np.zeros((8, 32, 8))
    for y in range(size):
        for x in range(size):
            down = float(grey[y + 1, x] - grey[y - 1, x]) if 0 < y < size - 1 else 0.0
            right = float(grey[y, x + 1] - grey[y, x - 1]) if 0 < x < size - 1 else 0.0
            up, east = centre[0] - y, x - centre[1]
            angle = np.arctan2(up, east)
            ring = np.hypot(up, east) / radius / 2.4 * 8 - 0.5
            sector, direction = angle / (2 * np.pi) * 32, (np.arctan2(-down, right) - angle) / (2 * np.pi) * 8
            for r in (int(np.floor(ring)), int(np.floor(ring)) + 1):
                for s in (int(np.floor(sector)), int(np.floor(sector)) + 1):
                    for d in (int(np.floor(direction)), int(np.floor(direction)) + 1):
                        share = (1 - abs(ring - r)) * (1 - abs(sector - s)) * (1 - abs(direction - d))
                        if 0 <= r < 8:
                            histogram[r, s % 32, d % 8] += np.hypot(down, right) * share
    root = np.sqrt(histogram / histogram.sum())
    wave = np.exp(-2j * np.pi * np.outer(np.arange(9), np.arange(32)) / 32)
    spectrum = np.abs(np.einsum("fs,rsd->rfd", wave, root)).ravel()
    return spectrum / np.linalg.norm(spectrum)


@pytest.mark.parametrize("seed", [0, 1])
def test_polar_histogram_equals_its_definition(seed):
    np.testing.assert_allclose(polar_histogram(drawing(seed)), slow_polar_histogram(drawing(seed)), atol=1e-5)


def test_quarter_turns_change_nothing():
    for seed in range(5):
        first = polar_histogram(drawing(seed))
        for turns in (1, 2, 3):
            np.testing.assert_allclose(polar_histogram(np.rot90(drawing(seed), turns).copy()), first, atol=2e-3)


def test_any_turn_finds_the_same_drawing_where_hog_does_not():
    pictures = [np.repeat(drawing(seed, 128)[:, :, None], 3, axis=2).astype(np.uint8) for seed in range(20)]
    rolled = [turned(picture, 37.0 + 17 * i) for i, picture in enumerate(pictures)]
    found = {}
    for name in ("hog", "hog_polar"):
        encoder = build_encoder(name)
        gallery, queries = (np.stack([encoder.encode([picture])[0] for picture in side]) for side in (pictures, rolled))
        if name == "hog_polar":
            gallery, queries = gallery[:, -WIDTH:], queries[:, -WIDTH:]
        found[name] = (np.argmax(queries @ gallery.T, axis=1) == np.arange(20)).mean()
    assert found["hog_polar"] >= 0.9 > found["hog"] + 0.3, found


def test_mirrored_drawing_is_another_one():
    for seed in range(5):
        first, mirrored = polar_histogram(drawing(seed)), polar_histogram(drawing(seed)[:, ::-1].copy())
        assert first @ mirrored < 0.99 < first @ polar_histogram(np.rot90(drawing(seed)).copy())


@pytest.mark.parametrize("page", [np.full((16, 16), 255.0), np.full((16, 16), 40.0), np.pad([[0.0]], 8, constant_values=255.0)])
def test_pages_without_an_object_or_without_gradients_are_finite(page):
    found = polar_histogram(page.astype(np.float32))
    assert found.shape == (WIDTH,) and np.isfinite(found).all() and found.dtype == np.float32


def test_encoder_is_hog_and_polar_histogram_side_by_side():
    picture = np.repeat(drawing(3, 90)[:, :, None], 3, axis=2).astype(np.uint8)
    encoder, hog = build_encoder("hog_polar"), build_encoder("hog")
    row = encoder.encode([picture])[0]
    assert encoder.width == hog.width + WIDTH == len(row) and encoder.digest != hog.digest and row.dtype == np.float32
    np.testing.assert_allclose(row[: hog.width], 0.3 * hog.encode([picture])[0], rtol=1e-6)
    grey = prepare_image(picture, size=128).astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    np.testing.assert_array_equal(row[hog.width :], polar_histogram(grey))
    assert np.linalg.norm(row) == pytest.approx(np.sqrt(1.09), abs=1e-5)
