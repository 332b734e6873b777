"""The forms that labels come in, each behind the `Source` contract: class maps as (z, y, x) integers.

A binary mask per class (folders or channels) becomes one class map, single pictures become a stack, a section of a
stack becomes a picture, and a mask stored as 0 and 255 becomes 0 and 1. Each reads through to its parts, so memory
stays bounded by the block that is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

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


class Stacked(_Composed):
    """Single sections of equal size as one stack, in the order given."""

    def __init__(self, sections: Sequence[Source]) -> None:
        first = sections[0].info
        shape = (len(sections), *first.shape_ZYX[1:])
        super().__init__(replace(first, shape_ZYX=shape, dtype=max(s.info.dtype for s in sections)), sections)

    def _read(self, handle: Any, z: Range, y: Range, x: Range) -> np.ndarray:
        block = np.empty((z[1] - z[0], y[1] - y[0], x[1] - x[0]), self.info.dtype)
        for row, section in enumerate(handle[slice(*z)]):
            block[row] = section.read(slice(0, 1), slice(*y), slice(*x))[0]
        return block


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


class Renumbered(_Composed):
    """A label map with other numbers.

    Args:
        labels: the map.
        table: new number (0 to 255) of every number that occurs.
    """

    def __init__(self, labels: Source, table: Mapping[int, int]) -> None:
        super().__init__(replace(labels.info, dtype=np.dtype(np.uint8)), (labels,))
        self._table = np.zeros(max(table) + 1, np.uint8)
        self._table[list(table)] = list(table.values())

    def _read(self, handle: Any, z: Range, y: Range, x: Range) -> np.ndarray:
        return self._table[handle[0].read(slice(*z), slice(*y), slice(*x))]
