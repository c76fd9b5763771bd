"""Checkpoint folders and members: the same predictions after loading, and what is refused."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cad_models.checkpoint import CheckpointError, gather_files, load_member, member_digest, read_weights, write_json
from cad_models.tasks import TASKS
from tests.rayjobs.members import IMAGE_WIDTH, TASK, write_tiny_member

SMALL = {"model__num_points": 64, "model__embed_dim": 16}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_tiny_member(tmp_path_factory.mktemp("members") / "member", **SMALL)


@pytest.fixture
def member(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "member"))


def batch_of(recipe) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "points": torch.randn(3, recipe.model.num_points, 6, generator=generator),
        "query_views": torch.randn(3, 2, IMAGE_WIDTH, generator=generator),
        "query_mask": torch.tensor([[True, True], [True, False], [True, True]]),
        "group": torch.arange(3),
        "label": torch.zeros(3, dtype=torch.int64),
    }


def rewrite(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# --- whole members ------------------------------------------------------------------------------------------------------------------------
def test_member_loaded_predicts_what_the_written_learner_did(tmp_path):
    directory = write_tiny_member(tmp_path / "m", seed=5, **SMALL, loss__learned_temperature=True, model__top_k=1)
    loaded = load_member(directory)
    torch.manual_seed(5)
    signature = json.loads((directory / "signature.json").read_text())
    fresh = TASK.learner(loaded.recipe, signature).eval()
    with torch.inference_mode():
        a, b = loaded.learner.predict(batch_of(loaded.recipe)), fresh.predict(batch_of(loaded.recipe))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert not loaded.learner.training
    assert (loaded.task.name, loaded.signature, loaded.metrics) == ("alignment", signature, {"val/recall@3": 0.5})


def test_member_digest_is_of_the_content_and_not_of_the_place(original, member):
    assert member_digest(original) == member_digest(member) == load_member(member).digest
    (member / "metrics.json").write_text("{}")  # what was measured does not change the answers
    assert member_digest(member) == member_digest(original)


@pytest.mark.parametrize("name", ["recipe.json", "signature.json", "moe.safetensors", "pc_encoder.safetensors"])
def test_member_changed_after_registration_is_refused_naming_both_digests(member, name):
    digest = member_digest(member)
    data = bytearray((member / name).read_bytes())
    data[-2] ^= 1
    (member / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"digest {member_digest(member)[:16]}.*registered was {digest[:16]}"):
        load_member(member, digest=digest)


@pytest.mark.parametrize("name", ["recipe.json", "signature.json", "moe.safetensors", "pc_encoder.safetensors"])
def test_member_with_a_missing_file_is_refused_naming_it(member, name):
    (member / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_member(member)


def test_member_without_recorded_metrics_still_loads(member):
    (member / "metrics.json").unlink()
    assert load_member(member).metrics == {}


def test_folder_that_is_none_or_holds_no_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such folder"):
        load_member(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no"):
        load_member(tmp_path)


@pytest.mark.parametrize("name", ["moe", "pc_encoder"])
def test_pickle_under_a_safetensors_name_is_refused_and_never_loaded(member, tmp_path, name):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    for write in (lambda path: path.write_bytes(pickle.dumps(Trap())), lambda path: torch.save({"weight": torch.ones(2)}, path)):
        write(member / f"{name}.safetensors")
        with pytest.raises(CheckpointError, match=f"{name}.safetensors is not a safetensors file"):
            load_member(member)
    assert not (tmp_path / "sprung").exists()


def test_truncated_weights_are_refused(member):
    path = member / "pc_encoder.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="pc_encoder.safetensors is not a safetensors file"):
        load_member(member)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("bias"), "moe.safetensors does not fit: lacks bias"),
        (lambda state: state.update(more=torch.ones(1)), "moe.safetensors does not fit: has the unknown more"),
        (lambda state: state.update(image_mean=torch.ones(7)), rf"image_mean has shape \[7\], the recipe makes \[{IMAGE_WIDTH}\]"),
    ],
)
def test_weights_that_do_not_fit_the_recipe_are_refused_naming_file_and_key(member, change, message):
    state = load_file(member / "moe.safetensors")
    change(state)
    save_file(state, member / "moe.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_member(member)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("recipe.json", lambda v: v.update(task="alignmnt"), "names the task 'alignmnt'; known are alignment"),
        ("recipe.json", lambda v: v.pop("recipe"), "recipe.json holds no recipe"),
        ("recipe.json", lambda v: v["recipe"]["model"].update(depth=3), "does not fit this version of the program: model.depth"),
        ("recipe.json", lambda v: v["recipe"].update(batch_size="8"), "batch_size: expected int"),
        ("signature.json", lambda v: v.update(channels="xyz"), "recipe's model.channels is 'xyz.normals', the signature says 'xyz'"),
    ],
)
def test_description_that_does_not_fit_is_refused_naming_both_sides(member, name, change, message):
    rewrite(member / name, change)
    with pytest.raises(ValueError, match=message):
        load_member(member)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_broken_description_is_refused_naming_the_file(member, text):
    (member / "recipe.json").write_text(text)
    with pytest.raises(CheckpointError, match="recipe.json"):
        load_member(member)


def test_write_json_of_what_json_does_not_know_is_null(tmp_path):
    write_json(tmp_path / "x.json", {"b": float("nan"), "a": [float("inf"), 1.5, {"c": -float("inf")}]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.5, {"c": None}], "b": None}


# --- files given one by one ---------------------------------------------------------------------------------------------------------------
def test_gathered_files_make_the_member_that_they_came_from(member, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(member / "pc_encoder.safetensors", elsewhere / "pc_encoder_recall@3.safetensors")
    digest = load_member(gather_files(f"{member}/moe.safetensors:{elsewhere}/pc_encoder_recall@3.safetensors", tmp_path / "into")).digest
    shutil.move(elsewhere / "pc_encoder_recall@3.safetensors", member / "pc_encoder.safetensors")
    assert digest == load_member(member).digest


@pytest.mark.parametrize(
    "pair, message",
    [
        ("{m}/moe.safetensors", "no file for pc_encoder"),
        ("{m}/moe.safetensors:{m}/gone.safetensors", "gone.safetensors is missing"),
        ("{m}/moe.safetensors:{m}/moe_2.safetensors:{m}/pc_encoder.safetensors", "two files for moe"),
        ("{m}/moe.safetensors:{m}/encoder.safetensors", "begins with none of moe, pc_encoder"),
        ("{m}/moe.pth:{m}/pc_encoder.safetensors", "pickled weights .* are never read"),
        ("{m}/../moe.safetensors:{m}/pc_encoder.safetensors", "recipe.json must lie beside"),
    ],
)
def test_gathered_files_that_make_no_member_are_refused(member, tmp_path, pair, message):
    for name in ("moe_2.safetensors", "encoder.safetensors", "moe.pth", "../moe.safetensors"):
        shutil.copy(member / "moe.safetensors", member / name)
    with pytest.raises(CheckpointError, match=message):
        gather_files(pair.format(m=member), tmp_path / "into")


def test_gathered_files_with_a_broken_recipe_are_refused(member, tmp_path):
    rewrite(member / "recipe.json", lambda v: v.pop("recipe"))
    with pytest.raises(CheckpointError, match="holds no recipe"):
        gather_files(f"{member}/moe.safetensors:{member}/pc_encoder.safetensors", tmp_path / "into")


def test_read_weights_of_a_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError):
        read_weights(tmp_path)


def test_every_task_writes_all_its_weights_each_once(original):
    for task in TASKS.values():
        learner = load_member(original).learner
        names = [tensor.data_ptr() for state in learner.artifacts().values() for tensor in state.values()]
        assert len(names) == len(set(names)) == len(learner.state_dict()), task.name
