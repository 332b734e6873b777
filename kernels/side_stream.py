"""Work that nothing in a backward pass waits for, as a branch of the CUDA graph that is being captured.

Weight gradients are a third of the time of all matrix products, and nothing before the optimizer reads them. Beside the
chain of gradients they fill the multiprocessors that its many short kernels leave idle. The results are the same bits,
since the kernels are the same. Outside a capture the host is the bottleneck, so everything runs in order there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")
Run = Callable[..., Any]
"""run(function, *arguments): calls function(*arguments), now or beside the current stream."""
_streams: dict[tuple[int, int], torch.cuda.Stream] = {}


class SideStream:
    """Runs functions beside the current stream while that is captured, and at once otherwise.

    Streams of different numbers do not wait for each other. What a function reads is kept alive until the current
    stream has waited for it, because the allocator would hand its memory to the next kernel otherwise. `turn` bounds
    how much that is.
    """

    def __init__(self, device: torch.device, number: int = 0) -> None:
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self._stream = _stream_of(device, number) if capturing else None
        self._read: list[tuple[Any, ...]] = []
        self._read_before: list[tuple[Any, ...]] = []
        self._done_before: torch.cuda.Event | None = None

    def run(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """function(*arguments), which reads what the current stream has computed so far."""
        if self._stream is None:
            return function(*arguments)
        self._stream.wait_stream(torch.cuda.current_stream())
        self._read.append(arguments)
        with torch.cuda.stream(self._stream):
            return function(*arguments)

    def turn(self) -> None:
        """Ends one turn of a loop: the current stream waits for the functions of the turn before."""
        if self._stream is None or not self._read:
            return
        if self._done_before is not None:
            torch.cuda.current_stream().wait_event(self._done_before)
        self._done_before = self._stream.record_event()
        self._read_before, self._read = self._read, []

    def join(self) -> None:
        """The current stream waits for everything that was run."""
        if self._stream is not None and (self._read or self._read_before):
            torch.cuda.current_stream().wait_stream(self._stream)
        self._read, self._read_before = [], []


def at_once(function: Callable[..., _T], *arguments: Any) -> _T:
    """function(*arguments)."""
    return function(*arguments)


def _stream_of(device: torch.device, number: int) -> torch.cuda.Stream:
    index = torch.cuda.current_device() if device.index is None else device.index
    if (index, number) not in _streams:
        _streams[index, number] = torch.cuda.Stream(index)
    return _streams[index, number]
