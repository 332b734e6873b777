"""Whether outputs that are there already are those of a prediction, and what opens them.

Outputs carry a hash over everything that they were made from, so that a finished one is known again when the same
command is given a second time.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from tifffile import TiffFile

from affmae_engine.data.readers import Source, open_sources
from affmae_engine.data.readers.formats import sniff
from affmae_engine.data.readers.source import Refused, reading
from affmae_engine.data.readers.tiff import logged_errors_fail
from affmae_engine.data.statistics import measure
from affmae_engine.errors import ConfigError, InputError
from affmae_engine.predict.job import PredictOptions, made_from_of
from affmae_engine.predict.outputs import OVERLAY_ENDING, TIFF_SUFFIXES, ZARR_SUFFIX, Outputs
from affmae_engine.predict.overlay import OverlayPicture
from affmae_engine.predict.predictor import Predictor
from affmae_engine.predict.sources import identity_of
from affmae_engine.predict.volume import fingerprint_of, labels_group
from affmae_engine.predict.work import Work, digest

# In JSON, in JSON inside XML attributes, or in XML text.
_IN_TEXT = re.compile(r"fingerprint(?:\"|&quot;|\\\"): (?:\"|&quot;|\\\")([0-9a-f]{64})")


def is_finished(source: Source, predictor: Predictor, targets: Outputs, options: PredictOptions) -> bool:
    """Whether the output of this very prediction is there: labels appear last, and only when they are complete.

    A picture that is missing then is drawn, and what a call that was killed after its last step left is removed.

    Raises:
        ConfigError: the labels there were made by another prediction, or by something else, or are damaged.
        InputError: the image is gone.
    """
    if not targets.labels.exists():
        return False
    wanted = digest(made_from_of(identity_of(source), source, predictor, targets, options))
    try:
        recorded = recorded_fingerprint(targets.labels)
    except InputError as error:
        raise ConfigError(
            f"there is an output already that cannot be used: {error.message}",
            "replace it with --overwrite, or choose another -o/--out",
        ) from error
    if recorded is None:
        raise ConfigError(f"{targets.labels} exists already", "replace it with --overwrite, or choose another -o/--out")
    if recorded != wanted:
        raise ConfigError(
            f"{targets.labels} exists and was made with another model, image or options",
            "replace it with --overwrite, or choose another -o/--out",
        )
    if targets.probabilities is not None and not targets.probabilities.exists():
        return False
    Work(targets.labels).discard()
    if targets.overlay is not None and not targets.overlay.exists():
        picture = OverlayPicture(source.info.shape_ZYX)
        with open_labels(targets.labels) as labels:
            picture.gather_from(labels)
        picture.attempt(targets.overlay, source, measure(source), predictor.metadata.class_names)
    return True


def open_labels(path: Path) -> Source:
    """The labels that a prediction wrote, of this version or of an earlier one.

    Raises:
        InputError: they cannot be read.
    """
    return open_sources(labels_group(path) if path.is_dir() else path, labels=True)[0]


def is_result(file: Path) -> bool:
    """Whether `affmae predict` wrote this: labels, probabilities, or a picture that lies beside its labels."""
    candidates = [file]
    if file.name.endswith(OVERLAY_ENDING):
        stem = file.name.removesuffix(OVERLAY_ENDING)
        endings = (inner + suffix for suffix in (*TIFF_SUFFIXES, ZARR_SUFFIX) for inner in ("", ".ome"))
        candidates = [file.with_name(stem + ending) for ending in endings]
    for candidate in candidates:
        with contextlib.suppress(InputError):  # what cannot be read is for whoever reads it as an image to report
            if recorded_fingerprint(candidate) is not None:
                return True
    return False


def recorded_fingerprint(labels: Path) -> str | None:
    """The fingerprint that a label file carries; None where something else wrote what stands there.

    Raises:
        InputError: a file that is empty, or a TIFF that cannot be read: nobody knows what wrote it.
    """
    if labels.is_dir():
        return fingerprint_of(labels)
    if not labels.is_file():
        return None
    with reading(labels):
        with labels.open("rb") as handle:
            head = handle.read(16)
        if not head:
            raise Refused("it is empty")
        if sniff(head) != "tiff":
            return None
        with logged_errors_fail(), TiffFile(labels) as file:
            text = str((file.imagej_metadata or {}).get("Info", "")) or file.ome_metadata or ""
    match = _IN_TEXT.search(text)
    return match[1] if match else None
