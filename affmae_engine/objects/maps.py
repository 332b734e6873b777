"""What objects are made from: class maps or class probabilities, a boundary map, a distance map, read by windows.

A kind is a class, or several classes taken together (`cytoplasm+mitochondria` makes whole cells), that becomes objects.

Axes: Z Y X.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from affmae_engine.data.readers import PixelSize, Source
from affmae_engine.data.readers.files import size_and_mtime
from affmae_engine.errors import ConfigError, InputError
from affmae_engine.objects import volumes
from affmae_engine.objects.blocks import Shape, row_blocks

_SCANNED_VOXELS = 1 << 25
BOUNDARY, DISTANCE = "boundary", "distance"
"""Names of the channels, beside those of the classes, that a network trained on objects predicts."""


@dataclass(frozen=True)
class MapFiles:
    """Where the maps are.

    Attributes:
        sources: one class map (integers), or one or more volumes of probabilities (channels per class, and perhaps
            "boundary" and "distance"), which are averaged: predictions in several orientations.
        kinds: names of classes, "a+b" for several that make one kind; empty takes every class but the first.
        boundary: a boundary map of its own, or None.
        boundary_class: a class that is boundary (membrane), or "".
        pixel_nm: voxel size z, y, x; None along an axis takes what the first source says.
    """

    sources: tuple[Path, ...]
    kinds: tuple[str, ...] = ()
    boundary: Path | None = None
    boundary_class: str = ""
    pixel_nm: PixelSize = (None, None, None)


class MapReader(Protocol):
    """What the decoders read: windows of maps of one shape."""

    @property
    def shape(self) -> Shape:
        """Of the volume."""

    @property
    def divides(self) -> bool:
        """Whether a boundary or distance map tells touching objects apart."""

    def kinds(self, z: slice, y: slice, x: slice, threshold: float) -> np.ndarray:
        """Kind of each voxel: 0 for none, else 1, 2, ...; uint8."""

    def boundary(self, z: slice, y: slice, x: slice) -> np.ndarray | None:
        """Probability of a boundary between objects, float32 0 to 1; None without a boundary map."""

    def distance(self, z: slice, y: slice, x: slice) -> np.ndarray | None:
        """Distance to the boundary of the object in pixels, float32; None without a distance map."""


@dataclass(frozen=True)
class ArrayMaps:
    """Maps in memory: probability of the one kind, and where they exist boundary (0 to 1) and distance (pixels)."""

    foreground_ZYX: np.ndarray
    boundary_ZYX: np.ndarray | None = None
    distance_ZYX: np.ndarray | None = None

    @property
    def shape(self) -> Shape:
        """Of the volume."""
        z, y, x = self.foreground_ZYX.shape
        return z, y, x

    @property
    def divides(self) -> bool:
        """Whether a boundary or distance map tells touching objects apart."""
        return self.boundary_ZYX is not None or self.distance_ZYX is not None

    def kinds(self, z: slice, y: slice, x: slice, threshold: float) -> np.ndarray:
        """1 where the probability reaches the threshold, else 0; uint8."""
        return (self.foreground_ZYX[z, y, x] >= threshold).astype(np.uint8)

    def boundary(self, z: slice, y: slice, x: slice) -> np.ndarray | None:
        """See `MapReader`."""
        return None if self.boundary_ZYX is None else self.boundary_ZYX[z, y, x].astype(np.float32)

    def distance(self, z: slice, y: slice, x: slice) -> np.ndarray | None:
        """See `MapReader`."""
        return None if self.distance_ZYX is None else self.distance_ZYX[z, y, x].astype(np.float32)


class Maps:
    """Opened maps; can be pickled, and opens its files anew in each process.

    Attributes:
        shape: of the volume. pixel_nm: voxel size, None where unknown. kind_names: names of the kinds 1, 2, ...
        distance_cap: pixels that the distance map's highest value stands for; 0 without such a map.
    """

    def __init__(self, files: MapFiles) -> None:
        """Open the files.

        Raises:
            InputError: a file cannot be read, or has another shape than the first.
            ConfigError: a class is unknown; or class maps are to be averaged.
        """
        first = files.sources[0]
        said = volumes.read_annotations(first)
        self._files = files
        self._paths = [*files.sources, *([files.boundary] if files.boundary else [])]
        if said.channels:
            names = [name for name in said.channels if name not in (BOUNDARY, DISTANCE)]
            self._channels = [
                [volumes.open_channel(path, number) for path in files.sources] for number in range(len(said.channels))
            ]
            main = self._channels[0][0]
            self._class_map: Source | None = None
        else:
            if len(files.sources) > 1:
                raise ConfigError("class maps cannot be averaged", "give several volumes of probabilities, or one map")
            main = self._class_map = volumes.open_labels(first)
            self._channels = []
            names = list(said.class_names)
            if not names and main.info.dtype.itemsize > 1:
                raise InputError(
                    f"{first} has no class names and {main.info.dtype} values: it looks like objects already",
                    "give a class map of at most 256 classes, or probabilities",
                )
        self.shape: Shape = main.info.shape_ZYX
        z, y, x = (given or known for given, known in zip(files.pixel_nm, main.info.pixel_nm, strict=True))
        self.pixel_nm: PixelSize = z, y, x
        self.class_names = tuple(names)
        self._boundary_map = volumes.open_channel(files.boundary, None) if files.boundary else None
        for source in [s for channel in self._channels for s in channel] + [s for s in [self._boundary_map] if s]:
            volumes.require_same_shape(main, source)
        self._order = {name: number for number, name in enumerate(said.channels)}
        self.distance_cap = (said.distance_cap or 0.0) if DISTANCE in self._order else 0.0
        if DISTANCE in self._order and not self.distance_cap:
            raise InputError(f"{first} has a distance map but does not say its scale", "predict it again")
        wanted = files.kinds or tuple(name for name in names[1:] if name != files.boundary_class)
        if not wanted and self._class_map is not None:
            wanted = tuple(str(v) for v in self._values_present() if str(v) != files.boundary_class)
        if not wanted:
            raise ConfigError(f"{first} has no class that could become objects", "name classes with --classes")
        self._groups = [[self._class_index(part, first) for part in kind.split("+")] for kind in wanted]
        self.kind_names = wanted
        self._boundary_index = self._class_index(files.boundary_class, first) if files.boundary_class else None
        used = [index for group in self._groups for index in group]
        if len(set(used)) < len(used):
            raise ConfigError("a class is named twice in --classes", "give each class to one kind of object")

    @property
    def kind_classes(self) -> tuple[str, ...]:
        """Names of background and of the kinds: the classes of the objects."""
        return ("background", *self.kind_names)

    @property
    def probabilities(self) -> bool:
        """Whether the classes come as probabilities rather than as a class map."""
        return self._class_map is None

    @property
    def divides(self) -> bool:
        """Whether a boundary or distance map tells touching objects apart."""
        given = self._boundary_map is not None or self._boundary_index is not None
        return given or BOUNDARY in self._order or DISTANCE in self._order

    @property
    def identity(self) -> dict[str, Any]:
        """What the maps are, as plain JSON values: equal only if the files are the same."""
        return {
            "inputs": [[path.name, *size_and_mtime(path)] for path in self._paths],
            "kinds": list(self.kind_names),
            "boundary_class": self._files.boundary_class,
        }

    def kinds(self, z: slice, y: slice, x: slice, threshold: float) -> np.ndarray:
        """Kind of each voxel of a window: 0 for none, else 1, 2, ...; uint8.

        Args:
            threshold: of a kind's probability; where several reach it, the most probable one counts.
        """
        if self._class_map is not None:
            values = self._class_map.read(z, y, x)
            table = np.zeros(max(256, int(values.max(initial=0)) + 1), np.uint8)
            for kind, group in enumerate(self._groups, 1):
                table[group] = kind
            return table[values]
        best: np.ndarray | None = None
        kinds: np.ndarray | None = None
        for kind, group in enumerate(self._groups, 1):
            probability = sum(self._channel(index, z, y, x) for index in group)
            assert isinstance(probability, np.ndarray)
            if best is None or kinds is None:
                best, kinds = np.full(probability.shape, threshold, np.float32), np.zeros(probability.shape, np.uint8)
            # The first kind also wins at the threshold itself, later ones must exceed what came before.
            wins = probability > best if kind > 1 else probability >= best
            kinds[wins], best[wins] = kind, probability[wins]
        assert kinds is not None
        return kinds

    def boundary(self, z: slice, y: slice, x: slice) -> np.ndarray | None:
        """Probability of a boundary between objects, float32 0 to 1; None without a boundary map."""
        if self._boundary_map is not None:
            return _unit(self._boundary_map.read(z, y, x))
        if BOUNDARY in self._order:
            return self._channel(self._order[BOUNDARY], z, y, x)
        if self._boundary_index is None:
            return None
        if self._class_map is not None:
            return (self._class_map.read(z, y, x) == self._boundary_index).astype(np.float32)
        return self._channel(self._boundary_index, z, y, x)

    def distance(self, z: slice, y: slice, x: slice) -> np.ndarray | None:
        """Distance to the boundary of the object in pixels, float32, capped; None without a distance map."""
        if DISTANCE not in self._order:
            return None
        return self._channel(self._order[DISTANCE], z, y, x) * np.float32(self.distance_cap)

    def close(self) -> None:
        """Close all files; reading opens them again."""
        with ExitStack() as stack:
            for source in [s for channel in self._channels for s in channel]:
                stack.callback(source.close)
            for one in (self._class_map, self._boundary_map):
                if one is not None:
                    stack.callback(one.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _channel(self, index: int, z: slice, y: slice, x: slice) -> np.ndarray:
        """Mean over the sources of one channel; float32 0 to 1."""
        parts = [_unit(source.read(z, y, x)) for source in self._channels[index]]
        return parts[0] if len(parts) == 1 else np.asarray(np.mean(parts, axis=0, dtype=np.float32))

    def _class_index(self, name: str, path: Path) -> int:
        """Index of a class by name, or by number where the map has no names."""
        if name in self._order and name not in (BOUNDARY, DISTANCE):
            return self._order[name]
        if name in self.class_names:
            return self.class_names.index(name)
        if name.isdigit() and self._class_map is not None:
            return int(name)
        known = ", ".join(self.class_names) or "numbers only"
        raise ConfigError(f"{path} has no class {name!r}", f"its classes: {known}")

    def _values_present(self) -> Sequence[int]:
        """Values other than 0 of a class map without names; reads all of it."""
        assert self._class_map is not None
        found: set[int] = set()
        for block in row_blocks(self.shape, _SCANNED_VOXELS):
            found |= set(np.flatnonzero(np.bincount(self._class_map.read(*block.window).ravel())).tolist())
        return sorted(found - {0})


def _unit(values: np.ndarray) -> np.ndarray:
    """Values of a probability map as float32 0 to 1; integers are parts of their type's highest value."""
    if values.dtype.kind == "u":
        return values.astype(np.float32) / np.float32(np.iinfo(values.dtype).max)
    return np.clip(np.nan_to_num(values), 0, 1).astype(np.float32)
