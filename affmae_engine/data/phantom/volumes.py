"""A phantom of any size as OME-Zarr volumes, written while its sections are drawn.

Axes: Z Y X.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import zarr

from affmae_engine import atomic
from affmae_engine.data.phantom import generate_sections
from affmae_engine.data.store_layout import image_attributes

VOLUMES = {"image": "u1", "labels": "u1", "instances": "u4", "organelles": "u4"}
"""Names of the volumes and their dtypes; see `Phantom`."""
_CHUNK = 256
_SLAB = 16
"""Sections that are held in memory and written at a time."""


def write_zarr(
    folder: Path,
    shape: tuple[int, int, int],
    *,
    seed: int,
    pixel_nm: tuple[float, float, float] = (40.0, 6.0, 6.0),
    noise: float = 0.08,
    drift: float = 0.03,
) -> None:
    """Draw a phantom (see `generate`) into FOLDER/image.zarr, labels.zarr, instances.zarr and organelles.zarr.

    The folder appears when it is complete. Memory: 16 sections, and what the tissue itself needs.

    Raises:
        ConfigError: an argument is out of range.
        FileExistsError: the folder exists.
        ResourceError: it cannot be written.
    """
    drawn = generate_sections(shape, seed=seed, pixel_nm=pixel_nm, noise=noise, drift=drift)
    with atomic.committed_folder(folder) as partial:
        arrays = {}
        chunk = (min(_SLAB, shape[0]), min(_CHUNK, shape[1]), min(_CHUNK, shape[2]))
        for name, dtype in VOLUMES.items():
            attributes = image_attributes(name, pixel_nm)
            group = zarr.create_group(partial / f"{name}.zarr", attributes=attributes)
            arrays[name] = group.create_array(
                "0", shape=shape, chunks=chunk, dtype=dtype, fill_value=0, dimension_names=("z", "y", "x")
            )
        held: dict[str, list[np.ndarray]] = {name: [] for name in VOLUMES}
        for z, section in enumerate(drawn):
            for name, sections in held.items():
                sections.append(getattr(section, f"{name}_YX"))
            if (z + 1) % _SLAB == 0 or z + 1 == shape[0]:
                for name, sections in held.items():
                    arrays[name][z + 1 - len(sections) : z + 1] = np.stack(sections)
                    sections.clear()
