"""Text from elsewhere (names of runs and classes, messages) for one line of a terminal."""

from __future__ import annotations

from affmae_cli.output import printable


def one_line(text: str) -> str:
    """`text` with control characters as visible escapes and line ends as spaces."""
    return printable(text).replace("\n", " ")
