"""Which part of the data is held out: never a neighbour of what is trained on.

Neighbouring sections of a stack are near-copies, so a stack, and likewise a numbered series of equally large images,
gives one contiguous block at one of its ends, and the sections beside the block belong to neither part. Images that
stand alone are held out whole. Unusual: an image without companions (or just one) gives a strip of rows.
Everything is decided by the seed and by the images' names and shapes, not by the order they come in.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

GAP_NM = 150.0
"""Thickness of the material dropped between the parts: FIB-SEM correlates at .24 over it, ssTEM at less."""

GAP_SECTIONS = 4
"""Gap where the section thickness is unknown."""

GAP_ROWS = 32
"""Gap in rows between two strips of one image."""

LEAST_STRIP = 0.2
"""Smallest height of a held-out strip as a share of the image: a thinner one cannot hold a useful crop."""

_FEWEST_WHOLE = 3  # with fewer images that stand alone, holding one out whole would cost too much


class SplitImage(Protocol):
    """What the split must know of an image; `data.store.StoredImage` has it."""

    @property
    def name(self) -> str: ...
    @property
    def shape_ZYX(self) -> tuple[int, int, int]: ...
    @property
    def pixel_nm(self) -> tuple[float | None, float | None, float | None]: ...
    @property
    def series_group(self) -> str: ...


@dataclass(frozen=True, order=True)
class Region:
    """Sections z0 <= z < z1 of the image `name`; rows y0 <= y < y1, or all of them when these are None."""

    name: str
    z0: int
    z1: int
    y0: int | None = None
    y1: int | None = None


@dataclass(frozen=True)
class Split:
    """Regions to train on and regions held out, both in natural order of names."""

    train: list[Region]
    val: list[Region]


@dataclass(frozen=True)
class _Unit:
    """One stack, one series of single sections, or one single image: what must not be torn apart at random."""

    key: str
    sections: tuple[tuple[str, int], ...]  # (image name, z) in their physical order
    shape_YX: tuple[int, int]
    thickness_nm: float | None

    @property
    def weight(self) -> int:
        return len(self.sections) * self.shape_YX[0] * self.shape_YX[1]


def split(images: Sequence[SplitImage], fraction: float, *, seed: int) -> Split:
    """Divide images into a training and a held-out part.

    Args:
        images: any number, in any order.
        fraction: share of the pixels to hold out, 0 to below 1; 0 holds nothing out. Met approximately: blocks are
            whole sections, and data that stands alone is held out as whole images.
        seed: decides which images, and which end of a stack.

    Returns:
        the split; `val` is empty when `fraction` is 0 or the data is too small to be divided (one tiny image).
    """
    units = _units(images)
    train, val = [], []
    alone = []
    for unit in units:
        count = round(fraction * len(unit.sections))
        gap = _gap_sections(unit)
        if count >= 1 and len(unit.sections) - count - gap >= 1:
            kept, held = _cut_sections(unit, count, gap, seed)
            train += kept
            val += held
        else:
            alone.append(unit)
    held_whole = _choose_whole(alone, fraction, seed, needed=not val) if fraction > 0 else []
    cut: _Unit | None = None
    if fraction > 0 and not val and not held_whole and alone:
        cut = max(alone, key=lambda unit: (unit.weight, unit.key))
        kept, held = _cut_anyhow(cut, fraction, seed)
        train += kept
        val += held
    for unit in alone:
        if unit is not cut:
            (val if unit in held_whole else train).extend(_as_regions(unit.sections))
    return Split(sorted(train, key=_region_order), sorted(val, key=_region_order))


def natural_key(text: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key that orders `a2` before `a10`."""
    parts = re.split(r"(\d+)", text)
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in parts if part)


def _units(images: Iterable[SplitImage]) -> list[_Unit]:
    series: dict[tuple[str, tuple[int, int]], list[SplitImage]] = {}
    units = []
    for image in images:
        depth, height, width = image.shape_ZYX
        if depth == 1:
            series.setdefault((image.series_group, (height, width)), []).append(image)
        elif depth > 1:
            sections = tuple((image.name, z) for z in range(depth))
            units.append(_Unit(image.name, sections, (height, width), image.pixel_nm[0]))
    for (_, shape_YX), members in series.items():
        ordered = sorted(members, key=lambda image: natural_key(image.name))
        sections = tuple((image.name, 0) for image in ordered)
        units.append(_Unit(ordered[0].name, sections, shape_YX, ordered[0].pixel_nm[0]))
    return sorted(units, key=lambda unit: natural_key(unit.key))


def _gap_sections(unit: _Unit) -> int:
    """Sections dropped beside a held-out block: `GAP_NM` of material, but never more than a tenth of a short stack."""
    wanted = math.ceil(GAP_NM / unit.thickness_nm) if unit.thickness_nm else GAP_SECTIONS
    return max(1, min(wanted, len(unit.sections) // 10))


def _cut_sections(unit: _Unit, count: int, gap: int, seed: int) -> tuple[list[Region], list[Region]]:
    """Hold out `count` sections at the end that the seed chooses."""
    sections = unit.sections
    if _draw(seed, unit.key) < 0.5:
        return _as_regions(sections[count + gap :]), _as_regions(sections[:count])
    return _as_regions(sections[: len(sections) - count - gap]), _as_regions(sections[len(sections) - count :])


def _cut_anyhow(unit: _Unit, fraction: float, seed: int) -> tuple[list[Region], list[Region]]:
    """Divide the only data there is: sections when there are at least three, else rows; not at all when tiny."""
    if len(unit.sections) >= 3:
        return _cut_sections(unit, max(1, min(round(fraction * len(unit.sections)), len(unit.sections) - 2)), 1, seed)
    height = unit.shape_YX[0]
    rows = round(max(fraction, LEAST_STRIP) * height)
    gap = min(GAP_ROWS, max(1, height // 10))
    if rows < 1 or height - rows - gap < 1:
        return _as_regions(unit.sections), []
    if _draw(seed, unit.key) < 0.5:
        kept, held = (rows + gap, height), (0, rows)
    else:
        kept, held = (0, height - rows - gap), (height - rows, height)
    regions = _as_regions(unit.sections)
    return [Region(r.name, r.z0, r.z1, *kept) for r in regions], [Region(r.name, r.z0, r.z1, *held) for r in regions]


def _choose_whole(units: list[_Unit], fraction: float, seed: int, *, needed: bool) -> list[_Unit]:
    """Whole units in the order that the seed gives, as close to the share as they come; at least one if `needed`."""
    if len(units) < _FEWEST_WHOLE:
        return []
    target = fraction * sum(unit.weight for unit in units)
    chosen: list[_Unit] = []
    taken = 0
    shuffled = sorted(units, key=lambda unit: _draw(seed, unit.key))
    for unit in shuffled:
        if abs(target - taken - unit.weight) < abs(target - taken) and len(chosen) < len(units) - 1:
            chosen.append(unit)
            taken += unit.weight
    if not chosen and needed:
        chosen = [min(shuffled, key=lambda unit: unit.weight)]
    return chosen


def _as_regions(sections: Sequence[tuple[str, int]]) -> list[Region]:
    """Consecutive sections of one image become one region."""
    regions: list[Region] = []
    for name, z in sections:
        if regions and regions[-1].name == name and regions[-1].z1 == z:
            regions[-1] = Region(name, regions[-1].z0, z + 1)
        else:
            regions.append(Region(name, z, z + 1))
    return regions


def _draw(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def _region_order(region: Region) -> tuple[object, ...]:
    return natural_key(region.name), region.z0, region.y0 or 0
