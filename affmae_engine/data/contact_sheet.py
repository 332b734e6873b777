"""The contact sheet of a dataset: thumbnails of up to 48 images, to see whether the data is what one thinks it is.

Each shows the middle section, averaged down, with the image's 1st to 99th percentile stretched to black and white.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from affmae_engine import atomic
from affmae_engine.data.store import Store
from affmae_engine.data.store_layout import StoredImage

_MOST = 48
_COLUMNS = 8
_EDGE = 190
_GAP = 14
_TEXT = 40
_HEAD = 44
_BACKGROUND, _PANEL, _INK, _FAINT, _WARN = (18, 20, 24), (30, 33, 39), (232, 232, 232), (150, 155, 165), (240, 170, 60)
_BAND_BYTES = 16 << 20


def write_contact_sheet(store: Store, path: Path) -> None:
    """Draw the sheet of a dataset and write it as a PNG.

    Raises:
        CorruptError: a chunk of the store is damaged.
        ResourceError: the file cannot be written.
    """
    images = store.images
    if len(images) > _MOST:
        images = [images[int((i + 0.5) * len(images) / _MOST)] for i in range(_MOST)]
    columns = min(_COLUMNS, max(3, math.ceil(math.sqrt(len(images)))))
    rows = math.ceil(len(images) / columns)
    width = columns * (_EDGE + _GAP) + _GAP
    height = _HEAD + rows * (_EDGE + _TEXT + _GAP) + _GAP
    sheet = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    title = f"{store.path.name}: {len(store.images)} image{'s' if len(store.images) != 1 else ''}"
    if len(images) < len(store.images):
        title += f", {len(images)} of them shown"
    draw.text((_GAP, 13), title, _INK, font=ImageFont.load_default(17))
    for number, image in enumerate(images):
        x = _GAP + number % columns * (_EDGE + _GAP)
        y = _HEAD + number // columns * (_EDGE + _TEXT + _GAP)
        _draw_cell(sheet, draw, (x, y), image, thumbnail(store, image, _EDGE))
    atomic.commit_file(path, lambda partial: sheet.save(partial, format="PNG", optimize=True))


def thumbnail(store: Store, image: StoredImage, edge: int) -> np.ndarray:
    """The middle section of an image, averaged down to at most `edge` pixels: uint8 [Y, X]."""
    depth, height, width = image.shape_ZYX
    factor = max(1, math.ceil(max(height, width) / edge))
    middle = slice(depth // 2, depth // 2 + 1)
    rows_at_once = factor * max(1, _BAND_BYTES // (width * factor * image.dtype.itemsize))
    parts = []
    for start in range(0, height, rows_at_once):
        band = store.read(image.name, middle, slice(start, start + rows_at_once), slice(None))[0]
        parts.append(_average(band.astype(np.float32), factor))
    small = np.concatenate(parts)
    low, high = image.statistics.percentiles["1"], image.statistics.percentiles["99"]
    if high <= low:
        low, high = low - 1, low + 1
    stretched: np.ndarray = (np.nan_to_num((small - low) / (high - low), nan=0.0, posinf=1, neginf=0).clip(0, 1)) * 255
    return stretched.astype(np.uint8)


def _average(band: np.ndarray, factor: int) -> np.ndarray:
    """Means of `factor` x `factor` blocks; the last blocks of an axis may be smaller."""
    for axis in (0, 1):
        starts = np.arange(0, band.shape[axis], factor)
        counts = np.diff(np.append(starts, band.shape[axis]))
        band = np.add.reduceat(band, starts, axis=axis) / np.expand_dims(counts, 1 - axis)
    return band


def _draw_cell(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, corner: tuple[int, int], image: StoredImage, thumb: np.ndarray
) -> None:
    x, y = corner
    draw.rectangle((x, y, x + _EDGE - 1, y + _EDGE - 1), fill=_PANEL)
    picture = Image.fromarray(thumb)
    scale = _EDGE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.LANCZOS if scale < 2 else Image.Resampling.NEAREST)
    sheet.paste(picture, (x + (_EDGE - size[0]) // 2, y + (_EDGE - size[1]) // 2))
    small, tiny = ImageFont.load_default(13), ImageFont.load_default(12)
    draw.text((x, y + _EDGE + 4), _fit(draw, image.name, small), _INK, font=small)
    depth, height, width = image.shape_ZYX
    extent = f"{width} x {height}" + (f" x {depth}" if depth > 1 else "")
    _, row_nm, column_nm = image.pixel_nm
    known = column_nm is not None and row_nm is not None
    scale_text = f"{column_nm:g} nm/px" if known else "nm/px unknown"
    draw.text((x, y + _EDGE + 21), _fit(draw, f"{extent}, {scale_text}", tiny), _FAINT, font=tiny)
    if image.statistics.blank:
        draw.rectangle((x, y, x + _EDGE - 1, y + _EDGE - 1), outline=_WARN, width=2)
        draw.rectangle((x, y, x + 46, y + 18), fill=_WARN)
        draw.text((x + 6, y + 2), "blank", _BACKGROUND, font=small)


def _fit(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Text shortened in the middle until it is no wider than a cell."""
    kept = len(text)
    shown = text
    while draw.textlength(shown, font=font) > _EDGE and kept > 4:
        kept -= 1
        shown = f"{text[: kept // 2]}..{text[len(text) - (kept - kept // 2) :]}"
    return shown
