import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from cad_models.common.isolation import Isolated, Lost
from cad_models.common.meshes import BadMesh
from tests.common import isolation_targets as targets

MIB = 1 << 20


def isolated(function, *, timeout_s=20.0, memory_mib=512):
    return Isolated(function, timeout_s=timeout_s, memory_limit_bytes=memory_mib * MIB)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pid, seconds=10.0):
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def test_isolated_values_return_from_one_child_that_is_kept():
    with isolated("tests.common.isolation_targets:add") as add:
        assert add(2, 3) == 5
        array = np.arange(1_000_000.0)
        np.testing.assert_array_equal(add(array, 1), array + 1)
    with isolated(targets.process_id) as process_id:
        first = process_id()
        assert first != os.getpid()
        assert process_id() == first
    assert wait_until_gone(first)


def test_isolated_exception_is_raised_as_it_is_and_the_child_survives():
    with isolated(targets.raise_bad_mesh) as fails:
        for _ in range(2):
            with pytest.raises(BadMesh) as caught:
                fails()
            assert (caught.value.reason, caught.value.detail) == ("truncated", "cut off at byte 7")
            pid = fails._process.pid
        assert alive(pid)


@pytest.mark.parametrize("function", [targets.raise_what_cannot_be_sent, targets.return_what_cannot_be_sent])
def test_isolated_unpicklable_outcome_is_an_error_not_a_loss(function):
    with isolated(function) as call, pytest.raises(RuntimeError, match="cannot be sent"):
        call()


@pytest.mark.parametrize("function, args", [(targets.loop_forever, ()), (targets.sleep_holding_the_interpreter_lock, (60,))])
def test_isolated_endless_call_is_lost_in_time_and_the_child_is_gone(function, args):
    with isolated(function, timeout_s=0.5) as call:
        call._start()
        pid = call._process.pid
        begin = time.monotonic()
        with pytest.raises(Lost) as lost:
            call(*args)
        assert lost.value.reason == "timeout"
        assert time.monotonic() - begin < 3
        assert wait_until_gone(pid)


def test_isolated_allocation_bomb_is_lost_and_the_next_call_works():
    with isolated(targets.allocate, memory_mib=200) as allocate:
        assert allocate(20 * MIB) == 20 * MIB
        for _ in range(2):
            with pytest.raises(Lost) as lost:
                allocate(4096 * MIB)
            assert lost.value.reason == "out_of_memory"
        assert allocate(100 * MIB) == 100 * MIB


def test_isolated_result_beyond_the_limit_is_lost():
    with isolated(targets.large_result, memory_mib=100) as call:
        with pytest.raises(Lost) as lost:
            call(80 * MIB)  # fits once, not a second time as the message
        assert lost.value.reason == "out_of_memory"
        assert len(call(20 * MIB)) == 20 * MIB


@pytest.mark.parametrize(
    "function, args, words", [(targets.segfault, (), "SIGSEGV"), (targets.exit_without_a_word, (0,), "exit status 0")]
)
def test_isolated_crash_is_lost_with_its_cause_and_the_next_child_starts(function, args, words):
    with isolated(function) as call:
        for _ in range(2):
            with pytest.raises(Lost, match=words) as lost:
                call(*args)
            assert lost.value.reason == "crashed"


def test_isolated_child_killed_between_calls_is_replaced_silently():
    with isolated(targets.process_id) as process_id:
        first = process_id()
        os.kill(first, signal.SIGKILL)
        process_id._process.wait()
        assert process_id() != first


@pytest.mark.parametrize("busy", ["idle", "loop_forever", "sleep_holding_the_interpreter_lock"])
def test_isolated_child_ends_when_its_parent_is_killed(busy):
    code = f"""
import sys, threading, time
sys.path[:0] = {sys.path!r}
from cad_models.common.isolation import Isolated
call = Isolated("tests.common.isolation_targets:{"add" if busy == "idle" else busy}", timeout_s=60, memory_limit_bytes=1 << 29)
call._start()
if {busy!r} != "idle":
    threading.Thread(target=call, args={"(60,)" if busy.startswith("sleep") else "()"}, daemon=True).start()
    time.sleep(0.5)
print(call._process.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until_gone(child)


def test_isolated_call_overhead_is_below_a_millisecond():
    with isolated(targets.add) as add:
        add(1, 2)
        times = []
        for _ in range(300):
            begin = time.perf_counter()
            add(1, 2)
            times.append(time.perf_counter() - begin)
    assert np.median(times) < 1e-3


@pytest.mark.parametrize("function", [lambda: 1, "__main__:run", "no.such.module:run", "tests.common.isolation_targets:nothing", "add"])
def test_isolated_function_that_cannot_be_imported_is_refused(function):
    with pytest.raises(ValueError, match="import|module"):
        isolated(function)


def test_isolated_mesh_loading_fits_into_half_a_gibibyte(tmp_path):
    """Compilers and libraries that the child imports late count, so the limit must leave them room."""
    (tmp_path / "quad.off").write_text("OFF\n4 1 0\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n4 0 1 2 3\n")
    with isolated(targets.load, timeout_s=120) as load:
        assert load(tmp_path / "quad.off").num_faces == 2
