"""A prepared dataset's histograms as JSON files with the source system's keys, and its table of classes.

    python -m cad_models.histograms.export_json --dataset ds/ --out histograms/       # histograms/<id>.json, histograms/classes.tsv

The folder is itself a source for ``prepare.py``.
"""

import argparse
from pathlib import Path

import numpy as np

from cad_models.dataset import DatasetError, DatasetFolder, to_numpy
from cad_models.histograms.features import given_histograms
from cad_models.histograms.published import write_json


def export(dataset: DatasetFolder, out: Path) -> int:
    """Write every object's histograms (float32 values, as stored) and ``classes.tsv``; returns the number of objects.

    Raises:
        DatasetError: no finished dataset, or one of another task.
    """
    manifest = dataset.manifest()
    if manifest.task != "histograms":
        raise DatasetError(f"--dataset {dataset.uri} was prepared for --task {manifest.task}: only datasets of --task histograms hold histograms")
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(len(manifest.parts)):
        table = dataset.read_part("objects", index, ["object_id", "label", "histograms"])
        stored = to_numpy(table, "histograms")
        for object_id, label, values in zip(table.column("object_id").to_pylist(), table.column("label").to_pylist(), stored, strict=True):
            # Ids of files with equal names hold their folders: a separator is no part of a file's name.
            name = object_id.replace("/", "_")
            (out / f"{name}.json").write_bytes(write_json(name, given_histograms(np.asarray(values))))
            lines.append(f"{name}\t{label}\n")
    (out / "classes.tsv").write_text("".join(sorted(lines)))
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        count = export(DatasetFolder(arguments.dataset), arguments.out)
    except DatasetError as error:
        parser.error(str(error))
    print(f"{count:,} shapes in {arguments.out}")


if __name__ == "__main__":
    main()
