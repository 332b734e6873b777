"""PNG, JPEG and JPEG 2000: single gray sections of ordinary pictures.

These formats have no random access, so the picture is decoded as a whole when it is first read and kept until
`close`. Pillow opens only the formats named here; the size in the header is compared with the size of the file first.
PNG and JPEG decoders fill a buffer of that size; that of JPEG 2000 allocates what it likes and runs in a child process.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from affmae_engine.data.readers.arrays import question_of_size, short_name
from affmae_engine.data.readers.grey import Colour, grey_rule
from affmae_engine.data.readers.limits import refuse_inflated, refuse_large_piece
from affmae_engine.data.readers.source import (
    UNKNOWN_SIZE,
    Found,
    PixelSize,
    ReadOptions,
    Refused,
    Source,
    SourceInfo,
    reading,
)
from affmae_engine.data.readers.tiff_metadata import beside
from affmae_engine.data.readers.units import from_resolution

warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # damaged EXIF and the like
_FORMATS = ("PNG", "JPEG", "JPEG2000")
_NAMES = {"PNG": "PNG", "JPEG": "JPEG", "MPO": "JPEG", "JPEG2000": "JPEG 2000"}
_TRANSPOSED = (5, 6, 7, 8)

# Pillow's modes: raw dtype, meaning of the samples, number of samples.
_MODES: dict[str, tuple[str, Colour, int]] = {
    "1": ("?", "grey", 1), "L": ("u1", "grey", 1), "P": ("u1", "grey", 1), "LA": ("u1", "grey", 2),
    "PA": ("u1", "grey", 2), "La": ("u1", "grey", 2), "RGB": ("u1", "rgb", 3), "RGBA": ("u1", "rgb", 4),
    "RGBa": ("u1", "rgb", 4), "RGBX": ("u1", "rgb", 4), "CMYK": ("u1", "cmyk", 4), "YCbCr": ("u1", "grey", 3),
    "LAB": ("u1", "cielab", 3), "I;16": ("u2", "grey", 1), "I;16L": ("u2", "grey", 1), "I;16B": ("u2", "grey", 1),
    "I": ("i4", "grey", 1), "F": ("f4", "grey", 1),
}  # fmt: skip


class PictureSource(Source):
    """One decoded picture."""

    parallel = False  # a copy would decode the whole picture again

    def __init__(self, info: SourceInfo, options: ReadOptions) -> None:
        super().__init__(info)
        self.isolated = info.format == "JPEG 2000"
        self.piece_bytes = info.nbytes
        self._file, self._options = info.path, options

    def _open(self) -> np.ndarray:
        with _opened(self._file) as picture:
            raw = _decode(self._file, picture)
            rule, channel, _ = _rule(self._file, picture, self._options.channel, self._options.labels)
        if channel is not None and raw.ndim == 3:
            raw = raw[..., channel]
        return rule(raw)

    def _close(self, handle: Any) -> None:
        pass

    def _read(self, handle: Any, z: tuple[int, int], y: tuple[int, int], x: tuple[int, int]) -> np.ndarray:
        block: np.ndarray = handle[None, y[0] : y[1], x[0] : x[1]]
        return block[: z[1] - z[0]]


def open_picture(path: Path, options: ReadOptions) -> Found:
    """The picture in a PNG, JPEG or JPEG 2000 file, from its header alone.

    Raises:
        InputError: the content is not one of these formats, or the header promises more than the file holds.
    """
    with reading(path), _opened(path) as picture:
        width, height = picture.size
        rule, _, notes = _rule(path, picture, options.channel, options.labels)
        declared = width * height * len(picture.getbands()) * rule.dtype.itemsize
        refuse_inflated(declared, path.stat().st_size, compressed=True)
        refuse_large_piece(declared, "it", "save it as a tiled TIFF or as OME-Zarr")
        if getattr(picture, "n_frames", 1) > 1:
            notes = (*notes, f"frame 0 of {picture.n_frames} taken")
        turned = picture.getexif().get(274, 1)
        if turned not in (0, 1):
            notes = (*notes, "rotated as its EXIF orientation says")
        z_nm, y_nm, x_nm = _pixel_size(path, picture)
        if turned in _TRANSPOSED:
            width, height, y_nm, x_nm = height, width, x_nm, y_nm
        pixel_nm = (z_nm, y_nm, x_nm)
        info = SourceInfo(
            path=path,
            series="",
            name=short_name(path),
            shape_ZYX=(1, height, width),
            dtype=rule.dtype,
            pixel_nm=pixel_nm,
            format=_NAMES.get(picture.format or "", "picture"),
            notes=(*notes, *question_of_size(pixel_nm)),
            value_offset=rule.offset,
            questions=question_of_size(pixel_nm),
        )
    return [PictureSource(info, options)], []


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path, formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise Refused("its header is damaged", "copy it again from its origin") from error


def _rule(path: Path, picture: Image.Image, channel: int | None, labels: bool) -> tuple[Any, int | None, Any]:
    if picture.mode not in _MODES:
        raise Refused(f"pictures of mode {picture.mode} are not supported", "convert it to a grey PNG or TIFF")
    raw, colour, samples = _MODES[picture.mode]
    if _is_deep_png(path, picture):
        raw = "u2"
    notes: tuple[str, ...] = ()
    if channel is not None:
        if channel >= samples:
            raise Refused(f"there is no channel {channel}: it has {samples}", "channels are counted from 0")
        colour = "grey"
        notes = (f"channel {channel} of {samples} taken",) if samples > 1 else ()
    elif colour == "grey" and samples > 1:
        channel = 0
        notes = ("luminance taken",) if picture.mode == "YCbCr" else ("alpha left out",)
    elif colour == "rgb" and samples > 3:
        notes = ("alpha left out",)
    palette = None
    if picture.mode in ("P", "PA"):
        palette = np.asarray(picture.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    rule, more = grey_rule(np.dtype(raw), colour=colour, palette=palette, labels=labels)
    return rule, channel, (*notes, *more)


def _is_deep_png(path: Path, picture: Image.Image) -> bool:
    """Whether this is a 16-bit PNG with colour or alpha, which Pillow would reduce to 8 bits."""
    if picture.format != "PNG" or picture.mode not in ("LA", "RGB", "RGBA"):
        return False
    with path.open("rb") as handle:
        return handle.read(25)[24:] == b"\x10"


def _decode(path: Path, picture: Image.Image) -> np.ndarray:
    if _is_deep_png(path, picture):
        deep: np.ndarray = imagecodecs.png_decode(path.read_bytes())
        return deep
    ImageOps.exif_transpose(picture, in_place=True)
    return np.asarray(picture)


def _pixel_size(path: Path, picture: Image.Image) -> PixelSize:
    """From a text file of the microscope beside it, or from a print resolution that no printer has."""
    size = beside(path, picture.width)
    if size:
        return None, size, size
    dpi = picture.info.get("dpi")
    if not isinstance(dpi, tuple) or len(dpi) != 2:
        return UNKNOWN_SIZE
    return None, from_resolution(float(dpi[1]), "inch"), from_resolution(float(dpi[0]), "inch")
