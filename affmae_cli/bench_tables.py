"""A benchmark's tables on standard output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from affmae_cli import output

if TYPE_CHECKING:
    from affmae_engine.bench.report import Table


def show_tables(tables: Sequence[Table]) -> None:
    """Tables without their empty columns; where there is no terminal they are as wide as they need to be."""
    for table in tables:
        used = table.without_empty_columns()
        if not used.columns:
            continue
        shown = RichTable(title=Text(used.title), title_justify="left", box=box.SIMPLE_HEAD)
        for name in used.columns:
            shown.add_column(Text(name), overflow="fold")
        for row in used.rows:
            shown.add_row(*(Text(output.printable(cell)) for cell in row))
        console = Console(highlight=False, emoji=False)
        if not console.is_terminal:
            natural = Console(width=1000).measure(shown).maximum
            console = Console(highlight=False, emoji=False, width=max(natural, len(used.title)))
        with console.capture() as rendered:
            console.print(shown)
        output.show(rendered.get())
