"""`affmae bench --compare OLD`: an earlier result, read before anything is measured, and what changed since."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from affmae_cli import output
from affmae_engine.errors import InputError

if TYPE_CHECKING:
    from affmae_engine.bench.report import Table

CompareOption = Annotated[
    Path | None,
    typer.Option(
        "--compare",
        metavar="OLD",
        help="Earlier results.json, or its folder: show what changed since.",
    ),
]


def read_old(path: Path | None, kind: str) -> dict[str, Any] | None:
    """The earlier result; None without one.

    Raises:
        InputError: it cannot be read, or is of another kind of benchmark.
    """
    from affmae_engine.bench.compare import read_results

    if path is None:
        return None
    old = read_results(path)
    if old["kind"] != kind:
        raise InputError(
            f"{path} holds the benchmark {old['kind']!r}, this one is {kind!r}", "compare two of the same kind"
        )
    return {**old, "path": str(path)}


def with_changes(values: Mapping[str, Any], old: Mapping[str, Any] | None) -> dict[str, Any]:
    """A document for `--json` with the changes in it, under "against"."""
    from affmae_engine.bench.compare import compare

    return dict(values) if old is None else {**values, "against": compare(old, values).as_dict()}


def changes(values: Mapping[str, Any], old: Mapping[str, Any] | None) -> list[Table]:
    """The table of changes, empty without an earlier result; warns of circumstances that differ."""
    from affmae_engine.bench.compare import compare

    if old is None:
        return []
    found = compare(old, values)
    for warning in found.warnings:
        output.say(warning, label="note", style="bold yellow")
    return [found.table(old["path"])]
