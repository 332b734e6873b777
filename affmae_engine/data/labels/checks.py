"""Checking labels before training: every value in every file, and what the values mean.

One pass over all labels counts their values, without padding of the image (`data.padding`). Without names the values
must be 0, 1, 2, ... without a gap; a binary mask stored as 0 and 255 is renumbered, and so are as many values as there
are names; colors are numbered as the user says, and -1 is ignored. Everything else that is not a class is refused with
its cause in one sentence (`diagnosis`), or with the values, their counts and the files that hold them.

Sections without any foreground among labeled ones are ambiguous: empty, or not labeled? Where they are most of a stack
(or of the single images) they are taken as not labeled and ignored, otherwise as background; the user can say which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from affmae_engine.data.labels.diagnosis import Cause, are_instances, diagnose, explain
from affmae_engine.data.labels.pairing import LabelledImage, Pairing
from affmae_engine.data.labels.problems import listed, refusal
from affmae_engine.data.labels.sources import ClassMasks, ColorMap, LabeledSections, Relabeled
from affmae_engine.data.padding import padding_mask
from affmae_engine.data.readers import Source
from affmae_engine.data.readers.grey import UNLABELED
from affmae_engine.errors import ConfigError, InputError

UnlabeledSections = Literal["ignore", "background"]

_MOST_VALUES = 64
"""More different values than this, without names for them, are no classes."""

_FEWEST_INSTANCES = 8
"""Fewer values than this are not questioned as instance ids."""

_COUNTED_BY_TABLE = 1 << 20
_BLOCK_PIXELS = 8 << 20


@dataclass(frozen=True)
class CheckedLabels:
    """Labels that can be trained on.

    pairs: with label values that are classes (or `ignore_label`). class_names: of the values 0, 1, 2, ...
    counts: pixels per class over all pairs. ignored: pixels that are neither trained on nor scored. notes: what the
    user should know (renumbering, classes without a pixel, overlapping masks, padding). warnings: what may be wrong.
    """

    pairs: tuple[LabelledImage, ...]
    class_names: tuple[str, ...]
    ignore_label: int | None
    counts: tuple[int, ...]
    ignored: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass
class _Scanned:
    """What one pass saw of one pair. counts: pixels per value, without padding and sections that carry no label
    picture. blank: sections whose only value is 0, with their pixels. foreground: sections with another value."""

    pair: LabelledImage
    counts: dict[int, int] = field(default_factory=dict)
    blank: dict[int, int] = field(default_factory=dict)
    foreground: int = 0
    padding: int = 0
    overlapping: int = 0
    cause: Cause = ""

    @property
    def unlabeled(self) -> tuple[int, ...]:
        """Sections that no picture labels."""
        labels = self.pair.labels
        if not isinstance(labels, LabeledSections):
            return ()
        return tuple(sorted(set(range(labels.info.shape_ZYX[0])) - set(labels.labeled)))


def check_labels(
    pairing: Pairing,
    *,
    class_names: Sequence[str] = (),
    ignore_label: int | None = None,
    unlabeled_sections: UnlabeledSections | None = None,
    colors: Sequence[str] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> CheckedLabels:
    """Read all labels once, and decide what their values mean.

    Args:
        pairing: what `pair_labels` found.
        class_names: of the values 0, 1, 2, ...; empty: found from the labels. Two names make instance ids background
            and foreground.
        ignore_label: value that is no class.
        unlabeled_sections: what sections without foreground are; None decides as the module's docstring says.
        colors: hexadecimal colors (`ff0000`) of the classes 0, 1, 2, ... in labels drawn in colors.
        on_progress: told (images checked, images in all).

    Raises:
        ConfigError: the names or colors do not fit the labels.
        InputError: says why label values are no classes, or lists those that are not.
    """
    pairing = _named_masks(pairing, class_names)
    if pairing.mask_names:
        class_names = class_names or ("background", *pairing.mask_names)
    # One pass over all labels.
    scanned: list[_Scanned] = []
    problems: list[str] = []
    for number, pair in enumerate(pairing.pairs, start=1):
        found = _scan(pair, problems, ignore_label, class_names)
        scanned += [found] if found is not None else []
        if on_progress is not None:
            on_progress(number, len(pairing.pairs))
    if problems:
        raise refusal(problems, "label values are class numbers: 0, 1, 2, ...")
    # What the numbers mean.
    notes = list(pairing.notes)
    warnings: list[str] = []
    table, others = _numbering(scanned, class_names, ignore_label, colors, notes)
    # Sections that nobody labeled.
    ignored = _ignored_sections(scanned, unlabeled_sections, warnings)
    values = _total(scanned, ignored, table, others)
    needs_ignore = any(ignored) or UNLABELED in values or any(found.padding for found in scanned)
    chosen = ignore_label
    if needs_ignore and chosen is None:
        chosen = _free_number(values, len(class_names))
    if UNLABELED in values:
        assert chosen is not None
        table[UNLABELED] = chosen
        values[chosen] = values.get(chosen, 0) + values.pop(UNLABELED)
    classes = len(class_names) or _class_count(scanned, values, chosen)
    _refuse_foreign_values(scanned, values, classes, chosen)
    # The same pairs with class numbers.
    keep = {value: value for value in values} | table
    pairs = tuple(
        _as_classes(found, keep, others, sections, chosen, changed=bool(table) or others != 0)
        for found, sections in zip(scanned, ignored, strict=True)
    )
    names = tuple(class_names) or tuple(f"class{k}" for k in range(classes))
    counts = tuple(0 if k == chosen else values.get(k, 0) for k in range(classes))
    pixels = sum(int(np.prod(pair.image.info.shape_ZYX)) for pair in pairing.pairs)
    notes += _remarks(scanned, names, counts, chosen, pixels)
    return CheckedLabels(pairs, names, chosen, counts, pixels - sum(counts), tuple(notes), tuple(warnings))


def _named_masks(pairing: Pairing, class_names: Sequence[str]) -> Pairing:
    """Masks in the order of the class names, where these name them."""
    masks = pairing.mask_names
    if not masks or not class_names:
        return pairing
    if len(class_names) != len(masks) + 1:
        raise ConfigError(
            f"finetune.class_names has {len(class_names)} names, but background and {len(masks)} masks "
            f"({listed(masks)}) make {len(masks) + 1} classes",
            "name the background first, or name no classes",
        )
    wanted = tuple(class_names[1:])
    if set(wanted) != set(masks) or wanted == masks:
        return replace(pairing, mask_names=wanted)
    order = [masks.index(name) for name in wanted]
    pairs = [replace(p, labels=p.labels.reordered(order)) for p in pairing.pairs if isinstance(p.labels, ClassMasks)]
    return replace(pairing, pairs=tuple(pairs), mask_names=wanted)


def _scan(
    pair: LabelledImage, problems: list[str], ignore_label: int | None, class_names: Sequence[str]
) -> _Scanned | None:
    """Count the values of one image's labels, or note why they cannot be used."""
    found = _Scanned(pair)
    most = max(_MOST_VALUES, 2 * len(class_names))
    try:
        if isinstance(pair.labels, ClassMasks):
            for mask in pair.labels.parts:
                values = np.unique(mask.read(slice(0, 1), slice(None), slice(None))).tolist()
                if len(values) > 2 or (len(values) == 2 and values[0] != 0):
                    problems.append(
                        f"{mask.info.path} holds the values {listed(values)}; a binary mask has 0 and one other"
                    )
            found.overlapping = _overlap(pair.labels)
        unlabeled = set(found.unlabeled)
        for z, labels_YX in _sections(pair.labels):
            if z in unlabeled:
                continue
            padding_YX = padding_mask(pair.image.read(slice(z, z + 1), slice(None), slice(None))[0])
            if padding_YX.any():
                found.padding += int(padding_YX.sum())
                labels_YX = labels_YX[~padding_YX]
            here = _value_counts(labels_YX)
            for value, count in here.items():
                found.counts[value] = found.counts.get(value, 0) + count
            if here.keys() - {ignore_label, UNLABELED, 0}:
                found.foreground += 1
            elif 0 in here:
                found.blank[z] = here[0]
            if len(found.counts) > most:
                break
        found.cause = _suspicion(found, most, class_names)
    except InputError as error:
        problems.append(error.message)
        return None
    finally:
        pair.labels.close()
        pair.image.close()
    return found


def _suspicion(found: _Scanned, most: int, class_names: Sequence[str]) -> Cause:
    """Why the values of one image's labels are no classes; "" where they may be."""
    labels = found.pair.labels
    if isinstance(labels, ClassMasks | ColorMap) or len(found.counts) <= 2:
        return ""
    gap = len(found.counts) <= max((value for value in found.counts if value != UNLABELED), default=0)
    if len(found.counts) > most or (gap and not class_names) or labels.info.format == "JPEG":
        cause = diagnose(found.pair)
        return cause or ("image" if len(found.counts) > most else "")
    if len(found.counts) > _FEWEST_INSTANCES and len(class_names) <= 2:
        middle = labels.info.shape_ZYX[0] // 2
        if are_instances(labels.read(slice(middle, middle + 1), slice(None), slice(None))[0]):
            return "instances"
    return "copy" if len(found.counts) > _FEWEST_INSTANCES and diagnose(found.pair) == "copy" else ""


def _value_counts(labels: np.ndarray) -> dict[int, int]:
    """Pixels per value."""
    if int(labels.max(initial=0)) < _COUNTED_BY_TABLE:
        per_value = np.bincount(labels.ravel())
        values = np.flatnonzero(per_value)
        amounts = per_value[values]
    else:
        values, amounts = np.unique(labels, return_counts=True)
    return dict(zip(values.tolist(), amounts.tolist(), strict=True))


def _sections(source: Source) -> Iterator[tuple[int, np.ndarray]]:
    """All sections with their numbers; read in blocks of bounded size."""
    depth, height, width = source.info.shape_ZYX
    thick = max(1, _BLOCK_PIXELS // max(1, height * width))
    for first in range(0, depth, thick):
        block = source.read(slice(first, first + thick), slice(None), slice(None))
        yield from enumerate(block, first)


def _overlap(masks: ClassMasks) -> int:
    """Pixels that more than one mask claims."""
    sections = zip(*(_sections(mask) for mask in masks.parts), strict=True)
    return sum(int((sum((plane != 0).astype(np.uint8) for _, plane in group) > 1).sum()) for group in sections)


def _numbering(
    scanned: Sequence[_Scanned],
    class_names: Sequence[str],
    ignore_label: int | None,
    colors: Sequence[str],
    notes: list[str],
) -> tuple[dict[int, int], int]:
    """New numbers of values that are not class numbers yet, and the number of all other values (0: as they are)."""
    if any(isinstance(found.pair.labels, ColorMap) for found in scanned):
        return _color_table(scanned, colors, class_names), 0
    suspects = [found for found in scanned if found.cause]
    if suspects:
        if len(class_names) == 2 and {found.cause for found in suspects} == {"instances"}:
            notes.append(f"the labels are instance ids: all of them become {class_names[1]!r}")
            return {0: 0}, 1
        raise explain([(found.pair, found.cause) for found in suspects], [list(found.counts) for found in suspects])
    present = {value for found in scanned for value in found.counts}
    values = sorted(value for value in present if value not in (ignore_label, UNLABELED))
    # Numbers that begin 0, 1 are class numbers already: in 0, 1, 255 the last one rather means "not labeled".
    named = len(values) == len(class_names) and values[1:2] != [1]
    if values == list(range(len(values))) or not (named or (values[:1] == [0] and len(values) == 2 > len(class_names))):
        return {}, 0
    table = {value: number for number, value in enumerate(values)}
    if ignore_label is not None and ignore_label in present:
        if ignore_label < len(values):
            return {}, 0
        table[ignore_label] = ignore_label
    numbers = listed([f"{value} as {number}" for value, number in sorted(table.items())])
    notes.append(f"label values are taken as classes: {numbers}")
    return table, 0


def _color_table(scanned: Sequence[_Scanned], colors: Sequence[str], class_names: Sequence[str]) -> dict[int, int]:
    """Class number of every color.

    Raises:
        InputError: no colors are given, with the mapping that would fit; or the labels have other colors.
        ConfigError: a color is no color, or there are other names than colors.
    """
    total: dict[int, int] = {}
    for found in scanned:
        gray = not isinstance(found.pair.labels, ColorMap)
        for value, count in found.counts.items():
            color = value * 0x010101 if gray and value < 256 else value
            total[color] = total.get(color, 0) + count
    ranked = sorted(total, key=lambda color: -total[color])
    pixels = sum(total.values())
    shown = listed([f"{color:06x} {total[color] / pixels:.1%}" for color in ranked], 8)
    offered = ",".join(f"{color:06x}" for color in sorted(ranked, key=lambda color: (color != 0, -total[color]))[:16])
    if not colors:
        if len(ranked) > _MOST_VALUES:
            raise InputError(
                f"the labels have {len(ranked)} different colors: they were compressed, interpolated, or are no labels",
                "save the original labels without compression or smoothing, as PNG or TIFF",
            )
        raise InputError(
            f"the labels are drawn in RGB colors: {shown}",
            f"number the classes by their colors, in this order: --label-colors {offered}",
        )
    try:
        chosen = [int(color.strip().removeprefix("#"), 16) for color in colors]
    except ValueError as error:
        raise ConfigError(
            f"--label-colors {','.join(colors)}: not hexadecimal colors", f"for example --label-colors {offered}"
        ) from error
    if class_names and len(class_names) != len(chosen):
        raise ConfigError(f"--label-colors has {len(chosen)} colors, --classes {len(class_names)} names")
    foreign = [color for color in ranked if color not in chosen]
    if foreign:
        raise InputError(
            f"the labels have colors that --label-colors does not name: {shown}",
            f"for example --label-colors {offered}",
        )
    table = {color: number for number, color in enumerate(chosen)}
    # Labels without any color were read as gray values.
    return table | {color & 0xFF: table[color] for color in chosen if color % 0x010101 == 0}


def _ignored_sections(
    scanned: Sequence[_Scanned], choice: UnlabeledSections | None, warnings: list[str]
) -> list[tuple[int, ...]]:
    """Sections of each pair that are ignored: those that no picture labels, and those that count as not labeled."""
    ignored = [list(found.unlabeled) for found in scanned]
    single = [k for k, found in enumerate(scanned) if found.pair.labels.info.shape_ZYX[0] == 1]
    groups = [[k] for k in range(len(scanned)) if k not in set(single)] + ([single] if single else [])
    if not any(found.foreground for found in scanned):
        return [tuple(sections) for sections in ignored]  # there is nothing but background anywhere
    for group in groups:
        blank = sum(len(scanned[k].blank) for k in group)
        total = blank + sum(scanned[k].foreground for k in group)
        if not blank:
            continue
        ignore = choice == "ignore" or (choice is None and 2 * blank > total)
        where = scanned[group[0]].pair.name if len(group) == 1 else f"{len(group)} single images"
        other = "background" if ignore else "ignore"
        taken = "unlabeled and ignored" if ignore else "background"
        if choice is None:
            warnings.append(
                f"{blank} of {total} sections have no label at all ({where}): taken as {taken}; if that is wrong: "
                f"--unlabeled-sections {other}"
            )
        if ignore:
            for k in group:
                ignored[k] += scanned[k].blank
    return [tuple(sorted(sections)) for sections in ignored]


def _total(
    scanned: Sequence[_Scanned], ignored: Sequence[Sequence[int]], table: dict[int, int], others: int
) -> dict[int, int]:
    """Pixels per new number, without those of ignored sections."""
    values: dict[int, int] = {}
    for found, sections in zip(scanned, ignored, strict=True):
        blank = sum(found.blank.get(z, 0) for z in sections)
        for value, count in found.counts.items():
            number = table.get(value, others or value) if value != UNLABELED else value
            values[number] = values.get(number, 0) + count - (blank if value == 0 else 0)
    return {value: count for value, count in values.items() if count}


def _free_number(values: dict[int, int], classes: int) -> int:
    """A number for ignored pixels that is no class: 255, or 65535 where there are so many."""
    largest = max([value for value in values if value != UNLABELED] + [classes])
    return 255 if largest < 255 else 65535


def _as_classes(
    found: _Scanned,
    table: dict[int, int],
    others: int,
    ignored: Sequence[int],
    ignore_label: int | None,
    *,
    changed: bool,
) -> LabelledImage:
    """The pair with labels that are class numbers; the same pair where they are already."""
    if not (changed or ignored or found.padding):
        return found.pair
    image = found.pair.image if found.padding else None
    labels = Relabeled(
        found.pair.labels, table, others=others, ignored_sections=ignored, image=image, ignore=ignore_label
    )
    return replace(found.pair, labels=labels)


def _remarks(
    scanned: Sequence[_Scanned], names: Sequence[str], counts: Sequence[int], ignore_label: int | None, pixels: int
) -> list[str]:
    """What the user should know of all labels together."""
    notes = []
    empty = [name for k, name in enumerate(names) if not counts[k] and k != ignore_label]
    if empty:
        notes.append(f"no pixel is labelled {listed(empty)}")
    overlapping = sum(found.overlapping for found in scanned)
    if overlapping:
        notes.append(f"{overlapping} pixels lie in several masks; the later class is taken")
    padded = [found for found in scanned if found.padding]
    if padded:
        share = sum(found.padding for found in padded) / pixels
        images = f"{len(padded)} image{'s' if len(padded) > 1 else ''}"
        notes.append(f"padding of {images} ({share:.1%} of all pixels) is neither trained on nor scored")
    return notes


def _class_count(scanned: Sequence[_Scanned], values: dict[int, int], ignore_label: int | None) -> int:
    """Number of classes that gapless values 0, 1, 2, ... make.

    Raises:
        InputError: fewer than two classes, or a gap.
    """
    present = sorted(value for value in values if value != ignore_label)
    if len(present) < 2:
        only = f"the value {present[0]}" if present else "the ignore label"
        raise refusal([f"all {sum(values.values())} pixels have {only}: there is nothing to tell apart"])
    expected = set(range(present[-1] + 1)) - ({ignore_label} if ignore_label is not None else set())
    if set(present) == expected:
        return present[-1] + 1
    raise InputError(
        "the label values are not 0, 1, 2, ... without a gap:\n  " + "\n  ".join(_described(scanned, present)),
        f"name these {len(present)} classes in this order with --classes, or all from 0 to {present[-1]}, or declare "
        f"one value as unlabelled: --set finetune.ignore_label={present[-1]}",
    )


def _refuse_foreign_values(
    scanned: Sequence[_Scanned], values: dict[int, int], classes: int, ignore_label: int | None
) -> None:
    foreign = sorted(value for value in values if value >= classes and value != ignore_label)
    if foreign:
        raise refusal(
            [f"{line} is no class (0 to {classes - 1})" for line in _described(scanned, foreign)],
            f"name more classes with --classes, or --set finetune.ignore_label={foreign[-1]}",
        )


def _described(scanned: Sequence[_Scanned], values: Sequence[int]) -> list[str]:
    """A line per value: how often, and where."""
    lines = []
    for value in values[:_MOST_VALUES]:
        holders = [found for found in scanned if value in found.counts]
        pixels = sum(found.counts[value] for found in holders)
        lines.append(f"value {value}: {pixels} pixels in {listed([found.pair.name for found in holders])}")
    return lines
