"""What differs between pretraining and finetuning: `PretrainTask` and `FinetuneTask` are the two kinds of `Task`.

The trainer never asks what kind of model it trains.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from affmae_engine.config import OptimConfig, RunConfig
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


class Task(ABC):
    """One kind of training: its model, its data, its losses and how it is evaluated.

    A step may be captured as CUDA graphs: neither model nor losses may wait for the device, copy from the host after
    the first step, or depend on values in their shapes.
    """

    name: Literal["pretrain", "finetune"]
    config: RunConfig
    """Resolved; what is found from the data (steps, classes) is filled in."""
    model: nn.Module
    """On the CPU; the trainer moves it."""
    dataset: SampleSource
    """Training samples."""
    metadata: WeightsMetadata
    """What every weights file says of itself; the trainer adds step and configuration."""
    fingerprint: str
    """Identifies the data: a resumed run must find the same."""
    notes: tuple[str, ...] = ()
    """What the user should know of the data; the trainer reports them as warnings when it starts."""
    evaluated_images: float = 0.0
    """Training images that have as many pixels as an evaluation passes through the network, for the time left."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Named scalar losses of a batch on the device, "loss" first, which is the one that is optimized."""

    @abstractmethod
    def evaluate(self, model: nn.Module, device: torch.device) -> Evaluation:
        """Held-out figures. `model` is in eval mode, without gradients, under the run's autocast."""

    @abstractmethod
    def preview(self, model: nn.Module, device: torch.device) -> dict[str, Picture]:
        """Pictures by name ("" is the main one); `model` as in `evaluate`."""

    @abstractmethod
    def parameter_groups(self, optim: OptimConfig) -> list[dict[str, Any]]:
        """Optimizer groups, each with "params", "weight_decay" and "lr_scale"."""
