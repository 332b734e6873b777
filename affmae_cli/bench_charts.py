"""Charts at the end of a benchmark: hours of measuring do not fail for a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from affmae_cli import output


def drawn(values: dict[str, Any], folder: Path, *, quiet: bool) -> tuple[str, ...]:
    """Names of the charts of a document that were drawn into a folder; says why there is none."""
    from affmae_engine.bench import charts

    try:
        return charts.draw(values, folder)
    except charts.NoCharts as error:
        if not quiet:
            output.say(f"{error.message}: {error.hint}", label="note", style="bold yellow")
        return ()


def charted(values: dict[str, Any], folder: Path, *, quiet: bool) -> list[str]:
    """The charts as a section of a report; nothing where none was drawn."""
    names = drawn(values, folder, quiet=quiet)
    lines = [f"![{name.removesuffix('.png').replace('-', ' ')}]({name})\n" for name in names]
    return ["## Charts", "", *lines] if lines else []
