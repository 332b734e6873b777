"""Which part of the data is held out: never a neighbour of what is trained on.

Neighbouring sections of a stack are near-copies, so a stack, and likewise a numbered series of equally large images,
gives one contiguous block at one of its ends, and the sections beside the block belong to neither part. Images that
stand alone are held out whole. Unusual: an image without companions (or just one) gives a strip of rows. And what may
show the same, images of equal content (labelled twice) and former versions of a file that was ingested again, stays on
one side: section by section where the shapes agree; otherwise former versions belong to neither part of what is cut.
Where the classes of labels are known, the held-out part takes what costs training no class and brings it most classes:
the other end of a stack or a block inside it, a strip at another height, other whole images.
Everything is decided by the seed and by the images' records, not by the order they come in.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from affmae_engine.data.names import last_number

GAP_NM = 150.0
"""Thickness of the material dropped between the parts: FIB-SEM correlates at .24 over it, ssTEM at less."""

GAP_SECTIONS = 4
"""Gap where the section thickness is unknown."""

GAP_ROWS = 32
"""Gap in rows between two strips of one image."""

LEAST_STRIP = 0.2
"""Smallest height of a held-out strip as a share of the image: a thinner one cannot hold a useful crop."""

_PLACES = 16
"""Places inside a stack or image that are tried for the held-out block, besides its ends."""

_MOST_SPACE = 100  # numbers per section up to which the numbers of a series count sections

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
    @property
    def source_path(self) -> str: ...
    @property
    def source_series(self) -> str: ...
    @property
    def source_mtime_ns(self) -> int: ...
    @property
    def sha256(self) -> str: ...
    @property
    def pixels_hash(self) -> str: ...


@dataclass(frozen=True, order=True)
class Region:
    """Sections z0 <= z < z1 of the image `name`; rows y0 <= y < y1, or all of them when these are None."""

    name: str
    z0: int
    z1: int
    y0: int | None = None
    y1: int | None = None

    @property
    def text(self) -> str:
        """In words, sections and rows counted from 0."""
        sections = f" section {self.z0}" if self.z1 == self.z0 + 1 else f" sections {self.z0} to {self.z1 - 1}"
        rows = "" if self.y0 is None or self.y1 is None else f" rows {self.y0} to {self.y1 - 1}"
        return f"{self.name}{'' if (self.z0, self.z1) == (0, 1) else sections}{rows}"


@dataclass(frozen=True)
class Split:
    """Regions to train on and regions held out, both in natural order of names."""

    train: list[Region]
    val: list[Region]

    @property
    def held_out(self) -> list[str]:
        """The held-out regions in words: `image`, `stack sections 32 to 39`, `image rows 0 to 199`."""
        return [region.text for region in self.val]

    def to_dict(self) -> dict[str, list[list[str | int | None]]]:
        """Plain JSON values: [name, z0, z1, y0, y1] of every region."""
        return {part: [list(astuple(region)) for region in getattr(self, part)] for part in ("train", "val")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Sequence[Sequence[Any]]]) -> Split:
        """Inverse of `to_dict`. Raises KeyError, TypeError or ValueError on anything else."""
        return cls(*([Region(*region) for region in values[part]] for part in ("train", "val")))


_Place = tuple[str, int]
"""A section: image name and z."""

_Usable = Mapping[str, Collection[int]] | None


@dataclass(frozen=True)
class _Unit:
    """One stack, one series of single sections, or one single image: what must not be torn apart at random.

    sections: in their physical order; each is the places that show it, of which only usable ones are listed, so it may
    be empty and count for distances alone. others: sections of former versions with other shapes.
    """

    key: str
    sections: tuple[tuple[_Place, ...], ...]
    others: tuple[_Place, ...]
    shape_YX: tuple[int, int]
    thickness_nm: float | None

    @property
    def usable(self) -> list[int]:
        """Numbers of the sections that are not empty."""
        return [number for number, places in enumerate(self.sections) if places]

    @property
    def weight(self) -> int:
        return sum(map(len, self.sections)) * self.shape_YX[0] * self.shape_YX[1]

    def regions(self, numbers: Iterable[int]) -> list[Region]:
        """These sections, as few regions as possible."""
        return _as_regions(place for number in numbers for place in self.sections[number])

    def whole(self) -> list[Region]:
        return self.regions(self.usable) + _as_regions(self.others)


@dataclass(frozen=True)
class _Family:
    """Images that may show the same: the one that stands for them, those of its shape, those of another."""

    lead: SplitImage
    alike: tuple[SplitImage, ...]
    others: tuple[SplitImage, ...]


def split(
    images: Sequence[SplitImage],
    fraction: float,
    *,
    seed: int,
    usable: _Usable = None,
    classes: Callable[[Region], Collection[int]] | None = None,
) -> Split:
    """Divide images into a training and a held-out part.

    Args:
        images: any number, in any order.
        fraction: share of the pixels to hold out, 0 to below 1; 0 holds nothing out. Met approximately: blocks are
            whole sections, and data that stands alone is held out as whole images.
        seed: decides which images, and which end of a stack.
        usable: the sections, by image name, that are worth anything to either part (those with labels); None: all.
        classes: which classes the labels of a region have; None does not look at classes, nor at the numbers in file
            names, which say how far apart the sections of a series are.

    Returns:
        the split; `val` is empty when `fraction` is 0 or the data is too small to be divided (one tiny image). No class
        is in `val` alone, unless all data there is had to be cut in two.
    """
    units = _units(images, usable, numbered=classes is not None)
    balance = _Balance(units, classes)
    train, val = [], []
    alone = []
    for unit in units:
        count = round(fraction * len(unit.usable))
        kept, held = balance.best(unit, _section_cuts(unit, count, _gap_sections(unit), seed))
        if kept and held:
            train += kept
            val += held
        else:
            alone.append(unit)
    held_whole = _choose_whole(alone, fraction, seed, balance, needed=not val) if fraction > 0 else []
    cut: _Unit | None = None
    if fraction > 0 and not val and not held_whole and alone:
        cut = max(alone, key=lambda unit: (unit.weight, unit.key))
        kept, held = balance.best(cut, _any_cuts(cut, fraction, seed), whatever=True)
        train += kept
        val += held
    for unit in alone:
        if unit is not cut:
            (val if unit in held_whole else train).extend(unit.whole())
    return Split(sorted(train, key=_region_order), sorted(val, key=_region_order))


_Cut = tuple[list[Region], list[Region]]
"""Regions kept for training, and held out."""


class _Balance:
    """Which classes the two parts have while units are divided one by one; undecided units count as trained on.

    Without `classes` every cut is as good as another, and the first is taken.
    """

    def __init__(self, units: Sequence[_Unit], classes: Callable[[Region], Collection[int]] | None) -> None:
        self._of_region = classes
        self._trained = {unit.key: self.classes(unit.whole()) for unit in units} if classes is not None else {}
        self._held: set[int] = set()

    def classes(self, regions: Iterable[Region]) -> set[int]:
        """Classes of some regions."""
        if self._of_region is None:
            return set()
        return {found for region in regions for found in self._of_region(region)}

    @property
    def missing(self) -> list[int]:
        """Classes that the held-out part lacks, those in fewest units first."""
        every = [number for classes in self._trained.values() for number in classes]
        return sorted(set(every) - self._held, key=lambda number: (every.count(number), number))

    def loses(self, unit: _Unit, kept: Iterable[Region]) -> int:
        """Number of classes that are trained on no more when only `kept` stays of a unit."""
        rest = set().union(*(classes for key, classes in self._trained.items() if key != unit.key))
        return len(self._trained.get(unit.key, set()) - rest - self.classes(kept))

    def take(self, unit: _Unit, kept: Iterable[Region], held: Iterable[Region]) -> None:
        """Decide about a unit."""
        if self._of_region is not None:
            self._trained[unit.key] = self.classes(kept)
            self._held |= self.classes(held)

    def best(self, unit: _Unit, cuts: Iterable[_Cut], *, whatever: bool = False) -> _Cut:
        """The cut that costs training fewest classes and brings most to the held-out part, and earlier ones if equal.

        A cut that costs a class is not made, unless `whatever`.
        """
        best: tuple[tuple[int, int], _Cut] | None = None
        for kept, held in cuts:
            found = (self.loses(unit, kept), -len(self.classes(held) - self._held)), (kept, held)
            if best is None or found[0] < best[0]:
                best = found
            if self._of_region is None:
                break
        if best is None or not best[1][1] or (best[0][0] and not whatever):
            return unit.whole(), []
        self.take(unit, *best[1])
        return best[1]


def natural_key(text: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key that orders `a2` before `a10`."""
    parts = re.split(r"(\d+)", text)
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in parts if part)


def _units(images: Iterable[SplitImage], usable: _Usable, *, numbered: bool) -> list[_Unit]:
    """Everything that has a usable section, in natural order."""
    series: dict[tuple[str, tuple[int, int]], list[_Family]] = {}
    units = []
    for family in _families(images):
        depth, height, width = family.lead.shape_ZYX
        if depth == 1:
            series.setdefault((family.lead.series_group, (height, width)), []).append(family)
        elif depth > 1:
            units.append(_unit([family], usable))
    for members in series.values():
        # Not by the store's names, from which long ones lost their end, and with it their number.
        ordered = sorted(members, key=lambda family: _physical_order(family.lead))
        unit = _unit(ordered, usable)
        units.append(_spaced(unit, ordered) if numbered else unit)
    return sorted((unit for unit in units if unit.usable), key=lambda unit: natural_key(unit.key))


def _spaced(unit: _Unit, members: Sequence[_Family]) -> _Unit:
    """A series with an empty section for every number that its file names skip; as it is where they do not count.

    members: in the order of the unit's sections.
    """
    numbers = [last_number(Path(family.lead.source_path)) for family in members]
    known = [number for number in numbers if number is not None]
    if len(known) < len(numbers) or any(a >= b for a, b in itertools.pairwise(known)):
        return unit
    if known[-1] - known[0] >= _MOST_SPACE * len(known):
        return unit
    places = dict(zip(known, unit.sections, strict=True))
    return replace(unit, sections=tuple(places.get(number, ()) for number in range(known[0], known[-1] + 1)))


def _unit(families: Sequence[_Family], usable: _Usable) -> _Unit:
    """One stack, or single images in their physical order."""

    def places(images: Iterable[SplitImage], sections: Iterable[int]) -> tuple[_Place, ...]:
        found = [(image.name, z) for z in sections for image in images]
        return tuple((name, z) for name, z in found if usable is None or z in usable.get(name, ()))

    first = families[0].lead
    return _Unit(
        first.name,
        tuple(places(family.alike, (z,)) for family in families for z in range(first.shape_ZYX[0])),
        tuple(p for family in families for one in family.others for p in places([one], range(one.shape_ZYX[0]))),
        first.shape_ZYX[1:],
        first.pixel_nm[0],
    )


def _families(images: Iterable[SplitImage]) -> list[_Family]:
    """Images that come from one place or have one content, whichever channel was taken, together."""
    found: dict[tuple[str, str, str], list[SplitImage]] = {}
    for image in images:
        members = [image]
        for key in _relations(image):
            members += [one for one in found.get(key, ()) if one not in members]
        found |= {key: members for one in members for key in _relations(one)}
    return [_family(members) for members in {id(members): members for members in found.values()}.values()]


def _relations(image: SplitImage) -> list[tuple[str, str, str]]:
    """What images that may show the same have in common: place, content of the file, pixels; the place comes first."""
    pixels = [("pixels", image.pixels_hash, "")] if image.pixels_hash else []
    return [
        ("place", image.source_path, image.source_series),
        ("content", image.sha256, image.source_series),
        *pixels,
    ]


def _family(members: Iterable[SplitImage]) -> _Family:
    """The last version of each file may stand for all; of several the first in order, so that a series keeps to one."""
    ordered = sorted(members, key=_physical_order)
    latest = {_relations(one)[0]: one for one in sorted(ordered, key=lambda one: one.source_mtime_ns)}
    lead = min(latest.values(), key=_physical_order)
    alike = tuple(one for one in ordered if one.shape_ZYX == lead.shape_ZYX)
    return _Family(lead, alike, tuple(one for one in ordered if one.shape_ZYX != lead.shape_ZYX))


def _physical_order(image: SplitImage) -> tuple[object, ...]:
    return natural_key(image.source_path), natural_key(image.source_series), natural_key(image.name)


def _gap_sections(unit: _Unit) -> int:
    """Sections dropped beside a held-out block: `GAP_NM` of material, but never more than a tenth of a short stack."""
    wanted = math.ceil(GAP_NM / unit.thickness_nm) if unit.thickness_nm else GAP_SECTIONS
    return max(1, min(wanted, len(unit.usable) // 10))


def _section_cuts(unit: _Unit, count: int, gap: int, seed: int) -> Iterator[_Cut]:
    """Ways to hold out `count` usable sections: at the end that the seed chooses, at the other one, and inside.

    Either part of a cut may turn out empty.
    """
    numbers = unit.usable
    if not 1 <= count < len(numbers):
        return
    last = len(numbers) - count
    ends = [0, last] if _draw(seed, unit.key) < 0.5 else [last, 0]
    inside = [round((k + 0.5) * last / _PLACES) for k in range(_PLACES)]
    for first in dict.fromkeys([*ends, *inside]):
        held = numbers[first : first + count]
        kept = [number for number in numbers if number > held[-1] + gap or number < held[0] - gap]
        yield unit.regions(kept), unit.regions(held)


def _any_cuts(unit: _Unit, fraction: float, seed: int) -> Iterator[_Cut]:
    """Ways to divide the only data there is: sections when there are at least three, else rows; none when tiny."""
    count = len(unit.usable)
    if count >= 3:
        yield from _section_cuts(unit, max(1, min(round(fraction * count), count - 2)), 1, seed)
        return
    height = unit.shape_YX[0]
    rows = round(max(fraction, LEAST_STRIP) * height)
    gap = min(GAP_ROWS, max(1, height // 10))
    if rows < 1 or height - rows - gap < 1:
        return
    last = height - rows
    ends = [0, last] if _draw(seed, unit.key) < 0.5 else [last, 0]
    inside = [round((k + 0.5) * last / _PLACES) for k in range(_PLACES)]
    regions = unit.regions(unit.usable)
    for first in dict.fromkeys([*ends, *inside]):
        strips = [(0, first - gap), (first + rows + gap, height)]
        kept = [Region(r.name, r.z0, r.z1, y0, y1) for r in regions for y0, y1 in strips if y1 > y0]
        yield kept, [Region(r.name, r.z0, r.z1, first, first + rows) for r in regions]


def _choose_whole(units: list[_Unit], fraction: float, seed: int, balance: _Balance, *, needed: bool) -> list[_Unit]:
    """Whole units in the order that the seed gives, as close to the share as they come; at least one if `needed`.

    Units that bring a missing class come first, up to half of the data; no unit is taken that has the last of a class.
    """
    if len(units) < _FEWEST_WHOLE:
        return []
    total = sum(unit.weight for unit in units)
    target = fraction * total
    chosen: list[_Unit] = []
    shuffled = sorted(units, key=lambda unit: _draw(seed, unit.key))

    def free(unit: _Unit) -> bool:
        return unit not in chosen and len(chosen) < len(units) - 1 and not balance.loses(unit, [])

    def choose(unit: _Unit) -> None:
        balance.take(unit, [], unit.whole())
        chosen.append(unit)

    for number in balance.missing:
        taken = sum(unit.weight for unit in chosen)
        bringing = [unit for unit in shuffled if free(unit) and number in balance.classes(unit.whole())]
        if number in balance.missing and bringing and taken + bringing[0].weight <= total / 2:
            choose(bringing[0])
    for unit in shuffled:
        taken = sum(one.weight for one in chosen)
        if free(unit) and abs(target - taken - unit.weight) < abs(target - taken):
            choose(unit)
    if not chosen and needed:
        possible = [unit for unit in shuffled if free(unit)]
        if possible:
            choose(min(possible, key=lambda unit: unit.weight))
    return chosen


def _as_regions(places: Iterable[_Place]) -> list[Region]:
    """Consecutive sections of one image become one region."""
    regions: dict[str, list[Region]] = {}
    for name, z in places:
        mine = regions.setdefault(name, [])
        if mine and mine[-1].z1 == z:
            mine[-1] = Region(name, mine[-1].z0, z + 1)
        else:
            mine.append(Region(name, z, z + 1))
    return [region for mine in regions.values() for region in mine]


def _draw(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def _region_order(region: Region) -> tuple[object, ...]:
    return natural_key(region.name), region.z0, region.y0 or 0
