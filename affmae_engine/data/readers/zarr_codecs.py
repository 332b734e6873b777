"""Decoders for a stranger's Zarr chunks: they stop at the size that the array's metadata allows.

The usual ones believe the chunk: 48 kB of zstd become 1.5 GB before their size is compared with anything, and Blosc
reads beyond the end of a buffer that is shorter than its header says. Here the sizes in the headers are checked first,
and formats without one are decoded up to the limit. Importing this module puts these decoders in place for the whole
process; the limit is what `decoding_at_most` sets around a read (it reaches zarr's threads), and without it the
decoders behave as usual.
"""

from __future__ import annotations

import bz2
import contextlib
import lzma
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cached_property
from typing import Any, Protocol

import imagecodecs
import numcodecs
from numcodecs.blosc import Blosc
from numcodecs.bz2 import BZ2
from numcodecs.gzip import GZip
from numcodecs.lz4 import LZ4
from numcodecs.lzma import LZMA
from numcodecs.zlib import Zlib
from numcodecs.zstd import Zstd
from zarr import config
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec
from zarr.registry import register_codec

_ENDLESS = 1 << 62
_MOST_MEMBERS = 100  # of one chunk; writers make one, and each costs a copy of what follows it
_LZMA_MEMORY = 512 << 20  # what level 9 needs is 65 MiB; a header may ask for 4 GiB
_LIMIT: ContextVar[int] = ContextVar("affmae_decoded_bytes", default=_ENDLESS)

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_FIELD_BYTES = {0: 0, 1: 2, 2: 4, 3: 8}


@contextlib.contextmanager
def decoding_at_most(nbytes: int) -> Iterator[None]:
    """Inside the block a chunk that decodes to more than `nbytes` is an error (ValueError)."""
    token = _LIMIT.set(nbytes)
    try:
        yield
    finally:
        _LIMIT.reset(token)


def zstd_content_size(data: memoryview) -> int | None:
    """Decoded size that a zstd frame states; None when it does not.

    Raises:
        ValueError: not a zstd frame.
    """
    if bytes(data[:4]) != _ZSTD_MAGIC or len(data) < 6:
        raise ValueError("a zstd chunk is damaged")
    descriptor = data[4]
    single = bool(descriptor & 0x20)
    size = _FIELD_BYTES[descriptor >> 6] or int(single)
    if not size:
        return None
    start = 5 + (not single) + (0, 1, 2, 4)[descriptor & 3]
    field = data[start : start + size]
    if len(field) < size:
        raise ValueError("a zstd chunk is cut short")
    return int.from_bytes(field, "little") + (256 if size == 2 else 0)


class _Stream(Protocol):
    eof: bool
    unused_data: bytes

    def decompress(self, data: Any, max_length: int, /) -> bytes:
        """At most `max_length` bytes of output."""


def _inflate(new: Any, data: memoryview) -> bytes:
    """All members of a stream; `new()` makes a decompressor for one."""
    limit, parts, size = _LIMIT.get(), list[bytes](), 0
    rest: Any = data
    while len(rest):
        if len(parts) == _MOST_MEMBERS:
            raise ValueError(f"a chunk has more than {_MOST_MEMBERS} compressed members")
        stream: _Stream = new()
        part = stream.decompress(rest, min(limit - size + 1, 1 << 62))
        size += len(part)
        if size > limit:
            raise _too_large()
        if not stream.eof:
            raise ValueError("a compressed chunk is cut short")
        parts.append(part)
        rest = stream.unused_data.lstrip(b"\0")  # padding, which gzip allows
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_large() -> ValueError:
    return ValueError(f"a chunk decodes to more than the {_LIMIT.get()} bytes that its array allows")


def _bytes(buf: Any) -> memoryview:
    return memoryview(buf).cast("B")


def _into(out: Any, data: bytes) -> Any:
    return data if out is None else numcodecs.compat.ndarray_copy(data, out)


class _CheckedBlosc(Blosc):
    """Refuses a buffer shorter than its header says, and content larger than allowed."""

    def decode(self, buf: Any, out: Any = None) -> Any:
        data = _bytes(buf)
        if len(data) < 16 or int.from_bytes(data[12:16], "little") > len(data):
            raise ValueError("a Blosc chunk is cut short")
        if int.from_bytes(data[4:8], "little") > _LIMIT.get():
            raise _too_large()
        return super().decode(buf, out)


class _CheckedZstd(Zstd):
    def decode(self, buf: Any, out: Any = None) -> Any:
        limit, data = _LIMIT.get(), _bytes(buf)
        if limit == _ENDLESS:
            return super().decode(buf, out)
        size = zstd_content_size(data)
        if size is None:
            return _into(out, bytes(imagecodecs.zstd_decode(bytes(data), out=limit)))
        if size > limit:
            raise _too_large()
        return super().decode(buf, out)


class _CheckedLz4(LZ4):
    def decode(self, buf: Any, out: Any = None) -> Any:
        data = _bytes(buf)
        if len(data) < 4 or int.from_bytes(data[:4], "little") > _LIMIT.get():
            raise _too_large()
        return super().decode(buf, out)


class _CheckedGzip(GZip):
    def decode(self, buf: Any, out: Any = None) -> Any:
        return _into(out, _inflate(lambda: zlib.decompressobj(31), _bytes(buf)))


class _CheckedZlib(Zlib):
    def decode(self, buf: Any, out: Any = None) -> Any:
        return _into(out, _inflate(zlib.decompressobj, _bytes(buf)))


class _CheckedBz2(BZ2):
    def decode(self, buf: Any, out: Any = None) -> Any:
        return _into(out, _inflate(bz2.BZ2Decompressor, _bytes(buf)))


class _CheckedLzma(LZMA):
    def decode(self, buf: Any, out: Any = None) -> Any:
        options: dict[str, Any] = {"memlimit": _LZMA_MEMORY}
        if self.format == lzma.FORMAT_RAW:
            options = {"format": self.format, "filters": self.filters}
        return _into(out, _inflate(lambda: lzma.LZMADecompressor(**options), _bytes(buf)))


class CheckedBloscCodec(BloscCodec):
    """Zarr 3's Blosc codec with the checked decoder."""

    @cached_property
    def _blosc_codec(self) -> Blosc:
        settings = super()._blosc_codec.get_config()
        settings.pop("id")
        return _CheckedBlosc(**settings)


class CheckedZstdCodec(ZstdCodec):
    """Zarr 3's zstd codec with the checked decoder."""

    @cached_property
    def _zstd_codec(self) -> Zstd:
        return _CheckedZstd(level=self.level, checksum=self.checksum)


class CheckedGzipCodec(GzipCodec):
    """Zarr 3's gzip codec with the checked decoder."""

    @cached_property
    def _gzip_codec(self) -> GZip:
        return _CheckedGzip(self.level)


_NUMCODECS = {
    "blosc": _CheckedBlosc, "zstd": _CheckedZstd, "lz4": _CheckedLz4, "gzip": _CheckedGzip, "zlib": _CheckedZlib,
    "bz2": _CheckedBz2, "lzma": _CheckedLzma,
}  # fmt: skip
for _name, _codec in _NUMCODECS.items():
    numcodecs.register_codec(_codec, _name)
for _name, _codec3 in {"blosc": CheckedBloscCodec, "zstd": CheckedZstdCodec, "gzip": CheckedGzipCodec}.items():
    register_codec(_name, _codec3)
    config.set({f"codecs.{_name}": f"{_codec3.__module__}.{_codec3.__qualname__}"})
