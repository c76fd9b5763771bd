"""All rows of the table, each in a process of its own with one compute thread; writes results/<date>-<machine>.json and prints the table.

    python -m benchmarks                 everything, at most 30 minutes on 2 cores (`make bench`)
    python -m benchmarks --only 6,7      some rows
    python -m benchmarks --quick         small sizes: does it run?
"""

import argparse
import dataclasses
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Comparison, machine, table

ROWS = {
    1: "train_step",
    2: "dataset_stream",
    3: "prepare_meshes",
    4: "point_groups",
    5: "point_encoder",
    6: "contrastive_loss",
    7: "mixture_of_experts",
    8: "exact_search",
    9: "job_start",
    10: "tuning",
}
_ROW_TIMEOUT_S = 900
_RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Run rows, write the figures, print the table; exit status 1 when a row could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m benchmarks")
    parser.add_argument("--only", type=_rows, default=list(ROWS), metavar="6,7", help="numbers of the rows to run")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds; writes no results")
    parser.add_argument("--out", type=Path, default=_RESULTS, help="folder of the JSON file")
    flags = parser.parse_args()
    described, comparisons, failed, seconds = machine(), [], [], {}
    for row in flags.only:
        print(f"row {row}: {ROWS[row]} ...", file=sys.stderr, flush=True)
        started = time.monotonic()
        found = _run_row(ROWS[row], quick=flags.quick)
        seconds[ROWS[row]] = round(time.monotonic() - started, 1)
        if found is None:
            failed.append(row)
        else:
            comparisons += found
            print(table(found), file=sys.stderr, flush=True)
    print(table(comparisons))
    if not flags.quick and comparisons:
        name = f"{datetime.date.today()}-{_name_of(described)}.json"
        flags.out.mkdir(parents=True, exist_ok=True)
        lines = [{**dataclasses.asdict(c), "verdict": c.verdict} for c in comparisons]
        kept = _other_rows(flags.out / name, {c.row for c in comparisons})
        lines = sorted(kept + lines, key=lambda line: line["row"])
        (flags.out / name).write_text(json.dumps({"machine": described, "seconds": seconds, "comparisons": lines}, indent=1) + "\n")
        print(f"written: {flags.out / name}", file=sys.stderr)
    if failed:
        print(f"not measured: {', '.join(f'row {row} ({ROWS[row]})' for row in failed)}; the reasons are above", file=sys.stderr)
    return 1 if failed else 0


def _rows(text: str) -> list[int]:
    try:
        rows = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give row numbers with commas, as 6,7") from None
    unknown = [row for row in rows if row not in ROWS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no row {', '.join(map(str, unknown))}: there are {', '.join(map(str, ROWS))}")
    return rows


def _run_row(module: str, *, quick: bool) -> list[Comparison] | None:
    # A process each: one row's memory and threads are not the next one's, and a rival that crashes takes only its row along.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch) / "row.json"
        command = [sys.executable, "-m", f"benchmarks.{module}", "--json", str(found), *(["--quick"] if quick else [])]
        try:
            status = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, timeout=_ROW_TIMEOUT_S).returncode
        except subprocess.TimeoutExpired:
            print(f"benchmarks.{module} took longer than {_ROW_TIMEOUT_S} s", file=sys.stderr)
            return None
        if status or not found.exists():
            print(f"benchmarks.{module} ended with status {status}", file=sys.stderr)
            return None
        return [Comparison(**values) for values in json.loads(found.read_text())]


def _other_rows(path: Path, measured: set[int]) -> list[dict]:
    """Rows of the same day and machine that this run did not measure again."""
    if not path.exists():
        return []
    return [line for line in json.loads(path.read_text())["comparisons"] if line["row"] not in measured]


def _name_of(described: dict) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", described["processor"].lower()).strip("-")
    return f"{words}-{described['cores']}-cores"


if __name__ == "__main__":
    sys.exit(main())
