"""Reading a rectangle of a TIFF page by decoding only the strips or tiles that it touches.

Uncompressed contiguous data is read straight from the file. A small cache keeps the last decoded pieces, so that
reading a page in bands does not decode a page-sized strip once per band. Two kinds that tifffile does not decode:
of YCbCr with subsampled colors the luminance is taken, which is stored at full resolution; old-style JPEG is decoded
by Pillow's libtiff, a page at a time.
"""

from __future__ import annotations

import io
import math
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from tifffile import PHOTOMETRIC, TIFF, TiffFile, TiffPageSeries

from affmae_engine.data.readers.limits import sizes_trusted
from affmae_engine.data.readers.source import Refused

_CACHE_BYTES = 48 << 20
_JPEG_FAMILY = (6, 7, 34892, 33007)
OLD_JPEG = 6
_PICTURES = {
    7: "JPEG", 33007: "JPEG", 34892: "JPEG", 33003: "JPEG2000", 33004: "JPEG2000", 33005: "JPEG2000", 34712: "JPEG2000",
    34933: "PNG", 34927: "WEBP", 50001: "WEBP",
}  # fmt: skip
"""Compressions that are picture formats of their own, which believe the size inside of them."""
_SLACK = 4
"""Times the declared pixels that such a picture may have: some writers pad."""

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


def subsampling(page: Any) -> tuple[int, int]:
    """Pixels (along x, along y) that share their colors, of YCbCr that is not decoded to RGB; else (1, 1)."""
    decoded = page.compression == OLD_JPEG or int(page.compression) in _PICTURES
    if page.photometric != PHOTOMETRIC.YCBCR or decoded or not page.subsampling:
        return 1, 1
    across, down = (int(n) for n in page.subsampling)
    if across not in (1, 2, 4) or down not in (1, 2, 4):
        raise Refused(f"its colors are subsampled by {across} x {down}")
    return across, down


class PageReader:
    """Random access to the pages of one series. Not thread-safe; `Source.read` serialises."""

    def __init__(self, file: TiffFile, series: TiffPageSeries) -> None:
        self._series = series
        self._key = series.keyframe
        self._file = file.filehandle
        self._dtype = np.dtype(self._key.dtype).newbyteorder(file.byteorder)
        self.dtype = self._dtype.newbyteorder("=")
        self._subsampling = subsampling(self._key)
        self._luminance_only = self._subsampling != (1, 1)
        # Pillow numbers the pages that follow each other, and no others.
        self._whole_pages = self._key.compression == OLD_JPEG and len(self._key.treeindex) == 1
        self.samples = 1 if self._luminance_only else int(self._key.shaped[0] * self._key.shaped[4])
        self._cache: OrderedDict[tuple[int, int], np.ndarray | None] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, page: int, depth: int, y: Range, x: Range, samples: tuple[int, ...]) -> np.ndarray:
        """Raw values [Y, X, len(samples)] of one plane of one page."""
        offset = self._plain_offset(page)
        read = self._read_plain if offset is not None else self._read_segments
        where = offset if offset is not None else page
        planes = self._key.shaped[0]
        if planes > 1:
            parts = [read(where, s, depth, y, x)[..., 0] for s in samples]
            return np.stack(parts, axis=-1)
        block = read(where, 0, depth, y, x)
        return block if self.samples == len(samples) else block[..., list(samples)]

    def _plain_offset(self, page: int) -> int | None:
        """Where the page's pixels start in the file, if they are stored exactly as they are in memory."""
        if self._luminance_only:
            return None
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
        planes, depths, length, width, contiguous = key.shaped
        if planes == 1:
            contiguous = self.samples
        block = np.full((y[1] - y[0], x[1] - x[0], contiguous), key.nodata, self._dtype.newbyteorder("="))
        if self._whole_pages:
            deep, rows, columns = 1, length, width
        elif key.is_tiled:
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
        if self._whole_pages:
            whole = self._old_jpeg(page)
            self._remember((page, index), whole)
            return whole
        one = self._series.pages[page]
        count = int(one.databytecounts[index])
        data = None
        if count:
            self._file.seek(int(one.dataoffsets[index]))
            data = self._file.read(count)
            if len(data) != count:
                raise Refused(f"page {page} ended {count - len(data)} bytes early", "the file was cut short or changed")
            self._check_picture(data)
        options: dict[str, Any] = {"_fullsize": False}
        if self._key.compression in _JPEG_FAMILY:
            options |= {"jpegtables": one.jpegtables, "jpegheader": self._key.jpegheader}
        piece: np.ndarray | None = None
        if data is not None and self._luminance_only:
            piece = self._luminance(data, index)
        elif data is not None:
            piece = self._key.decode(data, index, **options)[0]
        self._remember((page, index), piece)
        return piece

    def _luminance(self, data: bytes, index: int) -> np.ndarray:
        """Y of a piece that stores, for each block of pixels, their Y, one Cb and one Cr (TIFF 6.0, section 21)."""
        key, (across, down) = self._key, self._subsampling
        if key.compression != 1:
            data = TIFF.DECOMPRESSORS[key.compression](data)
        if key.is_tiled:
            rows, columns = key.tilelength, key.tilewidth
        else:
            rows, columns = min(key.rowsperstrip, key.imagelength - index * key.rowsperstrip), key.imagewidth
        high, wide = math.ceil(rows / down), math.ceil(columns / across)
        units = np.frombuffer(data, np.uint8)
        wanted = high * wide * (across * down + 2)
        if len(units) < wanted or key.bitspersample != 8:
            raise Refused("a piece of it is cut short", "copy it again from its origin")
        blocks = units[:wanted].reshape(high, wide, -1)[..., : across * down].reshape(high, wide, down, across)
        return blocks.swapaxes(1, 2).reshape(1, high * down, wide * across, 1)[:, :rows, :columns]

    def _old_jpeg(self, page: int) -> np.ndarray:
        """A whole page [1, length, width, samples], its colors as RGB."""
        _, _, length, width, contiguous = self._key.shaped
        number = int(self._series.pages[page].index)
        with Image.open(self._file.path, formats=["TIFF"]) as picture:
            picture.seek(number)
            decoded = np.asarray(picture.convert("RGB") if contiguous == 3 else picture)
        if decoded.shape[:2] != (length, width):
            raise Refused(f"a page of it is a picture of {decoded.shape[1]} x {decoded.shape[0]} pixels")
        return decoded.reshape(1, length, width, contiguous)

    def _check_picture(self, data: bytes) -> None:
        """Refuse a strip or tile that is a picture far larger than the page says: tifffile would take a part of it."""
        kind = _PICTURES.get(int(self._key.compression))
        if kind is None or sizes_trusted():
            return
        try:
            with Image.open(io.BytesIO(data), formats=[kind]) as picture:
                width, height = picture.size
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise Refused(f"a piece of it is no {kind} picture", "the file is damaged; copy it again") from error
        if width * height > _SLACK * self._piece_pixels() + (1 << 16):
            raise Refused(f"a piece of it is a picture of {width} x {height} pixels, not of the size of the piece")

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
