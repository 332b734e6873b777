"""Finetuning for segmentation as a `Task` of the training loop (method section 6).

What is found from the data (class names, class weights, number of steps) is written into the configuration that is
returned, so that a run's config.toml says what was used and resuming needs nothing else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from affmae_engine.config import RunConfig
from affmae_engine.data.labels import IGNORE
from affmae_engine.data.labels.problems import listed
from affmae_engine.data.normalise import Normalisation
from affmae_engine.data.segmentation import Section, SegmentationDataset, labelled_pixels, sections_of
from affmae_engine.data.split import Region, Split, split
from affmae_engine.data.store import Store
from affmae_engine.errors import ConfigError, InputError
from affmae_engine.model.build import build_segmenter, encoder_layers
from affmae_engine.train.losses import SegmentationLoss, weights_from_counts
from affmae_engine.train.optim import layer_decay_groups
from affmae_engine.train.segmentation_evaluation import SegmentationEvaluation, chosen_sections
from affmae_engine.train.task import Task
from affmae_engine.train.transfer import TransferReport, load_pretrained
from affmae_engine.weights import WeightsMetadata


def finetune_task(
    config: RunConfig, store: Store, *, init_from: Path | None = None, parts: Split | None = None
) -> tuple[RunConfig, Task, TransferReport | None]:
    """Everything that the loop needs to train a segmenter on a labelled store.

    Args:
        config: resolved; its model section fits `init_from` (see `transfer.follow_origin`).
        store: made by `labels.gather.write_labelled_store`.
        init_from: run, checkpoint or weights to start from; None starts from random weights. When a run is resumed
            its checkpoint replaces whatever the model starts with, so nothing is loaded then.
        parts: labelled regions to train on and to validate on; None: see `split_labelled`.

    Returns:
        the configuration with classes, class weights and steps filled in; the task; what became of the weights.

    Raises:
        ConfigError: settings that do not fit the labels or the weights.
        InputError: labels that are no classes, nothing labelled to train or validate on, too little data.
    """
    names = _class_names(config, store)
    parts = parts or split_labelled(config, store)
    validated_on = _validated_on(parts, config, store)
    normalisation = Normalisation.from_store(config.data, store)
    dataset = SegmentationDataset(
        store, parts.train, config, classes=len(names), normalisation=normalisation, seed=config.train.seed
    )
    config = _filled_in(config, names, dataset)
    backend = config.kernels.backend
    loss = SegmentationLoss(config.finetune, config.loss, config.finetune.class_weights, backend=backend)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        model = build_segmenter(config.model, len(names), backend=backend)
    report = None
    if init_from is not None:
        report = load_pretrained(model, init_from, config=config, class_names=names, seed=config.train.seed)
    evaluation = SegmentationEvaluation(store, validated_on, normalisation, names, config)
    notes = _notes(parts, dataset.index.counts, _classes_of(store, config), names)

    def losses(module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return loss(module(batch["image"]), batch["labels"])

    task = Task(
        name="finetune",
        model=model,
        dataset=dataset,
        losses=losses,
        evaluate=evaluation.evaluate,
        preview=evaluation.preview,
        parameter_groups=lambda optim: layer_decay_groups(model, optim, encoder_layers(config.model)),
        metadata=WeightsMetadata.of_run(
            "finetune",
            config,
            normalisation=normalisation.to_dict(),
            pixel_nm=store.pixel_edge_nm,
            class_names=names,
            ignore_label=config.finetune.ignore_label,
        ),
        fingerprint=store.fingerprint(),
        notes=notes,
    )
    return config, task, report


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


def split_labelled(config: RunConfig, store: Store, *, by_class: bool = True) -> Split:
    """The given validation images, or a part of the labelled sections that has no neighbours in the training part.

    Args:
        config: `finetune.val_images`, `finetune.val_fraction` and `train.seed` decide.
        by_class: the held-out part has every class that training can spare (runs of version 0.1.0 did without).

    Raises:
        ConfigError: an image of `finetune.val_images` is not in the store.
        InputError: there is too little to set some aside.
    """
    labelled = [image for image in store.images if image.labelled]
    chosen = config.finetune.val_images
    unknown = [name for name in chosen if name not in {image.name for image in labelled}]
    if unknown:
        raise ConfigError(f"finetune.val_images: not in {store.path}: {', '.join(unknown)}")
    whole = [Region(image.name, 0, image.shape_ZYX[0]) for image in labelled]
    if chosen:
        parts = Split(
            [region for region in whole if region.name not in chosen],
            [region for region in whole if region.name in chosen],
        )
    else:
        usable: dict[str, set[int]] = {}
        for section in _labelled(sections_of(store, whole), config, store):
            usable.setdefault(section.name, set()).add(section.z)
        classes = _classes_of(store, config) if by_class else None
        parts = split(labelled, config.finetune.val_fraction, seed=config.train.seed, usable=usable, classes=classes)
    if not parts.val or not parts.train:
        raise InputError(
            "there is too little labelled data to set some aside for validation",
            "label more, or name a validation set with --val-images and --val-labels",
        )
    return parts


def _classes_of(store: Store, config: RunConfig) -> Callable[[Region], set[int]]:
    """A function that says which classes a region has; the labels of a section are read once."""

    @functools.cache
    def of_section(section: Section) -> frozenset[int]:
        labels_YX = section.labels(store, config.finetune.ignore_label)
        return frozenset(np.unique(labels_YX).tolist()) - {IGNORE}

    return lambda region: {number for section in sections_of(store, [region]) for number in of_section(section)}


def _notes(
    parts: Split, trained: Sequence[int], classes: Callable[[Region], set[int]], names: Sequence[str]
) -> tuple[str, ...]:
    """What is held out, and the classes that cannot be validated or were never trained."""
    held = {number for region in parts.val for number in classes(region)}
    notes = [f"held out for validation: {listed(parts.held_out, 20)}"]
    unknown = [name for k, name in enumerate(names) if trained[k] and k not in held]
    if unknown:
        notes.append(
            f"{listed(unknown)}: no pixel of it is held out, because training needs the images that have it; its score "
            "is unknown"
        )
    untrained = [name for k, name in enumerate(names) if not trained[k] and k in held]
    if untrained:
        notes.append(f"{listed(untrained)}: only the held-out part has it, so it is not learned; label more")
    return tuple(notes)


def _filled_in(config: RunConfig, names: Sequence[str], dataset: SegmentationDataset) -> RunConfig:
    """The configuration with class names, class weights and steps as they are used."""
    finetune, train = config.finetune, config.train
    weights = finetune.class_weights or weights_from_counts(dataset.index.counts)
    if len(weights) != len(names):
        raise ConfigError(f"finetune.class_weights has {len(weights)} values, there are {len(names)} classes")
    steps = train.steps
    if train.epochs is not None:
        steps = max(1, math.ceil(train.epochs * dataset.samples_per_epoch / train.batch_size))
    return config.model_copy(
        update={
            "finetune": finetune.model_copy(update={"class_names": tuple(names), "class_weights": tuple(weights)}),
            "train": train.model_copy(update={"steps": steps}),
        }
    )
