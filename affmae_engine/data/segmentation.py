"""Training samples for segmentation: augmented crops of labelled sections, rare classes included.

What is unusual. A third of the crops (more, where much is unlabelled) are placed on a pixel of a class that is drawn
uniformly, from a small index of positions made once, so a class with 0.3 % of the pixels is seen all the time. A
sample is a pure function of (seed, index): nothing depends on the worker that makes it. Only the window that the warp
touches is read; a small labelled set, which is the rule, is kept in memory instead (reading is two thirds of the time).

Axes: Z Y X in the source, C H W in the sample.
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
from affmae_engine.data.labels import IGNORE
from affmae_engine.data.labels.problems import listed
from affmae_engine.data.normalise import Normalisation
from affmae_engine.data.segmentation_augment import (
    change_intensities,
    draw_intensities,
    draw_warp,
    largest_reach,
    source_coordinates,
    window_of,
)
from affmae_engine.data.split import Region
from affmae_engine.data.store import Store
from affmae_engine.errors import InputError
from affmae_kernels.training_crops import equalize
from affmae_kernels.warped_crops import Planes, warped_crops

_FOCUSED = 1 / 3
"""Smallest share of the crops that are placed on a pixel of a drawn class."""

_REMEMBERED = 64
"""Positions kept per class and section."""

_KEPT_BYTES = 128 << 20
"""Largest training set that each loading process keeps in memory, images and labels together."""

_SAMPLE_STREAM, _INDEX_STREAM = 1, 2  # tell the random streams of one seed apart


@dataclass(frozen=True)
class Section:
    """Rows y0 <= y < y1 of one section of an image in the store."""

    name: str
    z: int
    y0: int
    y1: int
    width: int

    @property
    def height(self) -> int:
        """Rows."""
        return self.y1 - self.y0

    def image(self, store: Store, y: slice = slice(None), x: slice = slice(None)) -> np.ndarray:
        """Stored intensities [Y, X] of a window, its rows counted from y0."""
        return store.read(self.name, slice(self.z, self.z + 1), self._rows(y), x)[0]

    def labels(
        self, store: Store, ignore_label: int | None, y: slice = slice(None), x: slice = slice(None)
    ) -> NDArray[np.int64]:
        """Classes [Y, X] of a window, `IGNORE` where the label is `ignore_label`."""
        stored = store.read_labels(self.name, slice(self.z, self.z + 1), self._rows(y), x)[0]
        classes = stored.astype(np.int64)
        if ignore_label is not None:
            classes[stored == ignore_label] = IGNORE
        return classes

    def _rows(self, y: slice) -> slice:
        start, stop, _ = y.indices(self.height)
        return slice(self.y0 + start, self.y0 + stop)


def sections_of(store: Store, regions: Sequence[Region]) -> list[Section]:
    """The regions section by section."""
    found = []
    for region in regions:
        _, height, width = store[region.name].shape_ZYX
        y0 = 0 if region.y0 is None else region.y0
        y1 = height if region.y1 is None else region.y1
        found += [Section(region.name, z, y0, y1, width) for z in range(region.z0, region.z1)]
    return found


def labelled_pixels(store: Store, sections: Sequence[Section], ignore_label: int | None) -> list[int]:
    """Labelled pixels of each section; nothing is read where no label says "not labelled"."""
    if ignore_label is None:
        return [section.height * section.width for section in sections]
    return [int(np.count_nonzero(section.labels(store, ignore_label) != IGNORE)) for section in sections]


@dataclass(frozen=True)
class ClassIndex:
    """How often the classes occur, and where to find them.

    counts: pixels per class. labelled: labelled pixels per section. positions: per class an int32 array
    [positions, 3] of (section, y, x), at most `_REMEMBERED` from a section.
    """

    counts: tuple[int, ...]
    labelled: NDArray[np.int64]
    positions: tuple[NDArray[np.int32], ...]

    @classmethod
    def build(
        cls, store: Store, sections: Sequence[Section], *, classes: int, ignore_label: int | None, seed: int
    ) -> ClassIndex:
        """Read the labels of all sections once.

        Raises:
            InputError: a label is no class (which, in a loss on a card, would end the whole process).
        """
        counts = np.zeros(classes, np.int64)
        labelled = np.zeros(len(sections), np.int64)
        positions: list[list[NDArray[np.int32]]] = [[] for _ in range(classes)]
        for number, section in enumerate(sections):
            labels_YX = section.labels(store, ignore_label)
            here = np.bincount(labels_YX.ravel() + 1, minlength=classes + 1)[1:]
            if len(here) > classes:
                foreign = np.flatnonzero(here[classes:]) + classes
                raise InputError(
                    f"labels of {section.name}, section {section.z}, have values {listed(foreign.tolist())}; "
                    f"the classes are 0 to {classes - 1}"
                )
            counts += here
            labelled[number] = here.sum()
            rng = np.random.default_rng([seed, _INDEX_STREAM, number])
            for present in np.flatnonzero(here):
                flat = rng.choice(np.flatnonzero(labels_YX == present), min(_REMEMBERED, here[present]), replace=False)
                y, x = np.divmod(flat, section.width)
                positions[present].append(np.stack([np.full_like(y, number), y, x], axis=1).astype(np.int32))
        empty = np.empty((0, 3), np.int32)
        return cls(tuple(counts.tolist()), labelled, tuple(np.concatenate([empty, *found]) for found in positions))


class SegmentationDataset:
    """Augmented crops of `config.image_size` pixels; `data.crop_scale` is for pretraining, here `finetune.scale` rules.

    Args:
        store: images and labels.
        regions: what to train on.
        config: `data`, `finetune` and the size of a crop.
        classes: number of classes.
        normalisation: of intensities.
        seed: of everything that is drawn.

    Raises:
        InputError: a label is no class, or nothing is labelled.
    """

    def __init__(
        self,
        store: Store,
        regions: Sequence[Region],
        config: RunConfig,
        *,
        classes: int,
        normalisation: Normalisation,
        seed: int,
    ) -> None:
        self.store, self.seed = store, seed
        self.sections = sections_of(store, regions)
        self.size, self.flips = config.image_size, config.data.flips
        self.settings = config.finetune
        self.index = ClassIndex.build(
            store, self.sections, classes=classes, ignore_label=config.finetune.ignore_label, seed=seed
        )
        labelled = self.index.labelled
        if not labelled.sum():
            raise InputError("no pixel of the training images is labelled", "label more, or change the split")
        self._cumulative = np.cumsum(labelled) / labelled.sum()
        self._present = [k for k, count in enumerate(self.index.counts) if count]
        pixels = sum(section.height * section.width for section in self.sections)
        self._focused = max(_FOCUSED, 1 - float(labelled.sum()) / pixels)
        self._maps = {name: normalisation.for_image(store[name].statistics) for name in {s.name for s in self.sections}}
        self.samples_per_epoch = max(1, round(pixels / self.size**2))
        widest = max(store[section.name].dtype.itemsize for section in self.sections)
        self._keep = pixels * (widest + np.dtype(np.int16).itemsize) <= _KEPT_BYTES
        # What is stored as bytes travels as bytes; a batch has one dtype, and windows of one size.
        self._as_uint8 = all(store[section.name].dtype == np.uint8 for section in self.sections)
        longest = max(max(section.height, section.width) for section in self.sections)
        self._largest = min(longest, 2 * math.ceil(largest_reach(self.size, self.settings)) + 5)
        self._clahe, self._backend = normalisation.clahe, config.kernels.backend
        self._label_dtype = np.uint8 if classes <= 255 else np.int16
        self._offsets: dict[Section, int] = {}
        self._on_device: tuple[Tensor, Tensor] | None = None
        self._kept: dict[Section, tuple[np.ndarray, NDArray[np.int16]]] = {}

    def sample(self, index: int, /) -> dict[str, Tensor]:
        """{"image": float32 [1, H, W], "labels": int64 [H, W] with `IGNORE` outside the image}."""
        batch = self.finish({name: tensor[None] for name, tensor in self._drawn(index, kept=False).items()})
        return {name: tensor[0] for name, tensor in batch.items()}

    def raw(self, index: int, /) -> dict[str, Tensor]:
        """Sample `index` for `finish`: what was drawn, and the window that it touches unless `keep_on` keeps it all."""
        return self._drawn(index, kept=bool(self._offsets))

    def _drawn(self, index: int, *, kept: bool) -> dict[str, Tensor]:
        """See `raw`; kept: `finish` will read from the sections on the device."""
        rng = np.random.default_rng([self.seed, _SAMPLE_STREAM, index])
        section, center = self._place(rng)
        warp = draw_warp(rng, self.size, self.settings, flips=self.flips)
        change = draw_intensities(rng, self.settings.photometric)
        noise_seed = rng.integers(2**31)
        intensity = self._maps[section.name]
        # Other gray values than bytes are normalized here, in double precision where that is needed.
        mean, std = (intensity.mean, intensity.std) if self._as_uint8 else (0.0, 1.0)
        drawn = {
            "matrix": torch.from_numpy(warp.matrix_22),
            "lattice": torch.from_numpy(warp.lattice_2PP),
            "center": torch.tensor(center, dtype=torch.float32),
            "shape": torch.tensor([section.height, section.width], dtype=torch.int32),
            "intensity": torch.tensor([mean, std, intensity.low, intensity.high], dtype=torch.float32),
            "change": torch.from_numpy(change),
            "noise_seed": torch.tensor(noise_seed, dtype=torch.int32),
        }
        if kept:
            return {**drawn, "offset": torch.tensor(self._offsets[section])}
        reach = warp.reach(self.size)
        rows = window_of(center[0], reach[0], section.height)
        columns = window_of(center[1], reach[1], section.width)
        image_YX, labels_YX = self._read(section, rows, columns)
        if not self._as_uint8:
            image_YX = intensity.standardise(image_YX)
        return {
            **drawn,
            "window": self._padded(image_YX, np.uint8 if self._as_uint8 else np.float32),
            "truth": self._padded(labels_YX, self._label_dtype),
            "start": torch.tensor([rows.start, columns.start], dtype=torch.int32),
        }

    def finish(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of `sample`s from one of `raw` samples, on the device where those are."""
        # Where each pixel comes from.
        place_B2HW = source_coordinates(batch["matrix"], batch["lattice"], self.size, self.settings.elastic)
        place_B2HW = place_B2HW + batch["center"][..., None, None]

        # Normalize, interpolate, equalize, change intensities.
        backend, outside = self._backend, int(np.array(IGNORE).astype(self._label_dtype))
        image_BHW, labels_BHW = warped_crops(
            self._planes(batch), place_B2HW, batch["intensity"], outside=outside, backend=backend
        )
        if self._clahe:
            image_BHW = equalize(image_BHW, batch["intensity"][:, 2], batch["intensity"][:, 3], backend=backend)
        if self.settings.photometric:
            image_BHW = change_intensities(image_BHW, batch["change"], batch["noise_seed"])
        if outside != IGNORE:
            labels_BHW = labels_BHW.masked_fill(labels_BHW == outside, IGNORE)
        return {"image": image_BHW[:, None], "labels": labels_BHW}

    def keep_on(self, device: torch.device, most_bytes: int) -> None:
        """Keep all sections on a device from here on, if their gray values are bytes and take no more than that."""
        pixels = sum(section.height * section.width for section in self.sections)
        size = pixels * (1 + np.dtype(self._label_dtype).itemsize)
        if self._offsets or not self._as_uint8 or size > most_bytes:
            return
        gray, labels, start = [], [], 0
        for section in self.sections:
            gray.append(torch.from_numpy(section.image(self.store).ravel()))
            classes_YX = section.labels(self.store, self.settings.ignore_label).astype(self._label_dtype)
            labels.append(torch.from_numpy(classes_YX.ravel()))
            self._offsets[section] = start
            start += section.height * section.width
        self._on_device = torch.cat(gray).to(device), torch.cat(labels).to(device)

    def _planes(self, batch: dict[str, Tensor]) -> Planes:
        """Where the pixels of a batch are: in the sections on the device, or in the windows of the batch."""
        shape_B2 = batch["shape"]
        if "offset" in batch and self._on_device is not None:
            gray_N, labels_N = self._on_device
            width_B = shape_B2[:, 1].contiguous()
            return Planes(gray_N, labels_N, batch["offset"], width_B, torch.zeros_like(shape_B2), shape_B2)
        window_BYX, truth_BYX = batch["window"], batch["truth"]
        count, height, width = window_BYX.shape
        offset_B = torch.arange(count, device=shape_B2.device) * (height * width)
        width_B = torch.full((count,), width, dtype=torch.int32, device=shape_B2.device)
        return Planes(window_BYX.flatten(), truth_BYX.flatten(), offset_B, width_B, batch["start"], shape_B2)

    def _padded(self, values_YX: np.ndarray, dtype: Any) -> Tensor:
        padded_YX = np.zeros((self._largest, self._largest), dtype)
        padded_YX[: values_YX.shape[0], : values_YX.shape[1]] = values_YX
        return torch.from_numpy(padded_YX)

    def _read(self, section: Section, y: slice, x: slice) -> tuple[np.ndarray, NDArray[np.integer]]:
        """Intensities and classes of a window."""
        ignore = self.settings.ignore_label
        if not self._keep:
            return section.image(self.store, y, x), section.labels(self.store, ignore, y, x)
        if section not in self._kept:
            labels_YX = section.labels(self.store, ignore).astype(np.int16)
            self._kept[section] = section.image(self.store), labels_YX
        image_YX, labels_YX = self._kept[section]
        return image_YX[y, x], labels_YX[y, x]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_on_device": None}

    def describe(self, index: int, /) -> str:
        """Which section sample `index` is cut from, for error messages."""
        section, _ = self._place(np.random.default_rng([self.seed, _SAMPLE_STREAM, index]))
        return f"{section.name}, section {section.z}"

    def _place(self, rng: np.random.Generator) -> tuple[Section, tuple[float, float]]:
        """A section and the centre of the crop in it, so that the upright crop stays inside where it can."""
        if rng.random() < self._focused:
            positions = self.index.positions[self._present[rng.integers(len(self._present))]]
            number, y, x = positions[rng.integers(len(positions))].tolist()
            jitter = rng.uniform(-self.size / 4, self.size / 4, size=2)
            wished: tuple[float, float] = (y + jitter[0], x + jitter[1])
        else:
            number = int(np.searchsorted(self._cumulative, rng.random(), side="right"))
            drawn = self.sections[number]
            wished = (rng.uniform(0, drawn.height), rng.uniform(0, drawn.width))
        section = self.sections[number]
        sides = zip(wished, (section.height, section.width), strict=True)
        cy, cx = (_kept_inside(centre, length, self.size) for centre, length in sides)
        return section, (cy, cx)


def _kept_inside(centre: float, length: int, size: int) -> float:
    half = (size - 1) / 2
    return float(np.clip(centre, half, length - 1 - half)) if length > size else (length - 1) / 2
