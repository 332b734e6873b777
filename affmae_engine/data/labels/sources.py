"""The forms that labels come in, each behind the `Source` contract: class maps as (z, y, x) integers.

A binary mask per class (folders or channels) becomes one class map, single pictures become a stack or label some
sections of one, a section of a stack becomes a picture, colors become numbers, and `Relabeled` turns whatever numbers
there are into classes. Each reads through to its parts, so memory stays bounded by the block that is asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from affmae_engine.data.padding import padding_mask
from affmae_engine.data.readers import Source

Range = tuple[int, int]


class _Composed(Source):
    """A source made of others, which open and close their own files."""

    def __init__(self, info: Any, parts: Sequence[Source]) -> None:
        super().__init__(info)
        self.parts = tuple(parts)

    def _open(self) -> tuple[Source, ...]:
        return self.parts

    def _close(self, handle: Any) -> None:
        for part in self.parts:
            part.close()


class ClassMasks(_Composed):
    """Binary masks, one per class: 0 where none is set, k + 1 where mask k is (the later one where several are)."""

    def __init__(self, masks: Sequence[Source]) -> None:
        super().__init__(replace(masks[0].info, dtype=np.dtype(np.uint8)), masks)

    def reordered(self, order: Sequence[int]) -> ClassMasks:
        """The same masks with another numbering: class k + 1 is mask `order[k]`."""
        return ClassMasks([self.parts[k] for k in order])

    def _read(self, handle: Any, z: Range, y: Range, x: Range) -> np.ndarray:
        classes = np.zeros((z[1] - z[0], y[1] - y[0], x[1] - x[0]), np.uint8)
        for number, mask in enumerate(handle, start=1):
            classes[mask.read(slice(*z), slice(*y), slice(*x)) != 0] = number
        return classes


class EmptyMasks(ClassMasks):
    """Channels of which none has a value anywhere: binary masks of nothing, or a map of background saved as colour."""

    def as_masks(self, count: int) -> ClassMasks:
        """The same as `count` binary masks, however many channels there are."""
        return ClassMasks(self.parts[:1] * count)

    def as_map(self) -> Source:
        """The same as a class map."""
        return self.parts[0]


class Section(_Composed):
    """One section of a stack as a picture."""

    def __init__(self, stack: Source, z: int) -> None:
        info = stack.info
        name = f"{info.name}[{z}]"
        super().__init__(replace(info, shape_ZYX=(1, *info.shape_ZYX[1:]), name=name), (stack,))
        self.z = z

    def _read(self, handle: Any, z: Range, y: Range, x: Range) -> np.ndarray:
        block: np.ndarray = handle[0].read(slice(self.z, self.z + 1), slice(*y), slice(*x))
        return block[: z[1] - z[0]]


class LabeledSections(_Composed):
    """Label pictures of some sections of a stack; the other sections read as 0.

    Args:
        pictures: the picture of each labeled section, by its number counted from 0.
        depth: sections of the stack.
    """

    def __init__(self, pictures: Mapping[int, Source], depth: int) -> None:
        first = next(iter(pictures.values())).info
        dtype = max(picture.info.dtype for picture in pictures.values())
        super().__init__(replace(first, shape_ZYX=(depth, *first.shape_ZYX[1:]), dtype=dtype), tuple(pictures.values()))
        self.labeled = tuple(pictures)

    def _read(self, handle: Any, z: Range, y: Range, x: Range) -> np.ndarray:
        block = np.zeros((z[1] - z[0], y[1] - y[0], x[1] - x[0]), self.info.dtype)
        for number, picture in zip(self.labeled, handle, strict=True):
            if z[0] <= number < z[1]:
                block[number - z[0]] = picture.read(slice(0, 1), slice(*y), slice(*x))[0]
        return block


class ColorMap(_Composed):
    """Labels drawn in colors: red, green and blue channels as one number, red * 65536 + green * 256 + blue."""

    def __init__(self, channels: Sequence[Source]) -> None:
        super().__init__(replace(channels[0].info, dtype=np.dtype(np.uint32)), channels[:3])

    def _read(self, handle: Any, z: Range, y: Range, x: Range) -> np.ndarray:
        red, green, blue = (part.read(slice(*z), slice(*y), slice(*x)).astype(np.uint32) for part in handle)
        return (red << 16) | (green << 8) | blue


class Relabeled(_Composed):
    """A label map with other numbers, and with regions that are ignored.

    Args:
        labels: the map.
        table: new number (0 to 65535) of every number that occurs. others: new number of all that are not in it.
        ignored_sections: sections that become `ignore` as a whole.
        image: where given, padding of the image (see `data.padding`) becomes `ignore` as well.
        ignore: number of an ignored pixel; needed with `ignored_sections` and `image`.
    """

    def __init__(
        self,
        labels: Source,
        table: Mapping[int, int],
        *,
        others: int = 0,
        ignored_sections: Collection[int] = (),
        image: Source | None = None,
        ignore: int | None = None,
    ) -> None:
        largest = max([*table.values(), others, ignore or 0])
        parts = (labels,) if image is None else (labels, image)
        super().__init__(replace(labels.info, dtype=np.min_scalar_type(largest)), parts)
        self._old = np.array(sorted(table), np.int64)
        self._new = np.array([table[old] for old in sorted(table)], self.info.dtype)
        self._others, self._ignore = others, ignore
        self._ignored_sections = frozenset(ignored_sections)

    def _read(self, handle: Any, z: Range, y: Range, x: Range) -> np.ndarray:
        raw = handle[0].read(slice(*z), slice(*y), slice(*x))
        place = np.minimum(np.searchsorted(self._old, raw), len(self._old) - 1)
        classes = np.where(self._old[place] == raw, self._new[place], self.info.dtype.type(self._others))
        for number in self._ignored_sections.intersection(range(*z)):
            classes[number - z[0]] = self._ignore
        if len(handle) > 1:
            for row, number in enumerate(range(*z)):
                section = handle[1].read(slice(number, number + 1), slice(None), slice(None))[0]
                classes[row][padding_mask(section)[slice(*y), slice(*x)]] = self._ignore
        return classes
