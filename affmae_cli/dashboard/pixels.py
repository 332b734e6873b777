"""Pictures as real pixels, by the optional package textual-image: in terminals with sixel or kitty graphics.

Importing that package asks the terminal what it can and reads the answer where keys are read. So it is imported only
before Textual takes the terminal, and only when a terminal is there that answers at once: an answer that comes too late
for the package, which waits for 0.1 s, would be taken for pressed keys.
"""

from __future__ import annotations

import importlib.util
import os
import re
import select
import sys
import termios
import time
import tty
from typing import TYPE_CHECKING, Any

from affmae_cli.dashboard.control import Pictures

if TYPE_CHECKING:
    from textual.widget import Widget

_PACKAGE = "textual_image"
_AT_ONCE_S, _PATIENCE_S = 0.05, 1.0
_QUESTION = b"\x1b[>q\x1b[c"  # its name and version, which not every terminal tells; its attributes, which each does
_ANSWER = re.compile(rb"\x1b\[\?[\d;]*c\Z")
_PLACEHOLDERS = re.compile(rb"kitty\((0\.(2[89]|[3-9]\d)|[1-9])|ghostty")
"""Terminals whose kitty graphics can be put between characters, which the package needs and others do not tell."""


def pixel_widget(wanted: Pictures) -> type[Widget] | None:
    """The class of a widget that draws a Pillow image as pixels on this terminal; None: half blocks are to be drawn."""
    if wanted == "blocks" or importlib.util.find_spec(_PACKAGE) is None:
        return None
    try:
        answer = _answer()
        if answer is None:
            return None
        found, widgets = _modules()
        if found.Image is found.SixelImage:
            return widgets.SixelImage
        if found.Image is found.TGPImage and _PLACEHOLDERS.search(answer):
            return widgets.TGPImage
    except Exception:  # whatever the package or the terminal does: half blocks show in any
        return None
    return None


def _modules() -> tuple[Any, Any]:
    """What the package draws with, of which `Image` is what it takes this terminal to understand, and its widgets."""
    from textual_image import renderable, widget

    return renderable, widget


def _answer() -> bytes | None:
    """What the terminal says of itself, taken from the keys; None without a terminal, or one that answers at once."""
    keys, screen = sys.__stdin__, sys.__stdout__
    if keys is None or screen is None or not (keys.isatty() and screen.isatty()):
        return None
    before = termios.tcgetattr(keys)
    tty.setcbreak(keys, termios.TCSANOW)
    try:
        os.write(screen.fileno(), _QUESTION)
        asked, answer = time.monotonic(), b""
        while not _ANSWER.search(answer):
            left = asked + _PATIENCE_S - time.monotonic()
            if left <= 0 or not select.select([keys.fileno()], [], [], left)[0]:
                return None
            answer += os.read(keys.fileno(), 1)
        return answer if time.monotonic() - asked < _AT_ONCE_S else None
    finally:
        termios.tcsetattr(keys, termios.TCSANOW, before)
