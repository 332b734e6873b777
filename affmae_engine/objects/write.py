"""Objects as OME-Zarr or TIFF, which Fiji and napari open with their scale, and as an overlay picture.

Both come from one Zarr array that is written block by block; a TIFF is made from it section by section. TIFF is
OME-TIFF (BigTIFF above 4 GB) with uint32 labels: ImageJ's own dialect ends at 16 bits.

Axes: Z Y X, N objects, 3 is red green blue.
"""

from __future__ import annotations

import colorsys
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from scipy import ndimage
from zarr.codecs import Crc32cCodec, ZstdCodec

from affmae_engine import atomic
from affmae_engine.data.readers import PixelSize, Source
from affmae_engine.data.store_layout import image_attributes
from affmae_engine.errors import ConfigError
from affmae_engine.objects.blocks import Block, ReadWindow, Shape
from affmae_engine.objects.job import Job
from affmae_engine.objects.make import MadeObjects
from affmae_engine.objects.volumes import values_dtype
from affmae_engine.picture_files import save_png
from affmae_engine.visualize import to_grey

ATTRIBUTE = "affmae_objects"
"""Key of our own record in the attributes of an output."""
LISTED_OBJECTS = 4096
"""Up to this number, objects are listed with colors in the metadata; viewers choose their own for more."""
RECORDED_CLASSES = 1 << 20
"""Up to this number, the class of every object is in the metadata."""
_CHUNK: Shape = (16, 128, 128)
_TILE = 256
_PANEL = 768
_SECTIONS = 3


@dataclass(frozen=True)
class Output:
    """What is written.

    Attributes:
        path: .zarr, .tif or .tiff.
        pixel_nm: voxel size. class_names: names by index. class_M: class index of the objects 1, 2, ...
        record: what the objects were made from, plain JSON values.
    """

    path: Path
    pixel_nm: PixelSize
    class_names: tuple[str, ...]
    class_M: np.ndarray
    record: Mapping[str, Any]

    @property
    def about(self) -> dict[str, Any]:
        """The output's own record."""
        listed = self.class_M.tolist() if len(self.class_M) <= RECORDED_CLASSES else []
        return {"objects": len(self.class_M), "class_names": list(self.class_names), "object_classes": listed,
                **self.record}  # fmt: skip


def object_color(number: int) -> tuple[int, int, int]:
    """Color of an object; depends on its number alone, and differs clearly between numbers that are close.

    Hues go around by the golden angle; saturation and brightness alternate with other periods.
    """
    hue = number * 0.6180339887498949 % 1.0
    saturation, value = (0.55, 0.75, 0.95)[number % 3], (1.0, 0.8)[number // 3 % 2]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def check_output(path: Path, objects: int | None = None) -> None:
    """Raises ConfigError when objects cannot be written under this name."""
    if path.suffix.lower() not in (".zarr", ".tif", ".tiff"):
        raise ConfigError(
            f"{path}: objects are written as .zarr (OME-Zarr), .tif or .tiff",
            "name the output with one of these extensions",
        )
    if objects is not None and objects > np.iinfo(np.uint32).max and path.suffix.lower() != ".zarr":
        raise ConfigError(f"{path}: {objects} objects need 64 bits, which OME-TIFF lacks", "name a .zarr")


def check_replaceable(path: Path, *, overwrite: bool) -> None:
    """Raises ConfigError when something stands under the output's name that may not be replaced."""
    if not path.exists():
        return
    if not overwrite:
        raise ConfigError(f"{path} exists already", "replace it with --overwrite, or choose another -o/--out")
    if path.is_dir():
        try:
            ours = ATTRIBUTE in json.loads((path / "zarr.json").read_text("utf-8"))["attributes"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            ours = False
        if not ours:
            raise ConfigError(
                f"{path} exists and was not written by affmae objects, so it is not replaced", "choose another -o/--out"
            )


def write_objects(job: Job, made: MadeObjects, output: Output, *, overwrite: bool) -> None:
    """Write all objects; the output appears when it is complete.

    Raises:
        ResourceError: it cannot be written.
        FileExistsError: it exists and `overwrite` is off.
    """
    dtype = values_dtype(len(made.kind_M))
    if output.path.suffix.lower() == ".zarr":
        with atomic.committed_folder(output.path, replace=overwrite) as folder:
            _write_zarr(job, made, folder, dtype, _attributes(output))
        return
    between = job.folder / "output.zarr"
    _write_zarr(job, made, between, dtype, {})
    array = zarr.open_array(between / "0", mode="r")
    atomic.commit_file(output.path, lambda partial: _write_tiff(partial, array, output))


@dataclass(frozen=True)
class _Writer:
    """Writes one block, which is one shard of the array."""

    made: MadeObjects
    array: Path
    dtype: np.dtype[Any]

    def __call__(self, block: Block) -> None:
        target = zarr.open_array(self.array, mode="r+")
        target[block.window] = self.made.read(*block.window).astype(self.dtype)


def _write_zarr(job: Job, made: MadeObjects, folder: Path, dtype: np.dtype[Any], attributes: Mapping[str, Any]) -> None:
    edges = [chunk_and_shard(b, n, c) for b, n, c in zip(job.block, job.volume, _CHUNK, strict=True)]
    group = zarr.create_group(folder, attributes=dict(attributes), overwrite=True)
    group.create_array(
        "0",
        shape=job.volume,
        chunks=tuple(chunk for chunk, _ in edges),
        shards=tuple(shard for _, shard in edges),
        dtype=dtype,
        compressors=[ZstdCodec(level=3), Crc32cCodec()],
        fill_value=0,
        dimension_names=("z", "y", "x"),
        config={"write_empty_chunks": True},  # a missing chunk is damage, never background
    )
    blocks = job.blocks
    for done, _ in enumerate(job.each(_Writer(made, folder / "0", dtype), blocks), 1):
        job.on_progress("write", done, len(blocks))


def chunk_and_shard(block: int, length: int, wanted: int) -> tuple[int, int]:
    """Edges of a chunk and of a shard, a whole number of chunks; blocks are shards."""
    if block >= length:  # a shard may reach beyond the volume
        chunk = min(wanted, block)
        return chunk, -(-block // chunk) * chunk
    divisor = next(d for d in range(min(wanted, block), 0, -1) if block % d == 0)
    return (divisor if 4 * divisor >= wanted else block), block


def _attributes(output: Output) -> dict[str, Any]:
    label: dict[str, Any] = {"version": "0.5"}
    if len(output.class_M) <= LISTED_OBJECTS:
        label["colors"] = [{"label-value": 0, "rgba": [0, 0, 0, 0]}] + [
            {"label-value": n, "rgba": [*object_color(n), 255]} for n in range(1, len(output.class_M) + 1)
        ]
        label["properties"] = [
            {"label-value": n, "class": _name(output.class_names, index)}
            for n, index in enumerate(output.class_M.tolist(), 1)
        ]
    ome = image_attributes(output.path.stem, output.pixel_nm)["ome"] | {"image-label": label}
    return {"ome": ome, ATTRIBUTE: output.about}


def _name(names: tuple[str, ...], index: int) -> str:
    return names[index] if index < len(names) else str(index)


def _write_tiff(path: Path, array: Any, output: Output) -> None:
    shape = array.shape if array.shape[0] > 1 else array.shape[1:]
    metadata: dict[str, Any] = {
        "axes": "ZYX"[-len(shape) :], "Name": output.path.stem, "Description": json.dumps(output.about),
    }  # fmt: skip
    for axis, size in zip("ZYX", output.pixel_nm, strict=True):
        if size is not None:
            metadata |= {f"PhysicalSize{axis}": size, f"PhysicalSize{axis}Unit": "nm"}
    large = array.nbytes > (1 << 32) - (1 << 25)
    with tifffile.TiffWriter(path, bigtiff=large, ome=True, byteorder="<") as tiff:
        tiff.write(
            _tiles(array), shape=shape, dtype=array.dtype, tile=(_TILE, _TILE), photometric="minisblack",
            compression="zlib", metadata=metadata, software="affmae",
        )  # fmt: skip


def _tiles(array: Any) -> Iterator[np.ndarray]:
    """All tiles of all sections in order; one layer of chunks of one section's height is in memory."""
    depth, height, width = array.shape
    thick = array.chunks[0]
    for z0 in range(0, depth, thick):
        layer = array[z0 : z0 + thick]
        for section in layer:
            for y in range(0, height, _TILE):
                for x in range(0, width, _TILE):
                    tile = np.zeros((_TILE, _TILE), array.dtype)
                    part = section[y : y + _TILE, x : x + _TILE]
                    tile[: part.shape[0], : part.shape[1]] = part
                    yield tile


def write_overlay(path: Path, image: Source, objects: ReadWindow) -> None:
    """A PNG of a few sections: the image, and below it the objects in their colors with outlines.

    Large sections are reduced by leaving out pixels.

    Raises:
        InputError, ResourceError: the image cannot be read, or the picture cannot be written.
    """
    depth, height, width = image.info.shape_ZYX
    step = -(-max(height, width) // _PANEL)
    panels = []
    for z in sorted({(2 * i + 1) * depth // (2 * _SECTIONS) for i in range(_SECTIONS)}):
        window = slice(z, z + 1), slice(0, height), slice(0, width)
        grey = to_grey(image.read(*window)[0, ::step, ::step])
        panels.append(np.concatenate([_rgb(grey), colored(grey, objects(*window)[0, ::step, ::step])]))
    save_png(path, np.concatenate(panels, axis=1))


def colored(grey_YX: np.ndarray, objects_YX: np.ndarray, alpha: float = 0.45) -> np.ndarray:
    """Objects in their colors over a gray picture (uint8), with opaque outlines; uint8 [Y, X, 3]."""
    numbers, position = np.unique(objects_YX, return_inverse=True)
    table = np.array([object_color(int(n)) for n in numbers], np.float32)
    color_YX3 = table[position].reshape(*objects_YX.shape, 3)
    edge = ndimage.maximum_filter(objects_YX, 3) != ndimage.minimum_filter(objects_YX, 3)
    opacity = np.where(objects_YX == 0, 0.0, np.where(edge, 1.0, alpha))[..., None]
    return np.asarray(_rgb(grey_YX) * (1 - opacity) + color_YX3 * opacity + 0.5, np.uint8)


def _rgb(grey_YX: np.ndarray) -> np.ndarray:
    return np.repeat(grey_YX[..., None], 3, axis=2)
