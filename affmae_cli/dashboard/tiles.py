"""A preview of a run taken apart: its pictures are tables of tiles on white, too wide for a terminal as a whole.

The tiles are found by the white gaps between them (docs/formats.md, "Previews"), and named by their number of columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from affmae_cli.dashboard.halfblocks import Rgb

TITLES = {
    6: ("original", "masked", "from stage 4", "from stages 4 and 3", "from all stages", "tokens by stage"),
    4: ("image", "truth", "prediction", "errors"),
}
"""Titles of the columns of a reconstruction and of a comparison with the truth."""
_BEST_FIRST = {6: (1, 4, 0, 5, 3, 2), 4: (2, 1, 0, 3)}  # where there is room for two tiles only, these are the two
_WHITE = 255
_SMALLEST_TILE = 32  # pixels; titles and legends are lower
_MOST_PIXELS = 64_000_000


@dataclass(frozen=True, eq=False)
class Tile:
    """One tile: which image of the preview it belongs to (from 1), what it shows ("" for a whole picture), pixels."""

    image: int
    title: str
    rgb: Rgb


def read_tiles(path: Path) -> list[Tile] | str:
    """The tiles of the picture at `path`, image by image, or a sentence that says why there are none."""
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > _MOST_PIXELS:
                return f"{path.name} is too large to be shown: {picture.width} x {picture.height} pixels"
            whole = np.asarray(picture.convert("RGB"))
    except FileNotFoundError:
        return f"{path.name} is gone"
    except UnidentifiedImageError:
        return f"{path.name} is not a picture"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken chunk
        return f"{path.name} cannot be read: {str(error) or type(error).__name__}"
    return split(whole)


def split(whole: Rgb) -> list[Tile]:
    """Take a picture apart; one that is no table of a known kind is a single tile."""
    white = (whole == _WHITE).all(axis=-1)
    rows = []
    for top, bottom in _runs(~white.all(axis=1)):
        if bottom - top >= _SMALLEST_TILE:
            columns = _runs(~white[top:bottom].all(axis=0))
            rows.append([whole[top:bottom, a:b] for a, b in columns if b - a >= _SMALLEST_TILE])
    count = len(rows[0]) if rows else 0
    if count not in TITLES or any(len(row) != count for row in rows):
        return [Tile(1, "", whole)]
    return [Tile(i, TITLES[count][c], row[c]) for i, row in enumerate(rows, 1) for c in _BEST_FIRST[count]]


def arrangement(count: int, width: int, height: int, edge: int | None = None) -> tuple[int, int]:
    """Columns and rows of tiles.

    Args:
        count: tiles there are; at least one.
        width, height: characters; one column stands between tiles, one row above each is its title.
        edge: pixels that a tile should have at least: then as many as possible are shown. None: the arrangement that
            covers most of the area, with more tiles where two cover the same.
    """
    best, score = (1, 1), (-1.0, 0.0, 0)
    for columns in range(1, count + 1):
        for rows in range(1, -(-count // columns) + 1):
            size = tile_edge(columns, rows, width, height)
            shown = min(columns * rows, count)
            found = (shown * size**2, shown, -rows) if edge is None else (shown, size, -rows)
            if size >= (edge or 1) and found > score:
                best, score = (columns, rows), found
    return best


def tile_edge(columns: int, rows: int, width: int, height: int) -> int:
    """Pixels that square tiles have at most in an arrangement."""
    return max(0, min((width - columns + 1) // columns, 2 * (height // rows - 1)))


def _runs(inside: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Begin and end of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], inside, [False])).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
