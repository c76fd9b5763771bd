"""Memory that the C library keeps after it was freed."""

import ctypes
import functools
import time
from collections.abc import Callable

_BETWEEN_S = 1.0

# Of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEPT_BYTES = 128 << 20
_LARGEST_ON_HEAP = 32 << 20  # glibc takes no greater one


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``; None where the C library has none (musl, macOS)."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return None


def release_freed_memory() -> None:
    """Give back to the system what this process has freed.

    glibc keeps up to 64 MB at the heap's end and any freed block below one that is still held: a long evaluation, which keeps a little of each
    batch, so keeps the place of all its temporary arrays as well (`malloc_trim(3) <https://man7.org/linux/man-pages/man3/malloc_trim.3.html>`__).
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process use again what it frees: arrays up to 32 MB, and up to 128 MB in all, before any of it goes back to the system.

    Without it each array of a batch is new pages, which the system clears before it hands them out: with batches of megabytes a good part
    of the time of a copy. Threads share two heaps, as workers are told to by MALLOC_ARENA_MAX. Once is enough; False where the C library has no such settings
    (musl, macOS).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return all(mallopt(name, value) for name, value in ((_M_MMAP_THRESHOLD, _LARGEST_ON_HEAP), (_M_TRIM_THRESHOLD, _KEPT_BYTES), (_M_ARENA_MAX, 2)))


class RegularRelease:
    """`release_freed_memory`, when called often, at most once a second: pages that are given back and needed again cost time."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._last > _BETWEEN_S:
            release_freed_memory()
            self._last = time.monotonic()
