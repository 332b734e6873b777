"""Prediction of one image or stack: read, tile, blend, label, write, all in one pass and in bounded memory.

The chain is pulled by the writer: it asks for label rows, which pull finished bands, which pull tiles, which pull
image rows. Only bands exist in between, so memory does not depend on the number of sections nor on their height.
Everything is written under hidden names; the final names appear when the last row is done. Finished rows are kept in a
journal (`journal.py`) on their way: the next call with the same image, weights and options goes on from them, and
ends with the same bytes.

Axes: C classes, R rows of a band, Z Y X volume.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from affmae_engine import atomic
from affmae_engine.class_colors import class_colours
from affmae_engine.data.readers import PixelSize, Source
from affmae_engine.data.readers.files import Original
from affmae_engine.data.readers.limits import memory_budget
from affmae_engine.data.readers.source import reading
from affmae_engine.data.statistics import Statistics, measure
from affmae_engine.errors import InputError, Interrupted, ResourceError, human_bytes
from affmae_engine.predict import outputs
from affmae_engine.predict.identity import fingerprint, made_from
from affmae_engine.predict.infer import Band, TileRunner, Tiling, blend, working_bytes
from affmae_engine.predict.journal import Journal, Rows
from affmae_engine.predict.label_rows import LabelRows, OutputInfo, label_dtype
from affmae_engine.predict.ome_zarr import ZarrRows, labels_attributes, probabilities_attributes
from affmae_engine.predict.outputs import Outputs
from affmae_engine.predict.overlay import OverlayPicture
from affmae_engine.predict.predictor import Predictor
from affmae_engine.predict.rescale import ResampledPlane, map_back
from affmae_engine.predict.scale import choose_scale
from affmae_engine.predict.sections import sections
from affmae_engine.predict.tiff_labels import write_tiff
from affmae_engine.predict.tiling import restart
from affmae_engine.runtime.signals import StopRequest


@dataclass(frozen=True)
class PredictOptions:
    """How to predict.

    tile: edge of a tile in pixels; None takes the training image's. overlap: share of a tile that its neighbour
    covers too. batch_size: tiles per forward pass. rescale: bring the input to the training pixel size for inference.
    pixel_nm: overrides what the input says; None along an axis keeps the input's value. overwrite: replace outputs.
    resume: outputs that are there are of this very prediction (see `identity.is_finished`) and may be completed.
    """

    tile: int | None = None
    overlap: float = 0.5
    batch_size: int = 4
    rescale: bool = False
    pixel_nm: PixelSize = (None, None, None)
    overwrite: bool = False
    resume: bool = False

    @property
    def replace(self) -> bool:
        """Whether what stands under an output's name may give way."""
        return self.overwrite or self.resume


@dataclass(frozen=True)
class PredictProgress:
    """How far one input is; tiles count over all its sections."""

    name: str
    sections_done: int
    sections: int
    tiles_done: int
    tiles: int


@dataclass(frozen=True)
class PredictReport:
    """What was made. class_fractions: share of the pixels by class name. megapixels_per_s: of the input."""

    source: Path
    series: str
    labels: Path
    format: str
    shape_ZYX: tuple[int, int, int]
    dtype: str
    pixel_nm: PixelSize
    class_fractions: dict[str, float]
    seconds: float
    megapixels_per_s: float
    tile: int
    rescaled_to: tuple[int, int] | None
    probabilities: Path | None = None
    overlay: Path | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass
class _Run:
    """What one prediction knows and counts on its way."""

    source: Source
    predictor: Predictor
    options: PredictOptions
    targets: Outputs
    journal: Journal
    statistics: Statistics
    stop: StopRequest
    on_progress: Callable[[PredictProgress], None]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    sections_done: int = 0
    tiles_done: int = 0
    counts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        with reading(self.source.info.path):
            self.original = Original(self.source.info.path)
        self.counts = np.zeros(self.predictor.classes, np.int64)
        self.tiling = Tiling(self.predictor.tile(self.options.tile), self.options.overlap)
        self.scale = choose_scale(
            self.source.info, self.options.pixel_nm, self.predictor.metadata.pixel_nm, rescale=self.options.rescale
        )
        self.notes += [*self.source.info.notes, *self.scale.notes]
        self.warnings += self.scale.warnings
        if self.statistics.blank:
            self.warnings.append(f"{self.source.info.name} is blank: there is nothing to see in it")
        self.picture = OverlayPicture(self.source.info.shape_ZYX) if self.targets.with_overlay else None
        depth = self.source.info.shape_ZYX[0]
        needed = working_bytes(self.predictor.classes, self.tiling.tile, self.scale.shape[1])
        if needed > memory_budget():
            raise ResourceError(
                f"{self.source.info.name} is {self.scale.shape[1]} pixels wide: a row of tiles takes "
                f"{human_bytes(needed)} of memory, {human_bytes(memory_budget())} may be used",
                "use a smaller --tile",
            )
        self.tiles = self.tiling.count(self.scale.shape) * depth
        if self.scale.resampled:  # mapping back needs a section from its first row on
            self.journal.keep_whole_sections()
        self.done = self.journal.position
        self.begin = depth, 0
        self.tiles_done = self.tiles
        if self.done[0] < depth:
            y, x = self.tiling.axes(self.scale.shape)
            columns = len(x.starts)
            self.begin = restart(y, columns, self.options.batch_size, self.done, whole=self.scale.resampled)
            self.tiles_done = (self.begin[0] * len(y.starts) + self.begin[1]) * columns
        if self.done != (0, 0):
            self.notes.append(f"went on from row {self.done[1]} of section {self.done[0]}, where it had ended before")

    def require_unchanged(self) -> None:
        """Raises InputError when the image is not the one that was opened, ResourceError when that cannot be asked."""
        path = self.source.info.path
        with reading(path):
            if self.original.changed():
                raise InputError(f"{path} changed while it was read", "predict it when it is complete")

    def tell(self) -> None:
        """Pass on how far it is."""
        info = self.source.info
        self.on_progress(PredictProgress(info.name, self.sections_done, info.shape_ZYX[0], self.tiles_done, self.tiles))


def predict(
    source: Source,
    predictor: Predictor,
    targets: Outputs,
    options: PredictOptions,
    *,
    on_progress: Callable[[PredictProgress], None] = lambda _: None,
    stop: StopRequest | None = None,
) -> PredictReport:
    """Segment every section of `source` and write the labels.

    Args:
        targets: what to write; checked here again, just before the work.
        on_progress: called after every batch of tiles.
        stop: read after every batch.

    Raises:
        InputError: the input is damaged, may not be read, or changed meanwhile (finished rows are lost then alone).
        ConfigError: an output exists, touches an input, or is half done by another prediction; or --rescale lacks a
            pixel size.
        ResourceError: disk or memory; or the input cannot be read just now.
        BusyError: another process writes this output.
        Interrupted: stopped on request; finished rows are kept for the next call.
    """
    outputs.check(targets, [source.info.path, predictor.weights], overwrite=options.replace)
    started = time.perf_counter()
    info = source.info
    dtype = label_dtype(predictor.classes)
    pixels = int(np.prod(info.shape_ZYX, dtype=np.int64))
    outputs.check_space(targets, pixels * dtype.itemsize, predictor.classes, pixels)
    origin = made_from(source, predictor, targets, options)
    journal = Journal(
        targets.labels, origin, shape_ZYX=info.shape_ZYX, dtype=dtype, overwrite=options.overwrite,
        classes=predictor.classes if targets.with_probabilities else 0,
    )  # fmt: skip
    with journal:
        outputs.sweep(targets)
        run = _Run(source, predictor, options, targets, journal, measure(source), stop or StopRequest(), on_progress)
        about = OutputInfo(
            outputs.stem(targets.labels), info.shape_ZYX, dtype, run.scale.pixel_nm, predictor.metadata.class_names,
            {"source": info.path.name, "series": info.series, **predictor.describe(),
             "fingerprint": fingerprint(origin)},
        )  # fmt: skip
        try:
            dialect = _write(run, about)
        except InputError:
            with suppress(OSError):  # cannot be asked just now: nothing says that it changed
                if run.original.changed():  # rows of two images do not go together
                    journal.discard()
            raise
        run.tell()
        if run.picture is not None and targets.overlay is not None:
            run.warnings += run.picture.attempt(targets.overlay, source, run.statistics, about.class_names)
        journal.discard()
    return _report(run, about, dialect, time.perf_counter() - started)


def _report(run: _Run, about: OutputInfo, dialect: str, seconds: float) -> PredictReport:
    info, targets = run.source.info, run.targets
    pixels = int(np.prod(info.shape_ZYX, dtype=np.int64))
    return PredictReport(
        source=info.path,
        series=info.series,
        labels=targets.labels,
        format=dialect,
        shape_ZYX=info.shape_ZYX,
        dtype=str(about.dtype),
        pixel_nm=about.pixel_nm,
        class_fractions=dict(zip(about.class_names, (run.counts / pixels).tolist(), strict=True)),
        seconds=seconds,
        megapixels_per_s=pixels / 1e6 / seconds,
        tile=run.tiling.tile,
        rescaled_to=run.scale.shape if run.scale.resampled else None,
        probabilities=targets.probabilities,
        overlay=run.picture.path if run.picture is not None else None,
        notes=tuple(run.notes),
        warnings=tuple(run.warnings),
    )


def _write(run: _Run, about: OutputInfo) -> str:
    """Write labels, and probabilities where wanted; both appear when complete, the labels last."""
    names, record = about.class_names, about.record()
    replace = run.options.replace

    def rows(probabilities: ZarrRows | None) -> Iterator[LabelRows]:
        return _label_rows(run, about.dtype, probabilities)

    def probability_rows(stack: ExitStack) -> ZarrRows | None:
        if run.targets.probabilities is None:
            return None
        folder = stack.enter_context(atomic.committed_folder(run.targets.probabilities, replace=replace))
        attributes = probabilities_attributes(about.name, about.pixel_nm, names, record)
        return ZarrRows(
            folder, shape_ZYX=about.shape_ZYX, dtype=np.dtype("u1"), lead=(len(names),), attributes=attributes,
            dimension_names=("c", "z", "y", "x"),
        )  # fmt: skip

    if run.targets.is_zarr:
        attributes = labels_attributes(about.name, about.pixel_nm, names, class_colours(len(names)), record)
        with atomic.committed_folder(run.targets.labels, replace=replace) as folder, ExitStack() as stack:
            writer = ZarrRows(
                folder, shape_ZYX=about.shape_ZYX, dtype=about.dtype, attributes=attributes,
                dimension_names=("z", "y", "x"),
            )  # fmt: skip
            for piece in rows(probability_rows(stack)):
                writer.add(piece.z, piece.first_row, piece.labels_RX)
            run.require_unchanged()
        return "OME-Zarr 0.5"

    dialects: list[str] = []

    def write(partial: Path) -> None:
        with ExitStack() as stack:
            dialects.append(write_tiff(partial, about, rows(probability_rows(stack))))
            run.require_unchanged()

    atomic.commit_file(run.targets.labels, write)
    return dialects[0]


def _bands(run: _Run) -> Iterator[Band]:
    """Finished probabilities on the input's own grid that are not in the journal yet."""
    intensity = run.predictor.normalisation.for_image(run.statistics)
    runner = TileRunner(
        run.predictor.model,
        classes=run.predictor.classes,
        batch_size=run.options.batch_size,
        device=run.predictor.choice.device,
        autocast=run.predictor.choice.dtype if run.predictor.choice.precision != "fp32" else None,
        excluded=run.predictor.excluded,
        on_smaller_batch=lambda size: run.warnings.append(f"out of device memory: went on with {size} tiles at a time"),
    )

    def after_batch(count: int) -> None:
        run.tiles_done += count
        run.tell()
        if run.stop.requested:
            done = f"{run.tiles_done} of {run.tiles} tiles"
            raise Interrupted(
                f"prediction of {run.source.info.name} was stopped at {done}; no output was written yet",
                "run the same command again to go on from there",
                signal_number=run.stop.signal_number or 2,
            )

    planes: Iterable = sections(run.source, intensity.standardise, run.begin[0])
    inner, outer = run.scale.shape, run.source.info.shape_ZYX[1:]
    if run.scale.resampled:
        planes = (ResampledPlane(plane, inner) for plane in planes)
    bands = blend(planes, runner, run.tiling, prepare=intensity.equalise, on_tiles=after_batch, start=run.begin)
    bands = map_back(bands, inner, outer) if run.scale.resampled else bands
    return (band for band in bands if (band.plane, band.first_row) >= run.done)


def _label_rows(run: _Run, dtype: np.dtype, probabilities: ZarrRows | None) -> Iterator[LabelRows]:
    """Labels, kept ones first; counts classes, feeds the picture and the probabilities as they pass."""
    height = run.source.info.shape_ZYX[1]
    for rows in chain(run.journal.pieces(), _new_rows(run, dtype)):
        piece = LabelRows(rows.z, rows.first_row, rows.labels_RX)
        run.counts += np.bincount(piece.labels_RX.ravel(), minlength=len(run.counts))
        if run.picture is not None:
            run.picture.add(piece)
        if probabilities is not None and rows.probabilities_CRX is not None:
            probabilities.add(rows.z, rows.first_row, rows.probabilities_CRX)
        if rows.first_row + len(rows.labels_RX) == height:
            run.sections_done = rows.z + 1
        yield piece


def _new_rows(run: _Run, dtype: np.dtype) -> Iterator[Rows]:
    """What is computed now, in the journal before it is passed on."""
    for band in _bands(run):
        values_CRX = band.probabilities_CRX
        scores = None
        if run.targets.with_probabilities:
            scores = (values_CRX * 255).round().clamp(0, 255).byte().cpu().numpy()
        rows = Rows(band.plane, band.first_row, values_CRX.argmax(dim=0).cpu().numpy().astype(dtype), scores)
        run.journal.append(rows)
        yield rows
