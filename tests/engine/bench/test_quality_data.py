"""Who sees what in a quality comparison."""

import numpy as np
import pytest
import tifffile

from affmae_engine.bench.quality import distinct_fractions
from affmae_engine.bench.quality_data import Sources, collect, described, parts_of, section_count, share_of_labels
from affmae_engine.config import FinetuneConfig
from affmae_engine.data.split import Region
from affmae_engine.errors import InputError


def sections(count: int) -> list[Region]:
    return [Region("stack", z, z + 1) for z in range(count)]


@pytest.mark.parametrize("count", [1, 2, 7, 14, 100])
def test_shares_are_contiguous_and_nested_for_every_seed(count: int) -> None:
    train = sections(count)
    for seed in range(40):
        larger = train
        for fraction in (1.0, 0.7, 0.5, 0.25, 0.1, 0.01):
            share = share_of_labels(train, fraction, seed)
            assert share == train[share[0].z0 : share[-1].z1]  # contiguous
            assert len(share) == max(1, round(fraction * count))
            assert set(share) <= set(larger)
            larger = share


def test_the_seed_decides_where_a_share_lies() -> None:
    train = sections(20)
    starts = {share_of_labels(train, 0.1, seed)[0].z0 for seed in range(40)}
    assert len(starts) > 8 and min(starts) < 5 and max(starts) > 13
    assert share_of_labels(train, 0.1, 3) == share_of_labels(train, 0.1, 3)
    first = [share_of_labels(train, 0.25, seed) for seed in range(3)]
    assert not set(first[0]) & set(first[1]) and not set(first[1]) & set(first[2]), "a few seeds see different sections"


def test_fractions_of_equal_section_counts_are_one() -> None:
    assert distinct_fractions((0.1, 0.25), 20) == ((0.1, 0.25, 1.0), [])
    kept, notes = distinct_fractions((0.05, 0.1, 0.5), 4)
    assert kept == (0.1, 0.5, 1.0)
    assert len(notes) == 1 and notes[0].startswith("5% of 4 labeled sections")
    assert distinct_fractions((0.1,), 1) == ((1.0,), ["10% of 1 labeled sections is no fewer than 100%: left out"])


@pytest.fixture
def stacks(tmp_path):
    """A labelled stack of 20 sections, and a folder with another stack and a copy of the first."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (20, 40, 48), dtype=np.uint8)
    other = rng.integers(0, 255, (3, 40, 48), dtype=np.uint8)
    (tmp_path / "more").mkdir()
    for path, array in (
        (tmp_path / "stack.tif", image),
        (tmp_path / "labels.tif", image // 128),
        (tmp_path / "more" / "other.tif", other),
        (tmp_path / "more" / "copy.tif", image),
    ):
        tifffile.imwrite(path, array, photometric="minisblack")
    return tmp_path


def test_test_sections_are_seen_by_no_training(stacks) -> None:
    sources = Sources((str(stacks / "stack.tif"),), (str(stacks / "labels.tif"),), (str(stacks / "more"),))
    store = collect(sources, stacks / "data.zarr", FinetuneConfig())
    parts = parts_of(store, 0.2)
    assert parts == parts_of(store, 0.2)
    test = {(r.name, z) for r in parts.test for z in range(r.z0, r.z1)}
    seen = {(r.name, z) for r in (*parts.pretrain, *parts.train) for z in range(r.z0, r.z1)}
    assert section_count(store, parts.test) == 4 and section_count(store, parts.train) == 14
    beside = {(name, z + step) for name, z in test for step in (-2, -1, 0, 1, 2)}
    assert not seen & beside, "a test section or its neighbour is trained on"
    assert {r.name for r in parts.pretrain} == {"stack", "other"}
    assert parts.left_out == ("copy",), "the copy would show the test sections to pretraining"
    assert all(r.z1 == r.z0 + 1 for r in parts.train)
    assert described(store, parts.train) in ("stack 0-13", "stack 6-19")


def test_a_single_image_gives_strips(tmp_path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (200, 64), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", image)
    tifffile.imwrite(tmp_path / "b.tif", image // 128)
    store = collect(Sources((str(tmp_path / "a.tif"),), (str(tmp_path / "b.tif"),)), tmp_path / "s", FinetuneConfig())
    parts = parts_of(store, 0.2)
    assert len(parts.train) == len(parts.test) == 1
    (train,), (test,) = parts.train, parts.test
    assert train.y0 >= test.y1 + 20 or test.y0 >= train.y1 + 20
    assert "rows" in described(store, parts.test)


def test_too_little_to_set_aside(tmp_path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (2, 40), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", image)
    tifffile.imwrite(tmp_path / "b.tif", image // 128)
    store = collect(Sources((str(tmp_path / "a.tif"),), (str(tmp_path / "b.tif"),)), tmp_path / "s", FinetuneConfig())
    with pytest.raises(InputError, match="too little labelled data to set a test part aside"):
        parts_of(store, 0.2)


def test_unreadable_unlabelled_images_are_an_error(stacks) -> None:
    (stacks / "more" / "broken.tif").write_bytes(b"II*\0 no more")
    sources = Sources((str(stacks / "stack.tif"),), (str(stacks / "labels.tif"),), (str(stacks / "more"),))
    with pytest.raises(InputError, match=r"broken\.tif"):
        collect(sources, stacks / "data.zarr", FinetuneConfig())
