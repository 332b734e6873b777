"""`affmae check`: whether datasets, runs and predictions are whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from affmae_cli import output
from affmae_cli.options import JsonOption, QuietOption

_MOST_SHOWN = 20


def check(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Datasets, runs, labels of predictions.")],
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Read all of a dataset, run or prediction and say what is damaged, missing or unfinished.

    Nothing is changed. The exit code is 6 when something is damaged.
    """
    from dataclasses import asdict

    from affmae_engine.errors import CorruptError
    from affmae_engine.verify import verify

    found = []
    for path in paths:
        if not quiet:
            output.say(f"reading {path}")
        findings = verify(path)
        found.append(findings)
        if json:
            continue
        whole = "whole" if not findings.problems else f"{len(findings.problems)} damaged"
        output.show(output.printable(f"{path} ({findings.kind}): {findings.checked} parts read, {whole}"))
        for text in (*findings.problems[:_MOST_SHOWN], *findings.notes[:_MOST_SHOWN]):
            output.show(output.printable(f"  {text}"))
    if json:
        output.print_json([asdict(findings) for findings in found])
    damaged = [str(findings.path) for findings in found if findings.problems]
    if damaged:
        raise CorruptError(f"damaged: {', '.join(damaged)}", "restore it from a copy, or make it again")
