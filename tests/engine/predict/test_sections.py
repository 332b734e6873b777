"""Sections as planes: every row as in the file, whether read several at a time or by blocks of rows."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from affmae_engine.data.readers import open_sources
from affmae_engine.predict import sections as module
from affmae_engine.predict.sections import SectionRows, sections


def as_float(block: np.ndarray) -> np.ndarray:
    return block.astype(np.float32)


@pytest.mark.parametrize("slab", [1, 90 * 70, 2 * 90 * 70, 1 << 25])
def test_all_sections_in_order(
    write_stack: Callable[..., Path], blobs: np.ndarray, monkeypatch: pytest.MonkeyPatch, slab: int
) -> None:
    monkeypatch.setattr(module, "SLAB_PIXELS", slab)
    (source,) = open_sources(write_stack(blobs))
    planes = [plane.rows(0, 90) for plane in sections(source, as_float)]
    assert np.array_equal(np.stack(planes), np.asarray((0, 100, 200), np.float32)[blobs])


def test_rows_in_any_order(
    write_stack: Callable[..., Path], blobs: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AHEAD_PIXELS", 70 * 5)
    (source,) = open_sources(write_stack(blobs))
    plane, whole = SectionRows(source, 1, as_float), source.read(slice(1, 2), slice(0, 90), slice(0, 70))[0]
    for first, last in [(0, 10), (3, 20), (20, 21), (60, 90), (58, 90), (0, 4), (89, 90)]:
        assert np.array_equal(plane.rows(first, last), whole[first:last])


def test_large_sections_are_read_once_and_a_block_at_a_time(
    write_stack: Callable[..., Path], blobs: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AHEAD_PIXELS", 70 * 8)
    (source,) = open_sources(write_stack(blobs))
    read: list[tuple[int, int]] = []
    plain = source.read
    monkeypatch.setattr(source, "read", lambda z, y, x: (read.append((y.start, y.stop)), plain(z, y, x))[1])
    plane = SectionRows(source, 0, as_float)
    for first in range(0, 80, 5):
        plane.rows(first, first + 10)
    assert all(later[0] == earlier[1] for earlier, later in pairwise(read))
    assert max(stop - start for start, stop in read) <= 10
