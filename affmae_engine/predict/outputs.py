"""Where predictions go, and what is checked before any work is done: names, overwriting, input safety, disk space."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from affmae_engine import atomic
from affmae_engine.errors import ConfigError, ResourceError, human_bytes
from affmae_engine.predict.volume import is_ours
from affmae_engine.predict.work import Work

if TYPE_CHECKING:
    from affmae_engine.predict.job import Job

TIFF_SUFFIXES = (".tif", ".tiff")
ZARR_SUFFIX = ".zarr"
OVERLAY_ENDING = "-overlay.png"
COMPRESSION = 8
"""Labels compress at least this well in practice; used to ask for disk space before starting."""
SLACK_BYTES = 1 << 24


@dataclass(frozen=True)
class Outputs:
    """The files of one prediction. Probabilities and overlay lie beside the labels and share their stem."""

    labels: Path
    with_probabilities: bool = False
    with_overlay: bool = True

    @property
    def probabilities(self) -> Path | None:
        """OME-Zarr of class probabilities, when wanted."""
        return self._beside("-probabilities.ome.zarr") if self.with_probabilities else None

    @property
    def overlay(self) -> Path | None:
        """Picture of a few sections with their labels, when wanted."""
        return self._beside(OVERLAY_ENDING) if self.with_overlay else None

    @property
    def is_zarr(self) -> bool:
        """Whether the labels are an OME-Zarr."""
        return self.labels.suffix.lower() == ZARR_SUFFIX

    @property
    def all(self) -> list[Path]:
        """Every path that will be written."""
        return [path for path in (self.labels, self.probabilities, self.overlay) if path is not None]

    def _beside(self, ending: str) -> Path:
        return self.labels.with_name(stem(self.labels) + ending)


def stem(path: Path) -> str:
    """A file's name without its extension; `.ome.tif` and `.ome.zarr` count as one."""
    base = path.stem if path.suffix else path.name
    return base[:-4] if base.lower().endswith(".ome") else base


def is_label_file(path: Path) -> bool:
    """Whether the name asks for a single output file (TIFF or Zarr) rather than a folder."""
    return path.suffix.lower() in (*TIFF_SUFFIXES, ZARR_SUFFIX)


def check(outputs: Outputs, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse what must not be written, before anything is computed.

    What lies beside the labels may be there while these are under way: it is published before them.

    Raises:
        ConfigError: an unknown extension, an output that is or touches an input, or one that exists.
        ResourceError: the folder cannot be written to.
    """
    if not is_label_file(outputs.labels):
        raise ConfigError(
            f"{outputs.labels}: labels are written as .tif, .tiff or .zarr (OME-Zarr)",
            "name the output with one of these extensions, or name a folder",
        )
    under_way = Work(outputs.labels).plan_file.exists()
    for path in outputs.all:
        _check_apart(path, inputs)
        if path.exists():
            _check_replaceable(path, overwrite or (under_way and path != outputs.labels))
    atomic.ensure_folder(outputs.labels.parent)


def sweep(outputs: Outputs) -> None:
    """Delete what a killed process left under hidden names; the caller holds the output's work folder."""
    for path in outputs.all:
        atomic.sweep(path.parent, path.name)


def needed_bytes(job: Job) -> int:
    """Disk that a prediction takes until it is complete, estimated: compressed labels, probabilities and copy of the
    image, with their pyramids."""
    pixels = math.prod(job.source.info.shape_ZYX)
    labels = pixels * job.dtype.itemsize // COMPRESSION
    needed = SLACK_BYTES + labels + (0 if job.targets.is_zarr else labels)  # a TIFF is written from blocks
    if job.targets.with_probabilities:
        needed += job.predictor.classes * pixels // 2
    if job.merge is not None:
        needed += len(job.passes) * job.predictor.classes * pixels // 2
    if job.output.image is not None:
        needed += pixels * job.source.info.dtype.itemsize * 4 // 3
    return needed


def check_space(job: Job) -> None:
    """Refuse to start when the disk can hardly hold the result.

    Raises:
        ResourceError: too little space is left; the message has both numbers.
    """
    folder, needed = job.targets.labels.parent, needed_bytes(job)
    free = shutil.disk_usage(folder).free
    if free < needed * (1 - len(job.finished(job.numbers)) / len(job.numbers)):
        extra = [", or leave out --probabilities"] * job.targets.with_probabilities
        extra += [", or use --no-image"] * (job.output.image is not None)
        raise ResourceError(
            f"{folder} has {human_bytes(free)} left and this prediction needs about {human_bytes(needed)}",
            f"free some space or choose another -o/--out{''.join(extra)}",
        )


def _check_apart(path: Path, inputs: Sequence[Path]) -> None:
    target = _real(path)
    for source in inputs:
        origin = _real(source)
        if target == origin or target in origin.parents:
            raise ConfigError(f"the output {path} would replace the input {source}", "choose another -o/--out")
        if origin in target.parents:
            raise ConfigError(f"the output {path} would lie inside the input {source}", "choose another -o/--out")


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike Path.resolve it does not raise for links in a circle


def _check_replaceable(path: Path, overwrite: bool) -> None:
    if not overwrite:
        raise ConfigError(f"{path} exists already", "replace it with --overwrite, or choose another -o/--out")
    if path.is_dir() != (path.suffix.lower() == ZARR_SUFFIX):
        kind = "folder" if path.is_dir() else "file"
        raise ConfigError(f"{path} exists and is a {kind}, which is not replaced", "choose another -o/--out")
    if path.is_dir() and not is_ours(path):
        raise ConfigError(
            f"{path} exists and was not written by affmae predict, so it is not replaced", "choose another -o/--out"
        )
