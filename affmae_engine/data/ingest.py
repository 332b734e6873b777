"""Taking images into a dataset store: many files, a few threads, bounded memory, and a report of everything.

Files are scanned by their headers first, so that totals are known; then images are written band by band (one shard of
the store at a time, see `store_layout.py`) by a pool of threads. At most one band per thread is in memory. An image is
identified by the SHA-256 of its file, its series, its channel and its labels: what is already in the store is not read
again, and half an image left by an interrupted run is continued at the first missing band. A damaged file is
skipped with its reason, and nothing of it stays in the store. What says nothing about a file, such as a share that is
away for a moment or memory that is short, ends the run, and all that was written is kept for the next one.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from affmae_engine import atomic
from affmae_engine.data.contact_sheet import write_contact_sheet
from affmae_engine.data.ingest_job import Candidate, Job, absolute, describe, wished_names
from affmae_engine.data.readers import PixelSize, Source, find_files, scan_sources
from affmae_engine.data.readers.files import natural_key
from affmae_engine.data.statistics import Statistics, pool
from affmae_engine.data.store import Store
from affmae_engine.data.store_layout import SCHEMA_VERSION, StoredImage, StorePaths
from affmae_engine.data.store_writer import StoreWriter
from affmae_engine.errors import InputError


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
    """A file, or one image of a file, that was not taken."""

    path: str
    reason: str
    hint: str = ""


@dataclass(frozen=True)
class Present:
    """An image whose content is in the store already, under `name`."""

    path: str
    series: str
    name: str


@dataclass
class IngestReport:
    """What an ingestion did."""

    store: Path
    taken: list[StoredImage] = field(default_factory=list)
    present: list[Present] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
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
    workers: int | None = None,
    on_progress: Callable[[IngestProgress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> IngestReport:
    """Take images into a store, creating it when it does not exist.

    Args:
        sources: files, folders, globs (see `readers.find_files`), or images that are open already.
        store_path: the store's folder, for example `data/em.zarr`.
        labels: label map of an image, by `source_key`; it must have the image's shape.
        class_names: names of the label values 0, 1, 2, ...; kept in the store.
        pixel_nm: voxel size in nanometres (z, y, x) for all these images, in place of what their files say.
        channel: see `readers.open_sources`.
        workers: threads; None takes up to 8, one per core.
        on_progress: called from this thread, after every file scanned and every band written.
        should_stop: asked between bands; True ends the ingestion cleanly, to be continued by the same call.

    Raises:
        InputError: nothing was found to read, or labels do not fit their image.
        ConfigError, BusyError, CorruptError, ResourceError: see `StoreWriter`.
        ResourceError: also when a source cannot be read just now; the same call goes on from what was written.
    """
    run = _Run(store_path, labels or {}, pixel_nm, channel, workers or min(8, os.cpu_count() or 1))
    run.on_progress = on_progress or (lambda progress: None)
    run.should_stop = should_stop or (lambda: False)
    started = time.monotonic()
    files = find_files([s for s in sources if not isinstance(s, Source)]) if _any_path(sources) else []
    opened = [s for s in sources if isinstance(s, Source)]
    existed = store_path.exists()
    with StoreWriter(store_path, class_names=class_names) as writer:
        candidates = run.scan([f for f in files if not _inside(f, store_path)])
        candidates += [Candidate(source, run.labels.get(source_key(source))) for source in opened]
        if not run.report.interrupted:
            run.write(writer, candidates)
        run.tidy(writer, candidates)
        run.write_manifest(writer)
    _finish_report(run.report, keep=existed or run.report.interrupted or bool(run.kept))
    run.report.seconds = time.monotonic() - started
    return run.report


class _Run:
    def __init__(
        self,
        store_path: Path,
        labels: Mapping[str, Source],
        pixel_nm: PixelSize | None,
        channel: int | None,
        workers: int,
    ) -> None:
        self.labels, self.pixel_nm, self.channel, self.workers = labels, pixel_nm, channel, workers
        self.report = IngestReport(store_path)
        self.on_progress: Callable[[IngestProgress], None]
        self.should_stop: Callable[[], bool]
        self.kept: set[str] = set()
        """Halves of images to be continued when their files may be read again."""
        self._done_bytes = self._total_bytes = self._finished = self._images = 0

    def scan(self, files: Sequence[Path]) -> list[Candidate]:
        """Open every file by its header."""
        found: list[Candidate] = []
        with ThreadPoolExecutor(self.workers) as threads:
            jobs = [threads.submit(scan_sources, path, channel=self.channel) for path in files]
            for number, (path, job) in enumerate(zip(files, jobs, strict=True), 1):
                if self.should_stop():
                    threads.shutdown(cancel_futures=True)
                    self.report.interrupted = True
                    return []
                try:
                    images, refused = job.result()
                    found += [Candidate(image, self.labels.get(source_key(image))) for image in images]
                    self.report.skipped += [Skipped(absolute(path), e.message, e.hint) for e in refused]
                except InputError as error:
                    self.report.skipped.append(Skipped(absolute(path), error.message, error.hint))
                self.on_progress(IngestProgress("scan", number, len(files), path.name))
        return found

    def write(self, writer: StoreWriter, candidates: Sequence[Candidate]) -> None:
        """Write what is new, a bounded number of bands at a time."""
        self._images = len(candidates)
        self._total_bytes = sum(candidate.image.info.nbytes for candidate in candidates)
        running: dict[Future[Any], Job] = {}
        jobs = self._jobs(writer, candidates)
        tasks = ((job, band) for job in jobs for band in job.bands())
        exhausted = False
        with ThreadPoolExecutor(self.workers) as threads:
            while running or not exhausted:
                while not exhausted and len(running) < self.workers + 1:
                    if self.should_stop():
                        self.report.interrupted = exhausted = True
                        break
                    task = next(tasks, None)
                    if task is None:
                        exhausted = True
                        break
                    job, band = task
                    if job.failure is None:
                        running[threads.submit(job.process, band)] = job
                finished, _ = wait(running, return_when=FIRST_COMPLETED) if running else (set(), set())
                for future in finished:
                    self._after_band(writer, running.pop(future), future)

    def _jobs(self, writer: StoreWriter, candidates: Sequence[Candidate]) -> Iterator[Job]:
        """Jobs for the images that are new, prepared one after the other as they are needed."""
        names = wished_names([candidate.image.info for candidate in candidates])
        known = {image.identity_key: name for name, image in writer.images.items()}
        for candidate, wished in zip(candidates, names, strict=True):
            info = candidate.image.info
            try:
                plan = describe(candidate, writer.images.values(), self.channel, self.pixel_nm)
            except InputError as error:
                self._skip(absolute(info.path), error, info.nbytes)
                continue
            name = known.get(plan.identity_key)
            if name is not None:
                self.report.present.append(Present(absolute(info.path), info.series, name))
                if (
                    self.pixel_nm is not None
                    and name in writer.images
                    and writer.images[name].pixel_nm != plan.pixel_nm
                ):
                    writer.set_pixel_size(name, plan.pixel_nm)
                    self.report.corrected += 1
                self._advance(info.nbytes, info.path.name, images=1)
                continue
            job = Job(writer, candidate, plan, wished)
            known[plan.identity_key] = job.name
            yield job

    def _after_band(self, writer: StoreWriter, job: Job, future: Future[Any]) -> None:
        try:
            nbytes = future.result()
        except InputError as error:
            if job.failure is None:
                job.failure = error
                self._skip(job.path, error, job.nbytes - job.written)
            nbytes = 0
        job.outstanding -= 1
        self._advance(nbytes if job.failure is None else 0, Path(job.path).name)
        if job.outstanding == 0 and (job.failure is not None or job.complete):
            job.close()
            if job.failure is None:
                job.failure = job.changed()
                if job.failure is not None:
                    self._skip(job.path, job.failure, 0)
            if job.failure is None:
                self.report.taken.append(job.finish())
                self._advance(0, Path(job.path).name, images=1)
            elif job.half_is_sound:
                self.kept.add(job.name)
            else:
                writer.drop(job.name)

    def tidy(self, writer: StoreWriter, candidates: Sequence[Candidate]) -> None:
        """Remove halves of images whose source is gone or was changed since."""
        if self.report.interrupted:
            return
        seen = {absolute(candidate.image.info.path) for candidate in candidates}
        for name, identity in writer.unfinished().items():
            path = str(identity.get("path"))
            if name not in self.kept and (path in seen or _is_gone(path)):
                writer.drop(name)

    def write_manifest(self, writer: StoreWriter) -> None:
        """Write what was taken and skipped, keeping earlier refusals of files that were not part of this run."""
        images = sorted(writer.images.values(), key=lambda image: natural_key(image.name))
        again = {s.path for s in self.report.skipped} | {p.path for p in self.report.present}
        again |= {image.source_path for image in images}
        earlier = [s for s in _earlier_skipped(writer.paths.manifest) if absolute(str(s.get("path"))) not in again]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        skipped = [{"path": s.path, "reason": s.reason, "hint": s.hint, "time": now} for s in self.report.skipped]
        taken = [{k: v for k, v in image.to_dict().items() if v not in ("", None)} for image in images]
        content = {"schema": SCHEMA_VERSION, "updated": now, "taken": taken, "skipped": earlier + skipped}
        atomic.commit_text(writer.paths.manifest, json.dumps(content, indent=1) + "\n")

    def _skip(self, path: str, error: InputError, nbytes: int) -> None:
        self.report.skipped.append(Skipped(path, error.message, error.hint))
        self._advance(nbytes, Path(path).name, images=1)

    def _advance(self, nbytes: int, current: str, images: int = 0) -> None:
        self._done_bytes += nbytes
        self._finished += images
        self.on_progress(
            IngestProgress("write", self._done_bytes, self._total_bytes, current, self._finished, self._images)
        )


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


def _is_gone(path: str) -> bool:
    """Whether a file was deleted; where its folder is not to be seen either, a disk or share may only be away."""
    return os.path.isdir(os.path.dirname(path)) and not os.path.lexists(path)  # noqa: PTH112, PTH120 (as recorded)


def _any_path(sources: Sequence[str | Path | Source]) -> bool:
    return not sources or any(not isinstance(source, Source) for source in sources)


def _inside(path: Path, store: Path) -> bool:
    real = os.path.realpath(store)
    return os.path.realpath(path) == real or os.path.realpath(path).startswith(real + os.sep)


def _earlier_skipped(manifest: Path) -> list[dict[str, Any]]:
    try:
        skipped = json.loads(manifest.read_text("utf-8"))["skipped"]
        return [entry for entry in skipped if isinstance(entry, dict)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
