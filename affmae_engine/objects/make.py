"""Making the objects of a volume: the passes of a run, in order.

    seeds -> flood    (watershed), or components
    overlaps          (section by section: linking to 3-D)
    holes             (where wanted)
    write             objects that are large enough, numbered by their first voxel

Every pass but the last continues from what is there (`job.py`). The result is the same for any number of workers and
shards, and after any interruption; it does not depend on the size of blocks either, except that a watershed sees no
further than the halo of its block.

Axes: Z Y X, M objects, P pieces.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from affmae_engine.errors import ConfigError, ResourceError, human_bytes
from affmae_engine.objects.blocks import Block, Shape
from affmae_engine.objects.decode import CONTEXT, DecodeOptions, Decoding, Flood
from affmae_engine.objects.holes import Holes, Objects
from affmae_engine.objects.job import CACHED_BLOCKS, Job, Pass
from affmae_engine.objects.link import Overlaps, links
from affmae_engine.objects.maps import MapReader, Maps
from affmae_engine.objects.merge import Arrays, group_objects, joined_at_necks, keep_objects, merge_holes, merge_pieces
from affmae_engine.objects.pairs import PairCounts, add_pairs

ANISOTROPIC = 1.5
"""Voxels longer than this along z, relative to y and x, make a stack of sections."""
BLOCK_3D: Shape = (192, 192, 192)
BLOCK_SECTIONS: Shape = (16, 1024, 1024)
BYTES_PER_VOXEL = 80
"""Memory of a worker per voxel of a block with its halo: what the passes hold at a time, rounded up."""
WORKER_BYTES = 300 << 20
"""Memory of a worker's libraries."""


@dataclass(frozen=True)
class MadeObjects:
    """The objects of a volume, still in the job's folder.

    Attributes:
        objects: their numbers as a volume, holes not filled. holes: what is filled with the enclosing object, or None.
        kind_M, count_M: kind (from 1) and voxels (without filled holes) of the objects 1, 2, ...
    """

    objects: Objects
    holes: Objects | None
    kind_M: np.ndarray
    count_M: np.ndarray

    def read(self, z: slice, y: slice, x: slice) -> np.ndarray:
        """Final numbers in a window; int64."""
        numbers = self.objects.read(z, y, x)
        return numbers if self.holes is None else np.where(numbers == 0, self.holes.read(z, y, x), numbers)


def is_sections(maps: Maps) -> bool:
    """Whether a volume should be taken section by section: one section, or sections much thicker than a pixel."""
    z, y, x = maps.pixel_nm
    return maps.shape[0] == 1 or (z is not None and y is not None and x is not None and z > ANISOTROPIC * max(y, x))


def relative_voxel(maps: Maps, *, sections: bool) -> tuple[float, float, float]:
    """Edges of a voxel relative to the shortest one that counts; 1 where the size is unknown."""
    z, y, x = maps.pixel_nm
    if y is None or x is None:
        return 1.0, 1.0, 1.0
    shortest = min(y, x) if sections or z is None else min(z, y, x)
    return (z or shortest) / shortest, y / shortest, x / shortest


def block_shape(options: DecodeOptions, volume: Shape, size: Shape | None) -> Shape:
    """Shape of a block: as asked, or the default, and no larger than the volume needs.

    Raises:
        ConfigError: a block of fewer than 16 voxels along an axis that the volume is longer than.
    """
    wanted = size or (BLOCK_SECTIONS if options.sections else BLOCK_3D)
    if any(b < 1 for b in wanted) or any(b < 16 <= n for b, n in zip(wanted[1:], volume[1:], strict=True)):
        raise ConfigError(f"blocks of {wanted} voxels are too small", "use at least 16 voxels along y and x")
    z, y, x = (min(b, n) for b, n in zip(wanted, volume, strict=True))
    return z, y, x


def working_bytes(decoding: Decoding, block: Shape) -> int:
    """Memory that one worker needs, bytes."""
    halo = [reach + CONTEXT if reach else 0 for reach in decoding.reach]
    window = [min(b + 2 * h, n) for b, h, n in zip(block, halo, decoding.maps.shape, strict=True)]
    return WORKER_BYTES + BYTES_PER_VOXEL * math.prod(window) + CACHED_BLOCKS * 4 * math.prod(block)


def check_memory(decoding: Decoding, block: Shape, workers: int, budget: int) -> None:
    """Raises ResourceError when the workers need more memory than there is."""
    needed = workers * working_bytes(decoding, block)
    if needed > budget:
        raise ResourceError(
            f"{workers} workers with blocks of {' x '.join(map(str, block))} voxels need about {human_bytes(needed)} "
            f"of memory, {human_bytes(budget)} may be used",
            "use fewer --workers or a smaller --block",
        )


def make_objects(
    job: Job, maps: MapReader, options: DecodeOptions, voxel: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> MadeObjects:
    """Compute everything but the output.

    Args:
        voxel: edges of a voxel relative to the shortest one, see `relative_voxel`.

    Raises:
        InputError, ResourceError: a map cannot be read, or the intermediate results cannot be written.
        Interrupted: stopped on request; what is done is kept.
    """
    decoding = Decoding(maps, options, voxel)
    blocks = job.blocks
    if options.method == "components":
        pieces = job.run("components", decoding.components)
        table: Arrays = job.table("objects", lambda: merge_pieces(pieces, blocks, sections=options.sections))
    else:
        seeds = job.run("seeds", decoding.seeds)
        found = job.table("seeds", lambda: merge_pieces(seeds, blocks, sections=options.sections))
        flood = Flood(decoding, seeds, found["object_of_piece"], found["first_piece"])
        pieces = job.run("flood", flood)

        def merged() -> Mapping[str, np.ndarray]:
            parts = merge_pieces(pieces, blocks, sections=options.sections)
            if options.join_neck == 1:
                return parts
            return joined_at_necks(pieces, blocks, parts, share=options.join_neck, sections=options.sections)

        table = job.table("objects", merged)
    if options.sections and job.volume[0] > 1:
        table = _linked(job, pieces, table, options, blocks)
    table = _large_enough(table, options)
    objects = Objects(pieces, table["first_piece"], table["object_of_piece"])
    holes = _holes(job, objects, options, blocks) if options.fill_holes else None
    return MadeObjects(objects, holes, table["kind"], table["count"])


def provenance(maps: Maps, options: DecodeOptions, block: Shape) -> dict[str, object]:
    """Everything that the result depends on, as plain JSON values."""
    return {**maps.identity, "options": asdict(options), "block": list(block), "pixel_nm": list(maps.pixel_nm)}


def _linked(job: Job, pieces: Pass, table: Arrays, options: DecodeOptions, blocks: list[Block]) -> Arrays:
    """Objects of single sections linked to objects of the stack."""
    gaps = min(options.bridge + 1, job.volume[0] - 1)
    flat = Objects(pieces, table["first_piece"], table["object_of_piece"])
    result = job.run("overlaps", Overlaps(flat, gaps))

    def compute() -> Mapping[str, np.ndarray]:
        overlaps = [
            add_pairs([PairCounts(*result.arrays(b.index, f"pairs{gap}", f"counts{gap}")) for b in blocks])
            for gap in range(1, gaps + 1)
        ]
        edges = links(overlaps, table["count"], table["kind"], iou=options.link_iou, overlap=options.link_overlap)
        return group_objects(table, edges)

    return job.table("linked", compute)


def _large_enough(table: Arrays, options: DecodeOptions) -> Arrays:
    span = table["high"][:, 0] - table["low"][:, 0]
    return keep_objects(table, (table["count"] >= options.min_voxels) & (span >= options.min_span))


def _holes(job: Job, objects: Objects, options: DecodeOptions, blocks: list[Block]) -> Objects:
    result = job.run("holes", Holes(objects, options.sections))
    table = job.table("holes", lambda: merge_holes(result, blocks, sections=options.sections))
    return Objects(result, table["first_piece"], table["object_of_piece"])


def objects_in_memory(
    maps: MapReader, options: DecodeOptions, voxel: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> np.ndarray:
    """All objects of a volume that fits in memory, as one block; uint32 [Z, Y, X]. For tuning and validation."""
    with tempfile.TemporaryDirectory(prefix="affmae-objects-") as folder:
        made = make_objects(Job(Path(folder), maps.shape, maps.shape), maps, options, voxel)
        z, y, x = (slice(0, n) for n in maps.shape)
        return made.read(z, y, x).astype(np.uint32)


def intermediate_folder(output: Path) -> Path:
    """Where the intermediate results of an output are until it is complete."""
    return output.with_name(f".{output.name}.objects")
