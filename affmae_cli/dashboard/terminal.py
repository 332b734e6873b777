"""Gives the terminal back whatever ends the dashboard.

Textual restores it after quitting, an exception or Ctrl-C, but not after SIGTERM or SIGHUP, whose default action kills
the process on the spot: the shell would be left in the alternate screen, without echo, with mouse reports. Here both
become an ordinary exit of the app. A hangup's terminal is gone, so writing to it may fail; that must not matter. And
Textual's reading thread would read the end of it for ever, as fast as it can: `gone` is asked, and the process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import termios
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@contextlib.contextmanager
def signals_handled(leave: Callable[[int], None]) -> Iterator[None]:
    """Within the running event loop, call `leave` with the number of one of SIGNALS in place of dying of it."""
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        loop.add_signal_handler(number, leave, number)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


def gone() -> bool:
    """Whether the terminal that this process was started on was hung up."""
    try:
        termios.tcgetattr(sys.__stdin__)  # type: ignore[arg-type]
    except (termios.error, OSError, ValueError):
        return True
    return False
