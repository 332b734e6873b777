"""How a file's samples become grey values; the same rules for every format.

uint8 and uint16 are kept; 1-bit becomes 0/255; int8 and int16 are shifted up into uint8 and uint16 (the offset is
recorded); wider integers and other floats become float32; colour becomes luminance (Rec. 601, rounded, so that grey
stored as RGB comes back exactly); white-is-zero is inverted; a palette that is a plain ramp keeps its indices, which
are the intensities, and any other palette becomes luminance. Label maps follow other rules: their numbers are
identities, so nothing is shifted, mixed, inverted or looked up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from affmae_engine.data.readers.source import Refused

Colour = Literal["grey", "rgb", "cmyk", "cielab"]


@dataclass(frozen=True)
class ValueRule:
    """Turns raw samples [..., Y, X] (or [..., Y, X, S] when `colour` needs several) into grey values of `dtype`."""

    dtype: np.dtype[Any]
    colour: Colour = "grey"
    offset: int = 0
    invert_from: int | None = None
    """Inverted integers become `invert_from - value`; floats (`invert_from` -1) change sign."""
    palette: tuple[int, ...] | None = None
    labels: bool = False
    scale: tuple[float, float] | None = None
    """Slope and intercept from stored to true values."""

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        """Apply the rule; never wraps around."""
        if self.labels:
            return self._as_labels(raw)
        if self.palette is not None:
            table = np.asarray(self.palette, dtype=self.dtype)
            return table[np.minimum(raw.astype(np.intp), len(table) - 1)]
        if raw.dtype == np.bool_:
            raw = raw.astype(np.uint8) * np.uint8(255)
        if self.scale is not None:
            raw = raw.astype(np.float64) * self.scale[0] + self.scale[1]
        if self.offset:
            raw = (raw.astype(np.int32) + self.offset).astype(self.dtype)
        grey = _mix(raw, self.colour)
        if self.invert_from is not None:
            grey = -grey if self.invert_from < 0 else self.invert_from - np.minimum(grey, self.invert_from)
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is counted as such
            return grey.astype(self.dtype, copy=False)

    def _as_labels(self, raw: np.ndarray) -> np.ndarray:
        if self.colour != "grey":
            if any((raw[..., 0] != raw[..., s]).any() for s in range(1, min(3, raw.shape[-1]))):
                raise Refused("a label map has colours instead of label numbers", "save the numbers as grey values")
            raw = raw[..., 0]
        if raw.dtype.kind == "f" and not (np.isfinite(raw) & (raw == np.floor(raw))).all():
            raise Refused("a label map has values that are not whole numbers", "was an image given as labels?")
        if raw.size and (raw.min() < 0 or int(raw.max()) > np.iinfo(self.dtype).max):
            raise Refused("a label map has negative numbers or numbers above 4294967295", "renumber the labels")
        return raw.astype(self.dtype)


def grey_rule(
    raw: np.dtype[Any],
    *,
    colour: Colour = "grey",
    bits: int | None = None,
    inverted: bool = False,
    palette: np.ndarray | None = None,
    labels: bool = False,
    scale: tuple[float, float] = (1.0, 0.0),
) -> tuple[ValueRule, tuple[str, ...]]:
    """Choose the rule for a kind of file, with the notes that tell a user what is done.

    Args:
        raw: dtype of the decoded samples.
        colour: what the sample axis means.
        bits: significant bits of one sample, for the inversion.
        inverted: zero is white.
        palette: [entries, 3] uint16 or uint8 colours.
        labels: read as a label map.
        scale: slope and intercept from stored to true values; label maps ignore it.

    Raises:
        Refused: the dtype is neither integer nor real (complex, text, structured, object).
    """
    if raw.kind not in "buif":
        raise Refused(f"its values are of type {raw}, not real numbers", "convert it to an 8- or 16-bit image")
    if labels:
        kept = raw.kind in "bu" and raw.itemsize <= 4
        dtype = np.dtype(f"u{raw.itemsize}") if kept else np.dtype(np.uint32)
        return ValueRule(dtype, colour, labels=True), ()
    if palette is not None:
        return _palette_rule(palette)
    if scale != (1.0, 0.0):
        slope, intercept = scale
        note = f"values are the stored ones times {slope:g} plus {intercept:g}"
        return ValueRule(np.dtype(np.float32), colour, scale=scale), (note,)
    dtype, offset, notes = _stored_type(raw)
    if colour == "rgb":
        notes.append("colour made grey (luminance)")
    elif colour == "cmyk":
        notes.append("CMYK made grey (luminance)")
    elif colour == "cielab":
        notes.append("only the lightness of the Lab colours is taken")
    invert_from = None
    if inverted:
        notes.append("white-is-zero inverted")
        invert_from = -1 if raw.kind == "f" else _top(raw, bits)
    return ValueRule(dtype, colour, offset, invert_from), tuple(notes)


def _stored_type(raw: np.dtype[Any]) -> tuple[np.dtype[Any], int, list[str]]:
    if raw.kind == "b":
        return np.dtype(np.uint8), 0, ["1-bit stored as 0 and 255"]
    if raw.kind == "u" and raw.itemsize <= 2:
        return raw.newbyteorder("="), 0, []
    if raw.kind == "i" and raw.itemsize <= 2:
        offset = 1 << (8 * raw.itemsize - 1)
        return np.dtype(f"u{raw.itemsize}"), offset, [f"signed values shifted by {offset}"]
    notes = [] if raw.kind == "f" and raw.itemsize == 4 else [f"{raw.name} stored as float32"]
    return np.dtype(np.float32), 0, notes


def _top(raw: np.dtype[Any], bits: int | None) -> int:
    if raw.kind == "b":
        return 255
    return (1 << min(bits or 64, 8 * raw.itemsize)) - 1


def _mix(raw: np.ndarray, colour: Colour) -> np.ndarray:
    if colour == "grey":
        return raw
    if colour == "cielab":
        return raw[..., 0]
    narrow = raw.dtype.kind == "u" and raw.dtype.itemsize <= 2
    work: np.ndarray[Any, Any] = raw.astype(np.uint32 if narrow else np.float64)
    if colour == "cmyk":
        top = np.iinfo(raw.dtype).max if raw.dtype.kind in "ui" else 1.0
        ink = work.astype(np.float64) / top
        work = (1 - ink[..., :3]) * (1 - ink[..., 3:4]) * top
        grey = 0.299 * work[..., 0] + 0.587 * work[..., 1] + 0.114 * work[..., 2]
        return np.rint(grey) if narrow else grey
    weighted = 299 * work[..., 0] + 587 * work[..., 1] + 114 * work[..., 2]
    return (weighted + 500) // 1000 if narrow else weighted / 1000


def _palette_rule(palette: np.ndarray) -> tuple[ValueRule, tuple[str, ...]]:
    wide = palette.astype(np.float64)
    if palette.max(initial=0) > 255:
        wide = wide / 257
    luminance = 0.299 * wide[:, 0] + 0.587 * wide[:, 1] + 0.114 * wide[:, 2]
    steps = np.diff(luminance)
    last = len(palette) - 1
    if last and (steps > -1e-9).all() and luminance[-1] > luminance[0]:
        table, note = np.arange(last + 1), "palette is a rising ramp: its indices are taken"
    elif last and (steps < 1e-9).all() and luminance[-1] < luminance[0]:
        table, note = np.arange(last, -1, -1), "palette is a falling ramp: its indices are taken, inverted"
    else:
        table, note = np.rint(luminance), "palette colours made grey (luminance)"
    if last == 1:
        table = table * 255 if table.max() == 1 else table
    dtype = np.dtype(np.uint8 if table.max(initial=0) < 256 else np.uint16)
    return ValueRule(dtype, palette=tuple(int(v) for v in table)), (note,)
