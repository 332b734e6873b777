"""Pictures as PNG files. A table of images also says where its tiles are and what its colors mean, for viewers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from affmae_engine import atomic

Rgb = NDArray[np.uint8]
TILES_KEY = "affmae-tiles"
"""Name of the PNG text chunk with the tiles and the legend of a picture, as JSON (docs/formats.md, "Previews")."""


@dataclass(frozen=True)
class Tile:
    """One image of a table of images.

    title: of its column. row: from 0. box: left, top, width, height in pixels. main: one of the few to show where there
    is no room for all.
    """

    title: str
    row: int
    box: tuple[int, int, int, int]
    main: bool


@dataclass(frozen=True)
class Picture:
    """A table of images. legend: (name, RGB color) of what its colors mean."""

    rgb: Rgb
    tiles: tuple[Tile, ...]
    legend: tuple[tuple[str, tuple[int, int, int]], ...]


def save_png(path: Path, picture: Picture | Rgb) -> None:
    """Write a picture atomically, with its tiles and legend in the text chunk `TILES_KEY`.

    Raises:
        ResourceError: disk full, read-only.
    """

    rgb, chunks = picture, PngInfo()
    if isinstance(picture, Picture):
        rgb = picture.rgb
        found = {"tiles": [asdict(tile) for tile in picture.tiles], "legend": picture.legend}
        chunks.add_text(TILES_KEY, json.dumps(found))

    def write(partial: Path) -> None:
        Image.fromarray(rgb).save(partial, format="PNG", pnginfo=chunks)

    atomic.commit_file(path, write)
