"""Divisions into train, val and test: sizes, groups kept whole, balance, folds, a user's CSV."""

from collections import Counter

import numpy as np
import pytest

from cad_models.splits import SplitConfig, apply_split_csv, draw_splits, joined, read_split_csv


def drawn(kind: str, group, complexity=None, label=(), **values) -> list[str]:
    group = [int(g) for g in group]
    complexity = [1.0] * len(group) if complexity is None else [float(c) for c in complexity]
    return draw_splits(SplitConfig(kind=kind, **values), group, complexity, label)


@pytest.mark.parametrize("kind", ["random", "stratified"])
@pytest.mark.parametrize("num_groups", [10, 97, 1000])
def test_draw_sizes_are_the_fractions_of_the_groups(kind, num_groups):
    complexity = np.random.default_rng(0).lognormal(size=num_groups)
    count = Counter(drawn(kind, range(num_groups), complexity, val_fraction=0.2, test_fraction=0.1))
    assert abs(count["val"] - 0.2 * num_groups) <= 1
    assert abs(count["test"] - 0.1 * num_groups) <= 1
    assert sum(count.values()) == num_groups


@pytest.mark.parametrize("kind", ["random", "stratified", "kfold"])
def test_draw_never_divides_a_group(kind):
    rng = np.random.default_rng(1)
    group = rng.integers(0, 60, 300)
    splits = np.array(drawn(kind, group, rng.lognormal(size=300)))
    assert all(len(set(splits[group == g])) == 1 for g in np.unique(group))
    assert set(splits) == {"train", "val", "test"}


def test_draw_counts_groups_not_objects():
    # One group of 900 duplicates and 100 single objects: 20 % of the groups is 20, whatever the big one holds.
    group = [0] * 900 + list(range(1, 101))
    splits = drawn("random", group, val_fraction=0.2, test_fraction=0.0)
    assert len({g for g, s in zip(group, splits, strict=True) if s == "val"}) == 20


def test_draw_stratified_puts_the_fraction_of_each_quantile_into_each_split():
    complexity = np.random.default_rng(2).lognormal(sigma=4, size=1000)
    splits = np.array(drawn("stratified", range(1000), complexity, val_fraction=0.1, test_fraction=0.1, num_bins=20))
    order = np.argsort(complexity)
    for members in np.array_split(order, 20):
        assert Counter(splits[members].tolist()) == {"train": 40, "val": 5, "test": 5}


def test_draw_by_label_puts_the_fraction_of_each_class_into_each_split_and_divides_no_group():
    label = np.repeat(["bolt", "nut", "washer"], [200, 60, 20])
    splits = np.array(drawn("label", range(280), label=label.tolist(), val_fraction=0.2, test_fraction=0.1))
    for name, count in (("bolt", 200), ("nut", 60), ("washer", 20)):
        assert Counter(splits[label == name].tolist()) == {"train": 0.7 * count, "val": 0.2 * count, "test": 0.1 * count}
    group = np.arange(280) // 4
    splits = np.array(drawn("label", group, label=label.tolist(), val_fraction=0.2, test_fraction=0.1))
    assert all(len(set(splits[group == g])) == 1 for g in range(70))


def test_draw_with_another_seed_differs_and_with_the_same_is_equal():
    first, second, other = (drawn("random", range(200), seed=seed) for seed in (0, 0, 1))
    assert first == second != other


def test_draw_kfold_folds_partition_what_is_not_test():
    folds = [np.array(drawn("kfold", range(103), num_folds=4, fold=fold, test_fraction=0.2)) for fold in range(4)]
    test = folds[0] == "test"
    assert abs(int(test.sum()) - 20.6) < 1
    assert all(((fold == "test") == test).all() for fold in folds), "the test set is the same in every fold"
    times_val = sum((fold == "val").astype(int) for fold in folds)
    assert (times_val[~test] == 1).all() and (times_val[test] == 0).all()
    assert max((fold == "val").sum() for fold in folds) - min((fold == "val").sum() for fold in folds) <= 1


@pytest.mark.parametrize("num_objects", [3, 4, 7])
def test_draw_of_a_tiny_set_leaves_no_wanted_split_empty(num_objects):
    assert set(drawn("stratified", range(num_objects))) == {"train", "val", "test"}


def test_draw_of_one_object_trains_on_it():
    assert drawn("random", [0]) == ["train"]


def test_draw_of_nothing_is_nothing():
    assert drawn("stratified", [], []) == []


def test_draw_with_zero_fractions_is_all_train():
    assert set(drawn("random", range(50), val_fraction=0.0, test_fraction=0.0)) == {"train"}


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "--split.val-fraction"),
        ({"val_fraction": -0.1}, "--split.val-fraction"),
        ({"kind": "kfold", "fold": 5}, "--split.fold 5"),
        ({"kind": "kfold", "num_folds": 1}, "--split.num-folds"),
        ({"kind": "csv"}, "--split.csv"),
        ({"csv": "x.csv"}, "--split.csv x.csv"),
        ({"num_bins": 0}, "--split.num-bins"),
    ],
)
def test_check_with_impossible_values_names_the_flag(values, flag):
    with pytest.raises(ValueError, match=flag):
        SplitConfig(**values).check()


# --- a user's CSV ---------------------------------------------------------------------------------------------------------------------------
def test_csv_reads_the_source_systems_columns():
    assert read_split_csv("model_id,split\n0001,train\n0002,validation\n3, TEST \n") == {"0001": "train", "0002": "val", "3": "test"}


def test_csv_with_byte_order_mark_other_columns_and_quotes_is_read():
    assert read_split_csv('\ufeffsplit,note,model_id\r\nval,"a, b","x ""1"""\r\n') == {'x "1"': "val"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,split\na,train\n", "columns model_id, split; it has id, split"),
        ("", "it has none"),
        ("model_id,split\n", "no rows"),
        ("model_id,split\na,train\nb,trian\n", "line 3: split 'trian'"),
        ("model_id,split\na,train\na,val\n", "line 3: a stands in two splits"),
        ("model_id,split\na\n", "line 2: split ''"),
    ],
)
def test_csv_with_mistake_names_it(text, message):
    with pytest.raises(ValueError, match=message):
        read_split_csv(text)


def test_csv_ids_agree_over_leading_zeros_both_ways():
    result = apply_split_csv({"7": "val", "0012": "test", "x7": "train"}, ["0007", "12", "x7"], [0, 1, 2])
    assert result.splits == ["val", "test", "train"]
    assert (result.num_unnamed, result.unknown, result.divided_groups) == (0, [], [])


def test_csv_exact_id_beats_a_number_of_the_same_value():
    assert apply_split_csv({"7": "val", "07": "test"}, ["07", "7"], [0, 1]).splits == ["test", "val"]


def test_csv_that_divides_a_group_moves_it_to_the_strictest_split():
    named = {"a": "train", "b": "test", "c": "val", "d": "train", "e": "val"}
    result = apply_split_csv(named, ["a", "b", "c", "d", "e", "f"], [0, 0, 0, 1, 1, 2])
    assert result.splits == ["test", "test", "test", "val", "val", "unused"]
    assert result.divided_groups == ["a", "d"]


def test_csv_taken_at_its_word_divides_groups_and_counts_what_leaks():
    named = {"a": "train", "b": "test", "c": "val", "d": "train", "e": "train", "f": "test", "g": "test"}
    result = apply_split_csv(named, list("abcdefg"), [0, 0, 0, 1, 1, 2, 2], divide_duplicates=True)
    assert result.splits == ["train", "test", "val", "train", "train", "test", "test"]
    assert result.divided_groups == ["a"] and result.num_leaked == 2
    assert apply_split_csv(named, list("abcdefg"), [0, 0, 0, 1, 1, 2, 2]).num_leaked == 0


def test_dividing_duplicates_without_a_csv_is_refused():
    with pytest.raises(ValueError, match="--split.divide-duplicates"):
        SplitConfig(kind="random", divide_duplicates=True).check()


def test_csv_unnamed_duplicate_follows_its_group_without_a_warning():
    result = apply_split_csv({"a": "val"}, ["a", "b"], [0, 0])
    assert result.splits == ["val", "val"]
    assert result.divided_groups == []


def test_csv_tells_unnamed_objects_and_unknown_rows():
    result = apply_split_csv({"a": "train", "ghost": "val"}, ["a", "b", "c"], [0, 1, 2])
    assert (result.splits, result.num_unnamed, result.unknown) == (["train", "unused", "unused"], 2, ["ghost"])


# --- joined groups ------------------------------------------------------------------------------------------------------------------------
def test_joined_groups_hang_together_through_any_chain():
    group = [0, 1, 2, 1, 4, 5, 5]
    assert joined(group, [(4, 3), (2, 6), (4, 1)]) == [0, 1, 2, 1, 1, 2, 2]
    assert joined(group, []) == group
