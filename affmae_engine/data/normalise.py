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
import torch
from numpy.typing import NDArray

from affmae_engine.errors import CorruptError
from affmae_kernels.training_crops import OUTLIER, equalize

if TYPE_CHECKING:
    from affmae_engine.config import DataConfig
    from affmae_engine.data.statistics import Statistics
    from affmae_engine.data.store import Store


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
        planes = torch.from_numpy(np.ascontiguousarray(standardised)).reshape(-1, *standardised.shape[-2:])
        low, high = (torch.full((len(planes),), limit) for limit in (self.low, self.high))
        return equalize(planes, low, high).numpy().reshape(standardised.shape)


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
