"""Networks, optimizers and data of a benchmark case, ready to step: what is timed.

Both families take the step of the trainer (`train.step.TrainStep`) with the same optimizer, images and masks, so what
differs is the network and how it is run: AFFMAE as the trainer runs it, ViT-MAE compiled as a whole, with the
attention that PyTorch picks. Finetuning trains a segmenter with the loss of finetuning; predicting is the forward pass
of a segmenter in eval mode, AFFMAE's as the predictor runs it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from affmae_engine.bench.case import CLASSES, Case, mask_settings
from affmae_engine.config import FinetuneConfig, LossConfig, OptimConfig
from affmae_engine.model.build import build_autoencoder, build_segmenter, encoder_layers
from affmae_engine.model.masking import draw_mask
from affmae_engine.model.vit_mae import VitMae
from affmae_engine.train.cuda_graphs import capture
from affmae_engine.train.device import DeviceChoice
from affmae_engine.train.environment import kernel_backends
from affmae_engine.train.losses import SegmentationLoss
from affmae_engine.train.metrics import Stopwatch
from affmae_engine.train.optim import build_adamw, layer_decay_groups, set_learning_rate
from affmae_engine.train.step import Losses, TrainStep, seed_forward

BATCHES = 2
"""Different batches on the device, which take turns."""

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Network:
    """A network on its device and the way it is run.

    losses: of a batch, in training. recorded: whether its steps are replayed as CUDA graphs; recordable: whether they
    could be. how: all of it in words.
    """

    model: nn.Module
    losses: Losses
    recorded: bool
    recordable: bool
    how: str

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def as_recorded(self) -> Network:
        """The same network, compiled code included, with its steps recorded."""
        return replace(self, recorded=True, how=f"{self.how}, recorded step")


def make_network(case: Case, choice: DeviceChoice, *, recorded: bool) -> Network:
    """The network of a case with random weights.

    Args:
        case: what to build.
        choice: where it runs.
        recorded: for ViT-MAE, whether its steps are recorded; AFFMAE's are whenever the trainer would.
    """
    torch.manual_seed(0)
    losses: Losses = _Segmentation() if case.work == "finetune" else _reconstruction
    if case.work == "pretrain":
        model: nn.Module = _autoencoder(case)
    else:
        model = build_segmenter(case.network, CLASSES, backend=case.backend)
    model = model.to(choice.device)
    model.train(case.work != "predict")
    on_card = choice.device.type == "cuda"
    recordable = on_card and case.work != "predict"  # as the trainer does
    if case.model == "affmae":
        recorded, how = _accelerate_affmae(case, choice)
    else:
        how = _compile_vit(model, case, on_card)
    network = Network(model, losses, False, recordable, how)
    return network.as_recorded() if recorded and recordable else network


def make_step(case: Case, network: Network, choice: DeviceChoice, batches: Iterator[dict[str, Tensor]]) -> Call:
    """A call of the case's work, which returns the loss (for `predict` a logit) on the device."""
    if case.work == "predict":
        return partial(_predict, network.model, choice, batches)
    optim = OptimConfig()
    groups = layer_decay_groups(network.model, optim, encoder_layers(case.network))
    optimizer = build_adamw(groups, optim)
    set_learning_rate(optimizer, optim.lr / 100)  # as in warm-up: stays finite on noise
    scaler = torch.amp.GradScaler(choice.device.type, enabled=choice.dtype == torch.float16)
    take_step = TrainStep(
        network.model, network.losses, optimizer, scaler, choice,
        accumulate=1, clip_norm=optim.clip_norm, record=network.recorded,
    )  # fmt: skip
    count, watch = itertools.count(), Stopwatch()

    def step() -> Tensor:
        return take_step(batches, seed=partial(seed_forward, 0, next(count), 0), watch=watch).losses["loss"]

    return step


def make_forward(network: Network, choice: DeviceChoice, batch: dict[str, Tensor]) -> Call:
    """A call of the forward pass with the loss, as in training; recorded where the step is."""

    def forward() -> Tensor:
        with choice.autocast():
            return network.losses(network.model, batch)["loss"].detach()

    if not network.recorded:
        return forward
    side = torch.cuda.Stream(choice.device)
    side.wait_stream(torch.cuda.current_stream(choice.device))
    with torch.cuda.stream(side):
        forward()
    torch.cuda.current_stream(choice.device).wait_stream(side)
    with capture() as graph:
        loss = forward()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def random_batches(case: Case, device: torch.device) -> list[dict[str, Tensor]]:
    """`BATCHES` batches of noise, with the masks of pretraining or with labels."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(BATCHES):
        shape = (case.batch, 1, case.resolution, case.resolution)
        batch = {"image": torch.randn(shape, generator=generator)}
        if case.work == "pretrain":
            batch |= _masks(case, first=number * case.batch)
        elif case.work == "finetune":
            batch["labels"] = torch.randint(CLASSES, (case.batch, *shape[2:]), generator=generator)
        batches.append({name: tensor.to(device) for name, tensor in batch.items()})
    return batches


def _masks(case: Case, *, first: int) -> dict[str, Tensor]:
    drawn = [draw_mask(case.canvas_hw, mask_settings(), seed=0, index=first + i) for i in range(case.batch)]
    return {
        "visible": torch.stack([visible for visible, _ in drawn]),
        "masked": torch.stack([masked for _, masked in drawn]),
    }


def _autoencoder(case: Case) -> nn.Module:
    if case.vit_mode == "compile-fp32-residual" and case.model == "vit-mae":
        return VitMae(case.network, fp32_residual=True)
    return build_autoencoder(case.network, LossConfig(), backend=case.backend)


def _accelerate_affmae(case: Case, choice: DeviceChoice) -> tuple[bool, str]:
    """As the trainer runs it on a card with all kernels; the predictor compiles and records nothing."""
    backends = set(kernel_backends(case.backend, choice.device).values())
    operations = f"{' and '.join(sorted(backends))} operations"
    fast = choice.device.type == "cuda" and backends == {"triton"} and case.work != "predict"
    return fast, operations


def _compile_vit(model: nn.Module, case: Case, on_card: bool) -> str:
    mode = case.vit_mode if on_card else "eager"
    if mode == "eager":
        return "SDPA, eager"
    model.compile(dynamic=False, mode="reduce-overhead" if mode == "reduce-overhead" else None)
    more = {"compile-fp32-residual": ", fp32 residual", "reduce-overhead": " with reduce-overhead"}
    return f"SDPA, torch.compile{more.get(mode, '')}"


def _predict(model: nn.Module, choice: DeviceChoice, batches: Iterator[dict[str, Tensor]]) -> Tensor:
    with torch.no_grad(), choice.autocast():
        logits_BKHW: Tensor = model(next(batches)["image"])["logits"]
    return logits_BKHW[0, 0, 0, 0]


def _reconstruction(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return model(batch["image"], batch["visible"], batch["masked"])


class _Segmentation:
    """The loss of finetuning with equal class weights."""

    def __init__(self) -> None:
        self._loss = SegmentationLoss(FinetuneConfig(), LossConfig(), [1.0] * CLASSES)

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Named losses of a batch."""
        return self._loss(model(batch["image"]), batch["labels"])
