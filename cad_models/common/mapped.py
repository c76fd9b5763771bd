"""Arrays that are parts of mapped files."""

import mmap

import numpy as np


def mapped_file(array: np.ndarray) -> mmap.mmap | None:
    """The mapping that ``array`` is a view of; None for arrays in memory."""
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    base = base.obj if isinstance(base, memoryview) else base
    return base if isinstance(base, mmap.mmap) else None


def forget_pages(array: np.ndarray) -> None:
    """Take what was read of a mapped file out of this process's memory; it is read again when it is needed. Nothing happens to arrays in memory.

    For who goes through a large one block by block: else all of it counts as this process's, until the system is short of memory.
    """
    mapped = mapped_file(array)
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)
