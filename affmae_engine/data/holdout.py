"""What part of a labeled dataset finetuning holds out: the images the user names, or a split that looks at classes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from affmae_engine.config import RunConfig
from affmae_engine.data.labels import IGNORE
from affmae_engine.data.labels.problems import listed
from affmae_engine.data.segmentation import Section, labelled_pixels, sections_of
from affmae_engine.data.split import Region, Split, split
from affmae_engine.data.store import Store
from affmae_engine.errors import ConfigError, InputError


def split_labelled(config: RunConfig, store: Store, *, by_class: bool = True) -> Split:
    """The given validation images, or a part of the labeled sections that has no neighbors in the training part.

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
        ignore_label = config.finetune.ignore_label
        sections = sections_of(store, whole)
        usable: dict[str, set[int]] = {}
        for section, count in zip(sections, labelled_pixels(store, sections, ignore_label), strict=True):
            if count:
                usable.setdefault(section.name, set()).add(section.z)
        classes = _classes_of(store, ignore_label) if by_class else None
        parts = split(labelled, config.finetune.val_fraction, seed=config.train.seed, usable=usable, classes=classes)
    if not parts.val or not parts.train:
        raise InputError(
            "there is too little labelled data to set some aside for validation",
            "label more, or name a validation set with --val-images and --val-labels",
        )
    return parts


def split_notes(
    parts: Split, store: Store, names: Sequence[str], trained: Sequence[int], ignore_label: int | None
) -> tuple[str, ...]:
    """What is held out, and the classes that cannot be validated or were never trained, a sentence each.

    Args:
        names: of the classes.
        trained: pixels of each class in the training part.
    """
    classes = _classes_of(store, ignore_label)
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


def _classes_of(store: Store, ignore_label: int | None) -> Callable[[Region], set[int]]:
    """A function that says which classes a region has; the labels of a section are read once."""

    @functools.cache
    def of_section(section: Section) -> frozenset[int]:
        labels_YX = section.labels(store, ignore_label)
        return frozenset(np.unique(labels_YX).tolist()) - {IGNORE}

    return lambda region: {number for section in sections_of(store, [region]) for number in of_section(section)}
