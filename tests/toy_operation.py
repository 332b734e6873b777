"""Cases of one operation, small enough for tests on a CPU, in place of the real ones.

A child process gets them with `python -c "import tests.toy_operation as toy; toy.install(); ..."`.
"""

import sys
from types import ModuleType

import torch

import affmae_kernels.cases
from affmae_kernels.cases import Case

OPERATION = "residual_norm"


def case(name: str, channels: int, *, network: bool, wrong: float = 0.0) -> Case:
    def make(random, dtype):
        x, branch = (torch.randn(2, 5, channels, generator=random).to(dtype) for _ in range(2))
        return {"x": x, "branch": branch, "weight": torch.ones(channels), "bias": torch.zeros(channels)}

    def call(x, branch, weight, bias, backend):
        total = x + branch
        y = torch.nn.functional.layer_norm(total, (channels,), weight.to(x.dtype), bias.to(x.dtype))
        factor = 1.0 if x.dtype == torch.float64 else 1.0 + wrong
        return {"y": factor * y, "largest": total.argmax(-1)}

    return Case(OPERATION, name, make, call, network=network, flops=1000)


def install(wrong: float = 0.0) -> None:
    """Make the toy cases the only ones. wrong: relative error of the result in every dtype but float64."""
    module = ModuleType(f"affmae_kernels.{OPERATION}.cases")
    module.CASES = [case("small", 8, network=False, wrong=wrong), case("large", 16, network=True)]
    sys.modules[module.__name__] = module
    affmae_kernels.cases.OPERATIONS = (OPERATION,)
