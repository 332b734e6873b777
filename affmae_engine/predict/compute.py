"""Class probabilities of any window of a stack of planes, computed from the part of the input that reaches into it.

A window's values depend on the planes and on the tiling alone, not on how a volume is cut into windows: tiles have
fixed places in a plane, and their weights sum to 1 at every pixel. A window is computed from all tiles that touch it.

The same code runs on a CPU and on a GPU: planes are cut into tiles on the device, a batch at a time, and tiles are
added to the sums of the window in their order. Memory: the window's sums (4 bytes for each class and pixel), its planes
with a margin of a tile, and one batch in the network.

Axes: B tiles of a batch, C classes, T edge of a tile, Z Y X window, H W planes as they are held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from affmae_engine.data.normalise import IntensityMap
from affmae_engine.predict.network import TileNetwork
from affmae_engine.predict.rescale import AxisResampling
from affmae_engine.predict.tiling import Axis, reflect
from affmae_engine.runtime.memory import in_smaller_batches
from affmae_kernels.tile_blending import blend_tiles
from affmae_kernels.training_crops import equalize

Range = tuple[int, int]
"""First pixel and one past the last."""


class Readable(Protocol):
    """Where planes come from: a `Source`, or anything else that is read by windows."""

    def read(self, z: slice, y: slice, x: slice, /) -> np.ndarray: ...


@dataclass(frozen=True)
class AxisGeometry:
    """One axis of the planes: its pixels in the input, and the tiles on its pixels as the network sees them.

    length: of the input. inner: as the network sees it; another number where the axis is resampled.
    """

    length: int
    inner: int
    tile: int
    overlap: float

    @cached_property
    def tiles(self) -> Axis:
        """All tiles along the axis."""
        return Axis(self.inner, self.tile, self.overlap)

    @cached_property
    def forth(self) -> AxisResampling | None:
        """From the input's pixels to the network's; None where they are the same."""
        return None if self.inner == self.length else AxisResampling(self.length, self.inner)

    @cached_property
    def back(self) -> AxisResampling | None:
        """From the network's pixels to the input's."""
        return None if self.inner == self.length else AxisResampling(self.inner, self.length)

    @cache  # noqa: B019 (a handful of ranges, asked for again and again)
    def tile_count(self, first: int, last: int) -> int:
        """Tiles that the input's pixels first..last-1 need."""
        return len(self.window(first, last).numbers)

    def window(self, first: int, last: int) -> AxisWindow:
        """What the input's pixels first..last-1 need."""
        inner = (first, last) if self.back is None else self.back.needed(first, last)
        numbers = self.tiles.covering(*inner)
        low, high = self.tiles.starts[numbers[0]], self.tiles.starts[numbers[-1]] + self.tile
        position = reflect(np.arange(low, high), self.inner)
        held = int(position.min()), int(position.max()) + 1
        source = held if self.forth is None else self.forth.needed(*held)
        return AxisWindow(self, (first, last), inner, numbers, low, position - held[0], held, source)


@dataclass(frozen=True)
class AxisWindow:
    """A window along one axis.

    outer: its pixels in the input. inner: the pixels that the network sees under them. numbers: of the tiles that reach
    into these. low: first pixel of the first tile. position: where the pixels of the tiles, from `low` on, are found in
    the held ones (reflected at the ends of the image). held: pixels that the network sees under the tiles. source: the
    input's pixels under those.
    """

    axis: AxisGeometry
    outer: Range
    inner: Range
    numbers: range
    low: int
    position: np.ndarray
    held: Range
    source: Range


@dataclass(frozen=True)
class PlaneGeometry:
    """Both axes of the planes."""

    y: AxisGeometry
    x: AxisGeometry

    @classmethod
    def of(cls, shape: tuple[int, int], inner: tuple[int, int], tile: int, overlap: float) -> PlaneGeometry:
        """Of planes of `shape` that the network sees as `inner`."""
        return cls(*(AxisGeometry(n, m, tile, overlap) for n, m in zip(shape, inner, strict=True)))

    def tile_count(self, y: Range, x: Range) -> int:
        """Tiles that one plane of a window takes."""
        return self.y.tile_count(*y) * self.x.tile_count(*x)


@dataclass(frozen=True)
class WindowInput:
    """What a window is computed from.

    planes_ZHW: normalized float32 on the host, at the network's pixel size. core_ZYX: the window itself, as it was
    read; None where the pixels that were read do not include all of it.
    """

    planes_ZHW: Tensor
    y: AxisWindow
    x: AxisWindow
    core_ZYX: np.ndarray | None = None

    @property
    def tile_count(self) -> int:
        """Tiles of all planes."""
        return len(self.planes_ZHW) * len(self.y.numbers) * len(self.x.numbers)

    def pinned(self) -> WindowInput:
        """The same with planes in memory from which a GPU copies while the host goes on."""
        return replace(self, planes_ZHW=self.planes_ZHW.pin_memory())


def read_window(
    source: Readable, geometry: PlaneGeometry, intensity: IntensityMap, z: Range, y: Range, x: Range
) -> WindowInput:
    """Read what the window z, y, x of `source` is computed from.

    Raises:
        InputError, ResourceError: see `Source.read`.
    """
    in_y, in_x = geometry.y.window(*y), geometry.x.window(*x)
    block_ZHW = source.read(slice(*z), slice(*in_y.source), slice(*in_x.source))
    planes_ZHW = torch.from_numpy(intensity.standardise(block_ZHW))
    for dim, window in ((1, in_y), (2, in_x)):
        if window.axis.forth is not None:
            planes_ZHW = window.axis.forth.apply(planes_ZHW, dim, window.source, window.held)
    (y0, y1), (x0, x1) = in_y.source, in_x.source
    core_ZYX = None
    if y0 <= y[0] and y[1] <= y1 and x0 <= x[0] and x[1] <= x1:
        core_ZYX = block_ZHW[:, y[0] - y0 : y[1] - y0, x[0] - x0 : x[1] - x0]
    return WindowInput(planes_ZHW.contiguous(), in_y, in_x, core_ZYX)


def window_probabilities(
    network: TileNetwork,
    window: WindowInput,
    batch_size: int,
    *,
    intensity: IntensityMap,
    on_tiles: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Class probabilities of a window of the input, float32 [Z, C, Y, X] on the network's device.

    Args:
        batch_size: tiles of a forward pass. The last batch is filled up where passes are recorded.
        intensity: whose CLAHE, if any, is applied tile by tile.
        on_tiles: called with the number of tiles just done.
    """
    device, (y, x) = network.device, (window.y, window.x)
    planes_ZHW = window.planes_ZHW.to(device, non_blocking=True)
    sums_ZCYX = torch.zeros(
        len(planes_ZHW), network.classes, y.inner[1] - y.inner[0], x.inner[1] - x.inner[0], device=device
    )
    # Where every tile is: the held rows and columns that it takes [N, T], its first pixel in the sums, its weights.
    tiles_N4 = torch.from_numpy(_tiles(window, batch_size if network.padded else 1))
    z_N, number_y, number_x, counts_N = tiles_N4.unbind(1)
    start_y, start_x = (torch.tensor(axis.axis.tiles.starts)[number] for axis, number in ((y, number_y), (x, number_x)))
    offset_T = torch.arange(y.axis.tile)
    rows_NT, columns_NT = (
        torch.from_numpy(axis.position)[start[:, None] - axis.low + offset_T].to(device)
        for axis, start in ((y, start_y), (x, start_x))
    )
    origin_N3 = torch.stack([z_N.where(counts_N > 0, -1), start_y - y.inner[0], start_x - x.inner[0]], 1)
    origin_N3 = origin_N3.int().to(device)
    weight_y, weight_x = (axis.axis.tiles.weights[number].to(device) for axis, number in ((y, number_y), (x, number_x)))
    section_N = z_N.to(device)
    for first in range(0, len(tiles_N4), batch_size):
        batch = slice(first, first + batch_size)
        section_B, rows_BT, columns_BT = section_N[batch], rows_NT[batch], columns_NT[batch]
        tiles_BTT = planes_ZHW[section_B[:, None, None], rows_BT[:, :, None], columns_BT[:, None, :]]
        if intensity.clahe and intensity.high > intensity.low:
            limits = (torch.full((len(tiles_BTT),), limit, device=device) for limit in (intensity.low, intensity.high))
            tiles_BTT = equalize(tiles_BTT, *limits)
        probabilities_BCTT = network.probabilities(tiles_BTT)
        blend_tiles(sums_ZCYX, probabilities_BCTT, weight_y[batch], weight_x[batch], origin_N3[batch])
        on_tiles(int(counts_N[batch].sum()))
    for dim, axis in ((2, y), (3, x)):
        if axis.axis.back is not None:
            sums_ZCYX = axis.axis.back.apply(sums_ZCYX, dim, axis.inner, axis.outer)
    return sums_ZCYX


def _tiles(window: WindowInput, multiple: int) -> np.ndarray:
    """Tiles in their order, row by row and plane by plane: int64 [N, 4] of plane, number along y and along x, and 1.

    They are filled up to a multiple with repetitions of the last one that have 0 in place of 1.
    """
    numbers = np.meshgrid(range(len(window.planes_ZHW)), window.y.numbers, window.x.numbers, indexing="ij")
    tiles_N4 = np.stack([*(part.ravel() for part in numbers), np.ones(window.tile_count)], 1).astype(np.int64)
    missing = -len(tiles_N4) % multiple
    return np.concatenate([tiles_N4, np.repeat(tiles_N4[-1:] * [1, 1, 1, 0], missing, 0)])


BAND_BYTES = 1 << 28
"""Memory of the class probabilities of a band, about; it has `BAND_ROWS` rows at most."""
BAND_ROWS = 512, 2048
"""Fewest and most rows of a band: the tiles at its edges are computed for its neighbor too."""


def bands(
    network: TileNetwork,
    source: Readable,
    depth: int,
    geometry: PlaneGeometry,
    intensity: IntensityMap,
    batch_size: int,
) -> Iterator[tuple[int, int, Tensor]]:
    """Class probabilities of a stack, a band of rows at a time.

    Args:
        depth: planes of the stack.
        batch_size: tiles of a forward pass; halved as often as memory runs out.

    Yields:
        section, first row, and the probabilities, float32 [C, R, X] on the network's device.
    """
    height, width = geometry.y.length, geometry.x.length
    fitting = BAND_BYTES // (4 * network.classes * width)
    rows = min(max(fitting, BAND_ROWS[0]), BAND_ROWS[1])
    for z in range(depth):
        for first in range(0, height, rows):
            last = min(first + rows, height)
            window = read_window(source, geometry, intensity, (z, z + 1), (first, last), (0, width))

            def compute(size: int, window: WindowInput = window) -> Tensor:
                return window_probabilities(network, window, size, intensity=intensity)

            yield z, first, in_smaller_batches(compute, batch_size, network.device)[0]


class _InMemory:
    """A plane [Y, X] as a stack of one section."""

    def __init__(self, image_YX: np.ndarray) -> None:
        self._image_YX = image_YX

    def read(self, z: slice, y: slice, x: slice) -> np.ndarray:
        """The window of it."""
        return self._image_YX[None, y, x][z]


def predicted_classes(
    network: TileNetwork,
    image_YX: np.ndarray,
    intensity: IntensityMap,
    *,
    tile: int,
    overlap: float,
    batch_size: int,
) -> np.ndarray:
    """The classes of a whole plane, int64 [Y, X], as `affmae predict` finds them, without resampling.

    Args:
        image_YX: intensities as they are stored.
        intensity: their normalization.
        batch_size: see `bands`.
    """
    shape = image_YX.shape[0], image_YX.shape[1]
    geometry, classes_YX = PlaneGeometry.of(shape, shape, tile, overlap), np.empty(shape, np.int64)
    for _, first, values_CRX in bands(network, _InMemory(image_YX), 1, geometry, intensity, batch_size):
        classes_RX = values_CRX.argmax(dim=0).cpu().numpy()
        classes_YX[first : first + len(classes_RX)] = classes_RX
    return classes_YX
