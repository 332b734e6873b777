"""Masked-autoencoder pretraining as a `Task` of the trainer (method sections 1 to 5).

What is found from the data (the number of steps) is written into the task's configuration, so that a run's config.toml
says what was used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from affmae_engine.checkpoint import load_weights
from affmae_engine.config import ModelConfig, OptimConfig, RunConfig
from affmae_engine.data.dataset import PretrainDataset, croppable_planes
from affmae_engine.data.normalise import Normalisation
from affmae_engine.data.scale import scale_warnings
from affmae_engine.data.split import Split, split
from affmae_engine.data.store import Store
from affmae_engine.errors import CorruptError
from affmae_engine.model.build import Autoencoder, build_autoencoder, encoder_layers
from affmae_engine.picture_files import Picture
from affmae_engine.train.optim import layer_decay_groups
from affmae_engine.train.pretraining_evaluation import PretrainingEvaluation, choose_crops
from affmae_engine.train.schedule import with_steps
from affmae_engine.train.task import Evaluation, Task
from affmae_engine.train.transfer import follow_origin
from affmae_engine.weights import WeightsMetadata


class PretrainTask(Task):
    """Pretraining on the images of a dataset; labels are not looked at.

    Args:
        config: resolved.
        store: the images.
        init_from: run, checkpoint or weights to start from; None starts from random weights. A checkpoint that a run
            is resumed from replaces whatever the model starts with, so nothing is loaded then.
        parts: regions to train on and to hold out; None: as `data.holdout` says.

    Attributes:
        config: the configuration with the number of steps filled in.
        evaluation: the held-out crops.

    Raises:
        ConfigError: a mask that does not fit the crop, or weights of another model.
        InputError: no image can be cropped; weights that are not there.
        CorruptError: damaged weights.
    """

    name = "pretrain"

    def __init__(
        self, config: RunConfig, store: Store, *, init_from: Path | None = None, parts: Split | None = None
    ) -> None:
        # Training samples, and the number of steps that the epochs mean.
        parts = parts or split(store.images, config.data.holdout, seed=config.train.seed)
        self.dataset = dataset = PretrainDataset(store, parts.train, config, seed=config.train.seed)
        self.config = config = with_steps(config, dataset.samples_per_epoch)
        notes = [*dataset.notes, *scale_warnings([image.pixel_nm for image in store.images])]
        # Held-out crops.
        normalisation = Normalisation.from_store(config.data, store)
        held_out, _ = croppable_planes(store, parts.val, normalisation, config.image_size)
        if not held_out:
            why = "data.holdout is 0" if config.data.holdout == 0 else "there is too little data to hold some out"
            notes.append(f"{why}: the evaluation uses training images, so it does not show overfitting")
        crops = choose_crops(held_out or dataset.planes, config.image_size, config.data.crop_scale)
        self.evaluation = PretrainingEvaluation(store, crops, config)
        self.evaluated_images = 2.0 * len(crops)  # once for the losses, once for the ranks of the stages
        # The network.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)
            self.model = model = build_autoencoder(config.model, config.loss, backend=config.kernels.backend)
        if init_from is not None:
            notes += load_initial(model, init_from, config)
        self.notes = tuple(notes)
        self.metadata = WeightsMetadata.of_run(
            "pretrain", config, normalisation=normalisation.to_dict(), pixel_nm=store.pixel_edge_nm
        )
        self.fingerprint = store.fingerprint()

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Reconstruction losses of a batch of `PretrainDataset` samples."""
        return reconstruction_losses(model, batch)

    def evaluate(self, model: nn.Module, device: torch.device) -> Evaluation:
        """Losses on the held-out crops, with fixed masks, and the effective rank of each stage."""
        return self.evaluation.evaluate(model, device)

    def preview(self, model: nn.Module, device: torch.device) -> dict[str, Picture]:
        """Held-out crops, what is hidden of them, and their reconstructions."""
        return self.evaluation.preview(model, device)

    def parameter_groups(self, optim: OptimConfig) -> list[dict[str, Any]]:
        """See `layer_decay_groups`."""
        return layer_decay_groups(self.model, optim, encoder_layers(self.config.model))


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
