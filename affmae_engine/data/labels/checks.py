"""Checking labels before training: every value in every file, and what the values mean.

One pass over all labels counts their values. Without names the values must be 0, 1, 2, ... without a gap; a binary
mask stored as 0 and 255 is renumbered, and everything else that is not a class (instance numbers, a grey image given
by mistake, a forgotten ignore value) is refused with the values, their counts and the files that hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from affmae_engine.data.labels.pairing import LabelledImage, Pairing
from affmae_engine.data.labels.problems import listed, refusal
from affmae_engine.data.labels.sources import ClassMasks, Renumbered
from affmae_engine.data.readers import Source
from affmae_engine.errors import ConfigError, InputError

_MOST_VALUES = 64
"""More different values than this, without names for them, are instance numbers or an image."""

_COUNTED_BY_TABLE = 1 << 20
_BLOCK_PIXELS = 8 << 20


@dataclass(frozen=True)
class CheckedLabels:
    """Labels that can be trained on.

    pairs: with label values that are classes (or `ignore_label`). class_names: of the values 0, 1, 2, ...
    counts: pixels per class over all pairs. ignored: pixels that carry the ignore label. notes: what the user should
    know (renumbering, classes without a pixel, overlapping masks).
    """

    pairs: tuple[LabelledImage, ...]
    class_names: tuple[str, ...]
    ignore_label: int | None
    counts: tuple[int, ...]
    ignored: int
    notes: tuple[str, ...]


@dataclass
class _Found:
    """What one pass saw."""

    pixels: dict[int, int] = field(default_factory=dict)
    files: dict[int, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    overlapping: int = 0

    def add(self, name: str, counts: dict[int, int]) -> None:
        for value, count in counts.items():
            self.pixels[value] = self.pixels.get(value, 0) + count
            self.files.setdefault(value, []).append(name)


def check_labels(
    pairing: Pairing,
    *,
    class_names: Sequence[str] = (),
    ignore_label: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CheckedLabels:
    """Read all labels once, and decide what their values mean.

    Args:
        pairing: what `pair_labels` found.
        class_names: of the values 0, 1, 2, ...; empty: found from the labels.
        ignore_label: value that is no class.
        on_progress: told (images checked, images in all).

    Raises:
        ConfigError: the names do not fit the masks.
        InputError: lists all values that are no class, labels that are the image itself, values that are not whole
            numbers, masks that are not binary.
    """
    pairing = _named_masks(pairing, class_names)
    if pairing.mask_names:
        class_names = class_names or ("background", *pairing.mask_names)
    found = _Found()
    for number, pair in enumerate(pairing.pairs, start=1):
        _scan(pair, found, most=max(_MOST_VALUES, 2 * len(class_names)))
        if on_progress is not None:
            on_progress(number, len(pairing.pairs))
    if found.problems:
        raise refusal(found.problems, "label values are class numbers: 0, 1, 2, ...")
    table = _binary_table(found, class_names, ignore_label)
    values = {table.get(value, value): count for value, count in found.pixels.items()}
    classes = len(class_names) or _class_count(found, values, ignore_label)
    _refuse_foreign_values(found, values, classes, ignore_label)
    pairs = pairing.pairs
    notes = list(pairing.notes)
    if any(old != new for old, new in table.items()):
        pairs = tuple(replace(pair, labels=Renumbered(pair.labels, table)) for pair in pairs)
        notes.append(f"label values {listed(sorted(table))} are taken as classes 0 and 1")
    names = tuple(class_names) or tuple(f"class{k}" for k in range(classes))
    counts = tuple(0 if k == ignore_label else values.get(k, 0) for k in range(classes))
    empty = [name for k, name in enumerate(names) if not counts[k] and k != ignore_label]
    if empty:
        notes.append(f"no pixel is labelled {listed(empty)}")
    if found.overlapping:
        notes.append(f"{found.overlapping} pixels lie in several masks; the later class is taken")
    ignored = 0 if ignore_label is None else values.get(ignore_label, 0)
    return CheckedLabels(pairs, names, ignore_label, counts, ignored, tuple(notes))


def _named_masks(pairing: Pairing, class_names: Sequence[str]) -> Pairing:
    """Masks in the order of the class names, where these name them."""
    masks = pairing.mask_names
    if not masks or not class_names:
        return pairing
    if len(class_names) != len(masks) + 1:
        raise ConfigError(
            f"finetune.class_names has {len(class_names)} names, but background and {len(masks)} masks "
            f"({listed(masks)}) make {len(masks) + 1} classes",
            "name the background first, or leave finetune.class_names empty",
        )
    wanted = tuple(class_names[1:])
    if set(wanted) != set(masks) or wanted == masks:
        return replace(pairing, mask_names=wanted)
    order = [masks.index(name) for name in wanted]
    pairs = [replace(p, labels=p.labels.reordered(order)) for p in pairing.pairs if isinstance(p.labels, ClassMasks)]
    return replace(pairing, pairs=tuple(pairs), mask_names=wanted)


def _scan(pair: LabelledImage, found: _Found, *, most: int) -> None:
    """Count the values of one image's labels, or note why they cannot be used."""
    try:
        if isinstance(pair.labels, ClassMasks):
            for mask in pair.labels.parts:
                values = sorted(_count_values(mask, most))
                if len(values) > 2 or (len(values) == 2 and values[0] != 0):
                    found.problems.append(
                        f"{mask.info.path} holds the values {listed(values)}; a binary mask has 0 and one other"
                    )
            found.overlapping += _overlap(pair.labels)
        counts = _count_values(pair.labels, most)
        if len(counts) > 2 and _equals_image(pair):
            found.problems.append(f"the labels of {pair.name} equal the image")
        elif len(counts) > most:
            found.problems.append(
                f"the labels of {pair.name} hold more than {most} different values (up to {max(counts)}): "
                "they look like numbers of single objects, not classes"
            )
        else:
            found.add(pair.name, counts)
    except InputError as error:
        found.problems.append(error.message)
    finally:
        pair.labels.close()
        pair.image.close()


def _count_values(labels: Source, most: int) -> dict[int, int]:
    """Pixels per value; stops once there are more than `most` values."""
    counts: dict[int, int] = {}
    for block in _blocks(labels):
        if int(block.max(initial=0)) < _COUNTED_BY_TABLE:
            per_value = np.bincount(block.ravel())
            values = np.flatnonzero(per_value)
            amounts = per_value[values]
        else:
            values, amounts = np.unique(block, return_counts=True)
        for value, amount in zip(values.tolist(), amounts.tolist(), strict=True):
            counts[value] = counts.get(value, 0) + amount
        if len(counts) > most:
            break
    return counts


def _overlap(masks: ClassMasks) -> int:
    """Pixels that more than one mask claims."""
    blocks = zip(*(_blocks(mask) for mask in masks.parts), strict=True)
    return sum(int((sum((block != 0).astype(np.uint8) for block in group) > 1).sum()) for group in blocks)


def _equals_image(pair: LabelledImage) -> bool:
    """Whether the middle section of the labels is that of the image."""
    middle = pair.image.info.shape_ZYX[0] // 2
    where = slice(middle, middle + 1), slice(None), slice(None)
    return bool(np.array_equal(pair.image.read(*where), pair.labels.read(*where)))


def _blocks(source: Source) -> Iterator[np.ndarray]:
    """The whole of a source in blocks of sections of bounded size."""
    depth, height, width = source.info.shape_ZYX
    thick = max(1, _BLOCK_PIXELS // max(1, height * width))
    for z in range(0, depth, thick):
        yield source.read(slice(z, z + thick), slice(None), slice(None))


def _binary_table(found: _Found, class_names: Sequence[str], ignore_label: int | None) -> dict[int, int]:
    """New numbers when the labels are a binary mask with another value than 1; empty otherwise."""
    values = sorted(value for value in found.pixels if value != ignore_label)
    if len(class_names) not in (0, 2) or len(values) != 2 or values[0] != 0 or values[1] == 1:
        return {}
    table = {0: 0, values[1]: 1}
    if ignore_label is not None and ignore_label in found.pixels:
        return {} if ignore_label <= 1 or ignore_label > 255 else {**table, ignore_label: ignore_label}
    return table


def _class_count(found: _Found, values: dict[int, int], ignore_label: int | None) -> int:
    """Number of classes that gapless values 0, 1, 2, ... make.

    Raises:
        InputError: fewer than two classes, or a gap.
    """
    present = sorted(value for value in values if value != ignore_label)
    if len(present) < 2:
        only = f"the value {present[0]}" if present else "the ignore label"
        raise refusal(
            [f"all {len(values) and sum(values.values())} pixels have {only}: there is nothing to tell apart"]
        )
    expected = set(range(present[-1] + 1)) - ({ignore_label} if ignore_label is not None else set())
    if set(present) == expected:
        return present[-1] + 1
    lines = [f"value {v}: {found.pixels[v]} pixels in {listed(found.files[v])}" for v in present]
    raise InputError(
        "the label values are not 0, 1, 2, ... without a gap:\n  " + "\n  ".join(lines),
        f"renumber them, name all classes from 0 to {present[-1]} with finetune.class_names, or declare one value as "
        f"unlabelled: --set finetune.ignore_label={present[-1]}",
    )


def _refuse_foreign_values(found: _Found, values: dict[int, int], classes: int, ignore_label: int | None) -> None:
    foreign = sorted(value for value in values if value >= classes and value != ignore_label)
    if not foreign:
        return
    lines = [f"value {v}: {found.pixels[v]} pixels in {listed(found.files[v])}" for v in foreign]
    raise refusal(
        [f"{line} is no class (0 to {classes - 1})" for line in lines],
        f"name more classes with finetune.class_names, or --set finetune.ignore_label={foreign[-1]}",
    )
