"""Every persistent write of the project: complete under its final name, or absent.

A file is written beside its destination, flushed, fsynced, renamed over the final name, and the folder is fsynced.
A folder is built aside under a hidden name and renamed as one. Whatever goes wrong (an exception, Ctrl-C, a full
disk), nothing half-written is left under a final name and temporary files are removed; a process killed outright
leaves only hidden `.NAME.*.partial` entries, which `sweep` deletes.

The many faces of a failed write (`OSError` with a dozen errno values, `RuntimeError` from torch, `SafetensorError`)
become one `ResourceError` that names the path.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from affmae_engine.errors import REASONS, ResourceError, human_bytes

PARTIAL_SUFFIX = ".partial"
_LONGEST_STEM = 120
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h


def commit_file(path: Path, writer: Callable[[Path], None]) -> None:
    """Write one file atomically.

    Args:
        path: final name; its folder must exist. An existing file is replaced as a whole.
        writer: called once with a temporary path in the same folder; must create that file.

    Raises:
        ResourceError: disk full, read-only, no permission; the final name is untouched.
    """
    partial = _partial_name(path)
    try:
        with translated_write_errors(path):
            writer(partial)
            fsync_file(partial)
            partial.replace(path)
            fsync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # would hide the error that brought us here
            partial.unlink()


def commit_bytes(path: Path, data: bytes) -> None:
    """Write `data` atomically as the whole content of `path` (see `commit_file`)."""

    def write(partial: Path) -> None:
        partial.write_bytes(data)

    commit_file(path, write)


def commit_text(path: Path, text: str) -> None:
    """Write `text` atomically as UTF-8 (see `commit_file`)."""
    commit_bytes(path, text.encode("utf-8"))


def commit_json(path: Path, value: Any) -> None:
    """Write `value` atomically as indented JSON (see `commit_file`). NaN and infinity are refused with ValueError."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # File names that are not UTF-8 hold lone surrogates; as an escape (JSON has the same one) they come back unchanged.
    commit_bytes(path, text.encode("utf-8", "backslashreplace"))


@contextlib.contextmanager
def committed_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Build a folder aside and rename it into place when the block ends without an exception.

    Args:
        replace: an existing folder of that name gives way to the complete new one, and only then. Linux swaps the two
            in one step; elsewhere, for an instant, neither stands there.

    Yields:
        a hidden sibling folder to fill. Files in it are fsynced before the rename.

    Raises:
        FileExistsError: `path` exists already and `replace` is off.
        ResourceError: the write failed; nothing new is left under the final name.
    """
    if path.exists() and not replace:
        raise FileExistsError(path)
    partial = _partial_name(path)
    try:
        with translated_write_errors(path):
            partial.mkdir()
            yield partial
            for file in sorted(partial.rglob("*")):
                if file.is_file():
                    fsync_file(file)
            for folder in sorted((p for p in partial.rglob("*") if p.is_dir()), reverse=True):
                fsync_folder(folder)
        publish_folder(partial, path, replace=replace)
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)


def publish_folder(built: Path, path: Path, *, replace: bool = False) -> None:
    """Rename a folder whose content is complete and on the device to its final name.

    Args:
        built: in the same folder, or at least on the same device, as `path`. It is gone afterwards.
        replace: see `committed_folder`.

    Raises:
        ResourceError: the rename failed; what stood under the final name still does.
    """
    previous = _partial_name(path)
    try:
        with translated_write_errors(path):
            fsync_folder(built)
            swapped = replace and path.exists() and _exchange(built, path)
            if not swapped:
                if replace and path.exists():
                    path.rename(previous)
                built.rename(path)
            fsync_folder(path.parent)
            if built.parent != path.parent:
                fsync_folder(built.parent)
            if swapped:  # it holds what was replaced
                shutil.rmtree(built, ignore_errors=True)
    finally:
        if previous.exists() and not path.exists():
            previous.rename(path)
        if previous.exists():
            shutil.rmtree(previous, ignore_errors=True)


@contextlib.contextmanager
def translated_write_errors(path: Path) -> Iterator[None]:
    """Turn a failed write inside the block into a `ResourceError` that names `path`."""
    try:
        yield
    except OSError as error:
        reason = REASONS.get(error.errno or 0)
        if error.errno == errno.ENOENT and not path.parent.is_dir():
            reason = "its folder does not exist"
        if reason is None:
            raise
        raise ResourceError(f"cannot write {path}: {reason}", _hint(path, error.errno)) from error
    except (RuntimeError, ValueError) as error:
        # torch and imagecodecs raise RuntimeError, safetensors its own ValueError-like class, when a write is short.
        if _free_bytes(path) > 1 << 20:
            raise
        raise ResourceError(f"cannot write {path}: the disk is full", _hint(path, errno.ENOSPC)) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        found = re.search(r"os error (\d+)", str(error))  # Rust's way to give the number
        code = int(found[1]) if found else errno.ENOSPC
        raise ResourceError(f"cannot write {path}: {REASONS.get(code, error)}", _hint(path, code)) from error


def ensure_folder(path: Path) -> Path:
    """Create `path` and its parents and prove that it can be written to.

    Raises:
        ResourceError: a file stands in the way, the place is read-only, or permission is denied.
    """
    with translated_write_errors(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise ResourceError(
                f"cannot use {path} as a folder: a file of that name exists", "name another output folder"
            ) from error
        except FileNotFoundError as error:  # special file systems refuse new folders in this way
            raise ResourceError(f"cannot make the folder {path}", "choose another output folder") from error
        sweep(path, "probe")
        probe = _partial_name(path / "probe")
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may have swept it
        fsync_folder(path.parent)
    return path


def sweep(folder: Path, name: str = "") -> int:
    """Delete what killed writers left in `folder` (not in its subfolders); returns how many entries were removed.

    Args:
        name: only leftovers of this final name, where several processes may be writing side by side.
    """
    count = 0
    start = f".{short_stem(name)}." if name else "."
    for entry in folder.glob(f"{glob.escape(start)}*{PARTIAL_SUFFIX}"):
        if name and "." in entry.name[len(start) : -len(PARTIAL_SUFFIX)]:
            continue  # of a longer name that begins with this one
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
        count += 1
    return count


def fsync_file(path: Path) -> None:
    """Force a file's content to the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Force a folder's entries to the device, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot fsync a folder; the rename itself is still atomic there.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two entries of a folder in one step (Linux's renameat2); False where that cannot be done."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    return call(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), ctypes.c_uint(_RENAME_EXCHANGE)) == 0


def _partial_name(path: Path) -> Path:
    return path.with_name(f".{short_stem(path.name)}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")


def short_stem(name: str) -> str:
    """A name of at most 120 bytes, so that a 255-byte final one still has a legal hidden one beside it.

    What is cut off is made up for by a hash of the whole, so that different names never share a hidden one.
    """
    whole = name.encode("utf-8", "surrogateescape")
    if len(whole) <= _LONGEST_STEM:
        return name
    digest = hashlib.sha256(whole).hexdigest()[:16]
    return f"{whole[: _LONGEST_STEM - 1 - len(digest)].decode('utf-8', 'ignore')}-{digest}"


def _free_bytes(path: Path) -> int:
    parent = path.parent if path.parent.exists() else Path()
    return shutil.disk_usage(parent).free


def _hint(path: Path, code: int | None) -> str:
    if code in (errno.ENOSPC, errno.EDQUOT):
        return f"free some space ({human_bytes(_free_bytes(path))} are left) or choose another output folder"
    return "choose another output folder"
