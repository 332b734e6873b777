"""Pretraining samples: random square crops of the store, each with its mask.

Sample i is a pure function of (seed, i): image, section, place, size, turn and mask all come from it, so nothing
depends on workers, ranks or on where a run was resumed. Only the chunks under the crop are read. Unusual: images are
chosen in proportion to their pixels, not once per file; blank images are left out and (nearly) uniform crops, such as
empty resin or padding, are drawn again a few times. A sample is made in two parts: `raw` reads in a data-loading
process, `finish` computes for a whole batch, on the GPU where there is one.

Axes: Z Y X image, C H W sample, V visible and Q masked tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from affmae_engine.config import RunConfig
from affmae_engine.data.augment import Crop, draw_crop, draw_turn
from affmae_engine.data.loading import sample_error
from affmae_engine.data.normalise import IntensityMap, Normalisation
from affmae_engine.data.split import Region
from affmae_engine.data.store import Store
from affmae_engine.errors import InputError
from affmae_engine.model.masking import draw_mask
from affmae_engine.model.patches import canvas_of
from affmae_kernels.training_crops import training_crops

MAX_DRAWS = 6
"""Crops drawn for one sample before a uniform one is accepted."""

UNIFORM_STD = 0.05
"""A crop whose deviation is below this share of its image's shows nothing."""

LARGEST_ENLARGEMENT = 8
"""Images with a side shorter than this fraction of the crop are left out: enlarged further they are only blur."""


@dataclass(frozen=True)
class Plane:
    """The part of an image that may be cropped: sections z0 <= z < z1, rows y0 <= y < y1, all columns."""

    name: str
    z0: int
    z1: int
    y0: int
    y1: int
    width: int
    intensity: IntensityMap

    @property
    def shape_YX(self) -> tuple[int, int]:
        """Rows and columns of one section."""
        return self.y1 - self.y0, self.width

    @property
    def pixels(self) -> int:
        """Pixels of all sections."""
        return (self.z1 - self.z0) * (self.y1 - self.y0) * self.width


def croppable_planes(
    store: Store, regions: Sequence[Region], normalisation: Normalisation, size: int
) -> tuple[list[Plane], list[str]]:
    """The regions that are worth cropping, and notes on those that are not.

    Args:
        size: edge of a training image, in pixels.

    Returns:
        planes in the order of the regions; a sentence for each kind of region that was left out or is enlarged.
    """
    planes, blank, small, enlarged = [], [], [], []
    for region in regions:
        image = store[region.name]
        height, width = image.shape_ZYX[1:]
        plane = Plane(
            region.name,
            region.z0,
            region.z1,
            region.y0 or 0,
            height if region.y1 is None else region.y1,
            width,
            normalisation.for_image(image.statistics),
        )
        shorter = min(plane.shape_YX)
        if image.statistics.blank or not plane.intensity.std > 0:
            blank.append(region.name)
        elif shorter * LARGEST_ENLARGEMENT < size:
            small.append(region.name)
        else:
            planes.append(plane)
            if shorter < size:
                enlarged.append(region.name)
    notes = []
    if blank:
        notes.append(f"{_counted(blank)} blank and left out")
    if small:
        notes.append(f"{_counted(small)} smaller than {-(-size // LARGEST_ENLARGEMENT)} pixels and left out")
    if enlarged:
        notes.append(f"{_counted(enlarged)} smaller than data.crop_size ({size} pixels): crops of them are enlarged")
    return planes, notes


def read_crop(store: Store, plane: Plane, z: int, crop: Crop) -> NDArray[Any]:
    """The stored gray values [edge, edge] of a crop. `crop` counts from the first row of the plane.

    Raises:
        CorruptError, InputError, ResourceError: it cannot be read; the message names the image and the section.
    """
    try:
        y0 = plane.y0 + crop.y
        return store.read(plane.name, slice(z, z + 1), slice(y0, y0 + crop.edge), slice(crop.x, crop.x + crop.edge))[0]
    except Exception as error:
        raise sample_error(error, f"section {z} of image {plane.name!r}") from error


def load_crop(store: Store, plane: Plane, z: int, crop: Crop, size: int) -> NDArray[np.float32]:
    """One crop as a training image [size, size], not turned; raises as `read_crop`."""
    raw = _record(read_crop(store, plane, z, crop), plane.intensity, crop.edge, turn=0, as_uint8=False)
    batch = {name: tensor[None] for name, tensor in raw.items()}
    clahe = plane.intensity.clahe
    return training_crops(batch["crop"], batch["window"], batch["intensity"], size, clahe=clahe)[0].numpy()


class PretrainDataset:
    """Random crops and masks by index; satisfies `train.task.SampleSource`. Can be pickled, opens its own handles.

    Args:
        store: the images.
        regions: what may be trained on.
        config: `data`, `mask` and the size of a training image.
        seed: of everything that is drawn.

    Attributes:
        notes: sentences on images that were left out or are enlarged.

    Raises:
        InputError: no region can be cropped.
    """

    def __init__(self, store: Store, regions: Sequence[Region], config: RunConfig, *, seed: int) -> None:
        self.store, self.config, self.seed = store, config, seed
        self.size = config.image_size
        self.canvas_hw = canvas_of(self.size, self.size, config.model.patch_size)
        normalisation = Normalisation.from_store(config.data, store)
        self.planes, self.notes = croppable_planes(store, regions, normalisation, self.size)
        if not self.planes:
            raise InputError(
                f"nothing to train on: {'; '.join(self.notes) or 'no images'}",
                "add images, or choose a smaller data.crop_size",
            )
        self._ends = np.cumsum([plane.pixels for plane in self.planes])
        self._largest = max(self.size, math.ceil(self.size * config.data.crop_scale[1]))
        # What is stored as bytes travels as bytes; a batch has one dtype.
        self._as_uint8 = all(store[plane.name].dtype == np.uint8 for plane in self.planes)

    @property
    def samples_per_epoch(self) -> int:
        """Crop-sized tiles in the regions; at least one per section."""
        return sum(
            (plane.z1 - plane.z0) * max(1, round(plane.shape_YX[0] * plane.shape_YX[1] / self.size**2))
            for plane in self.planes
        )

    def sample(self, index: int, /) -> dict[str, Tensor]:
        """Sample `index`: "image" [C, H, W] float32, "visible" [V] and "masked" [Q] int64 canvas indices.

        Raises:
            CorruptError, InputError, ResourceError: the crop cannot be read; the message names its image.
        """
        batch = self.finish({name: tensor[None] for name, tensor in self.raw(index).items()})
        return {name: tensor[0] for name, tensor in batch.items()}

    def raw(self, index: int, /) -> dict[str, Tensor]:
        """Sample `index` for `finish`: what `training_crops` takes, "visible" and "masked"; raises as `sample`."""
        rng = self._generator(index)
        for _ in range(MAX_DRAWS):
            plane, z = self._draw_section(rng)
            crop = draw_crop(rng, plane.shape_YX, self.size, self.config.data.crop_scale)
            gray_YX = read_crop(self.store, plane, z, crop)
            if gray_YX.std(dtype=np.float32) >= UNIFORM_STD * plane.intensity.std:
                break
        turn = draw_turn(rng) if self.config.data.flips else 0
        record = _record(gray_YX, plane.intensity, self._largest, turn=turn, as_uint8=self._as_uint8)
        visible_V, masked_Q = draw_mask(self.canvas_hw, self.config.mask, seed=self.seed, index=index)
        return {**record, "visible": visible_V, "masked": masked_Q}

    def finish(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of `sample`s from one of `raw` samples, on the device where those are."""
        image_BYX = training_crops(
            batch["crop"],
            batch["window"],
            batch["intensity"],
            self.size,
            clahe=self.config.data.clahe,
            backend=self.config.kernels.backend,
        )
        image_BCYX = image_BYX[:, None].repeat(1, self.config.model.channels, 1, 1)
        return {"image": image_BCYX, "visible": batch["visible"], "masked": batch["masked"]}

    def describe(self, index: int) -> str:
        """Image and section that sample `index` reads first."""
        plane, z = self._draw_section(self._generator(index))
        return f"section {z} of image {plane.name!r}"

    def _generator(self, index: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence([self.seed, index]))

    def _draw_section(self, rng: np.random.Generator) -> tuple[Plane, int]:
        pixel = rng.integers(self._ends[-1])
        plane = self.planes[int(np.searchsorted(self._ends, pixel, side="right"))]
        return plane, int(rng.integers(plane.z0, plane.z1))


def _record(
    gray_YX: NDArray[Any], intensity: IntensityMap, largest: int, *, turn: int, as_uint8: bool
) -> dict[str, Tensor]:
    """A crop of edge <= `largest` as `training_crops` takes it: "crop" [E, E], "window" [2], "intensity" [4].

    Gray values that are not sent as bytes are normalized here, in double precision where that is needed.
    """
    edge, mean, std = len(gray_YX), intensity.mean, intensity.std
    if not as_uint8:
        gray_YX, mean, std = intensity.standardise(gray_YX), 0.0, 1.0
    crop_YX = np.zeros((largest, largest), gray_YX.dtype)
    crop_YX[:edge, :edge] = gray_YX
    return {
        "crop": torch.from_numpy(crop_YX),
        "window": torch.tensor([edge, turn], dtype=torch.int32),
        "intensity": torch.tensor([mean, std, intensity.low, intensity.high], dtype=torch.float32),
    }


def as_channels(square_YX: NDArray[np.float32], channels: int) -> Tensor:
    """A grey square as [C, H, W]; more than one channel repeats it."""
    return torch.from_numpy(square_YX)[None].expand(channels, -1, -1).contiguous()


def _counted(names: list[str]) -> str:
    """ "image 'a' is" or "3 images ('a', 'b', ...) are"; regions of one image count once."""
    distinct = list(dict.fromkeys(names))
    if len(distinct) == 1:
        return f"image {distinct[0]!r} is"
    shown = ", ".join(repr(name) for name in distinct[:2])
    return f"{len(distinct)} images ({shown}{', ...' if len(distinct) > 2 else ''}) are"
