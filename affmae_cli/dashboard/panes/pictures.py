"""Pictures: the tiles of a preview, and of a segmenter the scores and colours of its classes.

Left and right go through the previews in time, up and down through the tiles that do not fit, + and - change the size
of a tile.
"""

from __future__ import annotations

import math
from pathlib import Path

from textual.app import ComposeResult
from textual.reactive import reactive

from affmae_cli.dashboard import present
from affmae_cli.dashboard.panes.pane import Pane
from affmae_cli.dashboard.view import RunView
from affmae_cli.dashboard.widgets.figures import Figures
from affmae_cli.dashboard.widgets.preview_wall import Picture, PreviewWall
from affmae_cli.dashboard.widgets.title import retitle

_GROWTH = 1.4


class PicturesPane(Pane):
    """The newest preview unless an older one was chosen. back: how many previews before the newest."""

    back: reactive[int] = reactive(0)

    def __init__(self, **kwargs: str) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self._root: Path | None = None

    def compose(self) -> ComposeResult:
        """Tiles, and the classes beside them."""
        yield PreviewWall(id="pictures-wall")
        yield Figures("classes", id="pictures-classes")

    @property
    def wall(self) -> PreviewWall:
        """Where the tiles are."""
        return self.query_one(PreviewWall)

    def show(self, view: RunView) -> None:
        """Draw the view."""
        wall, classes = self.wall, self.query_one(Figures)
        if view.root != self._root:
            self._root, self.back, wall.first = view.root, 0, 0
        classes.rows = present.classes(view)
        classes.display = bool(classes.rows)
        if not view.previews:
            wall.picture = None
            retitle(wall, "preview")
            return
        number = max(0, len(view.previews) - 1 - self.back)
        chosen = view.previews[number]
        wall.picture = Picture(view.root / chosen.path, chosen.time)
        of = f"{number + 1} of {len(view.previews)}"
        retitle(wall, f"preview of step {chosen.step:,}   ← → {of}   ↑ ↓ further tiles   + - size")

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
