"""A step over several micro-batches whose backward pass reuses the memory of its results, as a recorded one does."""

from collections.abc import Callable

import torch
from torch import Tensor

from affmae_engine.config import TrainConfig
from affmae_engine.train.device import pick_device
from affmae_engine.train.metrics import Stopwatch
from affmae_engine.train.optim import build_adamw
from affmae_engine.train.step import TrainStep

Make = Callable[..., object]


def test_losses_of_a_recorded_step_are_those_of_all_micro_batches(make_toy: Make, make_config: Make) -> None:
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
            take_step._backward = _Overwriting(take_step._backward)
        losses.append(take_step(iter(data), seed=torch.manual_seed, watch=Stopwatch()).losses)
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(value, losses[1][name]) for name, value in losses[0].items())


class _Overwriting:
    """Returns the same tensors at every call, as the replay of a graph does."""

    def __init__(self, function: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
        self._function, self._results = function, dict[str, Tensor]()

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, value in self._function(batch).items():
            self._results.setdefault(name, torch.empty_like(value)).copy_(value)
        return self._results
