"""Which labels belong to which image, by name or by count, and in which form they come.

Names are compared in three steps, the first that fits completely wins: the path below the given folder without its
extension, the bare file name, and the file name without words such as `_label`, `mask-` or `_image`. One image and one
label belong together whatever they are called. A stack may be labelled by a folder of single pictures and a folder of
pictures by a stack, when the counts match. Labels are integer maps, or binary masks per class: a folder for each class,
or the channels (or, for a single section, the pages) of one file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from affmae_engine.data.labels.problems import listed, refusal
from affmae_engine.data.labels.sources import ClassMasks, EmptyMasks, Section, Stacked
from affmae_engine.data.readers import Source, find_files, open_sources
from affmae_engine.data.readers.files import natural_key
from affmae_engine.errors import InputError

_WORDS = r"(?:labels?|masks?|seg(?:mentations?)?|gt|ground[ _-]?truth|annotations?|images?|img|raw|em)"
_SUFFIX_WORD = re.compile(rf"[ _.-]+{_WORDS}$", re.IGNORECASE)
_PREFIX_WORD = re.compile(rf"^{_WORDS}[ _.-]*(?=[^ _.-])", re.IGNORECASE)
_LABEL_FOLDER = re.compile(rf"^{_WORDS}$", re.IGNORECASE)
_MOST_CHANNELS = 64
_EITHER = -1


@dataclass(frozen=True)
class LabelledImage:
    """An image and its class map, of equal shape."""

    name: str
    """The image as messages call it."""
    image: Source
    labels: Source


@dataclass(frozen=True)
class Pairing:
    """All labelled images of a set.

    mask_names: for binary masks, the names of classes 1, 2, ...; empty for integer maps. notes: what was assumed.
    """

    pairs: tuple[LabelledImage, ...]
    mask_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Reference:
    """Where the labels of one image file are: the files (several make a stack), and the section of a stack."""

    files: tuple[Path, ...]
    section: int | None = None


def pair_labels(
    images: Sequence[str | Path], labels: Sequence[str | Path], *, image_files: Sequence[Path] | None = None
) -> Pairing:
    """Find the labels of every image.

    Args:
        images: files, folders and patterns, as `readers.find_files` takes them.
        labels: likewise; or one folder that holds nothing but a folder of binary masks for each class.
        image_files: what was found in `images`, where not all of it is to be labelled; None searches them.

    Raises:
        InputError: lists every image without labels and every label without an image, every label of another size,
            and every file that cannot be read.
    """
    image_files = find_files(images) if image_files is None else image_files
    folders = _class_folders(images, labels)
    groups = [[folder] for folder in folders] if folders else [list(labels)]
    problems: list[str] = []
    references = [_match(image_files, images, find_files(group), group, problems) for group in groups]
    if problems:
        raise refusal(problems, "labels carry the names of their images, such as slice7.tif and slice7_label.png")
    pairs, channels = _open_pairs(image_files, references, masks=bool(folders), problems=problems)
    if problems:
        raise refusal(problems, "every image needs labels of its own size")
    names = tuple(folder.name for folder in folders) or tuple(f"mask{k}" for k in range(1, channels + 1))
    notes = [f"binary masks of {len(names)} classes: {', '.join(names)}"] if names else []
    if any(len(r.files) > 1 or r.section is not None for group in references for r in group.values()):
        notes.append("sections of the stack and single pictures were paired in the order of their names")
    return Pairing(tuple(pairs), names, tuple(notes))


def joined(train: Pairing, val: Pairing) -> Pairing:
    """Two sets as one, the first one's images first.

    Raises:
        InputError: one has class masks that the other does not have.
    """
    if train.mask_names != val.mask_names:
        have, other = (", ".join(p.mask_names) or "integer maps" for p in (train, val))
        raise InputError(f"training and validation labels differ in form: {have} against {other}")
    return Pairing(train.pairs + val.pairs, train.mask_names, train.notes)


def _class_folders(images: Sequence[str | Path], labels: Sequence[str | Path]) -> list[Path]:
    """The folders of binary masks in the labels folder; empty when it is not of that form."""
    root = Path(labels[0]).expanduser()
    if len(labels) != 1 or not root.is_dir():
        return []
    files = find_files([root])
    if not all(root in file.parent.parents for file in files):  # a file lies directly in it, or it is one Zarr group
        return []
    folders = sorted({root / file.relative_to(root).parts[0] for file in files}, key=lambda f: natural_key(f.name))
    image_roots = [Path(image) for image in images]
    mirrored = any((parent / folder.name).is_dir() for folder in folders for parent in image_roots)
    lone_word = len(folders) == 1 and _LABEL_FOLDER.match(folders[0].name)
    return [] if mirrored or lone_word else folders


def _match(
    image_files: Sequence[Path],
    image_roots: Sequence[str | Path],
    label_files: Sequence[Path],
    label_roots: Sequence[str | Path],
    problems: list[str],
) -> dict[Path, _Reference]:
    """Labels of every image file; adds to `problems` what stays alone."""
    if len(image_files) == len(label_files) == 1:
        return {image_files[0]: _Reference((label_files[0],))}
    by_count = _match_sections(image_files, label_files)
    if by_count:
        return by_count
    best: tuple[dict[str, Path], dict[str, Path]] | None = None
    for key in (_path_below, _stem, _bare_stem):
        by_image = _unique(image_files, image_roots, key)
        by_label = _unique(label_files, label_roots, key)
        if by_image is None or by_label is None:
            continue
        if by_image.keys() == by_label.keys():
            return {by_image[name]: _Reference((by_label[name],)) for name in by_image}
        if best is None or len(by_image.keys() & by_label.keys()) > len(best[0].keys() & best[1].keys()):
            best = by_image, by_label
    if best is None:
        problems += [f"several files are called {name}: {listed(files)}" for name, files in _clashes(image_files)]
        problems += [f"several labels are called {name}: {listed(files)}" for name, files in _clashes(label_files)]
        return {}
    by_image, by_label = best
    where = f" in {label_roots[0]}" if len(label_roots) == 1 else ""
    problems += [f"{path}: no labels of that name{where}" for name, path in by_image.items() if name not in by_label]
    problems += [f"{path}: labels without an image" for name, path in by_label.items() if name not in by_image]
    return {}


def _match_sections(image_files: Sequence[Path], label_files: Sequence[Path]) -> dict[Path, _Reference]:
    """A stack with a folder of pictures, either way round; empty when that is not what there is."""
    try:
        if len(image_files) == 1 < len(label_files) == _depth(image_files[0]):
            return {image_files[0]: _Reference(tuple(sorted(label_files, key=natural_key)))}
        if len(label_files) == 1 < len(image_files) == _depth(label_files[0], labels=True):
            ordered = sorted(image_files, key=natural_key)
            return {image: _Reference((label_files[0],), z) for z, image in enumerate(ordered)}
    except InputError:
        return {}  # a file that cannot be read is reported, with its reason, when the pairs are opened
    return {}


def _depth(path: Path, *, labels: bool = False) -> int:
    sources = open_sources(path, labels=labels)
    return sources[0].info.shape_ZYX[0] if len(sources) == 1 else 0


def _unique(
    files: Iterable[Path], roots: Sequence[str | Path], key: Callable[[Path, Sequence[str | Path]], str]
) -> dict[str, Path] | None:
    """Files by their key; None when two have the same."""
    files = list(files)
    named = {key(path, roots): path for path in files}
    return named if len(named) == len(files) else None


def _clashes(files: Sequence[Path]) -> list[tuple[str, list[Path]]]:
    named: dict[str, list[Path]] = {}
    for path in files:
        named.setdefault(_bare_stem(path, ()), []).append(path)
    return [(name, paths) for name, paths in named.items() if len(paths) > 1]


def _path_below(path: Path, roots: Sequence[str | Path]) -> str:
    for root in roots:
        if Path(root) in path.parents:
            return (path.relative_to(root).parent / _stem(path, roots)).as_posix()
    return _stem(path, roots)


def _stem(path: Path, roots: Sequence[str | Path]) -> str:
    return Path(path.stem).stem if path.stem.lower().endswith(".ome") else path.stem


def _bare_stem(path: Path, roots: Sequence[str | Path]) -> str:
    return _PREFIX_WORD.sub("", _SUFFIX_WORD.sub("", _stem(path, roots))).casefold()


def _open_pairs(
    image_files: Sequence[Path], groups: Sequence[dict[Path, _Reference]], *, masks: bool, problems: list[str]
) -> tuple[list[LabelledImage], int]:
    """Open every image with its labels; returns the pairs and the number of masks of multi-channel labels (else 0)."""
    pairs: list[LabelledImage] = []
    counts: dict[int, list[str]] = {}
    for path in image_files:
        try:
            images = open_sources(path)
            labels = [_open_labels(group[path], images[0].info.shape_ZYX[0]) for group in groups]
        except InputError as error:
            problems.append(error.message)
            continue
        if any(len(maps) != len(images) for maps in labels):
            found = listed(sorted({len(maps) for maps in labels}))
            problems.append(f"{path} holds {len(images)} images, its labels hold {found}")
            continue
        for index, image in enumerate(images):
            name = str(path) if len(images) == 1 else f"{path} [{image.info.series}]"
            maps = [group[index] for group in labels]
            wrong = [m for m in maps if m.info.shape_ZYX != image.info.shape_ZYX]
            problems += [f"{name} is {_size(image)}, its labels {m.info.path} are {_size(m)}" for m in wrong]
            if not wrong:
                merged = ClassMasks(maps) if masks else maps[0]
                counts.setdefault(_form(merged), []).append(name)
                pairs.append(LabelledImage(name, image, merged))
    counts.pop(_EITHER, None)
    if len(counts) > 1:
        kinds = [
            f"{len(names)} with {count or 'no'} mask channels ({listed(names, 3)})" for count, names in counts.items()
        ]
        problems.append(f"the labels differ in form: {'; '.join(kinds)}")
    count = next(iter(counts), 0)
    return [_in_form(pair, count) for pair in pairs], 0 if masks else count


def _open_labels(reference: _Reference, depth: int) -> list[Source]:
    if len(reference.files) > 1:
        return [_as_stack([_single(path) for path in reference.files])]
    path = reference.files[0]
    if reference.section is not None:
        return [Section(_single(path), reference.section)]
    return _open_maps(path, depth)


def _single(path: Path) -> Source:
    sources = open_sources(path, labels=True)
    if len(sources) != 1:
        raise InputError(f"{path} holds {len(sources)} label maps instead of one")
    return sources[0]


def _as_stack(sections: Sequence[Source]) -> Source:
    shape = sections[0].info.shape_ZYX
    for section in sections:
        if section.info.shape_ZYX[0] != 1 or section.info.shape_ZYX != shape:
            raise InputError(
                f"{section.info.path} is {_size(section)}; a label stack takes single pictures of one size"
            )
    return Stacked(sections)


def _open_maps(path: Path, depth: int) -> list[Source]:
    """The label maps in a file; several channels, or the pages of a file for one section, are masks of classes."""
    first = open_sources(path, labels=True)
    if first[0].info.format in ("PNG", "JPEG", "JPEG 2000"):
        return first
    if len(first) == 1 and depth == 1 < first[0].info.shape_ZYX[0]:
        return [ClassMasks([Section(first[0], z) for z in range(first[0].info.shape_ZYX[0])])]
    channels = [open_sources(path, channel=0, labels=True)]
    while len(channels) < _MOST_CHANNELS:
        try:
            channels.append(open_sources(path, channel=len(channels), labels=True))
        except InputError:  # there is no further channel
            break
    if len(channels) == 1 or any(len(c) != len(first) for c in channels):
        return first
    return [_masks_or_map([c[series] for c in channels]) for series in range(len(first))]


def _masks_or_map(channels: Sequence[Source]) -> Source:
    """Channels as masks; a grey map that was saved as colour (equal channels) stays a map.

    The first section that shows anything decides, from the middle outwards.
    """
    depth = channels[0].info.shape_ZYX[0]
    sections = [slice(z, z + 1) for z in sorted(range(depth), key=lambda z: abs(z - depth // 2))]
    for z in sections:
        planes = [channel.read(z, slice(None), slice(None)) for channel in channels[:3]]
        if any(plane.any() for plane in planes):
            same = all(np.array_equal(planes[0], plane) for plane in planes[1:])
            return channels[0] if same else ClassMasks(channels)
    further = any(channel.read(z, slice(None), slice(None)).any() for channel in channels[3:] for z in sections)
    return ClassMasks(channels) if further else EmptyMasks(channels)


def _form(labels: Source) -> int:
    """Number of mask channels, 0 for a map, `_EITHER` where there is nothing to tell them apart by."""
    if isinstance(labels, EmptyMasks):
        return _EITHER
    return len(labels.parts) if isinstance(labels, ClassMasks) else 0


def _in_form(pair: LabelledImage, count: int) -> LabelledImage:
    """The pair with empty labels as `count` masks, or as a map when there are no masks; any other as it is."""
    if not isinstance(pair.labels, EmptyMasks):
        return pair
    return replace(pair, labels=pair.labels.as_masks(count) if count else pair.labels.as_map())


def _size(source: Source) -> str:
    depth, height, width = source.info.shape_ZYX
    return f"{height} x {width}" if depth == 1 else f"{depth} x {height} x {width}"
