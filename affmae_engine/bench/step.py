"""Times whole training steps: forward, loss, backward, clipping and fused AdamW, on random images and Perlin masks.

Both models take the step of the trainer (`train.step.TrainStep`) with the same optimizer, so what differs is the model
and how it is run: AFFMAE as the trainer runs it, ViT-MAE compiled as a whole with the attention that PyTorch picks.
Running out of memory is a result.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from affmae_engine.bench.profile import Profile, profile_step
from affmae_engine.bench.timing import step_times
from affmae_engine.config import LossConfig, MaskConfig, ModelConfig, OptimConfig
from affmae_engine.errors import AffmaeError
from affmae_engine.model.autoencoder import MaskedAutoencoder
from affmae_engine.model.masking import draw_mask
from affmae_engine.model.vit_mae import VitMae
from affmae_engine.train.compile import compile_regions
from affmae_engine.train.device import DeviceChoice
from affmae_engine.train.environment import kernel_backends
from affmae_engine.train.metrics import Stopwatch
from affmae_engine.train.optim import build_adamw, decay_groups, set_learning_rate
from affmae_engine.train.step import EAGER_STEPS, TrainStep, seed_forward

Model = Literal["affmae", "vit-mae"]
VitMode = Literal["compile", "compile-fp32-residual", "graph", "reduce-overhead", "eager"]

BATCHES = 2
"""Different batches on the device, which take turns."""


@dataclass(frozen=True)
class StepCase:
    """One model at one size, resolution (pixels) and batch."""

    model: Model
    size: str
    resolution: int
    batch: int
    vit_mode: VitMode = "compile"
    """How ViT-MAE runs: compiled; compiled with the residual stream in fp32 although autocast is on, as in most
    published code; compiled and the whole step recorded as CUDA graphs; torch.compile's own graphs; as it is."""
    backend: str = "auto"
    """Of AFFMAE's operations."""


@dataclass
class StepResult:
    """A case's outcome. status: "ok", "out of memory" or "failed". Memory in GiB, on a card only."""

    model: str
    size: str
    resolution: int
    batch: int
    how: str = ""
    """How the model was run, in words."""
    parameters: int = 0
    status: str = "ok"
    note: str = ""
    ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    repeats: int = 0
    images_per_s: float | None = None
    loss: float | None = None
    allocated_gib: float | None = None
    """Most memory that tensors took, from the first step on (compilation and recording included)."""
    reserved_gib: float | None = None
    """Most memory that PyTorch held during the timed steps, with what CUDA graphs keep."""
    before_gib: float | None = None
    """Memory that was still taken when the case began; part of the two above."""
    profile: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class PreparedStep:
    """A callable that takes one whole step and returns its loss on the device; how it runs; parameters."""

    step: Callable[[], Tensor]
    how: str
    parameters: int


def measure_step(case: StepCase, choice: DeviceChoice, *, steps: int, warmup: int, profile: bool = False) -> StepResult:
    """Builds a model, takes `warmup` steps, times `steps` more. A failure is in the result, not raised."""
    result = StepResult(case.model, case.size, case.resolution, case.batch)
    _free(choice.device)
    try:
        _measure(result, case, choice, steps, warmup, profile)
    except AffmaeError:
        raise
    except Exception as error:  # one side's failure must not hide the other's result
        out = _memory_error(error)
        result.status = "out of memory" if out else "failed"
        result.note = _first_line(out or error)
        result.ms = result.low_ms = result.high_ms = result.images_per_s = None
    _free(choice.device)
    return result


def _measure(result: StepResult, case: StepCase, choice: DeviceChoice, steps: int, warmup: int, profile: bool) -> None:
    on_card = choice.device.type == "cuda"
    if on_card:
        torch.cuda.reset_peak_memory_stats(choice.device)
        result.before_gib = torch.cuda.memory_allocated(choice.device) / 2**30
        warmup = max(warmup, EAGER_STEPS + 2)
    prepared = prepare_step(case, choice)
    result.how, result.parameters = prepared.how, prepared.parameters
    for _ in range(warmup):
        prepared.step()
    if on_card:
        torch.cuda.synchronize(choice.device)
        result.allocated_gib = torch.cuda.max_memory_allocated(choice.device) / 2**30
        torch.cuda.empty_cache()  # what compilation and recording left behind
        torch.cuda.reset_peak_memory_stats(choice.device)
    timing = step_times(prepared.step, choice.device, steps)
    if on_card:
        now = torch.cuda.max_memory_allocated(choice.device) / 2**30
        result.allocated_gib = max(result.allocated_gib or 0.0, now)
        result.reserved_gib = torch.cuda.max_memory_reserved(choice.device) / 2**30
    result.loss = float(prepared.step())
    if not math.isfinite(result.loss):
        raise FloatingPointError(f"the loss is {result.loss}")
    result.ms, result.low_ms, result.high_ms, result.repeats = timing.ms, timing.low_ms, timing.high_ms, timing.repeats
    result.images_per_s = 1e3 * case.batch / timing.ms
    if profile:
        measured: Profile = profile_step(prepared.step, choice.device)
        result.profile = measured.as_dict()


def prepare_step(case: StepCase, choice: DeviceChoice) -> PreparedStep:
    """Model, optimizer and data of a case, ready to step."""
    torch.manual_seed(0)
    if case.model == "affmae":
        model, record, how = _affmae(case, choice)
    else:
        model, record, how = _vit_mae(case, choice)
    model.train()
    optim = OptimConfig()
    optimizer = build_adamw(decay_groups(model.named_parameters(), optim.weight_decay, lambda name: 1.0), optim)
    set_learning_rate(optimizer, optim.lr / 100)  # as in warm-up: stays finite on noise
    scaler = torch.amp.GradScaler(choice.device.type, enabled=choice.dtype == torch.float16)
    take_step = TrainStep(
        model, _losses, optimizer, scaler, choice, accumulate=1, clip_norm=optim.clip_norm, record=record
    )
    batches = itertools.cycle(random_batches(case, choice.device))
    count, watch = itertools.count(), Stopwatch()

    def step() -> Tensor:
        return take_step(batches, seed=partial(seed_forward, 0, next(count), 0), watch=watch).losses["loss"]

    return PreparedStep(step, how, sum(parameter.numel() for parameter in model.parameters()))


def random_batches(case: StepCase, device: torch.device) -> list[dict[str, Tensor]]:
    """`BATCHES` batches of noise with the masks of pretraining."""
    patch, mask = ModelConfig().patch_size, MaskConfig()
    canvas_hw = case.resolution // patch, case.resolution // patch
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(BATCHES):
        drawn = [draw_mask(canvas_hw, mask, seed=0, index=number * case.batch + i) for i in range(case.batch)]
        image = torch.randn(case.batch, 1, case.resolution, case.resolution, generator=generator)
        batch = {
            "image": image,
            "visible": torch.stack([visible for visible, _ in drawn]),
            "masked": torch.stack([masked for _, masked in drawn]),
        }
        batches.append({name: tensor.to(device) for name, tensor in batch.items()})
    return batches


def _affmae(case: StepCase, choice: DeviceChoice) -> tuple[nn.Module, bool, str]:
    """AFFMAE as the trainer runs it on a card with all kernels: compiled regions, recorded steps."""
    config = ModelConfig.model_validate({"size": case.size})
    model = MaskedAutoencoder(config, LossConfig(), backend=case.backend).to(choice.device)
    backends = set(kernel_backends(case.backend, choice.device).values())
    fast = choice.device.type == "cuda" and backends == {"triton"}
    if fast:
        compile_regions(model)
    how = "compiled regions, recorded step" if fast else "eager"
    return model, fast, f"{' and '.join(sorted(backends))} operations, {how}"


def _vit_mae(case: StepCase, choice: DeviceChoice) -> tuple[nn.Module, bool, str]:
    mode = case.vit_mode if choice.device.type == "cuda" else "eager"
    config = ModelConfig.model_validate({"family": "vit-mae", "size": case.size})
    model = VitMae(config, fp32_residual=mode == "compile-fp32-residual").to(choice.device)
    if mode != "eager":
        model.compile(dynamic=False, mode="reduce-overhead" if mode == "reduce-overhead" else None)
    described = {
        "compile": "torch.compile",
        "compile-fp32-residual": "torch.compile, fp32 residual",
        "graph": "torch.compile, recorded step",
        "reduce-overhead": "torch.compile with reduce-overhead",
        "eager": "eager",
    }
    return model, mode == "graph", f"SDPA, {described[mode]}"


def _losses(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return model(batch["image"], batch["visible"], batch["masked"])


def _free(device: torch.device) -> None:
    """Gives back what the last case left: compiled code holds on to models."""
    if device.type == "cuda":
        torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _memory_error(error: BaseException) -> BaseException | None:
    """The out-of-memory error behind an exception: compiler and autograd wrap it at times."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in str(seen):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
