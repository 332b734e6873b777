"""Prediction of arrays: class probabilities window by window, with the functions that predict files.

Axes: C classes, R rows of a window, Z Y X array.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from affmae_engine.arrays import ArraySource
from affmae_engine.data.statistics import measure
from affmae_engine.errors import ConfigError
from affmae_engine.predict.compute import PlaneGeometry, read_window, window_probabilities
from affmae_engine.predict.network import tile_too_large
from affmae_engine.predict.predictor import Predictor
from affmae_engine.predict.scale import choose_scale
from affmae_engine.runtime.memory import in_smaller_batches

WINDOW_ROWS = 2048
"""Rows of a section that are computed at a time."""


@dataclass(frozen=True)
class TileSettings:
    """Edge of a tile in pixels (None: the training image's), share of it that a neighbor covers too, tiles per pass."""

    tile: int | None
    overlap: float
    batch_size: int

    @classmethod
    def of(
        cls, predictor: Predictor, *, tile: int | None, overlap: float | None, batch_size: int | None
    ) -> TileSettings:
        """What was asked for, over what the model was configured with.

        Raises:
            ConfigError: values that cannot be used.
        """
        own = predictor.metadata.config.get("predict", {})
        overlap = own.get("overlap", 0.5) if overlap is None else overlap
        batch_size = own.get("batch_size", 4) if batch_size is None else batch_size
        if not 0 <= overlap < 0.95 or batch_size < 1 or (tile is not None and tile < 1):
            raise ConfigError(
                f"tile {tile}, overlap {overlap}, batch_size {batch_size} cannot be used",
                "tile and batch_size are at least 1, overlap is at least 0 and below 0.95",
            )
        return cls(tile or own.get("tile"), overlap, batch_size)


def band_probabilities(
    predictor: Predictor, source: ArraySource, settings: TileSettings, *, rescale: bool
) -> Iterator[tuple[int, int, Tensor]]:
    """Class probabilities on the array's own grid.

    Args:
        rescale: compute at the training's pixel size, where both are known and differ by more than 15 %.

    Yields:
        section, first row, and float32 [C, R, X]; every row of every section once, in order.
    """
    intensity = predictor.normalisation.for_image(measure(source))
    depth, height, width = source.info.shape_ZYX
    sizes = source.info.pixel_nm[1:]
    scale = choose_scale(
        source.info.name, (height, width), sizes, predictor.metadata.pixel_nm, rescale=None if rescale else False
    )
    tile = predictor.tile(settings.tile, (depth, *scale.shape))
    geometry = PlaneGeometry.of((height, width), scale.shape, tile, settings.overlap)
    network, batch_size = predictor.network(), settings.batch_size
    for z in range(depth):
        for first in range(0, height, WINDOW_ROWS):
            rows = first, min(first + WINDOW_ROWS, height)
            window = read_window(source, geometry, intensity, (z, z + 1), rows, (0, width))

            def compute(size: int, window=window) -> Tensor:  # type: ignore[no-untyped-def]
                return window_probabilities(network, window, size, intensity=intensity)[0]

            try:
                yield z, first, in_smaller_batches(compute, batch_size, network.device)
            except torch.OutOfMemoryError as error:
                raise tile_too_large(tile, network.device) from error
