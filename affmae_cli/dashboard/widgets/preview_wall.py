"""The tiles of a preview side by side, as many as fit in a size that shows something.

They are drawn as half blocks; with `pixels` the wall draws their titles only, and below each stands a widget of that
class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image
from rich.color import Color
from rich.segment import Segment
from rich.style import Style
from textual import work
from textual.content import Content
from textual.geometry import Size
from textual.message import Message
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget

from affmae_cli.dashboard.halfblocks import UPPER_HALF, fitting_size, half_blocks
from affmae_cli.dashboard.tiles import Tile, arrangement, read_tiles, tile_edge
from affmae_cli.dashboard.widgets.title import retitle
from affmae_cli.output import printable

_NONE = "no preview yet"
SMALLEST = 8
"""Pixels of the smallest tile that still shows something."""


@dataclass(frozen=True)
class Picture:
    """A preview: its file, and when it was made, in seconds since 1970. A run that is resumed or begun anew writes
    another one to the same file."""

    path: Path
    made: float


class PreviewWall(Widget):
    """Draws `picture`, from tile number `first` on; reads it in a thread. edge: see `arrangement`.
    pixels: see `pixels.pixel_widget`."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"wall--title", "wall--sentence"}

    picture: reactive[Picture | None] = reactive(None)
    first: reactive[int] = reactive(0)
    edge: reactive[int | None] = reactive(None)
    pixels: reactive[type[Widget] | None] = reactive(None)

    @dataclass
    class Loaded(Message, bubble=False):
        """What was read."""

        picture: Picture
        tiles: list[Tile] | str

    def __init__(self, *, edge: int | None = None, **kwargs: str) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        retitle(self, "preview")
        self.tiles: list[Tile] = []
        self._sentence = _NONE
        self.set_reactive(PreviewWall.edge, edge)
        self._strips: list[Strip] | None = None

    @property
    def layout_of_tiles(self) -> tuple[int, int]:
        """Columns and rows of tiles."""
        return arrangement(max(1, len(self.tiles)), self.size.width, self.size.height, self.edge)

    def resize_tiles(self, factor: float | None) -> None:
        """Tiles that are `factor` times as large; None: of the size that fills the place best."""
        now = tile_edge(*self.layout_of_tiles, *self.size)
        self.edge = None if factor is None else max(SMALLEST, min(round(now * factor), tile_edge(1, 1, *self.size)))

    def watch_picture(self, before: Picture | None, picture: Picture | None) -> None:
        """Read another picture. Until it was read, one of the same run stays in sight."""
        if picture is not None:
            self._read(picture)
        if picture is None or before is None or picture.path.parent != before.path.parent:
            self._show(_NONE if picture is None else "reading the picture ...")

    def on_resize(self) -> None:
        """Lay the tiles out anew."""
        self._strips = None
        if self.pixels is not None:
            self._place(self.pixels)

    watch_first = watch_edge = watch_pixels = on_resize

    @work(thread=True, exclusive=True, group="preview", exit_on_error=False)
    def _read(self, picture: Picture) -> None:
        try:
            found = read_tiles(picture.path)
        except Exception as error:  # whatever the file holds must not end the looking
            found = f"{picture.path.name} cannot be read: {type(error).__name__}: {error}"
        self.post_message(self.Loaded(picture, found))

    def on_preview_wall_loaded(self, message: Loaded) -> None:
        """Show what was read, unless another picture was asked for since."""
        if message.picture == self.picture:
            self._show(message.tiles)

    def notify_style_update(self) -> None:
        """What was drawn has the colours of the theme before."""
        super().notify_style_update()
        self._strips = None

    def _show(self, found: list[Tile] | str) -> None:
        self.tiles = found if isinstance(found, list) else []
        self._sentence = found if isinstance(found, str) else ""
        self.on_resize()
        self.refresh()

    def render_line(self, y: int) -> Strip:
        """One line of the wall."""
        if self._strips is None:
            self._strips = self._draw()
        blank = Strip.blank(self.size.width, self.rich_style)
        return self._strips[y] if y < len(self._strips) else blank

    @property
    def _shown(self) -> list[Tile]:
        """The tiles that have a place; none where there is hardly any."""
        tiles = self.tiles[self.first :] or self.tiles
        return tiles[: math.prod(self.layout_of_tiles)] if self.size.width >= 4 and self.size.height >= 2 else []

    @property
    def _cell(self) -> tuple[int, int]:
        """Columns and rows of characters that a tile has, without its title."""
        columns, rows = self.layout_of_tiles
        return (self.size.width - columns + 1) // columns, self.size.height // rows - 1

    def _place(self, kind: type[Widget]) -> None:
        """Put a widget below the title of every tile."""
        self.remove_children()
        columns, _ = self.layout_of_tiles
        room = Size(*self._cell)
        for number, tile in enumerate(self._shown):
            picture = kind(Image.fromarray(tile.rgb))
            picture.styles.width = picture.styles.height = "auto"  # it knows how many pixels a character has
            wide = picture.get_content_width(room, room)
            picture.styles.height = picture.get_content_height(room, room, wide)
            picture.styles.width = wide
            picture.styles.offset = number % columns * (room.width + 1), number // columns * (room.height + 1) + 1
            self.mount(picture)

    def _draw(self) -> list[Strip]:
        width = self.size.width
        if not self._shown:
            style = self.get_component_rich_style
            lines = Content(printable(self._sentence)).wrap(max(width, 1))
            strips = [Strip([Segment(line.plain, style("wall--sentence"))]) for line in lines]
            return [strip.adjust_cell_length(width, self.rich_style) for strip in strips]
        columns, _ = self.layout_of_tiles
        cell = self._cell
        drawn = [self._drawn_tile(tile, *cell) for tile in self._shown]
        strips = []
        for begin in range(0, len(drawn), columns):
            for line in zip(*drawn[begin : begin + columns], strict=True):
                gap = Strip([Segment(" ", self.rich_style)])
                parts = [part for strip in line for part in (strip, gap)]
                strips.append(Strip.join(parts).adjust_cell_length(width, self.rich_style))
        return strips

    def _drawn_tile(self, tile: Tile, columns: int, rows: int) -> list[Strip]:
        """A tile with its title above, exactly columns wide and rows + 1 high."""
        title, blank = self.get_component_rich_style("wall--title"), self.rich_style
        above = Strip([Segment(tile.title[:columns], title)]).adjust_cell_length(columns, blank)
        drawn = [] if self.pixels is not None else _blocks(tile, columns, rows, blank)
        return [above, *drawn, *[Strip.blank(columns, blank)] * (rows - len(drawn))]


def _blocks(tile: Tile, columns: int, rows: int, blank: Style) -> list[Strip]:
    """A tile as half blocks, exactly columns wide and at most so many rows high."""
    strips = []
    wide, high = fitting_size(tile.rgb, columns, rows)
    for runs in half_blocks(tile.rgb, wide, high):
        cells = [
            Segment(UPPER_HALF * n, Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower)))
            for n, upper, lower in runs
        ]
        strips.append(Strip(cells).adjust_cell_length(columns, blank))
    return strips
