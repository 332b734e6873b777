"""Telling formats apart by their first bytes, and saying politely what is not supported."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Literal

from affmae_engine.data.readers.source import Refused, reading
from affmae_engine.data.readers.zarr_metadata import is_zarr
from affmae_engine.errors import InputError

SUPPORTED = (
    "TIFF (all kinds), PNG, JPEG, JPEG 2000, OME-Zarr and Zarr, MRC, HDF5 and EMD, N5, DM3 and DM4, NIfTI, NumPy, "
    "neuroglancer precomputed, and .gz or .bz2 of any file of these"
)

Kind = Literal[
    "tiff", "picture", "mrc", "npy", "nifti", "dm", "hdf5", "zarr", "n5", "precomputed", "remote", "packed"
]  # fmt: skip

_MAGIC: tuple[tuple[bytes, Kind], ...] = (
    (b"II*\x00", "tiff"), (b"MM\x00*", "tiff"), (b"II+\x00", "tiff"), (b"MM\x00+", "tiff"),
    (b"\x89PNG\r\n\x1a\n", "picture"), (b"\xff\xd8\xff", "picture"),
    (b"\xff\x4f\xff\x51", "picture"), (b"\x00\x00\x00\x0cjP  ", "picture"),
    (b"\x89HDF\r\n\x1a\n", "hdf5"), (b"\x93NUMPY", "npy"), (b"\x1f\x8b", "packed"), (b"BZh", "packed"),
)  # fmt: skip
_FOREIGN_MAGIC = {
    b"PK\x03\x04": "zip", b"%PDF": "PDF", b"GIF8": "GIF", b"BM": "BMP", b"RIFF": "WebP", b"NRRD": "NRRD",
}  # fmt: skip
_FOREIGN_NAMES = {
    ".npz": "NumPy archive", ".nrrd": "NRRD", ".czi": "Zeiss CZI", ".nd2": "Nikon ND2", ".lif": "Leica LIF",
    ".ser": "FEI SER", ".bmp": "BMP", ".gif": "GIF", ".webp": "WebP", ".raw": "raw (pixels without a header)",
}  # fmt: skip
_MRC_NAMES = (".mrc", ".map", ".rec", ".st", ".ali", ".mrcs", ".preali", ".ccp4")
NAMES = (
    ".tif", ".tiff", ".png", ".jpg", ".jpeg", ".jp2", ".j2k", ".zarr", *_MRC_NAMES, ".h5", ".hdf5", ".hdf", ".hf5",
    ".emd", ".n5", ".dm3", ".dm4", ".npy", ".nii", *_FOREIGN_NAMES,
)  # fmt: skip
PACKED = (".gz", ".bz2")
HEAD = 1024
"""Bytes from the start of a file that tell its format."""
_MRC_MODES = {0, 1, 2, 3, 4, 6, 12, 101}
_LFS = b"version https://git-lfs"


def recognise(path: Path) -> Kind:
    """The reader for a file, folder or URL, or for an array in one of them.

    Raises:
        InputError: no such file, empty, of an unsupported format, or an ordinary folder.
    """
    from affmae_engine.data.readers.files import is_remote, split_inner

    if is_remote(path):
        return "remote"
    path = split_inner(path)[0]
    with reading(path):
        if path.is_dir():
            return _folder(path)
        if not path.is_file():
            raise FileNotFoundError(path)
        with path.open("rb") as handle:
            head = handle.read(HEAD)
        if not head:
            raise Refused("it is empty", "copy it again from its origin")
        kind = sniff(head, path.name)
        if kind is None:
            raise _unsupported(head, path)
    return kind


def sniff(head: bytes, name: str = "") -> Kind | None:
    """The reader for content that starts with these bytes (`HEAD` of them); None when it is of no supported format.

    Args:
        name: of the file, which decides for MRC files that lack their stamp.
    """
    found = next((kind for magic, kind in _MAGIC if head.startswith(magic)), None)
    if found is not None:
        return found
    if head[:4] in (b"\0\0\0\3", b"\0\0\0\4") and len(head) > 16:
        return "dm"
    if head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0"):
        return "nifti"
    if head[208:212] in (b"MAP ", b"MAP\0") or (name.lower().endswith(_MRC_NAMES) and _is_old_mrc(head)):
        return "mrc"
    return None


def looks_like_image(path: Path) -> bool:
    """Whether a file found in a folder is meant to be an image: by its name, or by its content when that is telling.

    Text, tables and other sidecars are not; an image of an unsupported format is, so that it can be named.
    """
    name = path.name.lower()
    for ending in PACKED:
        name = name.removesuffix(ending)
    if name.endswith(NAMES):
        return True
    try:
        with path.open("rb") as handle:
            return sniff(handle.read(HEAD)) not in (None, "packed")
    except OSError:
        return False


def is_n5(folder: Path) -> bool:
    """Whether a folder is an N5 container or dataset."""
    head = _start(folder / "attributes.json")
    return b'"n5"' in head or b'"dataType"' in head


def is_precomputed(folder: Path) -> bool:
    """Whether a folder is a volume in neuroglancer's precomputed format."""
    head = _start(folder / "info")
    return b'"scales"' in head and b'"data_type"' in head


def _start(file: Path) -> bytes:
    if not file.is_file():
        return b""
    with file.open("rb") as handle:
        return handle.read(65536)


def _folder(path: Path) -> Kind:
    filled = any(path.iterdir())  # raises where it may not be listed
    if is_zarr(path) or (path.suffix == ".zarr" and filled):
        return "zarr"
    if is_n5(path):
        return "n5"
    if is_precomputed(path):
        return "precomputed"
    raise Refused("it is a folder without images", f"supported: {SUPPORTED}")


def _is_old_mrc(head: bytes) -> bool:
    """Whether this can be the header of an MRC file of before 2000, which has no stamp."""
    for order in "<>":
        if len(head) < 1024:
            return False
        *size, mode = struct.unpack(order + "4i", head[:16])
        axes = struct.unpack(order + "3i", head[64:76])
        if all(0 < n < 1 << 20 for n in size) and mode in _MRC_MODES and sorted(axes) in ([1, 2, 3], [0, 0, 0]):
            return True
    return False


def _unsupported(head: bytes, path: Path) -> Refused:
    if head.startswith(_LFS):
        return Refused("it is a pointer of Git LFS, not the file itself", "fetch it with: git lfs pull")
    named = next((name for magic, name in _FOREIGN_MAGIC.items() if head.startswith(magic)), "")
    named = named or _FOREIGN_NAMES.get(path.suffix.lower(), "")
    if named.startswith("raw"):
        hint = "open it in Fiji with its size and type, and save it as TIFF"
        return Refused("it has no header that says its size and type", hint)
    if named:
        return Refused(f"{named} files are not supported", f"supported: {SUPPORTED}")
    if head.lstrip()[:9].lower() in (b"<!doctype", b"<html>\n<h") or head.lstrip()[:5].lower() == b"<html":
        return Refused("it is a web page, perhaps of a download that failed", "download it again")
    return Refused("its content is of no image format known here", f"supported: {SUPPORTED}")


def missing(package: str, kind: str) -> InputError:
    """The error where an optional package is not installed."""
    return InputError(f"{kind} files need the package {package}", "install it with: pip install 'affmae[formats]'")
