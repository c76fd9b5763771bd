"""Splits by the columns of a table: rows that agree in any of them stay together."""

import pytest

from benchmarks.split_csv import splits_by_columns
from cad_models.splits import SplitConfig

CONFIG = SplitConfig(kind="random", test_fraction=0.2, val_fraction=0.1, seed=1)


def test_rows_that_share_a_value_of_any_column_share_a_split():
    rows = [{"family": f"f{i // 4}", "hash": f"h{i}"} for i in range(200)]
    rows[0]["hash"] = rows[199]["hash"] = "same"
    splits = splits_by_columns(rows, ["family", "hash"], CONFIG)
    for start in range(0, 200, 4):
        assert len(set(splits[start : start + 4])) == 1
    assert splits[0] == splits[199]
    assert splits.count("test") == pytest.approx(40, abs=4) and splits.count("val") == pytest.approx(20, abs=4)


def test_empty_values_join_nothing():
    splits = splits_by_columns([{"family": ""}] * 100, ["family"], CONFIG)
    assert splits.count("test") == 20 and splits.count("train") == 70


def test_missing_column_is_named():
    with pytest.raises(ValueError, match="--group-by famly: the table has the columns family"):
        splits_by_columns([{"family": "a"}], ["famly"], CONFIG)
