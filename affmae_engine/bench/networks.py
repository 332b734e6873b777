"""One case of `bench speed`: a network doing one task, built, run and measured in this process.

Both families take the trainer's own step (`train.step.TrainStep`) with the same images, masks, losses and optimizer,
each at its best: AFFMAE with its Triton kernels, ViT-MAE compiled, and on a GPU both with the step recorded as CUDA
graphs. Prediction is the recorded forward pass of a segmenter.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from affmae_engine.bench.child import Tell
from affmae_engine.bench.timing import time_rounds, top_kernels
from affmae_engine.config import FinetuneConfig, LossConfig, MaskConfig, ModelConfig, OptimConfig, TrainConfig
from affmae_engine.errors import first_line
from affmae_engine.model.build import build_autoencoder, build_segmenter, encoder_layers
from affmae_engine.model.masking import draw_mask
from affmae_engine.runtime.cuda_graphs import CudaGraphedFunction
from affmae_engine.runtime.device import DeviceChoice, exact_fp32, pick_device
from affmae_engine.runtime.gpu_stats import Card
from affmae_engine.runtime.memory import out_of_memory
from affmae_engine.train.compile import compile_vit, use_cache_folder
from affmae_engine.train.environment import kernel_backends
from affmae_engine.train.losses import SegmentationLoss
from affmae_engine.train.metrics import Stopwatch
from affmae_engine.train.optim import build_adamw, layer_decay_groups, set_learning_rate
from affmae_engine.train.precompile import compile_kernels
from affmae_engine.train.step import EAGER_STEPS, Finish, Losses, TrainStep, seed_forward

Family = Literal["affmae", "vit-mae"]
SpeedTask = Literal["pretrain", "finetune", "predict"]
Protocol = Literal["trainer", "paper"]
Status = Literal["ok", "out of memory", "failed", "timed out", "waiting"]

Step = Callable[[], Tensor]

CLASSES = 5
"""Classes of a segmenter."""
BATCHES = 2
"""Different batches on the device, which take turns."""
WARMUP_RATE = 0.01
"""Share of the learning rate that is used, as in warm-up: on noise the loss stays finite."""


@dataclass(frozen=True)
class SpeedCase:
    """One network at one size, resolution and batch, doing one task."""

    task: SpeedTask
    family: Family
    size: str
    resolution: int
    """Edge of the images in pixels."""
    batch: int
    protocol: Protocol = "trainer"
    """`trainer`: whole optimizer steps. `paper`: forward, loss and backward without the optimizer, as in the published
    benchmark; the same for `predict`."""

    @property
    def model(self) -> ModelConfig:
        return ModelConfig.model_validate({"family": self.family, "size": self.size})

    @property
    def row(self) -> tuple[str, str, int, int, str]:
        """What both families have in common in one row of the comparison."""
        return self.task, self.size, self.resolution, self.batch, self.protocol

    @property
    def name(self) -> str:
        """Unique; usable as a file name."""
        paper = "-paper" if self.protocol == "paper" else ""
        return f"{self.task}-{self.size}-{self.resolution}px-batch{self.batch}{paper}-{self.family}"


@dataclass
class Measurement:
    """What was found. Times in milliseconds (`_s`: seconds), memory in GiB and on a GPU only; None: not measured."""

    status: Status = "waiting"
    note: str = ""
    """Why something is missing."""
    how: str = ""
    """How the network was run."""
    parameters: int = 0
    ms: float | None = None
    """One step (of `predict`: one forward pass): median of the rounds."""
    low_ms: float | None = None
    """Fastest round."""
    high_ms: float | None = None
    """Slowest round."""
    steps: int = 0
    """Timed steps."""
    images_per_s: float | None = None
    loss: float | None = None
    first_step_s: float | None = None
    """From building the network to the end of the first step, compilation included."""
    ready_s: float | None = None
    """From building the network until steps run at full speed (compiled, recorded)."""
    caches: str = ""
    """Of the compilers when the case began: "warm" if nothing had to be compiled for the first step, else "cold"."""
    allocated_gib: float | None = None
    """Peak memory of tensors, with what CUDA graphs keep."""
    reserved_gib: float | None = None
    """Peak memory that PyTorch held."""
    gpu: dict[str, Any] = field(default_factory=dict)
    """The GPU during the rounds: sm_clock and sm_clock_max (MHz), power (W), temperature (C), throttled (reasons)."""
    data_images_per_s: float | None = None
    """With the trainer's data loader."""
    data_wait: float | None = None
    """Share of that time in which the device waited for data."""
    clahe_images_per_s: float | None = None
    """With the data loader and CLAHE."""
    clahe_wait: float | None = None
    """Share of that time in which the device waited for data."""
    end_to_end: dict[str, float] = field(default_factory=dict)
    """Of `predict`: tiles per second of the whole command by output ("tiff", "zarr"; with CLAHE "tiff, CLAHE", ...)."""
    kernels: list[tuple[str, float, float]] = field(default_factory=list)
    """(name, milliseconds, launches) per step of the most expensive kernels."""

    def describe(self) -> str:
        """The outcome in one line."""
        if self.ms is None or self.images_per_s is None:
            return f"{self.status} ({self.note})" if self.note else self.status
        memory = f", {self.allocated_gib:.2f} GiB" if self.allocated_gib else ""
        first = f", first step {self.first_step_s:.1f} s" if self.first_step_s else ""
        return f"{self.ms:.1f} ms, {self.images_per_s:.0f} images/s{memory}{first} {self.caches}".rstrip()


def measure_case(item: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Measure one case; a target of `child`. Failures, like too little memory, are results.

    Args:
        item: "case" (`SpeedCase` as a dict), "device" and "precision" (see `TrainConfig`), "profile" (whether to list
            the top kernels), "data" (path of a dataset, or None).
        tell: not used.
    """
    result = Measurement()
    try:
        exact_fp32()
        choice = pick_device(TrainConfig.model_validate({"device": item["device"], "precision": item["precision"]}))
        _measure(result, SpeedCase(**item["case"]), choice, profile=item["profile"], data=item["data"])
        result.status = "ok"
    except Exception as error:
        shortage = out_of_memory(error)
        result.status = "failed" if shortage is None else "out of memory"
        result.note = first_line(shortage or error)
    return asdict(result)


def _measure(result: Measurement, case: SpeedCase, choice: DeviceChoice, *, profile: bool, data: str | None) -> None:
    device = choice.device
    batches = random_batches(case, device)

    # Build the network and take the first step.
    wall, began = time.time(), time.perf_counter()
    model, result.how = build_network(case, choice)
    if device.type == "cuda" and case.family == "affmae":
        compile_kernels(model, None if case.task == "predict" else losses_of(case), batches[0], choice)
    step = make_step(case, model, choice, itertools.cycle(batches))
    float(step())
    result.first_step_s = time.perf_counter() - began
    if device.type == "cuda":
        result.caches = "cold" if _compiled_since(wall) else "warm"
    result.parameters = sum(parameter.numel() for parameter in model.parameters())

    # Warm up and record. What compiling left behind does not count as memory of a step.
    on_gpu = device.type == "cuda"
    if on_gpu:
        _empty_cache(device)
    for _ in range(EAGER_STEPS + 1 if on_gpu else 1):
        loss = step()
    result.loss = float(loss)
    result.ready_s = time.perf_counter() - began
    recording = _peaks_gib(device) if on_gpu else (0.0, 0.0)

    # Time the steps.
    if on_gpu:
        _empty_cache(device)
    card, samples = Card(device), list[dict[str, Any]]()
    try:
        timing = time_rounds(step, device, lambda: samples.append(card.sample()))
    finally:
        card.close()
    if on_gpu:
        result.allocated_gib, result.reserved_gib = map(max, recording, _peaks_gib(device))
        result.gpu = _summary(samples)
    result.loss = float(step())
    if not math.isfinite(result.loss):
        raise FloatingPointError(f"the loss is {result.loss}")
    result.ms, result.low_ms, result.high_ms, result.steps = timing.ms, timing.low_ms, timing.high_ms, timing.repeats
    result.images_per_s = 1e3 * case.batch / timing.ms

    # What else was asked for.
    if profile:
        result.kernels = top_kernels(step, device)
    if case.task == "predict" and case.protocol == "trainer":
        from affmae_engine.bench.prediction import end_to_end

        del step
        _empty_cache(device)
        try:
            for clahe in (False, True) if on_gpu else (False,):
                rates = end_to_end(case, model, choice, result.images_per_s, clahe=clahe)
                result.end_to_end |= {f"{kind}, CLAHE" if clahe else kind: rate for kind, rate in rates.items()}
        except Exception as error:  # the other figures stand
            result.note = f"end to end: {first_line(error)}"
    if data is not None and case.task != "predict" and case.protocol == "trainer":
        from affmae_engine.bench.loading import with_loading

        del step
        _empty_cache(device)
        try:
            result.data_images_per_s, result.data_wait = with_loading(case, model, choice, Path(data), clahe=False)
            result.clahe_images_per_s, result.clahe_wait = with_loading(case, model, choice, Path(data), clahe=True)
        except Exception as error:  # the other figures stand
            result.note = f"with the dataset: {first_line(error)}"


def build_network(case: SpeedCase, choice: DeviceChoice) -> tuple[nn.Module, str]:
    """The network of a case with random weights on its device, and how it runs, in words."""
    torch.manual_seed(0)
    model: nn.Module
    if case.task == "pretrain":
        model = build_autoencoder(case.model, LossConfig())
    else:
        model = build_segmenter(case.model, CLASSES)
    model = model.to(choice.device).train(case.task != "predict")
    if choice.device.type != "cuda":
        return model, "plain PyTorch"
    if case.family == "affmae":
        backends = sorted(set(kernel_backends("auto", choice.device).values()))
        return model, f"{' and '.join(backends)} kernels, recorded"
    if case.task == "predict":  # `compile_vit` compiles for training
        use_cache_folder()
        model.compile(dynamic=False)
    else:
        compile_vit(model)
    return model, "compiled, recorded"


def make_step(case: SpeedCase, model: nn.Module, choice: DeviceChoice, batches: Iterator[dict[str, Tensor]]) -> Step:
    """A call that does the case's task on the next batch; it returns the loss (`predict`: one logit) on the device.

    On a GPU the first `EAGER_STEPS` calls are eager, the next one records CUDA graphs that are replayed from then on.
    """
    if case.task == "predict":
        return _GraphedCall(partial(_forward, model, choice), batches, choice.device)
    if case.protocol == "paper":
        return _GraphedCall(partial(_forward_backward, model, losses_of(case), choice), batches, choice.device)
    take_step = train_step(case, model, choice)
    count, watch = itertools.count(), Stopwatch()

    def step() -> Tensor:
        return take_step(batches, seed=partial(seed_forward, 0, next(count), 0), watch=watch).losses["loss"]

    return step


def train_step(case: SpeedCase, model: nn.Module, choice: DeviceChoice, finish: Finish | None = None) -> TrainStep:
    """The trainer's step with the trainer's optimizer; `finish` as of `TrainStep`."""
    optim = OptimConfig()
    optimizer = build_adamw(layer_decay_groups(model, optim, encoder_layers(case.model)), optim)
    set_learning_rate(optimizer, WARMUP_RATE * optim.lr)
    scaler = torch.amp.GradScaler(choice.device.type, enabled=choice.dtype == torch.float16)
    return TrainStep(
        model,
        losses_of(case),
        optimizer,
        scaler,
        choice,
        accumulate=1,
        clip_norm=optim.clip_norm,
        record=choice.device.type == "cuda",
        finish=finish,
    )


def losses_of(case: SpeedCase) -> Losses:
    """The loss function of the case's task."""
    if case.task == "pretrain":
        return lambda model, batch: model(batch["image"], batch["visible"], batch["masked"])
    loss = SegmentationLoss(FinetuneConfig(), LossConfig(), [1.0] * CLASSES)
    return lambda model, batch: loss(model(batch["image"]), batch["labels"])


def random_batches(case: SpeedCase, device: torch.device) -> list[dict[str, Tensor]]:
    """`BATCHES` batches of noise on the device, with Perlin masks or with labels; the same for both families."""
    generator = torch.Generator().manual_seed(0)
    edge = case.resolution // case.model.patch_size
    batches = []
    for number in range(BATCHES):
        shape = (case.batch, 1, case.resolution, case.resolution)
        batch = {"image": torch.randn(shape, generator=generator)}
        if case.task == "pretrain":
            images = range(number * case.batch, (number + 1) * case.batch)
            drawn = [draw_mask((edge, edge), MaskConfig(), seed=0, index=image) for image in images]
            batch |= {"visible": torch.stack([v for v, _ in drawn]), "masked": torch.stack([m for _, m in drawn])}
        elif case.task == "finetune":
            batch["labels"] = torch.randint(CLASSES, (case.batch, *shape[2:]), generator=generator)
        batches.append({name: tensor.to(device) for name, tensor in batch.items()})
    return batches


class _GraphedCall:
    """A function of a batch, captured as one CUDA graph after `EAGER_STEPS` eager calls (on a CPU: always eager)."""

    def __init__(
        self,
        function: Callable[[dict[str, Tensor]], Tensor],
        batches: Iterator[dict[str, Tensor]],
        device: torch.device,
    ) -> None:
        self._function, self._batches = function, batches
        self._eager_calls: float = EAGER_STEPS if device.type == "cuda" else math.inf
        self._replay: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None

    def __call__(self) -> Tensor:
        batch = next(self._batches)
        if self._eager_calls > 0:
            self._eager_calls -= 1
            return self._function(batch)
        if self._replay is None:
            function, pool = self._function, torch.cuda.graph_pool_handle()
            self._replay = CudaGraphedFunction(lambda inputs: {"result": function(inputs)}, batch, pool)
        return self._replay(batch)["result"]


def _forward(model: nn.Module, choice: DeviceChoice, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad(), choice.autocast():
        logits_BKHW: Tensor = model(batch["image"])["logits"]
    return logits_BKHW[0, 0, 0, 0]


def _forward_backward(model: nn.Module, losses: Losses, choice: DeviceChoice, batch: dict[str, Tensor]) -> Tensor:
    model.zero_grad(set_to_none=True)
    with choice.autocast():
        loss = losses(model, batch)["loss"]
    loss.backward()
    return loss.detach()


def _compiled_since(began: float) -> bool:
    """Whether Triton or Inductor has compiled a kernel since `began` (seconds since the epoch)."""
    folders = [use_cache_folder()]
    triton = sys.modules.get("triton")
    if triton is not None:
        folders.append(Path(triton.knobs.cache.dir))
    for file in itertools.chain.from_iterable(folder.rglob("*.cubin") for folder in folders):
        with contextlib.suppress(OSError):  # another process may remove it
            if file.stat().st_mtime >= began:
                return True
    return False


def _peaks_gib(device: torch.device) -> tuple[float, float]:
    """Peak memory of tensors, and what PyTorch held for them, since `_empty_cache`."""
    return torch.cuda.max_memory_allocated(device) / 2**30, torch.cuda.max_memory_reserved(device) / 2**30


def _empty_cache(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _summary(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the GPU over the rounds: the lowest clock, the highest power and temperature, every reason for throttling."""
    found: dict[str, Any] = {}
    for name, choose in {"sm_clock": min, "sm_clock_max": max, "power": max, "temperature": max}.items():
        values = [sample[name] for sample in samples if name in sample]
        if values:
            found[name] = choose(values)
    found["throttled"] = sorted({reason for sample in samples for reason in sample.get("throttled", ())})
    return found
