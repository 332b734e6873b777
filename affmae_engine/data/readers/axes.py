"""From any number of named axes to sections: which axes become z, which one is the channel.

Y and X stay. A channel axis is reduced to one channel. Every other axis (z, time, position, unnamed) is unrolled into
sections in file order, so nothing is silently dropped. Legend: one letter per axis, `S` for the samples of a pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from affmae_engine.data.readers.source import Refused


@dataclass(frozen=True)
class Sections:
    """How section numbers map to indices of the axes before Y and X."""

    axes: str
    """Letters of the leading axes, in file order."""
    shape: tuple[int, ...]
    channel: int
    """Index taken on every channel axis."""

    @property
    def count(self) -> int:
        """Number of sections."""
        return math.prod(n for a, n in zip(self.axes, self.shape, strict=True) if a != "C")

    def index(self, section: int) -> tuple[int, ...]:
        """Indices along the leading axes of one section."""
        kept = [n for a, n in zip(self.axes, self.shape, strict=True) if a != "C"]
        rest = iter(np.unravel_index(section, kept) if kept else ())
        return tuple(self.channel if a == "C" else int(next(rest)) for a in self.axes)


def arrange(axes: str, shape: tuple[int, ...], channel: int | None) -> tuple[Sections, tuple[str, ...]]:
    """Decide what the axes before Y and X mean, with the notes for the user.

    Raises:
        Refused: an axis is empty, or the wished channel does not exist.
    """
    if 0 in shape:
        raise Refused("one of its axes has length 0", "there is nothing to read in it")
    notes = []
    channels = math.prod(n for a, n in zip(axes, shape, strict=True) if a == "C")
    check_channel(channel, channels)
    if channels > 1:
        notes.append(f"channel {channel or 0} of {channels} taken")
    times = math.prod(n for a, n in zip(axes, shape, strict=True) if a == "T")
    if times > 1:
        notes.append(f"{times} time points stored as further sections")
    return Sections(axes, shape, channel or 0), tuple(notes)


def check_channel(channel: int | None, available: int) -> None:
    """Raise Refused when the wished channel is not there. A single-channel image has channel 0 only."""
    if channel is not None and channel >= available:
        raise Refused(f"there is no channel {channel}: it has {available}", "channels are counted from 0")
