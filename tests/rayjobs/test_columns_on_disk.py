"""Columns made of pieces: in memory or in a file, the same values."""

import gc
import os

import numpy as np
import pytest

from cad_models.common.mapped import forget_pages, mapped_file
from rayjobs import columns_on_disk
from rayjobs.columns_on_disk import GrowingColumns
from rayjobs.streams import concatenated


def pieces(rng: np.random.Generator) -> list[dict[str, np.ndarray]]:
    views = [3, 3, 5, 2, 6]
    return [
        {
            "vector": rng.standard_normal((rows, 4, 7)).astype(np.float16),
            "views": rng.standard_normal((rows, width, 5)).astype(np.float32),
            "label": rng.integers(0, 9, rows),
        }
        for rows, width in zip((4, 0, 3, 9, 2), views, strict=True)
    ]


@pytest.mark.parametrize("in_memory", [0, 300, 1 << 24])
def test_pieces_are_whole_padded_and_in_order(monkeypatch, in_memory):
    monkeypatch.setattr(columns_on_disk, "_IN_MEMORY_BYTES", in_memory)
    monkeypatch.setattr(columns_on_disk, "_COPIED_BYTES", 100)
    made = pieces(np.random.default_rng(0))
    columns = GrowingColumns()
    for piece in made:
        columns.append(piece)
    found, expected = columns.arrays(), concatenated(made)
    assert found.keys() == expected.keys()
    for name, column in expected.items():
        assert found[name].dtype == column.dtype and type(found[name]) is np.ndarray
        np.testing.assert_array_equal(found[name], column)
        assert (mapped_file(found[name]) is not None) == (column.nbytes > in_memory)
    assert columns.arrays() == {}


def test_nothing_appended_gives_no_columns_and_no_rows_give_empty_ones():
    columns = GrowingColumns()
    assert columns.arrays() == {}
    columns.append({"a": np.zeros((0, 3), dtype=np.float32)})
    found = columns.arrays()["a"]
    assert found.shape == (0, 3) and found.dtype == np.float32


def test_objects_without_a_view_before_objects_with_some_have_zeros():
    columns = GrowingColumns()
    columns.append({"views": np.zeros((2, 0, 3), dtype=np.float32)})
    columns.append({"views": np.ones((1, 4, 3), dtype=np.float32)})
    found = columns.arrays()["views"]
    assert found.shape == (3, 4, 3) and not found[:2].any() and found[2].all()


def test_a_mapped_column_can_be_forgotten_and_read_again_and_leaves_no_file(monkeypatch, tmp_path):
    monkeypatch.setattr(columns_on_disk, "_IN_MEMORY_BYTES", 1000)
    monkeypatch.setattr(columns_on_disk.tempfile, "tempdir", str(tmp_path))
    values = np.random.default_rng(1).standard_normal((5000, 200))
    columns = GrowingColumns()
    for start in range(0, 5000, 100):
        columns.append({"a": values[start : start + 100]})
    assert list(tmp_path.iterdir()) == []  # without a name from the start
    column = columns.arrays()["a"]
    before = _resident_file_bytes()
    assert column.sum() == pytest.approx(values.sum())
    read = _resident_file_bytes()
    forget_pages(column[10:20])
    assert read - before > 6_000_000 and read - _resident_file_bytes() > 6_000_000
    np.testing.assert_array_equal(column, values)
    open_before = _open_files()
    del column
    gc.collect()
    assert _open_files() < open_before


def test_forgetting_an_array_in_memory_changes_nothing():
    array = np.arange(6.0)
    forget_pages(array[2:])
    np.testing.assert_array_equal(array, np.arange(6.0))
    assert mapped_file(array) is None


def _resident_file_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[2]) * os.sysconf("SC_PAGE_SIZE")


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
