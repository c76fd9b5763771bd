"""Numbers of workers that may replace one another, when a reservation has settled, and what a run does that is asked to leave for more."""

import dataclasses
import itertools
import os
import threading
import time

import numpy as np
import pytest

from cad_models.alignment.recipe import SMOKE
from cad_models.config import replace_all
from cad_models.dataset import Folder
from cad_models.order import StreamOrder, WholeOrder
from rayjobs import elastic
from rayjobs.capacity import Capacity, Node, NodeGroup
from rayjobs.cli import UsageError
from rayjobs.elastic import settled, worker_numbers
from rayjobs.loop import Training
from rayjobs.resources import LOSSES_WITHOUT_PROGRESS, TrainScaleConfig, WorkerPlan, elastic_plan
from rayjobs.train import TrainJob, check_flags
from rayjobs.trials import _lost_too_often
from tests.rayjobs.test_loop import RECIPE, Killed, assert_same_run, config_of
from tests.synthetic import make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(str(tmp_path_factory.mktemp("data") / "ds"), 40, recipe=RECIPE).uri


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    Training(config_of(dataset, folder)).run()
    return folder


# --- numbers of workers -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "batch_size, least, most, expected",
    [(8, 1, 8, (1, 2, 4, 8)), (8, 2, 8, (2, 4, 8)), (8, 3, 8, (4, 8)), (8, 1, 2, (1, 2)), (24, 1, 6, (3, 6)), (24, 1, 3, (3,)), (8, 4, 4, (4,))],
)
def test_numbers_of_workers(dataset, tmp_path, batch_size, least, most, expected):
    config = config_of(dataset, tmp_path / "run", dataclasses.replace(RECIPE, batch_size=batch_size))
    assert worker_numbers(config, least, most) == expected


def test_all_numbers_of_workers_share_the_same_batches(dataset, tmp_path):
    config = config_of(dataset, tmp_path / "run", dataclasses.replace(RECIPE, batch_size=8))
    numbers = worker_numbers(config, 1, 8)
    whole = WholeOrder(config.train.num_rows, 8, seed=5)
    for epoch, step in itertools.product(range(2), range(whole.num_steps)):
        batches = [sorted(np.concatenate([whole.rows(epoch, step, rank, n) for rank in range(n)]).tolist()) for n in numbers]
        assert all(batch == batches[0] for batch in batches)
    streamed = StreamOrder(config.train.part_rows, 8, seed=5)
    assert len({streamed.num_steps(0, n) for n in numbers}) == 1


def test_most_workers_that_cannot_share_the_batch_are_an_error(dataset, tmp_path):
    with pytest.raises(ValueError, match="--batch-size 8 cannot be shared equally by --scale.num-workers 3"):
        worker_numbers(config_of(dataset, tmp_path / "run", dataclasses.replace(RECIPE, batch_size=8)), 1, 3)


# --- waiting for room ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "readings, expected, taken",
    [
        ([8], 8, 1),  # all at once
        ([0, 0, 1, 1, 8, 8], 8, 5),  # no longer than it takes
        ([0, 1, 1, 2, 2, 2, 2, 2], 2, 7),  # settled: unchanged for three seconds
        ([0, 1, 0, 0, 0, 1, 1, 1, 1, 1], 1, 9),  # a node came and went
        ([0, 0, 0], 0, 3),  # never
        ([1, 1], 1, 2),  # it was not worth waiting any longer
    ],
)
def test_settled(readings, expected, taken):
    seen = []

    def watched():
        for now, number in enumerate(readings):
            seen.append(number)
            yield float(now), number

    assert settled(watched(), 8, 3.0) == expected
    assert len(seen) == taken


GPUS = NodeGroup(name="gpu", node=Node(cpus=8, gpus=1), max_count=4)
GROWING = Capacity(present=(Node(cpus=0),), groups=(NodeGroup(name="cpu", node=Node(cpus=8), max_count=1), GPUS))


def test_plan_is_for_the_most_workers_that_ever_fit():
    plan = elastic_plan(TrainScaleConfig(num_workers=8, min_workers=2, use_gpu=True), GROWING, joined=True)
    assert (plan.num_workers, plan.min_workers, plan.asked_workers, plan.use_gpu) == (4, 2, 8, True)
    assert plan.with_workers(2).num_workers == 2 and plan.with_workers(2).min_workers == 0


def test_least_workers_that_never_fit_are_an_error_that_names_them():
    with pytest.raises(ValueError, match="--scale.num-workers 5 with --scale.use-gpu True needs 5 GPUs"):
        elastic_plan(TrainScaleConfig(num_workers=8, min_workers=5, use_gpu=True), GROWING, joined=True)


@pytest.mark.parametrize("least, most", [(3, 2), (-1, 2), (1, 0)])
def test_least_workers_beyond_the_most_are_an_error(least, most):
    with pytest.raises(ValueError, match="--scale.min-workers"):
        TrainScaleConfig(min_workers=least, num_workers=most)


def test_seeds_and_elastic_exclude_each_other():
    job = TrainJob(task="alignment", recipe=SMOKE, dataset="ds", seeds=(1, 2), scale=TrainScaleConfig(num_workers=2, min_workers=1))
    with pytest.raises(UsageError, match="--scale.min-workers"):
        check_flags(job)


# --- what a run does ----------------------------------------------------------------------------------------------------------------------
def test_run_that_leaves_for_more_workers_goes_on_at_the_very_step(dataset, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr("rayjobs.loop._STOP_POLL_STEPS", 1)
    config = config_of(dataset, tmp_path / "run", checkpoint_every_steps=0)
    first = Training(config)
    step, steps = first._step, itertools.count(1)

    def counted(*args):
        if next(steps) == 4:
            first.folder.write_bytes("RESIZE", b"2")
        return step(*args)

    first._step = counted
    first.run()
    assert not (tmp_path / "run/result.json").exists() and first.state.global_step == 4, "in the middle of the second epoch"
    (tmp_path / "run/RESIZE").unlink()
    Training(config).run()
    assert_same_run(tmp_path / "run", undisturbed)


def test_notice_that_a_node_leaves_saves_once_and_training_goes_on(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("rayjobs.loop._STOP_POLL_STEPS", 1)
    monkeypatch.setattr("rayjobs.loop._LEAVING_POLL_S", -1.0)
    config = config_of(dataset, tmp_path / "run", replace_all(RECIPE, {"schedule.num_epochs": 1}))
    notices = iter([False, True])
    training = Training(config, node_is_leaving=lambda: next(notices))
    saved = []
    save = training._save_last

    def recorded(*args):
        saved.append(training.state.global_step)
        save(*args)

    training._save_last = recorded
    training.run()
    assert saved == [2, 3], "after the notice at the second step, and at the end"


def test_run_killed_after_the_notice_repeats_no_step(dataset, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr("rayjobs.loop._STOP_POLL_STEPS", 1)
    monkeypatch.setattr("rayjobs.loop._LEAVING_POLL_S", -1.0)
    config = config_of(dataset, tmp_path / "run")
    training = Training(config, node_is_leaving=lambda: training.state.global_step == 5)
    step = training._step

    def killed_later(*args):
        if training.state.global_step == 5:
            raise Killed
        return step(*args)

    training._step = killed_later
    with pytest.raises(Killed):
        training.run()
    again = Training(config)
    again._resume()
    assert again.state.global_step == 5
    Training(config).run()
    assert_same_run(tmp_path / "run", undisturbed)


# --- the driver's part --------------------------------------------------------------------------------------------------------------------
class FakeRoom:
    """Stands for the cluster: how many workers have room at each start, and while training goes on."""

    def __init__(self, monkeypatch, starts):
        self.starts = iter(starts)
        monkeypatch.setattr(elastic, "_room", lambda *args: next(self.starts))


def test_negative_number_of_reader_threads_is_refused_in_the_flags_words():
    with pytest.raises(ValueError, match=r"--scale.reader-threads -1 must be at least 0 \(0 = tasks of Ray Data\)"):
        TrainScaleConfig(reader_threads=-1)
    assert [TrainScaleConfig(reader_threads=number).reader_threads for number in (None, 0, 2)] == [None, 0, 2]


PLAN = WorkerPlan(num_workers=2, cpus_per_worker=1.0, use_gpu=False, threads_per_worker=1, min_workers=1, asked_workers=2, resize_s=1e6)


def failing_attempts(results, told):
    """Attempts that are lost (an exception) or end; each notes the number of its workers."""
    outcomes = iter(results)

    def attempt(plan):
        told.append(plan.num_workers)
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome

    return attempt


def lost():
    from ray.train import WorkerGroupError

    return WorkerGroupError("[Rank 1 Error Snippet]:\nnode died", {1: RuntimeError("node died\nmore")})


def test_loss_of_a_worker_goes_on_with_what_there_is(dataset, tmp_path, monkeypatch):
    FakeRoom(monkeypatch, [2, 1])
    used, lines = [], []
    elastic.fit_elastic(config_of(dataset, tmp_path / "run"), PLAN, failing_attempts([lost(), None], used), num_evaluations=lambda: 0, tell=lines.append)
    assert used == [2, 1]
    assert any("lost a worker (rank 1: node died)" in line for line in lines) and "training with 1 worker of at most 2: more as nodes come" in lines


def test_cluster_with_room_for_an_odd_number_trains_on_the_batches_that_were_asked_for(dataset, tmp_path, monkeypatch):
    offered, config = [], config_of(dataset, tmp_path / "run", dataclasses.replace(RECIPE, batch_size=8))
    monkeypatch.setattr(elastic, "_room", lambda folder, numbers, *args: offered.append(list(numbers)) or numbers[-1])
    fitting = dataclasses.replace(PLAN, num_workers=3, asked_workers=8)
    used = []
    elastic.fit_elastic(config, fitting, failing_attempts([None], used), num_evaluations=lambda: 0, tell=lambda line: None)
    assert offered == [[1, 2]] and used == [2]
    with pytest.raises(ValueError, match=r"room for 3 workers, but the batches of --scale.num-workers 8 can be shared only by 4, 8: lower --scale.min-workers \(3\)"):
        elastic.fit_elastic(config, dataclasses.replace(fitting, min_workers=3), failing_attempts([], used), num_evaluations=lambda: 0, tell=lambda line: None)


def test_losses_without_progress_end_the_training(dataset, tmp_path, monkeypatch):
    FakeRoom(monkeypatch, [2] * 9)
    used = []
    with pytest.raises(type(lost())):
        elastic.fit_elastic(config_of(dataset, tmp_path / "run"), PLAN, failing_attempts([lost()] * 9, used), num_evaluations=lambda: 7, tell=lambda line: None)
    assert len(used) == LOSSES_WITHOUT_PROGRESS + 1
    FakeRoom(monkeypatch, [2] * 9)
    used, done = [], itertools.count()
    elastic.fit_elastic(
        config_of(dataset, tmp_path / "run"), PLAN, failing_attempts([*[lost()] * 8, None], used), num_evaluations=lambda: next(done), tell=lambda line: None
    )
    assert len(used) == 9, "each with an evaluation since the last: any number of times"


def test_training_that_left_for_more_starts_again_and_a_stop_does_not(dataset, tmp_path, monkeypatch):
    config = config_of(dataset, tmp_path / "run")
    FakeRoom(monkeypatch, [1, 2])
    used, folder = [], tmp_path / "run"

    def attempt(plan):
        used.append(plan.num_workers)
        folder.mkdir(exist_ok=True)
        (folder / ("RESIZE" if len(used) == 1 else "result.json")).write_text("2")

    elastic.fit_elastic(config, PLAN, attempt, num_evaluations=lambda: 0, tell=lambda line: None)
    assert used == [1, 2] and not (folder / "RESIZE").exists()
    (folder / "result.json").unlink()
    FakeRoom(monkeypatch, [1, 2])
    used.clear()

    def stopped(plan):
        used.append(plan.num_workers)
        (folder / "RESIZE").write_text("2")
        (folder / "STOP").write_text("")

    elastic.fit_elastic(config, PLAN, stopped, num_evaluations=lambda: 0, tell=lambda line: None)
    assert used == [1]


def test_room_for_more_is_asked_for_only_when_the_workers_that_start_have_theirs(tmp_path, monkeypatch):
    asked, folder, training = [], Folder(str(tmp_path)), threading.Event()

    class AskedFor:
        def __init__(self, numbers, plan, *, present):
            asked.append((numbers, present, training.is_set()))

        def ready(self):
            return 2

        def release(self):
            asked.append("released")

    monkeypatch.setattr(elastic, "Reservation", AskedFor)
    monkeypatch.setattr(elastic, "_POLL_S", 0.02)
    folder.write_json("progress.json", {"time": 1.0})  # of the attempt before
    with elastic._Growth(folder, [2], 1, PLAN, 0.0):
        time.sleep(0.3)
        training.set()
        folder.write_json("progress.json", {"time": 2.0})
        deadline = time.monotonic() + 20
        while not folder.exists("RESIZE") and time.monotonic() < deadline:
            time.sleep(0.02)
    assert asked == [([2], 1, True), "released"]
    assert folder.read_bytes("RESIZE") == b"2"


def test_reason_of_a_failure_is_the_first_ranks_own():
    from ray.train import WorkerGroupError

    traceback = RuntimeError('Traceback (most recent call last):\n  File "x.py", line 1\nKeyError: 3\n')
    assert elastic.reason_of(WorkerGroupError("?", {2: RuntimeError("late"), 0: traceback})) == "rank 0: KeyError: 3"
    assert elastic.reason_of(RuntimeError("no room\nat all")) == "no room"


# --- a fixed number of workers ------------------------------------------------------------------------------------------------------------
def test_training_that_gets_on_survives_any_number_of_losses(dataset, tmp_path, monkeypatch):
    from rayjobs import train

    folder = Folder(str(tmp_path / "run"))
    monkeypatch.setattr(train, "evaluations", lambda folder: [None] * done[0])
    outcomes, done = iter([lost(), lost(), lost(), lost(), None]), [0]

    def attempt(loop, plan):
        outcome = next(outcomes)
        done[0] += 1
        if outcome is not None:
            raise outcome

    monkeypatch.setattr(train, "_fit_workers", attempt)
    train._fit_while_it_gets_on(None, PLAN, folder)
    assert next(outcomes, "none left") == "none left"

    def stuck(loop, plan):
        raise lost()

    monkeypatch.setattr(train, "_fit_workers", stuck)
    with pytest.raises(type(lost())):
        train._fit_while_it_gets_on(None, PLAN, folder)


def test_lost_controller_is_replaced_a_few_times_without_progress_and_lost_workers_are_not(tmp_path, monkeypatch):
    from ray.train import ControllerError

    from rayjobs import train

    folder, starts = Folder(str(tmp_path / "run")), []

    def failing(error):
        def attempt(loop, plan):
            starts.append(1)
            raise error

        return attempt

    for error, expected in ((ControllerError(RuntimeError("actor died")), LOSSES_WITHOUT_PROGRESS + 1), (lost(), 1)):
        starts.clear()
        monkeypatch.setattr(train, "_fit_workers", failing(error))
        with pytest.raises(type(error)):
            train._fit_while_it_gets_on(None, PLAN, folder)
        assert len(starts) == expected


def test_starts_of_a_trial_count_only_without_an_evaluation_in_between_and_of_one_driver(tmp_path):
    folder = Folder(str(tmp_path / "trial"))

    def starts(*calls):
        return [_lost_too_often(folder, attempt, evaluations) for attempt, evaluations in calls]

    most = LOSSES_WITHOUT_PROGRESS + 1
    assert starts(*[("a", 0)] * (most + 1)) == [False] * most + [True]
    assert starts(("b", 0), ("b", 0), *[("b", 1)] * most) == [False] * (most + 2)
    assert starts(("b", 1)) == [True]


def test_nodes_are_watched_unless_one_machine_is_all_there_is(monkeypatch):
    from rayjobs.train import _watching_for_lost_nodes

    name = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
    monkeypatch.delenv(name, raising=False)
    for wanted, expected in ((True, None), (False, "0")):
        with pytest.raises(RuntimeError, match="lost"), _watching_for_lost_nodes(wanted):
            assert os.environ.get(name) == expected
            raise RuntimeError("lost")
        assert name not in os.environ
    monkeypatch.setenv(name, "1")
    with _watching_for_lost_nodes(False):
        assert os.environ[name] == "1"
