"""The source system's files: histograms as JSON, one an object, and tables of objects as TSV or CSV.

JSON: ``uuid, version, id, file, is_part, status, histogram_data, point_data, error_message``; ``histogram_data`` lists 40 entries ``{type, intervals,
data}``, of types such as ``model_bounding_sphere_strict_outer``. An object is named by its *file* (``<id>.json``): the ``uuid`` within was the
service's own in every published file, and no table knows it.

Tables: columns ``uuid, obj_name`` with or without ``hist``, a printed torch tensor over several lines (four decimals: lossy); or ``h0 … h127``; or no
header and two columns, id and object name. Blender's number at the end of a name (``Torus.011``) is cut off.

The published split as a CSV file for ``prepare.py --split.kind csv`` (add ``--split.divide-duplicates`` to take it as it is):

    python -m cad_models.histograms.published --train train.tsv --val valid.tsv --out split.csv
"""

import argparse
import csv
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float

from cad_models.histograms.shape_histograms import BINS, KINDS, PARTS

TABLE_BINS = 32
"""Bins of the four model histograms whose concatenation a table's ``hist`` holds."""
TABLE_WIDTH = len(KINDS) * TABLE_BINS

Histograms = dict[tuple[str, str, int], np.ndarray]
"""(part, kind, bins) -> float64 [bins]."""

_TYPE = "{part}_bounding_sphere_{kind}"
_KEY_OF = {(_TYPE.format(part=part, kind=kind), bins): (part, kind, bins) for part in PARTS for bins in BINS for kind in KINDS}
_NUMBER = re.compile(r"\.\d+$")


class BadHistograms(ValueError):
    """A file that gives no usable histograms; the message says what is wrong with it."""


def read_json(data: bytes) -> Histograms:
    """The histograms of one JSON file; kinds that are not known are left out.

    Raises:
        BadHistograms: no JSON of this form, no finished computation, or a histogram of another length than it says, with numbers that are not
            finite or negative.
    """
    try:
        value = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadHistograms(f"no JSON ({error})") from error
    entries = value.get("histogram_data") if isinstance(value, dict) else None
    if not isinstance(entries, list):
        raise BadHistograms("there is no list histogram_data in it")
    if value.get("status", "COMPLETED") != "COMPLETED":
        raise BadHistograms(f"status is {value['status']!r}, not COMPLETED ({value.get('error_message') or 'no message'})")
    found: Histograms = {}
    for entry in entries:
        if not isinstance(entry, dict) or not {"type", "intervals", "data"} <= entry.keys():
            raise BadHistograms("an entry of histogram_data lacks type, intervals or data")
        key = _KEY_OF.get((entry["type"], entry["intervals"]))
        if key is not None:
            found[key] = _checked(entry["data"], key[2], f"{entry['type']} with {entry['intervals']} intervals")
    if not found:
        raise BadHistograms("histogram_data holds no histogram of a known type")
    return found


def _checked(values: object, length: int, what: str) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise BadHistograms(f"{what}: not numbers ({error})") from error
    if array.shape != (length,):
        raise BadHistograms(f"{what}: {array.size} values instead of {length}")
    if not np.isfinite(array).all() or (array < 0).any():
        raise BadHistograms(f"{what}: holds values that are negative or not finite")
    return array


def write_json(object_id: str, histograms: Histograms) -> bytes:
    """A JSON file with the published keys, in their order; :func:`read_json` gives back the very same numbers."""
    entries = [
        {"type": _TYPE.format(part=part, kind=kind), "intervals": bins, "data": histograms[part, kind, bins].tolist()}
        for part in PARTS
        for bins in BINS
        for kind in KINDS
        if (part, kind, bins) in histograms
    ]
    value = {
        "uuid": object_id,
        "version": "1",
        "id": "",
        "file": f"{object_id}.stl",
        "is_part": False,
        "status": "COMPLETED",
        "histogram_data": entries,
        "point_data": [],
        "error_message": "",
    }
    return json.dumps(value).encode()


def class_of(name: str) -> str:
    """The class of a Blender object name: ``Torus.011`` -> ``Torus``."""
    return _NUMBER.sub("", name.strip())


@dataclass(frozen=True)
class Table:
    """One table of objects.

    Attributes:
        labels: id -> class, in the order of the rows.
        histograms: id -> float64 [128], the four model histograms with 32 bins one after the other, where the table has them.
        bad_rows: (id or row number, what is wrong).
    """

    labels: dict[str, str]
    histograms: dict[str, np.ndarray] = field(default_factory=dict)
    bad_rows: list[tuple[str, str]] = field(default_factory=list)


def read_table(text: str, *, delimiter: str) -> Table | None:
    """A TSV or CSV table of objects; None where it has other columns, and so is none.

    >>> read_table("a1\\tTorus.011\\n", delimiter="\\t").labels
    {'a1': 'Torus'}
    """
    csv.field_size_limit(1 << 24)
    try:
        rows = list(csv.reader(io.StringIO(text.removeprefix("\ufeff")), delimiter=delimiter))
    except csv.Error:
        return None
    rows = [row for row in rows if row]
    if not rows:
        return None
    header = [cell.strip() for cell in rows[0]]
    if {"uuid", "obj_name"} <= set(header):
        id_at, name_at, body = header.index("uuid"), header.index("obj_name"), rows[1:]
    elif len(header) == 2 and all(len(row) == 2 for row in rows):
        id_at, name_at, body = 0, 1, rows
    else:
        return None
    table = Table({})
    for number, row in enumerate(body, start=1):
        if len(row) != len(header) or not row[id_at].strip():
            table.bad_rows.append((f"row {number}", f"has {len(row)} cells instead of {len(header)}, or no id"))
            continue
        object_id = row[id_at].strip()
        if object_id in table.labels:
            table.bad_rows.append((object_id, "stands in the table twice; the first row is used"))
            continue
        table.labels[object_id] = class_of(row[name_at])
        try:
            values = _table_values(dict(zip(header, row, strict=True)))
        except BadHistograms as error:
            table.bad_rows.append((object_id, str(error)))
            continue
        if values is not None:
            table.histograms[object_id] = values
    return table


def _table_values(row: dict[str, str]) -> np.ndarray | None:
    if "hist" in row:
        return parse_tensor(row["hist"], TABLE_WIDTH)
    names = [f"h{i}" for i in range(TABLE_WIDTH)]
    return _checked([row[name] for name in names], TABLE_WIDTH, "columns h0 … h127") if names[0] in row and names[-1] in row else None


def parse_tensor(text: str, length: int) -> Float[np.ndarray, " length"]:
    """A printed one-dimensional torch tensor, over any number of lines.

    >>> parse_tensor("tensor([1.0000e+00, 0.0000e+00,\\n        2.5000e-01])", 3).tolist()
    [1.0, 0.0, 0.25]

    Raises:
        BadHistograms: another form or length; a summarised tensor (``...``) has lost its values.
    """
    body = text.strip()
    if not body.startswith("tensor([") or "])" not in body and "], " not in body:
        raise BadHistograms(f"no printed tensor: {body[:30]!r}")
    body = body[len("tensor([") : body.index("]")]
    if "..." in body:
        raise BadHistograms("the tensor was printed with '...': its values are lost")
    return _checked([cell.strip() for cell in body.split(",")], length, "printed tensor")


def table_histograms(values: Float[np.ndarray, " 128"]) -> Histograms:
    """What a table's 128 numbers are: the model histograms with 32 bins."""
    return {("model", kind, TABLE_BINS): values[i * TABLE_BINS : (i + 1) * TABLE_BINS] for i, kind in enumerate(KINDS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for split in ("train", "val", "test"):
        parser.add_argument(f"--{split}", type=Path, help=f"table of the {split} split")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    lines = ["model_id,split"]
    for split in ("train", "val", "test"):
        path = getattr(arguments, split)
        if path is None:
            continue
        if not path.is_file():
            parser.error(f"--{split} {path}: there is no such file")
        table = read_table(path.read_text(), delimiter="," if path.suffix.lower() == ".csv" else "\t")
        if table is None:
            parser.error(f"--{split} {path} is no table of shapes: it needs the columns uuid, obj_name")
        lines += [f"{object_id},{split}" for object_id in table.labels]
    if len(lines) == 1:
        parser.error("name at least one table: --train, --val or --test")
    arguments.out.write_text("\n".join(lines) + "\n")
    print(f"{len(lines) - 1:,} shapes in {arguments.out}")


if __name__ == "__main__":
    main()
