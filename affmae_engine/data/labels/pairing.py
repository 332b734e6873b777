"""Which labels belong to which image, by name or by number, and in which form they come.

Names are compared in steps, and the first step that pairs everything wins, otherwise the one that pairs most: the path
below the given folder without its extension, the bare file name, the name without words such as `_label`, `mask-` or
`_cp_masks`, the same without leading zeros, and nnU-Net's names (`case_0000.png` with `case.png`). Images that have no
labels are left out and named. One image and one label belong together whatever they are called.

A stack may be labelled by a folder of single pictures and a folder of pictures by a stack, when the counts match; fewer
pictures than sections label the sections whose numbers they carry. Labels are integer maps, colors, or binary masks per
class: a folder for each class, or the channels (or, for a single section, the pages) of one file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from affmae_engine.data.find import Found, find_images, summary
from affmae_engine.data.labels.problems import listed, refusal
from affmae_engine.data.labels.sources import ClassMasks, ColorMap, EmptyMasks, LabeledSections, Section
from affmae_engine.data.names import is_word, last_number, parse, stem, without_padding
from affmae_engine.data.readers import Source, find_files, open_sources
from affmae_engine.data.readers.files import natural_key
from affmae_engine.data.volumes import Stacked
from affmae_engine.errors import InputError

_MOST_CHANNELS = 64
_EITHER = -1
_TURNED = "EXIF"  # a word of the note that readers attach to a picture they turned


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
    left_out: images without labels.
    """

    pairs: tuple[LabelledImage, ...]
    mask_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    left_out: tuple[Path, ...] = ()


@dataclass(frozen=True)
class _Reference:
    """Where the labels of one image file are: the files (several make a stack), the section of a stack to take, or for
    pictures of some sections only, the number of the section that each file labels."""

    files: tuple[Path, ...]
    section: int | None = None
    numbers: tuple[int, ...] = ()


@dataclass
class _Matches:
    """Labels by image file, and what stays alone."""

    labels: dict[Path, _Reference]
    lone_images: list[Path] = field(default_factory=list)
    lone_labels: list[Path] = field(default_factory=list)


def pair_labels(
    images: Sequence[str | Path], labels: Sequence[str | Path], *, image_files: Sequence[Path] | None = None
) -> Pairing:
    """Find the labels of every image.

    Args:
        images: files, folders and patterns, as `find.find_images` takes them. Files that are also among the labels
            are no images, so both may lie in one folder.
        labels: files, folders and patterns, as `readers.find_files` takes them; or one folder that holds nothing but a
            folder of binary masks for each class.
        image_files: what was found in `images`, where not all of it is to be labelled; None searches them.

    Raises:
        InputError: no image has labels, a label has no image, labels have another size than their image, or a file
            cannot be read.
    """
    searched = find_images(images) if image_files is None else Found(list(image_files), [])
    found = searched.files
    folders = _class_folders(images, labels)
    groups: list[tuple[list[Path], list[str | Path]]] = [(find_files([folder]), [folder]) for folder in folders]
    groups = groups or [(find_files(labels), list(labels))]
    if image_files is None:
        found, groups[0] = _apart(found, *groups[0])
    image_files = found
    matches = [_match(image_files, images, *group) for group in groups]
    left_out = [path for path in image_files if all(path in match.lone_images for match in matches)]
    problems = [f"{path}: labels without an image" for match in matches for path in match.lone_labels]
    for match, (_, roots) in zip(matches, groups, strict=True):
        problems += [
            f"{path}: no labels of that name in {listed(roots, 3)}"
            for path in match.lone_images
            if path not in left_out or match.lone_labels
        ]
    if len(left_out) == len(image_files) and not problems:
        problems = [f"{listed(image_files, 3)}: no labels of that name in {listed(list(labels), 3)}"]
    if problems:
        raise refusal(problems, "labels carry the names of their images, such as slice7.tif and slice7_label.png")
    paired = [path for path in image_files if path not in left_out]
    pairs, channels = _open_pairs(paired, [m.labels for m in matches], masks=bool(folders), problems=problems)
    if problems:
        raise refusal(problems, "every image needs labels of its own size")
    names = tuple(folder.name for folder in folders) or tuple(f"mask{k}" for k in range(1, channels + 1))
    notes = [f"binary masks of {len(names)} classes: {', '.join(names)}"] if names else []
    references = [reference for match in matches for reference in match.labels.values()]
    notes += _notes_on_numbers(references)
    notes += [f"no images: {summary(searched.left_out)}"] if searched.left_out else []
    return Pairing(tuple(pairs), names, tuple(notes), tuple(left_out))


def joined(train: Pairing, val: Pairing) -> Pairing:
    """Two sets as one, the first one's images first.

    Raises:
        InputError: one has class masks that the other does not have.
    """
    if train.mask_names != val.mask_names:
        have, other = (", ".join(p.mask_names) or "integer maps" for p in (train, val))
        raise InputError(f"training and validation labels differ in form: {have} against {other}")
    return Pairing(train.pairs + val.pairs, train.mask_names, train.notes, train.left_out + val.left_out)


def _apart(
    image_files: Sequence[Path], label_files: Sequence[Path], roots: list[str | Path]
) -> tuple[list[Path], tuple[list[Path], list[str | Path]]]:
    """Images and labels that lie in one folder, told apart: by their names, or by the pattern given for the labels."""
    of_images, of_labels = ({os.path.realpath(path) for path in files} for files in (image_files, label_files))
    if of_images <= of_labels:  # one folder for both: its images were told by their names
        labels = [path for path in label_files if os.path.realpath(path) not in of_images]
        return list(image_files), (labels or list(label_files), roots)
    images = [path for path in image_files if os.path.realpath(path) not in of_labels]
    return images, (list(label_files), roots)


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
    lone_word = len(folders) == 1 and is_word(folders[0].name)
    return [] if mirrored or lone_word else folders


def _match(
    image_files: Sequence[Path],
    image_roots: Sequence[str | Path],
    label_files: Sequence[Path],
    label_roots: Sequence[str | Path],
) -> _Matches:
    """Labels of every image file.

    Raises:
        InputError: names are not unique in any way.
    """
    by_number = _match_sections(image_files, label_files)
    if by_number:
        return _Matches(by_number)
    if len(image_files) == len(label_files) == 1:
        return _Matches({image_files[0]: _Reference((label_files[0],))})
    best: _Matches | None = None
    for image_key, label_key in _KEYS:
        by_image = _unique(image_files, image_roots, image_key)
        by_label = _unique(label_files, label_roots, label_key)
        if by_image is None or by_label is None:
            continue
        found = _Matches(
            {path: _Reference((by_label[name],)) for name, path in by_image.items() if name in by_label},
            [path for name, path in by_image.items() if name not in by_label],
            [path for name, path in by_label.items() if name not in by_image],
        )
        if image_key is _nnunet_image and not found.labels:
            continue
        if best is None or len(found.labels) > len(best.labels):
            best = found
        if not found.lone_images and not found.lone_labels:
            break
    if best is None:
        problems = [f"several files are called {name}: {listed(files)}" for name, files in _clashes(image_files)]
        problems += [f"several labels are called {name}: {listed(files)}" for name, files in _clashes(label_files)]
        raise refusal(problems, "give every image and every label a name of its own")
    # nnU-Net's further channels of an image that has labels are no images without labels.
    channels = {_case(path) for path in best.labels if _case(path)}
    best.lone_images = [path for path in image_files if path not in best.labels and _case(path) not in channels]
    return best


def _path_below(path: Path, roots: Sequence[str | Path]) -> str:
    for root in roots:
        if Path(root) in path.parents:
            return (path.relative_to(root).parent / stem(path)).as_posix()
    return stem(path)


def _case(path: Path) -> str:
    """The case of an nnU-Net image, `case_0000`; "" for other names."""
    case, _, channel = stem(path).rpartition("_")
    return case if len(channel) == 4 and channel.isdecimal() else ""


def _nnunet_image(path: Path, _: Sequence[str | Path]) -> str:
    return _case(path) if stem(path).endswith("_0000") else f"\0{path}"


_Key = Callable[[Path, Sequence[str | Path]], str]
_KEYS: tuple[tuple[_Key, _Key], ...] = (
    (_path_below, _path_below),
    (lambda path, _: stem(path), lambda path, _: stem(path)),
    (lambda path, _: parse(path).bare, lambda path, _: parse(path).bare),
    (lambda path, _: without_padding(parse(path).bare), lambda path, _: without_padding(parse(path).bare)),
    (_nnunet_image, lambda path, _: stem(path)),
)


def _match_sections(image_files: Sequence[Path], label_files: Sequence[Path]) -> dict[Path, _Reference]:
    """A stack with a folder of pictures, either way round; empty when that is not what there is."""
    try:
        if len(image_files) == 1:
            depth = _depth(image_files[0])
            ordered = tuple(sorted(label_files, key=natural_key))
            if 1 < len(label_files) == depth:
                return {image_files[0]: _Reference(ordered)}
            if len(label_files) < depth and all(_depth(path, labels=True) == 1 for path in label_files):
                numbers = [last_number(path) for path in ordered]
                known = tuple(number for number in numbers if number is not None)
                first = 1 if max(known, default=0) == depth else 0  # counted from 1 where that is the only way to fit
                if len(set(known)) == len(numbers) and first <= min(known) and max(known) < depth + first:
                    return {image_files[0]: _Reference(ordered, numbers=tuple(n - first for n in known))}
        if len(label_files) == 1 < len(image_files) == _depth(label_files[0], labels=True):
            return {
                image: _Reference((label_files[0],), z) for z, image in enumerate(sorted(image_files, key=natural_key))
            }
    except InputError:
        return {}  # a file that cannot be read is reported, with its reason, when the pairs are opened
    return {}


def _notes_on_numbers(references: Sequence[_Reference]) -> list[str]:
    notes = []
    if any(r.section is not None or (len(r.files) > 1 and not r.numbers) for r in references):
        notes.append("sections of the stack and single pictures were paired in the order of their names")
    for reference in references:
        if reference.numbers:
            notes.append(
                f"{reference.files[0].name} labels section {reference.numbers[0]} (counted from 0), and so on: "
                f"{len(reference.numbers)} sections are labeled, the others are ignored"
            )
    return notes


def _depth(path: Path, *, labels: bool = False) -> int:
    sources = open_sources(path, labels=labels)
    return sources[0].info.shape_ZYX[0] if len(sources) == 1 else 0


def _unique(files: Sequence[Path], roots: Sequence[str | Path], key: _Key) -> dict[str, Path] | None:
    """Files by their key; None when two have the same."""
    named = {key(path, roots): path for path in files}
    return named if len(named) == len(files) else None


def _clashes(files: Sequence[Path]) -> list[tuple[str, list[Path]]]:
    named: dict[str, list[Path]] = {}
    for path in files:
        named.setdefault(parse(path).bare, []).append(path)
    return [(name, paths) for name, paths in named.items() if len(paths) > 1]


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
            wrong = [text for m in maps if (text := _mismatch(name, image, m))]
            problems += wrong
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


def _mismatch(name: str, image: Source, labels: Source) -> str:
    """Why labels do not lie on their image; "" when they do."""
    turned = [any(_TURNED in note for note in source.info.notes) for source in (image, labels)]
    if turned[0] != turned[1]:
        which, other = ("its labels are", "the image is") if turned[1] else ("the image is", "its labels are")
        return (
            f"{name}: {which} turned by an EXIF orientation and {other} not, so they do not lie on each other; "
            "save the turned picture upright, without the tag"
        )
    if image.info.shape_ZYX == labels.info.shape_ZYX:
        return ""
    return f"{name} is {_size(image)}, its labels {labels.info.path} are {_size(labels)}"


def _open_labels(reference: _Reference, depth: int) -> list[Source]:
    if reference.numbers:
        pictures = [_single(path) for path in reference.files]
        _require_one_size(pictures)
        return [LabeledSections(dict(zip(reference.numbers, pictures, strict=True)), depth)]
    if len(reference.files) > 1:
        sections = [_single(path) for path in reference.files]
        _require_one_size(sections)
        return [Stacked(sections)]
    path = reference.files[0]
    if reference.section is not None:
        return [Section(_single(path, depth=2), reference.section)]
    return _open_maps(path, depth)


def _single(path: Path, depth: int = 1) -> Source:
    sources = _open_maps(path, depth)
    if len(sources) != 1:
        raise InputError(f"{path} holds {len(sources)} label maps instead of one")
    return sources[0]


def _require_one_size(sections: Sequence[Source]) -> None:
    shape = sections[0].info.shape_ZYX
    for section in sections:
        if section.info.shape_ZYX[0] != 1 or section.info.shape_ZYX != shape:
            raise InputError(
                f"{section.info.path} is {_size(section)}; a label stack takes single pictures of one size"
            )


def _open_maps(path: Path, depth: int) -> list[Source]:
    """The label maps in a file; several channels, or the pages of a file for one section, are masks of classes."""
    first = open_sources(path, labels=True)
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
    """Channels as masks or as colors; a grey map that was saved as colour (equal channels) stays a map.

    The first section that shows anything decides, from the middle outwards. Red, green and blue that overlap are
    colors, and so are those of any picture, since no program writes masks as the channels of one picture.
    """
    info = channels[0].info
    picture = info.format in ("PNG", "JPEG", "JPEG 2000")
    depth = channels[0].info.shape_ZYX[0]
    sections = [slice(z, z + 1) for z in sorted(range(depth), key=lambda z: abs(z - depth // 2))]
    for z in sections:
        planes = [channel.read(z, slice(None), slice(None)) for channel in channels[:3]]
        if not any(plane.any() for plane in planes):
            continue
        if all(np.array_equal(planes[0], plane) for plane in planes[1:]) or (picture and len(planes) == 2):
            return channels[0]
        overlapping = (sum((plane != 0).astype(np.uint8) for plane in planes) > 1).any()
        drawn = info.dtype == np.uint8 and len(channels) in (3, 4) and (picture or (overlapping and _is_rgb(info.path)))
        return ColorMap(channels) if drawn else ClassMasks(channels)
    if picture:  # its fourth channel is its opacity
        return channels[0]
    further = any(channel.read(z, slice(None), slice(None)).any() for channel in channels[3:] for z in sections)
    return ClassMasks(channels) if further else EmptyMasks(channels)


def _is_rgb(path: Path) -> bool:
    """Whether the channels of a file are red, green and blue rather than separate images."""
    return any("luminance" in note for note in open_sources(path)[0].info.notes)


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
