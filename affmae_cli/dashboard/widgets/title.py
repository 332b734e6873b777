"""Titles of boxes: text, never markup, and the same one again costs nothing."""

from __future__ import annotations

from textual.content import Content
from textual.widget import Widget


def retitle(widget: Widget, title: str) -> None:
    """Give a box a title."""
    text = Content(title)
    if widget.border_title != text.markup:  # setting it draws the widget anew
        widget.border_title = text
