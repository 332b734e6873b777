"""From what the user named to the image files in it, without what only looks like images in a lab's folder.

Left out, unless the user takes everything: predictions, overlays and previews (told by a word in the name), label maps
(told by a word in the name beside an image of the same name, or by the folder), run folders, and datasets. Label maps
that no name tells are told by their pixels: `looks_like_labels`. A file that is the only source is never left out.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affmae_engine.data.names import folder_role, parse, without_padding
from affmae_engine.data.readers import find_files
from affmae_engine.data.store_layout import StorePaths

_LOOKED_AT = 512  # edge of the middle of a section that is looked at
_FEWEST_PIXELS = 64 * 64
_FLAT = 0.8
_MOST_CLASSES = 64


@dataclass(frozen=True)
class LeftOut:
    """A file that is no image. what: in words, such as `label map` or `run folder`."""

    path: Path
    what: str


@dataclass(frozen=True)
class Found:
    """Image files in natural order, and what was left out. questioned: their pixels are to be looked at as well."""

    files: list[Path]
    left_out: list[LeftOut]
    questioned: bool = True


def find_images(sources: Sequence[str | Path], *, take_all: bool = False, inside: Path | None = None) -> Found:
    """Search files, folders and patterns (see `readers.find_files`) for images.

    Args:
        take_all: leave nothing out.
        inside: a dataset that is being written; it and what lies in it are passed over without a word.

    Raises:
        InputError: a source does not exist, or there is no file of an image format at all.
    """
    files = [path for path in find_files(sources) if inside is None or not _within(path, inside)]
    if take_all or (len(sources) == 1 and files == [Path(sources[0]).expanduser()]):
        return Found(files, [], questioned=False)
    recognizer = _Recognizer(files)
    left_out = {item.path: item for path in files if (item := recognizer.look(path)) is not None}
    chosen = [path for path in files if path not in left_out and not any(p in left_out for p in path.parents)]
    return Found(chosen, list(left_out.values()))


def looks_like_labels(section_YX: NDArray[Any]) -> bool:
    """Whether a section holds label numbers rather than gray values: flat regions, and few values or objects.

    Args:
        section_YX: gray values [Y, X]; integers, for floats are no labels. Its middle is looked at.
    """
    height, width = section_YX.shape
    top, left = max(0, (height - _LOOKED_AT) // 2), max(0, (width - _LOOKED_AT) // 2)
    middle_YX = section_YX[top : top + _LOOKED_AT, left : left + _LOOKED_AT]
    if middle_YX.dtype.kind not in "bu" or middle_YX.size < _FEWEST_PIXELS:
        return False
    values, counts = np.unique(middle_YX, return_counts=True)
    if len(values) < 2:
        return False
    left_YX, right_YX = middle_YX[:, :-1], middle_YX[:, 1:]
    equal_YX = left_YX == right_YX
    if len(values) > _MOST_CLASSES:  # objects: flat even outside of the most frequent value, which may be padding
        common = values[counts.argmax()]
        equal_YX = equal_YX[(left_YX != common) | (right_YX != common)]
    return bool(equal_YX.mean() >= _FLAT)


def kind_of_array(series: str) -> str:
    """What an array inside a Zarr or HDF5 file is besides an image, by its path (`volumes/labels/clefts` is a label
    map); "" for an image."""
    return next((role for part in series.split("/") if (role := folder_role(part))), "")


def summary(left_out: Iterable[LeftOut]) -> str:
    """`3 label maps, 1 run folder (a_mask.tif, b_mask.tif, ...)`; "" for nothing."""
    items = list(left_out)
    counts = Counter(item.what for item in items)
    kinds = ", ".join(f"{count} {what}{'s' if count > 1 else ''}" for what, count in counts.items())
    names = ", ".join(item.path.name for item in items[:3]) + (", ..." if len(items) > 3 else "")
    return f"{kinds} ({names})" if items else ""


class _Recognizer:
    """Tells by names and folders what is no image.

    Args:
        files: all that were found: what is a label map depends on the images beside it.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        images = [path for path in files if not parse(path).role]
        self._beside = {(path.parent, _key(path)) for path in images}
        self._elsewhere = {_key(path) for path in images if not folder_role(path.parent.name)}
        self._is_run: dict[Path, bool] = {}

    def look(self, path: Path) -> LeftOut | None:
        """What a file is besides an image; None for an image."""
        for parent in reversed(path.parents):
            if self._run(parent):
                return LeftOut(parent, "run folder")
        if StorePaths(path).ledger.is_file():
            return LeftOut(path, "dataset")
        if path.is_dir() and _is_prediction(path):
            return LeftOut(path, "prediction")
        role, folder = parse(path).role, folder_role(path.parent.name)
        if role not in ("", "label map"):
            return LeftOut(path, role)
        if (role and (path.parent, _key(path)) in self._beside) or (folder and _key(path) in self._elsewhere):
            return LeftOut(path, role or folder)
        return None

    def _run(self, folder: Path) -> bool:
        if folder not in self._is_run:
            self._is_run[folder] = all((folder / name).is_file() for name in ("config.toml", "environment.json"))
        return self._is_run[folder]


def _is_prediction(folder: Path) -> bool:
    """Whether `affmae predict` wrote a Zarr folder."""
    try:
        return b'"affmae_prediction"' in (folder / "zarr.json").read_bytes()
    except OSError:
        return False


def _key(path: Path) -> str:
    return without_padding(parse(path).bare)


def _within(path: Path, folder: Path) -> bool:
    real, outer = os.path.realpath(path), os.path.realpath(folder)
    return real == outer or real.startswith(outer + os.sep)
