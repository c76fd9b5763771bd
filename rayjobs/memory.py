"""Memory that the C library keeps after it was freed."""

import ctypes
import functools
import time
from collections.abc import Callable

_BETWEEN_S = 1.0


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


class RegularRelease:
    """`release_freed_memory`, when called often, at most once a second: pages that are given back and needed again cost time."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._last > _BETWEEN_S:
            release_freed_memory()
            self._last = time.monotonic()
