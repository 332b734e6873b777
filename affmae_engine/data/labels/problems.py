"""Many problems, one error: a labelled set is refused with a list of everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence

from affmae_engine.errors import InputError

_MOST_LINES = 20


def refusal(problems: Sequence[str], hint: str = "") -> InputError:
    """An error that lists the problems, one a line; a single problem stands on the first line."""
    if len(problems) == 1:
        return InputError(f"the labels cannot be used: {problems[0]}", hint)
    lines = [f"the labels cannot be used, {len(problems)} problems:", *(f"  {text}" for text in problems[:_MOST_LINES])]
    if len(problems) > _MOST_LINES:
        lines.append(f"  and {len(problems) - _MOST_LINES} more")
    return InputError("\n".join(lines), hint)


def listed(items: Sequence[object], most: int = 12) -> str:
    """A few items in words, `1, 2, 3 and 40 more`."""
    shown = ", ".join(f"{item}" for item in items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"
