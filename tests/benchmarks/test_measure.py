"""The core of the benchmarks: ratios, verdicts, the table, the command line."""

import json
import math
import socket
import subprocess
import sys
import time

import pytest

from benchmarks.measure import Comparison, compared, seconds_in_turn, table, times_better
from tests.shared import REPOSITORY


def test_times_better_is_the_median_of_the_ratios_of_each_round():
    # The machine was ten times slower in the second round: no ratio of medians would show 2, 3, 4.
    ratio, low, high = times_better([1.0, 10.0, 1.0], [2.0, 30.0, 4.0])
    assert (ratio, low, high) == (3.0, 2.5, 3.5)


def test_rivals_run_in_turn_and_turned_around():
    calls = []
    seconds = seconds_in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b"]  # the first two only warm up
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3}


def test_seconds_by_the_wall_clock_count_waiting_and_by_the_processor_do_not():
    wall = seconds_in_turn({"nap": lambda: time.sleep(0.05)}, rounds=1, clock="wall")["nap"][0]
    cpu = seconds_in_turn({"nap": lambda: time.sleep(0.05)}, rounds=1, clock="cpu")["nap"][0]
    assert wall >= 0.05 > 0.03 > cpu


@pytest.mark.parametrize(("aim", "verdict"), [(1.5, "holds"), (2.0, "holds"), (2.1, "misses")])
def test_verdict_compares_the_ratio_with_the_aim(aim, verdict):
    found = compared(4, "this", "that", [1.0, 1.0, 1.0], [2.0, 2.0, 2.0], at_least=aim)
    assert found.verdict == verdict
    assert (found.ours, found.theirs, found.ratio) == (1000.0, 2000.0, 2.0)
    assert verdict in table([found])


def test_things_a_second_are_told_where_calls_do_several():
    found = compared(3, "meshes", "that", [2.0], [4.0], per_call=10, unit="meshes/s")
    assert (found.ours, found.theirs, found.ratio, found.verdict) == (5.0, 2.5, 2.0, "")


def test_verdict_of_a_bound_and_of_what_was_not_measured():
    assert Comparison(row=9, what="help", against="", unit="s", ours=0.9, at_most=1.0).verdict == "holds"
    assert Comparison(row=9, what="help", against="", unit="s", ours=1.1, at_most=1.0).verdict == "misses"
    assert Comparison(row=6, what="loss", against="naive", unit="ms", ours=math.nan, at_least=2.0).verdict == ""


@pytest.mark.parametrize(("rows", "said"), [("6,x", "give row numbers with commas"), ("99", "no row 99: there are 1, 2")])
def test_wrong_rows_are_refused_with_those_there_are(rows, said):
    run = subprocess.run([sys.executable, "-m", "benchmarks", "--only", rows], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and said in run.stderr


def test_results_name_no_place_or_host():
    for path in (REPOSITORY / "benchmarks" / "results").glob("*.json"):
        found = json.loads(path.read_text())
        assert found["comparisons"]
        for value in map(str, found["machine"].values()):
            assert "/" not in value and value != socket.gethostname()
