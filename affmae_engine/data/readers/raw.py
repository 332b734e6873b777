"""Arrays that are stored as they are in memory: read with plain file reads.

Not memory-mapped: a mapped file that is cut short, or whose network share goes away, ends the process with SIGBUS.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from affmae_engine.data.readers.source import Refused


class RawArray:
    """A C-ordered array in a file, indexed with one int or slice of step 1 per axis.

    Args:
        path: the file.
        offset: of its first value, in bytes.
        dtype: of its values, with their byte order.
    """

    def __init__(self, path: Path, offset: int, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        self._file = path.open("rb", buffering=0)
        self._offset, self._shape, self._dtype = offset, tuple(shape), dtype

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __getitem__(self, selection: tuple[int | slice, ...]) -> np.ndarray:
        """Raises Refused when the file has become shorter."""
        bounds = [
            s.indices(n) if isinstance(s, slice) else (s, s + 1, 1) for s, n in zip(selection, self._shape, strict=True)
        ]
        lengths = [max(0, stop - start) for start, stop, _ in bounds]
        block = np.empty(lengths, self._dtype.newbyteorder("="))
        # Everything before the last two axes is visited one by one; of these, whole rows are read and cut.
        outer, (rows, columns) = bounds[:-2], bounds[-2:]
        width = self._shape[-1]
        wanted = lengths[-2] * width * self._dtype.itemsize
        for index in itertools.product(*(range(start, stop) for start, stop, _ in outer)) if block.size else ():
            place = 0
            for i, n in zip((*index, rows[0]), self._shape[:-1], strict=True):
                place = place * n + i
            self._file.seek(self._offset + place * width * self._dtype.itemsize)
            plane = np.frombuffer(self._exactly(wanted), self._dtype).reshape(lengths[-2], width)
            block[tuple(i - start for i, (start, _, _) in zip(index, outer, strict=True))] = plane[
                :, columns[0] : columns[1]
            ]
        kept = [n for n, s in zip(lengths, selection, strict=True) if isinstance(s, slice)]
        return block.reshape(kept)

    def _exactly(self, count: int) -> bytearray:
        data = bytearray(count)
        view, done = memoryview(data), 0
        while done < count:
            got = self._file.readinto(view[done:])
            if not got:
                raise Refused(f"it ended {count - done} bytes early", "the file was cut short or changed")
            done += got
        return data


def check_size(path: Path, offset: int, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
    """Refuse a file that is too short for its array."""
    missing = offset + math.prod(shape) * dtype.itemsize - path.stat().st_size
    if missing > 0:
        raise Refused(f"it is cut short: {missing} bytes of its pixels are missing", "copy it again from its origin")
