"""One image on its way into the store: what identifies it, and the work on one of its bands.

Bands of one image may be processed by several threads at once; each takes its own copy of the source, so that decoding
runs in parallel. Statistics are merged in the order of the bands, so that they do not depend on the threads.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import queue
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from affmae_engine.data.readers import PixelSize, Source, SourceInfo
from affmae_engine.data.readers.files import Original, as_path, is_remote, size_and_mtime
from affmae_engine.data.readers.limits import refuse_large_piece
from affmae_engine.data.readers.source import Refused, reading
from affmae_engine.data.statistics import StatisticsBuilder
from affmae_engine.data.store_layout import Band, StoredImage, bands, chunk_shapes
from affmae_engine.data.store_writer import StoreWriter
from affmae_engine.errors import InputError

_READ = 8 << 20
_FORMER_VERSION = "a former version of the file is in the dataset too; the two never face each other in a split"


@dataclass(frozen=True)
class Candidate:
    """An image that was found, with its label map if it has one."""

    image: Source
    labels: Source | None = None


def describe(
    candidate: Candidate, known: Collection[StoredImage], channel: int | None, pixel_nm: PixelSize | None
) -> StoredImage:
    """The record of an image before its pixels were read: everything but name and statistics.

    The file is hashed, unless an image of the same path, size and modification time is in the store. A file that was
    taken before with another content gets a note: both versions are kept, because a training under way may be reading
    the former one, and what lay under that name may be nowhere else.

    Raises:
        InputError: the file cannot be read, or the labels do not fit it.
    """
    info, labels = candidate.image.info, candidate.labels
    with reading(info.path, info.series):
        size, mtime = size_and_mtime(info.path)
    path = absolute(info.path)
    before = [image for image in known if image.source_path == path]
    untouched = [image for image in before if (image.source_size, image.source_mtime_ns) == (size, mtime)]
    with reading(info.path, info.series):
        _, shard = chunk_shapes(info.shape_ZYX, info.dtype.itemsize)
        band = math.prod(shard) * info.dtype.itemsize
        refuse_large_piece(band, "a band of rows of it", "cut it into narrower images")
        sha = untouched[0].sha256 if untouched else content_hash(info.path)
    same_image = [image for image in before if (image.source_series, image.channel) == (info.series, channel)]
    replaced = any(image.sha256 != sha for image in same_image)
    plan = StoredImage(
        name="",
        shape_ZYX=info.shape_ZYX,
        dtype=info.dtype,
        pixel_nm=pixel_nm or info.pixel_nm,
        statistics=StatisticsBuilder(info.dtype).finish(),
        source_path=path,
        source_series=info.series,
        sha256=sha,
        notes=info.notes + ((_FORMER_VERSION,) if replaced else ()),
        format=info.format,
        value_offset=info.value_offset,
        channel=channel,
        source_size=size,
        source_mtime_ns=mtime,
    )
    if labels is None:
        return plan
    if labels.info.shape_ZYX != info.shape_ZYX:
        raise InputError(
            f"the labels {labels.info.path} have shape {labels.info.shape_ZYX}, their image {info.path} "
            f"{info.shape_ZYX}",
            "an image and its labels must have the same shape",
        )
    dtype, digest = _examine_labels(labels, plan)
    return replace(plan, labelled=True, labels_dtype=dtype.name, labels_sha256=digest)


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a folder; of remote data, of its address.

    Raises:
        Refused: the folder holds a pipe or device, or a link that leads out of it: reading one may never end.
    """
    digest = hashlib.sha256()
    root = os.path.realpath(path)
    if is_remote(path):  # there may be terabytes of it
        digest.update(f"remote\0{path}".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()
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


def wished_names(infos: Sequence[SourceInfo]) -> list[str]:
    """A name per image: the file's own, with as many parent folders before it as tell equal names apart."""
    result = [""] * len(infos)
    groups: dict[str, list[int]] = {}
    for number, info in enumerate(infos):
        groups.setdefault(f"{info.name}\0{info.series}".lower(), []).append(number)
    for members in groups.values():
        parts = [[*_parents(infos[i].path), infos[i].name] for i in members]
        depth = 1
        while depth < 6 and len({tuple(p[-depth:]) for p in parts}) < len(parts):
            depth += 1
        for i, path in zip(members, parts, strict=True):
            series = f"-{infos[i].series}" if infos[i].series and infos[i].path.is_file() else ""
            result[i] = "-".join(path[-depth:]) + series
    return result


class Job:
    """Writes one image, band by band."""

    def __init__(self, writer: StoreWriter, candidate: Candidate, plan: StoredImage, wished: str) -> None:
        identity = plan.identity
        self.name = writer.begun(identity) or writer.free_name(wished)
        self.path = absolute(candidate.image.info.path)
        self.nbytes = candidate.image.info.nbytes
        self._original = Original(candidate.image.info.path, (plan.source_size, plan.source_mtime_ns))
        self.failure: InputError | None = None
        self.outstanding = 0
        self.written = 0
        self._image, self._labels = candidate.image, candidate.labels
        self._labels_dtype = np.dtype(plan.labels_dtype) if plan.labelled else None
        self._writer = writer.begin(self.name, identity, plan, self._labels_dtype)
        self._order = {band.key: number for number, band in enumerate(self._writer.bands)}
        self._copies: queue.SimpleQueue[Source] = queue.SimpleQueue()
        self._all_copies: list[Source] = [self._image]
        self._copies.put(self._image)
        self._statistics = StatisticsBuilder(plan.dtype)
        self._waiting: dict[int, StatisticsBuilder] = {}
        self._merged = 0
        self._lock = threading.Lock()

    @property
    def complete(self) -> bool:
        """Whether every band is written and counted."""
        return self._merged == len(self._order)

    def bands(self) -> Iterator[Band]:
        """Bands to process; counts them as outstanding when they are taken."""
        for band in self._writer.bands:
            if self.failure is not None:
                return
            self.outstanding += 1
            yield band

    def process(self, band: Band) -> int:
        """Write one band, or only measure it when an earlier run wrote it; returns its bytes of pixels.

        Raises:
            InputError: the source is damaged there, or may not be read.
            ResourceError: the source cannot be read just now, or the store cannot be written to.
        """
        if self.failure is not None:
            return 0
        grey = self._writer.read(band) if self._writer.is_done(band) else None
        if grey is None:
            grey = self._read(band)
            labels = None
            if self._labels is not None and self._labels_dtype is not None:
                labels = self._labels.read(band.z, band.y, slice(None)).astype(self._labels_dtype)
            self._writer.write(band, grey, labels)
        statistics = StatisticsBuilder(grey.dtype)
        statistics.add(grey)
        self._merge(self._order[band.key], statistics)
        with self._lock:
            self.written += grey.nbytes
        return grey.nbytes

    def changed(self) -> InputError | None:
        """The reason to refuse the image if its file is not the one that was hashed, or cannot be asked.

        Raises:
            ResourceError: it cannot be asked just now.
        """
        try:
            with reading(Path(self.path)):
                if not self._original.changed():
                    return None
        except InputError as error:
            return error
        return InputError(f"cannot take {self.path}: it changed while it was read", "ingest it when it is complete")

    @property
    def half_is_sound(self) -> bool:
        """Whether the failure says nothing against what was read before: the file may not be read, or is not there."""
        cause = self.failure.__cause__ if self.failure is not None else None
        # Chunks of a Zarr folder that is not there were read as empty, perhaps for some time already.
        return isinstance(cause, PermissionError) or (
            isinstance(cause, FileNotFoundError) and not self._original.is_folder
        )

    def finish(self) -> StoredImage:
        """Record the finished image and return its record."""
        image = replace(self._writer.image, statistics=self._statistics.finish())
        image = replace(image, notes=image.notes + _remarks(image))
        self._writer.finish(image)
        return image

    def close(self) -> None:
        """Release the source's files."""
        for source in self._all_copies:
            source.close()
        if self._labels is not None:
            self._labels.close()

    def _read(self, band: Band) -> np.ndarray:
        if not self._image.parallel:
            return self._image.read(band.z, band.y, slice(None))
        try:
            source = self._copies.get_nowait()
        except queue.Empty:
            source = copy.copy(self._image)
            with self._lock:
                self._all_copies.append(source)
        try:
            return source.read(band.z, band.y, slice(None))
        finally:
            self._copies.put(source)

    def _merge(self, number: int, statistics: StatisticsBuilder) -> None:
        with self._lock:
            self._waiting[number] = statistics
            while self._merged in self._waiting:
                self._statistics.merge(self._waiting.pop(self._merged))
                self._merged += 1


def _remarks(image: StoredImage) -> tuple[str, ...]:
    """What the pixels say about an image, for the notes."""
    notes = []
    if image.statistics.blank:
        notes.append("blank")
    if image.statistics.nonfinite:
        notes.append("values that are not finite left out of the statistics")
    if image.statistics.foreground < 0.995:
        notes.append("padding left out of the statistics")
    return tuple(notes)


def _examine_labels(labels: Source, plan: StoredImage) -> tuple[np.dtype, str]:
    """The smallest dtype that holds all label values, and a hash of the values."""
    digest = hashlib.sha256()
    largest = 0
    _, shard = chunk_shapes(plan.shape_ZYX, plan.dtype.itemsize)
    for band in bands(plan.shape_ZYX, shard):
        block = labels.read(band.z, band.y, slice(None))
        largest = max(largest, int(block.max(initial=0)))
        digest.update(np.ascontiguousarray(block, "<u4").data)
    labels.close()
    return np.min_scalar_type(largest), digest.hexdigest()


def _feed(digest: hashlib._Hash, path: Path) -> None:
    with path.open("rb") as file:
        while chunk := file.read(_READ):
            digest.update(chunk)


def absolute(path: Path | str) -> str:
    """A path as the store records it; URLs stay what they are."""
    path = as_path(path)
    if is_remote(path):
        return str(path)
    return os.path.abspath(path)  # noqa: PTH100 (links are kept: they are how the user named the file)


def _parents(path: Path) -> list[str]:
    return [part for part in Path(absolute(path)).parent.parts if part != os.sep]
