"""Tiled inference on planes: rows in, bands of finished class probabilities out, memory of one band.

Tiles of several planes share a batch, so that small sections keep a device busy too. Softmax comes before blending:
averaging probabilities is bounded and does not let one tile's large logits win. Tiles arrive row by row; once a row of
tiles is done, the pixel rows that no later tile covers are final and leave as a `Band`.

Memory, whatever the height of a plane and however many planes follow: the accumulator C * T * W floats, one padded
row of tiles T * (W + 2T) floats, and B tiles in the network, with 2B more read ahead for an accelerator (C classes,
T tile edge, W plane width, B batch). A plane 100,000 pixels wide with T = 512 and 5 classes takes 1.0 GB + 0.2 GB.

Axes: B tiles, C classes, T tile edge, R rows of a band, Y X plane.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from affmae_engine.errors import ResourceError
from affmae_engine.predict.ahead import ahead
from affmae_engine.predict.tiling import Axis
from affmae_engine.runtime.memory import free_memory, out_of_memory

ACCUMULATE_ON_DEVICE_BYTES = 1 << 30
"""Largest accumulator kept on an accelerator; a larger one lives in host memory."""


class Plane(Protocol):
    """A 2-D image of any size whose rows can be read; normalised float32."""

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""

    def rows(self, first: int, last: int, /) -> np.ndarray:
        """Rows first..last-1 as float32 [last - first, X]; requests move downwards, overlapping."""


@dataclass(frozen=True)
class ArrayPlane:
    """A plane that is in memory already; float32 [Y, X]."""

    image_YX: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.image_YX.shape[0], self.image_YX.shape[1]

    def rows(self, first: int, last: int, /) -> np.ndarray:
        """Rows first..last-1."""
        return self.image_YX[first:last]


@dataclass(frozen=True)
class Tiling:
    """Edge of a tile in pixels, and the share of it that a neighbour covers too."""

    tile: int
    overlap: float = 0.5

    def axes(self, shape: tuple[int, int]) -> tuple[Axis, Axis]:
        """The tiles of a plane along y and x."""
        return Axis(shape[0], self.tile, self.overlap), Axis(shape[1], self.tile, self.overlap)

    def count(self, shape: tuple[int, int]) -> int:
        """Tiles of a plane."""
        y, x = self.axes(shape)
        return len(y.starts) * len(x.starts)


def working_bytes(classes: int, tile: int, width: int) -> int:
    """Memory that planes of `width` pixels take on the host (see above), in bytes."""
    return 4 * (classes * tile * width + tile * (width + 2 * tile))


@dataclass(frozen=True)
class Band:
    """Finished rows of a plane: probabilities float32 [C, R, X] of rows first_row..first_row+R-1."""

    plane: int
    first_row: int
    probabilities_CRX: Tensor


class TileRunner:
    """A network on a device that turns tiles into class probabilities.

    A batch that does not fit the device's memory is halved, for this batch and for all later ones (`batch_size`
    says what is in use; `on_smaller_batch` is called with it).

    Args:
        model: returns {"logits": [B, C, T, T]} in eval mode; it is used as it is, on `device` already.
        classes: C.
        autocast: dtype of the autocast context; None opens none (one opened by the caller stays in force).
        excluded: classes that are never predicted (an ignored label that has its own value).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        classes: int,
        batch_size: int,
        device: torch.device,
        autocast: torch.dtype | None = None,
        excluded: Sequence[int] = (),
        on_smaller_batch: Callable[[int], None] | None = None,
    ) -> None:
        self.model = model
        self.classes = classes
        self.batch_size = batch_size
        self.device = device
        self._autocast = autocast
        self._excluded = [index for index in excluded if 0 <= index < classes]
        self._on_smaller_batch = on_smaller_batch

    def probabilities(self, tiles_BTT: Tensor) -> Tensor:
        """Class probabilities, float32 [B, C, T, T] on the device.

        Raises:
            ResourceError: not even one tile fits the device's memory.
        """
        parts: list[Tensor] = []
        done = 0
        while done < len(tiles_BTT):
            part = self._try(tiles_BTT[done : done + self.batch_size])
            # The retry is outside the except block: an exception in flight keeps the failed pass's memory alive.
            if part is None:
                self._halve(tiles_BTT.shape[-1])
                continue
            parts.append(part)
            done += len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _try(self, tiles_BTT: Tensor) -> Tensor | None:
        try:
            return self._forward(tiles_BTT)
        except Exception as error:
            if out_of_memory(error) is None:
                raise
            return None

    @torch.no_grad()
    def _forward(self, tiles_BTT: Tensor) -> Tensor:
        image_BCHW = tiles_BTT.to(self.device, non_blocking=True)[:, None]
        context: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self._autocast is not None:
            context = torch.autocast(self.device.type, dtype=self._autocast)
        with context:
            logits_BCTT = self.model(image_BCHW)["logits"]
        logits_BCTT = logits_BCTT.float()
        if self._excluded:
            logits_BCTT[:, self._excluded] = -torch.inf
        return logits_BCTT.softmax(dim=1)

    def _halve(self, tile: int) -> None:
        free_memory(self.device)
        if self.batch_size == 1:
            raise ResourceError(
                f"one tile of {tile} x {tile} pixels does not fit the memory of {self.device}",
                "use a smaller --tile, close other programs on the device, or use --device cpu",
            )
        self.batch_size = max(1, self.batch_size // 2)
        if self._on_smaller_batch is not None:
            self._on_smaller_batch(self.batch_size)


@dataclass
class _Canvas:
    """The rows of one plane that are still open: sums of weighted probabilities."""

    index: int
    y: Axis
    x: Axis
    classes: int
    device: torch.device
    top: int = 0
    sums_CTX: Tensor = field(init=False)
    weights: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        size = (self.classes, self.y.tile, self.x.length)
        on_device = 4 * size[0] * size[1] * size[2] <= ACCUMULATE_ON_DEVICE_BYTES
        home = self.device if on_device else torch.device("cpu")
        self.sums_CTX = torch.zeros(size, device=home)
        self.weights = self.y.weights.to(home), self.x.weights.to(home)

    def add(self, row: int, column: int, tile_CTT: Tensor) -> None:
        """Add the tile at (row, column) of the grid."""
        (y0, y1), (x0, x1) = self.y.inside(row), self.x.inside(column)
        sy, sx = self.y.starts[row], self.x.starts[column]
        weight_y = self.weights[0][row, y0 - sy : y1 - sy, None]
        weight_x = self.weights[1][column, x0 - sx : x1 - sx]
        piece_CRX = tile_CTT[:, y0 - sy : y1 - sy, x0 - sx : x1 - sx].to(self.sums_CTX.device)
        self.sums_CTX[:, y0 - self.top : y1 - self.top, x0:x1].addcmul_(piece_CRX, weight_y * weight_x)

    def close(self, row: int) -> Band | None:
        """The rows that are final after the last tile of a row of tiles."""
        first, count = self.top, self.y.finished(row) - self.top
        if count <= 0:
            return None
        band = Band(self.index, first, self.sums_CTX[:, :count].clone())
        self.sums_CTX = torch.cat([self.sums_CTX[:, count:], torch.zeros_like(self.sums_CTX[:, :count])], dim=1)
        self.top += count
        return band


@dataclass(frozen=True)
class _Job:
    canvas: _Canvas
    row: int
    column: int
    tile_TT: np.ndarray

    @property
    def ends_row(self) -> bool:
        return self.column + 1 == len(self.canvas.x.starts)


def blend(
    planes: Iterable[Plane],
    runner: TileRunner,
    tiling: Tiling,
    *,
    prepare: Callable[[np.ndarray], np.ndarray] | None = None,
    on_tiles: Callable[[int], None] | None = None,
    start: tuple[int, int] = (0, 0),
) -> Iterator[Band]:
    """Class probabilities of planes, band by band, in order: all rows of plane 0, then of plane 1, ...

    Args:
        planes: read lazily, one after the other; they may differ in size.
        prepare: applied to every tile [T, T] before the network, for what must see just a tile (CLAHE).
        on_tiles: called with the number of tiles just done.
        start: number of the first of `planes`, and the row of tiles in it to begin with (see `tiling.restart`).

    Yields:
        bands that together hold every row of every plane exactly once, on the device that holds the accumulator.
        After a `start` within a plane, rows that earlier tiles reach too hold only a part of their sum.
    """
    jobs = _jobs(planes, runner, tiling, prepare or (lambda tile: tile), start)
    if runner.device.type != "cpu":  # on a CPU, reading ahead would only take cores from the network
        jobs = ahead(jobs, 2 * runner.batch_size)
    while batch := list(islice(jobs, runner.batch_size)):
        tiles_BTT = torch.from_numpy(np.stack([job.tile_TT for job in batch]))
        probabilities_BCTT = runner.probabilities(tiles_BTT)
        if on_tiles is not None:
            on_tiles(len(batch))
        for job, tile_CTT in zip(batch, probabilities_BCTT, strict=True):
            job.canvas.add(job.row, job.column, tile_CTT)
            if job.ends_row and (band := job.canvas.close(job.row)) is not None:
                yield band


def predict_plane(
    model: nn.Module,
    plane: np.ndarray | Plane,
    *,
    classes: int,
    tile: int,
    overlap: float = 0.5,
    batch_size: int = 4,
    device: torch.device,
    autocast: torch.dtype | None = None,
    prepare: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Tensor:
    """Class probabilities of one whole plane by tiled inference, in memory, for a plane that has room there.

    Args:
        model: on `device`; run in eval mode, its mode is restored.
        plane: normalised float32 [Y, X], or rows of one.
        autocast: dtype of an autocast context to open; None keeps the caller's.
        prepare: applied to every tile before the network (see `blend`).

    Returns:
        float32 [C, Y, X] on the CPU; sums to 1 over C.
    """
    source = ArrayPlane(np.ascontiguousarray(plane, np.float32)) if isinstance(plane, np.ndarray) else plane
    runner = TileRunner(model, classes=classes, batch_size=batch_size, device=device, autocast=autocast)
    result_CYX = torch.empty((classes, *source.shape))
    training = model.training
    model.eval()
    try:
        for band in blend([source], runner, Tiling(tile, overlap), prepare=prepare):
            rows = band.probabilities_CRX.shape[1]
            result_CYX[:, band.first_row : band.first_row + rows] = band.probabilities_CRX
    finally:
        model.train(training)
    return result_CYX


def _jobs(
    planes: Iterable[Plane],
    runner: TileRunner,
    tiling: Tiling,
    prepare: Callable[[np.ndarray], np.ndarray],
    start: tuple[int, int],
) -> Iterator[_Job]:
    for index, plane in enumerate(planes, start[0]):
        y, x = tiling.axes(plane.shape)
        begin = start[1] if index == start[0] else 0
        canvas = _Canvas(index, y, x, runner.classes, runner.device, top=y.inside(begin)[0])
        columns = x.sources(x.starts[0], x.starts[-1] + x.tile)
        for row, top in enumerate(y.starts[begin:], begin):
            wanted = y.sources(top, top + y.tile)
            first, last = int(wanted.min()), int(wanted.max()) + 1
            padded_TX = plane.rows(first, last)[wanted - first][:, columns]
            for column, left in enumerate(x.starts):
                offset = left - x.starts[0]
                yield _Job(canvas, row, column, prepare(padded_TX[:, offset : offset + x.tile]))
