"""prepare.py without Ray: units of work, the plan, part files, resuming; and a few whole runs."""

import dataclasses
import filecmp
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from cad_models.dataset import DatasetFolder, Folder, Manifest, to_numpy
from cad_models.splits import SplitConfig
from cad_models.task import Inspection, RawItem, Reject
from rayjobs.folder_lock import locked
from rayjobs.preparation import (
    Limits,
    ObjectProcess,
    PartPlan,
    count_labels,
    finished_part,
    inspect_chunk,
    make_part,
    pack_items,
    plan_parts,
    read_inspections,
    relative_reject,
    unique_items,
    unpack_items,
)
from rayjobs.prepare import PrepareJob, assign, check_flags, sum_labels
from tests.rayjobs.scripted_task import PictureTask, ScriptedTask
from tests.shared import REPOSITORY, shared_path

TASK = ScriptedTask()
RECIPE = TASK.smoke
LIMITS = Limits(timeout_s=60.0, memory_gb=2.0)
KINDS = ["objects", "views"]


def inspect(item):
    return TASK.inspect(item, RECIPE)


def prepare(item):
    return TASK.prepare(item, RECIPE)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for i in range(10):
        (folder / f"a{i}.txt").write_text(f"size={i + 1}")
    return folder


@pytest.fixture
def dataset(tmp_path):
    return DatasetFolder(str(tmp_path / "ds"))


def planned(source, dataset, *, objects_per_part=4, split=SplitConfig(kind="random", val_fraction=0.0, test_fraction=0.0), csv_text=""):  # noqa: B008
    items = TASK.list_raw(str(source)).items
    data, _ = inspect_chunk(dataset, TASK, RECIPE, LIMITS, items, inspect)
    good = [i for i in read_inspections(data, items) if isinstance(i.result, Inspection)]
    objects, warnings = assign(good, TASK, split, csv_text)
    return plan_parts(objects, TASK, RECIPE, objects_per_part), warnings


def make_all(dataset, plans, task=TASK, limits=LIMITS, recorded=None):
    results = []
    for plan in plans:
        result = finished_part(dataset, plan, KINDS, limits, (recorded or {}).get(plan.key))
        results.append(result or make_part(dataset, plan, task, RECIPE, limits, prepare))
    return results


def assert_same_tree(left: Path, right: Path) -> None:
    names = [sorted(p.relative_to(root).as_posix() for root_, _, files in os.walk(root) for f in files for p in [Path(root_) / f]) for root in (left, right)]
    assert names[0] == names[1]
    _, mismatch, errors = filecmp.cmpfiles(left, right, names[0], shallow=False)
    assert (mismatch, errors) == ([], [])


# --- one object -----------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("act", "reason"), [("hang", "timeout"), ("exit", "crashed"), ("hoard", "out_of_memory"), ("raise", "failed"), ("reject", "zero_area")]
)
@pytest.mark.slow
def test_object_process_with_bad_object_rejects_it_and_serves_the_next(source, act, reason):
    (source / "bad.txt").write_text(f"prepare:{act}")
    items = {item.object_id: item for item in TASK.list_raw(str(source)).items}
    process = ObjectProcess(TASK, RECIPE, Limits(timeout_s=3.0, memory_gb=0.5))
    try:
        reject = process.prepare(items["bad"])
        assert isinstance(reject, Reject) and reject.reason == reason
        assert str(source) not in reject.detail
        assert process.prepare(items["a3"]).objects["sha256"] == prepare(items["a3"]).objects["sha256"]
    finally:
        process.close()


def test_relative_reject_removes_the_sources_folder_and_addresses():
    item = RawItem(object_id="x", source="sub/x.stl", uri="/data/here/sub/x.stl")
    reject = relative_reject(Reject(reason="unreadable", detail="[Errno 13] '/data/here/sub/x.stl' at 0x7f00deadbeef"), item)
    assert reject.detail == "[Errno 13] 'sub/x.stl' at 0x…"


def test_items_survive_packing():
    items = [RawItem(object_id="ä 1", source="ä 1.stl", uri="/x/ä 1.stl", images=("/x/1.png", "/x/2.png"), caption="零件")]
    assert unpack_items(pack_items(items)) == items


# --- inspections ----------------------------------------------------------------------------------------------------------------------------
def test_inspect_chunk_again_reuses_and_a_changed_file_is_inspected_again(source, dataset):
    items = TASK.list_raw(str(source)).items
    first, reused = inspect_chunk(dataset, TASK, RECIPE, LIMITS, items, inspect)
    assert not reused
    assert inspect_chunk(dataset, TASK, RECIPE, LIMITS, items, lambda item: pytest.fail("inspected again")) == (first, True)
    (source / "a0.txt").write_text("size=99")
    second, reused = inspect_chunk(dataset, TASK, RECIPE, LIMITS, items, inspect)
    assert not reused
    assert read_inspections(second, items)[0].result.size == 99


def test_inspect_chunk_cut_off_cache_file_is_made_again(source, dataset):
    items = TASK.list_raw(str(source)).items
    data, _ = inspect_chunk(dataset, TASK, RECIPE, LIMITS, items, inspect)
    (cached,) = Path(dataset.folder.path(".inspect")).iterdir()
    cached.write_bytes(data[: len(data) // 2])
    assert inspect_chunk(dataset, TASK, RECIPE, LIMITS, items, inspect) == (data, False)


def test_inspect_chunk_with_higher_limits_tries_again(source, dataset):
    items = TASK.list_raw(str(source)).items
    lost = Reject(reason="timeout", detail="no result after 60 s")
    inspect_chunk(dataset, TASK, RECIPE, LIMITS, items, lambda item: lost)
    assert inspect_chunk(dataset, TASK, RECIPE, LIMITS, items, inspect)[1]
    higher = dataclasses.replace(LIMITS, timeout_s=600.0)
    data, reused = inspect_chunk(dataset, TASK, RECIPE, higher, items, inspect)
    assert not reused and isinstance(read_inspections(data, items)[0].result, Inspection)


def test_inspections_keep_every_value(source, dataset):
    items = TASK.list_raw(str(source)).items
    data, _ = inspect_chunk(dataset, TASK, RECIPE, LIMITS, items, inspect)
    for got, item in zip(read_inspections(data, items), items, strict=True):
        want = inspect(item)
        assert got.item == item
        assert (got.result.sha256, got.result.size, got.result.complexity, got.result.inputs) == (want.sha256, want.size, want.complexity, want.inputs)
        assert got.result.signature.tobytes() == want.signature.tobytes()


# --- the plan -------------------------------------------------------------------------------------------------------------------------------
def test_unique_items_with_repeated_id_keeps_the_first_source():
    items = [RawItem(object_id="x", source=name, uri=f"/{name}") for name in ("b.stl", "a.stl", "c.stl")]
    kept, rejects = unique_items(items)
    assert [item.source for item in kept] == ["a.stl"]
    assert [(source, reject.reason) for source, reject in rejects] == [("b.stl", "duplicate_id"), ("c.stl", "duplicate_id")]


def test_plan_covers_all_objects_once_in_order_and_survives_packing(source, dataset):
    plans, _ = planned(source, dataset)
    assert [o.item.object_id for plan in plans for o in plan.objects] == [f"a{i}" for i in range(10)]
    assert [len(plan.objects) for plan in plans] == [4, 4, 2]
    assert len({plan.key for plan in plans}) == 3
    assert [PartPlan.unpacked(plan.packed()) for plan in plans] == plans


def test_plan_never_puts_two_splits_into_one_part(source, dataset):
    plans, _ = planned(source, dataset, split=SplitConfig(kind="random", val_fraction=0.3, test_fraction=0.2))
    assert [sorted({o.split for o in plan.objects}) for plan in plans] == [["test"], ["train"], ["train"], ["val"]]
    assert sorted(o.item.object_id for plan in plans for o in plan.objects) == [f"a{i}" for i in range(10)]


def test_plan_keys_do_not_depend_on_where_the_sources_lie(source, dataset, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in source.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    assert [p.key for p in planned(source, dataset)[0]] == [p.key for p in planned(moved, dataset)[0]]


def test_plan_after_a_changed_file_changes_only_its_part(source, dataset):
    before, _ = planned(source, dataset)
    (source / "a5.txt").write_text("size=6  ")  # other bytes, same size: split and groups stay
    after, _ = planned(source, dataset)
    assert [b.key == a.key for b, a in zip(before, after, strict=True)] == [True, False, True]


def test_assign_duplicates_share_group_and_split(source, dataset):
    (source / "a9.txt").write_text("size=1")
    (source / "z.txt").write_text("size=1")
    plans, _ = planned(source, dataset, split=SplitConfig(kind="random", val_fraction=0.3, test_fraction=0.3))
    objects = {o.item.object_id: o for plan in plans for o in plan.objects}
    assert {objects[name].group_id for name in ("a0", "a9", "z")} == {"a0"}
    assert len({objects[name].split for name in ("a0", "a9", "z")}) == 1
    assert objects["a1"].group_id == "a1"


def test_assign_by_csv_warns_of_what_does_not_fit(source, dataset):
    (source / "a9.txt").write_text("size=1")
    csv_text = "model_id,split\na0,train\na9,test\na1,validation\nmissing,train\n"
    plans, warnings = planned(source, dataset, split=SplitConfig(kind="csv", csv="x.csv"), csv_text=csv_text)
    splits = {o.item.object_id: o.split for plan in plans for o in plan.objects}
    assert (splits["a0"], splits["a9"], splits["a1"], splits["a2"]) == ("test", "test", "val", "unused")
    assert [line.split(" ")[0] for line in warnings] == ["7", "1", "1"]
    assert "missing" in warnings[1] and "a0" in warnings[2]


# --- part files -----------------------------------------------------------------------------------------------------------------------------
def test_make_part_gives_the_rows_of_the_plan(source, dataset):
    plans, _ = planned(source, dataset)
    (result, *_) = make_all(dataset, plans)
    objects, views = dataset.read_part("objects", 0), dataset.read_part("views", 0)
    assert objects.column("object_id").to_pylist() == views.column("object_id").to_pylist() == ["a0", "a1", "a2", "a3"]
    assert objects.column("source").to_pylist()[0] == "a0.txt"
    assert objects.column("label").to_pylist() == ["a"] * 4
    assert views.column("images").to_pylist()[1] == [b"a1/0", b"a1/1"]
    assert result.part["num_rows"] == 4 and sum(result.part["splits"].values()) == 4
    assert result.part["objects"] == dataset.part_info("objects", 0).sha256
    assert result.part["views"] == dataset.part_info("views", 0).sha256


def test_labels_are_counted_by_split_in_made_and_in_reused_parts(source, dataset):
    (source / "b0.txt").write_text("size=20")
    (source / "b1.txt").write_text("prepare:reject")
    plans, _ = planned(source, dataset)
    made = make_all(dataset, plans)
    found = sum_labels([result.labels for result in made])
    rows = [row for i in range(len(plans)) for row in dataset.read_part("objects", i, ["label", "split"]).to_pylist()]
    assert sum(found["a"].values()) == 10 and sum(found["b"].values()) == 1 and list(found) == ["a", "b"]
    assert found == {name: dict(sorted(Counter(row["split"] for row in rows if row["label"] == name).items())) for name in ("a", "b")}
    reused = [finished_part(dataset, plan, KINDS, LIMITS, result.part) for plan, result in zip(plans, made, strict=True)]
    assert [result.labels for result in reused] == [result.labels for result in made]


def test_parts_of_a_task_without_views_are_objects_alone_and_show_their_pictures(source, dataset, tmp_path):
    from PIL import Image

    from rayjobs.contact_sheet import write_contact_sheet

    task = PictureTask()
    plans, _ = planned(source, dataset)
    made = [make_part(dataset, plan, task, RECIPE, LIMITS, lambda item: task.prepare(item, RECIPE)) for plan in plans]
    assert not dataset.folder.exists("views") and all(set(r.part) == {"key", "num_rows", "splits", "objects"} for r in made)
    assert [finished_part(dataset, p, ["objects"], LIMITS, None).labels for p in plans] == [r.labels for r in made]
    manifest = Manifest(
        task=task.name, settings={}, settings_digest="s", parts=[r.part for r in made], num_objects=10, num_groups=10, num_quarantined=0,
        num_ignored=0, splits={},
    )  # fmt: skip
    sheet = Image.open(write_contact_sheet(dataset, manifest, task, tmp_path / "sheet.png"))
    # The middle of the first cell: the gray of the first object of the first part.
    first = int(to_numpy(dataset.read_part("objects", 0, ["points"]), "points")[0, 0, 0])
    assert sheet.getpixel((80, 80)) == (first,) * 3


def test_objects_without_a_label_are_not_counted():
    rows = [{"label": "", "split": "train"}, {"label": "x", "split": "val"}]
    assert count_labels(rows) == {"x": {"val": 1}}


def test_make_part_leaves_out_rejected_objects_and_keeps_them_in_its_notes(source, dataset):
    (source / "a1.txt").write_text("prepare:reject")
    (source / "a2.txt").write_text("broken_view size=3")
    plans, _ = planned(source, dataset)
    made = make_part(dataset, plans[0], TASK, RECIPE, LIMITS, prepare)
    assert dataset.read_part("objects", 0).column("object_id").to_pylist() == ["a0", "a2", "a3"]
    assert made.rejects == [["a1.txt", "zero_area", "flat"], ["a2.txt#1", "bad_image", "one view"]]
    assert made.num_lost == 1
    again = finished_part(dataset, plans[0], KINDS, LIMITS, None)
    assert again == dataclasses.replace(made, reused=True)


def test_make_part_of_rejected_objects_only_is_an_empty_part(source, dataset):
    for path in source.iterdir():
        path.write_text("prepare:reject")
    plans, _ = planned(source, dataset)
    results = make_all(dataset, plans)
    assert [r.part["num_rows"] for r in results] == [0, 0, 0]
    assert dataset.read_part("views", 0).num_rows == 0


def test_make_part_of_a_file_changed_since_its_inspection_rejects_it(source, dataset):
    plans, _ = planned(source, dataset)
    (source / "a0.txt").write_text("size=7")
    made = make_part(dataset, plans[0], TASK, RECIPE, LIMITS, prepare)
    assert [(source, reason) for source, reason, _ in made.rejects] == [("a0.txt", "unreadable")]
    assert finished_part(dataset, plans[0], KINDS, LIMITS, None) is None, "it gets another try"


def test_finished_part_after_a_kill_between_two_files_is_made_again_with_the_same_bytes(source, dataset):
    plans, _ = planned(source, dataset)
    make_all(dataset, plans)
    path = Path(dataset.folder.path("objects/part-00001.parquet"))
    whole = path.read_bytes()
    path.unlink()
    assert finished_part(dataset, plans[1], KINDS, LIMITS, None) is None
    make_part(dataset, plans[1], TASK, RECIPE, LIMITS, prepare)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("kind", KINDS)
def test_finished_part_with_a_flipped_bit_is_not_taken(source, dataset, kind):
    plans, _ = planned(source, dataset)
    make_all(dataset, plans)
    path = Path(dataset.folder.path(f"{kind}/part-00000.parquet"))
    data = bytearray(path.read_bytes())
    # In a page, not in the footer.
    data[60] ^= 1
    path.write_bytes(bytes(data))
    assert finished_part(dataset, plans[0], KINDS, LIMITS, None) is None


def test_finished_part_of_another_recipe_is_not_taken(source, dataset):
    plans, _ = planned(source, dataset)
    make_all(dataset, plans)
    other = plan_parts(plans[0].objects, TASK, dataclasses.replace(RECIPE, seed=1), 4)[0]
    assert finished_part(dataset, other, KINDS, LIMITS, None) is None


def test_finished_part_with_lost_objects_is_taken_under_the_same_limits_only(source, dataset):
    plans, _ = planned(source, dataset)
    lost = make_part(dataset, plans[0], TASK, RECIPE, LIMITS, lambda item: Reject(reason="timeout", detail="") if item.object_id == "a0" else prepare(item))
    assert finished_part(dataset, plans[0], KINDS, LIMITS, None).rejects == lost.rejects
    assert finished_part(dataset, plans[0], KINDS, dataclasses.replace(LIMITS, timeout_s=999.0), None) is None


def test_parts_made_in_another_order_are_the_same_bytes(source, tmp_path):
    left, right = DatasetFolder(str(tmp_path / "left")), DatasetFolder(str(tmp_path / "right"))
    plans, _ = planned(source, left)
    make_all(left, plans)
    make_all(right, plans[::-1])
    left.folder.delete(".inspect")
    assert_same_tree(tmp_path / "left", tmp_path / "right")


def test_parts_hold_no_absolute_paths(source, dataset):
    plans, _ = planned(source, dataset)
    make_all(dataset, plans)
    for path in Path(dataset.folder.path("objects")).iterdir():
        assert str(source).encode() not in path.read_bytes()


# --- flags and lock -------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"objects_per_part": 0}, "--objects-per-part 0"),
        ({"max_bad_fraction": 1.5}, "--max-bad-fraction 1.5"),
        ({"preview": "sheet.jpg"}, "--preview sheet.jpg"),
        ({"dataset": "parts/ds"}, "--dataset parts/ds"),
        ({"dataset": "parts"}, "--dataset parts"),
    ],
)
def test_check_flags_with_impossible_value_names_the_flag(change, flag):
    job = PrepareJob(task="alignment", recipe=RECIPE, source="parts", dataset="ds")
    check_flags(job)
    with pytest.raises(ValueError, match=flag):
        check_flags(dataclasses.replace(job, **change))


def test_lock_held_by_another_process_is_refused_until_that_dies(tmp_path):
    code = f"""
import sys, time
from cad_models.dataset import Folder
from rayjobs.folder_lock import locked
with locked(Folder({str(tmp_path)!r}), ".lock", "prepare"):
    print("held", flush=True)
    time.sleep(60)
"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    try:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"prepare, process {owner.pid} on "), locked(Folder(str(tmp_path)), ".lock", "prepare"):
            pytest.fail("entered")
    finally:
        owner.kill()
        owner.wait()
    with locked(Folder(str(tmp_path)), ".lock", "prepare"):
        assert (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == []


# --- whole runs -----------------------------------------------------------------------------------------------------------------------------
def job_command(job: str, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    return [sys.executable, str(REPOSITORY / "rayjobs" / f"{job}.py"), "--task", "alignment", *arguments], environment


def run_job_file(job: str, arguments: list[str], cwd: Path) -> subprocess.CompletedProcess:
    command, environment = job_command(job, arguments)
    return subprocess.run(command, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)


def kill_once(job: str, arguments: list[str], cwd: Path, *, until, how: int = signal.SIGKILL) -> tuple[int, str]:
    """Start a job, signal its driver as soon as ``until()``; its exit status and output."""
    command, environment = job_command(job, arguments)
    with (cwd / "killed.log").open("w+") as log:
        driver = subprocess.Popen(command, env=environment, cwd=cwd, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 200
        while not until():
            assert driver.poll() is None and time.monotonic() < deadline, (cwd / "killed.log").read_text()
            time.sleep(0.05)
        driver.send_signal(how)
        status = driver.wait(timeout=60)
    return status, (cwd / "killed.log").read_text()


@pytest.mark.slow
@pytest.mark.ray
def test_prepare_killed_and_stopped_and_run_again_is_byte_equal_to_an_undisturbed_run(tmp_path):
    ds, other = tmp_path / "ds", tmp_path / "other"

    def arguments(folder):
        return ["--source", "builtin:60", "--dataset", str(folder), "--smoke", "--objects-per-part", "4"]

    def num_parts():
        return len(list(ds.glob("objects/part-*.parquet")))

    kill_once("prepare", arguments(ds), tmp_path, until=lambda: num_parts() >= 2)
    assert not (ds / "manifest.json").exists()
    # By its own first result, not by the number of files: workers of the killed driver may write for a moment longer.
    at_work = lambda: "prepare: " in (tmp_path / "killed.log").read_text()  # noqa: E731
    status, output = kill_once("prepare", arguments(ds), tmp_path, until=at_work, how=signal.SIGTERM)
    assert status == 75 and "Traceback" not in output and not (ds / "manifest.json").exists()
    before = num_parts()
    resumed = run_job_file("prepare", arguments(ds), tmp_path)
    assert resumed.returncode == 0, resumed.stdout
    assert before - 2 <= int(resumed.stdout.split("parts ")[-1].split("reused")[0].strip()) <= before
    assert run_job_file("prepare", [*arguments(other), "--scale.num-workers", "1"], tmp_path).returncode == 0
    assert_same_tree(ds, other)
    # Nothing to do: nothing changes, not even a file's time.
    times = {p: p.stat().st_mtime_ns for p in ds.glob("*/part-*.parquet")}
    again = run_job_file("prepare", arguments(ds), tmp_path)
    assert again.returncode == 0 and f"{len(times) // 2} reused, 0 computed" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in ds.glob("*/part-*.parquet")} == times
    assert_same_tree(ds, other)


@pytest.mark.slow
@pytest.mark.ray
def test_prepare_of_bad_files_beside_good_ones_gives_the_expected_quarantine(tmp_path):
    import csv
    import shutil

    bad, good = shared_path("data/bad"), shared_path("data/formats")
    source, ds = tmp_path / "source", tmp_path / "ds"
    shutil.copytree(bad, source / "bad")
    shutil.copytree(good, source / "good")
    arguments = ["--source", str(source), "--dataset", str(ds), "--smoke"]
    strict = run_job_file("prepare", arguments, tmp_path)
    assert strict.returncode == 1 and "--max-bad-fraction" in strict.stdout, strict.stdout
    lenient = run_job_file("prepare", [*arguments, "--max-bad-fraction", "1"], tmp_path)
    assert lenient.returncode == 0 and " 0 computed" in lenient.stdout, lenient.stdout
    dataset = DatasetFolder(str(ds))
    quarantined = {row["source"]: row for row in dataset.quarantine()}
    listed = {source for i in range(len(dataset.manifest().parts)) for source in dataset.read_part("objects", i).column("source").to_pylist()}
    for row in csv.DictReader((bad / "manifest.csv").open(encoding="utf-8")):
        expected, name = row["expected"].lower(), row["path"]
        if expected.startswith("accept"):
            assert name in listed, f"{name}: {quarantined.get(name)}"
        elif expected.startswith("reject") and " or " not in expected and "(or" not in expected:
            assert name in quarantined and name not in listed, name
    assert not [source for source in quarantined if source.startswith("good/")]
    lfs = [row for row in quarantined.values() if "lfs_pointer" in row["source"]]
    assert len(lfs) == 2 and all("Git LFS" in row["detail"] for row in lfs)


@pytest.mark.slow
@pytest.mark.ray
def test_prepare_of_nothing_usable_exits_with_a_message(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "x.stl").write_bytes(b"")
    run = run_job_file("prepare", ["--source", str(tmp_path / "source"), "--dataset", str(tmp_path / "ds"), "--smoke"], tmp_path)
    assert run.returncode == 1 and "none of the 1 listed objects can be used" in run.stdout and "empty_file" in run.stdout
