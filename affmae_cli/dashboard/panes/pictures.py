"""Pictures: previews through time, with the legend of their colors and the scores of every class."""

from __future__ import annotations

import math
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.reactive import reactive

from affmae_cli.dashboard.colors import class_color
from affmae_cli.dashboard.panes.pane import Pane, Panel, bar
from affmae_cli.dashboard.pictures import PictureGrid
from affmae_cli.dashboard.run_model import RunModel
from affmae_cli.dashboard.text import cut, one_line


class PicturesPane(Pane):
    """at: which preview is seen, as its step; None follows the newest."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "time(-1)", "Time", key_display="←→", tooltip="Earlier and later previews"),
        Binding("right", "time(1)", "Later", show=False),
        Binding("home", "time(-1000000)", "First preview", show=False),
        Binding("end", "time(1000000)", "Newest preview", show=False),
        Binding("up", "image(-1)", "Image", key_display="↑↓", tooltip="Previous and next image of the preview"),
        Binding("down", "image(1)", "Next image", show=False),
        Binding("plus,equals_sign", "size(-1)", "Size", key_display="+-", tooltip="Fewer and larger images"),
        Binding("minus", "size(1)", "More images", show=False),
    ]
    at: reactive[int | None] = reactive(None, init=False)

    def compose(self) -> ComposeResult:
        yield Panel("preview", id="pictures-slider")
        yield PictureGrid(id="pictures-grid")
        yield Panel(id="pictures-legend")
        with VerticalScroll(id="pictures-scroll", can_focus=False):
            yield Panel("IoU and Dice of held-out images", id="pictures-classes")

    def focus_first(self) -> None:
        self.query_one(PictureGrid).focus()

    @property
    def number(self) -> int:
        """Which of the previews is seen."""
        previews = self.model.previews if self.model else []
        known = [i for i, preview in enumerate(previews) if self.at is not None and preview.step <= self.at]
        return known[-1] if known else len(previews) - 1

    def take(self, model: RunModel) -> None:
        if self.model is not None and self.model.root != model.root:
            self.at = None
        super().take(model)
        grid, slider = self.query_one(PictureGrid), self.query_one("#pictures-slider", Panel)
        if not model.previews:
            grid.path = None
            slider.put(Text())
        else:
            chosen = model.previews[self.number]
            grid.path, grid.stamp = model.root / chosen.path, chosen.time
            slider.put(self._slider(model, slider))
        self._take_legend(grid)
        self._take_classes(model)

    def on_picture_grid_loaded(self) -> None:
        self.call_after_refresh(lambda: self._take_legend(self.query_one(PictureGrid)))

    def _slider(self, model: RunModel, panel: Panel) -> Text:
        number, count = self.number, len(model.previews)
        step = model.previews[number].step
        shown = f" step {step:,}  ({number + 1} of {count}{', newest' if self.at is None else ''}) "
        length = max(4, panel.size.width - len(shown) - 2)
        place = round((length - 1) * (number / (count - 1) if count > 1 else 1))
        text = Text(shown, "bold", no_wrap=True).append("─" * place, "dim")
        return text.append("●", panel.paint("#56B4E9")).append("─" * (length - 1 - place), "dim")

    def _take_legend(self, grid: PictureGrid) -> None:
        panel = self.query_one("#pictures-legend", Panel)
        text = Text(no_wrap=False)
        for name, (r, g, b) in grid.preview.legend:
            text.append("■ ", f"rgb({r},{g},{b})").append(f"{one_line(name)}   ")
        panel.put(text)
        panel.display = bool(grid.preview.legend)

    def _take_classes(self, model: RunModel) -> None:
        found = model.evaluated.per_class if model.evaluated else {}
        panel = self.query_one("#pictures-classes", Panel)
        self.query_one("#pictures-scroll").display = bool(found)
        columns = 2 if panel.size.width >= 110 else 1
        width = panel.size.width // columns
        cells = []
        for name, scores in found.items():
            iou, dice = scores.get("iou", math.nan), scores.get("dice", math.nan)
            text = Text(f"{cut(one_line(name), 20):<20} ")
            color = panel.paint(class_color(model.classes[name]))
            text.append_text(bar(iou if math.isfinite(iou) else 0.0, max(4, min(40, width - 52)), color))
            text.append(
                f" IoU {iou:.3f}  Dice {dice:.3f}" if math.isfinite(iou) else " no pixel in the held-out images"
            )
            text.truncate(max(1, width - 1), pad=True)
            cells.append(text)
        rows = [Text(" ").join(cells[i : i + columns]) for i in range(0, len(cells), columns)]
        panel.put(Text("\n").join(rows))

    def action_time(self, by: int) -> None:
        if self.model is not None and self.model.previews:
            last = len(self.model.previews) - 1
            number = min(max(self.number + by, 0), last)
            self.at = None if number == last else self.model.previews[number].step

    def watch_at(self) -> None:
        if self.model is not None:
            self.take(self.model)

    def action_image(self, by: int) -> None:
        """Another image; from all to one."""
        grid = self.query_one(PictureGrid)
        grid.zoomed = grid.zoomed or 1
        grid.first = min(max(grid.first + by, 0), max(0, grid.preview.rows - grid.zoomed))

    def action_size(self, by: int) -> None:
        grid = self.query_one(PictureGrid)
        rows = max(1, grid.preview.rows)
        grid.zoomed = min(max((grid.zoomed or rows) + by, 1), rows)
        grid.first = min(grid.first, rows - grid.zoomed)
