"""Dividing a dataset into train, val and test, never through a group of exact duplicates. Pure functions.

All take one value per object and return one split name per object. Groups, not objects, are drawn: what is proportioned is the number of groups.
"""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

UNUSED = "unused"
"""The split of objects that a user's CSV does not name: kept in the dataset, read by no job."""

_CSV_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test", UNUSED: UNUSED}
# Held out beats trained on: when a user's CSV divides a group, the whole group goes to the strictest split that it names.
_STRICTNESS = {UNUSED: 0, "train": 1, "val": 2, "test": 3}


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How objects are divided into train, val and test; exact duplicates stay together unless the user insists."""

    kind: Literal["random", "stratified", "label", "kfold", "csv"] = "stratified"
    """random; stratified by complexity (of a mesh vertices x faces; quantile bins); label = stratified by class; kfold; csv = given by --split.csv."""
    val_fraction: float = 0.1
    """Share of the groups in val (random, stratified, label)."""
    test_fraction: float = 0.1
    """Share of the groups in test (random, stratified, label, kfold); kfold divides the rest."""
    num_bins: int = 20
    """Quantile bins of log complexity (stratified)."""
    num_folds: int = 5
    """Folds (kfold)."""
    fold: int = 0
    """The fold that is val, from 0 (kfold)."""
    csv: str = ""
    """CSV file with the columns model_id, split (train, val or validation, test)."""
    divide_duplicates: bool = False
    """Take the CSV at its word, even where it puts exact duplicates into different splits (as to repeat a published figure): metrics then reward
    remembering. Otherwise such a group goes whole to its strictest split (test, then val, then train)."""
    seed: int = 42
    """Seeds the drawing."""
    near_duplicates: Literal["report", "group", "ignore"] = "report"
    """Almost the same part in two splits makes val and test look better than they are. report: warn, and list the pairs in near_duplicates.csv; group: keep
    them in one split, as exact duplicates always are; ignore: do not look."""

    def check(self) -> None:
        """Raises ValueError, in the flags' names, when values contradict each other."""
        if not (0 <= self.val_fraction < 1 and 0 <= self.test_fraction < 1 and self.val_fraction + self.test_fraction < 1):
            raise ValueError(
                f"--split.val-fraction {self.val_fraction} and --split.test-fraction {self.test_fraction} must be at least 0 and leave something to train on"
            )
        if self.kind == "kfold" and not (2 <= self.num_folds and 0 <= self.fold < self.num_folds):
            raise ValueError(
                f"--split.fold {self.fold} must lie in 0 … {self.num_folds - 1} and --split.num-folds {self.num_folds} be at least 2"
            )
        if self.kind == "csv" and not self.csv:
            raise ValueError("--split.kind csv needs --split.csv FILE with the columns model_id, split")
        if self.kind != "csv" and self.csv:
            raise ValueError(f"--split.csv {self.csv} is read only with --split.kind csv (now {self.kind})")
        if self.kind != "csv" and self.divide_duplicates:
            raise ValueError(f"--split.divide-duplicates goes with --split.kind csv only (now {self.kind}): no drawn split divides duplicates")
        if self.num_bins < 1:
            raise ValueError(f"--split.num-bins {self.num_bins} must be at least 1")


def joined(group: Sequence[int], pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Groups (a number for each object) joined along pairs of objects; a joined group has the least of its groups' numbers."""
    parent = {int(number): int(number) for number in group}

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for i, j in pairs:
        a, b = root(int(group[i])), root(int(group[j]))
        parent[max(a, b)] = min(a, b)
    return [root(int(number)) for number in group]


def draw_splits(config: SplitConfig, group: Sequence[int], complexity: Sequence[float], label: Sequence[str] = ()) -> list[str]:
    """Splits of a random, stratified, label or kfold division.

    Args:
        group: Group number of each object.
        complexity: Positive number of each object; read by stratified, which takes a group's first member.
        label: Class of each object; read by label, which takes a group's first member.

    Returns:
        ``train``, ``val`` or ``test`` for each object.
    """
    config.check()
    groups, first = np.unique(np.asarray(group, dtype=np.int64), return_index=True)
    # np.unique sorts by group number; keep the order of first appearance, which is the order of object ids.
    order = np.argsort(first, kind="stable")
    groups, first = groups[order], first[order]
    rng = np.random.default_rng(config.seed)
    if config.kind == "stratified":
        # One bin needs enough groups to give each split its share.
        num_bins = max(1, min(config.num_bins, len(groups) // 10))
        rank = np.argsort(np.argsort(np.log(np.asarray(complexity, dtype=np.float64)[first]), kind="stable"), kind="stable")
        strata = rank * num_bins // max(1, len(groups))
    elif config.kind == "label":
        strata = np.unique(np.asarray(label)[first], return_inverse=True)[1] if len(first) else np.zeros(0, dtype=np.int64)
    else:
        strata = np.zeros(len(groups), dtype=np.int64)
    names = np.full(len(groups), "train", dtype=object)
    carry_test = carry_val = 0.0
    for stratum in range(int(strata.max(initial=0)) + 1):
        members = rng.permutation(np.flatnonzero(strata == stratum))
        # Fractions of a bin carry over to the next, so that the totals are right to within one group.
        carry_test += config.test_fraction * len(members)
        num_test = int(carry_test + 1e-9)
        carry_test -= num_test
        names[members[:num_test]] = "test"
        rest = members[num_test:]
        if config.kind == "kfold":
            names[rest[np.arange(len(rest)) % config.num_folds == config.fold]] = "val"
        else:
            carry_val += config.val_fraction * len(members)
            num_val = min(int(carry_val + 1e-9), len(rest))
            carry_val -= num_val
            names[rest[:num_val]] = "val"
    _fill_empty(names, config, rng)
    name_of = dict(zip(groups.tolist(), names.tolist(), strict=True))
    return [name_of[int(g)] for g in group]


def _fill_empty(names: np.ndarray, config: SplitConfig, rng: np.random.Generator) -> None:
    # A tiny dataset would round a wanted split down to nothing, and every job after it would fail.
    for name, fraction in (("val", config.val_fraction if config.kind != "kfold" else 1.0), ("test", config.test_fraction)):
        train = np.flatnonzero(names == "train")
        if fraction > 0 and not (names == name).any() and len(train) > 1:
            names[rng.choice(train)] = name


@dataclass(frozen=True)
class CsvSplit:
    """A user's split, applied."""

    splits: list[str]
    num_unnamed: int
    """Objects that the CSV does not name: their split is ``unused``."""
    unknown: list[str]
    """Each model_id of the CSV that is no object."""
    divided_groups: list[str]
    """Ids of the first member of each group that the CSV divided; unless that was asked for, the whole group went to its strictest split (test, val,
    train)."""
    num_leaked: int
    """Objects of val and test that have an exact duplicate in train."""


def read_split_csv(text: str, *, where: str = "--split.csv") -> dict[str, str]:
    """model_id -> split of a CSV with the columns ``model_id, split`` (others are ignored).

    Raises:
        ValueError: no such columns, an unknown split name, or one id with two splits; the message names the line.
    """
    reader = csv.DictReader(io.StringIO(text.removeprefix("\ufeff")))
    if not reader.fieldnames or not {"model_id", "split"} <= set(reader.fieldnames):
        raise ValueError(f"{where} needs the columns model_id, split; it has {', '.join(reader.fieldnames or ['none'])}")
    named: dict[str, str] = {}
    for row in reader:
        model_id, split = (row["model_id"] or "").strip(), (row["split"] or "").strip().lower()
        if split not in _CSV_NAMES:
            raise ValueError(f"{where} line {reader.line_num}: split {split!r} is none of {', '.join(_CSV_NAMES)}")
        if named.setdefault(model_id, _CSV_NAMES[split]) != _CSV_NAMES[split]:
            raise ValueError(f"{where} line {reader.line_num}: {model_id} stands in two splits, {named[model_id]} and {_CSV_NAMES[split]}")
    if not named:
        raise ValueError(f"{where} has no rows")
    return named


def apply_split_csv(named: dict[str, str], object_ids: Sequence[str], group: Sequence[int], *, divide_duplicates: bool = False) -> CsvSplit:
    """Give every object its split by a user's CSV; ids agree also when one side lacks leading zeros (``7`` and ``0007``).

    Args:
        divide_duplicates: See `SplitConfig`.
    """
    number_of: dict[str, str] = {}
    for model_id in named:
        if model_id.isdigit():
            number_of.setdefault(str(int(model_id)), model_id)
    used: set[str] = set()
    wanted: list[str] = []
    for object_id in object_ids:
        key = object_id if object_id in named else number_of.get(str(int(object_id)), "") if object_id.isdigit() else ""
        used.add(key)
        wanted.append(named.get(key, UNUSED))
    strictest: dict[int, str] = {}
    for g, split in zip(group, wanted, strict=True):
        if _STRICTNESS[split] >= _STRICTNESS[strictest.get(g, UNUSED)]:
            strictest[g] = split
    seen: dict[int, set[str]] = {}
    first: dict[int, str] = {}
    for object_id, g, split in zip(object_ids, group, wanted, strict=True):
        seen.setdefault(g, set()).add(split)
        first.setdefault(g, object_id)
    splits = wanted if divide_duplicates else [strictest[g] for g in group]
    trained = {g for g, split in zip(group, splits, strict=True) if split == "train"}
    return CsvSplit(
        splits=splits,
        num_unnamed=Counter(wanted)[UNUSED],
        unknown=[model_id for model_id in named if model_id not in used],
        divided_groups=[first[g] for g, found in seen.items() if len(found - {UNUSED}) > 1],
        num_leaked=sum(g in trained and split in ("val", "test") for g, split in zip(group, splits, strict=True)),
    )
