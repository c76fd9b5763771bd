"""How a run begins and ends: adaptation, patience, history and report."""

import json
import math
import types

import numpy as np
import pytest
import ray.train.torch
import torch
import torch.multiprocessing as mp

from cad_models.config import replace_all
from cad_models.tasks import TASKS
from rayjobs import loop
from rayjobs.loop import LoopConfig, Training
from tests.rayjobs.test_loop import RECIPE, TASK, Killed, config_of, dataset, stable_lines, undisturbed  # noqa: F401  (fixtures)


class WorseningTask(type(TASK)):
    """Its score is best at the second evaluation; reports what it was given, measured against the train split."""

    name = "worsening"
    reference_split = "train"
    report_splits = ("val", "test")
    history_columns = {"val_recall": "val/recall@3", "beside": "val/num_beside"}
    scores = (0.2, 0.9, 0.9, 0.3, 0.1, 0.1, 0.1, 0.1)

    def evaluate(self, predictions, reference=None):
        metrics = dict.fromkeys(super().evaluate(predictions), 0.5)
        return {**metrics, "num_beside": float(len(reference["group"]))}

    def report(self, predictions, *, recipe, signature, metrics):
        told = {split: len(columns["group"]) for split, columns in predictions.items()}
        return {"index.html": json.dumps({**told, "test": metrics["test/num_beside"], "width": signature["image_width"]}).encode()}


class ScoredTraining(Training):
    """The loop with the scores of `WorseningTask`, whatever was learned."""

    def _improved(self, metrics):
        metrics[self.task.score.name] = WorseningTask.scores[self.state.epoch - 1]
        return super()._improved(metrics)


@pytest.fixture
def worsening(dataset, monkeypatch):  # noqa: F811
    monkeypatch.setitem(TASKS, "worsening", WorseningTask())

    def config(folder, patience, num_epochs=8):
        recipe = replace_all(RECIPE, {"schedule.num_epochs": num_epochs, "schedule.patience_evals": patience})
        return config_of(dataset, folder, recipe, task="worsening")

    return config


@pytest.mark.parametrize(
    "patience, num_epochs, epochs, ended",
    [(0, 4, 4, "all epochs"), (2, 8, 4, "no better val/recall@3 in 2 evaluations"), (3, 5, 5, "all epochs")],
)
def test_patience_ends_the_run_after_so_many_evaluations_without_a_better_score(worsening, tmp_path, patience, num_epochs, epochs, ended):
    ScoredTraining(worsening(tmp_path / "run", patience, num_epochs)).run()
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["num_epochs"] == epochs and result["ended"].startswith(ended) and result["score"] == 0.9
    assert len(stable_lines(tmp_path / "run")) == epochs


@pytest.mark.parametrize("killed_in", ["_publish", "_write_history", "_finish"])
def test_patience_counts_on_when_a_killed_run_is_resumed(worsening, tmp_path, monkeypatch, killed_in):
    config = worsening(tmp_path / "run", 2)
    with monkeypatch.context() as patch:
        original = getattr(Training, killed_in)

        def killed(self, *arguments, **keywords):
            if self.state.epoch >= 3:
                raise Killed
            return original(self, *arguments, **keywords)

        patch.setattr(Training, killed_in, killed)
        with pytest.raises(Killed):
            ScoredTraining(config).run()
    ScoredTraining(config).run()
    ScoredTraining(worsening(tmp_path / "whole", 2)).run()
    assert stable_lines(tmp_path / "run") == stable_lines(tmp_path / "whole")
    assert (tmp_path / "run/training_history.csv").read_bytes() == (tmp_path / "whole/training_history.csv").read_bytes()


def test_history_and_report_have_what_the_task_names(worsening, tmp_path):
    ScoredTraining(worsening(tmp_path / "run", 2)).run()
    # The train split (24 objects) is predicted beside val (8) and test.
    assert (tmp_path / "run/training_history.csv").read_text().splitlines() == [
        "epoch,val_recall,beside", "1,0.2,24.0", "2,0.9,24.0", "3,0.9,24.0", "4,0.3,24.0"
    ]  # fmt: skip
    assert (tmp_path / "run/training_history.png").read_bytes()[:4] == b"\x89PNG"
    report = json.loads((tmp_path / "run/report/index.html").read_text())
    assert report == {"val": 8, "test": 24.0, "train": 24, "width": 48}


def test_run_without_a_finite_score_says_so(worsening, tmp_path, monkeypatch):
    monkeypatch.setattr(WorseningTask, "scores", (math.nan,) * 8)
    with pytest.raises(ValueError, match="no evaluation gave a finite val/recall@3"):
        ScoredTraining(worsening(tmp_path / "run", 1)).run()


def test_default_history_has_every_metric(undisturbed):  # noqa: F811
    header, *rows = (undisturbed / "training_history.csv").read_text().splitlines()
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    names = header.split(",")
    assert names[0] == "epoch" and len(rows) == 3
    for row, line in zip(rows, lines, strict=True):
        found = dict(zip(names, row.split(","), strict=True))
        assert float(found["val_recall@3"]) == line["metrics"]["val/recall@3"] and int(found["epoch"]) == line["epoch"]
        assert len(found) == 1 + len(line["metrics"])


# --- adaptation ---------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("objects, sizes", [(None, [10, 10, 4]), (12, [10, 2]), (10, [10]), (0, None)])
def test_adapt_sees_as_many_training_objects_as_the_learner_asks_for(dataset, tmp_path, monkeypatch, objects, sizes):  # noqa: F811
    training = Training(config_of(dataset, tmp_path / "run"))
    monkeypatch.setattr(loop, "ADAPT_BATCH", 10)
    seen = []
    training.learner.adapt_objects = objects
    training.learner.adapt = lambda batches: seen.append([batch["group"] for batch in batches])
    training._begin()
    if sizes is None:
        assert seen == []
        return
    assert [len(group) for group in seen[0]] == sizes
    whole = np.concatenate([columns["group"] for columns in training.config.train.parts(0, 1)])
    np.testing.assert_array_equal(torch.cat(seen[0]).numpy(), whole[: sum(sizes)])


# --- a worker's failures -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("taken", [True, False])
def test_process_group_taken_away_is_a_loss_and_no_mistake_of_the_user(dataset, tmp_path, monkeypatch, taken):  # noqa: F811
    def run(self):
        if not taken:
            raise ValueError("part 3 is broken")
        # As Ray Train does from another thread when it shuts down the workers beside a lost one.
        torch.distributed.destroy_process_group()
        torch.distributed.broadcast(torch.zeros(1), src=0, group=self.cpu_group)

    def begin(self, *args, **kwargs):
        self.cpu_group = torch.distributed.new_group(backend="gloo")

    monkeypatch.setattr(Training, "__init__", begin)
    monkeypatch.setattr(Training, "run", run)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(ray.train, "get_context", lambda: types.SimpleNamespace(get_world_size=lambda: 2))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    config, told = config_of(dataset, tmp_path / "run"), tmp_path / "run/error.json"
    try:
        if taken:
            with pytest.raises(ValueError, match="is not registered"):
                loop.train_loop_per_worker({"loop": config})
            assert not told.exists()
        else:
            loop.train_loop_per_worker({"loop": config})
            assert json.loads(told.read_text()) == {"error": "part 3 is broken"}
        assert not torch.distributed.is_initialized()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


# --- two processes ------------------------------------------------------------------------------------------------------------------------
def _worsening_rank(rank: int, config: LoopConfig, rendezvous: str) -> None:
    TASKS["worsening"] = WorseningTask()  # of this process alone
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        ScoredTraining(config).run()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_run_out_of_patience_and_report_like_one(worsening, tmp_path):
    ScoredTraining(worsening(tmp_path / "one", 2)).run()
    mp.spawn(_worsening_rank, args=(worsening(tmp_path / "two", 2), str(tmp_path / "rendezvous")), nprocs=2)
    for name in ("training_history.csv", "report/index.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert one["ended"] == two["ended"] and one["num_epochs"] == two["num_epochs"] == 4
