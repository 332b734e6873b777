"""`affmae ingest --clean`: what is better left out of a dataset or cropped, decided before anything is written.

Single images are compared and measured; of stacks, whose sections resemble each other by nature, only the info bar is
looked for. No file is touched: a decision says what `ingest` does with an image, goes into the manifest, and is
reversed by `affmae ingest --no-clean`.

- near-duplicate: the 256-bit difference hash of a 17 x 16 thumbnail is within 25 bits of that of an earlier image
  (those of unrelated images are about 128 apart), and 64 x 64 thumbnails correlate by more than 0.9.
- blank: constant, or means of 8 x 8 pixels vary no more than those of pure noise do.
- saturated: 20 % of the pixels outside of padding are black or white, at the end of the range.
- info bar: the lowest rows, up to a quarter, have the microscope's bar: text on one value. They are cropped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from affmae_engine import atomic
from affmae_engine.data.padding import padding_mask
from affmae_engine.data.readers import Source
from affmae_engine.data.statistics import StatisticsBuilder
from affmae_engine.data.volumes import Stacked, Volume
from affmae_engine.errors import InputError

What = Literal["near-duplicate", "blank", "saturated", "info bar"]

NEAR_BITS = 25
"""Bits of 256 in which the hashes of near-duplicates may differ."""

SATURATED_SHARE = 0.2
"""Share of black or white pixels from which an image is saturated."""

_NOISE = 1.6  # ratio of the deviation of block means to that of pure noise, up to which there is nothing but noise
_BLOCK = 8
_BAR_ROWS = (0.015, 0.25)  # smallest and largest height of an info bar, as a share of the image
_BAR_FLAT, _IMAGE_FLAT = 0.35, 0.2  # share of a row that has the bar's value: at least in the bar, at most above it
_EDGE, _GAP, _TEXT, _COLUMNS, _MOST = 190, 14, 38, 6, 60


@dataclass(frozen=True)
class Decision:
    """What is done with an image. detail: in words. rows: for an info bar, how many of the `height` rows are kept."""

    path: str
    series: str
    what: What
    detail: str
    rows: int | None = None
    height: int | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Which image it is about: file and series."""
        return self.path, self.series

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values without what is not set."""
        return {key: value for key, value in self.__dict__.items() if value not in ("", None)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Decision:
        """Inverse of `to_dict`. Raises KeyError or TypeError on anything else."""
        return cls(**{"series": "", **values})


@dataclass(frozen=True)
class Cleaned:
    """Volumes to take, cropped where decided; the decisions; and a thumbnail uint8 [Y, X] for each decision."""

    volumes: list[Volume]
    decisions: list[Decision]
    thumbnails: list[NDArray[np.uint8]]


class Cropped(Source):
    """The upper rows of an image."""

    def __init__(self, source: Source, rows: int) -> None:
        depth, height, width = source.info.shape_ZYX
        note = f"info bar of {height - rows} rows cropped"
        super().__init__(replace(source.info, shape_ZYX=(depth, rows, width), notes=(*source.info.notes, note)))
        self.source = source
        self.parallel = source.parallel

    def _open(self) -> Source:
        return self.source

    def _close(self, handle: Source) -> None:
        handle.close()

    def _read(self, handle: Source, z: tuple[int, int], y: tuple[int, int], x: tuple[int, int]) -> np.ndarray:
        return handle.read(slice(*z), slice(*y), slice(*x))

    def __copy__(self) -> Cropped:
        """A copy that reads through a handle of its own."""
        return Cropped(copy.copy(self.source), self.info.shape_ZYX[1])


def clean(volumes: Sequence[Volume], *, on_progress: Callable[[int, int, str], None] | None = None) -> Cleaned:
    """Look at the middle section of every image and decide.

    Args:
        on_progress: told (images looked at, images in all, name).

    Raises:
        ResourceError: an image cannot be read just now. Damaged images are left to `ingest`, which reports them.
    """
    kept: list[Volume] = []
    decisions: list[Decision] = []
    thumbnails: list[NDArray[np.uint8]] = []
    seen: list[tuple[str, NDArray[np.bool_], NDArray[np.float64]]] = []
    for number, volume in enumerate(volumes, 1):
        info = volume.image.info
        try:
            section_YX = _middle(volume.image)
        except InputError:
            kept.append(volume)
            continue
        finally:
            volume.image.close()
        rows = info_bar(section_YX)
        found: Decision | None = None
        if rows is not None:
            height = info.shape_ZYX[1]
            detail = f"the lowest {height - rows} of {height} rows are cropped"
            found = Decision(volume.path, info.series, "info bar", detail, rows, height)
        leaving = None
        if info.shape_ZYX[0] == 1:
            leaving = _reason(section_YX[:rows], seen, info.path.name)
        if leaving is not None:
            found = Decision(volume.path, info.series, *leaving)
        else:
            kept.append(volume if rows is None else cropped(volume, rows))
        if found is not None:
            decisions.append(found)
            thumbnails.append(_thumbnail(section_YX))
        if on_progress is not None:
            on_progress(number, len(volumes), info.path.name)
    return Cleaned(kept, decisions, thumbnails)


def apply(decisions: Sequence[Decision], volumes: Sequence[Volume]) -> list[Volume]:
    """The volumes as earlier decisions leave them."""
    of = {decision.key: decision for decision in decisions}
    kept = []
    for volume in volumes:
        found = of.get((volume.path, volume.image.info.series))
        if found is None:
            kept.append(volume)
        elif found.rows is not None and found.height == volume.image.info.shape_ZYX[1]:
            kept.append(cropped(volume, found.rows))
    return kept


def cropped(volume: Volume, rows: int) -> Volume:
    """The upper rows of a volume; of a stack of files, file by file."""
    image = volume.image
    if not isinstance(image, Stacked):
        return replace(volume, image=Cropped(image, rows))
    sections = [Cropped(section, rows) for section in image.sections]
    notes = (*image.info.notes, sections[0].info.notes[-1])
    return replace(volume, image=Stacked(sections, replace(image.info, notes=notes)))


def info_bar(section_YX: NDArray[Any]) -> int | None:
    """Rows above the info bar of a section; None when there is none."""
    height = len(section_YX)
    least, most = (max(4, round(share * height)) for share in _BAR_ROWS)
    if height < 4 * least or section_YX.dtype.kind == "f" or section_YX.shape[1] < 32:
        return None
    lowest_YX = section_YX[height - most - least :]
    values, counts = np.unique(lowest_YX[-least // 2 - 1 :], return_counts=True)
    value = int(values[counts.argmax()])
    near = 3 if section_YX.dtype == np.uint8 else 0  # compressed pictures are not exactly constant
    flat_R = (np.abs(lowest_YX.astype(np.int64) - value) <= near).mean(axis=1)
    bar = np.flatnonzero(flat_R < _BAR_FLAT)
    first = int(bar[-1]) + 1 if bar.size else 0
    if not least <= len(flat_R) - first <= most:
        return None
    above = flat_R[max(0, first - least) : first]
    written = (flat_R[first:] < 0.98).any()  # without any text it is padding
    exact = float((lowest_YX[first:] == value).mean())  # a dark part of the image has noise
    sharp = above.size and above.max() <= _IMAGE_FLAT
    return height - (len(flat_R) - first) if sharp and written and exact >= _BAR_FLAT else None


def write_sheet(cleaned: Cleaned, path: Path) -> None:
    """Draw every decision with its image and write the sheet as a PNG; the rows that are cropped are crossed out.

    Raises:
        ResourceError: the file cannot be written.
    """
    shown = list(zip(cleaned.decisions, cleaned.thumbnails, strict=True))[:_MOST]
    columns = min(_COLUMNS, max(3, len(shown)))
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * (_EDGE + _GAP) + _GAP, rows * (_EDGE + _TEXT + _GAP) + _GAP + 30), (18, 20, 24))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    more = f", {len(shown)} of them shown" if len(shown) < len(cleaned.decisions) else ""
    draw.text((_GAP, 10), f"--clean: {len(cleaned.decisions)} images{more}", (232, 232, 232), font=font)
    for number, (decision, thumbnail_YX) in enumerate(shown):
        x, y = _GAP + number % columns * (_EDGE + _GAP), 30 + _GAP + number // columns * (_EDGE + _TEXT + _GAP)
        picture = Image.fromarray(thumbnail_YX)
        picture.thumbnail((_EDGE, _EDGE))
        sheet.paste(picture, (x, y))
        right, bottom = x + picture.width - 1, y + picture.height - 1
        top = y
        if decision.rows is not None and decision.height is not None:
            top = y + round(picture.height * decision.rows / decision.height)
        draw.rectangle((x, top, right, bottom), outline=(240, 90, 60), width=2)
        draw.line((x, bottom, right, top), fill=(240, 90, 60), width=2)
        draw.text((x, y + _EDGE + 3), Path(decision.path).name[:28], (232, 232, 232), font=font)
        draw.text((x, y + _EDGE + 19), decision.what, (240, 170, 60), font=font)
    atomic.ensure_folder(path.parent)
    atomic.commit_file(path, lambda partial: sheet.save(partial, format="PNG"))


def _reason(
    section_YX: NDArray[Any], seen: list[tuple[str, NDArray[np.bool_], NDArray[np.float64]]], name: str
) -> tuple[What, str] | None:
    """Why an image is left out; None adds it to those that later ones are compared with."""
    if _is_blank(section_YX):
        return "blank", "constant, or nothing but noise"
    share = _saturated(section_YX)
    if share >= SATURATED_SHARE:
        return "saturated", f"{share:.0%} of the pixels are black or white"
    means_YX = _resized(section_YX, (17, 16))
    bits = (means_YX[:, 1:] > means_YX[:, :-1]).ravel()
    fine_YX = _resized(section_YX, (64, 64)).ravel()
    fine_YX = (fine_YX - fine_YX.mean()) / max(float(fine_YX.std()), 1e-9)
    for other, other_bits, other_fine_YX in seen:
        if np.count_nonzero(bits != other_bits) <= NEAR_BITS and float((fine_YX * other_fine_YX).mean()) > 0.9:
            return "near-duplicate", f"of {other}"
    seen.append((name, bits, fine_YX))
    return None


def _is_blank(section_YX: NDArray[Any]) -> bool:
    builder = StatisticsBuilder(section_YX.dtype)
    builder.add(section_YX)
    if builder.finish().blank:
        return True
    height, width = (n // _BLOCK * _BLOCK for n in section_YX.shape)
    if min(height, width) < 4 * _BLOCK:
        return False
    inside = section_YX[:height, :width].astype(np.float32)
    blocks = inside.reshape(height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK)
    noise = float(np.sqrt(blocks.var(axis=(1, 3)).mean())) / _BLOCK
    return float(blocks.mean(axis=(1, 3)).std()) <= _NOISE * noise


def _saturated(section_YX: NDArray[Any]) -> float:
    """Share of the pixels outside of padding that have the smallest or the largest value of the type."""
    if section_YX.dtype.kind != "u":
        return 0.0
    inside = section_YX[~padding_mask(section_YX)]
    if not inside.size:
        return 0.0
    return float(((inside == 0) | (inside == np.iinfo(section_YX.dtype).max)).mean())


def _middle(image: Source) -> NDArray[Any]:
    z = image.info.shape_ZYX[0] // 2
    return image.read(slice(z, z + 1), slice(None), slice(None))[0]


def _resized(section_YX: NDArray[Any], size: tuple[int, int]) -> NDArray[np.float64]:
    """Averaged down to (width, height)."""
    finite = np.nan_to_num(section_YX.astype(np.float32), posinf=0, neginf=0)
    return np.asarray(Image.fromarray(finite).resize(size, Image.Resampling.BOX), np.float64)


def _thumbnail(section_YX: NDArray[Any]) -> NDArray[np.uint8]:
    height, width = section_YX.shape
    scale = min(1.0, _EDGE / max(height, width))
    small = _resized(section_YX, (max(1, round(width * scale)), max(1, round(height * scale))))
    low, high = np.percentile(small, [1, 99])
    return ((small - low) / max(high - low, 1e-9) * 255).clip(0, 255).astype(np.uint8)
