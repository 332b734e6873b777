"""What pretraining and finetuning give to the one training loop: a model, samples and a handful of functions.

The loop never asks what kind of model it trains. Everything that differs between tasks is a field of `Task`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from affmae_engine.config import OptimConfig
from affmae_engine.picture_files import Picture
from affmae_engine.weights import WeightsMetadata


class SampleSource(Protocol):
    """Training samples by global index; picklable, so that worker processes can have it."""

    @property
    def samples_per_epoch(self) -> int:
        """Samples that make one pass over the data."""

    def sample(self, index: int, /) -> dict[str, Tensor]:
        """Sample `index` (0, 1, 2, ... without end): a pure function of the source's seed and the index."""


@dataclass(frozen=True)
class Evaluation:
    """Held-out figures.

    score: higher is better and decides the best checkpoint; pretraining gives minus the held-out loss.
    metrics: named scalars to show. per_class: {class name: {"iou": .., "dice": ..}}. effective_rank: per encoder
    stage, when measured.
    """

    score: float
    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    effective_rank: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """One kind of training.

    model: on the CPU; the loop moves it. dataset: training samples. losses: (model, batch on the device) -> named
    scalar losses, "loss" first, which is the one that is optimised. evaluate and preview get the model in eval mode,
    without gradients and under the run's autocast; preview returns pictures by name ("" is the main one).
    parameter_groups: optimizer groups, each with "params", "weight_decay" and "lr_scale". metadata goes into every
    weights file (the loop adds step and config). fingerprint identifies the data: a resumed run must find the same.
    notes: what the user should know of the data; the loop reports them as warnings when it starts.

    A step may be captured as CUDA graphs: neither model nor losses may wait for the device, copy from the host after
    the first step, or depend on values in their shapes.
    """

    name: Literal["pretrain", "finetune"]
    model: nn.Module
    dataset: SampleSource
    losses: Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]
    evaluate: Callable[[nn.Module, torch.device], Evaluation]
    preview: Callable[[nn.Module, torch.device], dict[str, Picture]]
    parameter_groups: Callable[[OptimConfig], list[dict[str, Any]]]
    metadata: WeightsMetadata
    fingerprint: str
    notes: tuple[str, ...] = ()
