"""Classifiers, their normalised input and their loss: published parameter counts, slow references, and one process against two."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import nn

from cad_models.common.encoders import HogEncoder
from cad_models.config import replace_all
from cad_models.images.learner import ImagesLearner, build
from cad_models.images.loss import balanced_weights, classification_loss
from cad_models.images.model import HogClassifier, InputNormaliser, SimpleCnn, WorkersBatchNorm2d, build_classifier, high_pass
from cad_models.images.recipe import SMOKE, ImagesModel


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- models -------------------------------------------------------------------------------------------------------------------------------
def test_simple_cnns_have_the_published_parameter_counts():
    assert num_parameters(build_classifier(ImagesModel(name="simple_cnn"), 2)) == 455_682
    assert num_parameters(build_classifier(ImagesModel(name="simple_cnn_v2"), 2)) == 455_490


@pytest.mark.parametrize("size", [16, 31, 128])
@pytest.mark.parametrize("name", ["simple_cnn", "simple_cnn_v2", "hog"])
def test_any_image_size_and_number_of_classes(name, size):
    config = ImagesModel(name=name)
    logits = build_classifier(config, 7).eval()(torch.randn(2, config.num_channels, size, size))
    assert logits.shape == (2, 7) and torch.isfinite(logits).all()


@pytest.mark.parametrize("high_pass_channel", [False, True])
def test_timm_model_follows_classes_and_channels(high_pass_channel):
    config = ImagesModel(name="timm:test_resnet", high_pass=high_pass_channel)
    model = build_classifier(config, 5).eval()
    assert model(torch.randn(2, config.num_channels, 48, 48)).shape == (2, 5)


def test_timm_file_gives_its_weights_to_other_classes_and_a_fourth_channel(tmp_path):
    import timm

    source = timm.create_model("test_resnet", num_classes=1000)
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, tmp_path / "w.safetensors")
    model = build_classifier(ImagesModel(name=f"timm:test_resnet@{tmp_path / 'w.safetensors'}", high_pass=True), 3)
    own, given = model.state_dict(), source.state_dict()
    first = f"{source.pretrained_cfg['first_conv']}.weight"
    assert own[first].shape[1] == 4 and len(own["fc.weight"]) == 3
    same = [k for k in given if k != first and not k.startswith("fc.")]
    assert all(torch.equal(own[k], given[k]) for k in same)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet1888", "no model 'resnet1888': did you mean timm:resnet"),
        ("timm:test_resnet@w.pth", "pickled weights"),
        ("timm:test_resnet@nowhere.safetensors", "there is no file"),
    ],
)
def test_wrong_timm_name_is_told_in_the_flags_words(name, message):
    with pytest.raises(ValueError, match=f"--model.name {name.split('@')[0]}.*{message}"):
        build_classifier(ImagesModel(name=name), 2)
    with pytest.raises(ValueError, match="--model.name is 'simple'"):
        ImagesModel(name="simple")


def test_weights_of_another_model_are_refused(tmp_path):
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="does not fit: lacks"):
        build_classifier(ImagesModel(name=f"timm:test_resnet@{tmp_path / 'w.safetensors'}"), 2)


def test_hog_of_tensors_equals_the_encoders():
    rng = np.random.default_rng(0)
    image = np.clip(rng.normal(128, 60, (128, 128, 3)), 0, 255).astype(np.uint8)
    image[:, 40:70] = (200, 30, 30)
    grey = torch.from_numpy(image.astype(np.float32)) @ torch.tensor([0.299, 0.587, 0.114])
    found = HogClassifier(3, 2, dropout=0.0).describe(torch.stack([grey, torch.zeros_like(grey)]))
    np.testing.assert_allclose(found[0].numpy(), HogEncoder().describe(image), atol=2e-5)
    assert found[1].abs().max() == 0


# --- input --------------------------------------------------------------------------------------------------------------------------------
def test_high_pass_equals_the_loop_over_neighbours():
    rgb = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    grey = rgb.mean(1)
    for n in range(2):
        for y in range(5):
            for x in range(6):
                around = sum(
                    float(grey[n, y + dy, x + dx]) for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1)) if 0 <= y + dy < 5 and 0 <= x + dx < 6
                )
                assert float(high_pass(rgb)[n, 0, y, x]) == pytest.approx(float(grey[n, y, x]) - around / 4, abs=1e-6)


def test_high_pass_statistics_are_those_of_all_pictures_at_once():
    pixels = torch.randint(0, 256, (11, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    normaliser = InputNormaliser((0.5,) * 3, (0.2,) * 3, with_high_pass=True)
    normaliser.fit(iter(pixels.split(4)))
    values = high_pass(pixels.double() / 255)
    assert float(normaliser.mean[3]) == pytest.approx(float(values.mean()), abs=1e-6)
    assert float(normaliser.std[3]) == pytest.approx(float(values.std(correction=0)), rel=1e-5)
    out = normaliser(pixels)
    assert float(out[:, 3].mean()) == pytest.approx(0, abs=1e-4) and float(out[:, 3].std()) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(out[:, :3], (pixels.float() / 255 - 0.5) / 0.2)
    with pytest.raises(ValueError, match="train split is empty"):
        normaliser.fit(iter(()))


# --- loss ---------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_equals_torchs_cross_entropy(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(9, 4, generator=generator), torch.randint(0, 4, (9,), generator=generator)
    weights = torch.tensor([0.5, 2.0, 1.0, 0.25])
    expected = nn.CrossEntropyLoss(weight=weights, label_smoothing=smoothing)(logits, target)
    torch.testing.assert_close(classification_loss(logits, target, weights, label_smoothing=smoothing), expected)


def test_balanced_weights_make_classes_count_the_same():
    weights = balanced_weights([30, 10, 0])
    assert weights.tolist() == pytest.approx([40 / 60, 40 / 20, 0.0])
    assert float((weights * torch.tensor([30.0, 10.0, 0.0])).sum()) == pytest.approx(40)  # mean weight 1


# --- one batch on two workers -------------------------------------------------------------------------------------------------------------
def _learner() -> ImagesLearner:
    torch.manual_seed(0)
    recipe = replace_all(SMOKE, {"model.dropout": 0.0, "loss.class_weights": "balanced", "loss.label_smoothing": 0.1, "data.image_size": 32})
    return ImagesLearner(recipe, [5, 2, 9]).train()


def _batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return {"pixels": pixels, "label": torch.tensor([0, 1, 2, 0, 2, 2, 1, 0])}


def _step(model: nn.Module, learner: ImagesLearner, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    loss = model(batch, "model")["loss"]
    loss.backward()
    return {
        "loss": loss.detach(),
        **{f"grad/{n}": p.grad.clone() for n, p in learner.named_parameters()},
        **{n: b.clone() for n, b in learner.state_dict().items() if "running" in n},
    }


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    learner = _learner()
    batch = {name: tensor[rank * 4 : rank * 4 + 4] for name, tensor in _batch().items()}
    found = _step(nn.parallel.DistributedDataParallel(learner), learner, batch)
    save_file({k: v.contiguous() for k, v in found.items()}, f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_take_the_step_of_one(tmp_path):
    from safetensors.torch import load_file

    learner = _learner()
    whole = _step(learner, learner, _batch())
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    halves = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    assert float(sum(half["loss"] for half in halves) / 2) == pytest.approx(float(whole["loss"]), abs=1e-6)
    for name, expected in whole.items():
        if name != "loss":
            for half in halves:
                torch.testing.assert_close(half[name], expected, atol=2e-6, rtol=2e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_workers_batch_norm_in_one_process_is_torchs():
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    ours, theirs = WorkersBatchNorm2d(3), nn.BatchNorm2d(3)
    torch.testing.assert_close(ours(x), theirs(x), atol=0, rtol=0)
    assert isinstance(SimpleCnn(3, 2, conv_bias=True, dropout=0.0).features[1], WorkersBatchNorm2d)


# --- learner ------------------------------------------------------------------------------------------------------------------------------
def test_learner_refuses_another_signature_and_other_weights():
    signature = {"class_names": ["a", "b"], "class_counts": [3, 4], "image_size": SMOKE.data.image_size, "stored_size": 48, "num_channels": 4}
    learner = build(SMOKE, signature)
    assert learner.adapt_objects is None
    with pytest.raises(ValueError, match="image_size is 40, the signature says 64"):
        build(SMOKE, {**signature, "image_size": 64})
    weights = learner.artifacts()["classifier"]
    with pytest.raises(ValueError, match="classifier.head.3.weight has shape .2, 256., the recipe makes .3, 256."):
        build(SMOKE, {**signature, "class_counts": [1, 2, 3]}).load_artifacts({"classifier": weights})
    with pytest.raises(ValueError, match="has the unknown more; lacks normaliser.mean"):
        rest = {k: v for k, v in weights.items() if k != "normaliser.mean"}
        learner.load_artifacts({"classifier": {**rest, "more": torch.zeros(1)}})


def test_training_scalars_of_a_batch_are_sklearns():
    from sklearn.metrics import accuracy_score, f1_score

    learner, batch = _learner(), _batch()
    with torch.no_grad():
        answer = learner.classifier(learner.normaliser(batch["pixels"])).argmax(1)
        scalars = learner(batch, "model")
    assert float(scalars["accuracy"]) == pytest.approx(accuracy_score(batch["label"], answer))
    assert float(scalars["macro_f1"]) == pytest.approx(f1_score(batch["label"], answer, average="macro"))
