"""Files compressed with gzip or bzip2: unpacked once into a temporary file, which is removed when the process ends.

Such a file has no random access, and most readers need one. Decompression runs in pieces of bounded size and is
checked against the format's checksum; how far a file may inflate is limited as for compressed images (`limits.py`).
The folder for temporary files is the system's; `TMPDIR` names another one where that is small.
"""

from __future__ import annotations

import atexit
import bz2
import gzip
import os
import shutil
import tempfile
import threading
from pathlib import Path

from affmae_engine.data.readers.limits import refuse_inflated
from affmae_engine.data.readers.source import Refused, reading
from affmae_engine.errors import ResourceError, human_bytes

_PIECE = 4 << 20
_SPARE = 256 << 20  # that stays free on the disk

_UNPACKED: dict[tuple[str, int, int], Path] = {}
_LOCK = threading.Lock()


def unpacked(path: Path) -> Path:
    """The temporary file with the content of a .gz or .bz2 file; the same one as long as the file is the same.

    Raises:
        InputError: the file is damaged, inflates too far, or is packed twice.
        ResourceError: the temporary folder is full.
    """
    with reading(path), _LOCK:
        status = path.stat()
        key = (os.path.realpath(path), status.st_size, status.st_mtime_ns)
        if key not in _UNPACKED:
            _UNPACKED[key] = _unpack(path, status.st_size)
        return _UNPACKED[key]


def _unpack(path: Path, size: int) -> Path:
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    folder = Path(tempfile.mkdtemp(prefix="affmae-"))
    atexit.register(_remove, folder, os.getpid())
    inner = folder / (Path(path.name).stem or "unpacked")
    written = 0
    try:
        with gzip.open(path) if is_gzip else bz2.open(path) as source, inner.open("xb") as target:
            while piece := source.read(_PIECE):
                if written == 0 and piece[:2] in (b"\x1f\x8b", b"BZ"):
                    raise Refused("it is packed twice", "unpack it once")
                written += len(piece)
                refuse_inflated(written, size, compressed=True)
                free = shutil.disk_usage(folder).free
                if free < _SPARE + len(piece):
                    raise ResourceError(
                        f"cannot unpack {path}: {human_bytes(free)} are free in {folder.parent}",
                        "name a folder with more space in the environment variable TMPDIR",
                    )
                target.write(piece)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, EOFError):
            raise Refused("it is cut short", "copy it again from its origin") from error
        raise
    return inner


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked process
        shutil.rmtree(folder, ignore_errors=True)
