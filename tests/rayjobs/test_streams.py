"""A dataset's splits as batches: in memory, in Ray's object store and streamed; and datasets that do not fit together."""

import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cad_models.alignment.recipe import SMOKE
from cad_models.common.encoders import encoder_folder
from cad_models.config import replace_all, replace_at
from cad_models.dataset import DatasetError
from cad_models.order import Window
from cad_models.task import LABEL_INDEX
from cad_models.tasks import TASKS
from rayjobs.streams import ROW_KEY, SplitStream, concatenated, gathered, open_dataset, read_examples
from tests.synthetic import WIDTH, make_dataset

TASK = TASKS["alignment"]
RECIPE = replace_all(SMOKE, {"data.num_points": 16, "model.num_points": 8})
GENEROUS = 1 << 40


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """120 objects, 72 of them for training in 18 parts; numbers of views differ."""
    return make_dataset(str(tmp_path_factory.mktemp("data") / "ds"), 120, recipe=RECIPE, objects_per_part=4)


def stream_of(dataset, split="train", recipe=RECIPE) -> SplitStream:
    return SplitStream(dataset=open_dataset(dataset.uri, TASK, recipe), recipe=recipe, split=split)


def assert_same_columns(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype or left[name].dtype == object, name
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def by_row(columns):
    """Row key -> that object's values without padding, however its batch was padded."""
    rows = {}
    for i, key in enumerate(columns[ROW_KEY].tolist()):
        row = {name: column[i] for name, column in columns.items()}
        for name in ("views", "query_views"):
            row[name] = row[name][: row[f"num_{name}"]]
        rows[key] = row
    return rows


class LabelledTask(type(TASK)):
    """In place of the room: it reads the number of each object's class."""

    def columns(self, recipe):
        kinds = super().columns(recipe)
        return {**kinds, "objects": [*kinds["objects"], LABEL_INDEX]}

    def examples(self, tables, recipe):
        return {**super().examples(tables, recipe), "class": tables["objects"].column(LABEL_INDEX).to_numpy()}


@pytest.mark.parametrize(
    "labels, expected",
    [({"box": {"train": 72}, "anvil": {"test": 1}, "cone": {}}, 1), ({"cone": {"train": 1}}, -1), (None, "run the same prepare.py"), ({}, "no object")],
)
def test_label_index_is_the_position_among_the_sorted_classes_of_all_splits(dataset, monkeypatch, labels, expected):
    monkeypatch.setitem(TASKS, "alignment", LabelledTask())
    opened = open_dataset(dataset.uri, TASKS["alignment"], RECIPE)
    opened = replace(opened, manifest=replace(opened.manifest, labels=labels))
    index = next(i for i, part in enumerate(opened.manifest.parts) if "train" in part["splits"])
    if isinstance(expected, str):
        with pytest.raises(DatasetError, match=expected):
            read_examples(opened, RECIPE, "train", index)
        return
    columns = read_examples(opened, RECIPE, "train", index)  # every object of the synthetic set is a box
    assert columns["class"].dtype == np.int64 and columns["class"].tolist() == [expected] * 4


# --- reading ------------------------------------------------------------------------------------------------------------------------------
def test_examples_are_what_the_part_files_hold(dataset):
    opened = open_dataset(dataset.uri, TASK, RECIPE)
    columns = read_examples(
        opened, RECIPE, "train", index := opened.manifest.parts.index(next(p for p in opened.manifest.parts if "train" in p["splits"]))
    )
    objects, embeddings = dataset.read_part("objects", index), dataset.read_part("embeddings/hog", index)
    assert columns["object_id"].tolist() == objects.column("object_id").to_pylist()
    assert columns["num_views"].tolist() == embeddings.column("num_views").to_pylist()
    for name in ("points", "normals"):
        assert columns[name].shape == (4, 8, 3) and columns[name].dtype == np.float32
    assert columns["views"].shape == (4, max(columns["num_views"]), WIDTH) and columns["views"].dtype == np.float16
    for view, count in zip(columns["views"], columns["num_views"], strict=True):
        assert view[:count].any(axis=1).all() and not view[count:].any()
    assert read_examples(opened, RECIPE, "test", index)["group"].shape == (0,)


def test_row_keys_number_every_object_of_every_split_once(dataset):
    keys = [columns[ROW_KEY] for split in ("train", "val", "test") for columns in stream_of(dataset, split).parts(0, 1)]
    keys = np.concatenate(keys)
    assert len(np.unique(keys)) == len(keys) == 120


@pytest.mark.parametrize("world_size", [2, 3, 50])
def test_parts_of_all_workers_are_the_split(dataset, world_size):
    stream = stream_of(dataset)
    whole = concatenated(list(stream.parts(0, 1)))
    pieces = [columns for rank in range(world_size) for columns in stream.parts(rank, world_size)]
    together = concatenated(pieces)
    order = np.argsort(together[ROW_KEY])
    assert_same_columns({n: c[order] for n, c in together.items()}, whole)


@pytest.mark.parametrize("world_size", [2, 4])
def test_whole_batches_are_the_same_for_every_number_of_workers_and_resumed_means_skipped(dataset, world_size):
    stream = stream_of(dataset)
    one = list(stream.batches(1, 16, 0, 1))
    assert len(one) == stream.num_steps(1, 16, 1) == stream.num_steps(1, 16, world_size) == 4
    shares = [list(stream.batches(1, 16, rank, world_size)) for rank in range(world_size)]
    for step, batch in enumerate(one):
        keys = np.concatenate([share[step][ROW_KEY] for share in shares])
        assert sorted(keys) == sorted(batch[ROW_KEY]) and len(keys) == 16
    seen = np.concatenate([batch[ROW_KEY] for batch in one])
    assert len(np.unique(seen)) == len(seen)
    for batch, expected in zip(stream.batches(1, 16, 0, 1, first_step=3), one[3:], strict=True):
        assert_same_columns(batch, expected)


def test_concatenated_pads_what_has_fewer_views_with_zeros():
    a = {"x": np.ones((2, 3, 1), np.float16), "id": np.array(["a", "b"], dtype=object)}
    b = {"x": np.full((1, 5, 1), 2, np.float16), "id": np.array(["c"], dtype=object)}
    joined = concatenated([a, b])
    assert joined["x"].shape == (3, 5, 1) and joined["x"].dtype == np.float16
    assert joined["x"][..., 0].tolist() == [[1, 1, 1, 0, 0]] * 2 + [[2] * 5]
    assert joined["id"].tolist() == ["a", "b", "c"]
    assert concatenated([a]) is a


# --- what does not fit together -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def small(tmp_path):
    return make_dataset(str(tmp_path / "ds"), 20, recipe=RECIPE, objects_per_part=4)


def rewrite(dataset, name, change):
    path = Path(dataset.folder.path(name))
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_gathered_rows_are_those_of_the_concatenation():
    rng = np.random.default_rng(0)
    pieces = [
        {"points": rng.standard_normal((n, 4, 3)), "views": rng.standard_normal((n, v, 2)).astype(np.float16), "names": np.array(list("abcdefg"[:n]), object)}
        for n, v in ((3, 2), (0, 2), (7, 2))
    ]
    order = rng.permutation(10)[:8]
    for chosen in (pieces, [*pieces[:2], {**pieces[2], "views": rng.standard_normal((7, 5, 2)).astype(np.float16)}]):
        rows = [(piece, i) for piece in chosen for i in range(len(piece["names"]))]
        found, expected = gathered([rows[i] for i in order]), concatenated(chosen)
        for name, column in expected.items():
            assert found[name].dtype == column.dtype
            np.testing.assert_array_equal(found[name], column[order])
        assert not any(np.shares_memory(found[name], piece[name]) for name in ("points", "views") for piece in chosen)


def test_missing_dataset_is_refused_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(DatasetError, match=r"is not a dataset folder: run `python rayjobs/prepare.py --dataset .*nowhere"):
        open_dataset(str(tmp_path / "nowhere"), TASK, RECIPE)


def test_unfinished_dataset_is_refused(small):
    Path(small.folder.path("manifest.json")).unlink()
    with pytest.raises(DatasetError, match="is not finished"):
        open_dataset(small.uri, TASK, RECIPE)


def test_dataset_of_another_task_is_refused_naming_both(small):
    rewrite(small, "manifest.json", lambda m: m.update(task="places"))
    with pytest.raises(DatasetError, match="prepared for --task places, not for --task alignment"):
        open_dataset(small.uri, TASK, RECIPE)


def test_embeddings_of_another_encoder_are_refused_naming_both(small):
    with pytest.raises(DatasetError, match=r"no finished embeddings 'timm-vit_tiny-\w+' \(it has hog\): run `python rayjobs/embed.py"):
        open_dataset(small.uri, TASK, replace_at(RECIPE, "data.encoder", "timm:vit_tiny"))


def test_encoder_auto_takes_the_only_embeddings_and_refuses_to_choose_between_two(small):
    assert RECIPE.data.encoder == "auto"
    assert open_dataset(small.uri, TASK, RECIPE).embeddings.encoder == "hog"
    other = "timm:vit_tiny"
    kept = Path(small.folder.path("embeddings/hog"))
    shutil.copytree(kept, kept.parent / encoder_folder(other))
    rewrite(small, f"embeddings/{encoder_folder(other)}/manifest.json", lambda m: m.update(encoder=other))
    with pytest.raises(DatasetError, match="several encoders: choose with --data.encoder, one of hog, timm:vit_tiny"):
        open_dataset(small.uri, TASK, RECIPE)
    named = open_dataset(small.uri, TASK, replace_at(RECIPE, "data.encoder", other))
    assert named.embeddings_folder == f"embeddings/{encoder_folder(other)}"
    shutil.rmtree(kept)
    assert open_dataset(small.uri, TASK, RECIPE).embeddings.encoder == other


def test_embeddings_of_an_earlier_state_are_refused_naming_both_digests(small):
    digest = small.manifest().digest
    rewrite(small, "embeddings/hog/manifest.json", lambda m: m.update(dataset_digest="0ld"))
    with pytest.raises(
        DatasetError, match=rf"made from dataset 0ld, --dataset .* is now {digest}: run `python rayjobs/embed.py .*--encoder hog"
    ):
        open_dataset(small.uri, TASK, RECIPE)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m["parts"].pop(), r"objects/ has 5 parts, embeddings/hog/ has 4"),
        (lambda m: m["parts"][1].update(num_rows=9), r"part 1: objects/ has 4 rows, embeddings/hog/ has 9"),
    ],
)
def test_embeddings_with_unequal_parts_are_refused_naming_both(small, change, message):
    rewrite(small, "embeddings/hog/manifest.json", change)
    with pytest.raises(DatasetError, match=message):
        open_dataset(small.uri, TASK, RECIPE)


def test_parts_with_other_objects_are_refused_naming_both_files(small):
    a, b = (Path(small.folder.path(f"embeddings/hog/part-0000{i}.parquet")) for i in (0, 1))
    a.write_bytes(b.read_bytes())
    with pytest.raises(
        DatasetError, match=r"objects/part-00000.parquet .*embeddings/hog/part-00000.parquet .* same objects in the same order"
    ):
        list(stream_of(small).parts(0, 1))


def test_missing_part_file_is_refused_naming_it(small):
    Path(small.folder.path("objects/part-00000.parquet")).unlink()
    with pytest.raises(DatasetError, match="part-00000.parquet is missing"):
        list(stream_of(small).parts(0, 1))


def test_more_points_than_stored_are_refused_naming_both(small):
    recipe = replace_at(RECIPE, "model.num_points", 64)
    with pytest.raises(DatasetError, match=r"--model.num-points 64 is more than the dataset's 16 points"):
        list(stream_of(small, recipe=recipe).parts(0, 1))


# --- read by threads ---------------------------------------------------------------------------------------------------------------------
def test_window_that_cannot_be_read_by_a_thread_is_told_and_ends_the_threads(small):
    stream = replace(stream_of(small), streamed=True, reader_threads=2)
    Path(small.folder.path("objects/part-00000.parquet")).unlink()
    with pytest.raises(DatasetError, match="part-00000.parquet is missing"):
        list(stream.batches(0, 1, 0, 1))
    _no_reader_is_left()


def test_threads_read_no_further_ahead_than_a_bound_whatever_the_first_window_holds(tmp_path, monkeypatch):
    """One object in the first window and eight in each of the others, of which the bound lets in two and a half."""
    stream = replace(stream_of(make_dataset(str(tmp_path / "ds"), 20, recipe=RECIPE, objects_per_part=4)), streamed=True, reader_threads=1)
    rows = [1, *[8] * 20]
    stream.__dict__["dataset"] = SimpleNamespace(manifest=SimpleNamespace(parts=[{"splits": {"train": n}} for n in rows]))
    begun = []

    def window(self, window):
        begun.append(window.parts[0])
        columns = {ROW_KEY: np.zeros(rows[window.parts[0]], np.int64)}
        return [(columns, i) for i in range(len(columns[ROW_KEY]))]

    monkeypatch.setattr(SplitStream, "_window", window)
    monkeypatch.setattr("rayjobs.streams._READ_AHEAD_BYTES", 20 * 8)
    windows = [Window(0, (part,), 0, (0,)) for part in range(len(rows))]
    for taken, read_rows in enumerate(stream._read_by_threads(windows), start=1):
        assert len(read_rows) == rows[taken - 1]
        time.sleep(0.02)
        assert len(begun) <= taken + 2
    assert begun == list(range(len(rows)))


def test_reader_threads_of_an_abandoned_epoch_end(dataset):
    batches = replace(stream_of(dataset), streamed=True, reader_threads=2).batches(0, 8, 0, 1)
    next(batches)
    batches.close()
    _no_reader_is_left()


def _no_reader_is_left():
    deadline = time.monotonic() + 20
    while any(thread.name.startswith("read-windows") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- with Ray, last: what comes before must find none -----------------------------------------------------------------------------------
READERS = pytest.mark.parametrize("reader_threads", [0, 2], ids=["tasks", "threads"])


@pytest.mark.ray
@READERS
def test_cached_streamed_and_plain_batches_hold_the_same_objects(dataset, local_ray, reader_threads):
    streamed = stream_of(dataset).cached(0, reader_threads)
    cached = stream_of(dataset).cached(GENEROUS)
    assert len(cached.blocks) == 18 and not cached.streamed and streamed.blocks == []
    plain = {}
    for columns in streamed.parts(0, 1):
        plain |= by_row(columns)
    for stream in (cached, streamed):
        steps = stream.num_steps(1, 16, 2)
        shares = [list(stream.batches(1, 16, rank, 2)) for rank in range(2)]
        assert [len(share) for share in shares] == [steps] * 2 and steps >= 3
        found = {}
        for batch in shares[0] + shares[1]:
            assert len(batch[ROW_KEY]) == 8
            rows = by_row(batch)
            assert not rows.keys() & found.keys()
            found |= rows
        for key, row in found.items():
            assert_same_columns({n: np.asarray(v) for n, v in row.items()}, {n: np.asarray(v) for n, v in plain[key].items()})


@pytest.mark.ray
def test_cached_batches_are_those_of_a_process_without_ray(dataset, local_ray):
    cached = stream_of(dataset).cached(GENEROUS)
    from cad_models.order import WholeOrder

    rows = concatenated(list(stream_of(dataset).parts(0, 1)))
    order = WholeOrder(len(rows[ROW_KEY]), 16, RECIPE.seed)
    for step, batch in enumerate(cached.batches(2, 16, 1, 2)):
        chosen = order.rows(2, step, 1, 2)
        assert_same_columns(batch, {name: column[chosen] for name, column in rows.items()})
    for ours, theirs in zip(cached.parts(1, 3), stream_of(dataset).parts(1, 3), strict=True):
        assert_same_columns(ours, theirs)


@pytest.mark.ray
def test_threads_and_tasks_read_the_same_batches(dataset, local_ray):
    by_threads = stream_of(dataset).cached(0)
    by_tasks = stream_of(dataset).cached(0, 0)
    assert (by_threads.reader_threads, by_tasks.reader_threads) == (2, 0)  # this Ray is one machine
    for ours, theirs in zip(by_threads.batches(2, 16, 1, 2), by_tasks.batches(2, 16, 1, 2), strict=True):
        assert_same_columns(ours, theirs)


@pytest.mark.ray
@READERS
def test_streamed_batches_are_the_same_for_every_number_of_workers(dataset, local_ray, reader_threads):
    stream = stream_of(dataset).cached(0, reader_threads)
    one = list(stream.batches(0, 16, 0, 1))
    four = [list(stream.batches(0, 16, rank, 4)) for rank in range(4)]
    assert len(one) == stream.num_steps(0, 16, 1)
    for step, batch in enumerate(one):
        assert sorted(batch[ROW_KEY]) == sorted(np.concatenate([share[step][ROW_KEY] for share in four]))
    other_epoch = next(stream.batches(1, 16, 0, 1))
    assert sorted(other_epoch[ROW_KEY]) != sorted(one[0][ROW_KEY])


@pytest.mark.ray
@READERS
@pytest.mark.parametrize("first_step", [1, 4])
def test_streamed_batches_resumed_are_the_uninterrupted_ones(dataset, local_ray, first_step, reader_threads):
    stream = stream_of(dataset).cached(0, reader_threads)
    whole = list(stream.batches(3, 8, 1, 2))
    resumed = list(stream.batches(3, 8, 1, 2, first_step=first_step))
    assert len(resumed) == len(whole) - first_step > 0
    for ours, theirs in zip(resumed, whole[first_step:], strict=True):
        np.testing.assert_array_equal(ours[ROW_KEY], theirs[ROW_KEY])
        a, b = by_row(ours), by_row(theirs)
        for key in a:
            assert_same_columns({n: np.asarray(v) for n, v in a[key].items()}, {n: np.asarray(v) for n, v in b[key].items()})
