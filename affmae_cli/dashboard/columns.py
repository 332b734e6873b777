"""Figures of a run as numpy columns over a rising x, in bounded memory.

Above `CAPACITY` rows, rows are merged into half as many bins of equal width. A merged row has the mean of each column
and its lowest and highest value, so that a spike of one step stays visible in a run of a million.

Axes: N rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
CAPACITY = 16_384
_LARGEST = 1e300


class Columns:
    """Columns by name. Arrays are replaced, never changed, so another thread may read them at any time.

    x_N: float64, rising. weight_N: how many points a row stands for. values: [3, N] by name: mean, lowest and highest
    value; NaN where there was none.
    """

    def __init__(self) -> None:
        self.x_N: Floats = np.zeros(0)
        self.weight_N: Floats = np.zeros(0)
        self.values: dict[str, Floats] = {}

    def __len__(self) -> int:
        return len(self.x_N)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def get(self, name: str) -> tuple[Floats, Floats]:
        """x [N] and values [3, N] of a column, cut to the same length; empty where there is none."""
        x_N, value_3N = self.x_N, self.values.get(name)
        if value_3N is None:
            return np.zeros(0), np.zeros((3, 0))
        length = min(len(x_N), value_3N.shape[1])
        return x_N[:length], value_3N[:, :length]

    def last(self, name: str, count: int = 1) -> float:
        """Mean of the last `count` known values of a column; NaN without any."""
        value_N = self.get(name)[1][0]
        known = value_N[np.isfinite(value_N)][-count:]
        return float(known.mean()) if len(known) else float("nan")

    def extend(self, x: Sequence[float], rows: Sequence[Mapping[str, float | None]]) -> None:
        """Append rows; one whose x is not higher than the one before replaces what came from there on."""
        start = 0
        for index in range(1, len(x) + 1):
            if index == len(x) or x[index] <= x[index - 1]:
                self.cut(x[start])
                self._append(np.array(x[start:index], np.float64), rows[start:index])
                start = index

    def cut(self, x: float) -> None:
        """Drop the rows from `x` on."""
        keep = int(np.searchsorted(self.x_N, x))
        if keep < len(self.x_N):
            self.values = {name: value[:, :keep] for name, value in self.values.items()}
            self.x_N, self.weight_N = self.x_N[:keep], self.weight_N[:keep]

    def _append(self, x_N: Floats, rows: Sequence[Mapping[str, float | None]]) -> None:
        before, found = len(self.x_N), {}
        for name in {**self.values, **{name: 0 for row in rows for name in row}}:
            new_N = np.array([row.get(name) for row in rows], np.float64)
            new_N[~(np.abs(new_N) < _LARGEST)] = np.nan
            old_3N = self.values.get(name)
            old_3N = np.full((3, before), np.nan) if old_3N is None else old_3N
            found[name] = np.concatenate([old_3N, np.stack([new_N] * 3)], axis=1)
        weight_N = np.concatenate([self.weight_N, np.ones(len(x_N))])
        x_N = np.concatenate([self.x_N, x_N])
        if len(x_N) > CAPACITY:
            x_N, weight_N, found = _merged(x_N, weight_N, found, CAPACITY // 2)
        self.values, self.x_N, self.weight_N = found, x_N, weight_N


def downsampled(x_N: Floats, value_3N: Floats, bins: int) -> tuple[Floats, Floats]:
    """At most `bins` rows of a column, with the extremes of what was merged."""
    if len(x_N) <= bins:
        return x_N, value_3N
    x_N, _, found = _merged(x_N, np.ones(len(x_N)), {"": value_3N}, bins)
    return x_N, found[""]


def _merged(
    x_N: Floats, weight_N: Floats, values: Mapping[str, Floats], bins: int
) -> tuple[Floats, Floats, dict[str, Floats]]:
    """Rows in at most `bins` bins of equal width in x; the x of a bin is that of its last row."""
    number_N = np.minimum((x_N - x_N[0]) / max(x_N[-1] - x_N[0], 1e-300) * bins, bins - 1).astype(np.int64)
    first = np.flatnonzero(np.diff(number_N, prepend=-1))
    last = np.append(first[1:], len(x_N)) - 1
    merged = {}
    for name, (mean_N, low_N, high_N) in values.items():
        known_N = np.where(np.isfinite(mean_N), weight_N, 0.0)
        total = np.add.reduceat(known_N, first)
        sums = np.add.reduceat(np.where(known_N > 0, mean_N, 0.0) * known_N, first)
        mean = np.divide(sums, total, out=np.full(len(first), np.nan), where=total > 0)
        merged[name] = np.stack([mean, np.fmin.reduceat(low_N, first), np.fmax.reduceat(high_N, first)])
    return x_N[last], np.add.reduceat(weight_N, first), merged
