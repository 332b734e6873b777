"""Rehearse small kernels for a GPU that is not here and print what happened, as one JSON object.

Run as a script without TRITON_INTERPRET, with an open pipe as stdin. No GPU and no driver is used, so a kernel that was
launched would fail.
"""

import json
import sys
import threading

import torch
import triton
import triton.language as tl
from compiling import AbsentGpu

from affmae_engine.config import LossConfig, ModelConfig, TrainConfig
from affmae_engine.model.build import build_autoencoder
from affmae_engine.runtime.device import pick_device
from affmae_engine.train.precompile import compile_kernels
from affmae_kernels.precompile import rehearse, rehearsing
from affmae_kernels.training_crops import training_crops


@triton.jit
def _double_kernel(X, Y, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + at, 2 * tl.load(X + at, mask=at < N), mask=at < N)


@triton.jit
def _broken_kernel(X, N, BLOCK: tl.constexpr):
    tl.store(X + tl.arange(0, BLOCK), no_such_name)  # noqa: F821


def double(x: torch.Tensor, block: int) -> None:
    _double_kernel[(triton.cdiv(len(x), block),)](X=x, Y=torch.empty_like(x), N=len(x), BLOCK=block, num_warps=1)


def doubles() -> None:
    """Launches of three kinds: another number of elements is the same kernel, another dtype or block is not."""
    assert rehearsing()
    double(torch.empty(96, device="meta"), 32)
    double(torch.empty(160, device="meta"), 32)
    double(torch.empty(96, device="meta"), 64)
    double(torch.empty(96, device="meta", dtype=torch.bfloat16), 32)


def broken() -> None:
    double(torch.empty(64, device="meta"), 64)
    _broken_kernel[(1,)](X=torch.empty(8, device="meta"), N=8, BLOCK=8)


def no_kernels() -> None:
    raise KeyError("the computation itself")


def error_of(computation, workers: int) -> str:
    try:
        rehearse(computation, workers=workers)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def model_kernels() -> dict:
    """Of a training step of the smallest network."""
    model = build_autoencoder(ModelConfig(size="tiny"), LossConfig(), backend="triton").eval()
    before = dict(model.named_parameters())
    batch = {
        "image": torch.zeros(2, 1, 64, 64),
        "visible": torch.zeros(2, 32).long(),
        "masked": torch.zeros(2, 32).long(),
    }
    raw = {
        "crop": torch.zeros(2, 64, 64, dtype=torch.uint8),
        "window": torch.zeros(2, 2, dtype=torch.int32),
        "intensity": torch.zeros(2, 4),
    }

    def finish(raw: dict[str, torch.Tensor]) -> torch.Tensor:
        return training_crops(raw["crop"], raw["window"], raw["intensity"], 64, clahe=True)

    def losses(model, batch):
        return model(batch["image"], batch["visible"], batch["masked"])

    cpu = pick_device(TrainConfig(device="cpu"))
    count = compile_kernels(model, losses, batch, cpu)
    with_crops = compile_kernels(model, losses, batch, cpu, finish=finish, raw=raw)
    same = all(before[name] is parameter for name, parameter in model.named_parameters())
    return {
        "count": count,
        "of crops": with_crops - count,
        "same": same and not model.training and not any(p.grad is not None for p in before.values()),
    }


if __name__ == "__main__":
    # Some programs wait for their parent's end like this; the thread holds a lock that forked processes inherit.
    threading.Thread(target=sys.stdin.read, daemon=True).start()
    triton.runtime.driver.set_active(AbsentGpu(90))
    kernels = rehearse(doubles, workers=2)
    found = {
        "kernels": [kernel.metadata.name for kernel in kernels],
        "different": len({kernel.hash for kernel in kernels}),
        "cubins": all(kernel.asm["cubin"] for kernel in kernels),
        "errors": [error_of(broken, 1), error_of(broken, 2), error_of(no_kernels, 1)],
        "rehearsing after": rehearsing(),
        "model": model_kernels(),
    }
    print(json.dumps(found))
