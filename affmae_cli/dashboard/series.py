"""Curves over a whole run in bounded memory, however long it is.

A series keeps at most `capacity` buckets. Each bucket holds the mean and the extremes of `stride` consecutive points;
when the buckets are full, neighbours are merged and the stride doubles. So a spike of one step stays visible in a run
of a million, and a short run is kept point by point. When x goes back (a resumed run repeats steps) the earlier points
from there on are dropped: the later line wins. A bucket across that place goes as a whole, which costs fewer than
`stride` points of the earlier part.

Axes: N points or buckets.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CAPACITY = 8192
_BLOCK = 128


@dataclass(frozen=True)
class Curve:
    """What is drawn: at most as many points as were asked for.

    x_N: float64, the last x of each point. mean_N, low_N, high_N: float32; NaN where there was no value.
    """

    x_N: np.ndarray
    mean_N: np.ndarray
    low_N: np.ndarray
    high_N: np.ndarray

    def __len__(self) -> int:
        return len(self.x_N)


_EMPTY = Curve(*(np.zeros(0) for _ in range(4)))


@dataclass
class _Buckets:
    """first_N, last_N: x of the first and last point of each bucket. offset_N: byte offset of the first one. count_N:
    points. values: float32 [3, N] by column: mean, low, high."""

    first_N: np.ndarray
    last_N: np.ndarray
    offset_N: np.ndarray
    count_N: np.ndarray
    values: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.last_N)

    def __getitem__(self, chosen: slice) -> _Buckets:
        return _Buckets(
            self.first_N[chosen],
            self.last_N[chosen],
            self.offset_N[chosen],
            self.count_N[chosen],
            {name: value[:, chosen] for name, value in self.values.items()},
        )

    def only(self, names: Sequence[str]) -> _Buckets:
        """The same with fewer columns."""
        values = {name: self.values[name] for name in names if name in self.values}
        return _Buckets(self.first_N, self.last_N, self.offset_N, self.count_N, values)

    def joined(self, other: _Buckets) -> _Buckets:
        """These and then those; a column that one side lacks is NaN there."""
        values = {}
        for name in {**self.values, **other.values}:
            parts = [side.values.get(name, np.full((3, len(side)), np.nan, np.float32)) for side in (self, other)]
            values[name] = np.concatenate(parts, axis=1)
        return _Buckets(
            np.concatenate([self.first_N, other.first_N]),
            np.concatenate([self.last_N, other.last_N]),
            np.concatenate([self.offset_N, other.offset_N]),
            np.concatenate([self.count_N, other.count_N]),
            values,
        )

    def merged(self, group: int) -> _Buckets:
        """Every `group` neighbours as one; the last group may be smaller."""
        if group <= 1 or not len(self):
            return self
        starts = np.arange(0, len(self), group)
        ends = np.append(starts[1:], len(self)) - 1
        return _Buckets(
            self.first_N[starts],
            self.last_N[ends],
            self.offset_N[starts],
            np.add.reduceat(self.count_N, starts),
            {name: _merge(value, self.count_N, starts) for name, value in self.values.items()},
        )


def _merge(value_3N: np.ndarray, count_N: np.ndarray, starts: np.ndarray) -> np.ndarray:
    mean_N, low_N, high_N = value_3N
    known_N = np.where(np.isnan(mean_N), 0, count_N)
    total = np.add.reduceat(known_N, starts)
    weighted = np.add.reduceat(np.where(known_N > 0, mean_N, 0).astype(np.float64) * known_N, starts)
    mean = np.divide(weighted, total, out=np.full(len(starts), np.nan), where=total > 0)
    return np.stack([mean, np.fmin.reduceat(low_N, starts), np.fmax.reduceat(high_N, starts)]).astype(np.float32)


class Series:
    """Named columns over one rising x."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._stride = 1
        self._full = _points(np.zeros(0), np.zeros(0, np.int64), {})
        self._rest = self._full

    @property
    def stride(self) -> int:
        """Points in one bucket."""
        return self._stride

    @property
    def names(self) -> list[str]:
        """Columns that had a value so far."""
        return list({**self._full.values, **self._rest.values})

    @property
    def extent(self) -> tuple[float, float] | None:
        """First and last x; None while it is empty."""
        kept = self._all()
        return (float(kept.first_N[0]), float(kept.last_N[-1])) if len(kept) else None

    def __len__(self) -> int:
        """Points so far, those that were merged included."""
        return int(self._full.count_N.sum()) + len(self._rest)

    def add(self, x_N: np.ndarray, columns: Mapping[str, np.ndarray], offset_N: np.ndarray | None = None) -> None:
        """Append points; from a place where x does not rise, they replace what was there."""
        x_N = np.asarray(x_N, np.float64)
        offset_N = np.zeros(len(x_N), np.int64) if offset_N is None else offset_N
        edges = [0, *(np.flatnonzero(np.diff(x_N) <= 0) + 1).tolist(), len(x_N)]
        for start, end in itertools.pairwise(edges):
            if start < end:
                self.cut(float(x_N[start]))
                part = {name: np.asarray(value[start:end], np.float32) for name, value in columns.items()}
                self._append(_points(x_N[start:end], offset_N[start:end], part))

    def cut(self, x: float) -> None:
        """Drop everything from `x` on."""
        if len(self._rest) and self._rest.last_N[-1] >= x:
            self._rest = self._rest[: int(np.searchsorted(self._rest.last_N, x))]
        if len(self._full) and self._full.last_N[-1] >= x:
            self._rest = self._rest[:0]
            self._full = self._full[: int(np.searchsorted(self._full.last_N, x))]

    def curve(
        self, name: str, *, low: float = -math.inf, high: float = math.inf, points: int = 400, smooth: float = 0.0
    ) -> Curve:
        """A column between two x, both included, in at most `points` points.

        Args:
            name: of a column; one that does not exist gives an empty curve.
            low: smallest x.
            high: largest x.
            points: at most so many.
            smooth: weight of the past in an exponential mean over the stored points, 0 (none) to below 1. Extremes
                stay those of the data.
        """
        if name not in self.names:
            return _EMPTY
        kept = self._all(name)
        if smooth > 0:
            kept.values[name][0] = smoothed(kept.values[name][0], smooth)
        chosen = slice(int(np.searchsorted(kept.last_N, low)), int(np.searchsorted(kept.first_N, high, side="right")))
        window = kept[chosen]
        window = window.merged(-(-len(window) // max(1, points)))
        return Curve(window.last_N, *window.values[name])

    def byte_range(self, low: float, high: float) -> tuple[int, int | None]:
        """Where in the file the points between two x lie: first byte, and the byte after them (None: to its end)."""
        kept = self._all()
        start = int(np.searchsorted(kept.last_N, low))
        end = int(np.searchsorted(kept.first_N, high, side="right"))
        if start >= len(kept):
            return 0, 0
        return int(kept.offset_N[start]), int(kept.offset_N[end]) if end < len(kept) else None

    def _all(self, *names: str) -> _Buckets:
        """A copy of everything, with these columns alone."""
        return self._full.only(names).joined(self._rest.only(names).merged(self._stride))

    def _append(self, new: _Buckets) -> None:
        rest = self._rest.joined(new) if len(self._rest) else new
        while len(self._full) + len(rest) // self._stride > self._capacity:
            self._full = self._full.merged(2)
            self._stride *= 2
        whole = len(rest) // self._stride * self._stride
        if whole:
            self._full = self._full.joined(rest[:whole].merged(self._stride))
        self._rest = rest[whole:]


def smoothed(value_N: np.ndarray, weight: float) -> np.ndarray:
    """Exponential mean that starts at the first value (bias-corrected) and passes over NaN."""
    out_N = np.full(len(value_N), np.nan, np.float32)
    known_N = ~np.isnan(value_N)
    count = int(known_N.sum())
    if not count:
        return out_N
    # Block by block as a product with the weights of the past: a loop over points would take most of a viewer's time.
    blocks = -(-count // _BLOCK)
    padded = np.zeros(blocks * _BLOCK)
    padded[:count] = value_N[known_N]
    powers = weight ** np.arange(_BLOCK + 1)
    lag = np.subtract.outer(np.arange(_BLOCK), np.arange(_BLOCK))
    means = padded.reshape(blocks, _BLOCK) @ ((1 - weight) * np.where(lag >= 0, powers[np.abs(lag)], 0)).T
    for block in range(1, blocks):
        means[block] += powers[1:] * means[block - 1, -1]
    out_N[known_N] = means.reshape(-1)[:count] / (1 - weight ** np.arange(1, count + 1))
    return out_N


def _points(x_N: np.ndarray, offset_N: np.ndarray, columns: Mapping[str, np.ndarray]) -> _Buckets:
    values = {name: np.stack([value] * 3) for name, value in columns.items()}
    return _Buckets(x_N, x_N, offset_N, np.ones(len(x_N), np.int64), values)
