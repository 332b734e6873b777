"""A phantom as two multi-page TIFF files that ImageJ, Fiji and napari open with the right voxel size.

Axes: Z Y X.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tifffile

from affmae_engine import atomic

if TYPE_CHECKING:
    from affmae_engine.data.phantom import Phantom


def write_tiff(phantom: Phantom, image_path: Path, label_path: Path) -> None:
    """Write image and labels (class ids) as ImageJ TIFF: in-plane resolution tags and z spacing, in micrometres.

    Raises:
        ResourceError: the files cannot be written; nothing half-written is left under their names.
    """
    for path, volume_ZYX in ((image_path, phantom.image_ZYX), (label_path, phantom.labels_ZYX)):
        _write_volume(path, volume_ZYX, phantom.pixel_nm)


def _write_volume(path: Path, volume_ZYX: np.ndarray, pixel_nm: tuple[float, float, float]) -> None:
    z_um, y_um, x_um = (size / 1000 for size in pixel_nm)

    def write(partial: Path) -> None:
        tifffile.imwrite(
            partial,
            volume_ZYX,
            imagej=True,
            resolution=(1 / x_um, 1 / y_um),
            metadata={"axes": "ZYX", "spacing": z_um, "unit": "um"},
        )

    atomic.commit_file(path, write)
