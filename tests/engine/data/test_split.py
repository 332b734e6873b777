"""The held-out part: deterministic, contiguous, never beside what is trained on."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affmae_engine.data.split import Region, Split, natural_key, split


@dataclass(frozen=True)
class Image:
    name: str
    shape_ZYX: tuple[int, int, int]
    pixel_nm: tuple[float | None, float | None, float | None] = (None, None, None)
    series_group: str = ""


def single(name: str, height: int = 100, width: int = 100) -> Image:
    return Image(name, (1, height, width), series_group=name)


def series(count: int, group: str = "run/slice", height: int = 64) -> list[Image]:
    return [Image(f"{group}{i}", (1, height, 64), series_group=group) for i in range(count)]


def sections(regions: list[Region]) -> set[tuple[str, int]]:
    return {(region.name, z) for region in regions for z in range(region.z0, region.z1)}


def test_stack_gives_one_block_at_an_end_with_a_gap() -> None:
    result = split([Image("vol", (250, 250, 250), (10.0, 10.0, 10.0))], 0.1, seed=0)
    (train,), (val,) = result.train, result.val
    assert val.z1 - val.z0 == 25
    assert val.z0 == 0 or val.z1 == 250
    gap = val.z0 - train.z1 if val.z0 else train.z0 - val.z1
    assert gap == 15  # 150 nm of 10 nm sections


def test_gap_follows_section_thickness_and_shrinks_for_short_stacks() -> None:
    thick = split([Image("vol", (100, 64, 64), (47.5, 4.6, 4.6))], 0.1, seed=0)
    assert len(sections(thick.train)) == 100 - 10 - 4
    short = split([Image("vol", (20, 64, 64), (5.0, 5.0, 5.0))], 0.1, seed=0)
    assert len(sections(short.train)) == 20 - 2 - 2


def test_series_is_treated_as_a_stack_in_numeric_order() -> None:
    result = split(series(40), 0.1, seed=3)
    held = sorted(int(region.name.removeprefix("run/slice")) for region in result.val)
    kept = sorted(int(region.name.removeprefix("run/slice")) for region in result.train)
    assert held in (list(range(4)), list(range(36, 40)))
    assert min(abs(a - b) for a in held for b in kept) == 5  # four sections lie between
    assert len(kept) == 32


def test_series_members_of_another_size_stand_apart() -> None:
    result = split([*series(30), Image("run/slice99", (1, 80, 64), series_group="run/slice")], 0.1, seed=0)
    assert "run/slice99" in {region.name for region in result.train}


def test_single_images_are_held_out_whole() -> None:
    images = [single(f"{letter}") for letter in "abcdefghijklmnopqrst"]
    result = split(images, 0.2, seed=1)
    assert len(result.val) == 4
    assert len(result.train) == 16
    assert not {r.name for r in result.val} & {r.name for r in result.train}
    assert all(region.y0 is None for region in result.train + result.val)


def test_few_single_images_hold_out_the_smallest() -> None:
    images = [single("a"), single("b", 50), single("c"), single("d")]
    assert [region.name for region in split(images, 0.05, seed=0).val] == ["b"]


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_images_give_a_strip_of_rows(count: int) -> None:
    result = split([single("a", 1000), single("b", 500)][:count], 0.05, seed=0)
    (val,) = result.val
    (train,) = [region for region in result.train if region.name == "a"]
    assert val.name == "a"
    assert val.y0 is not None and val.y1 is not None and train.y0 is not None and train.y1 is not None
    assert val.y1 - val.y0 == 200
    assert max(train.y0 - val.y1, val.y0 - train.y1) == 32
    assert {val.y0, train.y0} >= {0}


def test_a_tiny_image_cannot_be_divided() -> None:
    assert split([single("a", 1)], 0.3, seed=0) == Split([Region("a", 0, 1)], [])


@pytest.mark.parametrize("depth", [3, 5, 9])
def test_short_stack_still_gives_a_section(depth: int) -> None:
    result = split([Image("vol", (depth, 64, 64))], 0.05, seed=0)
    assert len(sections(result.val)) == 1
    assert len(sections(result.train)) == depth - 2


def test_many_short_stacks_are_held_out_whole() -> None:
    result = split([Image(f"vol{i}", (4, 64, 64)) for i in range(20)], 0.1, seed=0)
    assert sorted(region.z1 - region.z0 for region in result.val) == [4, 4]
    assert len(result.train) == 18


def test_zero_fraction_holds_nothing_out() -> None:
    result = split([single("a"), Image("vol", (50, 64, 64))], 0.0, seed=0)
    assert result.val == []
    assert len(sections(result.train)) == 51


def test_no_images() -> None:
    assert split([], 0.1, seed=0) == Split([], [])


def test_seed_decides_and_order_does_not() -> None:
    images = [*series(30), *(single(letter) for letter in "abcdefgh"), Image("vol", (60, 64, 64))]
    assert split(images, 0.1, seed=5) == split(images[::-1], 0.1, seed=5)
    assert len({str(split(images, 0.1, seed=seed)) for seed in range(8)}) > 1


def test_natural_order_of_names() -> None:
    assert sorted(["s10", "s9", "s1b", "s1"], key=natural_key) == ["s1", "s1b", "s9", "s10"]


@settings(max_examples=150, deadline=None)
@given(
    stacks=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 300)), max_size=6),
    members=st.integers(0, 40),
    fraction=st.floats(0.0, 0.6),
    seed=st.integers(0, 99),
)
def test_parts_never_touch(stacks: list[tuple[int, int]], members: int, fraction: float, seed: int) -> None:
    images = [Image(f"v{i}_", (depth, height, 8), series_group=f"v{i}") for i, (depth, height) in enumerate(stacks)]
    images += series(members)
    result = split(images, fraction, seed=seed)
    train, val = sections(result.train), sections(result.val)
    by_rows = {region.name for region in result.val if region.y0 is not None}
    for name, z in val:
        if name in by_rows:
            rows = [(r.y0, r.y1) for r in result.train + result.val if r.name == name and r.z0 <= z < r.z1]
            (a, b), (c, d) = sorted((y0 or 0, y1 or 0) for y0, y1 in rows)
            assert a < b < c < d
            continue
        assert not {(name, z), (name, z - 1), (name, z + 1)} & train
        if name.startswith("run/slice"):
            number = int(name.removeprefix("run/slice"))
            assert not {(f"run/slice{number + step}", 0) for step in (-1, 1)} & train
    assert train or not images
