"""What prepare does about near duplicates: told, listed, kept together."""

import numpy as np
import pytest

from cad_models.dataset import DatasetFolder
from cad_models.splits import SplitConfig
from cad_models.task import Inspection, RawItem
from rayjobs.preparation import Limits, inspect_chunk, read_inspections
from rayjobs.prepare import assign, near_duplicates_csv
from tests.rayjobs.scripted_task import ScriptedTask

TASK = ScriptedTask()
LIMITS = Limits(timeout_s=60.0, memory_gb=2.0)
CSV = "model_id,split\n" + "".join(f"a{i},{'train' if i < 6 else 'test'}\n" for i in range(9))
BY_CSV = SplitConfig(kind="csv", csv="x.csv")


@pytest.fixture
def folder(tmp_path):
    for i in range(10):
        (tmp_path / f"a{i}.txt").write_text(f"size={i + 1}")
    return tmp_path


def inspected(folder):
    items = TASK.list_raw(str(folder)).items
    data, _ = inspect_chunk(DatasetFolder(str(folder / "ds")), TASK, TASK.smoke, LIMITS, items, lambda item: TASK.inspect(item, TASK.smoke))
    return read_inspections(data, items)


def test_near_duplicates_in_different_splits_are_told_and_written(folder):
    near = [(0, 6, 0.31), (1, 7, 0.42), (2, 3, 0.5), (0, 9, 0.52)]
    objects, warnings = assign(inspected(folder), TASK, BY_CSV, CSV, near)
    (told,) = [w for w in warnings if "near duplicates" in w]
    assert told.startswith("2 pairs of near duplicates lie in different splits") and "a0 ~ a6 (0.31), a1 ~ a7 (0.42);" in told
    assert near_duplicates_csv(objects, near).decode().splitlines() == [
        "distance,model_id_1,split_1,model_id_2,split_2",
        "0.310,a0,train,a6,test",
        "0.420,a1,train,a7,test",
        "0.500,a2,train,a3,train",
        "0.520,a0,train,a9,unused",
    ]


def test_near_duplicates_are_kept_in_one_split_on_request_and_stay_groups_of_their_own(folder):
    near = [(i, i + 1, 0.4) for i in range(0, 10, 2)]
    for seed in range(5):
        split = SplitConfig(kind="random", val_fraction=0.2, test_fraction=0.2, seed=seed, near_duplicates="group")
        objects, warnings = assign(inspected(folder), TASK, split, "", near)
        assert all(objects[i].split == objects[j].split for i, j, _ in near) and not warnings
        assert {o.split for o in objects} == {"train", "val", "test"}
        assert len({o.group_id for o in objects}) == 10


def test_csv_that_divides_near_duplicates_is_overruled_on_request_only(folder):
    near = [(5, 6, 0.4)]
    objects, _ = assign(inspected(folder), TASK, BY_CSV, CSV, near)
    assert (objects[5].split, objects[6].split) == ("train", "test")
    grouped = SplitConfig(kind="csv", csv="x.csv", near_duplicates="group")
    objects, warnings = assign(inspected(folder), TASK, grouped, CSV, near)
    assert (objects[5].split, objects[6].split) == ("test", "test")
    assert any("1 groups of exact and near duplicates are divided by --split.csv" in w for w in warnings)


def test_exact_duplicates_are_not_listed_as_near_ones(folder):
    (folder / "b.txt").write_text("size=3")  # the same as a2
    near = [(2, 10, 0.0)]
    objects, warnings = assign(inspected(folder), TASK, SplitConfig(kind="random"), "", near)
    assert near_duplicates_csv(objects, near).decode().count("\n") == 1 and not warnings


def test_shape_of_an_inspection_survives_its_chunk(tmp_path):
    shape = np.arange(12, dtype=np.float16).reshape(4, 3)
    items = [RawItem(object_id=name, source=name, uri=str(tmp_path / name)) for name in "ab"]
    results = {"a": shape, "b": None}

    def inspect(item):
        return Inspection(sha256="s", size=1, complexity=1.0, signature=np.zeros(2), shape=results[item.object_id])

    data, _ = inspect_chunk(DatasetFolder(str(tmp_path / "ds")), TASK, TASK.smoke, LIMITS, items, inspect)
    first, second = (i.result.shape for i in read_inspections(data, items))
    assert first.dtype == np.float16 and np.array_equal(first, shape) and second is None
