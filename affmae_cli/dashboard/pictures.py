"""Previews of a run: their tiles, read from the PNG, drawn as half blocks (two pixels a character) or as pixels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from rich.color import Color
from rich.segment import Segment
from rich.style import Style
from textual import work
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget

from affmae_cli.dashboard.text import cut, one_line
from affmae_engine.picture_files import TILES_KEY, Rgb

SMALLEST = 8
"""Pixels of the smallest tile that still shows something."""
_MOST_PIXELS = 64_000_000


@dataclass(frozen=True, eq=False)
class Tile:
    """One image of a preview. title, row, main: see `picture_files.Tile`."""

    title: str
    row: int
    main: bool
    rgb: Rgb


@dataclass(frozen=True, eq=False)
class Preview:
    """A preview taken apart. legend: (name, color) of its colors. problem: why there are no tiles, "" if there are."""

    tiles: tuple[Tile, ...] = ()
    legend: tuple[tuple[str, tuple[int, int, int]], ...] = ()
    problem: str = ""

    @property
    def rows(self) -> int:
        """How many images it shows."""
        return max((tile.row for tile in self.tiles), default=-1) + 1


def read_preview(path: Path) -> Preview:
    """The tiles of the picture at `path`. Never raises: whatever the file holds or lacks, `problem` says it.

    A picture without a list of its tiles, as earlier versions wrote it, is one tile.
    """
    name = one_line(path.name)
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > _MOST_PIXELS:
                return Preview(problem=f"{name} is too large to be shown: {picture.width} x {picture.height} pixels")
            whole = np.asarray(picture.convert("RGB"))
            text = getattr(picture, "text", {}).get(TILES_KEY, "")
    except FileNotFoundError:
        return Preview(problem=f"{name} was removed")
    except UnidentifiedImageError:
        return Preview(problem=f"{name} is not a picture")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken chunk
        return Preview(problem=f"{name} cannot be read: {str(error) or type(error).__name__}")
    try:
        found = json.loads(text)
        legend = tuple((str(n), (int(r), int(g), int(b))) for n, (r, g, b) in found["legend"])
        cuts = []
        for tile in found["tiles"]:
            x, y, w, h = map(int, tile["box"])
            cuts.append(Tile(str(tile["title"]), int(tile["row"]), bool(tile["main"]), whole[y : y + h, x : x + w]))
        if cuts and all(tile.rgb.size and tile.row >= 0 for tile in cuts):
            return Preview(tuple(sorted(cuts, key=lambda tile: tile.row)), legend)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return Preview((Tile("", 0, True, whole),))


def arrangement(count: int, width: int, height: int, columns: int | None = None) -> tuple[int, int]:
    """Columns and rows of `count` square tiles that make them as large as possible in width x height characters.

    One column stands between tiles, one row above each is its title. columns: a number that is fixed.
    """
    choices = [columns] if columns else range(1, count + 1)
    return max(((c, -(-count // c)) for c in choices), key=lambda cr: (tile_edge(cr[0], cr[1], width, height), -cr[1]))


def tile_edge(columns: int, rows: int, width: int, height: int) -> int:
    """Pixels that square tiles have at most in an arrangement; a character is one pixel wide and two high."""
    return max(0, min((width - columns + 1) // columns, 2 * (height // rows - 1)))


class PictureGrid(Widget, can_focus=True):
    """Draws the picture at `path`, which it reads in a thread.

    main_only: only the main tiles of the first image. first: the image from which on tiles are drawn. zoomed: images
    that are shown at a time, fewer are larger; 0: all. pixels: a widget that draws a Pillow image as pixels, or None.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "screen.enlarge", "Full screen", tooltip="The picture on the whole screen"),
    ]
    path: reactive[Path | None] = reactive(None)
    stamp: reactive[float] = reactive(0.0)
    first: reactive[int] = reactive(0)
    zoomed: reactive[int] = reactive(0)
    pixels: reactive[type[Widget] | None] = reactive(None)

    @dataclass
    class Loaded(Message):
        """A picture was read."""

        path: Path
        preview: Preview

    def __init__(self, *, main_only: bool = False, id: str | None = None) -> None:
        super().__init__(id=id, classes="panel")
        self.main_only = main_only
        self.border_title = "preview"
        self.preview = Preview(problem="no preview yet")
        self._strips: list[Strip] | None = None

    @property
    def shown(self) -> list[Tile]:
        """The tiles that have a place."""
        tiles = self.preview.tiles
        if self.main_only:
            return [tile for tile in tiles if tile.main and tile.row == 0]
        last = self.first + (self.zoomed or self.preview.rows)
        return [tile for tile in tiles if self.first <= tile.row < last] or list(tiles)

    def watch_path(self, _before: Path | None, path: Path | None) -> None:
        if path is None:
            self.preview = Preview(problem="no preview yet")
            self.redraw()
        else:
            self._read(path)

    def watch_stamp(self) -> None:
        if self.path is not None:
            self._read(self.path)

    @work(thread=True, exclusive=True, group="preview", exit_on_error=False)
    def _read(self, path: Path) -> None:
        self.post_message(self.Loaded(path, read_preview(path)))

    def on_picture_grid_loaded(self, message: Loaded) -> None:
        if message.path == self.path:
            self.preview = message.preview
            self.first = min(self.first, max(0, self.preview.rows - 1))
            self.redraw()

    def redraw(self) -> None:
        """Lay the tiles out anew."""
        self._strips = None
        if self.pixels is not None:
            self._place(self.pixels)
        self.refresh()

    def on_resize(self) -> None:
        self.redraw()

    watch_first = watch_zoomed = watch_pixels = on_resize

    def notify_style_update(self) -> None:
        super().notify_style_update()
        self._strips = None

    def render_line(self, y: int) -> Strip:
        if self._strips is None:
            self._strips = self._draw()
        return self._strips[y] if y < len(self._strips) else Strip.blank(self.size.width, self.rich_style)

    def _layout(self) -> tuple[int, int, int]:
        """Columns of tiles, and columns and rows of characters that each has below its title."""
        shown = self.shown
        fixed = None
        if not self.main_only and len({tile.row for tile in shown}) > 1:  # an image a row
            fixed = max(sum(tile.row == row for tile in shown) for row in {tile.row for tile in shown})
        columns, rows = arrangement(max(1, len(shown)), *self.size, fixed)
        return columns, (self.size.width - columns + 1) // columns, self.size.height // rows - 1

    def _place(self, kind: type[Widget]) -> None:
        """Put a widget that draws pixels below the title of every tile."""
        self.remove_children()
        columns, width, height = self._layout()
        for number, tile in enumerate(self.shown if min(width, height) > 0 else []):
            picture, room = kind(Image.fromarray(tile.rgb)), Size(width, height)
            picture.styles.width = picture.styles.height = "auto"  # it knows how many pixels a character has
            wide = picture.get_content_width(room, room)
            picture.styles.height, picture.styles.width = picture.get_content_height(room, room, wide), wide
            picture.styles.offset = number % columns * (width + 1), number // columns * (height + 1) + 1
            self.mount(picture)

    def _draw(self) -> list[Strip]:
        width, blank = self.size.width, self.rich_style
        columns, tile_width, tile_height = self._layout()
        if self.preview.problem or tile_width < 2 or tile_height < 1:
            text = self.preview.problem or "not enough room"
            return [Strip([Segment(cut(text, width), blank + Style(dim=True))]).adjust_cell_length(width, blank)]
        drawn = [self._drawn_tile(tile, tile_width, tile_height) for tile in self.shown]
        gap, strips = Strip([Segment(" ", blank)]), []
        for begin in range(0, len(drawn), columns):
            for line in zip(*drawn[begin : begin + columns], strict=True):
                parts = [part for strip in line for part in (strip, gap)]
                strips.append(Strip.join(parts).adjust_cell_length(width, blank))
        return strips

    def _drawn_tile(self, tile: Tile, columns: int, rows: int) -> list[Strip]:
        """A tile with its title above, exactly columns wide and rows + 1 high."""
        blank = self.rich_style
        strips = [Strip([Segment(cut(one_line(tile.title), columns), blank)])]
        strips += half_blocks(tile.rgb, columns, rows) if self.pixels is None else []
        lines = [strip.adjust_cell_length(columns, blank) for strip in strips]
        return lines + [Strip.blank(columns, blank)] * (rows + 1 - len(lines))


def half_blocks(rgb: Rgb, columns: int, rows: int) -> list[Strip]:
    """A picture within columns x rows characters, keeping its shape (a pixel is square)."""
    height, width = rgb.shape[:2]
    scale = min(columns / width, 2 * rows / height)
    wide = max(1, min(columns, round(width * scale)))
    high = max(1, min(rows, -(-round(height * scale) // 2)))
    kind = Image.Resampling.BOX if width > wide else Image.Resampling.NEAREST
    small = np.asarray(Image.fromarray(rgb).resize((wide, 2 * high), kind))
    return [Strip(_runs(small[2 * row], small[2 * row + 1])) for row in range(high)]


def _runs(upper: Rgb, lower: Rgb) -> list[Segment]:
    both = np.concatenate([upper, lower], axis=-1)
    edges: Sequence[int] = [0, *(np.flatnonzero((both[1:] != both[:-1]).any(axis=-1)) + 1).tolist(), len(both)]
    found = []
    for a, b in pairwise(edges):
        r1, g1, b1, r2, g2, b2 = both[a].tolist()
        found.append(
            Segment("▀" * (b - a), Style(color=Color.from_rgb(r1, g1, b1), bgcolor=Color.from_rgb(r2, g2, b2)))
        )
    return found
