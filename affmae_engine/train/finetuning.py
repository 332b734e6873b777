"""Finetuning for segmentation as a `Task` of the trainer (method section 6).

What is found from the data (class names, class weights, number of steps) is written into the task's configuration, so
that a run's config.toml says what was used and resuming needs nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from affmae_engine.config import OptimConfig, RunConfig
from affmae_engine.data.holdout import split_labelled, split_notes
from affmae_engine.data.normalise import Normalisation
from affmae_engine.data.segmentation import Section, SegmentationDataset, labelled_pixels, sections_of
from affmae_engine.data.split import Split
from affmae_engine.data.store import Store
from affmae_engine.errors import ConfigError, InputError
from affmae_engine.model.build import build_segmenter, encoder_layers
from affmae_engine.picture_files import Picture
from affmae_engine.train.losses import SegmentationLoss, weights_from_counts
from affmae_engine.train.optim import layer_decay_groups
from affmae_engine.train.schedule import with_steps
from affmae_engine.train.segmentation_evaluation import SegmentationEvaluation, chosen_sections
from affmae_engine.train.task import Evaluation, Task
from affmae_engine.train.transfer import TransferReport, load_pretrained
from affmae_engine.weights import WeightsMetadata


class FinetuneTask(Task):
    """Training a segmenter on a labeled dataset.

    Args:
        config: resolved; its model section fits `init_from` (see `transfer.follow_origin`).
        store: made by `labels.gather.write_labelled_store`.
        init_from: run, checkpoint or weights to start from; None starts from random weights. A checkpoint that a run
            is resumed from replaces whatever the model starts with, so nothing is loaded then.
        parts: labeled regions to train on and to validate on; None: see `holdout.split_labelled`.

    Attributes:
        config: the configuration with classes, class weights and steps filled in.
        parts: what is trained on and what is held out.
        evaluation: the validation sections.
        transfer: what became of the weights of `init_from`; None without it.

    Raises:
        ConfigError: settings that do not fit the labels or the weights.
        InputError: labels that are no classes, nothing labeled to train or validate on, too little data.
    """

    name = "finetune"

    def __init__(
        self, config: RunConfig, store: Store, *, init_from: Path | None = None, parts: Split | None = None
    ) -> None:
        # Training samples and validation sections, and the settings that follow from them.
        names = _class_names(config, store)
        parts = parts or split_labelled(config, store)
        validated_on = _validated_on(parts, config, store)
        normalisation = Normalisation.from_store(config.data, store)
        self.dataset = dataset = SegmentationDataset(
            store, parts.train, config, classes=len(names), normalisation=normalisation, seed=config.train.seed
        )
        self.config = config = _filled_in(config, names, dataset)
        self.parts = parts
        self.notes = split_notes(parts, store, names, dataset.index.counts, config.finetune.ignore_label)
        self.evaluation = SegmentationEvaluation(store, validated_on, normalisation, names, config)
        pixels = sum(section.height * section.width for section in validated_on)
        self.evaluated_images = pixels / config.image_size**2 / (1 - config.predict.overlap) ** 2
        # The network and its loss.
        backend = config.kernels.backend
        self._loss = SegmentationLoss(config.finetune, config.loss, config.finetune.class_weights, backend=backend)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)
            self.model = model = build_segmenter(config.model, len(names), backend=backend)
        self.transfer: TransferReport | None = None
        if init_from is not None:
            self.transfer = load_pretrained(model, init_from, config=config, class_names=names, seed=config.train.seed)
        self.metadata = WeightsMetadata.of_run(
            "finetune",
            config,
            normalisation=normalisation.to_dict(),
            pixel_nm=store.pixel_edge_nm,
            class_names=names,
            ignore_label=config.finetune.ignore_label,
        )
        self.fingerprint = store.fingerprint()

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Focal and Dice losses of a batch of `SegmentationDataset` samples."""
        return self._loss(model(batch["image"]), batch["labels"])

    def evaluate(self, model: nn.Module, device: torch.device) -> Evaluation:
        """IoU and Dice on the validation sections."""
        return self.evaluation.evaluate(model, device)

    def preview(self, model: nn.Module, device: torch.device) -> dict[str, Picture]:
        """Image, truth, prediction and errors of a few validation sections."""
        return self.evaluation.preview(model, device)

    def parameter_groups(self, optim: OptimConfig) -> list[dict[str, Any]]:
        """See `layer_decay_groups`."""
        return layer_decay_groups(self.model, optim, encoder_layers(self.config.model))


def _class_names(config: RunConfig, store: Store) -> tuple[str, ...]:
    wanted, found = config.finetune.class_names, store.class_names
    if not found:
        raise InputError(f"{store.path} has no labels", "finetuning needs --images and --labels")
    if wanted and len(wanted) != len(found):
        raise ConfigError(
            f"finetune.class_names has {len(wanted)} names, the labels have {len(found)} classes: {', '.join(found)}"
        )
    if config.model.channels != 1:
        raise ConfigError(f"model.channels = {config.model.channels}: images are grey, so it must be 1")
    return wanted or found


def _labelled(sections: Sequence[Section], config: RunConfig, store: Store) -> list[Section]:
    """Those of the sections that have a labelled pixel."""
    counts = labelled_pixels(store, sections, config.finetune.ignore_label)
    return [section for section, count in zip(sections, counts, strict=True) if count]


def _validated_on(parts: Split, config: RunConfig, store: Store) -> list[Section]:
    """The sections that scores are made of."""
    sections = _labelled(sections_of(store, parts.val), config, store)
    if not sections:
        raise InputError(
            "no pixel that is set aside for validation is labelled: there would be no score",
            "label more sections, name a validation set with --val-images and --val-labels, or change "
            "finetune.val_fraction",
        )
    return chosen_sections(sections)


def _filled_in(config: RunConfig, names: Sequence[str], dataset: SegmentationDataset) -> RunConfig:
    """The configuration with class names, class weights and steps as they are used."""
    finetune = config.finetune
    weights = finetune.class_weights or weights_from_counts(dataset.index.counts)
    if len(weights) != len(names):
        raise ConfigError(f"finetune.class_weights has {len(weights)} values, there are {len(names)} classes")
    filled = finetune.model_copy(update={"class_names": tuple(names), "class_weights": tuple(weights)})
    return with_steps(config.model_copy(update={"finetune": filled}), dataset.samples_per_epoch)
