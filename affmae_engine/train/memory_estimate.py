"""How much memory a training step takes, estimated in a second and without a GPU.

Method: the forward and backward pass of one micro-batch runs on meta tensors, which have shapes and no data, through
the operations that the run would use (Triton kernels are chosen but not launched). Every storage counts from the
operation that makes it until it is freed; the peak is what activations, gradients and temporaries take. Weights and
AdamW's two moments, in fp32, are added.

A ViT is made of PyTorch's own operations, two of which differ on meta tensors. Autocast does nothing, so the whole
network has autocast's dtype here. Attention keeps its scores, so a stand-in keeps what fused attention keeps.

Not counted: preparing the batch on the device, labeled sections that stay on the GPU (at most 1/16 of its memory), the
CUDA context, workspaces of libraries, gaps in the allocator's memory, the loader's processes. docs/presets.md compares
estimates with measurements.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from affmae_engine.config import RunConfig, Task
from affmae_engine.model.build import build_autoencoder, build_segmenter
from affmae_engine.model.masking import draw_mask
from affmae_engine.model.patches import canvas_of
from affmae_engine.train.losses import SegmentationLoss
from affmae_engine.train.pretraining import reconstruction_losses
from affmae_kernels.precompile import without_launching

Losses = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]

_BLOCK = 512
"""Bytes by which PyTorch's CUDA allocator rounds up."""


class PeakMemory(TorchDispatchMode):
    """Counts the storages that operations inside the block make.

    Attributes:
        peak: most bytes alive at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._bytes: dict[int, int] = {}  # by storage; of those alive

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts its results."""
        results = function(*args, **(kwargs or {}))
        for result in tree_iter(results):
            if isinstance(result, Tensor):
                self.count(result)
        return results

    def count(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, unless it is counted already, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._bytes:
            return
        self._bytes[key] = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self._now += self._bytes[key]
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        self._now -= self._bytes.pop(key)


class _AttentionPass(torch.autograd.Function):
    """Allocates what fused attention of [B, H, N, D] does, in both directions, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keeps the arguments, the result and the log-sum-exp [B, H, N] of the scores."""
        result, logsumexp = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, result, logsumexp)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the arguments."""
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _FusedAttention(TorchFunctionMode):
    """Inside, `scaled_dot_product_attention` is `_AttentionPass`."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return _AttentionPass.apply(*args[:3])
        return function(*args, **(kwargs or {}))


class MetaStep:
    """The training step of a configuration on the meta device.

    Args:
        task: whose network, loss function and samples.
        config: resolved.
        dtype: of autocast; fp32: none.
        kernels: the run would use Triton kernels; needs a GPU, whose architecture the launchers ask for.
        classes: of a segmenter.

    Attributes:
        parameters: trained numbers of the network.
    """

    def __init__(self, task: Task, config: RunConfig, *, dtype: torch.dtype, kernels: bool, classes: int = 2) -> None:
        self._dtype, self._kernels = dtype, kernels
        # "auto" takes Triton's kernels for meta tensors while launches are left out.
        backend, edge = "auto" if kernels else "reference", config.image_size
        self._sample = {"image": torch.empty(config.model.channels, edge, edge, device="meta")}
        self._losses: Losses
        with torch.device("meta"):
            if task == "pretrain":
                self._model: nn.Module = build_autoencoder(config.model, config.loss, backend=backend)
                self._losses = reconstruction_losses
            else:
                self._model = build_segmenter(config.model, classes, backend=backend)
                loss = SegmentationLoss(config.finetune, config.loss, [1.0] * classes, backend=backend)
                self._losses = lambda model, batch: loss(model(batch["image"]), batch["labels"])
        if task == "pretrain":
            canvas_hw = canvas_of(edge, edge, config.model.patch_size)
            self._sample["visible"], self._sample["masked"] = draw_mask(canvas_hw, config.mask, seed=0, index=0)
        else:
            self._sample["labels"] = torch.empty(edge, edge, dtype=torch.int64, device="meta")
        self._fixed = sum(t.numel() * t.element_size() for t in (*self._model.parameters(), *self._model.buffers()))
        self._attention: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if config.model.family == "vit-mae":
            self._attention = _FusedAttention()
            self._model.to(dtype)
            self._sample["image"] = self._sample["image"].to(dtype)
        self._model.train()
        self.parameters = sum(p.numel() for p in self._model.parameters() if p.requires_grad)

    def memory(self, micro_batch: int) -> int:
        """Bytes of tensors at the peak of a step with that many images in a forward pass."""
        moments = 2 * 4 * self.parameters
        peak = PeakMemory()
        with without_launching() if self._kernels else contextlib.nullcontext():
            try:
                with peak:
                    batch = {
                        name: torch.empty((micro_batch, *tensor.shape), dtype=tensor.dtype, device="meta")
                        for name, tensor in self._sample.items()
                    }
                    with _autocast_of_meta_tensors(self._dtype), self._attention:
                        loss = self._losses(self._model, batch)["loss"]
                    loss.backward()
            finally:
                self._model.zero_grad(set_to_none=True)
        # The update needs all gradients and no activations, which is less than the backward pass had.
        return self._fixed + moments + peak.peak


@contextlib.contextmanager
def _autocast_of_meta_tensors(dtype: torch.dtype) -> Iterator[None]:
    """Autocast for meta tensors, which stand for CUDA tensors (`precision.feature_dtype`), also where there is no GPU:
    `torch.autocast("cuda")` would turn itself off."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype != torch.float32)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()
