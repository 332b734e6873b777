"""The data of a quality comparison: one dataset, and which training may see which part of it.

The test part is a contiguous block (or whole images, where images stand alone), chosen as for finetuning; the sections
next to it are not used. Test sections are kept out of pretraining too, although it sees no labels, and so is an
unlabeled image that is a copy of a labeled one. Shares of the labels are contiguous runs of sections, because people
label neighboring sections, and each share lies inside every larger one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from affmae_engine.config import FinetuneConfig
from affmae_engine.data.ingest import ingest
from affmae_engine.data.labels.gather import gather_labels, write_labelled_store
from affmae_engine.data.segmentation import Section, sections_of
from affmae_engine.data.split import Region, natural_key, split
from affmae_engine.data.store import Store
from affmae_engine.errors import InputError, Interrupted

SPLIT_SEED = 0
"""Decides the test part, which is the same for every seed of the comparison."""

_MOST_NAMED = 6
_GOLDEN = 0.618034  # its multiples spread evenly over [0, 1): a few seeds already see different parts of a stack


@dataclass(frozen=True)
class Sources:
    """Paths that the user named. unlabelled: more images, for pretraining only."""

    images: tuple[str, ...]
    labels: tuple[str, ...]
    unlabelled: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, list[str]]:
        """Absolute paths, as JSON values."""
        return {
            "images": [str(Path(path).absolute()) for path in self.images],
            "labels": [str(Path(path).absolute()) for path in self.labels],
            "unlabelled": [str(Path(path).absolute()) for path in self.unlabelled],
        }


@dataclass(frozen=True)
class Parts:
    """Regions by purpose. pretrain: everything but the test part and its margins. train: labelled sections one by one,
    in natural order. test: scored, and seen by no training. left_out: unlabelled images that are copies."""

    pretrain: tuple[Region, ...]
    train: tuple[Region, ...]
    test: tuple[Region, ...]
    left_out: tuple[str, ...] = ()


def collect(
    sources: Sources, path: Path, config: FinetuneConfig, *, should_stop: Callable[[], bool] | None = None
) -> Store:
    """Check the labels, and add all images to a dataset at `path`; continues where it was interrupted.

    Raises:
        InputError: lists what is wrong with images or labels; or unlabeled images could not be read.
        Interrupted: `should_stop` returned true.
    """
    labelled = gather_labels(
        sources.images, sources.labels, class_names=config.class_names, ignore_label=config.ignore_label
    )
    store, _ = write_labelled_store(labelled, path, should_stop=should_stop)
    if not sources.unlabelled:
        return store
    # One by one: copies of labeled sections are found by their files.
    report = ingest(
        list(sources.unlabelled), path, class_names=store.class_names, stacks=False, should_stop=should_stop
    )
    if report.interrupted:
        raise Interrupted("stopped while the images were collected", "the same command continues")
    if report.skipped:
        raise InputError(
            "some unlabeled images could not be read:\n  "
            + "\n  ".join(f"{skipped.path}: {skipped.reason}" for skipped in report.skipped),
            report.skipped[0].hint,
        )
    return Store.open(path)


def parts_of(store: Store, test_fraction: float) -> Parts:
    """The regions by purpose; a pure function of the dataset's content.

    Raises:
        InputError: too little is labelled to set a test part aside.
    """
    labelled = [image for image in store.images if image.labelled]
    divided = split(labelled, test_fraction, seed=SPLIT_SEED)
    if not divided.val or not divided.train:
        raise InputError(
            "there is too little labelled data to set a test part aside",
            "label more: three sections of a stack, three images, or one large image at least",
        )
    contents = {image.sha256 for image in labelled}
    others = [image for image in store.images if not image.labelled]
    whole = [Region(image.name, 0, image.shape_ZYX[0]) for image in others if image.sha256 not in contents]
    return Parts(
        pretrain=(*divided.train, *whole),
        train=tuple(_one_by_one(divided.train)),
        test=tuple(divided.val),
        left_out=tuple(image.name for image in others if image.sha256 in contents),
    )


def share_of_labels(train: Sequence[Region], fraction: float, seed: int) -> list[Region]:
    """A contiguous run of the labelled sections, at least one.

    The runs of one seed are nested: each lies inside those of larger fractions, whichever fractions are asked for.

    Args:
        train: sections in natural order, see `Parts`.
        fraction: of the sections, above 0, at most 1.
        seed: decides where the run lies; the first few seeds lie far apart.
    """
    count = max(1, round(fraction * len(train)))
    place = (0.5 + seed * _GOLDEN) % 1
    # With u in [0, 1): floor(u (n - k + 1)) falls with k, and its sum with k rises, hence the nesting.
    first = math.floor(place * (len(train) - count + 1))
    return list(train[first : first + count])


def section_count(store: Store, regions: Sequence[Region]) -> int:
    """Sections in the regions."""
    return len(sections_of(store, regions))


def described(store: Store, regions: Sequence[Region]) -> str:
    """The regions in words: `stack 0-13; other 3`, with rows where it is a strip."""
    found: dict[tuple[str, int, int], list[Section]] = {}
    for section in sections_of(store, regions):
        found.setdefault((section.name, section.y0, section.y1), []).append(section)
    texts = []
    for (name, y0, y1), sections in found.items():
        numbers = [section.z for section in sections]
        text = name
        if store[name].shape_ZYX[0] > 1:
            text += f" {numbers[0]}" if len(numbers) == 1 else f" {numbers[0]}-{numbers[-1]}"
        if (y0, y1) != (0, store[name].shape_ZYX[1]):
            text += f" rows {y0}-{y1 - 1}"
        texts.append(text)
    if len(texts) > _MOST_NAMED:
        texts = [*texts[:2], "...", f"{texts[-1]}, {len(texts)} images"]
    return "; ".join(texts)


def _one_by_one(regions: Sequence[Region]) -> list[Region]:
    sections = [Region(r.name, z, z + 1, r.y0, r.y1) for r in regions for z in range(r.z0, r.z1)]
    return sorted(sections, key=lambda region: (natural_key(region.name), region.z0))
