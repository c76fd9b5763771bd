"""A split by families: no version of a part of the test set is trained on.

    python -m benchmarks.family_split --meshes meshes/ --families manifest.csv --output split.csv [--held-out pairs.csv]
    python rayjobs/prepare.py --task alignment --source meshes/ --dataset ds/ --split.kind csv --split.csv split.csv

Families are those of the CSV (columns path, family), joined where they hold exact duplicates (by geometry, whatever the names). Families with a mesh that
is also the CAD file of one of the --held-out pairs (column cad) are test; the others are drawn until test and val have their shares of the meshes.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from benchmarks.mesh_files import duplicate_groups, read_families, read_pairs
from cad_models.alignment.data import list_source
from cad_models.splits import joined


def family_split(
    family: list[str], duplicate: list[int], held_out: set[int], *, test_share: float = 0.2, val_share: float = 0.1, seed: int = 42
) -> list[str]:
    """``train``, ``val`` or ``test`` for each mesh, families whole.

    Args:
        family: Of each mesh.
        duplicate: Index of the first mesh of the same geometry, of each mesh (its own where there is none).
        held_out: Indices of meshes whose families go to test.
    """
    numbers = np.unique(family, return_inverse=True)[1]
    groups = np.array(joined(numbers.tolist(), list(enumerate(duplicate))))
    split = dict.fromkeys(groups.tolist(), "train")
    size = {number: int((groups == number).sum()) for number in split}
    taken = {"test": 0, "val": 0}
    for number in {int(groups[i]) for i in held_out}:
        split[number] = "test"
        taken["test"] += size[number]
    wanted = {"test": test_share * len(family), "val": val_share * len(family)}
    order = np.random.default_rng(seed).permutation(sorted(n for n, name in split.items() if name == "train"))
    for number in order.tolist():
        name = next((name for name in ("test", "val") if taken[name] + size[number] <= wanted[name]), None)
        if name:
            split[number] = name
            taken[name] += size[number]
    return [split[int(number)] for number in groups]


def main() -> None:
    """Write the CSV, and tell the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meshes", required=True, help="folder that prepare.py will read")
    parser.add_argument("--families", required=True, help="CSV with the columns path, family")
    parser.add_argument("--held-out", default="", help="CSV with a column cad: meshes of the same geometry go to test")
    parser.add_argument("--output", required=True, help="CSV file to write: model_id, split")
    parser.add_argument("--seed", type=int, default=42)
    flags = parser.parse_args()
    items = list_source(flags.meshes).items
    paths = [Path(item.uri) for item in items]
    known = read_families(Path(flags.families), Path(flags.meshes))
    held_out = sorted({pair.cad for pair in read_pairs(Path(flags.held_out))}) if flags.held_out else []
    duplicate = duplicate_groups([*paths, *held_out]).tolist()
    wanted = {duplicate[len(paths) + k] for k in range(len(held_out))}
    family = [known[path].family if path in known else item.object_id for path, item in zip(paths, items, strict=True)]
    split = family_split(family, duplicate[: len(paths)], {i for i in range(len(paths)) if duplicate[i] in wanted}, seed=flags.seed)
    with Path(flags.output).open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([("model_id", "split"), *((i.object_id, s) for i, s in zip(items, split, strict=True))])
    print(", ".join(f"{name}: {split.count(name)} meshes of {len({f for f, s in zip(family, split, strict=True) if s == name})} families" for name in ("train", "val", "test")))


if __name__ == "__main__":
    main()
