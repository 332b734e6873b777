"""Which compressions of a TIFF are decoded, and how far each can be trusted with memory.

Most decoders are told how large a strip or tile is and stop there. Those that are picture formats of their own (JPEG,
JPEG 2000, PNG, WebP) believe the size inside the picture instead, so that is read first; and a few show theirs to
nobody before they have decoded it.
"""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError

from affmae_engine.data.readers.limits import refuse_unbounded, sizes_trusted
from affmae_engine.data.readers.source import Refused

# CCITT, LZW, deflate, PackBits, ThunderScan, SGI log, LZMA, zstd, PixTIFF
_BOUNDED = {2, 3, 4, 5, 8, 32773, 32809, 32946, 34676, 34677, 34925, 34926, 50000, 50013}
_PICTURES = {
    6: "JPEG", 7: "JPEG", 33007: "JPEG", 34892: "JPEG", 33003: "JPEG2000", 33004: "JPEG2000", 33005: "JPEG2000",
    34712: "JPEG2000", 34933: "PNG", 34927: "WEBP", 50001: "WEBP",
}  # fmt: skip
_SLACK = 4
"""Times the declared pixels that a picture may have: some writers pad, or store a strip in the last tile's size."""


def check_compression(compression: int, name: str) -> None:
    """Refuse a page whose decoder cannot be bounded. Raises Refused unless sizes are trusted."""
    if compression not in _BOUNDED and compression not in _PICTURES:
        refuse_unbounded(f"it is compressed with {name.lower().replace('_', ' ')}")


def check_piece(compression: int, data: bytes, pixels: int) -> None:
    """Refuse a strip or tile that is a picture of another size than the page says.

    Args:
        data: the encoded piece, with the tables that belong before it.
        pixels: width times height of a whole piece according to the page.

    Raises:
        Refused: it is far larger, or is no such picture.
    """
    kind = _PICTURES.get(compression)
    if kind is None or sizes_trusted():
        return
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as picture:
            width, height = picture.size
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise Refused(f"a piece of it is no {kind} picture", "the file is damaged; copy it again") from error
    if width * height > _SLACK * pixels + (1 << 16):
        raise Refused(f"a piece of it is a picture of {width} x {height} pixels, where the page has {pixels}")
