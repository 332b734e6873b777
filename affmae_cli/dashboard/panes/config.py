"""Config: the settings of the run, each with where it came from, and what the run was made with."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Horizontal, VerticalScroll

from affmae_cli.dashboard.panes.pane import Pane, Panel
from affmae_cli.dashboard.run_model import RunModel
from affmae_cli.dashboard.text import cut, one_line
from affmae_cli.output import toml_value
from affmae_engine.config import RunConfig

_WIDEST = 58
_NAME, _SOURCE = 20, 16


class ConfigPane(Pane):
    """Sections in as many columns as fit."""

    def __init__(self, **kwargs: str) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self._drawn: object = None

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="config-scroll"), Horizontal(id="config-columns"):
            for number in range(3):
                yield Panel(id=f"config-{number}")

    def focus_first(self) -> None:
        self.query_one(VerticalScroll).focus()

    def take(self, model: RunModel) -> None:
        super().take(model)
        width = self.size.width
        if self._drawn == (model.root, model.config, model.problem, width):
            return
        self._drawn = model.root, model.config, model.problem, width
        count = max(1, min(3, width // _WIDEST))
        blocks = _blocks(model, min(width // count - 2, 76))
        total, height, columns = sum(len(block) + 1 for block in blocks), 0, [Text() for _ in range(3)]
        for block in blocks:
            at = min(int((height + len(block) / 2) * count / max(total, 1)), count - 1)
            columns[at].append_text(Text("\n").join(block)).append("\n\n")
            height += len(block) + 1
        for number, text in enumerate(columns):
            panel = self.query_one(f"#config-{number}", Panel)
            panel.display = number < count
            panel.put(text)


def _blocks(model: RunModel, width: int) -> list[list[Text]]:
    """Sections as lines."""
    try:
        text = model.run.config.read_text("utf-8", "replace")
        tables = {name: table for name, table in tomllib.loads(text).items() if isinstance(table, dict)}
    except OSError:
        text, tables = "", {}
    except (ValueError, RecursionError):
        tables = {}
    blocks = [[Text(one_line(model.problem), "bold")]] if model.problem else []
    if not tables and text:
        blocks.append([Text(cut(one_line(line), width)) for line in text.splitlines()])
    origin = sources(tables, model.environment.get("command"))
    for section, table in tables.items():
        lines = [Text(one_line(section), "bold")]
        for name, value in _flat(table):
            source = origin.get(f"{section}.{name}", "")
            room = max(4, width - _NAME - _SOURCE - 2)
            shown = f"{cut(one_line(name), _NAME):<{_NAME}} {cut(one_line(toml_value(value)), room):<{room}} "
            lines.append(Text(shown, "dim" if source == "default" else "").append(cut(source, _SOURCE), "dim"))
        blocks.append(lines)
    environment = [Text("environment", "bold")]
    for name, value in _flat(model.environment):
        environment.append(Text(cut(f"{cut(one_line(name), 30):<30} {one_line(toml_value(value))}", width)))
    return [*blocks, environment]


def sources(tables: Mapping[str, Any], command: Any) -> dict[str, str]:
    """Where each "section.field" came from, as the command recorded it; earlier versions did not, and only what differs
    from the defaults is known of their runs."""
    recorded = command.get("sources") if isinstance(command, dict) else None
    defaults, found = RunConfig().model_dump(mode="json"), {}
    for section, table in tables.items():
        for name, value in table.items():
            path, known = f"{section}.{name}", defaults.get(section)
            if isinstance(recorded, dict):
                found[path] = one_line(str(recorded.get(path, "default")))
            else:
                plain = isinstance(known, dict) and known.get(name) == value
                found[path] = "default" if plain else "not the default"
    return found


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
