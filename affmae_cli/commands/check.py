"""`affmae check`: whether datasets, runs and predictions are whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from affmae_cli import output
from affmae_cli.errors import report
from affmae_cli.options import JsonOption, QuietOption

if TYPE_CHECKING:
    from affmae_engine.errors import AffmaeError
    from affmae_engine.verify import Findings

_MOST_SHOWN = 20


def check(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Datasets, runs, predictions, or folders of these.")
    ],
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Read all of a dataset, run or prediction and say what is damaged, missing or unfinished.

    Nothing is changed. The exit code is 6 when something is damaged. A path that cannot be checked does not keep the
    others from it; the exit code is then the highest of all.
    """
    from dataclasses import asdict

    from affmae_engine.errors import CorruptError
    from affmae_engine.verify import Findings, verify

    found: list[Findings] = []
    code = 0
    for path in paths:
        if not quiet:
            output.say(f"reading {path}")
        try:
            findings = verify(path)
        except Exception as error:
            failure = _expected(error)
            report(failure)
            code = max(code, failure.exit_code)
            findings = Findings(path, None, problems=[failure.message])
        found.append(findings)
        if not json and findings.kind is not None:
            _show(findings)
    if json:
        output.print_json([asdict(findings) for findings in found])
    damaged = [str(findings.path) for findings in found if findings.kind is not None and findings.problems]
    if damaged:
        raise CorruptError(f"damaged: {', '.join(damaged)}", "restore it from a copy, or make it again")
    if code:
        raise typer.Exit(code)


def _expected(error: Exception) -> AffmaeError:
    """The error as a user is shown it; one that nobody expected is raised again."""
    from affmae_engine.errors import AffmaeError, of_system

    known = error if isinstance(error, AffmaeError) else of_system(error)
    if known is None:
        raise error
    return known


def _show(findings: Findings) -> None:
    whole = "whole" if not findings.problems else f"{len(findings.problems)} damaged"
    output.show(output.printable(f"{findings.path} ({findings.kind}): {findings.checked} parts read, {whole}"))
    for text in (*findings.problems[:_MOST_SHOWN], *findings.notes[:_MOST_SHOWN]):
        output.show(output.printable(f"  {text}"))
