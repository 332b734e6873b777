"""Pictures: the tiles of a preview, and of a segmenter the scores and colours of its classes.

Left and right go through the previews in time, up and down through the tiles that do not fit, + and - change the size
of a tile, PageUp and PageDown scroll the classes.
"""

from __future__ import annotations

import math
from pathlib import Path

from textual.app import ComposeResult
from textual.containers import Horizontal, VerticalScroll
from textual.reactive import reactive

from affmae_cli.dashboard import present
from affmae_cli.dashboard.panes.pane import Pane
from affmae_cli.dashboard.view import RunView
from affmae_cli.dashboard.widgets.figures import Figure, Figures
from affmae_cli.dashboard.widgets.preview_wall import Picture, PreviewWall
from affmae_cli.dashboard.widgets.title import retitle

_GROWTH = 1.4
_MOST_COLUMNS, _COLUMN = 4, 52
"""Columns of the table of classes, and characters that one takes at least."""
_CLASSES_SHARE = 0.4  # of the height at most, as in the stylesheet


class PicturesPane(Pane):
    """The newest preview unless an older one was chosen. back: how many previews before the newest."""

    back: reactive[int] = reactive(0)

    def __init__(self, **kwargs: str) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self._root: Path | None = None

    def compose(self) -> ComposeResult:
        """Tiles, and the classes beside them."""
        yield PreviewWall(id="pictures-wall")
        with VerticalScroll(id="pictures-classes", can_focus=False), Horizontal():  # the arrow keys are the pictures'
            for _ in range(_MOST_COLUMNS):
                yield Figures()

    @property
    def wall(self) -> PreviewWall:
        """Where the tiles are."""
        return self.query_one(PreviewWall)

    def show(self, view: RunView) -> None:
        """Draw the view."""
        wall = self.wall
        if view.root != self._root:
            self._root, self.back, wall.first = view.root, 0, 0
        self._show_classes(present.classes(view))
        if not view.previews:
            wall.picture = None
            retitle(wall, "preview")
            return
        number = max(0, len(view.previews) - 1 - self.back)
        chosen = view.previews[number]
        wall.picture = Picture(view.root / chosen.path, chosen.time)
        of = f"{number + 1} of {len(view.previews)}"
        retitle(wall, f"preview of step {chosen.step:,}   ← → {of}   ↑ ↓ further tiles   + - size")

    def on_resize(self) -> None:
        """The table of classes has as many columns as it needs and as there is room for."""
        if self.view is not None:
            self._show_classes(present.classes(self.view))

    def _show_classes(self, rows: tuple[Figure, ...]) -> None:
        room = max(1, int(self.size.height * _CLASSES_SHARE) - 1)
        fitting = min(_MOST_COLUMNS, max(1, self.size.width // _COLUMN))
        height = -(-len(rows) // min(fitting, max(1, -(-len(rows) // room)))) or 1
        table = self.query_one("#pictures-classes")
        table.display = bool(rows)
        hidden = "   PageUp PageDown further classes" if height > room else ""
        retitle(table, f"{len(rows)} classes{hidden}" if hidden else "classes")
        for number, column in enumerate(self.query(Figures)):
            column.rows = rows[number * height : (number + 1) * height]
            column.display = bool(column.rows)

    def page(self, direction: int) -> None:
        """Further classes."""
        table = self.query_one("#pictures-classes")
        table.scroll_page_down() if direction > 0 else table.scroll_page_up()

    def watch_back(self) -> None:
        """Another preview."""
        if self.view is not None:
            self.show(self.view)

    def zoom(self, direction: int, at: float | None = None) -> bool:
        """Larger or smaller tiles."""
        self.wall.resize_tiles({1: _GROWTH, -1: 1 / _GROWTH}.get(direction))
        return True

    def pan(self, across: int, down: int) -> bool:
        """Earlier and later previews, further tiles."""
        wall = self.wall
        count = len(self.view.previews) if self.view else 0
        self.back = min(max(self.back - across, 0), max(count - 1, 0))
        if down:
            shown = math.prod(wall.layout_of_tiles)
            wall.first = min(max(wall.first + down * shown, 0), max(len(wall.tiles) - 1, 0) // shown * shown)
        return True
