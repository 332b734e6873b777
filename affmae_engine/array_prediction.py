"""Prediction of arrays: class probabilities band by band, with the functions that predict files.

Axes: C classes, R rows of a band, Z Y X array.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from affmae_engine.arrays import ArraySource
from affmae_engine.data.statistics import measure
from affmae_engine.errors import ConfigError
from affmae_engine.predict.infer import Band, TileRunner, Tiling, blend
from affmae_engine.predict.predictor import Predictor
from affmae_engine.predict.rescale import ResampledPlane, map_back
from affmae_engine.predict.scale import choose_scale
from affmae_engine.predict.sections import sections


@dataclass(frozen=True)
class TileSettings:
    """Edge of a tile in pixels, share of it that a neighbor covers too, tiles per forward pass."""

    tile: int
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
        return cls(predictor.tile(tile or own.get("tile")), overlap, batch_size)


def band_probabilities(
    predictor: Predictor, source: ArraySource, settings: TileSettings, *, rescale: bool
) -> Iterator[tuple[int, int, Tensor]]:
    """Class probabilities on the array's own grid.

    Args:
        rescale: compute at the training's pixel size, where both are known.

    Yields:
        section, first row, and float32 [C, R, X]; every row of every section once, in order.
    """
    intensity = predictor.normalisation.for_image(measure(source))
    runner = TileRunner(
        predictor.model,
        classes=predictor.classes,
        batch_size=settings.batch_size,
        device=predictor.choice.device,
        autocast=predictor.choice.dtype if predictor.choice.precision != "fp32" else None,
        excluded=predictor.excluded,
    )
    trained = predictor.metadata.pixel_nm
    known = trained is not None and None not in source.info.pixel_nm[1:]
    scale = choose_scale(source.info, (None, None, None), trained, rescale=rescale and known)
    tiling = Tiling(settings.tile, settings.overlap)
    planes = sections(source, intensity.standardise)
    bands: Iterator[Band]
    if scale.resampled:
        seen = (ResampledPlane(plane, scale.shape) for plane in planes)
        inner = blend(seen, runner, tiling, prepare=intensity.equalise)
        bands = map_back(inner, scale.shape, source.info.shape_ZYX[1:])
    else:
        bands = blend(planes, runner, tiling, prepare=intensity.equalise)
    for band in bands:
        yield band.plane, band.first_row, band.probabilities_CRX
