"""A training step by itself: what capturing does to it, as far as it shows without a GPU, and what it keeps alive."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from affmae_engine.config import RunConfig, TrainConfig
from affmae_engine.data.labels import IGNORE
from affmae_engine.model.build import build_autoencoder, build_segmenter, encoder_layers
from affmae_engine.runtime.device import pick_device
from affmae_engine.train import step as step_module
from affmae_engine.train.losses import SegmentationLoss
from affmae_engine.train.metrics import Stopwatch
from affmae_engine.train.optim import build_adamw, layer_decay_groups
from affmae_engine.train.pretraining import reconstruction_losses
from affmae_engine.train.step import EAGER_STEPS, TrainStep

Make = Callable[..., object]
CPU = TrainConfig(device="cpu", precision="fp32")


class FakeGraph:
    """Stands for `CudaGraphedFunction`: runs the function once when captured, and reuses its results' memory."""

    def __init__(self, function: Callable[[dict[str, Tensor]], dict[str, Tensor]], example: dict, pool: None) -> None:
        self._function = function
        self._results = {name: value.clone() for name, value in function(example).items()}

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, value in self._function(batch).items():
            self._results[name].copy_(value)
        return self._results


@pytest.fixture
def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(step_module, "CudaGraphedFunction", FakeGraph)


def take(take_step: TrainStep, *batches: dict[str, Tensor]) -> step_module.StepResult:
    return take_step(iter(batches), seed=torch.manual_seed, watch=Stopwatch())


@pytest.mark.usefixtures("fake_graphs")
def test_losses_of_a_captured_step_are_those_of_all_micro_batches(make_toy: Make, make_config: Make) -> None:
    """Its backward pass reuses the memory of its results."""
    choice = pick_device(CPU)
    data = [{"x": torch.full((4, 6), float(size))} for size in (1, 10, 100)]
    losses = []
    for record in (False, True):
        task, optim = make_toy().task, make_config().optim
        task.model.eval()  # no dropout: the two steps see the same
        optimizer = build_adamw(task.parameter_groups(optim), optim)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        take_step = TrainStep(
            task.model, task.losses, optimizer, scaler, choice, accumulate=3, clip_norm=1.0, record=record
        )
        for _ in range(EAGER_STEPS + 1):
            taken = take(take_step, *data)
        losses.append(taken.losses)
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(value, losses[1][name]) for name, value in losses[0].items())


def test_a_step_that_is_dropped_lets_go_of_the_optimizer(make_toy: Make, make_config: Make) -> None:
    task, optim = make_toy().task, make_config().optim
    optimizer = build_adamw(task.parameter_groups(optim), optim)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    alive = weakref.ref(optimizer)
    gc.collect()
    gc.disable()
    try:
        take_step = TrainStep(task.model, task.losses, optimizer, scaler, pick_device(CPU), accumulate=1, clip_norm=1.0)
        take(take_step, {"x": torch.ones(4, 6)})
        del optimizer, take_step
        assert alive() is None
    finally:
        gc.enable()


def test_running_out_of_memory_raises_and_lets_go_of_the_pass(make_toy: Make, make_config: Make) -> None:
    task, optim = make_toy().task, make_config().optim
    optimizer = build_adamw(task.parameter_groups(optim), optim)
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    alive: list[weakref.ref] = []

    def losses(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        found = task.losses(model, batch)
        if alive:
            alive.append(weakref.ref(found["loss"]))
            raise RuntimeError("wrapped") from torch.OutOfMemoryError("Tried to allocate 2 GiB")
        alive.append(weakref.ref(found["loss"]))
        return found

    scaler = torch.amp.GradScaler("cpu", enabled=False)
    take_step = TrainStep(task.model, losses, optimizer, scaler, pick_device(CPU), accumulate=2, clip_norm=1.0)
    with pytest.raises(torch.OutOfMemoryError, match="2 GiB") as caught:
        take(take_step, {"x": torch.ones(4, 6)}, {"x": torch.ones(4, 6)})
    assert [reference() for reference in alive] == [None, None], "while the exception is still held"
    assert caught.value.__context__ is None
    assert all(parameter.grad is None for parameter in task.model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())


def test_a_loss_or_gradient_that_is_not_finite_is_bad(make_toy: Make, make_config: Make) -> None:
    for poison, bad in ((1.0, False), (float("inf"), True), (float("nan"), True)):
        task, optim = make_toy().task, make_config().optim
        optimizer = build_adamw(task.parameter_groups(optim), optim)
        scaler = torch.amp.GradScaler("cpu", enabled=False)

        def losses(model: nn.Module, batch: dict[str, Tensor], task=task, poison=poison) -> dict[str, Tensor]:
            found = task.losses(model, batch)
            return {**found, "loss": found["loss"] + (poison - 1.0)}

        take_step = TrainStep(task.model, losses, optimizer, scaler, pick_device(CPU), accumulate=1, clip_norm=1.0)
        assert bool(take(take_step, {"x": torch.ones(4, 6)}).bad) == bad


@pytest.mark.usefixtures("fake_graphs")
def test_memory_short_in_the_capture_of_the_update_changes_nothing(
    make_toy: Make, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp16, after the gradients were unscaled: the repeated step unscales them again, with the same scale."""
    choice = pick_device(TrainConfig(device="cpu", precision="fp16"))
    data = [{"x": torch.randn(4, 6, generator=torch.Generator().manual_seed(i))} for i in range(EAGER_STEPS + 2)]
    outcomes = []
    for short in (False, True):
        task, optim = make_toy().task, make_config().optim
        optimizer = build_adamw(task.parameter_groups(optim), optim)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

        def make_step(record: bool, parts: tuple = (task, optimizer, scaler)) -> TrainStep:
            task, optimizer, scaler = parts
            return TrainStep(
                task.model, task.losses, optimizer, scaler, choice, accumulate=1, clip_norm=1.0, record=record
            )

        take_step = make_step(record=short)
        for number, batch in enumerate(data):
            if short and number == EAGER_STEPS:
                with monkeypatch.context() as patched:
                    patched.setattr(optimizer, "step", _out_of_memory)
                    with pytest.raises(torch.OutOfMemoryError, match="2 GiB"):
                        take(take_step, batch)
                take_step = make_step(record=False)
            assert not take(take_step, batch).bad
        outcomes.append((scaler.state_dict(), task.model.state_dict()))
    (scale, weights), (scale_again, weights_again) = outcomes
    assert scale == scale_again
    assert all(torch.equal(tensor, weights_again[name]) for name, tensor in weights.items())


class HostReads(TorchDispatchMode):
    """Collects the operations that would wait for a GPU: they read a value, or have a shape that depends on one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.__name__
        indices = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        by_mask = any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)
        if by_mask or any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique")):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["affmae", "vit-mae"])
@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_nothing_in_a_step_waits_for_the_device(name: str, family: str) -> None:
    """Else it could not be captured."""
    torch.manual_seed(0)
    config = RunConfig.model_validate({"model": {"family": family, "size": "tiny"}})
    image = torch.randn(2, 1, 64, 64)
    if name == "pretrain":
        model: nn.Module = build_autoencoder(config.model, config.loss)
        cells = torch.stack([torch.randperm(64) for _ in range(2)])
        batch, losses = {"image": image, "visible": cells[:, :32], "masked": cells[:, 32:]}, reconstruction_losses
    else:
        model = build_segmenter(config.model, 3)
        loss = SegmentationLoss(config.finetune, config.loss, [1.0, 2.0, 0.5])
        batch = {"image": image, "labels": torch.randint(IGNORE, 3, (2, 64, 64))}

        def losses(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return loss(model(batch["image"]), batch["labels"])

    groups = layer_decay_groups(model, config.optim, encoder_layers(config.model))
    optimizer = build_adamw(groups, config.optim)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    take_step = TrainStep(model, losses, optimizer, scaler, pick_device(CPU), accumulate=2, clip_norm=1.0)
    with HostReads() as reads:
        take(take_step, batch, batch)
    assert reads.found == []


def _out_of_memory(*arguments: object) -> None:
    raise torch.OutOfMemoryError("Tried to allocate 2 GiB")
