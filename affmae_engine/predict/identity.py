"""What the bytes of a prediction depend on, and whether outputs that are there already are those of a prediction.

Outputs carry a hash over it, so that a finished one is known again when a folder is predicted a second time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tifffile import TiffFile

from affmae_engine.data.readers import Source
from affmae_engine.data.readers.files import size_and_mtime
from affmae_engine.data.readers.formats import sniff
from affmae_engine.data.readers.source import Refused, reading
from affmae_engine.data.readers.tiff import logged_errors_fail
from affmae_engine.errors import ConfigError, InputError
from affmae_engine.predict import journal
from affmae_engine.predict.ome_zarr import ATTRIBUTE
from affmae_engine.predict.outputs import OVERLAY_ENDING, TIFF_SUFFIXES, ZARR_SUFFIX, Outputs
from affmae_engine.predict.predictor import Predictor

if TYPE_CHECKING:
    from affmae_engine.predict.stream import PredictOptions

# In JSON, in JSON inside XML attributes, or in XML text.
_IN_TEXT = re.compile(r"fingerprint(?:\"|&quot;|\\\"): (?:\"|&quot;|\\\")([0-9a-f]{64})")


def made_from(source: Source, predictor: Predictor, targets: Outputs, options: PredictOptions) -> dict[str, Any]:
    """Everything that the bytes of a prediction depend on, as plain JSON values.

    Raises:
        InputError: the image is gone.
    """
    info = source.info
    with reading(info.path):
        size, mtime = size_and_mtime(info.path)
    return {
        "weights": predictor.weights_sha256,
        "image": [info.path.name, info.series, size, mtime, *info.shape_ZYX],
        "tile": predictor.tile(options.tile),
        "overlap": options.overlap,
        "batch": options.batch_size,
        "rescaling": options.rescale,
        "pixel_size": list(options.pixel_nm),
        "probabilities": targets.with_probabilities,
        "device": [predictor.choice.device.type, predictor.choice.precision],
    }


def fingerprint(made_from: Mapping[str, Any]) -> str:
    """SHA-256 of what a prediction depends on; outputs carry it, so that a finished one is known again."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def is_finished(source: Source, predictor: Predictor, targets: Outputs, options: PredictOptions) -> bool:
    """Whether every output of this very prediction is there; False as well when there are none or only some.

    Raises:
        ConfigError: the labels there were made by another prediction, or by something else, or are damaged.
        InputError: the image is gone.
    """
    if not targets.labels.exists():
        return False
    wanted = fingerprint(made_from(source, predictor, targets, options))
    try:
        recorded = recorded_fingerprint(targets.labels)
    except InputError as error:
        raise ConfigError(
            f"there is an output already that cannot be used: {error.message}",
            "replace it with --overwrite, or choose another -o/--out",
        ) from error
    if recorded != wanted:
        raise ConfigError(
            f"{targets.labels} exists and was made with another model, image or options",
            "replace it with --overwrite, or choose another -o/--out",
        )
    return all(path.exists() for path in targets.all) and not journal.folder_of(targets.labels).exists()


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
        try:
            attributes = json.loads((labels / "zarr.json").read_text("utf-8"))["attributes"]
            found = attributes[ATTRIBUTE].get("fingerprint")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return found if isinstance(found, str) else None
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
