"""Ends this process when the one that started it is gone, so that nothing keeps a card busy for nobody.

The parent holds the other end of the standard input and never writes again; a parent that is killed lets go of it.
"""

from __future__ import annotations

import os
import threading
from typing import TextIO


def end_with_parent(stdin: TextIO) -> None:
    """Watch `stdin` in a thread; exit at once, with code 1, when it ends."""
    threading.Thread(target=_watch, args=(stdin,), daemon=True).start()


def _watch(stdin: TextIO) -> None:
    stdin.read()
    os._exit(1)
