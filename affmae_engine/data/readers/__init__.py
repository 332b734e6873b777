"""Readers of image files: one per format behind the contract in `source.py`.

`find_files` turns what a user typed into files, `open_sources` turns a file into lazily read images. Which reader is
responsible is decided by content, never by the file's name alone. Most formats hold an array: their readers describe
it as an `arrays.Array`, and `arrays.py` makes the sections. Adding a format means a module with a function
`open_NAME(path, options)` and a line in `formats.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from affmae_engine.data.readers.arrays import short_name
from affmae_engine.data.readers.files import as_path, find_files
from affmae_engine.data.readers.formats import SUPPORTED, Kind, recognise
from affmae_engine.data.readers.packed import unpacked
from affmae_engine.data.readers.sandbox import Isolated, scan_isolated
from affmae_engine.data.readers.source import Found, PixelSize, ReadOptions, Source, SourceInfo
from affmae_engine.errors import InputError

__all__ = [
    "SUPPORTED",
    "PixelSize",
    "ReadOptions",
    "Source",
    "SourceInfo",
    "find_files",
    "open_sources",
    "scan_sources",
]

_IN_A_CHILD: frozenset[Kind] = frozenset({"hdf5", "zarr", "n5", "precomputed", "remote"})
"""Formats that are even opened in a child process: their libraries are not safe by construction."""


def open_sources(path: Path, *, channel: int | None = None, labels: bool = False, axes: str = "") -> list[Source]:
    """Every image or stack in a file, folder or URL, read lazily.

    Args:
        path: one file, the root folder of a hierarchy, a URL (see `files.as_path`), or one array in any of them as
            `FILE:/PATH/INSIDE`.
        channel, labels, axes: see `source.ReadOptions`; where they say nothing, `source.reading_as` does.

    Raises:
        InputError: nothing in it can be read; the message names the file and the reason.
    """
    return scan_sources(path, channel=channel, labels=labels, axes=axes)[0]


def scan_sources(path: Path, *, channel: int | None = None, labels: bool = False, axes: str = "") -> Found:
    """Like `open_sources`, and also why some of the images in a file that holds several were refused.

    Raises:
        InputError: nothing in it can be read.
    """
    path, options = as_path(path), ReadOptions.with_defaults(channel, labels, axes)
    kind = recognise(path)
    if kind == "packed":
        return _scan_packed(path, options)
    if kind in _IN_A_CHILD:
        return scan_isolated(path, options)
    sources, refused = scan_here(path, options)
    isolated = [
        Isolated(s.info, index, options, path, piece_bytes=s.piece_bytes, parallel=s.parallel) if s.isolated else s
        for index, s in enumerate(sources)
    ]
    return isolated, refused


def scan_here(path: Path, options: ReadOptions) -> Found:
    """What `scan_sources` finds, decoded in this process whatever the format: for the child process of the sandbox.

    Raises:
        InputError: nothing in it can be read.
    """
    match recognise(path):  # the libraries of a format are imported when a file has it
        case "tiff":
            from affmae_engine.data.readers.tiff import open_tiff

            return open_tiff(path, options)
        case "picture":
            from affmae_engine.data.readers.picture import open_picture

            return open_picture(path, options)
        case "mrc":
            from affmae_engine.data.readers.mrc import open_mrc

            return open_mrc(path, options)
        case "npy":
            from affmae_engine.data.readers.npy import open_npy

            return open_npy(path, options)
        case "nifti":
            from affmae_engine.data.readers.nifti import open_nifti

            return open_nifti(path, options)
        case "dm":
            from affmae_engine.data.readers.dm import open_dm

            return open_dm(path, options)
        case "hdf5":
            from affmae_engine.data.readers.hdf5 import open_hdf5

            return open_hdf5(path, options)
        case "n5":
            from affmae_engine.data.readers.n5 import open_n5

            return open_n5(path, options)
        case "precomputed":
            from affmae_engine.data.readers.precomputed import open_precomputed

            return open_precomputed(path, options)
        case "remote":
            from affmae_engine.data.readers.remote import open_remote

            return open_remote(path, options)
        case "zarr":
            from affmae_engine.data.readers.zarr_array import open_zarr

            return open_zarr(path, options)
        case "packed":
            return _scan_packed(path, options)


def _scan_packed(path: Path, options: ReadOptions) -> Found:
    """The images in a compressed file, which is unpacked to a temporary one."""
    inner = unpacked(path)
    try:
        sources, refused = scan_sources(inner, channel=options.channel, labels=options.labels, axes=options.axes)
    except InputError as error:
        raise InputError(error.message.replace(str(inner), str(path)), error.hint) from error
    for source in sources:
        facts = source.info
        name = facts.name.replace(short_name(inner), short_name(path), 1)
        source.info = replace(facts, path=path, name=name, format=f"{facts.format}, {path.suffix.lstrip('.')}")
    return sources, [InputError(e.message.replace(str(inner), str(path)), e.hint) for e in refused]
