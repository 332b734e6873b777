"""The input's pixel size against the training's: brought into line by resampling where they differ, or warned about."""

from __future__ import annotations

from dataclasses import dataclass

from affmae_engine.data.readers import PixelSize, SourceInfo
from affmae_engine.data.scale import TOLERANCE
from affmae_engine.errors import ConfigError
from affmae_engine.predict.rescale import resampled_shape

SAME = 1.01
"""Ratio up to which resampling would change nothing but blur, even when it is asked for."""


@dataclass(frozen=True)
class Scale:
    """shape: of a plane as the network sees it. resampled: whether that differs from the input's. notes, warnings: what
    to tell the user."""

    shape: tuple[int, int]
    resampled: bool = False
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def voxel_size(info: SourceInfo, override: PixelSize) -> PixelSize:
    """Nanometers along z, y, x: what is given, else what the input says."""
    z, y, x = (own if given is None else given for own, given in zip(info.pixel_nm, override, strict=True))
    return z, y, x


def choose_scale(
    name: str,
    shape: tuple[int, int],
    pixel_nm: tuple[float | None, float | None],
    training_nm: float | None,
    *,
    rescale: bool | None,
) -> Scale:
    """Compare the pixel sizes of planes and of the training, and decide about resampling.

    Args:
        name: of the input, for messages.
        shape, pixel_nm: of its planes, along their rows and columns.
        training_nm: edge of a training pixel in nanometers.
        rescale: None resamples where both sizes are known and differ by more than `TOLERANCE`.

    Raises:
        ConfigError: `rescale` is wanted and one of the sizes is unknown.
    """
    y, x = pixel_nm
    if y is None or x is None or training_nm is None:
        missing = "the weights do not say their pixel size"
        if training_nm is not None:
            missing = f"{name} does not say its pixel size (trained at {training_nm:g} nm)"
        if rescale:
            hint = "leave out --rescale" if training_nm is None else "give it with --pixel-size z,y,x in nanometers"
            raise ConfigError(f"cannot rescale: {missing}", hint)
        return Scale(shape, notes=(f"{missing}, so the magnification was not checked",))
    ratio = max(max(size / training_nm, training_nm / size) for size in (y, x))
    sizes = f"{name} has pixels of {f'{y:g}' if y == x else f'{y:g} x {x:g}'} nm and training had {training_nm:g} nm"
    if ratio > (SAME if rescale else TOLERANCE) and rescale is not False:
        inner = resampled_shape(shape, (y, x), (training_nm, training_nm))
        note = f"{sizes}: predicted at {inner[0]} x {inner[1]} pixels per section, labels on the input's own grid"
        return Scale(inner, resampled=True, notes=(note,))
    if ratio > TOLERANCE:
        return Scale(shape, warnings=(f"{sizes}: leave out --no-rescale to predict at the training's magnification",))
    return Scale(shape)
