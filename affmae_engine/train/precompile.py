"""Compile the kernels of a training before its first step, on all cores, instead of one after the other during it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from affmae_engine.runtime.device import DeviceChoice
from affmae_kernels.adamw import AdamW
from affmae_kernels.precompile import rehearse


class _OnMeta:
    """The model with tensors of the same shapes on the meta device in place of its parameters and buffers."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._tensors = {
            name: torch.empty_like(tensor, device="meta", requires_grad=tensor.requires_grad)
            for name, tensor in named.items()
        }

    def __call__(self, *arguments: Any) -> Any:
        return functional_call(self._model, self._tensors, arguments)


def compile_kernels(
    model: nn.Module,
    losses: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]] | None,
    batch: Mapping[str, Tensor],
    choice: DeviceChoice,
    *,
    finish: Callable[[dict[str, Tensor]], object] | None = None,
    raw: Mapping[str, Tensor] | None = None,
) -> int:
    """Compile the Triton kernels of a step and of a forward pass in eval mode, or load them from Triton's cache.

    Args:
        model: built from the operations of `affmae_kernels`; it is left as it is.
        losses: the task's loss function; None: only the forward pass, of `batch["image"]`.
        batch: a batch; only shapes and dtypes are looked at.
        choice: device and precision of the training.
        finish, raw: what makes training samples of a batch on the device (`TrainStep`), and such a batch.

    Returns:
        The number of kernels.
    """
    on_meta, training = _OnMeta(model), model.training
    example, unfinished = _empty(batch), _empty(raw or {})

    def update() -> None:
        one = [torch.empty(1, device="meta")]
        adamw = AdamW(one, one, one, one[0], one, [0.0], betas=(0.9, 0.95), eps=1e-8)
        adamw.update(one, one[0], one[0])

    def passes() -> None:
        if finish is not None:
            finish(unfinished)
        if losses is not None:
            model.train()
            with choice.autocast():
                loss = losses(on_meta, example)["loss"]
            loss.backward()
            update()
        model.eval()
        with torch.no_grad(), choice.autocast():
            if losses is None:
                on_meta(example["image"])
            else:
                losses(on_meta, example)

    try:
        return len(rehearse(passes))
    finally:
        model.train(training)


def _empty(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in batch.items()}
