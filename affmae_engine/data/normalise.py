"""From stored intensities to what the network sees: zero mean, unit standard deviation, optionally CLAHE.

One `Normalisation` belongs to a run and travels with its weights; `for_image` makes the map of one image from that
image's own statistics. Unusual: the map is a fixed function of the image's statistics, never of the crop or tile it is
applied to, so training crops, prediction tiles and bands of one plane agree. CLAHE is the exception by its nature: it
looks at surrounding pixels. Its input range, its output scale and the edge of its tiles are still fixed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from skimage.exposure import equalize_adapthist

from affmae_engine.errors import CorruptError

if TYPE_CHECKING:
    from affmae_engine.config import DataConfig
    from affmae_engine.data.statistics import Statistics
    from affmae_engine.data.store import Store

OUTLIER = 10.0
"""Largest magnitude of a normalised pixel, in standard deviations: one hot pixel must not own the squared error."""

CLAHE_TILE = 64
"""Edge of a CLAHE tile in pixels: an eighth of the paper's 512-pixel image."""

CLAHE_CLIP = 0.01
"""Contrast limit of CLAHE, as a share of the pixels of a tile."""

# CLAHE spreads grey values over 0..1; these make that zero mean and unit deviation up to some ten per cent.
_CLAHE_CENTRE = 0.5
_CLAHE_SCALE = 0.25


@dataclass(frozen=True)
class IntensityMap:
    """The intensity map of one image. Call it on any part of that image.

    mean, std: of the image or of the dataset, in stored intensities; std 0 maps everything to 0.
    low, high: 0.5th and 99.5th percentile in standard deviations from the mean, CLAHE's input range.
    """

    mean: float
    std: float
    low: float = -2.6
    high: float = 2.6
    clahe: bool = False

    def __call__(self, array: NDArray[Any]) -> NDArray[np.float32]:
        """Normalise an array [..., Y, X] of any real dtype; float32 of the same shape, always finite."""
        return self.equalise(self.standardise(array))

    def standardise(self, array: NDArray[Any]) -> NDArray[np.float32]:
        """The linear part: (x - mean) / std, NaN and infinities become the mean (0), outliers are cut at `OUTLIER`."""
        if not self.std > 0:
            return np.zeros(array.shape, np.float32)
        # Wide integers and floats are centred in double precision: float32 would round them before the subtraction.
        wide = array.dtype.itemsize >= 4
        centred = np.subtract(array, self.mean, dtype=np.float64 if wide else np.float32)
        centred /= self.std
        result = centred.astype(np.float32, copy=False)
        if array.dtype.kind == "f":
            finite = np.isfinite(array)
            if not finite.all():
                result[~finite] = 0
        return np.clip(result, -OUTLIER, OUTLIER, out=result)

    def equalise(self, standardised: NDArray[np.float32]) -> NDArray[np.float32]:
        """The CLAHE part, on planes [..., Y, X] that `standardise` returned; gives them back when CLAHE is off."""
        if not self.clahe or not self.high > self.low:
            return standardised
        planes = standardised.reshape(-1, *standardised.shape[-2:])
        equalised = [self._equalise_plane(plane) for plane in planes]
        return np.stack(equalised).reshape(standardised.shape)

    def _equalise_plane(self, plane_YX: NDArray[np.float32]) -> NDArray[np.float32]:
        # Clipped last: rounding may leave 1.0000001, which the library refuses.
        unit = np.clip((plane_YX - self.low) / (self.high - self.low), 0, 1)
        if unit.min() == unit.max():
            return np.zeros_like(plane_YX)
        kernel = tuple(min(CLAHE_TILE, side) for side in unit.shape)
        # The library stretches its input to its own minimum and maximum; two extra pixels at the limits, in a margin
        # that is cut off again, keep that stretch the same for every part of an image.
        padded = np.pad(unit, ((0, 1), (0, 0)), mode="edge")
        padded[-1, 0], padded[-1, -1] = 0.0, 1.0
        equalised = equalize_adapthist(padded, kernel_size=kernel, clip_limit=CLAHE_CLIP)[:-1]
        return ((equalised - _CLAHE_CENTRE) / _CLAHE_SCALE).astype(np.float32)


@dataclass(frozen=True)
class Normalisation:
    """How a run normalises intensities; stored in its weights.

    mode: `image` takes each image's own mean and deviation, `dataset` the stored ones.
    mean, std: of the training data, in stored intensities; used by mode `dataset`.
    clahe: contrast-limited adaptive histogram equalisation after that.
    """

    mode: Literal["image", "dataset"] = "image"
    mean: float = 0.0
    std: float = 1.0
    clahe: bool = False

    @classmethod
    def from_store(cls, config: DataConfig, store: Store) -> Normalisation:
        """The normalisation that `config` asks for, with the mean and deviation of the store's foreground."""
        statistics = store.statistics
        return cls(config.normalisation, float(statistics.mean), float(statistics.std), config.clahe)

    def for_image(self, statistics: Statistics) -> IntensityMap:
        """The map of one image, given its own statistics."""
        mean, std = (statistics.mean, statistics.std) if self.mode == "image" else (self.mean, self.std)
        mean, std = float(mean), float(std)
        # A deviation that is rounding noise of the mean is a constant image.
        if not (math.isfinite(mean) and math.isfinite(std)) or std <= 1e-12 * abs(mean):
            return IntensityMap(0.0, 0.0, clahe=self.clahe)
        if not self.clahe:
            return IntensityMap(mean, std)
        low = (float(statistics.percentiles["0.5"]) - mean) / std
        high = (float(statistics.percentiles["99.5"]) - mean) / std
        return IntensityMap(mean, std, low, high, clahe=True)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Normalisation:
        """Read what `to_dict` wrote.

        Raises:
            CorruptError: a field is missing, unknown or of the wrong kind.
        """
        try:
            mode, mean, std, clahe = (record[name] for name in ("mode", "mean", "std", "clahe"))
            if mode not in ("image", "dataset") or not isinstance(clahe, bool):
                raise ValueError(f"mode {mode!r}, clahe {clahe!r}")
            return cls(mode, float(mean), float(std), clahe)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"the stored normalisation cannot be read: {error!r}") from error
