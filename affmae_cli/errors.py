"""What a failed command shows: known errors as a line and a hint with the exit code of their class.

Errors are caught in the command group, not around it, so that tests through Typer's runner see the same text and exit
code as a shell. Exceptions of other types are bugs of ours and keep their traceback.
"""

from __future__ import annotations

import os
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from affmae_cli import output
from affmae_engine.errors import AffmaeError, Interrupted, of_system

_INTERRUPTED = 130
_BROKEN_PIPE = 141


class ErrorGroup(TyperGroup):
    """The root command; turns known exceptions of any command into text on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command.

        Raises:
            typer.Exit: with the exit code of the failure.
        """
        try:
            result = super().invoke(ctx)
            output.flush_results()
        except AffmaeError as error:
            report(error)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            report(Interrupted("interrupted"))
            raise typer.Exit(_INTERRUPTED) from error
        except BrokenPipeError as error:
            raise typer.Exit(_BROKEN_PIPE) from error
        except OSError as error:
            refused = of_system(error)
            if refused is None:
                raise
            refused.__cause__ = error
            report(refused)
            raise typer.Exit(refused.exit_code) from error
        return result


def report(error: AffmaeError) -> None:
    """Print an error and its hint to stderr; with AFFMAE_DEBUG=1 the traceback comes first."""
    if os.environ.get("AFFMAE_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error)
    stopped = isinstance(error, Interrupted)
    output.say(error.message, label="stopped" if stopped else "error", style="bold yellow" if stopped else "bold red")
    if error.hint:
        output.say(error.hint, label="hint", style="bold cyan")
