"""The loop in one process: it learns, resumes exactly, and refuses what cannot be right."""

import contextlib
import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from cad_models.alignment.recipe import SMOKE
from cad_models.checkpoint import load_member, read_weights
from cad_models.config import replace_all
from cad_models.tasks import TASKS
from rayjobs.batching import fitting_batch_size, prefetched
from rayjobs.loop import LoopConfig, Training, TrainingDiverged
from rayjobs.loop_state import LoopState
from rayjobs.predictions import predict_split, split_metrics
from rayjobs.resources import ScaleConfig
from rayjobs.streams import SplitStream, open_dataset
from rayjobs.train import loop_config
from tests.synthetic import make_dataset

TASK = TASKS["alignment"]
# Smaller than the smoke recipe, but every part of it: warm-up, EMA, experts, augmentation, learned temperature.
RECIPE = replace_all(
    SMOKE,
    {
        "model.num_points": 64,
        "model.embed_dim": 32,
        "schedule.num_epochs": 3,
        "data.num_points": 64,
        "loss.learned_temperature": True,
        "data.views_per_step": 3,
    },
)
# What depends on the machine and the moment.
VOLATILE = ("objects_per_s", "seconds", "system/")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(str(tmp_path_factory.mktemp("data") / "ds"), 40, recipe=RECIPE).uri


def config_of(dataset: str, folder: Path, recipe=RECIPE, **changes) -> LoopConfig:
    made = loop_config(
        task_name="alignment",
        recipe=recipe,
        dataset_uri=dataset,
        output=str(folder.parent),
        name=folder.name,
        scale=ScaleConfig(num_workers=0),
        plan=None,
    )
    return dataclasses.replace(made, **changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{p.name}/{k}": v for p in sorted(folder.glob("*.safetensors")) for k, v in read_weights(p).items()}


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def stable_lines(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["metrics"] = {n: v for n, v in line["metrics"].items() if not any(word in n for word in VOLATILE)}
    return lines


def assert_same_run(left: Path, right: Path) -> None:
    for name in ("best/mean", "best/image_to_mesh", "best/mesh_to_image", "last"):
        a, b = weights(left / name), weights(right / name)
        assert a.keys() == b.keys() and len(a) > 10
        for key in a:
            assert torch.equal(a[key], b[key]), f"{name}/{key}"
    assert stable_lines(left) == stable_lines(right)
    results = [json.loads((folder / "result.json").read_text()) for folder in (left, right)]
    for result in results:
        result["metrics"] = {n: v for n, v in result["metrics"].items() if not any(word in n for word in VOLATILE)}
    assert results[0] == results[1]


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    Training(config_of(dataset, folder)).run()
    return folder


class Killed(BaseException):
    """Stands for a kill at a certain point: nothing of the loop can catch it."""


# --- a whole run --------------------------------------------------------------------------------------------------------------------------
def test_run_leaves_the_files_that_it_documents(undisturbed):
    lines = stable_lines(undisturbed)
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 3), (2, 6), (3, 9)]
    for directory in ("last", "best/mean", "best/image_to_mesh", "best/mesh_to_image"):
        assert {p.name for p in (undisturbed / directory).iterdir()} == {
            "recipe.json", "signature.json", "metrics.json", "moe.safetensors", "pc_encoder.safetensors", *(["trainer_state.pt"] if directory == "last" else [])
        }  # fmt: skip
    result = json.loads((undisturbed / "result.json").read_text())
    assert result["score"] == max(line["metrics"]["val/recall@3"] for line in lines) and result["num_steps"] == 9
    test = result["metrics"]
    assert test["test/recall@3_low"] <= test["test/recall@3"] <= test["test/recall@3_high"]
    assert not any(name.endswith("_low") for line in lines for name in line["metrics"])  # once, at the end
    for name, metric in TASK.best_metrics.items():
        best = json.loads((undisturbed / "best" / name / "metrics.json").read_text())
        assert best[metric] == max(line["metrics"][metric] for line in lines) == lines[-1]["metrics"][f"best/{metric}"]
    assert "test/image_to_mesh/recall@3" in result["metrics"]
    assert not [p for p in undisturbed.rglob("*") if p.name.startswith(".")]


def test_run_learns_to_retrieve_the_objects_it_trains_on(dataset, tmp_path):
    # The objects differ in their extents alone, which augmentation would change.
    changes = {
        "data.augment.max_scale": 1.0,
        "data.augment.max_shift": 0.0,
        "data.views_per_step": 0,
        "batch_size": 24,
        "optim.ema_decay": 0.8,
    }
    recipe = replace_all(RECIPE, {**changes, "schedule.num_epochs": 20, "schedule.eval_every_epochs": 20})
    config = config_of(dataset, tmp_path / "run", recipe)
    Training(config).run()
    member = load_member(tmp_path / "run/best/mean")
    metrics = split_metrics(TASK, recipe, member.learner, config.train, torch.device("cpu"), "train")
    chance = 3 / config.train.num_rows
    assert metrics["train/recall@3"] > 2.5 * chance  # 0.49 was measured; a random order stays below 0.25
    lines = stable_lines(tmp_path / "run")
    assert [line["epoch"] for line in lines] == [20]


def test_evaluating_a_member_twice_is_bit_equal_and_as_it_was_recorded(undisturbed, dataset):
    config = config_of(dataset, undisturbed)
    member = load_member(undisturbed / "best/mean")
    first = predict_split(TASK, RECIPE, member.learner, config.val, torch.device("cpu"))
    second = predict_split(TASK, RECIPE, member.learner, config.val, torch.device("cpu"))
    assert first.keys() == second.keys() and all(np.array_equal(first[n], second[n]) for n in first)
    recorded = member.metrics
    assert {f"val/{n}": v for n, v in TASK.evaluate(first).items()} == {
        n: recorded[n] for n in recorded if n.startswith("val/") and n != "val/seconds"
    }


def test_predict_split_keeps_the_order_of_the_dataset_and_the_training_mode(undisturbed, dataset):
    config = config_of(dataset, undisturbed)
    learner = load_member(undisturbed / "last").learner.train()
    found = predict_split(TASK, RECIPE, learner, config.val, torch.device("cpu"))
    whole = np.concatenate([columns["group"] for columns in config.val.parts(0, 1)])
    np.testing.assert_array_equal(found["group"], whole)
    assert learner.training


def test_averaged_weights_are_what_is_saved_and_raw_ones_what_is_resumed(dataset, tmp_path):
    recipe = replace_all(RECIPE, {"schedule.num_epochs": 1, "optim.ema_decay": 0.5})
    training = Training(config_of(dataset, tmp_path / "run", recipe))
    training.run()
    raw = training.learner.artifacts()["pc_encoder"]
    averaged = {k.removeprefix("point_encoder."): v for k, v in training.ema.average.items() if k.startswith("point_encoder.")}
    saved = read_weights(tmp_path / "run/last/pc_encoder.safetensors")
    assert all(torch.equal(saved[k], averaged[k]) for k in saved)
    assert any(not torch.equal(saved[k], raw[k]) for k in saved)
    state = torch.load(tmp_path / "run/last/trainer_state.pt", weights_only=True)
    assert all(torch.equal(state["weights"][k], v) for k, v in training.learner.state_dict().items())


def test_run_without_averaging_saves_its_own_weights(dataset, tmp_path):
    recipe = replace_all(RECIPE, {"schedule.num_epochs": 1, "optim.ema_decay": 0.0})
    training = Training(config_of(dataset, tmp_path / "run", recipe))
    training.run()
    saved = read_weights(tmp_path / "run/last/pc_encoder.safetensors")
    assert all(torch.equal(saved[k], v) for k, v in training.learner.artifacts()["pc_encoder"].items())


# --- interrupted and resumed --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("epoch", [1, 2])
def test_run_stopped_after_an_epoch_and_resumed_equals_an_undisturbed_one(dataset, undisturbed, tmp_path, epoch):
    folder = tmp_path / "run"
    reports = []

    def stop(metrics):
        reports.append(metrics)
        if metrics["epoch"] == epoch and "stopped" not in metrics:
            (folder / "STOP").touch()

    Training(config_of(dataset, folder), report=stop).run()
    assert not (folder / "result.json").exists() and reports[-1]["stopped"] == 1.0
    assert len(stable_lines(folder)) == epoch  # it goes on to the end of the next epoch's steps, not to its evaluation
    (folder / "STOP").unlink()
    Training(config_of(dataset, folder)).run()
    assert_same_run(folder, undisturbed)


@pytest.mark.parametrize("every, killed_at", [(1, 2), (2, 5), (1, 7)])
def test_run_killed_within_an_epoch_and_resumed_equals_an_undisturbed_one(dataset, undisturbed, tmp_path, monkeypatch, every, killed_at):
    folder = tmp_path / "run"
    config = config_of(dataset, folder, checkpoint_every_steps=every)
    with monkeypatch.context() as patch:
        step = Training._step

        def killed_step(self, *arguments):
            if self.state.global_step == killed_at:
                raise Killed
            return step(self, *arguments)

        patch.setattr(Training, "_step", killed_step)
        with pytest.raises(Killed):
            Training(config).run()
    state = torch.load(folder / "last/trainer_state.pt", weights_only=True)["loop"]
    assert state["global_step"] == killed_at // every * every
    Training(config).run()
    assert_same_run(folder, undisturbed)


@pytest.mark.parametrize("point", ["_publish", "_save_last"])
def test_run_killed_between_the_best_and_the_last_repeats_itself(dataset, undisturbed, tmp_path, monkeypatch, point):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        original = getattr(Training, point)

        def killed(self, *arguments, **keywords):
            if self.state.epoch == 2:
                if point == "_publish":
                    original(self, *arguments, **keywords)  # the first of the best is there, the others and the checkpoint are not
                raise Killed
            return original(self, *arguments, **keywords)

        patch.setattr(Training, point, killed)
        with pytest.raises(Killed):
            Training(config_of(dataset, folder)).run()
    Training(config_of(dataset, folder)).run()
    assert_same_run(folder, undisturbed)


def test_run_killed_while_a_checkpoint_is_replaced_uses_the_one_before(dataset, undisturbed, tmp_path):
    folder = tmp_path / "run"
    Training(config_of(dataset, folder), report=lambda m: (folder / "STOP").touch()).run()
    (folder / "STOP").unlink()
    # As Folder.publish leaves it when it is killed between its two renames.
    shutil.move(folder / "last", folder / ".last.old")
    Training(config_of(dataset, folder)).run()
    assert_same_run(folder, undisturbed)


def test_finished_run_is_not_trained_again(undisturbed, dataset, monkeypatch):
    monkeypatch.setattr(Training, "_step", lambda *a: pytest.fail("a finished run was trained"))
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")}
    Training(config_of(dataset, undisturbed)).run()
    assert {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")} == before


# --- what is refused ----------------------------------------------------------------------------------------------------------------------
def test_run_of_another_recipe_in_the_same_folder_is_refused_naming_both_sides(undisturbed, dataset, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(undisturbed / "recipe.json", folder)
    other = replace_all(RECIPE, {"optim.lr": 0.25, "model.num_experts": 3})
    with pytest.raises(ValueError, match=r"model\.num_experts: 2 -> 3; optim\.lr: 0\.001 -> 0\.25.*choose another --name"):
        Training(config_of(dataset, folder, other)).run()


def test_run_of_another_dataset_in_the_same_folder_is_refused_naming_both_digests(undisturbed, dataset, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(undisturbed / "recipe.json", folder)
    other = make_dataset(str(tmp_path / "other"), 40, recipe=RECIPE, seed=1)
    was, now = open_dataset(dataset, TASK, RECIPE).manifest.digest, other.manifest().digest
    assert was != now
    with pytest.raises(ValueError, match=f"dataset digest: {was} -> {now}"):
        Training(config_of(other.uri, folder)).run()


def test_infinite_learning_rate_ends_with_the_flags_to_change(dataset, tmp_path):
    recipe = replace_all(RECIPE, {"optim.lr": 1e30, "optim.head_lr": 1e30, "schedule.num_warmup_epochs": 0.0})
    with pytest.raises(TrainingDiverged, match=r"diverged at step \d+ .*--optim.lr \(1e\+30\) or --optim.head-lr"):
        Training(config_of(dataset, tmp_path / "run", recipe)).run()
    assert not (tmp_path / "run/result.json").exists()


def test_error_while_reading_reaches_the_caller_naming_the_file(tmp_path):
    folder = make_dataset(str(tmp_path / "ds"), 40, recipe=RECIPE)
    config = config_of(folder.uri, tmp_path / "run")
    first_train = next(p for p, part in enumerate(folder.manifest().parts) if part["splits"].get("train"))
    path = Path(folder.folder.path(f"objects/part-{first_train:05d}.parquet"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=path.name):
        Training(config).run()


# --- pieces -------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "num_rows, batch_size, world_size, expected",
    [
        (100, 32, 1, 32),
        (100, 32, 2, 32),
        (25, 32, 1, 24),
        (25, 32, 2, 24),
        (25, 32, 4, 24),
        (25, 32, 3, 24),
        (5, 32, 1, 5),
        (5, 32, 2, 4),
        (47, 33, 3, 33),
    ],
)
def test_batch_of_a_small_dataset_does_not_depend_on_the_workers(num_rows, batch_size, world_size, expected):
    stream = type("Stream", (), {"num_rows": num_rows})
    recipe = dataclasses.replace(RECIPE, batch_size=batch_size)
    assert fitting_batch_size(recipe, stream, world_size) == expected


def test_state_through_its_dict_adds_on_to_the_same_means():
    whole, first = LoopState(), LoopState()
    values = [torch.tensor(v) for v in (0.1, 0.7, 1e-9, 3.3)]
    for value in values:
        whole.add({"loss": value})
    for value in values[:2]:
        first.add({"loss": value})
    resumed = LoopState.from_dict(json.loads(json.dumps(first.to_dict())))
    for value in values[2:]:
        resumed.add({"loss": value})
    assert float(resumed.sums["loss"]) == float(whole.sums["loss"]) and resumed.num_summed == 4


def test_prefetched_gives_the_same_items_and_the_producers_error():
    assert list(prefetched(iter(range(50)))) == list(range(50))

    def broken():
        yield 1
        raise ValueError("part 3 is broken")

    items = prefetched(broken())
    assert next(items) == 1
    with pytest.raises(ValueError, match="part 3 is broken"):
        next(items)


def test_prefetched_left_early_lets_its_producer_go():
    made = []

    def produce():
        for i in range(1000):
            made.append(i)
            yield i

    with contextlib.closing(prefetched(produce())) as items:
        next(items)
    assert len(made) < 10


# --- two processes ------------------------------------------------------------------------------------------------------------------------
def _train_rank(rank: int, config: LoopConfig, rendezvous: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        Training(config).run()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_what_one_trains(dataset, undisturbed, tmp_path):
    folder = tmp_path / "run"
    mp.spawn(_train_rank, args=(config_of(dataset, folder), str(tmp_path / "rendezvous")), nprocs=2)
    one, two = stable_lines(undisturbed), stable_lines(folder)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() and a["metrics"].keys() == b["metrics"].keys()
        for name in ("train/loss", "train/temperature"):
            assert math.isclose(a["metrics"][name], b["metrics"][name], rel_tol=1e-6), name
    # All weights as one vector: Adam makes steps of full size also from the rounding of gradients that are 0 (biases of attention keys).
    a, b = flat(weights(undisturbed / "last")), flat(weights(folder / "last"))
    assert float((a - b).norm() / a.norm()) < 1e-6
    results = [json.loads((f / "result.json").read_text())["metrics"] for f in (undisturbed, folder)]
    assert results[0]["test/recall@3"] == results[1]["test/recall@3"]


def _killed_rank(rank: int, config: LoopConfig, rendezvous: str, killed_at: int) -> None:
    step = Training._step

    def killed_step(self, *arguments):
        if self.state.global_step == killed_at:
            raise Killed
        return step(self, *arguments)

    Training._step = killed_step  # of this process alone
    with contextlib.suppress(Killed):
        _train_rank(rank, config, rendezvous)


@pytest.mark.slow
def test_two_processes_killed_within_an_epoch_and_resumed_equal_undisturbed_ones(dataset, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    mp.spawn(_train_rank, args=(config_of(dataset, whole), str(tmp_path / "0")), nprocs=2)
    config = config_of(dataset, folder, checkpoint_every_steps=1)
    mp.spawn(_killed_rank, args=(config, str(tmp_path / "1"), 5), nprocs=2)
    assert not (folder / "result.json").exists() and (folder / "last").exists()
    mp.spawn(_train_rank, args=(config, str(tmp_path / "2")), nprocs=2)
    assert_same_run(folder, whole)


def _gradient_rank(rank: int, world_size: int, config: LoopConfig, rendezvous: str, out: str) -> None:
    if world_size > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    try:
        training = Training(config)
        training._resume()
        learner = training.learner
        model = torch.nn.parallel.DistributedDataParallel(learner) if world_size > 1 else learner
        columns = next(iter(config.train.batches(0, training.batch_size, rank, world_size)))
        batch = next(iter(training._collated(iter([columns]))))
        scalars = model(batch, "model")
        scalars["loss"].backward()
        if rank == 0:
            torch.save({"loss": scalars["loss"].detach(), **{n: p.grad for n, p in learner.named_parameters()}}, out)
    finally:
        if world_size > 1:
            torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(dataset, tmp_path):
    recipe = replace_all(RECIPE, {"loss.balance_weight": 0.1})
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    _gradient_rank(0, 1, config_of(dataset, tmp_path / "run1", recipe), "", str(one))
    config = config_of(dataset, tmp_path / "run2", recipe)
    mp.spawn(_gradient_rank, args=(2, config, str(tmp_path / "rendezvous"), str(two)), nprocs=2)
    a, b = torch.load(one, weights_only=True), torch.load(two, weights_only=True)
    assert a.keys() == b.keys()
    assert math.isclose(float(a.pop("loss")), float(b.pop("loss")), rel_tol=1e-6)
    one, two = flat(a), flat(b)
    assert float((one - two).norm() / one.norm()) < 1e-6


def test_streams_of_the_config_are_the_three_splits(dataset, tmp_path):
    config = config_of(dataset, tmp_path / "run")
    assert {s.split: s.num_rows for s in (config.train, config.val, config.test)} == {"train": 24, "val": 8, "test": 8}
    assert isinstance(config.train, SplitStream)
