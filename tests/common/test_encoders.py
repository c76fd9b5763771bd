"""Frozen image encoders: names, the descriptor against a slow loop, timm's preprocessing, weights from files."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cad_models.common.encoders import HogEncoder, build_encoder, encoder_folder, encoder_names_help
from cad_models.common.images import prepare_image


def drawing(seed: int, *, size: int = 150, angle: float = 0.0) -> np.ndarray:
    """Shaded polygons on white, turned by ``angle`` degrees."""
    rng = np.random.default_rng(seed)
    turn = np.deg2rad(angle)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    picture = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(picture)
    for _ in range(4):
        corners = rng.uniform(-0.33, 0.33, size=(5, 2)) @ matrix.T
        draw.polygon([tuple((corner + 0.5) * size) for corner in corners], fill=tuple(int(c) for c in rng.integers(60, 200, size=3)))
    return np.array(picture)


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


# --- names --------------------------------------------------------------------------------------------------------------------------------
def test_import_stays_light():
    code = "import sys, cad_models.common.encoders; print([m for m in ('torch', 'timm', 'skimage', 'scipy', 'torchvision') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("hgo", "did you mean hog"),
        ("HOG", "did you mean hog"),
        ("eva02_large_patch14_448", "did you mean timm:eva02_large_patch14_448"),
        ("timm/resnet18.a1_in1k", "did you mean timm:resnet18"),
        ("timm:eva02_larg_patch14_448", "did you mean eva02_large_patch14_448"),
        ("timm:eva02_large_patch14_448.mim_m38m_ft", "mim_m38m_ft_in22k_in1k"),
        ("timm:test_vit.nonsense@w.safetensors", "r160_in1k"),
        ("timm:", "timm has no model ''"),
        ("", encoder_names_help()),
    ],
)
def test_build_unknown_name_says_what_would_do(name, hint):
    with pytest.raises(ValueError) as caught:
        build_encoder(name)
    assert hint in str(caught.value)
    assert repr(name) in str(caught.value)


def test_folder_is_safe_and_different_for_different_names():
    names = ["hog", "timm:resnet18", "timm:resnet18.a1_in1k", "timm:resnet18@/a/b.safetensors", "timm:resnet18@/a/c.safetensors", "timm-resnet18", "../x"]
    folders = [encoder_folder(name) for name in names]
    assert len({folder.lower() for folder in folders}) == len(names)
    assert folders[0] == "hog"
    for folder in folders:
        assert folder.isascii() and folder.strip(".") == folder
        assert all(character.isalnum() or character in "._-" for character in folder)


# --- hog ----------------------------------------------------------------------------------------------------------------------------------
def slow_descriptor(image: np.ndarray) -> np.ndarray:
    """The definition, pixel by pixel: each gradient votes for 2 directions x 2 x 2 cells."""
    size, cells, directions = 128, 8, 16
    grey = image.astype(np.float64) @ [0.299, 0.587, 0.114]
    histogram = np.zeros((cells, cells, directions))
    for y in range(size):
        for x in range(size):
            down = grey[y + 1, x] - grey[y - 1, x] if 0 < y < size - 1 else 0.0
            right = grey[y, x + 1] - grey[y, x - 1] if 0 < x < size - 1 else 0.0
            magnitude = np.hypot(down, right)
            direction = np.arctan2(-down, right) / (2 * np.pi) * directions
            cell_y, cell_x = (y + 0.5) / 16 - 0.5, (x + 0.5) / 16 - 0.5
            for row in range(cells):
                for column in range(cells):
                    near = max(0, 1 - abs(cell_y - row)) * max(0, 1 - abs(cell_x - column))
                    if near and magnitude:
                        low = int(np.floor(direction))
                        histogram[row, column, low % directions] += magnitude * near * (low + 1 - direction)
                        histogram[row, column, (low + 1) % directions] += magnitude * near * (direction - low)
    return np.sqrt(histogram / histogram.sum()).ravel()


@pytest.mark.parametrize("seed", [0, 1])
def test_hog_equals_the_slow_definition(seed):
    image = prepare_image(drawing(seed), size=128)
    # An exact tie between directions (arctan2 of float32) may go to either neighbour with a share of 1e-7.
    np.testing.assert_allclose(HogEncoder().describe(image), slow_descriptor(image), atol=2e-4)


def test_hog_direction_of_one_edge_is_the_one_named():
    image = np.full((128, 128, 3), 255, dtype=np.uint8)
    image[:, :64] = 100  # brighter to the right: direction 0 everywhere
    cells = HogEncoder().describe(image).reshape(8, 8, 16)
    assert (cells[..., 1:] == 0).all()
    assert np.flatnonzero(cells[3, :, 0]).tolist() == [3, 4]
    turned = HogEncoder().describe(np.rot90(image).copy()).reshape(8, 8, 16)  # brighter above: a quarter turn counter-clockwise
    assert np.flatnonzero(turned.sum(axis=(0, 1))).tolist() == [4]


def test_hog_has_unit_length_and_declared_shape():
    encoder = build_encoder("hog")
    rows = encoder.encode([drawing(seed) for seed in range(3)])
    assert rows.shape == (3, encoder.width) and rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-6)
    assert encoder.encode([]).shape == (0, encoder.width)


def test_hog_of_a_blank_page_is_finite_and_like_nothing():
    rows = build_encoder("hog").encode([np.full((50, 50, 3), 255, dtype=np.uint8)])
    assert (rows == 0).all()


def test_hog_does_not_depend_on_the_rest_of_the_batch():
    encoder = build_encoder("hog")
    images = [drawing(seed) for seed in range(5)]
    together = encoder.encode(images)
    for image, row in zip(images, together, strict=True):
        np.testing.assert_array_equal(encoder.encode([image])[0], row)
    np.testing.assert_array_equal(encoder.encode(images[::-1])[::-1], together)


def test_hog_does_not_depend_on_place_scale_or_paper():
    encoder = build_encoder("hog")
    plain = drawing(3)
    moved = np.full((200, 300, 3), 255, dtype=np.uint8)
    moved[40:190, 90:240] = plain
    on_grey = plain.copy()
    on_grey[(plain == 255).all(axis=-1)] = 225
    first = encoder.encode([plain])[0]
    np.testing.assert_array_equal(encoder.encode([moved])[0], first)
    assert cosine(*encoder.encode([drawing(3, size=300), drawing(3, size=700)])) > 0.97
    assert cosine(encoder.encode([on_grey])[0], first) > 0.999


def test_hog_finds_the_same_drawing_slightly_turned():
    encoder = build_encoder("hog")
    gallery = encoder.encode([drawing(seed) for seed in range(30)])
    queries = encoder.encode([drawing(seed, angle=12) for seed in range(30)])
    assert (np.argmax(queries @ gallery.T, axis=1) == np.arange(30)).mean() > 0.85


def test_hog_digest_is_stable():
    # Changes only with the descriptor; then embeddings that exist must not be mixed with new ones.
    assert build_encoder("hog").digest == build_encoder("hog").digest
    assert len(build_encoder("hog").digest) == 16


# --- timm ---------------------------------------------------------------------------------------------------------------------------------
# A centre crop (0.95) with mean 0.5; EVA with CLIP's mean and a centre crop (0.9); a classifier after a hidden layer.
MODELS = {"test_vit": 64, "eva02_tiny_patch14_224": 192, "mobilenetv3_small_050": 1024}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, str]:
    """Random weights of small models in safetensors files, as released: with their classifier."""
    import timm
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("weights")
    files = {}
    for model_name in MODELS:
        torch.manual_seed(5)
        model = timm.create_model(model_name, num_classes=3)
        files[model_name] = str(folder / f"{model_name}.safetensors")
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, files[model_name])
    return files


def timm_transform(model_name: str, **changes):
    import timm
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(timm.create_model(model_name)) | changes
    return create_transform(**config, is_training=False), config


@pytest.mark.parametrize("model_name", MODELS)
def test_timm_encodes_as_timm_does(model_name, weights):
    import timm
    import torch
    from safetensors.torch import load_file

    encoder = build_encoder(f"timm:{model_name}@{weights[model_name]}")
    assert encoder.width == MODELS[model_name]
    image = drawing(1)
    transform, config = timm_transform(model_name, crop_pct=1.0)
    assert encoder.input_size == config["input_size"][1]
    square = prepare_image(image, size=encoder.input_size)
    expected_input = transform(Image.fromarray(square))
    assert torch.equal(encoder.preprocessed([square])[0], expected_input)

    model = timm.create_model(model_name, num_classes=3)
    model.load_state_dict(load_file(weights[model_name]))
    model.reset_classifier(0)
    with torch.inference_mode():
        expected = model.eval()(expected_input[None]).numpy()
    rows = encoder.encode([image])
    assert rows.dtype == np.float32 and rows.shape == (1, encoder.width)
    np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("model_name", MODELS)
def test_timm_input_is_what_timm_makes_of_a_picture_with_room_to_crop(model_name, weights):
    encoder = build_encoder(f"timm:{model_name}@{weights[model_name]}")
    image = drawing(1)
    transform, config = timm_transform(model_name)
    # As large as timm's transform scales to, with the rim that its centre crop cuts off: the object ends up in the same place.
    scaled = int(encoder.input_size / config["crop_pct"])
    margin = (0.05 * encoder.input_size + (scaled - encoder.input_size) / 2) / scaled
    expected = transform(Image.fromarray(prepare_image(image, size=scaled, margin=margin)))
    got = encoder.preprocessed([prepare_image(image, size=encoder.input_size)])[0]
    assert got.shape == expected.shape
    assert (got - expected).abs().mean() < 0.03  # of values with a standard deviation near 1; half a pixel of shift at the most


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_timm_row_does_not_depend_on_the_rest_of_the_batch(dtype, weights):
    encoder = build_encoder(f"timm:eva02_tiny_patch14_224@{weights['eva02_tiny_patch14_224']}", dtype=dtype)
    images = [drawing(seed) for seed in range(3)]
    together = encoder.encode(images)
    assert encoder.encode([]).shape == (0, encoder.width)
    for image, row in zip(images, together, strict=True):
        np.testing.assert_array_equal(encoder.encode([image])[0], row)
    assert not np.array_equal(together[0], together[1])


def test_encode_squares_is_encode_without_the_preparation(weights):
    for encoder in (build_encoder("hog"), build_encoder(f"timm:test_vit@{weights['test_vit']}")):
        images = [drawing(4, size=90), drawing(5, size=200)]
        squares = [prepare_image(image, size=encoder.input_size) for image in images]
        np.testing.assert_array_equal(encoder.encode_squares(squares), encoder.encode(images))
        assert encoder.encode_squares([]).shape == (0, encoder.width)
        with pytest.raises(ValueError, match=rf"\(90, 90, 3\): prepare_image\(image, size={encoder.input_size}\)"):
            encoder.encode_squares(images)


def test_timm_bfloat16_is_near_float32_and_float32_is_the_default_on_a_cpu(weights):
    name = f"timm:eva02_tiny_patch14_224@{weights['eva02_tiny_patch14_224']}"
    image = drawing(2)
    auto, exact, half = (build_encoder(name, dtype=dtype).encode([image])[0] for dtype in ("auto", "float32", "bfloat16"))
    np.testing.assert_array_equal(auto, exact)
    assert not np.array_equal(half, exact)
    assert cosine(half, exact) > 0.9999


def test_timm_digest_names_weights_and_preprocessing_not_files(weights, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(weights["test_vit"])
    bare = {key: value for key, value in state.items() if not key.startswith("head.")}
    save_file(bare, tmp_path / "copy.safetensors", metadata={"from": "elsewhere"})
    first = build_encoder(f"timm:test_vit@{weights['test_vit']}")
    assert build_encoder(f"timm:test_vit@{tmp_path / 'copy.safetensors'}").digest == first.digest
    bare["norm.bias"] = bare["norm.bias"] + 1e-3
    save_file(bare, tmp_path / "changed.safetensors")
    assert build_encoder(f"timm:test_vit@{tmp_path / 'changed.safetensors'}").digest != first.digest


def test_timm_digest_and_preprocessing_follow_the_tag(tmp_path):
    import timm
    from safetensors.torch import save_file

    model = "mobilenetv4_conv_small"
    save_file(timm.create_model(model, num_classes=0).state_dict(), tmp_path / "w.safetensors")
    first, second = (build_encoder(f"timm:{model}.{tag}@{tmp_path / 'w.safetensors'}") for tag in ("e1200_r224_in1k", "e3600_r256_in1k"))
    assert (first.input_size, second.input_size) == (224, 256)
    assert first.digest != second.digest


def test_timm_file_that_does_not_fit_names_the_keys(weights, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(weights["test_vit"])
    del state["norm.bias"]
    state["extra.weight"] = state["norm.weight"].clone()
    state["cls_token"] = state["cls_token"][..., :32].contiguous()
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError) as caught:
        build_encoder(f"timm:test_vit@{tmp_path / 'w.safetensors'}")
    told = str(caught.value)
    assert "norm.bias is missing" in told
    assert "extra.weight does not belong to it" in told
    assert "cls_token (1, 1, 32) instead of (1, 1, 64) has another shape" in told


def test_timm_file_of_another_model_is_refused(weights):
    with pytest.raises(ValueError, match=r"does not fit test_vit: .* and \d+ more is missing"):
        build_encoder(f"timm:test_vit@{weights['mobilenetv3_small_050']}")


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".pt", ""])
def test_timm_pickled_weights_are_never_opened(suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ValueError, match="Pickled weights"):
        build_encoder(f"timm:test_vit@{path}")


def test_timm_file_missing_or_broken_says_so(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        build_encoder(f"timm:test_vit@{tmp_path / 'none.safetensors'}")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        build_encoder(f"timm:test_vit@{broken}")


def test_timm_without_a_network_names_the_remedy(monkeypatch):
    import timm

    def unreachable(*args, **kwargs):
        raise ConnectionError("Name or service not known\nlong traceback")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ValueError, match=r"cannot get these weights \(Name or service not known\).*timm:test_vit@/path/to/model.safetensors"):
        build_encoder("timm:test_vit")
