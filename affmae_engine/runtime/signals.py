"""A request to stop, made by a signal or by whoever holds the object, and read by the trainer once per step.

INT, TERM and HUP only set a flag: the trainer finishes its step, saves a checkpoint and raises `Interrupted`. A second
INT ends the process at once: the default action is put back, so that not even a blocked call can delay it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


_OF_THE_GROUP = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """TERM and HUP wait until the end of the block; a process that is started inside never gets them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_GROUP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopRequest:
    """Whether and why the run is asked to stop.

    Args:
        on_signal: called inside the signal handler with the signal's number; must only do what is safe there
            (`os.write`, setting flags).
    """

    def __init__(self, on_signal: Callable[[int], None] | None = None) -> None:
        self._on_signal = on_signal
        self.signal_number: int | None = None
        self._by = ""

    @property
    def requested(self) -> bool:
        """Whether the run should stop after this step."""
        return self.signal_number is not None

    @property
    def reason(self) -> str:
        """What asked for the stop, for messages."""
        return self._by

    def request(self, signal_number: int = signal.SIGINT, *, by: str = "") -> None:
        """Ask for a stop as if that signal had come. by: what asked, when it was no signal."""
        if self.signal_number is None:
            self.signal_number, self._by = int(signal_number), by or signal.Signals(signal_number).name

    @contextlib.contextmanager
    def installed(self) -> Iterator[StopRequest]:
        """Catch the signals inside the block; the handlers from before come back after it.

        In a thread other than the main one nothing is caught: Python delivers no signals there.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        # What the parent chose to ignore (nohup, a background job) stays ignored.
        caught = [number for number in CAUGHT if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._handle) for number in caught}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.request(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._on_signal is not None:
            self._on_signal(number)
