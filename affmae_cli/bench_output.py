"""What the three benchmarks print and write: tables, report, charts, comparison with an earlier result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affmae_cli import output

if TYPE_CHECKING:
    from affmae_engine.bench.report import Table

_WIDEST = 1000


def finish(
    title: str,
    values: dict[str, Any],
    tables: Sequence[Table],
    *,
    folder: Path | None,
    old: Mapping[str, Any] | None,
    json: bool,
) -> None:
    """Write the report, draw the charts, and print the result.

    Args:
        title: of the report.
        values: `report.document`.
        tables: for people.
        folder: where to write; None: nowhere.
        old: an earlier document to compare with.
        json: print the document instead of tables.
    """
    from affmae_engine.bench import charts, report

    tables = list(tables)
    if old is not None:
        table, warnings = report.compare(old, values)
        tables.append(table)
        values = {**values, "changes": [dict(zip(table.columns, row, strict=True)) for row in table.rows]}
        for warning in warnings:
            output.say(warning, label="note", style="bold yellow")
    if folder is not None:
        names: tuple[str, ...] = ()
        try:
            names = charts.draw(values, folder)
        except ImportError as error:
            output.say(f"no charts: {error}", label="note", style="bold yellow")
        report.write(folder, title, values, tables, names)
    if json:
        output.print_json(values)
    else:
        _show(tables)


def _show(tables: Sequence[Table]) -> None:
    """Tables without their empty columns on stdout; as wide as they need to be where there is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    for table in (table.without_empty_columns() for table in tables if table.rows):
        shown = RichTable(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD)
        for name in table.columns:
            shown.add_column(Text(name), overflow="fold")
        for row in table.rows:
            shown.add_row(*(Text(output.printable(cell)) for cell in row))
        console = Console(highlight=False, emoji=False)
        if not console.is_terminal:
            natural = Console(width=_WIDEST).measure(shown).maximum
            console = Console(highlight=False, emoji=False, width=max(natural, len(table.title)))
        with console.capture() as rendered:
            console.print(shown)
        output.show(rendered.get())
