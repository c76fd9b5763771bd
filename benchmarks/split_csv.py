"""Train, val and test by the columns of a table of files, for ``prepare.py --split.kind csv``: files that agree in any of them stay together.

    PYTHONPATH=. python benchmarks/split_csv.py --table data/manifest.csv --below meshes/ --group-by family shape_hash --output split.csv
    python rayjobs/prepare.py --task alignment --source data/meshes --dataset ds/ --split.kind csv --split.csv split.csv
"""

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from cad_models.splits import SplitConfig, draw_splits, joined


def splits_by_columns(rows: Sequence[Mapping[str, str]], columns: Sequence[str], config: SplitConfig) -> list[str]:
    """The split of each row; rows that share a value of any of the columns share a split, empty values join nothing.

    Raises:
        ValueError: a column is not there.
    """
    first: dict[tuple[str, str], int] = {}
    pairs = []
    for number, row in enumerate(rows):
        for column in columns:
            if column not in row:
                raise ValueError(f"--group-by {column}: the table has the columns {', '.join(row)}")
            if row[column]:
                pairs.append((first.setdefault((column, row[column]), number), number))
    return draw_splits(config, joined(range(len(rows)), pairs), [1.0] * len(rows))


def main() -> None:
    """Write ``model_id,split`` and tell how many objects and groups each split has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True, help="CSV with a row a file")
    parser.add_argument("--path-column", default="path", help="column of the file's path")
    parser.add_argument("--below", default="", help="folder within the table's paths that prepare.py will get as --source; others are left out")
    parser.add_argument("--group-by", nargs="+", required=True, help="columns whose equal values keep files together")
    parser.add_argument("--test-fraction", type=float, default=0.2)
    parser.add_argument("--val-fraction", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", required=True)
    flags = parser.parse_args()
    try:
        with open(flags.table, newline="", encoding="utf-8-sig") as file:
            every = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        parser.error(f"--table {flags.table} cannot be read ({error})")
    missing = [name for name in (flags.path_column, *flags.group_by) if every and name not in every[0]]
    if missing:
        parser.error(f"--table {flags.table} has no column {', '.join(missing)}; it has {', '.join(every[0])}")
    rows = [row for row in every if row[flags.path_column].startswith(flags.below)]
    if not rows:
        parser.error(f"--below {flags.below}: no path of {flags.table} begins like that")
    config = SplitConfig(kind="random", test_fraction=flags.test_fraction, val_fraction=flags.val_fraction, seed=flags.seed)
    splits = splits_by_columns(rows, flags.group_by, config)
    with open(flags.output, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model_id", "split"])
        for row, split in zip(rows, splits, strict=True):
            # prepare.py names an object by its path below --source, without the suffix.
            writer.writerow([str(Path(row[flags.path_column][len(flags.below) :]).with_suffix("")), split])
    print(f"{flags.output}: " + ", ".join(f"{splits.count(name)} {name}" for name in ("train", "val", "test")))


if __name__ == "__main__":
    main()
