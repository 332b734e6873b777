"""A segmenter as a function from a batch of tiles to class probabilities, on a GPU recorded as a CUDA graph.

Softmax comes before blending: averaging probabilities is bounded and does not let one tile's large logits win.

Axes: B tiles, C classes, T edge of a tile.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from affmae_engine.errors import ResourceError
from affmae_engine.runtime.cuda_graphs import CudaGraphedFunction
from affmae_engine.runtime.memory import HEADROOM, LEAST_HEADROOM, free_memory, largest_that_fits, out_of_memory
from affmae_kernels.launch import obstacle
from affmae_kernels.precompile import rehearse

LARGEST_BATCH = 32
"""Tiles per forward pass on a GPU, where memory allows."""
ON_CPU = 4
"""Tiles per forward pass on a CPU, where larger batches bring no speed."""
WARM_UP = 3
"""Eager calls before one is recorded: libraries make their workspaces in the first ones."""

FLIPS: tuple[tuple[int, ...], ...] = ((), (1,), (2,), (1, 2))
"""Axes of [B, T, T] that are flipped, for test-time augmentation."""


class TileNetwork:
    """A segmenter in eval mode on its device.

    Args:
        model: returns {"logits": [B, C, T, T]} for images [B, 1, T, T]; it is used as it is, on `device` already.
        classes: C.
        device: where.
        autocast: dtype of the autocast context; None opens none (one opened by the caller stays in force).
        excluded: classes that are never predicted (an ignored label that has its own value).
        tta: average the probabilities of the tile and its flips along y, along x and along both.
        record: replay a CUDA graph for each (batch, tile); on a GPU only.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        classes: int,
        device: torch.device,
        autocast: torch.dtype | None = None,
        excluded: Sequence[int] = (),
        tta: bool = False,
        record: bool = False,
    ) -> None:
        self.model, self.classes, self.device = model, classes, device
        self._autocast, self._tta = autocast, tta
        self._excluded = [index for index in excluded if 0 <= index < classes]
        self._record = record and device.type == "cuda"
        self._recorded: dict[tuple[int, int], Callable[[dict[str, Tensor]], dict[str, Tensor]] | None] = {}

    @property
    def padded(self) -> bool:
        """Whether batches must be full, because a graph has one shape."""
        return self._record

    def probabilities(self, tiles_BTT: Tensor) -> Tensor:
        """Class probabilities, float32 [B, C, T, T]; where the pass is recorded, the next call overwrites them.

        Args:
            tiles_BTT: float32 on the device.
        """
        if not self._record:
            return self._forward(tiles_BTT)
        key = len(tiles_BTT), tiles_BTT.shape[-1]
        if key not in self._recorded:
            self._recorded[key] = self._capture(tiles_BTT)
        replay = self._recorded[key]
        return self._forward(tiles_BTT) if replay is None else replay({"tiles": tiles_BTT})["probabilities"]

    def forget(self) -> None:
        """Give back the memory of recorded passes and what the allocator keeps."""
        self._recorded.clear()
        free_memory(self.device)

    def choose_batch(self, tile: int, reserved: int = 0) -> int:
        """Tiles per forward pass: on a GPU as many as fit its free memory, `LARGEST_BATCH` at most.

        Args:
            tile: T.
            reserved: bytes that are needed besides.

        Raises:
            ResourceError: not even one tile fits.
        """
        if self.device.type != "cuda":
            return ON_CPU

        def peak(size: int) -> int | None:
            free_memory(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            try:
                self._forward(torch.zeros(size, tile, tile, device=self.device))
            except Exception as error:
                if out_of_memory(error) is None:
                    raise
                return None
            return torch.cuda.max_memory_reserved(self.device)

        self._compile(tile)
        if peak(1) is None:
            raise tile_too_large(tile, self.device)
        free_memory(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        spare = max(int(HEADROOM * total), LEAST_HEADROOM) + reserved
        size = largest_that_fits(LARGEST_BATCH, peak, free + torch.cuda.memory_reserved(self.device) - spare)
        free_memory(self.device)
        return size

    def tiles_per_second(self, batch: int, tile: int, passes: int = 3) -> float:
        """Rate of the network alone, measured on zeros after a warm-up."""
        tiles_BTT = torch.zeros(batch, tile, tile, device=self.device)
        for count in (1, passes):
            self._wait()
            began = time.perf_counter()
            for _ in range(count):
                self.probabilities(tiles_BTT)
            self._wait()
        return batch * passes / (time.perf_counter() - began)

    @contextlib.contextmanager
    def interruptible(self, check: Callable[[], None]) -> Iterator[None]:
        """On a CPU, call `check` before every module inside the block: a batch may take many seconds there."""
        hooks = []
        if self.device.type == "cpu":
            hooks = [m.register_forward_pre_hook(lambda _module, _inputs: check()) for m in self.model.modules()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _forward(self, tiles_BTT: Tensor) -> Tensor:
        if not self._tta:
            return self._softmax(tiles_BTT)
        total: Tensor | None = None
        for axes in FLIPS:
            part_BCTT = self._softmax(tiles_BTT.flip(axes)).flip([axis + 1 for axis in axes])
            total = part_BCTT if total is None else total.add_(part_BCTT)
        assert total is not None
        return total / len(FLIPS)

    def _softmax(self, tiles_BTT: Tensor) -> Tensor:
        context: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self._autocast is not None:
            context = torch.autocast(self.device.type, dtype=self._autocast)
        with context:
            logits_BCTT = self.model(tiles_BTT[:, None])["logits"]
        logits_BCTT = logits_BCTT.float()
        if self._excluded:
            logits_BCTT[:, self._excluded] = -torch.inf
        return logits_BCTT.softmax(dim=1)

    def _capture(self, tiles_BTT: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]] | None:
        """The pass as a graph; None where it cannot be recorded, and is run as it is."""
        for _ in range(WARM_UP):
            self._forward(tiles_BTT)
        try:
            return CudaGraphedFunction(
                lambda inputs: {"probabilities": self._forward(inputs["tiles"])},
                {"tiles": tiles_BTT},
                torch.cuda.graph_pool_handle(),
            )
        except RuntimeError as error:
            if out_of_memory(error) is not None:
                raise
            return None

    def _compile(self, tile: int) -> None:
        """Compile the Triton kernels of a pass on all cores, instead of one after the other in the first pass."""
        if obstacle(self.device.type, self.device.index or 0) is not None:
            return
        named = itertools.chain(self.model.named_parameters(), self.model.named_buffers())
        tensors = {name: torch.empty_like(tensor, device="meta") for name, tensor in named}
        image_BCHW = torch.empty(2, 1, tile, tile, device="meta")
        context: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self._autocast is not None:
            context = torch.autocast(self.device.type, dtype=self._autocast)
        with torch.no_grad(), context:
            rehearse(lambda: functional_call(self.model, tensors, (image_BCHW,)))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def tile_too_large(tile: int, device: torch.device) -> ResourceError:
    """The error for a single tile that does not fit."""
    return ResourceError(
        f"one tile of {tile} x {tile} pixels does not fit the memory of {device}",
        "use a smaller --tile, close other programs on the device, or use --device cpu",
    )
