"""Exact searches in a point cloud cut into blocks of near points, compiled for one core.

Whole blocks are skipped by the distance to their boxes, which changes no result: distances are ``(dx² + dy²) + dz²`` in float32, ties go to the
lowest index, as in the plain loops of ``grouping``. Callers have checked sizes, and that all coordinates are finite.
"""

from typing import no_type_check

import numpy as np
from numba import njit

_BLOCK = 32  # points of a block
_RUN = 16  # blocks of a run, which is skipped as one
_FIRST = 4  # blocks that a search for neighbours begins with
# A gap to a box is compared with a margin far above float32 rounding, so that skipping is never wrong by a last digit.
_MARGIN = np.float32(0.9999)


# There are no NaN (callers checked), and the sign of a zero tells nothing: minima and maxima may run in vectors. Products and sums stay as written.
_NO_NAN = {"nnan", "nsz"}


@njit(cache=True, nogil=True, fastmath=_NO_NAN)
@no_type_check  # type checkers would wrap what numba must compile
def cut_into_blocks(points):
    """Blocks of ``points`` float32 [n, 3]: runs of the points along a space-filling curve (G. M. Morton, 1966).

    Returns the coordinates block by block (float32 [3, n]), the points' indices outside (int64 [n]), where each block starts, with n at the end
    (int64 [blocks + 1]), and the lowest and highest coordinates of each block (float32 [3, blocks], twice).
    """
    n = len(points)
    index = _along_curve(points)
    columns = np.empty((3, n), np.float32)
    for i in range(n):
        for axis in range(3):
            columns[axis, i] = points[index[i], axis]
    num_blocks = (n + _BLOCK - 1) // _BLOCK
    starts = np.empty(num_blocks + 1, np.int64)
    lows, highs = np.empty((3, num_blocks), np.float32), np.empty((3, num_blocks), np.float32)
    for block in range(num_blocks):
        starts[block], starts[block + 1] = block * _BLOCK, min(n, (block + 1) * _BLOCK)
        for axis in range(3):
            lows[axis, block], highs[axis, block] = _range(columns[axis, starts[block] : starts[block + 1]])
    return columns, index, starts, lows, highs


@njit(cache=True, nogil=True, fastmath=_NO_NAN)
@no_type_check
def _along_curve(points):
    """Indices of the points by the interleaved bits of their cells, 1,024 along the longest axis; int64 [n]."""
    n = len(points)
    low, longest = np.empty(3, np.float32), np.float32(0.0)
    for axis in range(3):
        low[axis], high = _range(points[:, axis])
        longest = max(longest, high - low[axis])
    scale = np.float32(1023.0) / longest if longest > 0 else np.float32(0.0)
    codes = np.empty(n, np.uint32)
    for i in range(n):
        code = np.uint32(0)
        for axis in range(3):
            cell = np.uint32((points[i, axis] - low[axis]) * scale)
            # Ten bits spread to every third place.
            cell = (cell | (cell << np.uint32(16))) & np.uint32(0x030000FF)
            cell = (cell | (cell << np.uint32(8))) & np.uint32(0x0300F00F)
            cell = (cell | (cell << np.uint32(4))) & np.uint32(0x030C30C3)
            cell = (cell | (cell << np.uint32(2))) & np.uint32(0x09249249)
            code |= cell << np.uint32(axis)
        codes[i] = code
    order, target = np.arange(n), np.empty(n, np.int64)
    for shift in (0, 10, 20):  # radix sort
        place = np.zeros(1025, np.int64)
        for i in range(n):
            place[((codes[i] >> np.uint32(shift)) & np.uint32(1023)) + 1] += 1
        for digit in range(1024):
            place[digit + 1] += place[digit]
        for i in range(n):
            digit = (codes[order[i]] >> np.uint32(shift)) & np.uint32(1023)
            target[place[digit]] = order[i]
            place[digit] += 1
        order, target = target, order
    return order


@njit(cache=True, nogil=True, fastmath=_NO_NAN)
@no_type_check
def _range(values):
    low, high = values[0], values[0]
    for value in values:
        low, high = min(low, value), max(high, value)
    return low, high


@njit(cache=True, nogil=True, fastmath=_NO_NAN)
@no_type_check
def _gaps(lows, highs, x, y, z, gaps):
    """Squared distance of a place to each block's box."""
    zero = np.float32(0.0)
    for block in range(len(gaps)):
        gap_x = max(max(lows[0, block] - x, x - highs[0, block]), zero)
        gap_y = max(max(lows[1, block] - y, y - highs[1, block]), zero)
        gap_z = max(max(lows[2, block] - z, z - highs[2, block]), zero)
        gaps[block] = (gap_x * gap_x + gap_y * gap_y + gap_z * gap_z) * _MARGIN


@njit(cache=True, nogil=True, fastmath=_NO_NAN)
@no_type_check
def _lower(columns, start, end, x, y, z, distances):
    """Lower the distances of a block's points to that of a place, where it is nearer; returns the largest that is left."""
    # Slices: of an index that starts at 0 the compiler knows that it is not negative, and the loop runs in vectors.
    of_block, xs, ys, zs = distances[start:end], columns[0, start:end], columns[1, start:end], columns[2, start:end]
    largest = np.float32(-np.inf)
    for i in range(len(of_block)):
        dx, dy, dz = xs[i] - x, ys[i] - y, zs[i] - z
        distance = min(of_block[i], dx * dx + dy * dy + dz * dz)
        of_block[i] = distance
        largest = max(largest, distance)
    return largest


@njit(cache=True, nogil=True)
@no_type_check
def farthest_in_blocks(columns, index, starts, lows, highs, first, distances, once, order):
    """Farthest points, written to ``order`` as indices outside.

    Args:
        columns, index, starts, lows, highs: from :func:`cut_into_blocks`.
        first: position in ``index`` of the first point.
        distances: float32 [n], scratch: inf, or -1 for points that may not be chosen after the first.
        once: never choose a point twice, not even where only twins of chosen points are left.
    """
    num_blocks = len(starts) - 1
    num_runs = (num_blocks + _RUN - 1) // _RUN
    run_lows, run_highs = np.empty((3, num_runs), np.float32), np.empty((3, num_runs), np.float32)
    for run in range(num_runs):
        for axis in range(3):
            run_lows[axis, run] = lows[axis, run * _RUN : (run + 1) * _RUN].min()
            run_highs[axis, run] = highs[axis, run * _RUN : (run + 1) * _RUN].max()
    # A block, and a run of blocks, keeps the largest distance of its points to those chosen. Where the new point is farther from the box than
    # that, no distance in it can change, and it is skipped.
    farthest = np.full(num_blocks, np.float32(np.inf))
    run_farthest = np.full(num_runs, np.float32(np.inf))
    gaps, run_gaps = np.empty(_RUN, np.float32), np.empty(num_runs, np.float32)
    newest = first
    order[0] = index[first]
    if once:
        distances[first] = np.float32(-1.0)
    for rank in range(1, len(order)):
        x, y, z = columns[0, newest], columns[1, newest], columns[2, newest]
        _gaps(run_lows, run_highs, x, y, z, run_gaps)
        largest = np.float32(-np.inf)
        for run in range(num_runs):
            if run_gaps[run] <= run_farthest[run]:
                begin, end = run * _RUN, min(num_blocks, (run + 1) * _RUN)
                _gaps(lows[:, begin:end], highs[:, begin:end], x, y, z, gaps[: end - begin])
                of_run = np.float32(-np.inf)
                for block in range(begin, end):
                    if gaps[block - begin] <= farthest[block]:
                        farthest[block] = _lower(columns, starts[block], starts[block + 1], x, y, z, distances)
                    of_run = max(of_run, farthest[block])
                run_farthest[run] = of_run
            largest = max(largest, run_farthest[run])
        newest = -1
        for run in range(num_runs):
            if run_farthest[run] == largest:
                for block in range(run * _RUN, min(num_blocks, (run + 1) * _RUN)):
                    if farthest[block] == largest:
                        for i in range(starts[block], starts[block + 1]):
                            if distances[i] == largest and (newest < 0 or index[i] < index[newest]):
                                newest = i
        order[rank] = index[newest]
        if once:
            distances[newest] = np.float32(-1.0)
            # The block is visited next, for its gap is 0, unless it holds nothing that may be chosen.
            block = newest // _BLOCK
            farthest[block] = np.float32(np.inf)
            run_farthest[block // _RUN] = np.float32(np.inf)


@njit(cache=True, nogil=True, fastmath=_NO_NAN)
@no_type_check
def _distances(columns, start, end, x, y, z, distances):
    for i in range(end - start):
        dx, dy, dz = x - columns[0, start + i], y - columns[1, start + i], z - columns[2, start + i]
        distances[i] = dx * dx + dy * dy + dz * dz


@njit(cache=True, nogil=True)
@no_type_check
def _insert(index, start, end, bits, keys, held):
    """Put a block's points in their places among the nearest so far, of which there are ``held``; returns how many there are then."""
    wanted = len(keys)
    for i in range(end - start):
        # The bits of a float that is not negative order as integers do; the index below them decides between equal distances.
        key = (np.int64(bits[i]) << 32) | index[start + i]
        if held < wanted:
            slot = held
            held += 1
        elif key < keys[wanted - 1]:
            slot = wanted - 1
        else:
            continue
        while slot > 0 and keys[slot - 1] > key:
            keys[slot] = keys[slot - 1]
            slot -= 1
        keys[slot] = key
    return held


@njit(cache=True, nogil=True)
@no_type_check
def nearest_in_blocks(columns, index, starts, lows, highs, queries, found):
    """The nearest points of each query, nearest first, written to ``found`` int64 [queries, neighbours] as indices outside (below 2^31)."""
    num_blocks, wanted = len(starts) - 1, found.shape[1]
    gaps = np.empty(num_blocks, np.float32)
    gap_bits = gaps.view(np.int32)
    distances = np.empty(_BLOCK, np.float32)
    bits = distances.view(np.int32)
    for q in range(len(queries)):
        x, y, z = queries[q, 0], queries[q, 1], queries[q, 2]
        keys = found[q]
        _gaps(lows, highs, x, y, z, gaps)
        # The blocks nearest by their boxes give a bound, which leaves few of the others.
        held, visited = 0, 0
        while visited < num_blocks and (held < wanted or visited < _FIRST):
            block = np.argmin(gaps)
            _distances(columns, starts[block], starts[block + 1], x, y, z, distances)
            held = _insert(index, starts[block], starts[block + 1], bits, keys, held)
            gaps[block] = np.inf
            visited += 1
        for block in range(num_blocks):
            if np.int64(gap_bits[block]) <= keys[wanted - 1] >> 32:
                _distances(columns, starts[block], starts[block + 1], x, y, z, distances)
                held = _insert(index, starts[block], starts[block + 1], bits, keys, held)
        for k in range(wanted):
            keys[k] &= 0xFFFFFFFF
