"""Readers of image files: one per format behind the contract in `source.py`.

`find_files` turns what a user typed into files, `open_sources` turns a file into lazily read images. Which reader is
responsible is decided by content, never by the file's name alone. Adding a format means a module with an
`open_...(path, channel=, labels=)` function, and a line in `formats.py`.
"""

from __future__ import annotations

from pathlib import Path

from affmae_engine.data.readers.files import find_files
from affmae_engine.data.readers.formats import SUPPORTED, recognise
from affmae_engine.data.readers.source import PixelSize, Source, SourceInfo
from affmae_engine.errors import InputError

__all__ = [
    "SUPPORTED",
    "PixelSize",
    "Source",
    "SourceInfo",
    "find_files",
    "open_sources",
    "scan_sources",
]


def open_sources(path: Path, *, channel: int | None = None, labels: bool = False) -> list[Source]:
    """Every image or stack in a file or Zarr folder, read lazily.

    Args:
        path: one file, or the root folder of a Zarr hierarchy.
        channel: which channel of multi-channel images; None takes the first and turns colour into luminance.
        labels: read as label maps: numbers are kept as they are (see `grey.py`).

    Raises:
        InputError: nothing in it can be read; the message names the file and the reason.
    """
    return scan_sources(path, channel=channel, labels=labels)[0]


def scan_sources(
    path: Path, *, channel: int | None = None, labels: bool = False
) -> tuple[list[Source], list[InputError]]:
    """Like `open_sources`, and also why some of the images in a file that holds several were refused.

    Raises:
        InputError: nothing in it can be read.
    """
    kind = recognise(path)
    if kind == "tiff":
        from affmae_engine.data.readers.tiff import open_tiff

        return open_tiff(path, channel=channel, labels=labels), []
    if kind == "picture":
        from affmae_engine.data.readers.picture import open_picture

        return open_picture(path, channel=channel, labels=labels), []
    from affmae_engine.data.readers.zarr_array import open_zarr

    return open_zarr(path, channel=channel, labels=labels)
