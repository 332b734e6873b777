"""Grey-value statistics of an image, gathered block by block and mergeable, without its blank padding.

Foreground rule: padding is the darkest or the brightest value of an image, wherever it fills horizontal runs of at
least 32 pixels, provided that such runs of that value make up at least 1 % of the image. In uint8 images black and
white padding may be noisy: runs of 0 to 3 or of 252 to 255 that begin at the left or right border count as well
(`padding.py` finds padding of any shape, where a whole section is at hand). Padding is left out of mean, deviation and
percentiles, unless less than 5 % of the image would remain. Values that are not finite are left out and counted. An
image is blank when its middle 99 % of pixels have one value, or when it hardly varies: by at most half a grey level and
0.5 % of its largest value (integers), or one part in a million (floats).

uint8 and uint16 are exact (a histogram). Floats have exact moments and percentiles from a systematic sample of at most
2**18 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np

from affmae_engine.data.padding import TOLERANCE
from affmae_engine.data.readers.source import Source

PERCENTILES = (0.5, 1, 5, 25, 50, 75, 95, 99, 99.5)
_RUN = 32
_STRIDE = 8  # a run of 32 covers at least 4 multiples of 8: 3 equal neighbours among every eighth pixel
_PADDING_SHARE = 0.01
_SMALLEST_FOREGROUND = 0.05
_SAMPLE = 1 << 18
_RUN_VALUES = 256
_AT_ONCE = 1 << 19  # pixels; numpy's counting needs 8 bytes for each


@dataclass(frozen=True)
class Statistics:
    """Statistics of one image or of a dataset, in the grey values of the store."""

    count: int
    """Foreground pixels that were measured."""
    mean: float
    std: float
    minimum: float
    maximum: float
    percentiles: dict[str, float]
    """Keys are `PERCENTILES` as text, for example "0.5" and "50"."""
    foreground: float
    """Share of the pixels that is neither padding nor non-finite."""
    nonfinite: int
    """NaN and infinite pixels."""
    blank: bool
    """Whether there is (almost) nothing to see."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`. Raises KeyError, TypeError or ValueError on anything else."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})


class StatisticsBuilder:
    """Gathers statistics of one dtype. Blocks are [..., X]; give whole rows, so that no run is cut.

    Builders of the same dtype can be merged, in any order, with the same result for integers and, for floats, the
    same moments up to rounding.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = np.dtype(dtype)
        self._gather: _Integers | _Floats
        if self.dtype.kind == "u" and self.dtype.itemsize <= 2:
            self._gather = _Integers(self.dtype)
        else:
            self._gather = _Floats()

    def add(self, block: np.ndarray) -> None:
        """Take in the pixels of a block of any shape."""
        if not block.size:
            return
        rows = block.reshape(-1, block.shape[-1])
        step = max(1, _AT_ONCE // rows.shape[1])
        for start in range(0, len(rows), step):
            self._gather.add(rows[start : start + step])

    def merge(self, other: StatisticsBuilder) -> None:
        """Take in everything that `other` gathered."""
        if other.dtype != self.dtype:
            raise ValueError(f"cannot merge statistics of {other.dtype} into those of {self.dtype}")
        self._gather.merge(other._gather)  # type: ignore[arg-type]

    def finish(self) -> Statistics:
        """The statistics of everything gathered; of nothing, zeros and `blank`."""
        return self._gather.finish()


class _Integers:
    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.levels = np.iinfo(dtype).max + 1
        self.histogram = np.zeros(self.levels, np.int64)
        self.in_runs = np.zeros(self.levels, np.int64)
        self.at_edges = np.zeros(self.levels, np.int64)

    def add(self, rows: np.ndarray) -> None:
        self.histogram += np.bincount(rows.ravel(), minlength=self.levels)
        for values, lengths in _long_runs(rows):
            np.add.at(self.in_runs, values, lengths)
        if self.levels == 256:
            for values in _noisy_edges(rows):
                self.at_edges += np.bincount(values, minlength=self.levels)

    def merge(self, other: _Integers) -> None:
        self.histogram += other.histogram
        self.in_runs += other.in_runs
        self.at_edges += other.at_edges

    def finish(self) -> Statistics:
        total = int(self.histogram.sum())
        if not total:
            return _NOTHING
        present = np.flatnonzero(self.histogram)
        kept = self.histogram.copy()
        for extreme in {int(present[0]), int(present[-1])}:
            if self.in_runs[extreme] >= _PADDING_SHARE * total:
                kept[extreme] -= self.in_runs[extreme]
        for noisy in (slice(0, TOLERANCE + 1), slice(255 - TOLERANCE, 256)) if self.levels == 256 else ():
            if self.at_edges[noisy].sum() >= _PADDING_SHARE * total:
                kept[noisy] = np.minimum(kept[noisy], self.histogram[noisy] - self.at_edges[noisy])
        if kept.sum() < _SMALLEST_FOREGROUND * total:
            kept = self.histogram
        count = int(kept.sum())
        levels = np.arange(self.levels, dtype=np.float64)
        mean = float(levels @ kept) / count
        std = math.sqrt(max(0.0, float((levels - mean) ** 2 @ kept) / count))
        low, high = _of_histogram(self.histogram, np.array([0.5, 99.5]))
        marks = np.flatnonzero(kept)
        return Statistics(
            count=count,
            mean=mean,
            std=std,
            minimum=float(marks[0]),
            maximum=float(marks[-1]),
            percentiles=_named(_of_histogram(kept, np.array(PERCENTILES))),
            foreground=count / total,
            nonfinite=0,
            blank=bool(low == high or std <= min(0.5, 0.005 * float(present[-1]))),
        )


class _Floats:
    """Moments by Chan's pairwise update; a systematic sample whose stride doubles whenever it overflows."""

    def __init__(self) -> None:
        self.count = self.nonfinite = self.seen = 0
        self.mean = self.squares = 0.0
        self.low, self.high = math.inf, -math.inf
        self.stride = 1
        self.sample = np.empty(0, np.float32)
        self.in_runs: dict[float, int] = {}

    def add(self, rows: np.ndarray) -> None:
        finite = np.isfinite(rows)
        for values, lengths in _long_runs(rows):
            self._count_runs(values, lengths)
        values = rows[finite] if not finite.all() else rows.ravel()
        self.nonfinite += rows.size - values.size
        if not values.size:
            return
        wide = values.astype(np.float64)
        mean = float(wide.mean())
        self._combine(values.size, mean, float(((wide - mean) ** 2).sum()))
        self.low, self.high = min(self.low, float(wide.min())), max(self.high, float(wide.max()))
        first = -self.seen % self.stride
        self.seen += values.size
        self.sample = np.concatenate([self.sample, values[first :: self.stride].astype(np.float32)])
        self._thin()

    def merge(self, other: _Floats) -> None:
        self._combine(other.count, other.mean, other.squares)
        self.nonfinite += other.nonfinite
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        for value, length in other.in_runs.items():
            self._count_runs(np.array([value]), np.array([length]))
        sample, stride = other.sample, other.stride
        while stride < self.stride:
            sample, stride = sample[::2], stride * 2
        while self.stride < stride:
            self.sample, self.stride = self.sample[::2], self.stride * 2
        self.seen += other.seen
        self.sample = np.concatenate([self.sample, sample])
        self._thin()

    def finish(self) -> Statistics:
        total = self.count + self.nonfinite
        if not self.count:
            return Statistics(**{**_NOTHING.to_dict(), "nonfinite": self.nonfinite})
        padding = [v for v in {self.low, self.high} if self.in_runs.get(v, 0) >= _PADDING_SHARE * total]
        removed = sum(self.in_runs[v] for v in padding)
        sample = self.sample[~np.isin(self.sample, np.array(padding, np.float32))] if padding else self.sample
        if not sample.size or self.count - removed < _SMALLEST_FOREGROUND * total:
            padding, removed, sample = [], 0, self.sample
        count = self.count - removed
        mean, squares = self._without(padding, count)
        std = math.sqrt(max(0.0, squares / count))
        low, high = np.percentile(self.sample, [0.5, 99.5])
        scale = max(abs(self.low), abs(self.high))
        return Statistics(
            count=count,
            mean=mean,
            std=std,
            minimum=float(sample.min()) if self.low in padding else self.low,
            maximum=float(sample.max()) if self.high in padding else self.high,
            percentiles=_named(np.percentile(sample, PERCENTILES)),
            foreground=count / total,
            nonfinite=self.nonfinite,
            blank=bool(low == high or std <= 1e-6 * scale),
        )

    def _without(self, padding: list[float], count: int) -> tuple[float, float]:
        """Mean and sum of squared deviations after taking the padding out again (Chan's update run backwards)."""
        mean, squares, left = self.mean, self.squares, self.count
        for value in padding:
            length = self.in_runs[value]
            rest = left - length
            without = (mean * left - value * length) / rest
            squares -= (value - without) ** 2 * length * rest / left
            mean, left = without, rest
        assert left == count
        return mean, squares

    def _combine(self, count: int, mean: float, squares: float) -> None:
        if not count:
            return
        total = self.count + count
        delta = mean - self.mean
        self.squares += squares + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    def _count_runs(self, values: np.ndarray, lengths: np.ndarray) -> None:
        for value, length in zip(values.tolist(), lengths.tolist(), strict=True):
            if math.isfinite(value) and (value in self.in_runs or len(self.in_runs) < _RUN_VALUES):
                self.in_runs[value] = self.in_runs.get(value, 0) + int(length)

    def _thin(self) -> None:
        while self.sample.size > _SAMPLE:
            self.sample, self.stride = self.sample[::2], self.stride * 2


_NOTHING = Statistics(0, 0.0, 0.0, 0.0, 0.0, {f"{p:g}": 0.0 for p in PERCENTILES}, 0.0, 0, True)


def pool(parts: Sequence[Statistics]) -> Statistics:
    """Statistics of several images together: moments are exact, percentiles are pixel-weighted means of the images'.

    Blank images are left out as long as there are others.
    """
    chosen = [part for part in parts if not part.blank] or list(parts)
    count = sum(part.count for part in chosen)
    if not count:
        return _NOTHING
    weights = np.array([part.count for part in chosen], np.float64) / count
    means = np.array([part.mean for part in chosen])
    mean = float(weights @ means)
    variance = float(weights @ (np.array([part.std for part in chosen]) ** 2 + (means - mean) ** 2))
    return Statistics(
        count=count,
        mean=mean,
        std=math.sqrt(variance),
        minimum=min(part.minimum for part in chosen),
        maximum=max(part.maximum for part in chosen),
        percentiles={key: float(weights @ [p.percentiles[key] for p in chosen]) for key in _NOTHING.percentiles},
        foreground=count / sum(part.count / part.foreground for part in chosen if part.foreground),
        nonfinite=sum(part.nonfinite for part in chosen),
        blank=all(part.blank for part in chosen),
    )


def measure(source: Source, *, limit_pixels: int = 1 << 24) -> Statistics:
    """Statistics of an image of any size from a fixed, evenly spread choice of bands of whole rows.

    Every run of the function on the same image reads the same bands; an image of up to `limit_pixels` is read whole.

    Raises:
        InputError: the data is damaged where it was read.
    """
    depth, height, width = source.info.shape_ZYX
    builder = StatisticsBuilder(source.info.dtype)
    for z, y0, y1 in _bands(depth, height, width, limit_pixels):
        builder.add(source.read(slice(z, z + 1), slice(y0, y1), slice(None)))
    return builder.finish()


def _bands(depth: int, height: int, width: int, limit: int) -> Iterator[tuple[int, int, int]]:
    """(section, first row, last row) of bands that hold about `limit` pixels together."""
    rows_wanted = max(1, limit // width)
    if depth * height <= rows_wanted:
        yield from ((z, 0, height) for z in range(depth))
        return
    sections = min(depth, 16)
    rows = max(1, rows_wanted // sections)
    pieces = min(4, height) if rows < height else 1
    tall = min(height, max(1, rows // pieces))
    for z in sorted({int((i + 0.5) * depth / sections) for i in range(sections)}):
        for y in sorted({int((j + 0.5) * (height - tall) / pieces) for j in range(pieces)}):
            yield z, y, y + tall


def _long_runs(rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(values, lengths) of the horizontal runs of at least `_RUN` equal pixels, for the rows that have any."""
    if rows.shape[1] < _RUN:
        return
    coarse = rows[:, ::_STRIDE]
    same = coarse[:, 1:] == coarse[:, :-1]
    likely = (same[:, 2:] & same[:, 1:-1] & same[:, :-2]).any(axis=1)
    for row in rows[likely]:
        edges = np.flatnonzero(row[1:] != row[:-1]) + 1
        starts = np.concatenate([[0], edges])
        lengths = np.diff(np.concatenate([starts, [row.size]]))
        long = lengths >= _RUN
        if long.any():
            yield row[starts[long]], lengths[long]


def _noisy_edges(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Pixels of runs of at least `_RUN` almost black or almost white uint8 pixels that begin at the left or right."""
    if rows.shape[1] < _RUN:
        return
    width = rows.shape[1]
    for beyond in (lambda pixels: pixels > TOLERANCE, lambda pixels: pixels < 255 - TOLERANCE):
        whole = np.zeros(len(rows), np.bool_)
        for side in (rows, rows[:, ::-1]):
            likely = np.flatnonzero(~beyond(side[:, :_RUN]).any(axis=1) & ~whole)
            if not likely.size:
                continue
            outside = beyond(side[likely])
            lengths = np.where(outside.any(axis=1), outside.argmax(axis=1), width)
            whole[likely[lengths == width]] = True
            yield side[likely][np.arange(width) < lengths[:, None]]


def _of_histogram(histogram: np.ndarray, percent: np.ndarray) -> np.ndarray:
    """Percentiles as numpy computes them (linear between order statistics), exactly, from counts per value."""
    cumulative = np.cumsum(histogram)
    position = percent / 100 * (cumulative[-1] - 1)
    below = np.searchsorted(cumulative, np.floor(position), side="right")
    above = np.searchsorted(cumulative, np.ceil(position), side="right")
    values: np.ndarray = below + (above - below) * (position - np.floor(position))
    return values


def _named(values: np.ndarray) -> dict[str, float]:
    return {f"{p:g}": float(v) for p, v in zip(PERCENTILES, values, strict=True)}
