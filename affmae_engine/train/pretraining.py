"""Masked-autoencoder pretraining as a `Task` of the training loop (method sections 1 to 5).

What is found from the data (the number of steps) is written into the configuration that is returned, so that a run's
config.toml says what was used.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from affmae_engine.checkpoint import load_weights
from affmae_engine.config import ModelConfig, RunConfig
from affmae_engine.data.dataset import PretrainDataset, croppable_planes
from affmae_engine.data.normalise import Normalisation
from affmae_engine.data.scale import scale_warnings
from affmae_engine.data.split import Split, split
from affmae_engine.data.store import Store
from affmae_engine.errors import CorruptError
from affmae_engine.model.build import Autoencoder, build_autoencoder, encoder_layers
from affmae_engine.train.optim import layer_decay_groups
from affmae_engine.train.pretraining_evaluation import PretrainingEvaluation, choose_crops
from affmae_engine.train.task import Task
from affmae_engine.train.transfer import follow_origin
from affmae_engine.weights import WeightsMetadata


def pretrain_task(
    config: RunConfig, store: Store, *, init_from: Path | None = None, parts: Split | None = None
) -> tuple[RunConfig, Task]:
    """Everything that the loop needs to pretrain on a store.

    Args:
        config: resolved.
        store: the images; labels are not looked at.
        init_from: run, checkpoint or weights to start from; None starts from random weights. When a run is resumed
            its checkpoint replaces whatever the model starts with, so nothing is loaded then.
        parts: regions to train on and to hold out; None: as `data.holdout` says.

    Returns:
        the configuration with the number of steps filled in, and the task.

    Raises:
        ConfigError: a mask that does not fit the crop, or weights of another model.
        InputError: no image can be cropped; weights that are not there.
        CorruptError: damaged weights.
    """
    parts = parts or split(store.images, config.data.holdout, seed=config.train.seed)
    dataset = PretrainDataset(store, parts.train, config, seed=config.train.seed)
    if config.train.epochs is not None:
        steps = max(1, math.ceil(config.train.epochs * dataset.samples_per_epoch / config.train.batch_size))
        config = config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})
    notes = [*dataset.notes, *scale_warnings([image.pixel_nm for image in store.images])]
    normalisation = Normalisation.from_store(config.data, store)
    held_out, _ = croppable_planes(store, parts.val, normalisation, config.image_size)
    if not held_out:
        why = "data.holdout is 0" if config.data.holdout == 0 else "there is too little data to hold some out"
        notes.append(f"{why}: the evaluation uses training images, so it does not show overfitting")
    crops = choose_crops(held_out or dataset.planes, config.image_size, config.data.crop_scale)
    evaluation = PretrainingEvaluation(store, crops, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        model = build_autoencoder(config.model, config.loss, backend=config.kernels.backend)
    if init_from is not None:
        notes += load_initial(model, init_from, config)

    task = Task(
        name="pretrain",
        model=model,
        dataset=dataset,
        losses=reconstruction_losses,
        evaluate=evaluation.evaluate,
        preview=evaluation.preview,
        parameter_groups=lambda optim: layer_decay_groups(model, optim, encoder_layers(config.model)),
        metadata=WeightsMetadata.of_run(
            "pretrain",
            config,
            normalisation=normalisation.to_dict(),
            pixel_nm=store.pixel_edge_nm,
        ),
        fingerprint=store.fingerprint(),
        notes=tuple(notes),
    )
    return config, task


def reconstruction_losses(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Named losses of a batch of `PretrainDataset` samples."""
    return model(batch["image"], batch["visible"], batch["masked"])


def load_initial(model: Autoencoder, path: Path, config: RunConfig) -> list[str]:
    """Give an autoencoder the weights of another run, by name; returns notes on what was not taken.

    The class heads of a finetune run are left out, and a ViT's mask token, which its segmenter has none of, keeps its
    random start; everything else must fit.

    Raises:
        ConfigError: the weights are of another size or shape of model; names both values.
        InputError: nothing of that kind there.
        CorruptError: tensors are missing or damaged.
    """
    origin, there = load_weights(path)
    follow_origin(config, origin, path, chosen=[f"model.{field}" for field in ModelConfig.model_fields])
    here = model.state_dict()
    fitting = {name for name in here if name in there and there[name].shape == here[name].shape}
    absent = sorted(here.keys() - fitting)
    heads_only = all(name.startswith("heads.") or name == "decoder.mask_token" for name in absent)
    if absent and not (origin.task == "finetune" and heads_only):
        raise CorruptError(
            f"{path} lacks {len(absent)} tensors of this model, for example {absent[0]}", "use another checkpoint"
        )
    model.load_state_dict({**here, **{name: there[name] for name in fitting}})
    return [f"{path} is a segmenter: its heads were left out"] if absent else []
