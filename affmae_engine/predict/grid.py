"""How a volume is cut into blocks, and how a block is laid out on disk.

A block is a box of the output that is computed on its own and is one file (a Zarr shard) per array, so no two processes
ever write the same file. It spans whole sections where these are small enough: a tile that reaches into two blocks is
computed for both. Levels of the pyramid are reduced along y and x only, by taking every second pixel of the one before,
so each block holds its own part of every level.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from affmae_engine.predict.compute import Range

Shape = tuple[int, int, int]

CHUNK = 512
"""Edge of a chunk: what a viewer decodes at a time."""
LARGEST_EDGE = 4096
"""Edge of a block in pixels, at most: about an eighth of the tiles of such a block are computed for others too."""
LEAST_BLOCKS = 16
"""A stack of that many sections has at least so many blocks: work for several GPUs, little lost by a stop."""
SUMS_BYTES = {"cuda": 1 << 29, "cpu": 1 << 26}
"""Memory of the class probabilities of a block of several sections, by kind of device."""
MOST_SUMS_BYTES = 1 << 31
"""The same for a block of one section."""
HUGE_VOXELS, HUGE_FACTOR = 1 << 36, 4
"""From this size of a volume on, blocks may have so many times the memory: fewer files."""
PYRAMID_EDGE, MOST_LEVELS = 1024, 5
"""Levels are added until the longer edge is this short, up to so many."""


@dataclass(frozen=True)
class Block:
    """Block number `index` of a grid: a box of voxels."""

    index: int
    z: Range
    y: Range
    x: Range

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """The box for indexing [Z, Y, X]."""
        return slice(*self.z), slice(*self.y), slice(*self.x)

    @property
    def voxels(self) -> int:
        """Voxels of the box."""
        return math.prod(last - first for first, last in (self.z, self.y, self.x))


@dataclass(frozen=True)
class Level:
    """One array of a pyramid: its shape, the shape of its chunks and that of its shards (blocks)."""

    shape: Shape
    chunk: Shape
    shard: Shape


@dataclass(frozen=True)
class Grid:
    """A volume and the shape of its blocks; the last blocks along an axis hold what is left."""

    shape: Shape
    block: Shape

    @classmethod
    def choose(cls, shape: Shape, *, classes: int, device: str, inner: float = 1.0) -> Grid:
        """The blocks of a volume.

        Args:
            shape: of the volume, z y x.
            classes: of the probabilities that are kept while a block is computed.
            device: "cuda" or "cpu".
            inner: pixels that the network sees for each pixel of the volume.
        """
        depth, height, width = shape
        voxel_bytes = 4 * classes * max(1.0, inner)
        edge = LARGEST_EDGE
        while edge > CHUNK and min(edge, height) * min(edge, width) * voxel_bytes > MOST_SUMS_BYTES:
            edge //= 2
        rows, columns = (_even(length, edge) for length in (height, width))
        budget = SUMS_BYTES[device] * (HUGE_FACTOR if math.prod(shape) >= HUGE_VOXELS else 1)
        fitting = int(budget / (min(rows, height) * min(columns, width) * voxel_bytes))
        return cls(shape, (max(1, min(fitting, depth // LEAST_BLOCKS)), rows, columns))

    @cached_property
    def counts(self) -> Shape:
        """Blocks along z, y and x."""
        z, y, x = (-(-length // edge) for length, edge in zip(self.shape, self.block, strict=True))
        return z, y, x

    def __len__(self) -> int:
        return math.prod(self.counts)

    def __getitem__(self, index: int) -> Block:
        """Block `index`: x moves fastest, z slowest."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        rest, at_x = divmod(index, self.counts[2])
        at_z, at_y = divmod(rest, self.counts[1])
        ranges = [
            (i * edge, min((i + 1) * edge, length))
            for i, edge, length in zip((at_z, at_y, at_x), self.block, self.shape, strict=True)
        ]
        return Block(index, ranges[0], ranges[1], ranges[2])

    def place(self, block: Block) -> Shape:
        """Place of a block among the shards: z, y, x."""
        z, y, x = (r[0] // edge for r, edge in zip((block.z, block.y, block.x), self.block, strict=True))
        return z, y, x

    def levels(self) -> list[Level]:
        """The full resolution and what is added for viewers."""
        count = 1
        while max(self.shape[1:]) >> (count - 1) > PYRAMID_EDGE and count <= MOST_LEVELS:
            count += 1
        return [self.level(k) for k in range(count)]

    def level(self, k: int) -> Level:
        """Level k of the pyramid."""
        (rows, tall, shard_y), (columns, wide, shard_x) = (
            _level_axis(length, edge, k) for length, edge in zip(self.shape[1:], self.block[1:], strict=True)
        )
        return Level((self.shape[0], rows, columns), (1, tall, wide), (self.block[0], shard_y, shard_x))


def share(count: int, part: int, parts: int) -> range:
    """The blocks of part `part` of `parts`: neighbors, as equal in number as can be."""
    return range(count * part // parts, count * (part + 1) // parts)


def at_level(first_last: Range, k: int) -> Range:
    """Pixels of level k that are taken from these pixels of the full resolution: the multiples of 2^k among them."""
    return -(-first_last[0] >> k), -(-first_last[1] >> k)


def z_slabs(grid: Grid) -> Iterator[list[Block]]:
    """The blocks in groups that hold the same sections, in order."""
    across = grid.counts[1] * grid.counts[2]
    for at_z in range(grid.counts[0]):
        yield [grid[at_z * across + i] for i in range(across)]


def _even(length: int, edge: int) -> int:
    """Edge of equal blocks of at most `edge` pixels: whole chunks, or the whole axis as one block."""
    blocks = -(-length // edge)
    if blocks == 1:
        return CHUNK * -(-length // CHUNK) if length > CHUNK else length
    return CHUNK * -(-length // (blocks * CHUNK))


def _level_axis(length: int, edge: int, k: int) -> tuple[int, int, int]:
    """Pixels, chunk and shard of one axis at level k."""
    reduced = at_level((0, length), k)[1]
    if edge >= length:
        chunk = min(CHUNK, reduced)
        return reduced, chunk, chunk * -(-reduced // chunk)
    return reduced, math.gcd(edge >> k, CHUNK), edge >> k
