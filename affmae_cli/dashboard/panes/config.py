"""Config: the resolved configuration, a box for each section; below, what the run was made with."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

from textual.app import ComposeResult
from textual.containers import Container, Vertical, VerticalScroll
from textual.widgets import Static

from affmae_cli.dashboard.panes.pane import Pane
from affmae_cli.dashboard.view import RunView
from affmae_cli.dashboard.widgets.figures import Figure, Figures
from affmae_cli.output import printable, toml_value

COLUMNS = 3


class ConfigPane(Pane):
    """Made anew only when the configuration or the environment changed."""

    def __init__(self, **kwargs: str) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self._shown: object = None

    def compose(self) -> ComposeResult:
        """Boxes that scroll together."""
        with VerticalScroll(id="config-scroll"):
            yield Static("", id="config-problem", markup=False)
            with Container(id="config-columns"):
                for _ in range(COLUMNS):
                    yield Vertical(classes="config-column")
            yield Figures("environment", id="config-environment")

    def show(self, view: RunView) -> None:
        """The text comes by itself, see `take`."""

    async def take(self, config: str, environment: Mapping[str, Any], problem: str) -> None:
        """Show what was read; a file that is no TOML is shown as it is."""
        if self._shown == (config, environment, problem):
            return
        self._shown = (config, environment, problem)
        try:
            tables = {name: table for name, table in tomllib.loads(config).items() if isinstance(table, dict)}
        except (ValueError, RecursionError):
            tables = {}
        text = problem if tables else "\n".join(part for part in (problem, printable(config)) if part)
        said = self.query_one("#config-problem", Static)
        said.update(text)
        said.display = bool(text)
        boxes = [_box(name, table) for name, table in tables.items()]
        self.query_one("#config-environment", Figures).rows = _rows(environment)
        for column, dealt in zip(self.query(".config-column"), deal(boxes), strict=True):
            await column.remove_children()
            await column.mount_all(dealt)


def deal(boxes: list[Figures]) -> list[list[Figures]]:
    """Boxes in columns of about the same height, in reading order downwards."""
    columns: list[list[Figures]] = [[] for _ in range(COLUMNS)]
    total, height = sum(len(box.rows) + 1 for box in boxes), 0
    for box in boxes:
        size = len(box.rows) + 1
        columns[min(int((height + size / 2) * COLUMNS / total), COLUMNS - 1)].append(box)
        height += size
    return columns


def _box(name: str, table: Mapping[str, Any]) -> Figures:
    box = Figures(name, classes="config-box")
    box.rows = _rows(table)
    return box


def _rows(table: Mapping[str, Any]) -> tuple[Figure, ...]:
    return tuple(Figure(printable(key), printable(toml_value(value))) for key, value in _flat(table))


def _flat(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested tables by their dotted names; of the many fingerprints of images only their number."""
    found: list[tuple[str, Any]] = []
    for key, value in table.items():
        name = f"{prefix}{key}"
        if not isinstance(value, dict):
            found.append((name, value))
        elif name == "data.images":
            found.append((name, len(value)))
        else:
            found += _flat(value, f"{name}.")
    return found
