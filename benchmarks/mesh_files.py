"""The benchmarks' CSV files about meshes, and which meshes are the same geometry."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cad_models.common.meshes import BadMesh, geometry_signature, group_duplicates, read_mesh


@dataclass(frozen=True, kw_only=True)
class Named:
    """A row of a CSV of families."""

    family: str
    duplicate_of: Path | None
    """The file that it is an exact copy of, where the column ``dup_of`` says so."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A row of a CSV of pairs."""

    image: Path
    cad: Path
    kind: str


def read_families(file: Path, meshes: Path) -> dict[Path, Named]:
    """Mesh -> its row, of a CSV with the columns path, family and perhaps dup_of; paths relative to the CSV, or to the folder of the meshes.

    Raises:
        ValueError: missing columns, or none of the meshes is there.
    """
    found = {}
    for row in _rows(file, ("path", "family")):
        path = _existing(row["path"], file, meshes)
        if path is not None:
            original = row.get("dup_of") or ""
            found[path] = Named(family=row["family"], duplicate_of=_existing(original, file, meshes) if original else None)
    if not found:
        raise ValueError(f"{file}: none of its paths is a file, neither beside it nor in {meshes}")
    return found


def read_pairs(file: Path) -> list[Pair]:
    """The rows of a CSV with the columns image, cad and perhaps kind; paths relative to the CSV.

    Raises:
        ValueError: missing columns, or a file that is not there.
    """
    pairs = []
    for row in _rows(file, ("image", "cad")):
        files = {name: (file.parent / row[name]).absolute() for name in ("image", "cad")}
        for name, path in files.items():
            if not path.is_file():
                raise ValueError(f"{file}: {name} {row[name]} is no file beside it")
        pairs.append(Pair(**files, kind=row.get("kind") or "pair"))
    return pairs


def duplicate_groups(meshes: Sequence[Path]) -> np.ndarray:
    """Of each mesh the index of the first of the same geometry, int64 [n]; files that are no usable mesh are alone."""
    usable, signatures, faces = [], [], []
    for i, path in enumerate(meshes):
        try:
            mesh = read_mesh(path)
        except BadMesh:
            continue
        usable.append(i)
        signatures.append(geometry_signature(mesh))
        faces.append(len(mesh.faces))  # those with an area, as prepare.py counts: another file may lack the others
    first, places = np.arange(len(meshes)), np.array(usable, dtype=np.int64)
    first[places] = places[group_duplicates(signatures, faces)]
    return first


def _rows(file: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{file} has no column {', '.join(missing)}; it has {', '.join(reader.fieldnames or ['none'])}")
        rows = list(reader)
    if not rows:
        raise ValueError(f"{file} has no rows")
    return rows


def _existing(name: str, file: Path, folder: Path) -> Path | None:
    return next((path.absolute() for path in (file.parent / name, folder / name) if path.is_file()), None)
