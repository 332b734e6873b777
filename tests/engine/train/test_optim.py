"""Groups, learning rates, and the optimizer's state as named tensors."""

import pytest
import torch
from torch import nn

from affmae_engine.config import OptimConfig
from affmae_engine.errors import CorruptError
from affmae_engine.train.optim import (
    GpuAdamW,
    build_adamw,
    decay_groups,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def stepped(model: nn.Module, optimizer: torch.optim.AdamW, times: int) -> None:
    for i in range(times):
        optimizer.zero_grad()
        model(torch.ones(2, 3) * (i + 1)).square().sum().backward()
        optimizer.step()


def test_one_dimensional_parameters_are_not_decayed() -> None:
    model = small_model()
    groups = decay_groups(model.named_parameters(), 0.05, lambda name: 1.0)
    decayed = {id(p) for g in groups if g["weight_decay"] == 0.05 for p in g["params"]}
    assert decayed == {id(model[0].weight), id(model[2].weight)}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_groups_by_learning_rate_factor_and_frozen_parameters_left_out() -> None:
    model = small_model()
    model[2].bias.requires_grad_(False)
    groups = decay_groups(model.named_parameters(), 0.1, lambda name: 0.5 if name.startswith("0") else 1.0)
    assert sorted((g["weight_decay"], g["lr_scale"]) for g in groups) == [
        (0.0, 0.5),
        (0.0, 1.0),
        (0.1, 0.5),
        (0.1, 1.0),
    ]
    assert all(p is not model[2].bias for g in groups for p in g["params"])
    optimizer = build_adamw(groups, OptimConfig())
    set_learning_rate(optimizer, 0.2)
    assert {g["lr_scale"]: g["lr"] for g in optimizer.param_groups} == {0.5: 0.1, 1.0: 0.2}


def test_state_round_trip_continues_bit_for_bit() -> None:
    model, twin = small_model(), small_model()
    optimizer = build_adamw(decay_groups(model.named_parameters(), 0.05, lambda name: 1.0), OptimConfig())
    stepped(model, optimizer, 3)
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, model).items()}
    assert set(tensors) == {
        f"{name}.{kind}" for name, _ in model.named_parameters() for kind in ("step", "exp_avg", "exp_avg_sq")
    }
    twin.load_state_dict(model.state_dict())
    restored = build_adamw(decay_groups(twin.named_parameters(), 0.05, lambda name: 1.0), OptimConfig())
    load_optimizer_tensors(restored, twin, tensors)
    stepped(model, optimizer, 2)
    stepped(twin, restored, 2)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("key, shape", [("9.weight.exp_avg", (4, 3)), ("0.weight.exp_avg", (3, 4))])
def test_state_of_another_model_is_refused(key: str, shape: tuple[int, int]) -> None:
    model = small_model()
    optimizer = build_adamw(decay_groups(model.named_parameters(), 0.05, lambda name: 1.0), OptimConfig())
    with pytest.raises(CorruptError, match=r"weight\.exp_avg"):
        load_optimizer_tensors(optimizer, model, {key: torch.zeros(shape)})


def test_one_kernel_updates_as_pytorch_does_and_goes_on_from_its_state() -> None:
    torch.manual_seed(0)
    config = OptimConfig(lr=1e-2, weight_decay=0.1)
    shapes = [(3, 4), (4,), (17, 5)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]

    def groups(parameters: list[nn.Parameter]) -> list[dict[str, object]]:
        return decay_groups([(str(i), p) for i, p in enumerate(parameters)], 0.1, lambda name: 1.0)

    def step(optimizer: torch.optim.AdamW, parameters: list[nn.Parameter], found_inf: float) -> None:
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.sin(torch.arange(parameter.numel()) + index).view(parameter.shape)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(found_inf)
        optimizer.step()

    mine = GpuAdamW(groups(ours), config)
    for group in mine.param_groups:
        group["lr"] = torch.tensor(config.lr)
    other = build_adamw(groups(theirs), config)
    for found_inf in (1.0, 0.0, 0.0, 1.0, 0.0):
        step(mine, ours, found_inf)
        step(other, theirs, found_inf)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
        assert mine.state[a]["step"].item() == other.state[b]["step"].item() == 3
    # A state that is loaded, tensor by tensor, is gone on from.
    model = nn.ParameterList(ours)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(mine, model).items()}
    before = [parameter.detach().clone() for parameter in ours]
    step(mine, ours, 0.0)
    expected = [parameter.detach().clone() for parameter in ours]
    with torch.no_grad():
        for parameter, value in zip(ours, before, strict=True):
            parameter.copy_(value)
    load_optimizer_tensors(mine, model, saved)
    step(mine, ours, 0.0)
    assert all(torch.equal(parameter, value) for parameter, value in zip(ours, expected, strict=True))
