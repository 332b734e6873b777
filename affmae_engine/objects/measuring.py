"""Measuring files: opens the volumes, chooses the unit, gathers and scores block by block.

Axes: Z Y X.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from affmae_engine.data.readers import PixelSize, Source
from affmae_engine.errors import ConfigError
from affmae_engine.objects import volumes
from affmae_engine.objects.blocks import ReadWindow, row_blocks
from affmae_engine.objects.measure import Inputs, ObjectTable, gather_all, table
from affmae_engine.objects.scores import ObjectScores, score_blocks

Unit = Literal["auto", "nm", "um", "px"]
BLOCK_VOXELS = 1 << 23
"""Voxels measured at a time: about 300 MB of memory."""


@dataclass(frozen=True)
class MeasuredVolume:
    """Measurements of a label volume, scores where the truth was given, and what was assumed, in words."""

    table: ObjectTable
    scores: ObjectScores | None
    notes: tuple[str, ...]


def measure_volume(
    labels: Path,
    *,
    image: Path | None = None,
    class_map: Path | None = None,
    inside: Path | None = None,
    truth: Path | None = None,
    pixel_nm: PixelSize | None = None,
    unit: Unit = "auto",
    smallest_scored: int = 1,
    block_voxels: int = BLOCK_VOXELS,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> MeasuredVolume:
    """Measure all objects of a label volume.

    Args:
        image, class_map, inside, truth: volumes of the same shape: gray values, class of every voxel, labels of
            enclosing objects, true labels.
        pixel_nm: voxel size z, y, x in nm, in place of what the file says.
        unit: of lengths; "auto" takes um when half of the objects are larger than 500 nm, px when no size is known.
        smallest_scored: true and found objects of fewer voxels are background in the scores; all are measured.
        on_progress: called with finished and all blocks.

    Raises:
        InputError: a volume cannot be read or has another shape; or the voxel size is known for some axes only.
        ConfigError: a unit in nm or um without a voxel size.
    """
    with ExitStack() as stack:

        def opened(path: Path | None, open_one: Callable[[Path], Source]) -> Source | None:
            if path is None:
                return None
            source = stack.enter_context(open_one(path))
            volumes.require_same_shape(main, source)
            return source

        main = stack.enter_context(volumes.open_labels(labels))
        shape = main.info.shape_ZYX
        size_nm = volumes.voxel_size(main, pixel_nm)
        if size_nm is None and unit in ("nm", "um"):
            raise ConfigError(f"{labels} does not say its voxel size", "give it with --pixel-size z,y,x")
        named = volumes.read_annotations(labels if class_map is None else class_map)
        truth_source = opened(truth, volumes.open_labels)
        inputs = Inputs(
            shape,
            main.read,
            _read(opened(image, volumes.open_image)),
            _read(opened(class_map, volumes.open_labels)),
            _read(opened(inside, volumes.open_labels)),
        )
        parts = row_blocks(shape, block_voxels)
        gathered = gather_all(inputs, parts, on_block=lambda done: on_progress(done, len(parts)))

        def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for block in parts:
                assert truth_source is not None
                yield truth_source.read(*block.window), main.read(*block.window)

        scores = score_blocks(pairs(), smallest=smallest_scored) if truth_source is not None else None

    notes = [] if size_nm is not None else [f"{labels} does not say its voxel size: lengths are in pixels"]
    chosen = unit
    if unit == "auto":
        chosen = "px" if size_nm is None else _fitting_unit(gathered.voxels_N, size_nm, flat=shape[0] == 1)
    factor = {"nm": 1.0, "um": 1e-3, "px": 1.0}[chosen]
    z, y, x = (1.0, 1.0, 1.0) if chosen == "px" or size_nm is None else size_nm
    measured = table(
        gathered, shape, (z * factor, y * factor, x * factor), chosen,
        class_of=named.class_of, class_names=named.class_names,
    )  # fmt: skip
    return MeasuredVolume(measured, scores, tuple(notes))


def _read(source: Source | None) -> ReadWindow | None:
    return None if source is None else source.read


def _fitting_unit(voxels_N: np.ndarray, size_nm: tuple[float, float, float], *, flat: bool) -> Literal["nm", "um"]:
    """um when half of the objects have an equivalent diameter above 500 nm."""
    if not len(voxels_N):
        return "nm"
    typical = float(np.median(voxels_N))
    if flat:
        diameter = 2 * np.sqrt(typical * size_nm[1] * size_nm[2] / np.pi)
    else:
        diameter = np.cbrt(6 * typical * np.prod(size_nm) / np.pi)
    return "um" if diameter > 500 else "nm"
