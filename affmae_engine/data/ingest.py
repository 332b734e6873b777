"""Taking images into a dataset store: find -> open -> read and write -> record.

Files are found (`find.py`) and opened by their headers (`volumes.py`), so that totals are known. Then images are read
and written band by band (one shard of the store at a time, see `store_layout.py`) in a few threads; at most one band
per thread is in memory, and what follows a band (statistics, records, the report) happens here, in their order.

An image is identified by the SHA-256 of its file, its series, its channel and its labels: what is in the store already
is not read again, and half an image left by an interrupted run is continued at the first missing band. The same pixels
in another file are recognized once they were read, and count once. A damaged file is skipped with its reason (a stack
of files loses only that section), and nothing of it stays in the store. What says nothing about a file, such as a share
that is away for a moment or memory that is short, ends the run, and all that was written is kept for the next one.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import queue
import shutil
import time
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from affmae_engine import atomic
from affmae_engine.data import cleaning
from affmae_engine.data.cleaning import Cleaned, Decision, apply
from affmae_engine.data.contact_sheet import write_contact_sheet
from affmae_engine.data.find import Found, LeftOut, find_images, kind_of_array, looks_like_labels
from affmae_engine.data.readers import PixelSize, Source
from affmae_engine.data.readers.files import Original, natural_key
from affmae_engine.data.readers.limits import refuse_large_piece
from affmae_engine.data.readers.source import reading
from affmae_engine.data.statistics import Statistics, StatisticsBuilder, pool
from affmae_engine.data.store import Store
from affmae_engine.data.store_layout import SCHEMA_VERSION, Band, StoredImage, StorePaths, bands, chunk_shapes
from affmae_engine.data.store_writer import ImageWriter, StoreWriter
from affmae_engine.data.volumes import (
    DamagedSection,
    Unreadable,
    Volume,
    absolute,
    hash_of,
    join_sections,
    open_volumes,
    size_and_time,
    wished_names,
)
from affmae_engine.errors import InputError

_FORMER_VERSION = "a former version of the file is in the dataset too; the two never face each other in a split"


@dataclass(frozen=True)
class IngestProgress:
    """How far an ingestion is. `stage` is "scan" (counting files) or "write" (counting bytes of pixels)."""

    stage: str
    done: int
    total: int
    current: str
    images_done: int = 0
    images_total: int = 0


@dataclass(frozen=True)
class Skipped:
    """A file, or one image of a file, that cannot be taken."""

    path: str
    reason: str
    hint: str = ""


@dataclass(frozen=True)
class Present:
    """An image whose content is in the store already, under `name`. same_pixels: from a file with other bytes."""

    path: str
    series: str
    name: str
    same_pixels: bool = False


@dataclass
class IngestReport:
    """What an ingestion did."""

    store: Path
    taken: list[StoredImage] = field(default_factory=list)
    present: list[Present] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    """Files that are no images: label maps, predictions, overlays, run folders."""
    decisions: list[Decision] = field(default_factory=list)
    """What `clean` left out or cropped, of these sources."""
    corrected: int = 0
    """Images among `present` that got another pixel size."""
    statistics: Statistics | None = None
    """Of the whole dataset; None when it has no image."""
    images: int = 0
    """Images in the dataset now."""
    overview: Path | None = None
    """The contact sheet."""
    interrupted: bool = False
    seconds: float = 0.0


def source_key(source: Source) -> str:
    """Key of an image in the `labels` argument of `ingest`."""
    return f"{source.info.path}[{source.info.series}]"


def ingest(
    sources: Sequence[str | Path | Source],
    store_path: Path,
    *,
    labels: Mapping[str, Source] | None = None,
    class_names: Sequence[str] = (),
    pixel_nm: PixelSize | None = None,
    channel: int | None = None,
    take_all: bool = False,
    stacks: bool = True,
    clean: bool | None = None,
    confirm: Callable[[Cleaned, Path], bool] | None = None,
    workers: int | None = None,
    on_progress: Callable[[IngestProgress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> IngestReport:
    """Take images into a store, creating it when it does not exist.

    Args:
        sources: files, folders, globs (see `find.find_images`), or images that are open already, which are taken as
            they are.
        store_path: the store's folder, for example `data/em.zarr`.
        labels: label map of an image, by `source_key`; it must have the image's shape.
        class_names: names of the label values 0, 1, 2, ...; kept in the store.
        pixel_nm: voxel size in nanometres (z, y, x) for all these images, in place of what their files say.
        channel: see `readers.open_sources`.
        take_all: take label maps, predictions, overlays and the like as images too.
        stacks: join numbered section files to stacks.
        clean: leave out near-duplicates, blank and saturated images and crop info bars (`cleaning.clean`); False
            reverses that for these sources, and None keeps to what was decided about them before.
        confirm: asked once with the decisions and the sheet that shows them; False takes everything as it is.
        workers: threads; None takes up to 8, one per core.
        on_progress: called from this thread, after every file scanned and every band written.
        should_stop: asked between bands; True ends the ingestion cleanly, to be continued by the same call.

    Raises:
        InputError: nothing was found to read.
        ConfigError, BusyError, CorruptError, ResourceError: see `StoreWriter`.
        ResourceError: also when a source cannot be read just now; the same call goes on from what was written.
    """
    started = time.monotonic()
    paths = [source for source in sources if not isinstance(source, Source)]
    found = find_images(paths, take_all=take_all, inside=store_path) if paths or not sources else None
    existed = store_path.exists()
    with StoreWriter(store_path, class_names=class_names) as writer:
        run = _Run(
            IngestReport(store_path, left_out=list(found.left_out) if found else []),
            writer,
            pixel_nm,
            channel,
            workers or min(8, os.cpu_count() or 1),
            on_progress or (lambda progress: None),
            should_stop or (lambda: False),
        )
        volumes = run.open(found, take_all=take_all, stacks=stacks) if found else []
        earlier = _earlier_decisions(writer.paths.manifest)
        volumes, decisions = _cleaned(volumes, writer, earlier, clean, confirm)
        run.report.decisions = decisions
        wanted = labels or {}
        volumes += [Volume(source, wanted.get(source_key(source))) for source in sources if isinstance(source, Source)]
        seen = {volume.path for volume in volumes} | {decision.path for decision in decisions}
        while volumes and not run.report.interrupted:
            volumes = run.take(volumes)
        if not run.report.interrupted:
            _drop_leftovers(writer, seen, run.kept)
        _write_manifest(writer, run.report, earlier, seen)
    _finish_report(run.report, keep=existed or run.report.interrupted or bool(run.kept))
    run.report.seconds = time.monotonic() - started
    return run.report


def _cleaned(
    volumes: list[Volume],
    writer: StoreWriter,
    earlier: Sequence[Decision],
    clean: bool | None,
    confirm: Callable[[Cleaned, Path], bool] | None,
) -> tuple[list[Volume], list[Decision]]:
    """The volumes to take, and what was decided about them. Images of the store that were decided otherwise go."""
    keys = {(volume.path, volume.image.info.series) for volume in volumes}
    about = [decision for decision in earlier if decision.key in keys]
    if clean is None:
        return apply(about, volumes), about
    changed = about
    if clean:
        cleaned = cleaning.clean(volumes)
        if cleaned.decisions:
            cleaning.write_sheet(cleaned, writer.paths.clean_sheet)
        if not cleaned.decisions or (confirm is not None and not confirm(cleaned, writer.paths.clean_sheet)):
            return apply(about, volumes), about
        volumes, about = cleaned.volumes, cleaned.decisions
        changed = [*changed, *about]
    else:
        about = []
    rows = {decision.key: decision.rows for decision in about}
    stale = {decision.key for decision in changed}
    for image in list(writer.images.values()):
        key = image.source_path, image.source_series
        if key in stale and (key not in rows or rows[key] != image.shape_ZYX[1]):
            writer.drop(image.name)
    return volumes, about


@dataclass
class _Job:
    """One image on its way into the store. readers: copies of its source, one per thread that reads it at a time."""

    volume: Volume
    writer: ImageWriter
    originals: list[Original]
    readers: queue.SimpleQueue[Source]
    statistics: StatisticsBuilder
    digest: hashlib._Hash
    waiting: int
    """Bands that are not done."""
    running: int = 0
    """Bands that threads have, or had without the result being looked at."""
    written: int = 0
    """Bytes of pixels that are done."""
    outcome: InputError | LeftOut | None = None
    """Why it is not taken after all."""

    @property
    def name(self) -> str:
        return self.writer.image.name


@dataclass(frozen=True)
class _Done:
    """What is known of a band when it is in the store. checksum: CRC-32 of its pixels."""

    statistics: StatisticsBuilder
    checksum: int
    nbytes: int


class _NotAnImage(Exception):
    """A band that looks like a label map."""


class _Run:
    def __init__(
        self,
        report: IngestReport,
        writer: StoreWriter,
        pixel_nm: PixelSize | None,
        channel: int | None,
        workers: int,
        on_progress: Callable[[IngestProgress], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.report, self.writer, self.pixel_nm, self.channel, self.workers = report, writer, pixel_nm, channel, workers
        self.on_progress, self.should_stop = on_progress, should_stop
        self.kept: set[str] = set()
        """Halves of images to be continued when their files may be read again."""
        self._done_bytes = self._total_bytes = self._finished = self._images = 0

    def open(self, found: Found, *, take_all: bool, stacks: bool) -> list[Volume]:
        """Open every file by its header."""
        sources: list[Source] = []
        opened = open_volumes(found.files, channel=self.channel, workers=self.workers)
        for number, (path, contents) in enumerate(zip(found.files, opened, strict=True), 1):
            if self.should_stop():
                self.report.interrupted = True
                return []
            for one in contents:
                if isinstance(one, Unreadable):
                    self.report.skipped.append(Skipped(absolute(one.path), one.error.message, one.error.hint))
                elif not take_all and (what := kind_of_array(one.info.series)):
                    self.report.left_out.append(LeftOut(path / one.info.series, what))
                else:
                    sources.append(one)
            self.on_progress(IngestProgress("scan", number, len(found.files), path.name))
        single = {image.source_path for image in self.writer.images.values() if image.shape_ZYX[0] == 1}
        joined = join_sections(sources, apart=single) if stacks else sources
        return [Volume(source, questioned=found.questioned) for source in joined]

    def take(self, volumes: Sequence[Volume]) -> list[Volume]:
        """Write what is new; returns what is to be tried again: stacks without a section that is damaged."""
        self._images, self._finished = len(volumes), 0
        self._done_bytes, self._total_bytes = 0, sum(volume.image.info.nbytes for volume in volumes)
        again: list[Volume] = []
        for job, future in _in_order(self._bands(volumes), self.workers):
            again += self._after_band(job, future)
        return again

    def _bands(self, volumes: Sequence[Volume]) -> Iterator[tuple[_Job, Band]]:
        """The bands of all images that are new, prepared one after the other as they are needed."""
        names = wished_names([volume.image.info for volume in volumes])
        known = {key: image.name for image in self.writer.images.values() for key in image.identity_keys}
        for volume, wished in zip(volumes, names, strict=True):
            info = volume.image.info
            try:
                plan = _describe(volume, list(self.writer.images.values()), self.channel, self.pixel_nm)
            except InputError as error:
                self.report.skipped.append(Skipped(volume.path, error.message, error.hint))
                self._advance(info.nbytes, info.path.name, images=1)
                continue
            name = known.get(plan.identity_keys[0])
            if name is not None:
                self.report.present.append(Present(volume.path, info.series, name))
                self._correct_pixel_size(name, plan.pixel_nm)
                self._advance(info.nbytes, info.path.name, images=1)
                continue
            job = self._begin(volume, plan, wished)
            known[plan.identity_keys[0]] = job.name
            for band in job.writer.bands:
                if self.should_stop():
                    self.report.interrupted = True
                    return
                if job.outcome is None:
                    job.running += 1
                    yield job, band

    def _begin(self, volume: Volume, plan: StoredImage, wished: str) -> _Job:
        name = self.writer.begun(plan.identity) or self.writer.free_name(wished)
        labels_dtype = np.dtype(plan.labels_dtype) if plan.labelled else None
        writer = self.writer.begin(name, plan.identity, plan, labels_dtype)
        stamp = (plan.source_size, plan.source_mtime_ns)
        files = volume.files
        originals = [Original(path, stamp if len(files) == 1 else None) for path in files]
        readers: queue.SimpleQueue[Source] = queue.SimpleQueue()
        readers.put(volume.image)
        digest = hashlib.sha256(f"{plan.shape_ZYX} {plan.dtype.name}".encode())
        return _Job(volume, writer, originals, readers, StatisticsBuilder(plan.dtype), digest, len(writer.bands))

    def _after_band(self, job: _Job, future: Future[_Done]) -> list[Volume]:
        """Take a band's figures; after the last one, finish the image, or undo it."""
        job.waiting -= 1
        job.running -= 1
        again: list[Volume] = []
        if job.outcome is None:
            try:
                done = future.result()
                job.statistics.merge(done.statistics)
                job.digest.update(done.checksum.to_bytes(4, "little"))
                job.written += done.nbytes
                self._advance(done.nbytes, Path(job.volume.path).name)
            except _NotAnImage:
                job.outcome = LeftOut(Path(job.volume.path), "label map")
            except DamagedSection as error:
                job.outcome = error
                again = job.volume.without(error.section)
            except InputError as error:
                job.outcome = error
            if job.outcome is None and job.waiting == 0:
                job.outcome = _changed(job)
                if job.outcome is None:
                    _close(job)
                    self._finish(job)
        if job.outcome is not None and job.running == 0:  # no thread writes to it any more
            self._undo(job)
        return again

    def _finish(self, job: _Job) -> None:
        """Record a complete image, unless its pixels are in the store already."""
        statistics = job.statistics.finish()
        job.digest.update(json.dumps(statistics.to_dict()).encode())  # a CRC alone may be equal by chance
        image = replace(job.writer.image, statistics=statistics, pixels_hash=job.digest.hexdigest())
        image = replace(image, notes=image.notes + _remarks(image))
        twin = next((one for one in self.writer.images.values() if one.same_pixels(image)), None)
        if twin is None:
            job.writer.finish(image)
            self.report.taken.append(image)
        else:
            self.writer.finish(replace(twin, copies=(*twin.copies, image.content_key)))
            self.writer.drop(job.name)
            self.report.present.append(Present(job.volume.path, image.source_series, twin.name, same_pixels=True))
        self._advance(0, Path(job.volume.path).name, images=1)

    def _undo(self, job: _Job) -> None:
        """Report an image that is not taken, and remove what was written of it, unless that may be continued."""
        _close(job)
        if isinstance(job.outcome, LeftOut):
            self.report.left_out.append(job.outcome)
        elif job.outcome is not None:
            path = job.volume.path
            if isinstance(job.outcome, DamagedSection):
                path = absolute(job.volume.files[job.outcome.section])
            self.report.skipped.append(Skipped(path, job.outcome.message, job.outcome.hint))
        self._advance(job.volume.image.info.nbytes - job.written, Path(job.volume.path).name, images=1)
        if _half_is_sound(job):
            self.kept.add(job.name)
        else:
            self.writer.drop(job.name)

    def _correct_pixel_size(self, name: str, pixel_nm: PixelSize) -> None:
        image = self.writer.images.get(name)
        if self.pixel_nm is not None and image is not None and image.pixel_nm != pixel_nm:
            self.writer.set_pixel_size(name, pixel_nm)
            self.report.corrected += 1

    def _advance(self, nbytes: int, current: str, images: int = 0) -> None:
        self._done_bytes += nbytes
        self._finished += images
        self.on_progress(
            IngestProgress("write", self._done_bytes, self._total_bytes, current, self._finished, self._images)
        )


def _in_order(bands: Iterator[tuple[_Job, Band]], workers: int) -> Iterator[tuple[_Job, Future[_Done]]]:
    """Process bands in threads, a bounded number ahead; yields their finished futures in the order of the bands."""
    waiting: deque[tuple[_Job, Future[_Done]]] = deque()
    with ThreadPoolExecutor(workers) as threads:
        try:
            for job, band in bands:
                waiting.append((job, threads.submit(_process, job, band)))
                while waiting and (len(waiting) > workers or waiting[0][1].done()):
                    waiting[0][1].exception()  # waits
                    yield waiting.popleft()
            while waiting:
                waiting[0][1].exception()
                yield waiting.popleft()
        finally:
            threads.shutdown(cancel_futures=True)


def _process(job: _Job, band: Band) -> _Done:
    """Read and write one band, or only measure it when an earlier run wrote it. Called in threads.

    Raises:
        _NotAnImage: it looks like a label map, and the image is questioned.
        InputError: the source is damaged there, or may not be read.
        ResourceError: the source cannot be read just now, or the store cannot be written to.
    """
    grey = job.writer.read(band) if job.writer.is_done(band) else None
    if grey is None:
        grey = _read(job, band)
        if job.volume.questioned and looks_like_labels(grey[len(grey) // 2]):
            raise _NotAnImage
        labels = None
        if job.volume.labels is not None:
            labels = job.volume.labels.read(band.z, band.y, slice(None)).astype(job.writer.image.labels_dtype)
        job.writer.write(band, grey, labels)
    statistics = StatisticsBuilder(grey.dtype)
    statistics.add(grey)
    return _Done(statistics, zlib.crc32(np.ascontiguousarray(grey).data), grey.nbytes)


def _read(job: _Job, band: Band) -> np.ndarray:
    image = job.volume.image
    if not image.parallel:
        return image.read(band.z, band.y, slice(None))
    try:
        source = job.readers.get_nowait()
    except queue.Empty:
        source = copy.copy(image)
    try:
        return source.read(band.z, band.y, slice(None))
    finally:
        job.readers.put(source)


def _close(job: _Job) -> None:
    """Release the files of an image."""
    job.volume.image.close()
    while not job.readers.empty():
        job.readers.get().close()
    if job.volume.labels is not None:
        job.volume.labels.close()


def _describe(
    volume: Volume, known: Sequence[StoredImage], channel: int | None, pixel_nm: PixelSize | None
) -> StoredImage:
    """The record of an image before its pixels were read: everything but name and statistics.

    The file is hashed, unless an image of the same path, size and modification time is in the store. A file that was
    taken before with another content gets a note: both versions are kept, because a training under way may be reading
    the former one, and what lay under that name may be nowhere else.

    Raises:
        InputError: the file cannot be read, or the labels do not fit it.
    """
    info, labels, path = volume.image.info, volume.labels, volume.path
    size, mtime = size_and_time(volume)
    _, shard = chunk_shapes(info.shape_ZYX, info.dtype.itemsize)
    with reading(info.path, info.series):
        band = math.prod(shard) * info.dtype.itemsize
        refuse_large_piece(band, "a band of rows of it", "cut it into narrower images")
    before = [image for image in known if image.source_path == path]
    stamp = (size, mtime, len(volume.files))
    untouched = [i for i in before if (i.source_size, i.source_mtime_ns, i.source_files) == stamp]
    sha = untouched[0].sha256 if untouched else hash_of(volume)
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
        source_files=len(volume.files),
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


def _changed(job: _Job) -> InputError | None:
    """The reason to refuse an image if its files are not those that were hashed, or cannot be asked.

    Raises:
        ResourceError: they cannot be asked just now.
    """
    path = Path(job.volume.path)
    try:
        with reading(path):
            if not any(original.changed() for original in job.originals):
                return None
    except InputError as error:
        return error
    return InputError(f"cannot take {path}: it changed while it was read", "ingest it when it is complete")


def _half_is_sound(job: _Job) -> bool:
    """Whether the failure says nothing against what was read before: the file may not be read, or is not there."""
    if not isinstance(job.outcome, InputError):
        return False
    cause = job.outcome.__cause__
    # Chunks of a Zarr folder that is not there were read as empty, perhaps for some time already.
    return isinstance(cause, PermissionError) or (
        isinstance(cause, FileNotFoundError) and not job.originals[0].is_folder
    )


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


def _drop_leftovers(writer: StoreWriter, seen: set[str], kept: set[str]) -> None:
    """Remove halves of images whose source is gone or was changed since."""
    for name, identity in writer.unfinished().items():
        path = str(identity.get("path"))
        if name not in kept and (path in seen or _is_gone(path)):
            writer.drop(name)


def _is_gone(path: str) -> bool:
    """Whether a file was deleted; where its folder is not to be seen either, a disk or share may only be away."""
    return os.path.isdir(os.path.dirname(path)) and not os.path.lexists(path)  # noqa: PTH112, PTH120 (as recorded)


def _write_manifest(
    writer: StoreWriter, report: IngestReport, decisions: Sequence[Decision], seen: Collection[str]
) -> None:
    """Write what was taken, skipped and left out, keeping what is known of files that were not part of this run."""
    images = sorted(writer.images.values(), key=lambda image: natural_key(image.name))
    again = {s.path for s in report.skipped} | {p.path for p in report.present}
    again |= {image.source_path for image in images}
    earlier = [s for s in _earlier_skipped(writer.paths.manifest) if absolute(str(s.get("path"))) not in again]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    content = {
        "schema": SCHEMA_VERSION,
        "updated": now,
        "taken": [{k: v for k, v in image.to_dict().items() if v not in ("", None, ())} for image in images],
        "skipped": earlier
        + [{"path": s.path, "reason": s.reason, "hint": s.hint, "time": now} for s in report.skipped],
        "clean": [
            decision.to_dict() for decision in (*(d for d in decisions if d.path not in seen), *report.decisions)
        ],
        "left_out": [{"path": absolute(item.path), "what": item.what} for item in report.left_out],
    }
    atomic.commit_text(writer.paths.manifest, json.dumps(content, indent=1) + "\n")


def _earlier_decisions(manifest: Path) -> list[Decision]:
    try:
        return [Decision.from_dict(entry) for entry in json.loads(manifest.read_text("utf-8"))["clean"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []  # there is no manifest, or none with decisions


def _earlier_skipped(manifest: Path) -> list[dict[str, Any]]:
    try:
        skipped = json.loads(manifest.read_text("utf-8"))["skipped"]
        return [entry for entry in skipped if isinstance(entry, dict)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _finish_report(report: IngestReport, *, keep: bool) -> None:
    """Fill in what concerns the whole dataset; a store that was made for nothing is removed again unless `keep`."""
    try:
        store = Store.open(report.store)
    except InputError:
        if not keep:
            shutil.rmtree(report.store, ignore_errors=True)
        return
    report.images = len(store.images)
    report.statistics = pool([image.statistics for image in store.images])
    overview = StorePaths(report.store).overview
    if report.taken or not overview.exists():
        write_contact_sheet(store, overview)
    report.overview = overview
