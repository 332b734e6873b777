"""Work that nothing waits for in a backward pass, on a second CUDA stream.

Weight gradients are a third of the time of all matrix products, and nothing before the optimizer reads them. Run beside
the chain of gradients they fill the multiprocessors that its many short kernels leave idle. In a recorded step the
second stream becomes a branch of the CUDA graph. Results are the same bits: the kernels are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")
_streams: dict[int, torch.cuda.Stream] = {}


class SideStream:
    """Runs functions beside the current stream of a GPU; on other devices at once.

    Tensors that a function reads are kept alive until the current stream has waited for it, because the allocator
    would hand their memory to the next kernel otherwise. `turn` bounds how many those are.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = _stream_of(device) if device.type == "cuda" else None
        self._read: list[tuple[Tensor, ...]] = []
        self._read_before: list[tuple[Tensor, ...]] = []
        self._done_before: torch.cuda.Event | None = None

    def run(self, function: Callable[..., _T], *tensors: Tensor) -> _T:
        """function(*tensors), which reads what the current stream has computed so far."""
        if self._stream is None:
            return function(*tensors)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._read.append(tensors)
        with torch.cuda.stream(self._stream):
            return function(*tensors)

    def turn(self) -> None:
        """Ends one turn of a loop: the current stream waits for the functions of the turn before."""
        if self._stream is None:
            return
        if self._done_before is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._done_before)
        self._done_before = self._stream.record_event()
        self._read_before, self._read = self._read, []

    def join(self) -> None:
        """The current stream waits for everything that was run."""
        if self._stream is None:
            return
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._read, self._read_before = [], []


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[SideStream]:
    """A `SideStream` that is joined at the end of the block."""
    side = SideStream(device)
    try:
        yield side
    finally:
        side.join()


def _stream_of(device: torch.device) -> torch.cuda.Stream:
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _streams:
        _streams[index] = torch.cuda.Stream(index)
    return _streams[index]
