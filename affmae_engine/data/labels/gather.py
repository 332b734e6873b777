"""From what the user named (images, labels, perhaps a validation set) to a labelled store that a run carries along.

Everything is paired and checked before anything is written. The store then holds images and class maps side by side, so
that training and resuming need neither the original files nor the form they were in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from affmae_engine.data.ingest import IngestProgress, ingest, source_key
from affmae_engine.data.labels.checks import CheckedLabels, UnlabeledSections, check_labels
from affmae_engine.data.labels.pairing import LabelledImage, joined, pair_labels
from affmae_engine.data.labels.problems import listed, refusal
from affmae_engine.data.readers import PixelSize, Source
from affmae_engine.data.scale import Rescaled, differ, edge_nm
from affmae_engine.data.store import Store
from affmae_engine.data.volumes import absolute
from affmae_engine.errors import ConfigError, InputError, Interrupted

Paths = Sequence[str | Path]


@dataclass(frozen=True)
class LabelledSet:
    """Checked labels, how many of the last pairs are for validation (0: to be split off automatically), and images
    that have no labels."""

    checked: CheckedLabels
    validation: int = 0
    left_out: tuple[Path, ...] = ()

    @property
    def summary(self) -> str:
        """One line: images, classes with their shares."""
        checked = self.checked
        total = sum(checked.counts) + checked.ignored
        shares = [
            f"{name} {count / total:.1%}" for name, count in zip(checked.class_names, checked.counts, strict=True)
        ]
        unlabelled = [f"ignored {checked.ignored / total:.1%}"] if checked.ignored else []
        count = len(checked.pairs)
        return f"{count} labelled image{'s' if count > 1 else ''}: {', '.join([*shares, *unlabelled])}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, one sentence each."""
        if not self.left_out:
            return self.checked.notes
        count, total = len(self.left_out), len(self.left_out) + len(self.checked.pairs)
        names = listed([path.name for path in self.left_out], 3)
        left = f"{count} of {total} images have no labels and are left out ({names}); `affmae pretrain` can use them"
        return (left, *self.checked.notes)


def gather_labels(
    images: Paths,
    labels: Paths,
    *,
    val_images: Paths = (),
    val_labels: Paths = (),
    class_names: Sequence[str] = (),
    ignore_label: int | None = None,
    unlabeled_sections: UnlabeledSections | None = None,
    colors: Sequence[str] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> LabelledSet:
    """Pair and check images and labels; nothing is written.

    Args:
        images, labels: see `pair_labels`.
        val_images, val_labels: a validation set of the same kind; both or none.
        class_names, ignore_label, unlabeled_sections, colors, on_progress: see `check_labels`.

    Raises:
        ConfigError: only one of `val_images` and `val_labels`, or names that do not fit.
        InputError: lists everything that is wrong; or an image is in both sets.
    """
    if bool(val_images) != bool(val_labels):
        raise ConfigError("--val-images and --val-labels go together", "give both, or none for an automatic split")
    pairing = pair_labels(images, labels)
    held_out = 0
    if val_images:
        validation = pair_labels(val_images, val_labels)
        training = {source_key(pair.image) for pair in pairing.pairs}
        twice = [pair.name for pair in validation.pairs if source_key(pair.image) in training]
        if twice:
            raise refusal(
                [f"{name} is in both the training and the validation set" for name in twice],
                "what is trained on cannot be used for validation",
            )
        held_out = len(validation.pairs)
        pairing = joined(pairing, validation)
    checked = check_labels(
        pairing,
        class_names=class_names,
        ignore_label=ignore_label,
        unlabeled_sections=unlabeled_sections,
        colors=colors,
        on_progress=on_progress,
    )
    return LabelledSet(checked, held_out, pairing.left_out)


def at_scale(labelled: LabelledSet, target_nm: float, pixel_nm: PixelSize | None = None) -> LabelledSet:
    """Bring images whose pixel size differs from `target_nm` to it, with their labels; the counts stay as they were.

    Args:
        target_nm: edge of a pixel in the plane, in nanometers.
        pixel_nm: voxel size of all images, in place of what their files say.
    """

    def rescaled(pair: LabelledImage) -> LabelledImage:
        image = pair.image if pixel_nm is None else _with_size(pair.image, pixel_nm)
        if not differ(edge_nm(image.info.pixel_nm), target_nm):
            return replace(pair, image=image)
        labels = Rescaled(pair.labels, target_nm, like=image, labels=True)
        return replace(pair, image=Rescaled(image, target_nm, like=image), labels=labels)

    checked = replace(labelled.checked, pairs=tuple(rescaled(pair) for pair in labelled.checked.pairs))
    return replace(labelled, checked=checked)


def _with_size(image: Source, pixel_nm: PixelSize) -> Source:
    sized = copy.copy(image)
    sized.info = replace(image.info, pixel_nm=pixel_nm)
    return sized


def write_labelled_store(
    labelled: LabelledSet,
    path: Path,
    *,
    pixel_nm: PixelSize | None = None,
    on_progress: Callable[[IngestProgress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[Store, tuple[str, ...]]:
    """Write a labelled set into a new store.

    Returns:
        the store, and the names in it of the images of the validation set (empty without one).

    Raises:
        InputError: an image could not be taken, or a validation image has the content of a training image.
        Interrupted: `should_stop` said so.
        ResourceError: the store cannot be written.
    """
    pairs = labelled.checked.pairs
    report = ingest(
        [pair.image for pair in pairs],
        path,
        labels={source_key(pair.image): pair.labels for pair in pairs},
        class_names=labelled.checked.class_names,
        pixel_nm=pixel_nm,
        on_progress=on_progress,
        should_stop=should_stop,
    )
    if report.interrupted:
        raise Interrupted("stopped while the labelled images were collected", "nothing was trained yet; start again")
    if report.skipped:
        raise InputError(
            "some images could not be taken:\n  " + "\n  ".join(f"{s.path}: {s.reason}" for s in report.skipped),
            report.skipped[0].hint,
        )
    store = Store.open(path)
    by_origin = {(image.source_path, image.source_series): image.name for image in store.images}
    by_origin |= {(present.path, present.series): present.name for present in report.present}
    names = [by_origin[absolute(pair.image.info.path), pair.image.info.series] for pair in pairs]
    first = len(pairs) - labelled.validation
    contents = {(store[name].sha256, store[name].source_series) for name in names[:first]}
    copies = [name for name in names[first:] if (store[name].sha256, store[name].source_series) in contents]
    if copies:
        raise InputError(
            f"validation images have the content of training images: {listed(copies)}",
            "what is trained on cannot be used for validation",
        )
    return store, tuple(dict.fromkeys(names[first:]))
