"""Memory that was freed goes back to the system."""

import subprocess
import sys

import pytest

from cad_models.common import memory

needs_glibc = pytest.mark.skipif(memory._malloc_trim() is None or not sys.platform.startswith("linux"), reason="the C library has no malloc_trim")


# In a process of its own: one that has run other tests has free places on its heap, which the blocks would fill without growing it.
# Blocks of 64 kB with a small one after each, of which only the small ones are kept, so that the heap cannot shrink by itself.
FRAGMENTED = """
from pathlib import Path
import numpy as np
from cad_models.common import memory

def private_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e3

def fragmented(num_blocks=2_000):
    kept, freed = [], []
    for _ in range(num_blocks):
        freed.append(np.ones(64_000, dtype=np.uint8))
        kept.append(np.ones(2_000, dtype=np.uint8))
    return kept

memory.release_freed_memory()
before = private_mb()
kept = fragmented()
held = private_mb() - before
memory.release_freed_memory()
print(held, private_mb() - before, all((block == 1).all() for block in kept))
"""


@needs_glibc
def test_freed_memory_goes_back_though_some_is_held_above_it():
    output = subprocess.run([sys.executable, "-c", FRAGMENTED], capture_output=True, text=True, check=True, timeout=120).stdout
    held, left, intact = output.split()
    assert float(held) > 100
    assert float(left) < 0.3 * float(held)
    assert intact == "True"


def test_regular_release_is_at_most_once_a_second(monkeypatch):
    times, released = iter([0.0, 0.5, 1.5, 1.5, 2.0, 2.6, 2.6]), []
    monkeypatch.setattr(memory.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(memory, "release_freed_memory", lambda: released.append(True))
    release = memory.RegularRelease()
    counts = []
    for _ in range(4):
        release()
        counts.append(len(released))
    assert counts == [0, 1, 1, 2]


def test_without_malloc_trim_nothing_happens(monkeypatch):
    monkeypatch.setattr(memory, "_malloc_trim", lambda: None)
    memory.release_freed_memory()


# Faults of pages while four arrays of 24 MB are made and dropped, again and again.
REUSED = """
import resource, sys
import numpy as np
from cad_models.common import memory

if sys.argv[1] == "keep":
    assert memory.keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [np.ones(24_000_000, dtype=np.uint8) for _ in range(4)]
    del arrays
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@needs_glibc
def test_kept_memory_is_used_again():
    faults = {
        how: int(subprocess.run([sys.executable, "-c", REUSED, how], check=True, capture_output=True, text=True).stdout) for how in ("plain", "keep")
    }
    assert faults["keep"] < faults["plain"] / 10
