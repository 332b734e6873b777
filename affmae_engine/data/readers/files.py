"""From what a user typed (files, folders, patterns, URLs) to the list of files to read, in natural order."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path, PosixPath

from affmae_engine.data.readers.formats import SUPPORTED, is_n5, is_precomputed, looks_like_image
from affmae_engine.data.readers.zarr_metadata import is_zarr
from affmae_engine.errors import InputError

_URL = re.compile(r"(?:(?:precomputed|n5|zarr):/+)?(https?|s3|gs):/+(?=[^/])")


class RemotePath(PosixPath):
    """A URL of an array or hierarchy (https, s3, gs) where the others have paths. Nothing is asked of the network."""

    def __str__(self) -> str:
        return _URL.sub(r"\1://", super().__str__(), count=1)


def as_path(named: str | Path) -> Path:
    """What a user named as a path; URLs, even those whose slashes a `Path` has lost, become a `RemotePath`.

    Neuroglancer's `precomputed://`, `n5://` and `zarr://` before a URL are left out: the data tells its format.
    """
    return RemotePath(named) if _URL.match(str(named)) else Path(named)


def is_remote(path: Path) -> bool:
    """Whether it is the URL of data that is read over the network."""
    return isinstance(path, RemotePath)


def split_inner(path: Path) -> tuple[Path, str]:
    """The file or folder, and the path of an array inside it, of `FILE:/PATH/INSIDE`; "" where none is named.

    A file whose own name has that form is taken as it is.
    """
    before, mark, inner = str(path).partition(":/")
    if not mark or is_remote(path) or os.path.lexists(path) or not os.path.lexists(before):
        return path, ""
    return Path(before), inner.strip("/")


def find_files(sources: Sequence[str | Path]) -> list[Path]:
    """Every image file that the sources name, each once, sources in the order given, folders in natural order.

    A file named outright is always returned, whatever it is, so that a refusal can name it. Folders are searched
    recursively for images; hidden entries and sidecars (text, tables, metadata) are passed over, a Zarr, N5 or
    precomputed folder is one entry, and so is a folder that may not be read. Names with `*`, `?` or `[...]` that do
    not exist as such are expanded, `**` included. URLs and `FILE:/PATH/INSIDE` are returned as they are.

    Raises:
        InputError: a source does not exist, or nothing was found at all.
    """
    found: dict[str, Path] = {}
    for source in sources:
        for path in _expand(source):
            for file in _files(path):
                found.setdefault(os.path.realpath(file), file)
    if not found:
        named = ", ".join(str(s) for s in sources) or "no source"
        raise InputError(f"no images found in {named}", f"supported: {SUPPORTED}")
    return list(found.values())


def size_and_mtime(path: Path) -> tuple[int, int]:
    """(bytes, modification time in ns) of a file; of a folder, the sum of all files and the time of the newest.

    Of remote data both are 0: asking would cost a request per chunk.

    Raises:
        OSError: it is not there, or cannot be asked just now. Folders inside that may not be read count as empty.
    """
    if is_remote(path):
        return 0, 0
    status = path.stat()
    if not stat.S_ISDIR(status.st_mode):
        return status.st_size, status.st_mtime_ns
    size = newest = 0
    for parent, _, names in os.walk(path, onerror=_unless_forbidden):
        for name in names:
            status = os.lstat(f"{parent}/{name}")
            size, newest = size + status.st_size, max(newest, status.st_mtime_ns)
    return size, newest


class Original:
    """A file or folder that is to be asked later whether it is still the same.

    Args:
        was: its `size_and_mtime`; None takes it now and raises OSError as that does.
    """

    def __init__(self, path: Path, was: tuple[int, int] | None = None) -> None:
        self.is_folder = path.is_dir()
        self._path, self._was = path, was or size_and_mtime(path)

    def changed(self) -> bool:
        """Whether what was read since may not be what was there at first.

        A folder that is gone counts: chunks of a Zarr array that are not found are read as empty.

        Raises:
            OSError: it cannot be asked, a file that is gone included.
        """
        try:
            return size_and_mtime(self._path) != self._was
        except FileNotFoundError:
            if self.is_folder:
                return True
            raise


def natural_key(path: Path | str) -> list[tuple[int, int, str]]:
    """Sort key in which `slice9` comes before `slice10`, the same on every machine."""
    # Decimal digits only: isdigit() is also true of superscripts, which int() refuses.
    return [
        (0, int(part), "") if part.isascii() and part.isdigit() else (1, 0, part.casefold())
        for part in re.split(r"([0-9]+)", str(path))
        if part
    ]


def _unless_forbidden(error: OSError) -> None:
    if not isinstance(error, PermissionError):
        raise error


def _expand(source: str | Path) -> list[Path]:
    path = as_path(source)
    if is_remote(path):
        return [path]
    path = path.expanduser()
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
        os.lstat(path)  # unlike lexists it tells a file that is not there from one that may not be seen
        return [path]
    if split_inner(path)[1]:
        return [path]
    if glob.has_magic(str(source)):
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob cannot start at an absolute pattern)
        if matches:
            return sorted((Path(match) for match in matches), key=natural_key)
        raise InputError(f"nothing matches {source}", "quote a pattern to keep the shell from expanding it")
    raise InputError(f"no such file or folder: {source}", "check the path")


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir() or _is_one(path):
        yield path
        return
    yield from _search(path, set())


def _search(folder: Path, seen: set[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in seen:  # a link that leads back up
        return
    seen.add(real)
    for entry in sorted(folder.iterdir(), key=lambda p: natural_key(p.name)):
        if entry.name.startswith("."):
            continue
        if os.path.isdir(entry):  # noqa: PTH112 (Path.is_dir raises for a link to what may not be seen)
            if _is_one(entry):
                yield entry
            else:
                yield from _search(entry, seen)
        elif (os.path.isfile(entry) or _is_broken_link(entry)) and looks_like_image(entry):  # noqa: PTH113 (likewise)
            yield entry


def _is_broken_link(entry: Path) -> bool:
    try:
        entry.stat()
    except FileNotFoundError:
        return entry.is_symlink()
    except OSError:
        pass
    return False


def _is_one(folder: Path) -> bool:
    try:
        next(folder.iterdir(), None)
        return is_zarr(folder) or folder.suffix in (".zarr", ".n5") or is_n5(folder) or is_precomputed(folder)
    except PermissionError:  # whoever opens it says so, and the other folders are read
        return True
