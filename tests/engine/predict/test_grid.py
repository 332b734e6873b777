"""Blocks: they fill a volume without overlap, are whole shards at every level, and shards of a job share them out."""

import math

import numpy as np
import pytest

from affmae_engine.predict.grid import CHUNK, LARGEST_EDGE, Grid, at_level, share, z_slabs

SHAPES = [(1, 1, 1), (3, 90, 70), (80, 2048, 2048), (1, 5000, 9000), (40, 700, 20000), (17, 4096, 4097)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("classes", [2, 5, 300])
def test_blocks_fill_the_volume_once(shape: tuple[int, int, int], device: str, classes: int) -> None:
    grid = Grid.choose(shape, classes=classes, device=device)
    blocks = [grid[index] for index in range(len(grid))]
    assert sum(block.voxels for block in blocks) == math.prod(shape)
    assert len({grid.place(block) for block in blocks}) == len(blocks)
    assert [b.index for slab in z_slabs(grid) for b in slab] == list(range(len(grid)))
    assert max(grid.block[1:]) <= max(LARGEST_EDGE, CHUNK)
    if shape[0] >= 16:
        assert len({block.z for block in blocks}) >= 16
    with pytest.raises(IndexError):
        grid[len(grid)]


@pytest.mark.parametrize("shape", SHAPES)
def test_levels_are_made_of_whole_shards(shape: tuple[int, int, int]) -> None:
    grid = Grid.choose(shape, classes=4, device="cuda")
    for k, level in enumerate(grid.levels()):
        assert level.shape == (shape[0], -(-shape[1] >> k), -(-shape[2] >> k))
        assert all(shard % chunk == 0 for shard, chunk in zip(level.shard, level.chunk, strict=True))
        for index in range(len(grid)):
            block = grid[index]
            for axis, first_last in ((1, block.y), (2, block.x)):
                first, last = at_level(first_last, k)
                place = grid.place(block)[axis]
                assert first == place * level.shard[axis]
                assert last == min(level.shape[axis], (place + 1) * level.shard[axis])


@pytest.mark.parametrize(("count", "parts"), [(10, 3), (3, 10), (1, 1), (17, 17)])
def test_shares_are_disjoint_and_even(count: int, parts: int) -> None:
    shares = [share(count, part, parts) for part in range(parts)]
    assert np.concatenate([np.array(s, int) for s in shares]).tolist() == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
