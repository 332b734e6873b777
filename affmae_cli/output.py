"""Where text goes: results to stdout, everything else to stderr.

Nothing that comes from outside (file names, values, messages) is read as Rich markup, and control characters in it are
shown, not sent to the terminal. Output that is not a terminal has no control codes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affmae_engine.errors import ResourceError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


@cache
def console() -> Console:
    """The console on stderr: notes, progress, errors."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, emoji=False)


def prepare_streams() -> None:
    """Make both streams exist and able to print any text: what the locale's encoding lacks is shown as an escape."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # started with the descriptor closed, as some job schedulers do
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 (lives as long as the process)
        reconfigure = getattr(getattr(sys, name), "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def say(text: str, *, label: str = "", style: str = "") -> None:
    """Print one message to stderr, unwrapped, with an optional coloured label before it."""
    from rich.text import Text

    line = Text(f"{label}: " if label else "", style=style)
    line.append(printable(text), style="not bold default" if label else style)
    console().print(line, soft_wrap=True)


def show(renderable: RenderableType) -> None:
    """Print a result (text or a Rich table) to stdout. A string is printed as it is, not as markup."""
    if isinstance(renderable, str):
        _write(renderable if renderable.endswith("\n") else renderable + "\n")
        return
    from rich.console import Console

    terminal = Console(highlight=False, emoji=False)
    with _results(), terminal.capture() as rendered:
        terminal.print(renderable)
    _write(rendered.get())


def print_json(value: Any) -> None:
    """Print one JSON document to stdout. Paths become strings, non-finite numbers null; ASCII only."""
    _write(json.dumps(_plain(value), indent=2, allow_nan=False) + "\n")


def toml_value(value: Any) -> str:
    """One value as TOML on one line; None, which TOML lacks, as `none`."""
    import tomli_w

    if value is None:
        return "none"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {toml_value(item)}' for key, item in value.items())}}}"
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")


def printable(text: str) -> str:
    """`text` with control characters and undecodable bytes as visible escapes; line ends are kept."""
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def flush_results() -> None:
    """Write out what stdout still buffers.

    Raises:
        ResourceError: stdout leads to a full disk.
        BrokenPipeError: nobody reads any more.
    """
    with _results():
        sys.stdout.flush()


def _write(text: str) -> None:
    with _results():
        sys.stdout.write(text)


@contextlib.contextmanager
def _results() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # What is still buffered can never be written: point the descriptor at nothing, so that the interpreter's last
        # flush stays quiet. A replaced stdout without a descriptor has nothing to flush.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
        if error.errno == errno.EPIPE:
            raise
        raise ResourceError(f"cannot write to standard output: {error.strerror}") from error


def _plain(value: Any) -> Any:
    from affmae_engine.events import finite

    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else finite(value)
