"""The input's pixel size against the training's: said, warned about, or brought into line by resampling."""

from __future__ import annotations

from dataclasses import dataclass

from affmae_engine.data.readers import PixelSize, SourceInfo
from affmae_engine.errors import ConfigError
from affmae_engine.predict.rescale import resampled_shape

TOLERANCE = 1.25
"""Ratio of two pixel sizes from which predictions suffer and a warning is due, either way."""

SAME = 1.01
"""Ratio up to which resampling would change nothing but blur."""


@dataclass(frozen=True)
class Scale:
    """pixel_nm: voxel size of the input and so of the output. shape: of a section as the network sees it.
    resampled: whether that differs from the input's. notes, warnings: what to tell the user."""

    pixel_nm: PixelSize
    shape: tuple[int, int]
    resampled: bool = False
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def choose_scale(info: SourceInfo, override: PixelSize, training_nm: float | None, *, rescale: bool) -> Scale:
    """Compare pixel sizes and decide about resampling. Only y and x count: sections are predicted one by one.

    Args:
        override: nanometres per voxel that replace the input's own, where given.
        training_nm: edge of a training pixel in nanometres.

    Raises:
        ConfigError: `rescale` is wanted and one of the sizes is unknown.
    """
    z, y, x = (own if given is None else given for own, given in zip(info.pixel_nm, override, strict=True))
    shape = info.shape_ZYX[1], info.shape_ZYX[2]
    if y is None or x is None or training_nm is None:
        missing = "the weights do not say their pixel size"
        if training_nm is not None:
            missing = f"{info.name} does not say its pixel size (trained at {training_nm:g} nm)"
        if rescale:
            hint = "leave out --rescale" if training_nm is None else "give it with --pixel-size z,y,x in nanometres"
            raise ConfigError(f"cannot rescale: {missing}", hint)
        return Scale((z, y, x), shape, notes=(f"{missing}, so the magnification was not checked",))
    ratio = max(max(size / training_nm, training_nm / size) for size in (y, x))
    sizes = f"{info.name} has pixels of {_pair(y, x)} nm and training had {training_nm:g} nm"
    if rescale and ratio > SAME:
        inner = resampled_shape(shape, (y, x), (training_nm, training_nm))
        note = f"{sizes}: predicted at {inner[0]} x {inner[1]} pixels per section, labels on the input's own grid"
        return Scale((z, y, x), inner, resampled=True, notes=(note,))
    if ratio > TOLERANCE:
        return Scale((z, y, x), shape, warnings=(f"{sizes}: use --rescale to predict at the training magnification",))
    return Scale((z, y, x), shape)


def _pair(y: float, x: float) -> str:
    return f"{y:g}" if y == x else f"{y:g} x {x:g}"
