"""The `--pixel-size` option, shared by the commands that take images."""

from __future__ import annotations

from typing import Annotated

import typer

from affmae_engine.errors import ConfigError

VoxelSize = tuple[float | None, float | None, float | None]

PixelSizeOption = Annotated[
    str | None,
    typer.Option(
        "--pixel-size",
        metavar="Z,Y,X",
        help="Voxel size in nm for all these images, in place of what their files say.",
    ),
]


def parse_pixel_size(text: str | None) -> VoxelSize | None:
    """`40,4,4` as (40, 4, 4); `4,4` and `4` leave z unknown.

    Raises:
        ConfigError: not one to three positive numbers.
    """
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not 1 <= len(values) <= 3 or not all(0 < value < 1e9 for value in values):
        raise ConfigError(
            f"--pixel-size {text!r} is not a voxel size", "give z,y,x in nanometres, for example --pixel-size 40,4,4"
        )
    if len(values) == 3:
        return values[0], values[1], values[2]
    return None, values[0], values[-1]
