"""From finished blocks to the output under its final name.

It may run while blocks are still computed and follows them: a TIFF is then complete soon after the last block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from affmae_engine import atomic
from affmae_engine.data.readers import PixelSize
from affmae_engine.errors import BusyError, ConfigError, InputError
from affmae_engine.predict.grid import z_slabs
from affmae_engine.predict.job import Job
from affmae_engine.predict.outputs import stem
from affmae_engine.predict.overlay import OverlayPicture
from affmae_engine.predict.sources import described
from affmae_engine.predict.tiff_labels import OutputInfo, rows_per_band, write_tiff
from affmae_engine.predict.volume import ZARR_DIALECT, fingerprint_of
from affmae_engine.predict.work import digest

Wait = Callable[[int], object]
"""Returns when that block is finished."""


@dataclass(frozen=True)
class PredictReport:
    """What was made.

    source, name: the input. sections: path and name inside the file of each image that it is made of. class_fractions:
    share of the pixels by class name. seconds: of this process, start of the model not included. megapixels_per_s: of
    what was computed in that time. blocks: that need the network. blocks_before: of those of this process, how many an
    earlier call had finished.
    """

    source: Path
    series: str
    name: str
    sections: tuple[tuple[str, str], ...]
    labels: Path
    format: str
    shape_ZYX: tuple[int, int, int]
    dtype: str
    pixel_nm: PixelSize
    class_fractions: dict[str, float]
    seconds: float
    megapixels_per_s: float
    tile: int
    batch: int
    rescaled_to: tuple[int, int] | None
    blocks: int
    blocks_before: int
    probabilities: Path | None = None
    overlay: Path | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finished:
    """What was put together. counts: pixels of each class. overlay: where the picture is; None where there is none."""

    format: str
    counts: np.ndarray
    overlay: Path | None
    warnings: tuple[str, ...]


def finish(job: Job, wait: Wait | None = None, check: Callable[[], object] = lambda: None) -> Finished:
    """Put the output together and remove the work folder.

    Args:
        wait: called with the number of a block before it is used; None: all of them must be finished.
        check: called between steps; it may raise.

    Raises:
        ConfigError: blocks are missing.
        BusyError: another process puts it together just now.
        InputError: the input is not the one that was read; nothing is kept then.
        ResourceError: the disk is full or failed; finished blocks stay.
    """
    if wait is None:
        missing = set(job.numbers) - job.finished(job.numbers)
        if missing:
            raise ConfigError(
                f"{len(missing)} of {len(job.numbers)} blocks of {job.targets.labels} are not computed yet, the first "
                f"is number {min(missing)}",
                "run the same command without --finish (or the missing --shard) to compute them",
            )
    with job.work.finishing() as mine:
        if not mine:
            raise BusyError(f"{job.targets.labels} is put together by another process", "wait for it")
        return _finish(job, wait or (lambda number: None), check)


def _finish(job: Job, wait: Wait, check: Callable[[], object]) -> Finished:
    if job.merge is not None:  # average the orientations, once all of them are there
        for number in job.numbers:
            wait(number)
        done = job.finished(job.merge_numbers)
        for number in job.merge_numbers:
            check()
            if number not in done:
                job.average(number)
        wait = lambda number: None  # noqa: E731 (all are there)
    picture = OverlayPicture(job.source.info.shape_ZYX) if job.targets.with_overlay else None
    warnings: list[str] = []

    def publish_others() -> None:
        """Picture and probabilities: the labels appear last."""
        require_unchanged(job)
        if picture is not None and job.targets.overlay is not None:
            names = job.predictor.metadata.class_names
            picture.gather(job.output.labels)
            warnings.extend(picture.attempt(job.targets.overlay, job.source, job.statistics, names))
        if job.targets.probabilities is not None:
            path, built = job.targets.probabilities, job.work.folder / "probabilities"
            # A call that was killed between this and the labels has published them; what is there is what it replaced.
            if fingerprint_of(built) == digest(job.made_from):
                atomic.publish_folder(built, path, replace=path.exists())

    if job.targets.is_zarr:
        dialect = ZARR_DIALECT
        for number in range(job.output.first, job.output.first + len(job.output.grid)):
            wait(number)
        publish_others()
        counts = _counts(job)
        atomic.publish_folder(job.work.folder / "volume", job.targets.labels, replace=job.targets.labels.exists())
    else:
        dialects: list[str] = []

        def write(partial: Path) -> None:
            dialects.append(write_tiff(partial, output_info(job), _bands(job, wait, check)))
            publish_others()

        atomic.commit_file(job.targets.labels, write)
        dialect, counts = dialects[0], _counts(job)
    job.work.discard()
    return Finished(dialect, counts, None if picture is None else picture.path, tuple(warnings))


def report(job: Job, done: Finished, seconds: float, numbers: Sequence[int], blocks_before: int) -> PredictReport:
    """The report of a finished prediction.

    Args:
        numbers, blocks_before: the blocks of this process, and how many of them were finished before.
    """
    computed = (len(numbers) - blocks_before) / len(job.numbers)
    info, names = job.source.info, job.predictor.metadata.class_names
    pixels = math.prod(info.shape_ZYX)
    geometry = job.passes[0].geometry
    inner = geometry.y.inner, geometry.x.inner
    return PredictReport(
        source=info.path,
        series=info.series,
        name=info.name,
        sections=tuple((path, series) for path, series in described(job.source)),
        labels=job.targets.labels,
        format=done.format,
        shape_ZYX=info.shape_ZYX,
        dtype=str(job.dtype),
        pixel_nm=job.pixel_nm,
        class_fractions=dict(zip(names, (done.counts / pixels).tolist(), strict=True)),
        seconds=seconds,
        megapixels_per_s=pixels * computed / 1e6 / seconds,
        tile=job.tile,
        batch=job.batch,
        rescaled_to=inner if inner != (geometry.y.length, geometry.x.length) else None,
        blocks=len(job.numbers),
        blocks_before=blocks_before,
        probabilities=job.targets.probabilities,
        overlay=done.overlay,
        notes=tuple(job.notes),
        warnings=(*job.warnings, *done.warnings),
    )


def output_info(job: Job) -> OutputInfo:
    """The facts for a TIFF's metadata."""
    return OutputInfo(
        stem(job.targets.labels), job.source.info.shape_ZYX, job.dtype, job.pixel_nm,
        job.predictor.metadata.class_names, job.record(),
    )  # fmt: skip


def require_unchanged(job: Job) -> None:
    """Raises InputError, and forgets all blocks, when the input is not the one that was read."""
    try:
        job.originals.require_unchanged()
    except InputError:
        job.work.discard()
        raise


def _bands(job: Job, wait: Wait, check: Callable[[], object]) -> Iterator[np.ndarray]:
    """Labels as `write_tiff` takes them, read when their blocks are finished."""
    labels, first = job.output.labels, job.output.first
    assert labels is not None
    rows, height = rows_per_band(output_info(job)), job.source.info.shape_ZYX[1]
    for slab in z_slabs(job.output.grid):
        for block in slab:
            wait(first + block.index)
        for z in range(*slab[0].z):
            for top in range(0, height, rows):
                check()
                yield labels.arrays[0][z, top : top + rows]


def _counts(job: Job) -> np.ndarray:
    """Pixels of each class over all blocks of the output."""
    counts = np.zeros(job.predictor.classes, np.int64)
    for index in range(len(job.output.grid)):
        marker = job.work.marker(job.output.first + index, job.key)
        assert marker is not None, index
        counts += np.array(marker.counts, np.int64)
    return counts
