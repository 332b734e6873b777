"""Capturing CUDA graphs, in a way that leaves the process usable when a capture breaks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def capture(pool: Any = None) -> Iterator[torch.cuda.CUDAGraph]:
    """Capture what the block launches as the CUDA graph that is yielded. Nothing runs before it is replayed.

    Args:
        pool: from `torch.cuda.graph_pool_handle`, when graphs share memory.

    Raises:
        RuntimeError: the block waits for the device, or memory ran out. The process can go on.
    """
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    graph = torch.cuda.CUDAGraph()
    try:
        # The outer block restores the stream, which `torch.cuda.graph` does not when a capture breaks. In "global" mode
        # the data loader's thread, which allocates pinned memory at any moment, would break it.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            yield graph
    except BaseException:
        _leave_capture(pool)
        raise


class CudaGraphedFunction:
    """A function of tensors of fixed shapes as one CUDA graph. Its results live in the graph and are overwritten.

    Args:
        function: what to capture; it must not wait for the device.
        example: arguments.
        pool: memory that several graphs share.

    Raises:
        RuntimeError: the function cannot be captured, or memory ran out.
    """

    def __init__(
        self,
        function: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        example: dict[str, Tensor],
        pool: Any,
    ) -> None:
        self._inputs = {name: tensor.clone() for name, tensor in example.items()}
        with capture(pool) as self._graph:
            self._results = function(self._inputs)

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The function's results for other values of the same shapes.

        Raises:
            ValueError: a shape differs.
        """
        for name, tensor in inputs.items():
            if tensor.shape != self._inputs[name].shape:
                raise ValueError(f"{name} was captured as {list(self._inputs[name].shape)}; got {list(tensor.shape)}")
            self._inputs[name].copy_(tensor, non_blocking=True)
        self._graph.replay()
        return self._results


def _leave_capture(pool: Any) -> None:
    """End what PyTorch leaves open when a capture breaks.

    Its generator would refuse every later random number ("Offset increment outside graph capture"), and its allocator
    would keep memory that several streams used.
    """
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())  # a clone has seed and offset, and is in no capture
    with contextlib.suppress(RuntimeError):  # raised by the first where the capture ended properly
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
