"""Reading a rectangle of a TIFF page by decoding only the strips or tiles that it touches.

Uncompressed contiguous data is read straight from the file. A small cache keeps the last decoded pieces, so that
reading a page in bands does not decode a page-sized strip once per band.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
from tifffile import TiffFile, TiffPageSeries

from affmae_engine.data.readers.source import Refused

_CACHE_BYTES = 48 << 20
_JPEG_FAMILY = (6, 7, 34892, 33007)

Range = tuple[int, int]


def largest_segment(page: Any) -> int:
    """Bytes of the largest strip or tile of a page once decoded; 0 when its data is contiguous and needs no decoding.

    An `IFD` may declare any number of rows per strip; the image's own length bounds it.
    """
    if page.is_final:
        return 0
    samples = page.samplesperpixel if page.planarconfig == 1 else 1
    if page.is_tiled:
        pixels = page.tilelength * page.tilewidth * page.tiledepth
    else:
        pixels = min(page.rowsperstrip, page.imagelength) * page.imagewidth
    return int(pixels * samples * np.dtype(page.dtype).itemsize)


class PageReader:
    """Random access to the pages of one series. Not thread-safe; `Source.read` serialises."""

    def __init__(self, file: TiffFile, series: TiffPageSeries) -> None:
        self._series = series
        self._key = series.keyframe
        self._file = file.filehandle
        self._dtype = np.dtype(self._key.dtype).newbyteorder(file.byteorder)
        self.dtype = self._dtype.newbyteorder("=")
        self.samples = int(self._key.shaped[0] * self._key.shaped[4])
        self._cache: OrderedDict[tuple[int, int], np.ndarray | None] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, page: int, depth: int, y: Range, x: Range, samples: tuple[int, ...]) -> np.ndarray:
        """Raw values [Y, X, len(samples)] of one plane of one page."""
        offset = self._plain_offset(page)
        read = self._read_plain if offset is not None else self._read_segments
        where = offset if offset is not None else page
        planes, _, _, _, contiguous = self._key.shaped
        if planes > 1:
            parts = [read(where, s, depth, y, x)[..., 0] for s in samples]
            return np.stack(parts, axis=-1)
        block = read(where, 0, depth, y, x)
        return block if contiguous == len(samples) else block[..., list(samples)]

    def _plain_offset(self, page: int) -> int | None:
        """Where the page's pixels start in the file, if they are stored exactly as they are in memory."""
        start = self._series.dataoffset
        if start is not None:
            return int(start) + page * int(self._key.nbytes)
        one = self._series.pages[page]
        return int(one.dataoffsets[0]) if self._key.is_final else None

    def _read_plain(self, offset: int, plane: int, depth: int, y: Range, x: Range) -> np.ndarray:
        _, depths, length, width, contiguous = self._key.shaped
        row = width * contiguous * self._dtype.itemsize
        first = offset + ((plane * depths + depth) * length + y[0]) * row
        wanted = (y[1] - y[0]) * row
        self._file.seek(first)
        data = self._file.read(wanted)
        if len(data) != wanted:
            raise Refused(f"it ended {wanted - len(data)} bytes early", "the file was cut short or changed")
        return np.frombuffer(data, self._dtype).reshape(y[1] - y[0], width, contiguous)[:, x[0] : x[1]]

    def _read_segments(self, page: int, plane: int, depth: int, y: Range, x: Range) -> np.ndarray:
        key = self._key
        _, depths, length, width, contiguous = key.shaped
        block = np.full((y[1] - y[0], x[1] - x[0], contiguous), key.nodata, self._dtype.newbyteorder("="))
        if key.is_tiled:
            deep, rows, columns = key.tiledepth, key.tilelength, key.tilewidth
        else:
            deep, rows, columns = 1, key.rowsperstrip, width
        rows = min(rows, 1 << 31)
        down, across = math.ceil(length / rows), math.ceil(width / columns)
        layer = plane * math.ceil(depths / deep) + depth // deep
        for i in range(y[0] // rows, math.ceil(y[1] / rows)):
            for j in range(x[0] // columns, math.ceil(x[1] / columns)):
                piece = self._segment(page, (layer * down + i) * across + j)
                if piece is not None:
                    _paste(block, piece[depth % deep], (i * rows - y[0], j * columns - x[0]))
        return block

    def _segment(self, page: int, index: int) -> np.ndarray | None:
        """One decoded strip or tile [depth, length, width, samples]; None where the file leaves it out (sparse)."""
        found = self._cache.get((page, index), False)
        if found is not False:
            self._cache.move_to_end((page, index))
            return found  # type: ignore[return-value]
        one = self._series.pages[page]
        count = int(one.databytecounts[index])
        data = None
        if count:
            self._file.seek(int(one.dataoffsets[index]))
            data = self._file.read(count)
            if len(data) != count:
                raise Refused(f"page {page} ended {count - len(data)} bytes early", "the file was cut short or changed")
        options: dict[str, Any] = {"_fullsize": False}
        if self._key.compression in _JPEG_FAMILY:
            options |= {"jpegtables": one.jpegtables, "jpegheader": self._key.jpegheader}
        piece = self._key.decode(data, index, **options)[0] if data is not None else None
        if piece is not None and piece.shape[1] * piece.shape[2] > self._piece_pixels():
            raise Refused(f"a piece of it is a picture of {piece.shape[2]} x {piece.shape[1]} pixels")
        self._remember((page, index), piece)
        return piece

    def _piece_pixels(self) -> int:
        key = self._key
        if key.is_tiled:
            return int(key.tilewidth * key.tilelength)
        return int(key.imagewidth * min(key.rowsperstrip, key.imagelength))

    def _remember(self, key: tuple[int, int], piece: np.ndarray | None) -> None:
        self._cache[key] = piece
        held = sum(p.nbytes for p in self._cache.values() if p is not None)
        while held > _CACHE_BYTES and len(self._cache) > 1:
            _, dropped = self._cache.popitem(last=False)
            held -= dropped.nbytes if dropped is not None else 0


def _paste(block: np.ndarray, piece: np.ndarray, corner: tuple[int, int]) -> None:
    """Copy the part of `piece` [l, w, S] that overlaps `block` [Y, X, S], its top left at `corner` (may be outside)."""
    (top, left), (height, width) = corner, block.shape[:2]
    y0, y1 = max(top, 0), min(top + piece.shape[0], height)
    x0, x1 = max(left, 0), min(left + piece.shape[1], width)
    if y0 < y1 and x0 < x1:
        block[y0:y1, x0:x1] = piece[y0 - top : y1 - top, x0 - left : x1 - left]
