"""From files to volumes: every image or stack that they hold, opened by its header, with sections joined to stacks.

A folder of equally large pictures that differ in one number of their names is one stack, in the order of the numbers.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from affmae_engine.data.names import is_word, stem
from affmae_engine.data.readers import Source, SourceInfo, scan_sources
from affmae_engine.data.readers.files import as_path, is_remote, size_and_mtime
from affmae_engine.data.readers.source import Refused, reading
from affmae_engine.errors import InputError

FEWEST_SECTIONS = 3
"""Fewer pictures of one name are not a stack."""

_READ = 8 << 20


class DamagedSection(InputError):
    """A file of a stack of files cannot be read. section: its number in the stack, counted from 0."""

    def __init__(self, error: InputError, section: int) -> None:
        super().__init__(error.message, error.hint)
        self.section = section


class Stacked(Source):
    """Single sections of equal size as one stack, in the order given; they open and close their own files.

    Args:
        info: of the stack, apart from its shape; None takes that of the first section.
    """

    def __init__(self, sections: Sequence[Source], info: SourceInfo | None = None) -> None:
        first = info or sections[0].info
        shape = (len(sections), *sections[0].info.shape_ZYX[1:])
        super().__init__(replace(first, shape_ZYX=shape, dtype=max(s.info.dtype for s in sections)))
        self.sections = tuple(sections)
        self._last = 0  # the section that was read last

    def _open(self) -> tuple[Source, ...]:
        return self.sections

    def _close(self, handle: Any) -> None:
        for section in self.sections:
            section.close()

    def _read(self, handle: Any, z: tuple[int, int], y: tuple[int, int], x: tuple[int, int]) -> np.ndarray:
        block = np.empty((z[1] - z[0], y[1] - y[0], x[1] - x[0]), self.info.dtype)
        for number in range(*z):
            if self._last != number:  # a stack of ten thousand files must not hold them all open
                handle[self._last].close()
                self._last = number
            try:
                block[number - z[0]] = handle[number].read(slice(0, 1), slice(*y), slice(*x))[0]
            except InputError as error:
                raise DamagedSection(error, number) from error
        return block


@dataclass(frozen=True)
class Volume:
    """An image or stack to be taken, and its label map if it has one. questioned: it may turn out to be no image."""

    image: Source
    labels: Source | None = None
    questioned: bool = False

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that it is made of, in the order of its sections."""
        if isinstance(self.image, Stacked):
            return tuple(section.info.path for section in self.image.sections)
        return (self.image.info.path,)

    @property
    def path(self) -> str:
        """Its first file, as a store records it."""
        return absolute(self.files[0])

    def without(self, section: int) -> list[Volume]:
        """The same stack without one of its files; single sections where too few are left for a stack."""
        assert isinstance(self.image, Stacked)
        rest = [one for number, one in enumerate(self.image.sections) if number != section]
        return [replace(self, image=source) for source in join_sections(rest)]


@dataclass(frozen=True)
class Unreadable:
    """A file, or one image of a file, that cannot be read."""

    path: Path
    error: InputError


def open_volumes(files: Sequence[Path], *, channel: int | None, workers: int) -> Iterator[list[Source | Unreadable]]:
    """Open files by their headers, several at once; yields what each holds, in the order given.

    Args:
        channel: see `readers.open_sources`.
    """
    with ThreadPoolExecutor(workers) as threads:
        try:
            yield from threads.map(lambda path: _open(path, channel), files)
        finally:
            threads.shutdown(cancel_futures=True)


def join_sections(sources: Sequence[Source], *, apart: Collection[str] = ()) -> list[Source]:
    """Join single pictures that are the numbered sections of a stack; everything else stays as it is, in order.

    Args:
        apart: absolute paths of files that stay single, because a dataset has them as single images.
    """
    groups: dict[Any, list[tuple[list[int], Source]]] = {}
    for source in sources:
        key = _series_key(source.info)
        if key is not None:
            numbers = [int(number) for number in re.findall(r"[0-9]+", stem(source.info.path))]
            groups.setdefault(key, []).append((numbers, source))
    stacks: dict[int, Source] = {}
    members: set[int] = set()
    for group in groups.values():
        paths = {absolute(source.info.path) for _, source in group}
        if len(group) < FEWEST_SECTIONS or not paths.isdisjoint(apart):
            continue
        for part in _by_other_numbers(group):
            if len(part) >= FEWEST_SECTIONS:
                stacks[id(part[0][1])] = _stack(part)
                members |= {id(source) for _, source in part}
    return [stacks.get(id(s), s) for s in sources if id(s) in stacks or id(s) not in members]


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a folder; of remote data, of its address.

    Raises:
        Refused: the folder holds a pipe or device, or a link that leads out of it: reading one may never end.
    """
    digest = hashlib.sha256()
    if is_remote(path):  # there may be terabytes of it
        digest.update(f"remote\0{path}".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()
    root = os.path.realpath(path)
    if path.is_file():
        _feed(digest, path)
        return digest.hexdigest()
    for parent, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            file = Path(parent, name)
            if not os.path.realpath(file).startswith(root + os.sep) or not file.is_file():
                raise Refused(f"{name[:60]} in it is a link out of its folder or no file", "only plain files are taken")
            digest.update(file.relative_to(path).as_posix().encode("utf-8", "surrogateescape") + b"\0")
            _feed(digest, file)
    return digest.hexdigest()


def hash_of(volume: Volume) -> str:
    """SHA-256 of the file of a volume; of a stack of files, of their hashes.

    Raises:
        InputError, ResourceError: a file cannot be read.
    """
    hashes = []
    for path in volume.files:
        with reading(path, volume.image.info.series):
            hashes.append(content_hash(path))
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def size_and_time(volume: Volume) -> tuple[int, int]:
    """(bytes of all files, modification time in ns of the newest).

    Raises:
        InputError, ResourceError: a file cannot be asked.
    """
    size = newest = 0
    for path in volume.files:
        with reading(path, volume.image.info.series):
            bytes_, time = size_and_mtime(path)
        size, newest = size + bytes_, max(newest, time)
    return size, newest


def wished_names(infos: Sequence[SourceInfo]) -> list[str]:
    """A name per image: the file's own, with as many parent folders before it as tell equal names apart."""
    result = [""] * len(infos)
    groups: dict[str, list[int]] = {}
    for number, info in enumerate(infos):
        groups.setdefault(f"{info.name}\0{info.series}".lower(), []).append(number)
    for members in groups.values():
        parts = [[*_parents(infos[i]), infos[i].name] for i in members]
        depth = 1
        while depth < 6 and len({tuple(p[-depth:]) for p in parts}) < len(parts):
            depth += 1
        for i, path in zip(members, parts, strict=True):
            series = f"-{infos[i].series}" if infos[i].series and infos[i].path.is_file() else ""
            result[i] = "-".join(path[-depth:]) + series
    return result


def absolute(path: Path | str) -> str:
    """A path as the store records it; URLs stay what they are."""
    path = as_path(path)
    if is_remote(path):
        return str(path)
    return os.path.abspath(path)  # noqa: PTH100 (links are kept: they are how the user named the file)


def _open(path: Path, channel: int | None) -> list[Source | Unreadable]:
    try:
        images, refused = scan_sources(path, channel=channel)
    except InputError as error:
        return [Unreadable(path, error)]
    return [*images, *(Unreadable(path, error) for error in refused)]


def _series_key(info: SourceInfo) -> Any:
    """Equal for pictures that may be sections of one stack; None for what is no single picture."""
    if info.shape_ZYX[0] != 1 or info.series or not info.path.is_file():
        return None
    name = re.sub(r"[0-9]+", "#", stem(info.path)) + info.path.suffix.lower()
    if "#" not in name:
        return None
    return absolute(info.path.parent), name, info.shape_ZYX, info.dtype, info.pixel_nm, info.notes, info.value_offset


def _by_other_numbers(group: list[tuple[list[int], Source]]) -> list[list[tuple[list[int], Source]]]:
    """Pictures of one name by all numbers but the last that varies: `a1_s01`, `a1_s02` and `a2_s01` are two stacks."""
    varying = [k for k in range(len(group[0][0])) if len({numbers[k] for numbers, _ in group}) > 1]
    if not varying:
        return []
    parts: dict[tuple[int, ...], list[tuple[list[int], Source]]] = {}
    for numbers, source in group:
        parts.setdefault(tuple(numbers[k] for k in varying[:-1]), []).append((numbers, source))
    last = varying[-1]
    ordered = [sorted(part, key=lambda member: member[0][last]) for part in parts.values()]
    return [part for part in ordered if len({numbers[last] for numbers, _ in part}) == len(part)]


def _stack(part: list[tuple[list[int], Source]]) -> Stacked:
    """A stack of sorted pictures, named by what their names have in common, or by their folder."""
    first = part[0][1].info
    numbers = [numbers for numbers, _ in part]
    last = max(k for k in range(len(numbers[0])) if len({n[k] for n in numbers}) > 1)
    pieces = re.split(r"([0-9]+)", stem(first.path))
    common = "".join(pieces[: 2 * last + 1]).strip(" ._-") or "".join(pieces[2 * last + 2 :]).strip(" ._-")
    counted = [n[last] for n in numbers]
    step = min(b - a for a, b in itertools.pairwise(counted))
    missing = (counted[-1] - counted[0]) // step + 1 - len(counted)
    notes = (*first.notes, f"{len(part)} files are its sections")
    if missing > 0:
        notes = (*notes, f"{missing} section number{'s are' if missing > 1 else ' is'} missing between them")
    folders = [folder.name for folder in Path(absolute(first.path)).parents if folder.name and not is_word(folder.name)]
    name = common if len(common) > 1 and not is_word(common) else next(iter(folders), common)
    return Stacked([source for _, source in part], replace(first, name=name, notes=notes))


def _feed(digest: hashlib._Hash, path: Path) -> None:
    with path.open("rb") as file:
        while chunk := file.read(_READ):
            digest.update(chunk)


def _parents(info: SourceInfo) -> list[str]:
    """Folders above an image; of a stack that is called like one of them, those above that one."""
    folders = [part for part in Path(absolute(info.path)).parent.parts if part != os.sep]
    if info.name in folders and info.shape_ZYX[0] > 1:
        folders = folders[: len(folders) - 1 - folders[::-1].index(info.name)]
    return folders
