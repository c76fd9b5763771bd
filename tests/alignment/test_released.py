"""Released ReConV2 checkpoints: outputs of the reference, variants recognised from shapes, the import command, trainings that start from one."""

import dataclasses
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from cad_models.alignment.learner import AlignmentLearner
from cad_models.alignment.model import PointEncoder, PointEncoderConfig, released_config
from cad_models.alignment.recipe import AlignmentModel, AlignmentRecipe
from cad_models.alignment.released import (
    ImportJob,
    import_released,
    load_imported,
    load_reconv2,
    main,
    read_released,
    recognized_config,
    reconv2_name,
    variant_name,
)
from cad_models.checkpoint import CheckpointError, start_from
from tests.shared import shared_path

GOLDENS = ["recon_causal_xyz", "recon_rand_color", "recon_rand_dino_ls"]
VARIANTS = ["small", "small_1k", "base", "base_1k", "large", "large_1k"]
# The same kinds of layers as a released encoder, in a size that costs nothing.
TINY = PointEncoderConfig(
    width=36, depth=2, num_heads=3, num_groups=6, group_size=5, patch_widths=(8, 12), num_image_queries=4, num_text_queries=2,
    embed_dim=10, channels="xyz", centers="fps", mode="reconv2", causal=True, stop_gradient=True, drop_path=0.1,
)  # fmt: skip


def golden(name):
    """A golden's configuration, as ours, and all that it holds."""
    reference = torch.load(shared_path(f"golden/{name}.pt"), weights_only=True)
    theirs = reference["config"]
    config = PointEncoderConfig(
        width=theirs["embed_dim"],
        depth=theirs["depth"],
        num_heads=theirs["num_heads"],
        num_groups=theirs["num_group"],
        group_size=theirs["group_size"],
        patch_widths=(128, 256),
        num_image_queries=theirs["img_queries"],
        num_text_queries=theirs["text_queries"],
        embed_dim=1280,
        channels="xyz+color" if theirs["with_color"] else "xyz",
        centers="fps",
        drop_path=0.1,
        mode="reconv2",
        causal=theirs["mask_type"] == "causal",
        layer_scale=1e-5 if "dino" in theirs["pretrained_model_name"] else 0.0,
        stop_gradient=theirs["stop_grad"],
    )
    return config, reference


def assert_stages_equal(encoder, reference):
    with torch.no_grad():
        features = encoder.encode(reference["pts"])
    stages = {
        "centers": features.centers,
        "tokens": features.tokens,
        "local": features.local,
        "glob": features.queries,
        "img": features.image_tokens,
        "txt": features.text_tokens,
        # The order of the points within a patch is free: both sides are sorted by coordinates.
        "groups": features.groups.sort(dim=2).values,
    }
    for stage, actual in stages.items():
        expected = reference[stage].sort(dim=2).values if stage == "groups" else reference[stage]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5, msg=lambda text, s=stage: f"{s}: {text}")


def released_state(config, seed=0):
    """Random weights under the released names, a decoder beside them."""
    torch.manual_seed(seed)
    encoder = PointEncoder(config)
    names = {
        "queries": "model.global_query", "patch_embed.first.": "model.embed.first_conv.", "patch_embed.second.": "model.embed.second_conv.",
        "start_position": "model.encoder.sos_pos", "start_token": "model.encoder.sos", "local_blocks.": "model.encoder.blocks.local_blocks.",
        "cross_blocks.": "model.encoder.blocks.global_blocks.", "local_norm.": "model.encoder.ln_f1.", "query_norm.": "model.encoder.ln_f2.",
        "position.": "model.pos_embed.", "image_proj.": "img_proj.", "text_proj.": "text_proj.",
    }  # fmt: skip
    state = {}
    for ours, tensor in encoder.state_dict().items():
        prefix = next(p for p in names if ours.startswith(p))
        convolution = ours.startswith("patch_embed.") and tensor.dim() == 2
        state[names[prefix] + ours[len(prefix) :]] = tensor.unsqueeze(-1) if convolution else tensor
    columns = 3 if config.channels == "xyz" else 6
    state["model.decoder.increase_dim.0.weight"] = torch.zeros(columns * config.group_size, config.width, 1)
    state["model.norm.weight"] = torch.ones(config.width)
    return encoder.eval(), state


def write_released(path, state, prefix="module."):
    torch.save({"base_model": {prefix + n: t for n, t in state.items()}, "optimizer": {"lr": 1e-4}, "epoch": 3, "best_lvis": 0.5}, path)
    return path


def job(tmp_path, **changes):
    return ImportJob(checkpoint=tmp_path / "best.pth", output=tmp_path / "out", **changes)


# The reference's outputs


@pytest.mark.parametrize("name", GOLDENS)
def test_reconv2_mode_stages_equal_reference_values(name):
    config, reference = golden(name)
    encoder = PointEncoder(config).eval()
    load_reconv2(encoder, {f"module.{key}": tensor for key, tensor in reference["state"].items()})
    assert_stages_equal(encoder, reference)


@pytest.mark.parametrize("name", GOLDENS)
def test_imported_golden_checkpoint_has_the_reference_values(name, tmp_path):
    config, reference = golden(name)
    write_released(tmp_path / "best.pth", reference["state"])
    found = import_released(job(tmp_path, num_heads=config.num_heads, num_groups=config.num_groups, num_image_queries=config.num_image_queries))
    # Group size from the decoder, queries' sum, widths, colour, LayerScale: all but what the flags said was read off the shapes.
    assert found == config
    assert_stages_equal(load_imported(str(tmp_path / "out")), reference)


# Variants


@pytest.mark.parametrize("name", VARIANTS)
def test_released_names_and_shapes_are_recognised_and_all_have_a_place(name):
    size, _, points = name.partition("_")
    file = shared_path(f"golden/keys/recon_{size}_openshape{'_1k' if points else ''}.json")
    released = json.loads(file.read_text())["tensors"]
    with torch.device("meta"):
        encoder = PointEncoder(released_config(name))
        state = {f"module.{key}": torch.empty(shape) for key, shape in released.items()}
    found = recognized_config(state)
    assert found == released_config(name) and variant_name(found) == name
    ours = {key: tuple(tensor.shape) for key, tensor in encoder.state_dict().items()}
    theirs = {}
    for key, tensor in state.items():
        if our_name := reconv2_name(key):
            theirs[our_name] = tuple(tensor.squeeze(-1).shape if our_name.startswith("patch_embed") else tensor.shape)
    assert ours == theirs


def test_giant_has_the_published_parameter_counts_and_is_recognised():
    with torch.device("meta"):
        encoder, state = released_state(released_config("giant"))
    for blocks in (encoder.local_blocks, encoder.cross_blocks):
        assert sum(p.numel() for p in blocks.parameters()) == pytest.approx(1010e6, rel=0.005)
    assert variant_name(recognized_config(state)) == "giant"


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 384, "num_heads": 6, "num_groups": 64},  # causal, as TINY
        {"width": 384, "num_heads": 6, "num_groups": 64, "channels": "xyz+color", "patch_widths": (256, 512, 1024)},
        {"width": 768, "num_heads": 12, "num_groups": 512, "causal": False, "stop_gradient": False, "layer_scale": 1e-5, "group_size": 64},
        {"width": 384, "num_heads": 6, "num_groups": 64, "num_image_queries": 8, "num_text_queries": 3},
    ],
)
def test_other_recipes_of_the_reference_are_read_off_their_shapes(changes):
    config = dataclasses.replace(TINY, **{"depth": 1, "num_image_queries": 13, "num_text_queries": 3} | changes)
    with torch.device("meta"):
        _, state = released_state(config)
    found = recognized_config(state)
    assert found == config and variant_name(found) == ""
    del state["model.decoder.increase_dim.0.weight"]
    assert recognized_config(state).group_size == 32


def test_recognition_asks_for_what_shapes_do_not_tell():
    _, state = released_state(TINY)
    with pytest.raises(ValueError, match="width 36.*--num-heads"):
        recognized_config(state)
    with pytest.raises(ValueError, match="6 queries.*--num-image-queries"):
        recognized_config(state, num_heads=3)
    with pytest.raises(ValueError, match="--num-image-queries 7 must lie in 1 … 6"):
        recognized_config(state, num_heads=3, num_image_queries=7)
    assert recognized_config(state, num_heads=3, num_image_queries=4, num_groups=6) == TINY


def test_load_reconv2_names_what_does_not_fit():
    encoder, state = released_state(TINY)
    with pytest.raises(ValueError, match="lacks cross_blocks.0.attn.kv.bias"):
        load_reconv2(encoder, {})
    with pytest.raises(ValueError, match="'visual.head.weight' is no tensor of a ReConV2 checkpoint"):
        load_reconv2(encoder, {"visual.head.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"image_proj.weight has shape \[10, 35\], the recipe makes \[10, 36\]"):
        load_reconv2(encoder, state | {"img_proj.weight": torch.zeros(10, 35)})


# The command


@pytest.mark.parametrize("prefix", ["", "module."])
def test_command_writes_an_encoder_of_the_same_outputs(prefix, tmp_path, capsys):
    encoder, state = released_state(TINY)
    write_released(tmp_path / "best.pth", state, prefix)
    arguments = ["--checkpoint", str(tmp_path / "best.pth"), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--num-heads", "3", "--num-image-queries", "4", "--num-groups", "6"]) == 0
    assert "unpublished recipe" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["encoder.json", "pc_encoder.safetensors"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    points = torch.nn.functional.normalize(torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(1)), dim=-1)
    with torch.no_grad():
        assert torch.equal(load_imported(str(tmp_path / "out"))(points), encoder(points))


def test_state_dict_without_the_trainers_entries_is_read_too(tmp_path):
    _, state = released_state(TINY)
    torch.save(state, tmp_path / "best.pth")
    assert read_released(tmp_path / "best.pth").keys() == state.keys()


class Hostile:
    """What a pickle may hold: something that acts when it is read."""

    def __reduce__(self):
        return exec, ("raise SystemExit('it was executed')",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        (b"not a checkpoint", "nothing else is ever unpickled"),
        (pickle.dumps({"base_model": Hostile()}), "nothing else is ever unpickled"),
        ({"base_model": {"a": Hostile()}}, "nothing else is ever unpickled"),
        ({"state": {"x": 1}}, "holds no model: expected an entry base_model with tensors, found state"),
        ({}, "holds no model"),
        ({"base_model": {"visual.proj": torch.zeros(2)}}, "'visual.proj' is no tensor of a ReConV2 checkpoint"),
        ({"base_model": {"model.global_query": torch.zeros(1, 16, 384)}}, "no model.encoder.blocks.local_blocks"),
    ],
)
def test_command_refuses_what_is_no_released_checkpoint(content, message, tmp_path, capsys):
    if isinstance(content, bytes):
        (tmp_path / "best.pth").write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / "best.pth")
    assert main(["--checkpoint", str(tmp_path / "best.pth"), "--output", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_refuses_a_used_folder_and_weights_that_are_not_finite(tmp_path):
    _, state = released_state(TINY)
    flags = {"num_heads": 3, "num_image_queries": 4, "num_groups": 6}
    write_released(tmp_path / "best.pth", state | {"img_proj.bias": torch.full((10,), torch.nan)})
    with pytest.raises(ValueError, match="not finite in image_proj.bias"):
        import_released(job(tmp_path, **flags))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty"):
        import_released(job(tmp_path, **flags))


def test_broken_import_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="has no encoder.json"):
        load_imported(str(tmp_path))
    _, state = released_state(TINY)
    write_released(tmp_path / "best.pth", state)
    import_released(job(tmp_path, num_heads=3, num_image_queries=4, num_groups=6))
    (tmp_path / "out" / "pc_encoder.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="missing or broken"):
        load_imported(str(tmp_path / "out"))


# Trainings that start from one


def test_training_starts_from_an_import_and_the_head_stays_as_initialised(tmp_path):
    recipe = AlignmentRecipe(model=AlignmentModel(size="recon_small_1k", channels="xyz", embed_dim=1280, num_experts=1))
    with torch.device("meta"):
        learner = AlignmentLearner(recipe, 5)
    assert learner.point_encoder.config == dataclasses.replace(released_config("small_1k"), drop_path=0.0)
    small = AlignmentRecipe(model=AlignmentModel(embed_dim=16, channels="xyz", num_experts=1))
    torch.manual_seed(0)
    learner, other = AlignmentLearner(small, 5), AlignmentLearner(small, 5)
    head = learner.image_head.weight.clone()
    save_file(dict(other.point_encoder.state_dict()), tmp_path / "pc_encoder.safetensors")
    (tmp_path / "encoder.json").write_text("{}")
    start_from(learner, str(tmp_path))
    assert torch.equal(learner.image_head.weight, head)
    stored = load_file(tmp_path / "pc_encoder.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in learner.point_encoder.state_dict().items())


def test_start_from_names_what_is_wrong(tmp_path):
    learner = AlignmentLearner(AlignmentRecipe(model=AlignmentModel(embed_dim=16, channels="xyz", num_experts=1)), 5)
    with pytest.raises(CheckpointError, match="--init-from .*/nowhere: there is no such folder"):
        start_from(learner, str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="holds no \\*.safetensors"):
        start_from(learner, str(tmp_path))
    save_file({"queries": torch.zeros(1)}, tmp_path / "pc_encoder.safetensors")
    with pytest.raises(CheckpointError, match="pc_encoder.safetensors does not fit: .*lacks cross_blocks"):
        start_from(learner, str(tmp_path))
    save_file({"x": torch.zeros(1)}, tmp_path / "generator.safetensors")
    with pytest.raises(CheckpointError, match="generator: this task's files are moe, pc_encoder"):
        start_from(learner, str(tmp_path))


def test_encoder_with_colour_sees_gray_where_a_part_has_none():
    with torch.device("meta"):
        AlignmentLearner(AlignmentRecipe(model=AlignmentModel(size="recon_base", channels="xyz+color", embed_dim=1280, num_experts=1)), 5)
    torch.manual_seed(0)
    learner = AlignmentLearner(AlignmentRecipe(model=AlignmentModel(channels="xyz+color", embed_dim=16, num_experts=1)), 5).eval()
    points = torch.nn.functional.normalize(torch.randn(2, 64, 3), dim=-1)
    gray = torch.cat([points, torch.full_like(points, 0.4)], dim=-1)
    with torch.no_grad():
        assert torch.equal(learner.embed_cad(points), learner.point_encoder(gray))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": "recon_base_1k"}, "--model.channels is 'xyz\\+normals': it must be xyz for --model.size recon_base_1k"),
        ({"size": "recon_large", "channels": "xyz"}, "it must be xyz\\+color"),
        ({"size": "recon_base", "channels": "xyz+color", "embed_dim": 512}, "--model.embed-dim is 512: it must be 1280"),
    ],
)
def test_recipe_of_a_released_size_needs_its_channels_and_width(values, message):
    with pytest.raises(ValueError, match=message):
        AlignmentModel(**values)
