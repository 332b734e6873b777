"""From an n-dimensional array with named axes to grey sections: the one `Source` behind every format of arrays.

A reader says how to open its array, what its axes are called and how large a voxel is along each; everything else is
done here. Legend: one letter per axis. `Y` and `X` stay, a channel axis `C` and the samples of a pixel `S` are reduced
to one value, and every other axis (`Z`, `T` and what has no name) is unrolled into sections in file order, so that
nothing is silently dropped. Axes may stand in any order: blocks are transposed as they are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from affmae_engine.data.readers.formats import NAMES, PACKED
from affmae_engine.data.readers.grey import Colour, ValueRule, grey_rule
from affmae_engine.data.readers.source import ReadOptions, Refused, Source, SourceInfo

NARROW = 32
"""Sections with fewer columns than this are questioned: they are often (y, x, z) taken for (z, y, x)."""
SMALLEST_NM, LARGEST_NM = 0.01, 1000.0
"""Pixel sizes beyond these are questioned; no electron micrograph is known to have them."""
_RAW_BYTES = 16 << 20  # of raw values read at a time, so that memory does not depend on the depth of a request


@dataclass(frozen=True)
class Array:
    """An array found in a file, as its reader describes it.

    Attributes:
        path: the file, or the root folder of a hierarchy.
        open: opens the array in whichever process calls it: something that is indexed with a tuple of one int or
            slice per axis and gives numpy arrays; closed with its `close`, if it has one. Can be pickled.
        shape, dtype, axes: of that array, one letter per axis; `_` is an axis of length 1 that nobody sees.
        pixel_nm: nanometers per voxel by axis letter; what is unknown is left out or None.
        axes_from: who says so: the file, the pages of a TIFF (whose order is a habit), or a guess from the shape.
        piece_bytes: the largest part that is decoded as a whole; 0 where nothing is decoded.
        rule: how raw values become grey ones and the notes on that, where the dtype alone does not tell.
        samples: what the samples `S` of a pixel mean.
    """

    path: Path
    open: Callable[[], Any]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    axes: str
    format: str
    pixel_nm: Mapping[str, float | None] = field(default_factory=dict)
    series: str = ""
    name: str = ""
    notes: tuple[str, ...] = ()
    axes_from: Literal["file", "pages", "guess"] = "file"
    piece_bytes: int = 0
    samples: Colour = "grey"
    rule: Callable[[Colour, bool], tuple[ValueRule, tuple[str, ...]]] | None = None
    isolated: bool = False


class ArraySource(Source):
    """One array of a file as a stack of sections."""

    def __init__(
        self, info: SourceInfo, array: Array, axes: str, channel: int, sample: int | None, rule: ValueRule
    ) -> None:
        super().__init__(info)
        self.isolated, self.piece_bytes = array.isolated, array.piece_bytes
        self._opener, self._shape, self._axes = array.open, array.shape, axes
        self._channel, self._sample, self._rule = channel, sample, rule

    def _open(self) -> Any:
        return self._opener()

    def _close(self, handle: Any) -> None:
        close = getattr(handle, "close", None)
        if close is not None:
            close()

    def _read(self, handle: Any, z: tuple[int, int], y: tuple[int, int], x: tuple[int, int]) -> np.ndarray:
        block = np.empty((z[1] - z[0], y[1] - y[0], x[1] - x[0]), self.info.dtype)
        if block.size == 0:
            return block
        # Sections that follow each other along the last section axis are fetched together, as far as memory allows.
        lengths = [n for a, n in zip(self._axes, self._shape, strict=True) if a not in "YXCS"]
        run = lengths[-1] if lengths else 1
        most = max(1, _RAW_BYTES // block[0].nbytes)
        start = z[0]
        while start < z[1]:
            stop = min(z[1], (start // run + 1) * run, start + most)
            index = iter(np.unravel_index(start, lengths) if lengths else ())
            block[start - z[0] : stop - z[0]] = self._read_run(handle, [int(i) for i in index], stop - start, y, x)
            start = stop
        return block

    def _read_run(
        self, handle: Any, index: list[int], count: int, y: tuple[int, int], x: tuple[int, int]
    ) -> np.ndarray:
        """Grey values [count, Y, X] from the section at `index` (along the section axes) on."""
        selection: list[Any] = []
        kept = ""
        for letter in self._axes:
            if letter in "YX":
                selection.append(slice(*(y if letter == "Y" else x)))
                kept += letter
            elif letter == "C":
                selection.append(self._channel)
            elif letter == "S" and self._sample is not None:
                selection.append(self._sample)
            elif letter == "S":
                selection.append(slice(None))
                kept += letter
            else:
                first = index.pop(0)
                selection.append(first if index else slice(first, first + count))
                kept += "" if index else "z"
        raw = np.asarray(handle[tuple(selection)])
        raw = raw.transpose([kept.index(letter) for letter in "zYXS" if letter in kept])
        return self._rule(raw if "z" in kept else raw[None])


def array_source(array: Array, options: ReadOptions) -> ArraySource:
    """The source of an array.

    Raises:
        Refused: an axis is empty or missing, the axes or channel of the user do not fit, or the values are not real.
    """
    axes, shape = array.axes, array.shape
    if options.axes:
        axes = user_axes(options.axes, axes, shape)
    if axes.count("Y") != 1 or axes.count("X") != 1:
        raise Refused(f"its axes {axes} do not have one y and one x", "name its axes with --axes, for example ZYX")
    sizes = dict(zip(axes, shape, strict=True))
    if 0 in shape:
        raise Refused("one of its axes has length 0", "there is nothing to read in it")
    notes = list(array.notes)

    # One channel, and of the samples of a pixel one or their luminance.
    channels, samples = (math.prod(n for a, n in zip(axes, shape, strict=True) if a == kind) for kind in "CS")
    available = channels if "C" in axes else samples
    if options.channel is not None and options.channel >= available:
        raise Refused(f"there is no channel {options.channel}: it has {available}", "channels are counted from 0")
    channel = options.channel or 0
    colour: Colour = "grey"
    sample: int | None = None
    if "S" in axes:
        of_sample = None if "C" in axes else options.channel
        colour = array.samples if of_sample is None else "grey"
        if options.labels and colour == "cielab":
            colour = "grey"
        sample = None if colour != "grey" else of_sample or 0
        if colour == "grey" and samples > 1:
            notes.append(f"{'channel' if of_sample is not None else 'sample'} {sample} of {samples} taken")
        elif colour == "rgb" and samples > 3:
            notes.append("alpha or further samples left out")
    if channels > 1:
        notes.append(f"channel {channel} of {channels} taken")
    if array.rule is not None:
        rule, more = array.rule(colour, options.labels)
    else:
        rule, more = grey_rule(array.dtype, colour=colour, labels=options.labels)

    section_axes, section_shape = _section_axes(axes, shape)
    if "T" in section_axes:
        notes.append(f"{section_shape[section_axes.index('T')]} time points")
    if options.axes:
        notes.append(f"axes read as {options.axes} (--axes)")
    elif array.axes_from == "guess" and len(shape) > 2:
        notes.append(f"axes not named: taken as {axes}")
    questions = question_of_size(tuple(array.pixel_nm.get(a) for a in "ZYX"))
    if not options.axes and array.axes_from != "file":
        questions += _question_of_axes(math.prod(section_shape), sizes["Y"], sizes["X"])
    info = SourceInfo(
        path=array.path,
        # The same pixels with other axes are another image.
        series=" ".join(filter(None, (array.series, options.axes))),
        name=array.name or short_name(array.path),
        shape_ZYX=(math.prod(section_shape), sizes["Y"], sizes["X"]),
        dtype=rule.dtype,
        pixel_nm=(array.pixel_nm.get("Z"), array.pixel_nm.get("Y"), array.pixel_nm.get("X")),
        format=array.format,
        notes=tuple(dict.fromkeys((*notes, *more, *questions))),
        value_offset=rule.offset,
        section_axes=section_axes,
        section_shape=section_shape,
        questions=questions,
    )
    return ArraySource(info, array, axes, channel, sample, rule)


def user_axes(chosen: str, axes: str, shape: tuple[int, ...]) -> str:
    """The axes that the user named in place of `axes`; samples of a pixel may be left out.

    Raises:
        Refused: their number is another one.
    """
    samples = "S" in axes and shape[axes.index("S")] > 1
    for hidden in ("_", "_S"):
        named = [i for i, a in enumerate(axes) if a not in hidden and (a != "S" or samples)]
        if len(named) == len(chosen):
            letters = list(axes)
            for i, letter in zip(named, chosen, strict=True):
                letters[i] = letter
            return "".join(letters)
    sizes = [n for a, n in zip(axes, shape, strict=True) if a != "_" and (a != "S" or samples)]
    raise Refused(
        f"--axes {chosen} names {len(chosen)} axes, it has {len(sizes)} ({' x '.join(map(str, sizes))})",
        "name one letter per axis, for example ZYX",
    )


def _section_axes(axes: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """What the sections are unrolled from: time `T`, and everything else as one `Z`, without axes of length 1."""
    letters, lengths = "", list[int]()
    for axis, length in zip(axes, shape, strict=True):
        letter = axis if axis == "T" else "Z"
        if axis in "YXCS" or length == 1:
            continue
        if letters.endswith(letter):
            lengths[-1] *= length
        else:
            letters, lengths = letters + letter, [*lengths, length]
    if letters in ("Z", "T", "TZ", "ZT"):
        return letters, tuple(lengths)
    return "Z", (math.prod(lengths),)


def guess_axes(shape: tuple[int, ...]) -> str:
    """The axes of an array that does not name them: (z, y, x), or (y, x, sample) if the last are three or four.

    Raises:
        Refused: it has fewer than two or more than five axes.
    """
    if len(shape) < 2:
        raise OneDimensional("it is one-dimensional: not an image")
    if len(shape) > 5:
        raise Refused(f"it has {len(shape)} axes; images and stacks have 2 to 5")
    if len(shape) == 3 and shape[-1] in (3, 4) and min(shape[:2]) >= 16:
        return "YXS"
    return "TCZYX"[-len(shape) :] if len(shape) != 4 else "CZYX"


class OneDimensional(Refused):
    """An array that cannot be an image, as coordinates and tables beside images are."""


def short_name(path: Path) -> str:
    """What an image is called after its file: the name without the endings of formats."""
    name = path.name
    for endings in (PACKED, NAMES, (".ome",)):
        found = next((ending for ending in endings if name.lower().endswith(ending)), "")
        name = name[: len(name) - len(found)] or name
    return name


def _question_of_axes(sections: int, height: int, width: int) -> tuple[str, ...]:
    """The question to ask where axes that nobody named give many narrow sections; empty where they do not."""
    if not width < NARROW < min(height, sections):
        return ()
    guess = "YXC" if width <= 4 else "YXZ"
    return (
        f"its {sections} sections are only {width} pixels wide; if its axes are ({', '.join(guess.lower())}), "
        f"say so with --axes {guess}",
    )


def question_of_size(pixel_nm: tuple[float | None, ...]) -> tuple[str, ...]:
    """The question to ask about a voxel size that no electron micrograph has; empty where there is none."""
    odd = [value for value in pixel_nm if value is not None and not SMALLEST_NM <= value <= LARGEST_NM]
    if not odd:
        return ()
    return (f"its pixel size of {odd[0]:g} nm is unusual for electron microscopy; correct it with --pixel-size",)
