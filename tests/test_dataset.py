"""The dataset folder: tensor columns, atomic files, part keys, broken and misaligned parts, manifests."""

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from cad_models.dataset import (
    DatasetError,
    DatasetFolder,
    EmbeddingsManifest,
    Folder,
    Manifest,
    build_table,
    tensor_array,
    tensor_field,
    to_numpy,
)

RNG = np.random.default_rng(0)


@pytest.fixture
def dataset(tmp_path):
    return DatasetFolder(str(tmp_path / "ds"))


def table_of(ids, values=None):
    values = list(range(len(ids))) if values is None else values
    return pa.table({"object_id": pa.array(ids, pa.string()), "value": pa.array(values, pa.int64())})


def manifest_of(**changes):
    values = {
        "task": "alignment",
        "settings": {"num_points": 4},
        "settings_digest": "s",
        "parts": [{"key": "k", "num_rows": 2, "splits": {"train": 2}, "objects": "o", "views": "v"}],
        "num_objects": 2,
        "num_groups": 2,
        "num_quarantined": 0,
        "num_ignored": 1,
        "splits": {"train": 2},
    }
    return Manifest(**{**values, **changes})


# --- labels ---------------------------------------------------------------------------------------------------------------------------------
def test_manifest_tells_the_classes_and_their_counts(dataset):
    dataset.write_manifest(manifest_of(labels={"nut": {"train": 3}, "bolt": {"test": 1, "train": 2}}))
    found = dataset.manifest()
    assert found.class_names == ("bolt", "nut")
    assert found.class_counts("train") == {"bolt": 2, "nut": 3} and found.class_counts("test") == {"bolt": 1, "nut": 0}
    # They are the parts' content told again: no part of what identifies the dataset.
    assert found.digest == manifest_of().digest


def test_manifest_of_an_earlier_version_asks_for_prepare_only_where_labels_are_needed(dataset):
    dataset.write_manifest(manifest_of())
    written = dataset.folder.read_json("manifest.json")
    del written["labels"]
    dataset.folder.write_json("manifest.json", written)
    found = dataset.manifest()
    assert found.num_objects == 2
    with pytest.raises(DatasetError, match="run the same prepare.py command again"):
        _ = found.class_names
    with pytest.raises(DatasetError, match="no object of the dataset has a label"):
        _ = manifest_of(labels={}).class_names


# --- tensor columns -------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8", "int64"])
def test_tensor_column_fixed_shape_survives_the_file(dataset, dtype):
    values = (RNG.normal(size=(40, 5, 3)) * 50).astype(dtype)
    field = tensor_field("points", dtype, (5, 3))
    dataset.write_part("objects", 0, build_table(pa.schema([field]), [{"points": v} for v in values]), key="k")
    got = to_numpy(dataset.read_part("objects", 0), "points")
    assert got.dtype == values.dtype
    np.testing.assert_array_equal(got, values)


def test_tensor_column_slice_and_take_give_their_rows():
    values = RNG.normal(size=(10, 2)).astype(np.float32)
    table = build_table(pa.schema([tensor_field("x", "float32", (2,))]), [{"x": v} for v in values])
    np.testing.assert_array_equal(to_numpy(table.slice(3, 4), "x"), values[3:7])
    np.testing.assert_array_equal(to_numpy(table.take([9, 0]), "x"), values[[9, 0]])
    np.testing.assert_array_equal(to_numpy(pa.concat_tables([table.slice(8), table.slice(0, 2)]), "x"), values[[8, 9, 0, 1]])
    assert to_numpy(table.slice(0, 0), "x").shape == (0, 2)


def test_ragged_column_of_equal_cells_is_one_array_and_of_another_offset_width_a_list():
    values = [RNG.normal(size=(5, 3)).astype(np.float16) for _ in range(6)]
    field = tensor_field("x", "float16", (-1, 3))
    table = build_table(pa.schema([field]), [{"x": v} for v in values])
    for part, rows in ((table, range(6)), (table.slice(2, 3), (2, 3, 4)), (pa.concat_tables([table.slice(4), table.slice(0, 1)]), (4, 5, 0))):
        found = to_numpy(part, "x")
        assert isinstance(found, np.ndarray)
        np.testing.assert_array_equal(found, [values[row] for row in rows])
    wide = table.cast(pa.schema([pa.field("x", pa.large_binary(), nullable=False, metadata=field.metadata)]))
    found = to_numpy(wide, "x")
    assert isinstance(found, list)
    np.testing.assert_array_equal(found, values)


def test_tensor_column_ragged_gives_each_row_its_length(dataset):
    values = [RNG.normal(size=(n, 3)).astype(np.float16) for n in (24, 0, 26)]
    schema = pa.schema([tensor_field("embeddings", "float16", (-1, 3))])
    dataset.write_part("embeddings/hog", 0, build_table(schema, [{"embeddings": v} for v in values]), key="k")
    for got, want in zip(to_numpy(dataset.read_part("embeddings/hog", 0), "embeddings"), values, strict=True):
        np.testing.assert_array_equal(got, want)


def test_tensor_array_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"'x' holds tensors of shape \(2, 3\), got \(3, 2\)"):
        tensor_array(tensor_field("x", "float32", (2, 3)), [np.zeros((3, 2))])


def test_to_numpy_of_a_plain_column_is_refused():
    with pytest.raises(DatasetError, match="'value' is not a tensor column"):
        to_numpy(table_of(["a"]), "value")


# --- files ----------------------------------------------------------------------------------------------------------------------------------
def test_write_bytes_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    folder = Folder(str(tmp_path))
    folder.write_bytes("x.bin", b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        folder.write_bytes("x.bin", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]
    assert (tmp_path / "x.bin").read_bytes() == b"old"


def test_folder_relative_path_is_made_absolute_and_survives_pickling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Folder("ds")
    folder.write_bytes("a/b.txt", b"x")
    monkeypatch.chdir("/")
    assert pickle.loads(pickle.dumps(folder)).read_bytes("a/b.txt") == b"x"


def test_folder_behind_a_uri_reads_and_writes_the_same_files(tmp_path):
    local, remote = Folder(str(tmp_path)), Folder(tmp_path.as_uri())
    remote.write_bytes("a/b.txt", b"x")
    assert local.files() == remote.files() == ["a/b.txt"]
    assert remote.names("a") == ["b.txt"]
    remote.delete("a")
    assert not local.exists("a")


def test_folder_state_tells_changed_from_unchanged(tmp_path):
    folder = Folder(str(tmp_path))
    assert folder.state("x") == ""
    folder.write_bytes("x", b"1")
    first = folder.state("x")
    assert folder.state("x") == first != ""
    folder.write_bytes("x", b"22")
    assert folder.state("x") != first


def test_drop_parts_removes_parts_from_a_number_on_and_leftovers_only(dataset):
    for i in range(4):
        dataset.write_part("objects", i, table_of(["a"]), key="k")
    folder = Path(dataset.folder.path("objects"))
    (folder / ".part-00000.parquet.tmp-123").write_bytes(b"half")
    (folder / "notes.txt").write_text("the user's own")
    assert dataset.drop_parts("objects", 2) == 2
    assert sorted(p.name for p in folder.iterdir()) == ["notes.txt", "part-00000.parquet", "part-00001.parquet"]


# --- parts ----------------------------------------------------------------------------------------------------------------------------------
def test_write_part_twice_gives_the_same_bytes_and_their_digest(dataset):
    first = dataset.write_part("objects", 0, table_of(["a", "b"]), key="k", notes={"b": 1, "a": [2]})
    second = dataset.write_part("objects", 1, table_of(["a", "b"]), key="k", notes={"a": [2], "b": 1})
    data = [Path(dataset.folder.path(f"objects/part-0000{i}.parquet")).read_bytes() for i in range(2)]
    assert data[0] == data[1]
    assert first == second == dataset.part_info("objects", 0)
    assert first.sha256 == hashlib.sha256(data[0]).hexdigest() and first.num_rows == 2


def test_part_notes_only_of_the_same_key(dataset):
    dataset.write_part("objects", 0, table_of(["a"]), key="k", notes={"lost": 1})
    assert dataset.part_notes("objects", 0, key="k") == {"lost": 1}
    assert dataset.part_notes("objects", 0, key="other") is None
    assert dataset.part_notes("objects", 1, key="k") is None


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_part_cut_off_is_not_there_for_resuming_and_an_error_for_reading(dataset, keep):
    dataset.write_part("objects", 0, table_of(["a"] * 50), key="k")
    path = Path(dataset.folder.path("objects/part-00000.parquet"))
    path.write_bytes(path.read_bytes()[:keep])
    assert dataset.part_notes("objects", 0, key="k") is None
    with pytest.raises(DatasetError, match="part-00000.parquet is broken"):
        dataset.read_part("objects", 0)
    with pytest.raises(DatasetError, match="part-00000.parquet is broken"):
        dataset.part_info("objects", 0)


def test_part_with_a_flipped_bit_is_seen_when_verified(dataset):
    values = RNG.integers(0, 2**60, 50)
    dataset.write_part("objects", 0, table_of(["a"] * 50, values), key="k")
    path = Path(dataset.folder.path("objects/part-00000.parquet"))
    data = bytearray(path.read_bytes())
    at = bytes(data).index(np.int64(values[20]).tobytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DatasetError, match="is broken"):
        dataset.read_part("objects", 0, verify=True)
    with pytest.raises(DatasetError, match="is broken"):
        dataset.part_info("objects", 0)


def test_read_part_missing_file_or_column_names_it(dataset):
    with pytest.raises(DatasetError, match="objects/part-00003.parquet is missing"):
        dataset.read_part("objects", 3)
    dataset.write_part("objects", 0, table_of(["a"]), key="k")
    with pytest.raises(DatasetError, match="has no column points"):
        dataset.read_part("objects", 0, ["object_id", "points"])
    dataset.write_part("embeddings/hog", 0, table_of(["a"]), key="k")
    with pytest.raises(DatasetError, match="has no column more: run embed.py again with the same recipe flags"):
        dataset.read_part("embeddings/hog", 0, ["more"])


def test_read_aligned_gives_the_parts_side_by_side(dataset):
    dataset.write_part("objects", 0, table_of(["a", "b"], [1, 2]), key="k")
    dataset.write_part("embeddings/hog", 0, table_of(["a", "b"], [3, 4]), key="k")
    tables = dataset.read_aligned(0, {"objects": ["value"], "embeddings/hog": ["object_id", "value"]})
    assert {kind: table.to_pydict() for kind, table in tables.items()} == {
        "objects": {"object_id": ["a", "b"], "value": [1, 2]},
        "embeddings/hog": {"object_id": ["a", "b"], "value": [3, 4]},
    }


@pytest.mark.parametrize("ids", [["b", "a"], ["a"], ["a", "b", "c"], ["a", "x"]])
def test_read_aligned_of_unequal_parts_names_both_files(dataset, ids):
    dataset.write_part("objects", 0, table_of(["a", "b"]), key="k")
    dataset.write_part("embeddings/hog", 0, table_of(ids), key="k")
    with pytest.raises(DatasetError, match=r"objects/part-00000.parquet .*embeddings/hog/part-00000.parquet"):
        dataset.read_aligned(0, {"objects": ["value"], "embeddings/hog": ["value"]})


# --- manifests ------------------------------------------------------------------------------------------------------------------------------
def test_manifest_survives_the_file(dataset):
    dataset.write_manifest(manifest_of())
    assert dataset.manifest() == manifest_of()


def test_manifest_digest_follows_the_content_only():
    digest = manifest_of().digest
    assert manifest_of(num_ignored=5).digest == digest
    assert manifest_of(settings_digest="t").digest != digest
    assert manifest_of(parts=[{**manifest_of().parts[0], "views": "w"}]).digest != digest


def test_manifest_of_no_dataset_an_unfinished_one_or_another_version_says_so(dataset):
    with pytest.raises(DatasetError, match="is not a dataset folder: run `python rayjobs/prepare.py"):
        dataset.manifest()
    dataset.write_part("objects", 0, table_of(["a"]), key="k")
    with pytest.raises(DatasetError, match="is not finished"):
        dataset.manifest()
    dataset.folder.write_json("manifest.json", {"schema_version": 0})
    with pytest.raises(DatasetError, match="schema version 0"):
        dataset.manifest()
    dataset.folder.write_bytes("manifest.json", b"{")
    with pytest.raises(DatasetError, match="manifest.json is not valid JSON"):
        dataset.manifest()


def test_embeddings_manifest_missing_lists_what_is_there(dataset):
    value = EmbeddingsManifest(encoder="hog", encoder_digest="e", width=3, dataset_digest="d", parts=[])
    dataset.folder.write_json("embeddings/hog/manifest.json", value.__dict__)
    assert dataset.embeddings_manifest("hog") == value
    with pytest.raises(DatasetError, match=r"'vit' \(it has hog\)"):
        dataset.embeddings_manifest("vit")


def test_quarantine_survives_the_file_in_order_of_source(dataset):
    rows = [{"source": s, "reason": "empty_file", "detail": "零件"} for s in ("b", "a")]
    dataset.write_quarantine(rows)
    assert dataset.quarantine() == rows[::-1]
    assert pq.read_schema(dataset.folder.path("quarantine.parquet")).names == ["source", "reason", "detail"]


def test_quarantine_with_unknown_reason_is_refused(dataset):
    with pytest.raises(ValueError, match="'bad luck' is not one of the quarantine reasons"):
        dataset.write_quarantine([{"source": "a", "reason": "bad luck", "detail": ""}])


def test_publish_that_fails_tells_one_reason_and_leaves_what_was_there(tmp_path, monkeypatch):
    import errno
    import shutil

    (tmp_path / "made").mkdir()
    for name in ("a", "b"):
        (tmp_path / "made" / name).write_text("old")
    folder = Folder(str(tmp_path / "run"))
    folder.publish("last", tmp_path / "made")
    copied, copytree = shutil.copy2, shutil.copytree

    def full(source, target, **options):
        if str(source).endswith("b"):
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        return copied(source, target, **options)

    monkeypatch.setattr(shutil, "copytree", lambda source, target: copytree(source, target, copy_function=full))
    with pytest.raises(OSError, match=r"cannot write \S+/last: \[Errno 28\] No space left on device; what was there is as it was"):
        folder.publish("last", tmp_path / "made")
    assert (tmp_path / "run/last/b").read_text() == "old" and [p.name for p in (tmp_path / "run").iterdir()] == ["last"]
