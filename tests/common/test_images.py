"""Decoding images from strangers, the foreground and the square crop."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cad_models.common.images import (
    IMAGE_REASONS,
    BadImage,
    _cleaned,
    _without_specks,
    decode_image,
    encode_png,
    foreground_mask,
    prepare_image,
    square_crop,
    turned_squares,
)
from tests.shared import shared_path


def file_of(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, format=kind, **options)
    return sink.getvalue()


def colors(height: int = 24, width: int = 40, seed: int = 0) -> np.ndarray:
    """A smooth random picture: also lossy formats keep it."""
    small = np.random.default_rng(seed).integers(0, 256, size=(3, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def page(height: int = 100, width: int = 120, *, top: int = 30, left: int = 40, tall: int = 20, wide: int = 50, paper=255) -> np.ndarray:
    """A dark rectangle on a page."""
    image = np.empty((height, width, 3), dtype=np.uint8)
    image[:] = paper
    image[top : top + tall, left : left + wide] = (60, 80, 120)
    return image


def box_of(dark: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(dark.any(axis=1)), np.flatnonzero(dark.any(axis=0))
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def reason_of(data: bytes, **options) -> str:
    with pytest.raises(BadImage) as caught:
        decode_image(data, **options)
    assert caught.value.reason in IMAGE_REASONS
    assert caught.value.detail
    return caught.value.reason


# --- decoding -----------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})],
)
def test_decode_lossless_format_returns_the_pixels(kind, options):
    image = colors()
    np.testing.assert_array_equal(decode_image(file_of(Image.fromarray(image), kind, **options)), image)


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("JPEG", {"quality": 95, "progressive": True}), ("WEBP", {"quality": 95})])
def test_decode_lossy_format_is_close(kind, options):
    image = colors()
    assert np.abs(decode_image(file_of(Image.fromarray(image), kind, **options)).astype(int) - image).mean() < 4


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_decode_grey_and_palette_become_rgb(mode):
    picture = Image.fromarray(colors()).convert(mode)
    np.testing.assert_array_equal(decode_image(file_of(picture)), np.array(picture.convert("RGB")))


def test_decode_cmyk_jpeg_becomes_rgb():
    picture = Image.fromarray(colors()).convert("CMYK")
    assert np.abs(decode_image(file_of(picture, "JPEG", quality=95)).astype(int) - colors()).mean() < 6


def test_decode_alpha_is_composited_on_white():
    image = np.zeros((2, 3, 4), dtype=np.uint8)
    image[:, 0] = (200, 100, 0, 255)
    image[:, 1] = (200, 100, 0, 51)  # a fifth: 0.2 * 200 + 0.8 * 255 = 244
    expected = np.array([[(200, 100, 0), (244, 224, 204), (255, 255, 255)]] * 2)
    assert np.abs(decode_image(file_of(Image.fromarray(image))).astype(int) - expected).max() <= 1


def test_decode_grey_alpha_is_composited_on_white():
    image = np.array([[[100, 255], [100, 0]]], dtype=np.uint8)
    np.testing.assert_array_equal(decode_image(file_of(Image.fromarray(image, "LA")))[0, :, 0], [100, 255])


def test_decode_transparent_palette_entry_is_white():
    picture = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    picture.putpalette([10, 20, 30, 40, 50, 60])
    np.testing.assert_array_equal(decode_image(file_of(picture, transparency=1))[0], [(10, 20, 30), (255, 255, 255)])


def test_decode_transparent_rgb_key_is_white():
    image = np.array([[(10, 20, 30), (40, 50, 60)]], dtype=np.uint8)
    np.testing.assert_array_equal(decode_image(file_of(Image.fromarray(image), transparency=(40, 50, 60)))[0], [(10, 20, 30), (255, 255, 255)])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_decode_sixteen_bits_uses_the_whole_range(kind):
    values = np.array([[0, 257 * 50, 257 * 128, 65535]], dtype=np.uint16)
    np.testing.assert_array_equal(decode_image(file_of(Image.fromarray(values), kind))[0, :, 1], [0, 50, 128, 255])


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0, 1e6])
def test_decode_float_tiff_is_scaled_to_its_range(top):
    values = np.array([[0, 0.2, 1.0, np.nan]], dtype=np.float32) * np.float32(top)
    np.testing.assert_array_equal(decode_image(file_of(Image.fromarray(values), "TIFF"))[0, :, 0], [0, 51, 255, 0])


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_decode_several_frames_gives_the_first(kind):
    frames = [Image.new("RGB", (6, 5), color) for color in ((250, 0, 0), (0, 0, 250))]
    options = {"lossless": True} if kind == "WEBP" else {}
    image = decode_image(file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert image.shape == (5, 6, 3)
    assert np.abs(image.astype(int) - (250, 0, 0)).max() <= 5


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_exif_orientation_is_applied(kind, orientation):
    image = np.zeros((16, 24, 3), dtype=np.uint8)
    image[:8, :8] = 255  # the upper left corner is marked
    exif = Image.Exif()
    exif[0x0112] = orientation
    # EXIF 2.32, tag Orientation: which corner of the scene the stored first row and column are.
    upright = {
        1: image,
        2: image[:, ::-1],
        3: image[::-1, ::-1],
        4: image[::-1],
        5: image.transpose(1, 0, 2),
        6: np.rot90(image, -1),
        7: image[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(image, 1),
    }[orientation]
    decoded = decode_image(file_of(Image.fromarray(image), kind, exif=exif))
    assert decoded.shape == upright.shape
    assert np.abs(decoded.astype(int) - upright).mean() < 3


def test_decode_result_is_a_writable_array_of_its_own():
    decoded = decode_image(file_of(Image.fromarray(colors())))
    decoded[:] = 0


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "lfs_pointer"),
        (b"<html>404 not found</html>", "not_an_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
        (b"\0" * 4096, "not_an_image"),
        (b"\x89PNG\r\n\x1a\n", "corrupt_image"),
        (b"\xff\xd8\xff\xe0", "corrupt_image"),
    ],
)
def test_decode_something_else_is_refused_with_its_reason(data, reason):
    assert reason_of(data) == reason


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF"])
def test_decode_half_a_file_is_truncated(kind):
    image = np.random.default_rng(0).integers(0, 256, size=(64, 64, 3), dtype=np.uint8)
    data = file_of(Image.fromarray(image), kind)
    assert reason_of(data[: len(data) // 2]) == "truncated_image"


@pytest.mark.parametrize("kind", ["WEBP", "TIFF"])
def test_decode_half_a_file_of_indexed_formats_is_refused(kind):
    image = np.random.default_rng(0).integers(0, 256, size=(64, 64, 3), dtype=np.uint8)
    data = file_of(Image.fromarray(image), kind)
    assert reason_of(data[: len(data) // 2]) in ("truncated_image", "corrupt_image")


def header_only_png(width: int, height: int) -> bytes:
    """A PNG whose header is right and which has next to no data: whoever decodes it finds it truncated."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


def test_decode_too_many_pixels_is_refused_by_the_header():
    assert reason_of(header_only_png(8001, 8000)) == "image_too_large"
    assert reason_of(header_only_png(8000, 8000)) == "truncated_image"  # within the limit: only then is it decoded


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 14_000, 60_000])
def test_decode_bomb_is_refused_at_every_limit_of_pillow(side):
    assert reason_of(header_only_png(side, side)) == "image_too_large"


def test_decode_limit_can_be_lowered():
    data = file_of(Image.new("RGB", (10, 11)))
    assert decode_image(data, max_pixels=110).shape == (11, 10, 3)
    assert reason_of(data, max_pixels=109) == "image_too_large"


def test_decode_compressed_text_bomb_is_refused():
    body = b"Comment\0\0" + zlib.compress(b"\0" * (80 << 20), 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    data = file_of(Image.new("RGB", (8, 8)))
    assert reason_of(data[:33] + chunk + data[33:]) == "corrupt_image"


@pytest.mark.filterwarnings("ignore")  # Pillow warns of broken metadata
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_decode_damaged_files_give_a_picture_or_bad_image(kind):
    rng = np.random.default_rng(7)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if kind in ("BMP", "GIF") else {"exif": exif}
    data = file_of(Image.fromarray(colors(16, 20)), kind, **options)
    refused = 0
    for trial in range(250):
        damaged = bytearray(data)
        if trial % 5 == 0:
            del damaged[int(rng.integers(1, len(data))) :]
        for _ in range(int(rng.integers(1, 6))):
            # Half of the flips hit the first bytes, where the headers are.
            end = len(damaged) if rng.random() < 0.5 else min(len(damaged), 64)
            damaged[int(rng.integers(0, end))] = int(rng.integers(0, 256))
        try:
            image = decode_image(bytes(damaged), max_pixels=1_000_000)
        except BadImage as error:
            assert error.reason in IMAGE_REASONS
            refused += 1
        else:
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert refused > 20


def test_decode_real_part_pictures():
    files = sorted(shared_path("data/image_cad_pairs/images").iterdir())
    assert len(files) >= 40
    for file in files:
        image = decode_image(file.read_bytes())
        mask = foreground_mask(image)
        assert 0.005 < mask.mean() <= 1.0, file.name
        if file.name.startswith("voron"):  # thumbnails on white: found without the page
            assert mask.mean() < 0.7, file.name
            assert (image[~mask] > 200).all(), file.name


def test_decode_real_photos():
    files = [path for path in sorted(shared_path("data/pose_images").rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    assert len(files) >= 290
    assert all(min(decode_image(file.read_bytes()).shape[:2]) > 10 for file in files)


def test_encode_png_gives_the_pixels_back_and_the_same_bytes():
    image = colors()
    assert encode_png(image) == encode_png(image.copy())
    np.testing.assert_array_equal(decode_image(encode_png(image)), image)


# --- the foreground -----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("paper", [255, 0, 128, (250, 240, 200)])
def test_mask_of_a_rectangle_is_the_rectangle(paper):
    expected = np.zeros((100, 120), dtype=bool)
    expected[30:50, 40:90] = True
    np.testing.assert_array_equal(foreground_mask(page(paper=paper)), expected)


def test_mask_survives_a_lit_backdrop_and_noise():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:100, 0:120]
    backdrop = 150 + 0.3 * x - 0.2 * y  # 56 levels from corner to corner
    image = np.repeat(backdrop[:, :, None], 3, axis=2)
    image[30:50, 40:90] = (60, 80, 120)
    image = np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)
    mask = foreground_mask(image)
    expected = np.zeros((100, 120), dtype=bool)
    expected[30:50, 40:90] = True
    assert (mask & expected).sum() / (mask | expected).sum() > 0.99


def test_mask_keeps_openings_and_fills_gloss():
    image = page(tall=60, wide=60, top=20, left=30)
    image[30:50, 40:60] = 255  # an opening: a ninth of the part
    image[60:63, 50:53] = 255  # gloss: 9 of 3600 pixels
    mask = foreground_mask(image)
    assert not mask[40, 50]
    assert mask[61, 51]
    assert mask.sum() == 3600 - 400


def test_specks_and_gaps_are_told_apart_within_the_box_as_in_the_whole_picture():
    rng = np.random.default_rng(0)
    for number in range(300):
        mask = np.zeros((20, 26), dtype=bool)
        top, left = rng.integers(0, 8), rng.integers(0, 10)  # at the picture's border, near it, away from it
        block = rng.random((rng.integers(1, 20 - top + 1), rng.integers(1, 26 - left + 1))) < rng.uniform(0.05, 0.98)
        mask[top : top + block.shape[0], left : left + block.shape[1]] = block
        if number % 3 == 0:
            mask[5:9, 3:9] = True  # something large, so that specks are small beside it
        np.testing.assert_array_equal(_without_specks(mask), _cleaned(mask) if mask.any() else mask)


def test_mask_drops_specks_and_keeps_loose_pieces():
    image = page()
    image[5, 5] = 0
    image[80:84, 100:105] = 0  # 20 of 1000 pixels
    mask = foreground_mask(image)
    assert not mask[5, 5]
    assert mask[82, 102]
    assert mask.sum() == 1020


def test_mask_of_an_object_cut_by_the_border_is_the_object():
    mask = foreground_mask(page(top=0, left=0, tall=60, wide=70))
    assert mask.sum() == 60 * 70 and mask[:60, :70].all()


def test_mask_of_a_blank_page_is_everything():
    assert foreground_mask(np.full((9, 7, 3), 200, dtype=np.uint8)).all()


def test_mask_without_a_backdrop_is_everything():
    assert foreground_mask(np.random.default_rng(0).integers(0, 256, size=(60, 50, 3), dtype=np.uint8)).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (2, 2)])
def test_prepare_smallest_images(shape):
    assert prepare_image(np.zeros((*shape, 3), dtype=np.uint8), size=8).shape == (8, 8, 3)


# --- the crop -----------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("tall", "wide"), [(20, 50), (60, 25), (40, 40), (1, 70)])
@pytest.mark.parametrize("margin", [0.0, 0.05, 0.2])
def test_crop_is_centred_with_the_margin_asked_for(tall, wide, margin):
    image = page(tall=tall, wide=wide)
    size = 200
    prepared = square_crop(image, foreground_mask(image), size=size, margin=margin)
    top, bottom, left, right = box_of(prepared[:, :, 0] < 158)  # half-way from part to paper
    scale = size * (1 - 2 * margin) / max(tall, wide)
    for start, stop, length in ((top, bottom, tall), (left, right, wide)):
        assert abs(start - (size - length * scale) / 2) <= 1
        assert abs(stop - (size + length * scale) / 2) <= 1


def test_crop_does_not_depend_on_the_place_in_the_picture():
    ellipse = Image.new("L", (47, 31))
    ImageDraw.Draw(ellipse).ellipse((0, 0, 46, 30), fill=255)
    pictures = []
    for top, left in ((10, 10), (33, 51), (0, 0), (69, 73)):
        image = np.full((100, 120, 3), 255, dtype=np.uint8)
        image[top : top + 31, left : left + 47][np.array(ellipse) > 0] = (90, 40, 20)
        pictures.append(prepare_image(image, size=64))
    for picture in pictures[1:]:
        np.testing.assert_array_equal(picture, pictures[0])


def test_crop_paints_over_what_is_not_the_object():
    image = page(paper=(120, 130, 140))
    mask = np.zeros(image.shape[:2], dtype=bool)
    mask[30:50, 40:90] = True
    mask[35:40, 60:70] = False
    prepared = square_crop(image, mask, size=100, background=255)
    far = np.abs(prepared.astype(int) - (120, 130, 140)).max(axis=-1)
    assert far.min() > 3  # none of the paper is left, mixed at edges at the most
    assert (prepared[:25] == 255).all() and (prepared[48:52, 48:52] == 255).any()
    assert (square_crop(image, mask, size=100, background=0)[0] == 0).all()


def test_crop_of_one_object_in_two_resolutions_is_nearly_equal():
    def drawn(scale: int) -> np.ndarray:
        picture = Image.new("RGB", (100 * scale, 90 * scale), "white")
        draw = ImageDraw.Draw(picture)
        draw.polygon([(20 * scale, 20 * scale), (80 * scale, 35 * scale), (50 * scale, 70 * scale)], fill=(80, 90, 100))
        return np.array(picture)

    small, large = prepare_image(drawn(4), size=64), prepare_image(drawn(40), size=64)  # 4000 x 3600 pixels are shrunk first
    assert np.abs(small.astype(int) - large).mean() < 1.5


def test_prepare_image_without_a_backdrop_shows_the_whole_picture():
    image = np.random.default_rng(0).integers(0, 200, size=(60, 40, 3), dtype=np.uint8)
    prepared = prepare_image(image, size=100)
    top, bottom, left, right = box_of((prepared < 250).any(axis=-1))
    assert abs(top - 5) <= 1 and abs(bottom - 95) <= 1 and abs(left - 20) <= 1 and abs(right - 80) <= 1


def test_turned_squares_begin_with_the_picture_as_it_is():
    image = page(paper=(230, 235, 240))
    squares = turned_squares(image, 5, size=48)
    assert len(squares) == 5 and all(square.shape == (48, 48, 3) for square in squares)
    assert np.array_equal(squares[0], prepare_image(image, size=48))
    assert [len(turned_squares(image, 1, size=48))] == [1]


def test_turned_squares_go_counter_clockwise_on_white_and_fill_the_frame():
    image = page(paper=(200, 180, 90))
    image[30:50, 40:52] = (200, 30, 30)  # a red left end
    squares = [square.astype(int) for square in turned_squares(image, 4, size=48)]
    for turns, square in enumerate(squares):
        assert np.abs(np.rot90(squares[0], turns) - square).mean() < 6
        top, bottom, left, right = box_of(square.min(axis=2) < 128)
        assert max(bottom - top, right - left) == pytest.approx(43, abs=1)  # 90 % of the frame
        assert (square[0] == 255).all() and (square[:, 0] == 255).all()
    # The backdrop of the photograph is nowhere left in a position between.
    slanted = turned_squares(image, 8, size=96)[1].astype(int)
    assert (np.abs(slanted - np.array([200, 180, 90])).max(axis=2) > 20).all()


def test_crop_refuses_what_it_cannot_crop():
    image = page()
    with pytest.raises(ValueError, match="mask is empty"):
        square_crop(image, np.zeros(image.shape[:2], dtype=bool), size=10)
    with pytest.raises(ValueError, match="margin is 0.5"):
        square_crop(image, np.ones(image.shape[:2], dtype=bool), size=10, margin=0.5)
