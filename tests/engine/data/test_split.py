"""The held-out part: deterministic, contiguous, never beside what is trained on."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from affmae_engine.data.ingest import ingest
from affmae_engine.data.split import Region, Split, natural_key, split
from affmae_engine.data.store import Store


@dataclass(frozen=True)
class Image:
    name: str
    shape_ZYX: tuple[int, int, int]
    pixel_nm: tuple[float | None, float | None, float | None] = (None, None, None)
    series_group: str = ""
    source_path: str = ""
    source_series: str = ""
    source_mtime_ns: int = 0
    sha256: str = ""
    pixels_hash: str = ""

    def __post_init__(self) -> None:
        for field, value in (("source_path", f"/data/{self.name}.tif"), ("sha256", self.name)):
            object.__setattr__(self, field, getattr(self, field) or value)


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


@pytest.mark.parametrize("seed", range(6))
def test_one_image_labelled_twice_stays_on_one_side(seed: int) -> None:
    twice = [Image(f"a by {who}", (1, 50, 50), series_group=who, sha256="a") for who in ("Ann", "Ben")]
    result = split([*twice, *(single(letter) for letter in "bcdef")], 0.3, seed=seed)
    train, val = ({region.name for region in part} for part in (result.train, result.val))
    assert val and train | val == {"a by Ann", "a by Ben", *"bcdef"}
    assert not ({"a by Ann", "a by Ben"} & train and {"a by Ann", "a by Ben"} & val)


@pytest.mark.parametrize("seed", range(4))
def test_a_series_labelled_twice_is_held_out_section_by_section(seed: int) -> None:
    images = [
        Image(f"{who}{i}", (1, 64, 64), series_group=who, sha256=f"{i}", source_path=f"/{who}/{i}.tif")
        for who in ("ann", "ben") for i in range(40)
    ]  # fmt: skip
    images.append(Image("stack", (40, 64, 64)))
    images.append(Image("stack-ben", (40, 64, 64), sha256="stack"))
    result = split(images, 0.1, seed=seed)
    val, train = sections(result.val), sections(result.train)
    assert len(val) == 16 and len(train) == 4 * 32
    for part in (val, train):
        assert {(name.replace("ann", "ben"), z) for name, z in part if name.startswith("ann")} == {
            place for place in part if place[0].startswith("ben")
        }
        assert {z for name, z in part if name == "stack"} == {z for name, z in part if name == "stack-ben"}


@pytest.mark.parametrize("seed", range(4))
def test_versions_of_a_file_do_not_face_each_other(seed: int) -> None:
    grown = [
        Image("stack", (20, 64, 64), source_path="/s.tif", source_mtime_ns=1),
        Image("stack-2", (40, 64, 64), source_path="/s.tif", source_mtime_ns=2),
    ]
    result = split(grown, 0.1, seed=seed)
    assert {name for name, _ in sections(result.train) | sections(result.val)} == {"stack-2"}
    brighter = [grown[1], Image("stack-3", (40, 64, 64), source_path="/s.tif", source_mtime_ns=3)]
    result = split(brighter, 0.1, seed=seed)
    for part in (result.train, result.val):
        assert {z for name, z in sections(part) if name == "stack-2"} == {
            z for name, z in sections(part) if name == "stack-3"
        }
    assert sections(split(grown, 0.0, seed=seed).train) == {(i.name, z) for i in grown for z in range(i.shape_ZYX[0])}
    whole = split([*grown, *(Image(f"v{i}", (400, 64, 64)) for i in range(3))], 0.01, seed=seed)
    assert {"stack", "stack-2"} <= {region.name for region in whole.train}


def test_channels_of_one_section_stay_on_one_side() -> None:
    channels = [Image(name, (40, 64, 64), source_path="/s.tif", sha256="s") for name in ("se", "bse")]
    result = split(channels, 0.1, seed=0)
    held = sections(result.val)
    assert {z for name, z in held if name == "se"} == {z for name, z in held if name == "bse"} != set()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("labelled", [[50, 51, 52, 53, 54, 55], [3, 20, 40, 60, 99], list(range(0, 100, 4))])
def test_only_usable_sections_are_divided(labelled: list[int], seed: int) -> None:
    result = split([Image("vol", (100, 64, 64))], 0.1, seed=seed, usable={"vol": labelled})
    train, val = ({z for _, z in sections(part)} for part in (result.train, result.val))
    assert val and train and (train | val) <= set(labelled)
    assert min(abs(a - b) for a in train for b in val) >= 2
    assert max(val) < min(train) or max(train) < min(val)
    assert len(train) + len(val) >= len(labelled) - 1
    two = split([Image("vol", (100, 64, 64))], 0.1, seed=seed, usable={"vol": [7, 70]})
    assert {z for _, z in sections(two.val)} == {7, 70} and all(region.y1 for region in two.val)
    assert split([Image("vol", (100, 64, 64)), single("a")], 0.0, seed=seed, usable={"a": [0]}).train == [
        Region("a", 0, 1)
    ]


def _zarr_group(folder: Path, sections: list[np.ndarray]) -> None:
    group = zarr.create_group(folder / "stack.zarr")
    for number, section in enumerate(sections):
        group.create_array(f"s{number:03}", data=section)


def _ome_series(folder: Path, sections: list[np.ndarray]) -> None:
    with tifffile.TiffWriter(folder / "stack.ome.tif") as file:
        for section in sections:
            file.write(section, metadata={"axes": "YX"})


def _folder_each(folder: Path, sections: list[np.ndarray]) -> None:
    for number, section in enumerate(sections):
        (folder / f"Section_{number:03}").mkdir()
        tifffile.imwrite(folder / f"Section_{number:03}" / "em.tif", section)


@pytest.mark.parametrize("save", [_zarr_group, _ome_series, _folder_each])
def test_sections_that_were_taken_in_one_by_one_are_a_series(
    tmp_path: Path, save: Callable[[Path, list[np.ndarray]], None]
) -> None:
    (tmp_path / "in").mkdir()
    save(tmp_path / "in", [np.eye(24, dtype=np.uint8) + np.uint8(number) for number in range(1, 21)])
    store = ingest([tmp_path / "in"], tmp_path / "em.zarr", workers=1).store
    images = Store.open(store)
    for seed in range(3):
        result = split(images.images, 0.1, seed=seed)
        train, val = ({int(images[r.name].statistics.minimum) for r in part} for part in (result.train, result.val))
        assert (len(val), len(train)) == (2, 16) and val in ({1, 2}, {19, 20})
        assert min(abs(a - b) for a in train for b in val) == 3


def classes_of(table: dict[tuple[str, int], set[int]]) -> Callable[[Region], set[int]]:
    return lambda region: {k for z in range(region.z0, region.z1) for k in table.get((region.name, z), {0})}


@pytest.mark.parametrize("seed", range(8))
def test_the_only_image_of_a_class_is_never_held_out(seed: int) -> None:
    for images in (series(6), [single(letter) for letter in "abcdef"]):
        for rare in images:
            found = classes_of({(rare.name, 0): {0, 1}})
            result = split(images, 0.2, seed=seed, classes=found)
            assert result.val and rare.name in {region.name for region in result.train}


@pytest.mark.parametrize("seed", range(8))
def test_the_held_out_part_has_every_class_that_training_can_spare(seed: int) -> None:
    middle = {("vol", z): {0, 1} for z in range(40, 60)}
    result = split([Image("vol", (100, 64, 64))], 0.1, seed=seed, classes=classes_of(middle))
    for part in (result.train, result.val):
        assert {("vol", z) for z in range(40, 60)} & sections(part)
    assert min(abs(a - b) for _, a in sections(result.train) for _, b in sections(result.val)) > 4
    letters = [single(letter) for letter in "abcdefghij"]
    rare = {("a", 0): {0, 1}, ("b", 0): {0, 1}, ("c", 0): {0, 2}, ("d", 0): {0, 2}}
    held = {name for name, _ in sections(split(letters, 0.2, seed=seed, classes=classes_of(rare)).val)}
    assert len(held) == 2 and len(held & {"a", "b"}) == len(held & {"c", "d"}) == 1


def test_classes_that_are_everywhere_change_nothing() -> None:
    images = [*series(30), *(single(letter) for letter in "abcdefgh"), Image("vol", (60, 64, 64))]
    for seed in range(5):
        assert split(images, 0.1, seed=seed) == split(images, 0.1, seed=seed, classes=classes_of({}))


def test_a_strip_of_one_image_is_placed_where_the_classes_are() -> None:
    def classes(region: Region) -> set[int]:
        return {0, 1} if (region.y0 or 0) < 600 and (region.y1 or 1000) > 300 else {0}

    for seed in range(4):
        result = split([single("a", 1000)], 0.2, seed=seed, classes=classes)
        assert classes(result.val[0]) == {0, 1} and any(classes(region) == {0, 1} for region in result.train)


@pytest.mark.parametrize("seed", range(4))
def test_labeled_sections_far_apart_need_no_gap(seed: int) -> None:
    images = [Image(f"vol_z{z:03}", (1, 64, 64), series_group="vol") for z in (3, 10, 17, 24)]
    result = split(images, 0.2, seed=seed, classes=classes_of({}))
    assert (len(result.train), len(result.val)) == (3, 1)
    near = [Image(f"vol_z{z:03}", (1, 64, 64), series_group="vol") for z in (3, 4, 5, 6)]
    assert len(split(near, 0.2, seed=seed, classes=classes_of({})).train) == 2


def test_a_split_is_kept_as_json() -> None:
    result = split([single("a", 1000)], 0.2, seed=0)
    assert Split.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    assert split([Image("vol", (40, 64, 64))], 0.2, seed=1).held_out[0].startswith("vol sections ")


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
