"""Runs, the metrics courier, and the registry, on an embedded store of their own."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cad_models.checkpoint import CheckpointError
from cad_models.ensemble import load_ensemble, pack, read_ensemble, unpack, write_ensemble
from cad_models.tasks import TASKS
from rayjobs.cli import TrackingConfig
from rayjobs.courier import MetricsCourier
from rayjobs.registry import Registry, gather_ensemble
from rayjobs.system_metrics import system_metrics
from rayjobs.tracking import (
    METRICS_FILE,
    DatasetSource,
    TrackingError,
    flattened,
    open_tracking,
    tracked_name,
)
from tests.rayjobs.members import TASK, write_tiny_member
from tests.shared import REPOSITORY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def tracking(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield open_tracking(TrackingConfig(folder=str(folder / "mlflow")), "alignment")


@pytest.fixture(scope="module")
def checkpoints(folder):
    return [write_tiny_member(folder / f"checkpoint{seed}", seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def registered(tracking, checkpoints):
    """A registry with two members and their ensemble as champion."""
    registry = Registry(tracking)
    members = [registry.register_member(path, score=0.5 + i / 10) for i, path in enumerate(checkpoints)]
    ensemble = registry.register_ensemble(members, score=0.7)
    registry.move_alias(ensemble)
    return registry, members, ensemble


class StackedTask(type(TASK)):
    """In place of the room: a rule that cannot do without fitting."""

    combine_rules = ("concatenate", "mean", "stacked")
    fitted_rules = ("stacked",)


def test_fitted_ensemble_keeps_what_was_fitted_and_its_digest_covers_it(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "alignment", StackedTask())
    entry = write_ensemble(tmp_path / "e", checkpoints, rule="stacked", fitted={"slope": [1.0, 2.5]})
    assert read_ensemble(tmp_path / "e") == entry and load_ensemble(tmp_path / "e").fitted == {"slope": [1.0, 2.5]}
    other = write_ensemble(tmp_path / "f", checkpoints, rule="stacked", fitted={"slope": [1.0, 2.0]})
    assert entry.digest != other.digest
    # Found again by a single name, as long as the rule is the same.
    again = gather_ensemble([str(tmp_path / "e")], tmp_path / "g", tracking=None)
    assert again.rule == "stacked" and again.fitted == entry.fitted and again.digest == entry.digest
    plain = gather_ensemble([str(tmp_path / "e")], tmp_path / "h", tracking=None, rule="mean")
    assert plain.rule == "mean" and plain.fitted == {}


def test_fitted_rule_for_loose_members_says_what_is_missing(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "alignment", StackedTask())
    names = [str(path) for path in checkpoints]
    with pytest.raises(ValueError, match="--combine stacked needs what was fitted on validation predictions.*choose one of concatenate, mean"):
        gather_ensemble(names, tmp_path / "e", tracking=None, rule="stacked")
    with pytest.raises(ValueError, match="--combine 'soft' is no ensemble rule"):
        gather_ensemble(names, tmp_path / "f", tracking=None, rule="soft")
    assert gather_ensemble(names, tmp_path / "g", tracking=None).rule == "concatenate"


def write_lines(run_folder: Path, steps: list[int]) -> None:
    run_folder.mkdir(exist_ok=True)
    lines = [{"step": s, "epoch": s // 10, "metrics": {"val/recall@3": s / 100, "gone": None}} for s in steps]
    (run_folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def delivered(tracking, run) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in tracking.client.get_metric_history(run.run_id, "val/recall_at_3")]


# --- runs and courier ---------------------------------------------------------------------------------------------------------------------
def test_courier_rewritten_file_and_restarted_driver_deliver_each_step_once(tracking, tmp_path):
    run = tracking.start_run("key-1", name="first", params={"optim": {"lr": 0.1}}, dataset=DatasetSource(uri="ds", digest="abc"))
    write_lines(tmp_path / "run", [10, 20])
    with MetricsCourier([(str(tmp_path / "run"), run)], every_s=0.05):
        deadline = time.monotonic() + 20
        while len(delivered(tracking, run)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert delivered(tracking, run) == [(10, 0.1), (20, 0.2)]
        write_lines(tmp_path / "run", [10, 20, 30])
    assert delivered(tracking, run) == [(10, 0.1), (20, 0.2), (30, 0.3)]

    again = tracking.start_run("key-1", name="first", params={"optim": {"lr": 0.1}})
    assert (again.run_id, again.reused) == (run.run_id, True)
    write_lines(tmp_path / "run", [10, 20, 30, 40])
    with MetricsCourier([(str(tmp_path / "run"), again)], every_s=60):
        pass
    assert delivered(tracking, run) == [(10, 0.1), (20, 0.2), (30, 0.3), (40, 0.4)]
    again.finish()
    stored = tracking.client.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"optim.lr": "0.1"}
    assert stored.inputs.dataset_inputs[0].dataset.digest == "abc"


def test_courier_opens_a_run_that_was_only_named_before_anything_is_delivered(tracking, tmp_path):
    run = tracking.start_run("key-late", name="late", params={"optim": {"lr": 0.1}}, open_now=False)
    assert run.run_id is None
    with MetricsCourier([(str(tmp_path / "run"), run)], every_s=60):  # its folder is not there yet
        deadline = time.monotonic() + 60
        while run.run_id is None and time.monotonic() < deadline:
            time.sleep(0.05)
    assert tracking.client.get_run(run.run_id).data.params == {"optim.lr": "0.1"}


def test_courier_half_written_last_line_waits(tracking, tmp_path):
    run = tracking.start_run("key-2", name="second")
    write_lines(tmp_path, [10])
    with (tmp_path / METRICS_FILE).open("a") as stream:
        stream.write('{"step": 20, "epoch": 2, "metr')
    courier = MetricsCourier([(str(tmp_path), run)])
    assert courier.flush() == 0
    assert delivered(tracking, run) == [(10, 0.1)]
    write_lines(tmp_path, [10, 20])
    courier.flush()
    assert delivered(tracking, run) == [(10, 0.1), (20, 0.2)]


def test_start_run_parent_makes_a_child_run(tracking):
    parent = tracking.start_run("search", name="search")
    child = tracking.start_run("trial", name="trial", parent=parent)
    assert tracking.client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id


def test_tracking_server_that_is_down_costs_seconds_and_raises_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    started = time.monotonic()
    down = open_tracking(TrackingConfig(), "alignment")
    run = down.start_run("key", name="run")
    write_lines(tmp_path, [10, 20])
    with MetricsCourier([(str(tmp_path), run)], every_s=60):
        pass
    run.log_artifact(tmp_path)
    run.finish()
    assert time.monotonic() - started < 30
    assert run.run_id is None
    assert "2 evaluations could not be delivered" in capsys.readouterr().err
    with pytest.raises(TrackingError, match="http://127.0.0.1:9"):
        Registry(down).versions()


@pytest.mark.slow
def test_open_tracking_two_processes_at_once_open_a_fresh_store(tmp_path):
    code = (
        "import sys; from rayjobs.cli import TrackingConfig; from rayjobs.tracking import open_tracking\n"
        "t = open_tracking(TrackingConfig(folder=sys.argv[1]), 'alignment')\n"
        "run = t.start_run(sys.argv[2], name='x'); assert run.run_id and run.log_metrics({'a': 1.0}); print(run.run_id)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "mlflow")]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path)}
    started = [
        subprocess.Popen([*command, key], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment)
        for key in ("same", "same", "other")
    ]
    ended = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], [err for _, err in ended]
    ids = [out.split()[-1] for out, _ in ended]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(("metric", "name"), [("val/recall@3", "val/recall_at_3"), ("a b.c-d_e:f", "a b.c-d_e:f"), ("loss(µ)", "loss___")])
def test_tracked_name_keeps_only_what_mlflow_accepts(metric, name):
    assert tracked_name(metric) == name


def test_flattened_nested_values_get_dotted_names():
    assert flattened({"optim": {"lr": 0.1, "on": True}, "name": "x", "sizes": [1, 2]}) == {
        "optim.lr": "0.1",
        "optim.on": "true",
        "name": "x",
        "sizes": "[1, 2]",
    }


def test_system_metrics_are_finite_and_named():
    values = system_metrics()
    assert all(name.startswith("system/") and value >= 0 for name, value in values.items())
    assert 0.01 < values["system/process_memory_gb"] < 100


# --- registry -----------------------------------------------------------------------------------------------------------------------------
def test_registry_same_content_twice_makes_no_second_version(registered, checkpoints):
    registry, members, ensemble = registered
    assert registry.register_member(checkpoints[0], score=0.5) == members[0]
    assert registry.register_ensemble([m.uri for m in members], score=0.7) == ensemble
    assert [v.uri for v in registry.versions()] == [members[0].uri, members[1].uri, ensemble.uri]
    assert [v.kind for v in registry.versions()] == ["member", "member", "ensemble"]
    assert registry.versions("member")[1].score == 0.6
    tags = members[0].tags
    assert tags.keys() >= {"kind", "score", "recipe_digest", "dataset_digest", "encoder", "member_digest"}


def test_registry_killed_between_upload_and_version_is_taken_up_by_the_next(registered, folder):
    registry, _, _ = registered
    checkpoint = write_tiny_member(folder / "checkpoint2", seed=2)
    client = registry._tracking.client
    create = client.create_model_version

    class Killed(BaseException):
        pass

    def killed(*args, **kwargs):
        raise Killed

    before = [v.uri for v in registry.versions()]
    client.create_model_version = killed
    with pytest.raises(Killed):
        registry.register_member(checkpoint, score=0.9)
    client.create_model_version = create
    assert [v.uri for v in registry.versions()] == before
    uploads = len(client.search_logged_models([registry._tracking.experiment_id]))
    version = registry.register_member(checkpoint, score=0.9)
    assert [v.uri for v in registry.versions()] == [*before, version.uri]
    assert len(client.search_logged_models([registry._tracking.experiment_id])) == uploads


def test_registry_champion_names_the_whole_pinned_ensemble(registered, tracking, tmp_path):
    registry, members, ensemble = registered
    assert registry.alias() == ensemble
    assert registry.alias("challenger") is None
    entry = gather_ensemble(["models:/cad-alignment@champion"], tmp_path / "e", tracking=lambda: tracking)
    assert [m.name for m in entry.members] == [m.uri for m in members]
    assert [m.digest for m in entry.members] == [m.tags["member_digest"] for m in members]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("models:/cad-alignment@nobody", "no such alias.* the aliases champion"),
        ("models:/cad-alignment/99", "no such version.*versions 1, 2, 3"),
        ("models:/unknown/1", "registered models are: cad-alignment"),
        ("models:/cad-alignment", "write models:/"),
    ],
)
def test_gather_unknown_registry_name_lists_what_there_is(registered, tracking, tmp_path, name, message):
    with pytest.raises(TrackingError, match=message):
        gather_ensemble([name], tmp_path / "e", tracking=lambda: tracking)


# --- the ensemble's folder ----------------------------------------------------------------------------------------------------------------
def no_store():
    raise AssertionError("files need no store")


def test_gather_files_folders_and_ensembles_share_the_names_weights(checkpoints, tmp_path):
    write_ensemble(tmp_path / "pair", checkpoints, weights=[1.0, 3.0])
    names = [str(tmp_path / "pair"), f"{checkpoints[0]}/moe.safetensors:{checkpoints[0]}/pc_encoder.safetensors"]
    entry = gather_ensemble(names, tmp_path / "all", tracking=no_store, weights=[2.0, 1.0])
    assert [m.weight for m in entry.members] == [0.5, 1.5, 1.0]
    loaded = load_ensemble(tmp_path / "all")
    assert [m.digest for m in loaded.members] == [m.digest for m in entry.members]
    assert entry.members[0].digest == entry.members[2].digest


def test_ensemble_tampered_member_is_refused_by_name(checkpoints, tmp_path):
    write_ensemble(tmp_path / "e", checkpoints)
    weights = tmp_path / "e" / "members" / "1" / "moe.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="members/1.*were changed"):
        read_ensemble(tmp_path / "e")


def test_ensemble_packed_and_unpacked_is_the_same_folder(checkpoints, tmp_path):
    (checkpoints[0] / "trainer_state.pt").write_bytes(b"not of a member")
    entry = write_ensemble(tmp_path / "e", checkpoints)
    unpack(pack(tmp_path / "e"), tmp_path / "copy")
    assert read_ensemble(tmp_path / "copy") == entry
    assert not list((tmp_path / "copy").rglob("*.pt"))


def test_ensemble_digest_depends_on_members_rule_and_shares_alone(checkpoints, tmp_path):
    def digest(name: str, **settings) -> str:
        return write_ensemble(tmp_path / name, checkpoints, **settings).digest

    first = digest("a", weights=[1.0, 1.0])
    assert digest("b", weights=[2.0, 2.0], names=["x", "y"]) == first
    assert digest("c", weights=[1.0, 2.0]) != first
    assert digest("d", rule="mean") != first


def test_ensemble_of_two_tasks_is_refused(checkpoints, tmp_path):
    other = write_tiny_member(tmp_path / "other")
    (other / "recipe.json").write_text(json.dumps({"task": "voxels", "recipe": {}}))
    with pytest.raises(CheckpointError, match="one task, these are of alignment .*voxels"):
        write_ensemble(tmp_path / "e", [checkpoints[0], other])
