"""AdamW: its parameter groups, and its state as named tensors.

Every implementation takes two scalars on the device, `grad_scale` (every gradient is divided by it) and `found_inf`
(the update is left out when it is 1): clipping and the skipping of a non-finite step cost no extra pass over the
gradients and no synchronization with the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch._dynamo  # torch.optim imports it when the first optimizer is made, which would be part of the first step
from torch import Tensor, nn

from affmae_engine.config import OptimConfig
from affmae_engine.errors import CorruptError
from affmae_engine.model.build import EncoderLayers
from affmae_kernels.adamw import AdamW
from affmae_kernels.dispatch import choose_backend


def decay_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float, lr_scale: Callable[[str], float]
) -> list[dict[str, Any]]:
    """Optimizer groups: no weight decay on parameters of fewer than two axes (biases, norms, temperatures).

    Args:
        named_parameters: of the model; frozen ones are left out.
        weight_decay: of all others.
        lr_scale: factor on the learning rate by parameter name; parameters of equal factor share a group.

    Returns:
        groups with "params", "weight_decay" and "lr_scale", in order of first appearance.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((decay, lr_scale(name)), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), parameters in groups.items()
    ]


class GpuAdamW(torch.optim.AdamW):
    """AdamW whose update of all parameters is one kernel, see `affmae_kernels.adamw`.

    State and groups are those of `torch.optim.AdamW`; learning rates are tensors on the device, so that a captured step
    reads what `set_learning_rate` wrote. `grad_scale` and `found_inf` are set before each step.
    """

    grad_scale: Tensor
    found_inf: Tensor

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        super().__init__(groups, lr=config.lr, betas=config.betas)
        self._step_P = torch.empty(0)
        self._adamw: AdamW | None = None
        self._updated: list[Tensor] = []

    def prepare(self) -> list[Tensor]:
        """Make the state and note where everything is; needed before a step is captured. Returns the gradients."""
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in trained]
        state = [self.state[p] for p in trained]
        for parameter, own in zip(trained, state, strict=True):
            if not own:
                own["step"] = torch.zeros((), device=parameter.device)
                own["exp_avg"], own["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        # The steps of all parameters lie in one tensor; loading a checkpoint replaces any of these tensors.
        tensors = [*trained, *(own[kind] for kind in ("exp_avg", "exp_avg_sq") for own in state)]
        same = len(tensors) == len(self._updated) and all(a is b for a, b in zip(tensors, self._updated, strict=True))
        if not same or any(own["step"]._base is not self._step_P for own in state):
            self._step_P = torch.stack([own["step"].float() for own in state])
            for own, step in zip(state, self._step_P.unbind(), strict=True):
                own["step"] = step
            groups = {p: group for group in self.param_groups for p in group["params"]}
            self._adamw = AdamW(
                trained, [own["exp_avg"] for own in state], [own["exp_avg_sq"] for own in state], self._step_P,
                [groups[p]["lr"] for p in trained], [groups[p]["weight_decay"] for p in trained],
                betas=self.defaults["betas"], eps=self.defaults["eps"],
            )  # fmt: skip
            self._updated = tensors
        assert self._adamw is not None
        self._adamw.prepare(gradients)
        return gradients

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; nothing changes where `found_inf` is 1."""
        gradients = self.prepare()
        assert self._adamw is not None
        self._adamw.update(gradients, self.grad_scale, self.found_inf)


def build_adamw(groups: list[dict[str, Any]], config: OptimConfig, *, backend: str = "auto") -> torch.optim.AdamW:
    """AdamW over groups as `decay_groups` makes them: one kernel on a GPU, else PyTorch's fused implementation.

    On a GPU the learning rates are tensors there, so that a captured step reads what `set_learning_rate` wrote.
    """
    device = groups[0]["params"][0].device
    if device.type == "cuda" and choose_backend(backend, "adamw", device).name == "triton":
        optimizer: torch.optim.AdamW = GpuAdamW(groups, config)
    else:
        optimizer = torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, fused=True, capturable=device.type == "cuda"
        )
    if device.type == "cuda":
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(config.lr, device=device)
    return optimizer


def allocate_state(optimizer: torch.optim.AdamW) -> None:
    """Make AdamW's moments now (zeros), not in its first step, so that memory is short before training or never.

    It takes a step that is marked as not finite, and such a step changes nothing.
    """
    device = optimizer.param_groups[0]["params"][0].device
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.grad_scale = torch.ones((), device=device)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.ones((), device=device)  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group `rate` times its own `lr_scale`."""
    rates = [rate * group["lr_scale"] for group in optimizer.param_groups]
    on_device = [group["lr"] for group in optimizer.param_groups if isinstance(group["lr"], Tensor)]
    if on_device:  # two launches, however many groups
        torch._foreach_zero_(on_device)
        torch._foreach_add_(on_device, rates)
        return
    for group, value in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = value


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors, "parameter.exp_avg", "parameter.exp_avg_sq", "parameter.step"."""
    return {
        f"{name}.{kind}": tensor
        for name, parameter in model.named_parameters()
        for kind, tensor in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give an optimizer the state that `optimizer_tensors` returned.

    Raises:
        CorruptError: the tensors do not belong to this model.
    """
    parameters = dict(model.named_parameters())
    state: dict[Tensor, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".")
        parameter = parameters.get(name)
        if parameter is None or (tensor.ndim and tensor.shape != parameter.shape):
            raise CorruptError(f"the optimizer state {key!r} does not belong to this model", "was the model changed?")
        state.setdefault(parameter, {})[kind] = tensor.to(parameter.device, copy=True)
    optimizer.state.update(state)


def layer_decay_groups(model: nn.Module, optim: OptimConfig, layers: EncoderLayers) -> list[dict[str, Any]]:
    """Optimizer groups whose learning rate falls by `layer_decay` per encoder layer, counted from the decoder.

    The last encoder block has `layer_decay` times the rate of decoder and heads, the patch embedding the smallest one.
    Parameters of fewer than two axes have no weight decay.
    """

    def lr_scale(name: str) -> float:
        depth = layers.depth_of(name)
        return 1.0 if depth is None else optim.layer_decay ** (layers.count - depth)

    return decay_groups(model.named_parameters(), optim.weight_decay, lr_scale)
