"""The closed list of errors a user can meet.

Every error is one sentence (what was wrong, and where) plus a hint (what to do next). The exit code belongs to the
class, so that scripts can tell a typing mistake from a full disk. The command line prints them as two lines and shows
a traceback only under `AFFMAE_DEBUG=1`; any other exception type that reaches a user is a bug of ours.
"""

from __future__ import annotations

import errno
import os


class AffmaeError(Exception):
    """Base of all errors that are shown to a user without a traceback.

    Args:
        message: what was wrong and where, one sentence.
        hint: what to do next; empty when the message already says so.
    """

    exit_code: int = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(AffmaeError):
    """Usage or configuration: unknown preset or field, a value out of range, contradictory options."""

    exit_code = 2


class InputError(AffmaeError):
    """Input data or a file the user named: missing, unreadable, truncated, of the wrong kind or shape."""

    exit_code = 3


class ResourceError(AffmaeError):
    """The machine: disk full, read-only output, out of memory, no CUDA where it was asked for."""

    exit_code = 4


class PeerLost(ResourceError):
    """Another process of a run on several cards is gone; what went wrong is for that one, or its launcher, to say."""


class BusyError(AffmaeError):
    """Another process works in this run directory or store."""

    exit_code = 5


class CorruptError(AffmaeError):
    """A checkpoint or store of ours that fails its own checks (size, checksum, missing part)."""

    exit_code = 6


class DivergedError(AffmaeError):
    """Training produced non-finite values and was stopped; the last good checkpoint is untouched."""

    exit_code = 7


class Interrupted(AffmaeError):
    """A clean stop after a signal, once everything that should be kept was written.

    Args:
        signal_number: the signal that asked for the stop; the exit code is 128 + signal_number.
    """

    def __init__(self, message: str, hint: str = "", *, signal_number: int = 2) -> None:
        super().__init__(message, hint)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this system allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission was denied",
    errno.EPERM: "permission was denied",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "a folder of that name exists",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EIO: "the device reported an input/output error",
    errno.ELOOP: "its links lead in a circle",
    errno.ESTALE: "the network file system has lost it",
    errno.ENOTCONN: "the network file system is not connected",
    errno.ETIMEDOUT: "the network file system does not answer",
    errno.EHOSTDOWN: "the network file system's server is down",
    errno.ENOMEM: "there is not enough memory",
    errno.EMFILE: "this process has too many files open",
    errno.ENFILE: "this machine has too many files open",
}
"""What the system says of a file that cannot be used, in words."""
_OF_THE_USER = {
    errno.EACCES: "check who may use it",
    errno.EPERM: "check who may use it",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "check the path",
    errno.ENAMETOOLONG: "check the path",
    errno.ELOOP: "check the path",
}
_OF_THE_MACHINE = {
    errno.ENOMEM: "close other programs, then run the same command again",
    errno.EMFILE: "allow more with `ulimit -n`, then run the same command again",
    errno.ENFILE: "close other programs, then run the same command again",
}
_OF_THE_DISK = "see to the disk, then run the same command again"
_PASSING = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, *_OF_THE_MACHINE}


def of_system(error: BaseException | None, *, unnamed: str = "") -> AffmaeError | None:
    """The error that a user is shown when the system refused a file, itself or behind another exception.

    None where it did not: the reason is another one, a bug of ours perhaps.

    Args:
        unnamed: what was used, for errors that name no file, as those of reading an open one; "": such do not count.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in REASONS:
            name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else unnamed
            message = f"cannot use {name}: {REASONS[error.errno]}"
            if name and error.errno in _OF_THE_USER:
                return InputError(message, _OF_THE_USER[error.errno])
            if name:
                return ResourceError(message, _OF_THE_MACHINE.get(error.errno, _OF_THE_DISK))
        error = error.__cause__ or error.__context__
    return None


def passing(error: BaseException | None) -> tuple[str, str] | None:
    """(reason, hint) when a read failed, itself or behind another exception, for want of something on this machine.

    A share that is away for a moment, memory or descriptors that are short: nothing is known against the file, and
    the same read may well succeed later. None where the reason is another one. Decoders name no file in such errors,
    so the caller has to, which sets this apart from `of_system`.
    """
    while error is not None:
        code = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
        if code in _PASSING:
            return REASONS[code], _OF_THE_MACHINE.get(code, _OF_THE_DISK)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def human_bytes(count: float) -> str:
    """A byte count for people: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.3g} PiB"


def one_line(error: BaseException, limit: int = 200) -> str:
    """The message of an exception on one line, without control characters, cut to `limit` characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def first_line(error: BaseException, limit: int = 300) -> str:
    """An exception for a table: the first line of its message, after the name of its type unless it is one of ours."""
    lines = str(error).strip().splitlines()
    text = lines[0][:limit] if lines else ""
    return text if text and isinstance(error, AffmaeError) else f"{type(error).__name__}: {text}".rstrip(": ")
