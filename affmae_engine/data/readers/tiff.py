"""TIFF in its dialects: single and multi-page, BigTIFF, OME-TIFF, ImageJ hyperstacks, tiles, strips, compressions.

Unusual: tifffile only logs when a file is cut short and returns a shorter stack, so its error log counts as failure
here; and other files that a multi-file OME-TIFF names are never opened (a name may be `../secret.tif`), each file of
such a set is read on its own. Pyramids are read at full resolution only, thumbnails and masks inside a file are left
out, and pages of different size become separate images.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tifffile import PHOTOMETRIC, TiffFile, TiffPageSeries

from affmae_engine.data.readers.axes import Sections, arrange, check_channel
from affmae_engine.data.readers.grey import Colour, ValueRule, grey_rule
from affmae_engine.data.readers.limits import MOST_PAGES, refuse_inflated, refuse_large_piece, refuse_many
from affmae_engine.data.readers.source import Refused, Source, SourceInfo, reading
from affmae_engine.data.readers.tiff_compression import check_compression
from affmae_engine.data.readers.tiff_metadata import pixel_size
from affmae_engine.data.readers.tiff_pages import PageReader, largest_segment

_UNCOMPRESSED = 1


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


@dataclass(frozen=True)
class _Plan:
    """What `TiffSource` needs besides the file itself."""

    series: int
    sections: Sections
    page_depth: int
    samples: tuple[int, ...]
    """Samples of a pixel that are read."""
    rule: ValueRule


class TiffSource(Source):
    """One series of a TIFF file."""

    def __init__(self, info: SourceInfo, plan: _Plan) -> None:
        super().__init__(info)
        self._plan = plan

    def _open(self) -> Any:
        with logged_errors_fail():
            file = _tiff_file(self.info.path)
            return file, PageReader(file, file.series[self._plan.series].levels[0])

    def _close(self, handle: Any) -> None:
        handle[0].close()

    def _read(self, handle: Any, z: tuple[int, int], y: tuple[int, int], x: tuple[int, int]) -> np.ndarray:
        plan, reader = self._plan, handle[1]
        block = np.empty((z[1] - z[0], y[1] - y[0], x[1] - x[0]), self.info.dtype)
        if block.size == 0:
            return block
        with logged_errors_fail():
            for row, section in enumerate(range(*z)):
                index = plan.sections.index(section // plan.page_depth)
                page = int(np.ravel_multi_index(index, plan.sections.shape)) if index else 0
                raw = reader.read(page, section % plan.page_depth, y, x, plan.samples)
                block[row] = plan.rule(raw if plan.rule.colour != "grey" else raw[..., 0])
        return block


def open_tiff(path: Path, *, channel: int | None, labels: bool) -> list[Source]:
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
            sources.append(_describe(file, index, series, label, size, channel, labels))
    return sources


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


def _describe(
    file: TiffFile, index: int, series: TiffPageSeries, label: str, size: int, channel: int | None, labels: bool
) -> Source:
    page = series.keyframe
    if page.ndim > len(series.shape) or tuple(series.shape[len(series.shape) - page.ndim :]) != tuple(page.shape):
        raise Refused(f"its axes {series.axes} {series.shape} are arranged in an unknown way")
    leading = series.axes[: len(series.axes) - page.ndim]
    sections, notes = arrange(leading, tuple(series.shape[: len(leading)]), channel if "C" in leading else None)
    if page.imagewidth == 0 or page.imagelength == 0 or 0 in page.shaped:
        raise Refused("its image has no pixels")
    _check_extent(file, series, size)
    colour, samples, sample_notes = _samples(page, channel if "C" not in leading else None)
    palette = None
    if page.photometric == PHOTOMETRIC.PALETTE and page.colormap is not None:
        palette = np.asarray(page.colormap).T
    rule, value_notes = grey_rule(
        np.dtype(page.dtype),
        colour=colour,
        bits=page.bitspersample,
        inverted=page.photometric == PHOTOMETRIC.MINISWHITE,
        palette=palette,
        labels=labels,
    )
    depth = page.shaped[1]
    names = [note for note in (*notes, *sample_notes, *value_notes, *_tag_notes(file, page)) if note]
    info = SourceInfo(
        path=Path(file.filehandle.path),
        series=label,
        name=Path(file.filename).name.split(".ome.tif")[0].removesuffix(".tif").removesuffix(".tiff"),
        shape_ZYX=(sections.count * depth, page.imagelength, page.imagewidth),
        dtype=rule.dtype,
        pixel_nm=pixel_size(file, series, index),
        format=_format(file, page),
        notes=tuple(names),
        value_offset=rule.offset,
    )
    return TiffSource(info, _Plan(index, sections, depth, samples, rule))


def _samples(page: Any, channel: int | None) -> tuple[Colour, tuple[int, ...], tuple[str, ...]]:
    """Which samples of a pixel are read and what they mean: (colour, sample numbers, notes)."""
    count = page.shaped[0] * page.shaped[4]
    if channel is not None:
        check_channel(channel, count)
        return "grey", (channel,), ((f"channel {channel} of {count} taken",) if count > 1 else ())
    photometric = page.photometric
    # JPEG, JPEG XL and WebP decoders give RGB for YCbCr; otherwise the first sample is the luminance.
    if photometric == PHOTOMETRIC.RGB or (photometric == PHOTOMETRIC.YCBCR and page.compression in (6, 7, 34892)):
        if count >= 3:
            return "rgb", (0, 1, 2), (("alpha or further samples left out",) if count > 3 else ())
    elif photometric == PHOTOMETRIC.SEPARATED and count >= 4:
        return "cmyk", (0, 1, 2, 3), ()
    elif photometric in (PHOTOMETRIC.CIELAB, PHOTOMETRIC.ICCLAB, PHOTOMETRIC.ITULAB):
        return "cielab", (0,), ()
    return "grey", (0,), ((f"sample 0 of {count} taken",) if count > 1 else ())


def _check_extent(file: TiffFile, series: TiffPageSeries, size: int) -> None:
    """Refuse pages that are missing or lie beyond the end of the file, and headers that promise too much."""
    page = series.keyframe
    itemsize = np.dtype(page.dtype).itemsize
    packed = page.bitspersample < 8 * itemsize
    declared = math.prod(series.shape) * itemsize // (16 if packed else 1)
    plain = page.compression == _UNCOMPRESSED
    refuse_inflated(declared, size, compressed=not plain)
    if series.dataoffset is not None:
        if series.dataoffset + series.nbytes > size:
            raise Refused(
                f"it is cut short: {series.dataoffset + series.nbytes - size} bytes of its pixels are missing",
                "copy it again from its origin",
            )
        return
    refuse_large_piece(largest_segment(page), "a compressed piece of it", "save it again in strips or tiles")
    if not plain:
        check_compression(int(page.compression), getattr(page.compression, "name", str(page.compression)))
    missing = sum(p is None for p in series.pages)
    if missing or len(series.pages) != math.prod(series.shape[: len(series.shape) - page.ndim]):
        raise Refused(f"it is incomplete: {missing or 'some'} of its pages are missing")
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
