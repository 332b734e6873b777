"""Telling formats apart by their first bytes, and saying politely what is not supported."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from affmae_engine.data.readers.source import reading
from affmae_engine.data.readers.zarr_metadata import is_zarr
from affmae_engine.errors import InputError

SUPPORTED = "TIFF (all kinds), PNG, JPEG, JPEG 2000, OME-Zarr and Zarr"

Kind = Literal["tiff", "picture", "zarr"]

_MAGIC: tuple[tuple[bytes, Kind], ...] = (
    (b"II*\x00", "tiff"), (b"MM\x00*", "tiff"), (b"II+\x00", "tiff"), (b"MM\x00+", "tiff"),
    (b"\x89PNG\r\n\x1a\n", "picture"), (b"\xff\xd8\xff", "picture"),
    (b"\xff\x4f\xff\x51", "picture"), (b"\x00\x00\x00\x0cjP  ", "picture"),
)  # fmt: skip
_FOREIGN_MAGIC = {
    b"\x89HDF": "HDF5", b"\x93NUMPY": "NumPy", b"PK\x03\x04": "zip", b"\x1f\x8b": "gzip",
    b"BZh": "bzip2", b"\x00\x00\x00\x03\x00\x00\x00\x00": "Gatan DM3", b"%PDF": "PDF",
    b"GIF8": "GIF", b"BM": "BMP",
}  # fmt: skip
_FOREIGN_NAMES = {
    ".mrc": "MRC", ".map": "MRC", ".rec": "MRC", ".st": "MRC", ".ali": "MRC", ".mrcs": "MRC",
    ".h5": "HDF5", ".hdf5": "HDF5", ".hdf": "HDF5", ".emd": "HDF5", ".n5": "N5",
    ".dm3": "Gatan DM3", ".dm4": "Gatan DM4", ".npy": "NumPy", ".npz": "NumPy", ".nii": "NIfTI",
    ".nrrd": "NRRD", ".czi": "Zeiss CZI", ".nd2": "Nikon ND2", ".lif": "Leica LIF", ".ser": "FEI SER",
    ".jp2": "JPEG 2000", ".bmp": "BMP", ".gif": "GIF", ".webp": "WebP",
}  # fmt: skip
_IMAGE_NAMES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".jp2", ".j2k", ".zarr", *_FOREIGN_NAMES)


def recognise(path: Path) -> Kind:
    """The reader for a file or folder.

    Raises:
        InputError: no such file, empty, of an unsupported format, or an ordinary folder.
    """
    with reading(path):
        if path.is_dir():
            filled = any(path.iterdir())  # raises where it may not be listed
            if is_zarr(path) or (path.suffix == ".zarr" and filled):
                return "zarr"
            if is_n5(path):
                raise _unsupported(path, "N5")
            raise InputError(f"cannot read {path}: it is a folder without images", f"supported: {SUPPORTED}")
        if not path.is_file():
            raise FileNotFoundError(path)
        with path.open("rb") as handle:
            head = handle.read(512)
    if not head:
        raise InputError(f"cannot read {path}: it is empty", "copy it again from its origin")
    kind = sniff(head)
    if kind is None:
        raise _unsupported(path, _foreign(head, path))
    return kind


def sniff(head: bytes) -> Kind | None:
    """The reader for content that starts with these bytes; None when it is of no supported format."""
    return next((kind for magic, kind in _MAGIC if head.startswith(magic)), None)


def looks_like_image(path: Path) -> bool:
    """Whether a file found in a folder is meant to be an image: by its name, or by its content when that is telling.

    Text, tables and other sidecars are not; an image of an unsupported format is, so that it can be named.
    """
    if path.name.lower().endswith(_IMAGE_NAMES):
        return True
    try:
        with path.open("rb") as handle:
            return sniff(handle.read(16)) is not None
    except OSError:
        return False


def is_n5(folder: Path) -> bool:
    """Whether a folder is an N5 container or dataset."""
    attributes = folder / "attributes.json"
    if not attributes.is_file():
        return False
    with attributes.open("rb") as handle:
        head = handle.read(65536)
    return b'"n5"' in head or b'"dataType"' in head


def _foreign(head: bytes, path: Path) -> str:
    if head[208:212] == b"MAP ":
        return "MRC"
    named = next((name for magic, name in _FOREIGN_MAGIC.items() if head.startswith(magic)), "")
    return named or _FOREIGN_NAMES.get(path.suffix.lower(), "")


def _unsupported(path: Path, name: str) -> InputError:
    if name:
        return InputError(f"cannot read {path}: {name} files are not supported yet", f"supported: {SUPPORTED}")
    return InputError(f"cannot read {path}: its content is of no image format known here", f"supported: {SUPPORTED}")
