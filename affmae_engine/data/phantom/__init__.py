"""Synthetic electron microscopy of neuropil with exact labels: what tests, demo and documentation look at.

Real micrographs may not be part of the project, so this draws some: neurites of 100 nm to 2 um with double
membranes, glia between them, mitochondria with cristae, vesicles, synaptic densities, microtubules, reticulum and
textured cytoplasm, imaged as serial sections with thickness, optics, shot noise and drift of brightness. Unusual: all
geometry is in nm, so any voxel size shows the same kind of tissue to scale, and the memory needed beyond the output
is that of one section. Not for biology: statistics of shape are plausible, not measured.

    python -m affmae_engine.data.phantom --shape 16 512 512 --seed 7 --image em.tif --labels em_labels.tif

Axes: Z Y X voxels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from affmae_engine.data.phantom.cells import GLIA, CellField
from affmae_engine.data.phantom.organelles import populate
from affmae_engine.data.phantom.render import MEMBRANE, CellLook, Fields, Section, draw_tissue, expose
from affmae_engine.data.phantom.tiff import write_tiff
from affmae_engine.errors import ConfigError

__all__ = ["CLASS_NAMES", "Phantom", "PhantomSection", "generate", "generate_sections", "write_tiff"]

CLASS_NAMES = ("cytoplasm", "membrane", "mitochondria", "vesicle", "glia")
_JITTER_NM = 4.0  # residual misalignment between sections (standard deviation)


@dataclass(frozen=True)
class Phantom:
    """One generated volume.

    Attributes:
        image_ZYX: uint8 micrograph, membranes dark.
        labels_ZYX: uint8 class of each voxel, index into `CLASS_NAMES`; exact at the middle of each section.
            A membrane's label includes the cleft between two cells.
        instances_ZYX: uint32 cell ids, 0 on membranes; all glia is one cell.
        organelles_ZYX: uint32 ids of mitochondria (from 1) and, after them, of vesicles; 0 elsewhere.
        pixel_nm: voxel size z, y, x in nm; z is the section thickness.
    """

    image_ZYX: np.ndarray
    labels_ZYX: np.ndarray
    instances_ZYX: np.ndarray
    organelles_ZYX: np.ndarray
    pixel_nm: tuple[float, float, float]


@dataclass(frozen=True)
class PhantomSection:
    """One section of a phantom; the arrays [Y, X] are those of `Phantom`."""

    image_YX: np.ndarray
    labels_YX: np.ndarray
    instances_YX: np.ndarray
    organelles_YX: np.ndarray


def generate(
    shape: tuple[int, int, int],
    *,
    seed: int,
    pixel_nm: tuple[float, float, float] = (40.0, 6.0, 6.0),
    noise: float = 0.08,
    drift: float = 0.03,
) -> Phantom:
    """Draw a phantom.

    Args:
        shape: sections, rows, columns; each at least 1.
        seed: the same seed, shape and voxel size give the same bits.
        pixel_nm: section thickness, row and column spacing in nm, each 1 to 100. Time and memory grow with the
            physical volume too: cells are placed in all of it.
        noise: shot noise as its standard deviation at full brightness, in parts of full scale; 0 for none, at most 1.
        drift: spread of brightness and contrast from section to section, in parts of full scale; 0 to 0.5.

    Raises:
        ConfigError: an argument is out of range.
    """
    drawn = generate_sections(shape, seed=seed, pixel_nm=pixel_nm, noise=noise, drift=drift)
    image, labels = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
    instances, organelles = np.empty(shape, np.uint32), np.empty(shape, np.uint32)
    for z, section in enumerate(drawn):
        image[z], labels[z] = section.image_YX, section.labels_YX
        instances[z], organelles[z] = section.instances_YX, section.organelles_YX
    return Phantom(image, labels, instances, organelles, pixel_nm)


def generate_sections(
    shape: tuple[int, int, int],
    *,
    seed: int,
    pixel_nm: tuple[float, float, float] = (40.0, 6.0, 6.0),
    noise: float = 0.08,
    drift: float = 0.03,
) -> Iterator[PhantomSection]:
    """The sections of `generate` one after the other, for volumes larger than memory; same arguments and errors."""
    _check(shape, seed, pixel_nm, noise, drift)
    return _draw(shape, seed, pixel_nm, noise, drift)


def _draw(
    shape: tuple[int, int, int], seed: int, pixel_nm: tuple[float, float, float], noise: float, drift: float
) -> Iterator[PhantomSection]:
    depth, height, width = shape
    extent_nm = np.array(shape) * np.array(pixel_nm)
    # Independent streams: changing how one part draws leaves the others as they were.
    place, look_rng, field_rng, stage = (np.random.default_rng([seed, part]) for part in range(4))
    cells = CellField(place, extent_nm)
    organelles = populate(place, cells, extent_nm)
    look, fields = CellLook.draw(look_rng, cells), Fields.draw(field_rng, extent_nm)
    gain_Z = 1 + 1.5 * drift * stage.standard_normal(depth)
    offset_Z = drift * stage.standard_normal(depth)
    jitter_Z2 = _JITTER_NM * stage.standard_normal((depth, 2))

    for z in range(depth):
        rng = np.random.default_rng([seed, 4, z])
        z_nm = (z + 0.5) * pixel_nm[0]
        y_nm = (np.arange(height) + 0.5) * pixel_nm[1] + jitter_Z2[z, 0]
        x_nm = (np.arange(width) + 0.5) * pixel_nm[2] + jitter_Z2[z, 1]
        plane = cells.plane(z_nm, y_nm, x_nm)
        section = Section(
            z_nm, y_nm, x_nm, pixel_nm, plane,
            np.empty(shape[1:], np.float32), np.empty(shape[1:], np.uint8), np.zeros(shape[1:], np.uint32),
        )  # fmt: skip
        draw_tissue(section, look, fields, organelles, rng)
        image = expose(section.density_YX, pixel_nm, noise, float(gain_Z[z]), float(offset_Z[z]), rng)
        cell = np.where(plane.cell_YX == GLIA, cells.cell_count, plane.cell_YX)
        instances = np.where(section.labels_YX == MEMBRANE, 0, cell).astype(np.uint32)
        yield PhantomSection(image, section.labels_YX, instances, section.organelles_YX)


def _check(
    shape: tuple[int, int, int], seed: int, pixel_nm: tuple[float, float, float], noise: float, drift: float
) -> None:
    if len(shape) != 3 or any(int(n) != n or n < 1 for n in shape):
        raise ConfigError(f"phantom shape {tuple(shape)} is not three positive whole numbers (sections, rows, columns)")
    if len(pixel_nm) != 3 or not all(math.isfinite(p) and 1 <= p <= 100 for p in pixel_nm):
        raise ConfigError(f"phantom voxel size {tuple(pixel_nm)} is not three sizes of 1 to 100 nm (z, y, x)")
    if int(seed) != seed or seed < 0:
        raise ConfigError(f"phantom seed {seed} is not a whole number of at least 0")
    if not 0 <= noise <= 1:
        raise ConfigError(f"phantom noise {noise} is not within 0 and 1 (parts of full scale)")
    if not 0 <= drift <= 0.5:
        raise ConfigError(f"phantom drift {drift} is not within 0 and 0.5 (parts of full scale)")
