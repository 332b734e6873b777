"""TIFF in its dialects: single and multi-page, BigTIFF, OME-TIFF, ImageJ hyperstacks, tiles, strips, compressions.

Unusual: tifffile only logs when a file is cut short and returns a shorter stack, so its error log counts as failure
here; and other files that a multi-file OME-TIFF names are never opened (a name may be `../secret.tif`), each file of
such a set is read on its own. Pyramids are read at full resolution only, thumbnails and masks inside a file are left
out, and pages of different size become separate images. Pieces whose decoder is told the decoded size, and stops
there, are decoded in this process; all others in a child process.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tifffile import PHOTOMETRIC, TIFF, TiffFile, TiffPageSeries

from affmae_engine.data.readers.arrays import Array, array_source, short_name
from affmae_engine.data.readers.grey import Colour, ValueRule, grey_rule
from affmae_engine.data.readers.limits import MOST_PAGES, refuse_inflated, refuse_large_piece, refuse_many
from affmae_engine.data.readers.source import Found, ReadOptions, Refused, Source, reading
from affmae_engine.data.readers.tiff_metadata import pixel_size
from affmae_engine.data.readers.tiff_pages import OLD_JPEG, PageReader, largest_segment, subsampling

_UNCOMPRESSED = 1
# CCITT, LZW, deflate, PackBits, ThunderScan, SGI log, LZMA, zstd, PixTIFF
_BOUNDED = {1, 2, 3, 4, 5, 8, 32773, 32809, 32946, 34676, 34677, 34925, 34926, 50000, 50013}
# JPEG in its kinds and WebP, whose decoders give RGB for YCbCr.
_RGB_FROM_YCBCR = (6, 7, 34892, 50001)


class _ErrorLog(logging.Handler):
    """Collects tifffile's error records per thread; also keeps its warnings off the terminal."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.threads = threading.local()

    def emit(self, record: logging.LogRecord) -> None:
        messages = getattr(self.threads, "messages", None)
        if messages is not None and record.levelno >= logging.ERROR:
            messages.append(record.getMessage())


_ERRORS = _ErrorLog()
logging.getLogger("tifffile").addHandler(_ERRORS)


@contextlib.contextmanager
def logged_errors_fail() -> Iterator[None]:
    """Raise `Refused` if tifffile logs an error inside the block, even when it returns something."""
    outer = getattr(_ERRORS.threads, "messages", None)
    messages: list[str] = []
    _ERRORS.threads.messages = messages
    try:
        yield
    finally:
        _ERRORS.threads.messages = outer
    if messages:
        text = messages[0].split(">", 1)[-1].strip() or messages[0]
        raise Refused(text[:200], "the file is truncated or damaged; copy it again from its origin")


class _Pages:
    """One series of an open TIFF as an array; its axes are those of `_array_axes`."""

    def __init__(self, path: Path, series: int) -> None:
        with logged_errors_fail():
            self._file = _tiff_file(path)
            levels = self._file.series[series].levels[0]
            self._reader = PageReader(self._file, levels)
            self._axes, self._leading = _array_axes(levels)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __getitem__(self, selection: tuple[int | slice, ...]) -> np.ndarray:
        axes, leading = self._axes, self._leading
        bounds = [(s.start, s.stop) if isinstance(s, slice) else (s, s + 1) for s in selection]
        if isinstance(selection[-1], slice) and selection[-1] == slice(None):  # all samples
            bounds[-1] = (0, self._reader.samples)
        *outer, depth, rows, columns, samples = bounds
        shape = [stop - start for start, stop in bounds]
        with logged_errors_fail():
            block = np.empty(shape, self._reader.dtype)
            for index in np.ndindex(*shape[: len(outer) + 1]):
                at = [start + i for i, (start, _) in zip(index, (*outer, depth), strict=True)]
                page = int(np.ravel_multi_index(at[:-1], leading)) if leading else 0
                block[index] = self._reader.read(page, at[-1], rows, columns, tuple(range(*samples)))
        assert len(axes) == block.ndim
        return block.reshape([n for n, s in zip(shape, selection, strict=True) if isinstance(s, slice)])


def open_tiff(path: Path, options: ReadOptions) -> Found:
    """Every image in a TIFF file, from its headers alone.

    Raises:
        InputError: not a TIFF, truncated, damaged, or of a kind that cannot be decoded.
    """
    with reading(path), logged_errors_fail(), _tiff_file(path) as file:
        size = path.stat().st_size
        every = [(i, s.levels[0]) for i, s in enumerate(file.series) if s.levels]
        wanted = [(i, s) for i, s in every if not _is_extra(s)] or every
        if not wanted:
            raise Refused("it holds no image")
        sources: list[Source] = []
        for index, series in wanted:
            label = f"{index}" if len(wanted) > 1 else ""
            sources.append(array_source(_describe(path, file, index, series, label, size), options))
    return sources, []


def _tiff_file(path: Path) -> TiffFile:
    head = b""
    with path.open("rb") as handle:
        head = handle.read(4)
    if head[:2] not in (b"II", b"MM"):
        raise Refused("it is not a TIFF file", "the name says TIFF, but the content does not")
    file = TiffFile(path, _multifile=False)
    # Entity declarations in OME-XML serve only attacks (billion laughs); such a header is not parsed at all.
    text = file.pages.first.description if len(file.pages) else ""
    if file.is_ome and "<!ENTITY" in text:
        file.close()
        raise Refused("its OME-XML declares entities, which no microscope writes", "the file is not trustworthy")
    if _has_page(file, MOST_PAGES):
        refuse_many(MOST_PAGES + 1, MOST_PAGES, "pages")
    return file


def _has_page(file: TiffFile, index: int) -> bool:
    """Whether there is a page of that number; walks no further than to it."""
    try:
        file.pages[index]
    except IndexError:
        return False
    return True


def _is_extra(series: TiffPageSeries) -> bool:
    page = series.keyframe
    return bool(page.subfiletype & 0b101) or (series.name or "").lower() in ("thumbnail", "label", "macro")


def _array_axes(series: TiffPageSeries) -> tuple[str, tuple[int, ...]]:
    """The axes of a series as `_Pages` has them, and the lengths of those that number its pages.

    These come first, then the depth of a page (`Z`, mostly 1), its rows, its columns, and the samples of a pixel. Rows
    and columns are called as the series calls them: in a file that says YXZ, the rows of a page are X.

    Raises:
        Refused: the pages are arranged in another way.
    """
    page = series.keyframe
    leading = series.axes[: len(series.axes) - page.ndim]
    if page.ndim > len(series.shape) or tuple(series.shape[len(leading) :]) != tuple(page.shape):
        raise Refused(f"its axes {series.axes} {series.shape} are arranged in an unknown way")
    names = dict(zip(page.axes, series.axes[len(leading) :], strict=True))
    rows, columns = names.get("Y", "Y"), names.get("X", "X")
    return f"{leading}{names.get('Z', 'Z')}{rows}{columns}S", tuple(series.shape[: len(leading)])


def _describe(path: Path, file: TiffFile, index: int, series: TiffPageSeries, label: str, size: int) -> Array:
    page = series.keyframe
    axes, leading = _array_axes(series)
    planes, depth, length, width, contiguous = page.shaped
    if 0 in page.shaped or page.imagewidth == 0 or page.imagelength == 0:
        raise Refused("its image has no pixels")
    if page.compression not in TIFF.DECOMPRESSORS:
        name = getattr(page.compression, "name", str(page.compression)).lower().replace("_", " ")
        raise Refused(f"its compression, {name}, is not supported", "save it again with another one")
    _check_extent(file, series, size)
    luminance = subsampling(page) != (1, 1)
    samples = 1 if luminance else planes * contiguous
    shape = (*leading, depth, length, width, samples)
    if depth == 1:  # a page has no z of its own
        axes = f"{axes[: len(leading)]}_{axes[len(leading) + 1 :]}"
    colors = _colors(page, samples)
    palette = None
    if page.photometric == PHOTOMETRIC.PALETTE and page.colormap is not None:
        palette = np.asarray(page.colormap).T

    def rule(colour: Colour, labels: bool) -> tuple[ValueRule, tuple[str, ...]]:
        return grey_rule(
            np.dtype(page.dtype),
            colour=colour,
            bits=page.bitspersample,
            inverted=page.photometric == PHOTOMETRIC.MINISWHITE,
            palette=palette,
            labels=labels,
        )

    return Array(
        path=path,
        open=partial(_Pages, path, index),
        shape=shape,
        dtype=np.dtype(page.dtype),
        axes=axes,
        format=_format(file, page),
        pixel_nm=dict(zip("ZYX", pixel_size(path, file, series, index), strict=True)),
        series=label,
        name=short_name(path),
        notes=(*_tag_notes(file, page), *(("luminance of its colors taken",) if luminance else ())),
        axes_from="file" if _names_its_axes(file, series) else "pages",
        piece_bytes=largest_segment(page),
        samples=colors,
        rule=rule,
        isolated=luminance or int(page.compression) not in _BOUNDED,
    )


def _names_its_axes(file: TiffFile, series: TiffPageSeries) -> bool:
    if series.kind == "shaped":
        return any("axes" in one for one in file.shaped_metadata or ())
    return series.kind not in ("generic", "uniform")


def _colors(page: Any, count: int) -> Colour:
    """What the samples of a pixel mean."""
    photometric = page.photometric
    if photometric == PHOTOMETRIC.RGB or (photometric == PHOTOMETRIC.YCBCR and page.compression in _RGB_FROM_YCBCR):
        return "rgb" if count >= 3 else "grey"
    if photometric == PHOTOMETRIC.SEPARATED and count >= 4:
        return "cmyk"
    if photometric in (PHOTOMETRIC.CIELAB, PHOTOMETRIC.ICCLAB, PHOTOMETRIC.ITULAB):
        return "cielab"
    return "grey"


def _check_extent(file: TiffFile, series: TiffPageSeries, size: int) -> None:
    """Refuse pages that are missing or lie beyond the end of the file, and headers that promise too much."""
    page = series.keyframe
    itemsize = np.dtype(page.dtype).itemsize
    packed = page.bitspersample < 8 * itemsize
    declared = math.prod(series.shape) * itemsize // (16 if packed else 1)
    plain = page.compression == _UNCOMPRESSED
    luminance = subsampling(page) != (1, 1)
    if luminance:
        declared //= 3  # at least the luminance is stored for every pixel
    refuse_inflated(declared, size, compressed=not plain)
    if series.dataoffset is not None and not luminance:
        if series.dataoffset + series.nbytes > size:
            raise Refused(
                f"it is cut short: {series.dataoffset + series.nbytes - size} bytes of its pixels are missing",
                "copy it again from its origin",
            )
        return
    refuse_large_piece(largest_segment(page), "a compressed piece of it", "save it again in strips or tiles")
    missing = sum(p is None for p in series.pages)
    if missing or len(series.pages) != math.prod(series.shape[: len(series.shape) - page.ndim]):
        raise Refused(f"it is incomplete: {missing or 'some'} of its pages are missing")
    if page.compression == OLD_JPEG:
        return  # its data may stand outside of strips
    for number, one in enumerate(series.pages):
        offsets = np.asarray(one.dataoffsets, dtype=np.uint64)
        counts = np.asarray(one.databytecounts, dtype=np.uint64)
        if len(offsets) != len(counts) or len(offsets) < math.prod(page.chunked):
            raise Refused(f"page {number} lists {len(offsets)} of its {math.prod(page.chunked)} strips or tiles")
        if (offsets + counts > size).any():
            raise Refused(f"it is cut short: page {number} reaches beyond its end", "copy it again from its origin")
        if one.dataoffsets and not counts.any():
            raise Refused(f"page {number} has no pixel data")


def _tag_notes(file: TiffFile, page: Any) -> list[str]:
    notes = []
    orientation = page.tags.valueof(274, 1)
    if orientation not in (0, 1):
        notes.append(f"orientation tag {int(orientation)} is not applied")
    if file.is_ome and not any(series.kind == "ome" for series in file.series):
        notes.append("one file of a multi-file OME-TIFF: read on its own")
    return notes


def _format(file: TiffFile, page: Any) -> str:
    kind = "OME-TIFF" if file.is_ome else "ImageJ TIFF" if file.is_imagej else "TIFF"
    parts = ["BigTIFF" if file.is_bigtiff and kind == "TIFF" else kind]
    parts += ["tiled"] if page.is_tiled else []
    if page.compression != _UNCOMPRESSED:
        parts.append(getattr(page.compression, "name", str(page.compression)).lower().replace("_", " "))
    return " ".join(parts)
