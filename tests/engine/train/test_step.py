"""A training step by itself: what recording does to it, as far as it shows without a card, and what it keeps alive."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from affmae_engine.config import TrainConfig
from affmae_engine.train import step as step_module
from affmae_engine.train.device import pick_device
from affmae_engine.train.metrics import Stopwatch
from affmae_engine.train.optim import build_adamw
from affmae_engine.train.step import EAGER_STEPS, TrainStep

Make = Callable[..., object]


def test_losses_of_a_recorded_step_are_those_of_all_micro_batches(make_toy: Make, make_config: Make) -> None:
    """Its backward pass reuses the memory of its results."""
    choice = pick_device(TrainConfig(device="cpu", precision="fp32"))
    data = [{"x": torch.full((4, 6), float(size))} for size in (1, 10, 100)]
    losses = []
    for recorded in (False, True):
        task, optim = make_toy().task, make_config().optim
        task.model.eval()  # no dropout: the two steps see the same
        optimizer = build_adamw(task.parameter_groups(optim), optim)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        take_step = TrainStep(task.model, task.losses, optimizer, scaler, choice, accumulate=3, clip_norm=1.0)
        if recorded:
            take_step._recorded_backward = _Overwriting(take_step._run_backward)
        losses.append(take_step(iter(data), seed=torch.manual_seed, watch=Stopwatch()).losses)
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(value, losses[1][name]) for name, value in losses[0].items())


def test_a_step_that_is_dropped_lets_go_of_the_optimizer(make_toy: Make, make_config: Make) -> None:
    choice = pick_device(TrainConfig(device="cpu"))
    task, optim = make_toy().task, make_config().optim
    optimizer = build_adamw(task.parameter_groups(optim), optim)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    alive = weakref.ref(optimizer)
    gc.collect()
    gc.disable()
    try:
        take_step = TrainStep(task.model, task.losses, optimizer, scaler, choice, accumulate=1, clip_norm=1.0)
        take_step(iter([{"x": torch.ones(4, 6)}]), seed=torch.manual_seed, watch=Stopwatch())
        del optimizer, take_step
        assert alive() is None
    finally:
        gc.enable()


def test_memory_short_in_the_recording_of_the_update_changes_nothing(
    make_toy: Make, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp16, after the gradients were unscaled: the repeated step unscales them again, with the same scale."""
    choice = pick_device(TrainConfig(device="cpu", precision="fp16"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(step_module, "_Recorded", _Running)
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
                        take_step(iter([batch]), seed=torch.manual_seed, watch=Stopwatch())
                take_step = make_step(record=False)
            taken = take_step(iter([batch]), seed=torch.manual_seed, watch=Stopwatch())
            assert not taken.bad
        outcomes.append((scaler.state_dict(), task.model.state_dict()))
    (scale, weights), (scale_again, weights_again) = outcomes
    assert scale == scale_again
    assert all(torch.equal(tensor, weights_again[name]) for name, tensor in weights.items())


def _out_of_memory(*arguments: object) -> None:
    raise torch.OutOfMemoryError("Tried to allocate 2 GiB")


class _Running:
    """Runs a function where a card would record it."""

    def __init__(self, function: Callable[[dict[str, Tensor]], dict[str, Tensor]], example: dict, pool: None) -> None:
        function(example)


class _Overwriting:
    """Returns the same tensors at every call, as the replay of a graph does."""

    def __init__(self, function: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
        self._function, self._results = function, dict[str, Tensor]()

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, value in self._function(batch).items():
            self._results.setdefault(name, torch.empty_like(value)).copy_(value)
        return self._results
