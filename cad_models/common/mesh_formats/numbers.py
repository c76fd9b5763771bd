"""Numbers in text, scanned by compiled code.

Digits are collected in an integer and scaled by one power of ten, which is exact while the integer is below 2^53 and the power is at most
10^22 (W. D. Clinger, "How to read floating point numbers accurately", PLDI 1990). The few longer numbers are marked, and Python reads them
afterwards, so every value is the correctly rounded one.
"""

import re
from typing import no_type_check

import numpy as np
from numba import njit

EXACT, LONG, BAD = 0, 1, 2  # what scan_number found
_POWERS = 10.0 ** np.arange(23)
_NUMBER = re.compile(rb"[-+]?[0-9]*\.?[0-9]*(?:[eE][-+]?[0-9]+)?")


@njit(cache=True)
@no_type_check  # type checkers would wrap what numba must compile
def skip_token(text, position, stop):
    """The position behind the token at ``position``."""
    while position < stop and text[position] > 32:
        position += 1
    return position


@njit(cache=True)
@no_type_check  # type checkers would wrap what numba must compile
def scan_number(text, position, stop):
    """Reads one number at ``position``; ``#`` ends it (a comment), except in ``1.#INF``. NaN and infinities in any spelling give NaN.

    Returns:
        (value, position behind it, EXACT | LONG | BAD); a LONG value is close, and must be read again.
    """
    i = position
    negative = False
    if i < stop and (text[i] == 45 or text[i] == 43):
        negative = text[i] == 45
        i += 1
    if i < stop and (text[i] == 110 or text[i] == 78 or text[i] == 105 or text[i] == 73):  # nan, inf
        return np.nan, skip_token(text, i, stop), EXACT
    mantissa = 0
    num_digits = 0
    exponent = 0
    lost = False
    seen = False
    fraction = False
    while i < stop:
        c = text[i]
        if 48 <= c <= 57:
            seen = True
            if num_digits < 18:
                mantissa = mantissa * 10 + (c - 48)
                if mantissa > 0:
                    num_digits += 1
                if fraction:
                    exponent -= 1
            else:
                lost = True
                if not fraction:
                    exponent += 1
        elif c == 46 and not fraction:
            fraction = True
        else:
            break
        i += 1
    if not seen:
        return 0.0, position, BAD
    if fraction and i < stop and text[i] == 35 and text[i - 1] == 46 and i + 1 < stop and text[i + 1] > 64:
        return np.nan, skip_token(text, i, stop), EXACT  # 1.#INF, -1.#IND: printed by old C libraries on Windows
    if i < stop and (text[i] == 101 or text[i] == 69):
        i += 1
        sign = 1
        if i < stop and (text[i] == 45 or text[i] == 43):
            sign = -1 if text[i] == 45 else 1
            i += 1
        power = 0
        if i >= stop or text[i] < 48 or text[i] > 57:
            return 0.0, position, BAD
        while i < stop and 48 <= text[i] <= 57:
            if power < 100000:
                power = power * 10 + (text[i] - 48)
            i += 1
        exponent += sign * power
    if i < stop and text[i] > 32 and text[i] != 35:
        return 0.0, position, BAD
    value = float(mantissa)
    exact = not lost and mantissa < 9007199254740992 and -22 <= exponent <= 22
    if exact:
        value = value * _POWERS[exponent] if exponent >= 0 else value / _POWERS[-exponent]
    elif mantissa == 0 and not lost:
        exact = True
    return -value if negative else value, i, EXACT if exact else LONG


@njit(cache=True)
@no_type_check  # type checkers would wrap what numba must compile
def scan_integer(text, position, stop):
    """Reads one integer of at most 18 digits at ``position``, whatever follows it.

    Returns:
        (value, position behind it, EXACT | BAD)
    """
    i = position
    negative = False
    if i < stop and (text[i] == 45 or text[i] == 43):
        negative = text[i] == 45
        i += 1
    first = i
    value = 0
    while i < stop and 48 <= text[i] <= 57 and i - first < 18:
        value = value * 10 + (text[i] - 48)
        i += 1
    if i == first:
        return 0, position, BAD
    return -value if negative else value, i, EXACT


@njit(cache=True)
@no_type_check  # type checkers would wrap what numba must compile
def _scan_numbers(text, values, long_at, begins_line):
    position, stop, count = 0, len(text), 0
    new_line = True
    while True:
        while position < stop and text[position] <= 32:
            if text[position] == 10 or text[position] == 13:
                new_line = True
            position += 1
        if position >= stop or count == len(values):
            return count, position
        value, after, status = scan_number(text, position, stop)
        if status == BAD:
            return count, position
        values[count] = value
        long_at[count] = position if status == LONG else -1
        begins_line[count] = new_line
        new_line = False
        count += 1
        position = after


def reread_long(text: bytes, values: np.ndarray, long_at: np.ndarray) -> None:
    """Replaces in place the values whose digits did not fit (``long_at`` >= 0 is their position) by what Python reads there."""
    for index in np.flatnonzero(long_at >= 0):
        values[index] = float(_NUMBER.match(text, int(long_at[index])).group())


def numbers_of(text: bytes) -> tuple[np.ndarray, np.ndarray, int]:
    """All numbers at the start of ``text``, separated by white space.

    Returns:
        (float64 [n], bool [n]: the first number on its line, position of the first token that is no number, or the length of the text)
    """
    capacity = len(text) // 2 + 1  # a digit and a blank each
    values = np.empty(capacity)
    long_at = np.empty(capacity, np.int64)
    begins_line = np.empty(capacity, np.bool_)
    count, position = _scan_numbers(np.frombuffer(text, np.uint8), values, long_at, begins_line)
    reread_long(text, values, long_at[:count])
    return values[:count], begins_line[:count], position
