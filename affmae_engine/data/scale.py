"""Pixel sizes against each other: one rule for when they differ, sentences with numbers, resampling of whole images.

Two pixel sizes differ when one is more than 15 % larger than the other. A network sees pixels, not nanometers: what it
learned at one size it recognizes badly at another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from affmae_engine.data.readers import PixelSize, Source

TOLERANCE = 1.15
"""Ratio of two pixel sizes from which they differ."""


def edge_nm(pixel_nm: PixelSize) -> float | None:
    """Edge of a square of the same area as a pixel in the plane, in nanometers; None when y or x is unknown."""
    _, y, x = pixel_nm
    return None if y is None or x is None else math.sqrt(y * x)


def differ(first_nm: float | None, second_nm: float | None) -> bool:
    """Whether two pixel edges are known and differ by more than `TOLERANCE`."""
    if first_nm is None or second_nm is None:
        return False
    return max(first_nm / second_nm, second_nm / first_nm) > TOLERANCE


def size_groups(sizes: Sequence[PixelSize]) -> list[tuple[float, int]]:
    """(smallest edge in nm, number of images) of each group of sizes that do not differ, from small to large."""
    groups: list[tuple[float, int]] = []
    for edge in sorted(edge for size in sizes if (edge := edge_nm(size)) is not None):
        if groups and not differ(groups[-1][0], edge):
            groups[-1] = groups[-1][0], groups[-1][1] + 1
        else:
            groups.append((edge, 1))
    return groups


def scale_warnings(sizes: Sequence[PixelSize], origin_nm: float | None = None) -> list[str]:
    """What to say about the pixel sizes of training images.

    Args:
        sizes: of the images.
        origin_nm: edge of a pixel that the weights were trained with; None: unknown, or there are no weights.

    Returns:
        a sentence for mixed sizes, or for one size that differs from that of the weights; empty when all is well.
    """
    groups = size_groups(sizes)
    if len(groups) > 1:
        counted = ", ".join(f"{edge:.4g} nm ({count} image{'s' if count > 1 else ''})" for edge, count in groups)
        weights = f"; the weights were trained at {origin_nm:.4g} nm" if origin_nm else ""
        return [f"the images have different pixel sizes: {counted}{weights}"]
    if groups and differ(groups[0][0], origin_nm):
        return [f"the weights were trained at {origin_nm:.4g} nm per pixel, these images have {groups[0][0]:.4g} nm"]
    return []


def common_edge_nm(sizes: Sequence[PixelSize], origin_nm: float | None) -> float | None:
    """The size that all images are brought to: that of the weights, otherwise the median; None when none is known."""
    known = sorted(edge for size in sizes if (edge := edge_nm(size)) is not None)
    return origin_nm or (known[len(known) // 2] if known else None)


class Rescaled(Source):
    """An image or label map at another pixel size; every section covers the same area as before.

    Images are resampled with Pillow's antialiased bilinear filter, a triangle as wide as the larger of the two pixels;
    labels take the number under the center of each new pixel.

    Args:
        source: image, or labels on the grid of `like`.
        target_nm: edge of the new pixels in y and x; z stays.
        like: the image whose pixel size and shape count.
        labels: take numbers instead of mixing them.
    """

    def __init__(self, source: Source, target_nm: float, *, like: Source, labels: bool = False) -> None:
        depth, height, width = like.info.shape_ZYX
        z_nm, y_nm, x_nm = like.info.pixel_nm
        assert y_nm is not None and x_nm is not None
        shape = (depth, max(1, round(height * y_nm / target_nm)), max(1, round(width * x_nm / target_nm)))
        note = f"resampled from {y_nm:.4g} x {x_nm:.4g} to {target_nm:.4g} nm"
        info = replace(
            source.info,
            shape_ZYX=shape,
            pixel_nm=(z_nm, y_nm * height / shape[1], x_nm * width / shape[2]),
            notes=(*source.info.notes, note),
        )
        super().__init__(info)
        self._source, self._labels = source, labels
        self._last: tuple[int, np.ndarray] | None = None

    _transient = (*Source._transient, "_last")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._last = None

    def _open(self) -> Source:
        return self._source

    def _close(self, handle: Source) -> None:
        handle.close()
        self._last = None

    def _read(self, handle: Source, z: tuple[int, int], y: tuple[int, int], x: tuple[int, int]) -> np.ndarray:
        return np.stack([self._section(handle, number)[slice(*y), slice(*x)] for number in range(*z)])

    def _section(self, handle: Source, number: int) -> np.ndarray:
        if self._last is None or self._last[0] != number:
            section_YX = handle.read(slice(number, number + 1), slice(None), slice(None))[0]
            self._last = number, self._resampled(section_YX)
        return self._last[1]

    def _resampled(self, section_YX: np.ndarray) -> np.ndarray:
        height, width = self.info.shape_ZYX[1:]
        if self._labels:
            rows, columns = (
                ((np.arange(new) + 0.5) * old / new).astype(np.intp)
                for old, new in zip(section_YX.shape, (height, width), strict=True)
            )
            return section_YX[np.ix_(rows, columns)]
        picture = Image.fromarray(section_YX.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
        values = np.asarray(picture)
        if self.info.dtype.kind in "ui":
            values = np.rint(values).clip(0, np.iinfo(self.info.dtype).max)
        return values.astype(self.info.dtype)
