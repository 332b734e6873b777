"""What a stranger's file may ask for before it is refused, and the one way to allow more.

Everything here is compared with what headers declare, before anything is allocated or decoded. The limits lie far
above what microscopes write; a genuine file that meets one is opened with `--trust-sizes`, which is the environment
variable `AFFMAE_TRUST_SIZES=1` (so that it reaches worker processes too). Sizes are trusted then, nothing else is:
links, codecs, types and damage are refused as ever.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from PIL import Image

from affmae_engine.data.readers.source import Refused
from affmae_engine.errors import human_bytes

# Pillow's own limit (89 megapixels) is below one large EM section; the ones here replace it in the whole process.
Image.MAX_IMAGE_PIXELS = None

VARIABLE = "AFFMAE_TRUST_SIZES"

LARGEST_RATIO = 5000
"""Pixels over stored bytes. Deflate ends at 1032, which a blank stack reaches; zstd and LZW go further on it."""
HARMLESS = 256 << 20
"""Bytes of compressed pixels that are taken at any ratio."""
LARGEST_PIECE = 4 << 30
"""Bytes of what can only be decoded as a whole: a strip, a tile, a chunk, a PNG."""
SHARE_OF_MEMORY = 0.5
"""Of this machine's memory, for such a piece and for what is computed with at a time."""
MOST_PAGES = 100_000
"""Pages of one TIFF; tifffile takes 17 us and 300 bytes for each."""

_HINT = "if you know where it comes from, open it with --trust-sizes"


def sizes_trusted() -> bool:
    """Whether the user said that sizes in headers are to be believed."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


def memory_budget() -> int:
    """Bytes that one image may take of this machine's memory at a time."""
    return int(SHARE_OF_MEMORY * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


@contextlib.contextmanager
def trusted_sizes() -> Iterator[None]:
    """Believe sizes inside the block, in this process and those that it starts."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def refuse_inflated(declared: int, stored: int, *, compressed: bool) -> None:
    """Refuse a file whose header declares far more data than the file can hold.

    Uncompressed data cannot be larger than its file, whatever the user trusts.

    Raises:
        Refused: the file is truncated, or its header lies.
    """
    if declared <= stored:
        return
    if compressed and (declared <= HARMLESS or declared <= LARGEST_RATIO * stored or sizes_trusted()):
        return
    raise Refused(
        f"its header declares {human_bytes(declared)} of pixels, but the file holds only {human_bytes(stored)}",
        f"it is truncated or damaged; {_HINT}" if compressed else "it is truncated or damaged; copy it again",
    )


def refuse_large_piece(nbytes: int, what: str, advice: str) -> None:
    """Refuse what is decoded as a whole and would take too much memory.

    Args:
        what: names the piece, for example "a strip of it".
        advice: how to save the file otherwise.

    Raises:
        Refused: it is larger than `LARGEST_PIECE` or than the share of this machine's memory.
    """
    most = min(LARGEST_PIECE, memory_budget())
    if nbytes > most and not sizes_trusted():
        raise Refused(
            f"{what} is {human_bytes(nbytes)} once decoded; {human_bytes(most)} are allowed", f"{advice}, or {_HINT}"
        )


def refuse_many(count: int, most: int, what: str) -> None:
    """Refuse absurd numbers of things. Raises Refused when `count` is above `most` and sizes are not trusted."""
    if count > most and not sizes_trusted():
        raise Refused(f"it has more than {most} {what}", _HINT)
