"""Columns that grow piece by piece and may become large: in memory while they are small, else in a temporary file."""

import mmap
import tempfile
from collections.abc import Mapping

import numpy as np

_IN_MEMORY_BYTES = 1 << 24
"""Of a column; a larger one goes to a file in the folder for temporary files."""
_COPIED_BYTES = 1 << 22


class GrowingColumns:
    """Columns of one length or several, each made of pieces along its first axis.

    Where later axes differ (the number of views), shorter pieces are padded with zeros at the end, as `rayjobs.streams.concatenated` does.
    """

    def __init__(self) -> None:
        self._columns: dict[str, _GrowingColumn] = {}

    def append(self, piece: Mapping[str, np.ndarray]) -> None:
        """Add some rows. Raises OSError when the disk is full."""
        for name, array in piece.items():
            if name not in self._columns:
                self._columns[name] = _GrowingColumn(array)
            self._columns[name].append(array)

    def arrays(self) -> dict[str, np.ndarray]:
        """The columns whole, once. Large ones are mapped files, gone when their last view is (`cad_models.common.mapped`); nobody writes to them."""
        found = {name: column.array() for name, column in self._columns.items()}
        self._columns = {}
        return found


class _GrowingColumn:
    def __init__(self, like: np.ndarray) -> None:
        self._dtype, self._trailing, self._num_rows = like.dtype, like.shape[1:], 0
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES)

    def append(self, piece: np.ndarray) -> None:
        widest = tuple(map(max, self._trailing, piece.shape[1:]))
        if widest != self._trailing:
            self._widen(widest)
        self._file.write(padded(piece.astype(self._dtype, copy=False), self._trailing).tobytes())
        self._num_rows += len(piece)

    def array(self) -> np.ndarray:
        shape = (self._num_rows, *self._trailing)
        self._file.seek(0)
        with self._file:
            if self._num_bytes <= _IN_MEMORY_BYTES:
                return np.frombuffer(bytearray(self._file.read()), dtype=self._dtype).reshape(shape)
            self._file.flush()
            # Writable for who asks (torch warns of arrays that are not), without a way into the file.
            return np.frombuffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=self._dtype).reshape(shape)

    @property
    def _num_bytes(self) -> int:
        return self._num_rows * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return int(np.prod(self._trailing, dtype=np.int64)) * self._dtype.itemsize

    def _widen(self, trailing: tuple[int, ...]) -> None:
        narrow, rows = self._file, max(1, _COPIED_BYTES // max(1, self._row_bytes))
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES)
        narrow.seek(0)
        with narrow:
            for start in range(0, self._num_rows, rows):
                count = min(rows, self._num_rows - start)
                block = np.frombuffer(narrow.read(count * self._row_bytes), dtype=self._dtype).reshape(count, *self._trailing)
                self._file.write(padded(block, trailing).tobytes())
        self._trailing = trailing


def padded(piece: np.ndarray, trailing: tuple[int, ...]) -> np.ndarray:
    """The array with zeros behind what it has, so that the axes after the first are of the sizes ``trailing``."""
    if piece.shape[1:] == trailing:
        return piece
    return np.pad(piece, [(0, 0)] + [(0, wide - short) for wide, short in zip(trailing, piece.shape[1:], strict=True)])
