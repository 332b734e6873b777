"""What a run would do, without doing it: checks of its data, its length, and an estimate of its memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from affmae_engine.config import ModelConfig, RunConfig, Task
from affmae_engine.data.dataset import PretrainDataset
from affmae_engine.data.labels.gather import LabelledSet
from affmae_engine.data.split import split
from affmae_engine.data.store import Store
from affmae_engine.errors import ConfigError
from affmae_engine.model.build import runs_kernels
from affmae_engine.runtime.device import DeviceChoice, pick_device
from affmae_engine.runtime.distributed import current_ranks
from affmae_engine.runtime.memory import HEADROOM, LEAST_HEADROOM, ON_CPU, largest_divisor, largest_that_fits
from affmae_engine.train.memory_estimate import MetaStep
from affmae_engine.train.transfer import follow_origin, read_origin
from affmae_kernels.dispatch import choose_backend

_HELD = 1.18
"""What the CUDA allocator holds for each byte of tensors, at most (docs/bench-h200/report.md)."""


@dataclass(frozen=True)
class RunPlan:
    """What a run would do on this machine."""

    data: str | None
    """The data in words; None when none were named."""
    steps: int | None
    """Optimizer steps; None when epochs are asked for and no data were named."""
    samples_per_epoch: int | None
    """Samples in one pass over the data."""
    epochs: float | None
    """Passes over the data."""
    device: str
    """Device and precision in words."""
    parameters: int
    """Trained numbers of the network."""
    micro_batch: int
    """Images per forward pass on one device; where that is measured when the run starts, what the estimate allows."""
    memory_bytes: int
    """Estimated peak of tensors on one device (see `memory_estimate`)."""
    free_bytes: int
    """Memory of that device that is free now."""
    notes: tuple[str, ...]
    """What the user should know of data and memory."""


def plan_pretraining(config: RunConfig, store: Store, *, init_from: Path | None = None) -> RunPlan:
    """The plan of `affmae pretrain`.

    Raises:
        ConfigError, InputError, CorruptError, ResourceError: as the run would, for its data, device or first weights.
    """
    if init_from is not None:
        chosen = [f"model.{field}" for field in ModelConfig.model_fields]
        follow_origin(config, read_origin(init_from), init_from, chosen=chosen)
    parts = split(store.images, config.data.holdout, seed=config.train.seed)
    dataset = PretrainDataset(store, parts.train, config, seed=config.train.seed)
    sections = sum(image.shape_ZYX[0] for image in store.images)
    dataset.sample(0)  # whether the data can be read
    return _plan(
        "pretrain",
        config,
        data=f"{store.path}: {_counted(len(store.images), 'image')}, {_counted(sections, 'section')}",
        samples_per_epoch=dataset.samples_per_epoch,
        notes=tuple(dataset.notes),
    )


def plan_finetuning(config: RunConfig, labelled: LabelledSet | None) -> RunPlan:
    """The plan of `affmae finetune`.

    Args:
        config: resolved, with the model section of the weights that it starts from.
        labelled: checked images and labels; None: none were named.

    Raises:
        ConfigError, ResourceError: as the run would, for its device.
    """
    samples = None
    names, notes = config.finetune.class_names, ["without --images and --labels nothing is known of the data"]
    if labelled is not None:
        names, notes = labelled.checked.class_names, list(labelled.checked.notes)
        sizes = [pair.image.info.shape_ZYX for pair in labelled.checked.pairs]
        trained = sizes[: len(sizes) - labelled.validation]
        share = 1.0 if labelled.validation else 1 - config.finetune.val_fraction
        samples = max(1, round(share * sum(z * y * x for z, y, x in trained) / config.image_size**2))
        if not labelled.validation:
            notes.append("the validation part is split off when the run starts, so epochs are approximate")
    return _plan(
        "finetune",
        config,
        data=labelled.summary if labelled is not None else None,
        samples_per_epoch=samples,
        notes=tuple(notes),
        classes=max(2, len(names)),
    )


def _plan(
    task: Task,
    config: RunConfig,
    *,
    data: str | None,
    samples_per_epoch: int | None,
    notes: tuple[str, ...],
    classes: int = 2,
) -> RunPlan:
    train, choice = config.train, pick_device(config.train)
    kernels = runs_kernels(config.model) and _takes_kernels(config, choice)
    step = MetaStep(task, config, dtype=choice.dtype, kernels=kernels, classes=classes)

    # Images at a time, as the trainer decides, and what they take.
    ranks = current_ranks()
    share = ranks.local_batch_size(train.batch_size)
    gradients = 4 * step.parameters

    def memory(images: int) -> int:
        """With the gradients of earlier micro-batches, and the copy of them that several processes exchange."""
        return step.memory(images) + gradients * ((images < share) + (ranks.world > 1))

    free, total = _device_memory(choice)
    if train.micro_batch != "auto":
        micro = largest_divisor(share, train.micro_batch or share)
    elif choice.device.type == "cpu":
        micro = largest_divisor(share, ON_CPU)
    else:
        budget = free - max(int(HEADROOM * total), LEAST_HEADROOM)
        micro = largest_that_fits(share, lambda images: int(_HELD * memory(images)), budget)
    needed = memory(micro)
    if needed > free:
        notes += ("this is more memory than is free: choose a smaller --batch",)

    if samples_per_epoch is None:
        steps, epochs = (train.steps if train.epochs is None else None), train.epochs
    else:
        steps = train.length(samples_per_epoch)
        epochs = steps * train.batch_size / samples_per_epoch
    return RunPlan(
        data=data,
        steps=steps,
        samples_per_epoch=samples_per_epoch,
        epochs=epochs,
        device=choice.description,
        parameters=step.parameters,
        micro_batch=micro,
        memory_bytes=needed,
        free_bytes=free,
        notes=notes,
    )


def _takes_kernels(config: RunConfig, choice: DeviceChoice) -> bool:
    """Whether the operations would run as Triton kernels.

    Raises:
        ConfigError: they are asked for and cannot.
    """
    try:
        return choose_backend(config.kernels.backend, "cluster_attention", choice.device).name == "triton"
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _device_memory(choice: DeviceChoice) -> tuple[int, int]:
    """Free and total bytes of the GPU, or of the machine's memory."""
    if choice.device.type == "cuda":
        return torch.cuda.mem_get_info(choice.device)
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
