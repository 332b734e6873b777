"""Pretraining samples: pure functions of (seed, index), from the right pixels, and never from nothing."""

import contextlib
import itertools
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from affmae_engine.config import RunConfig
from affmae_engine.data.dataset import PretrainDataset, as_channels
from affmae_engine.data.loading import batches
from affmae_engine.data.split import Region
from affmae_engine.data.store import Store
from affmae_engine.errors import CorruptError, InputError
from affmae_engine.model.masking import draw_mask

StoreMaker = Callable[..., Store]


def config(**data: Any) -> RunConfig:
    return RunConfig.model_validate(
        {"model": {"size": "tiny"}, "data": {"crop_size": 32, **data}, "mask": {"lattices": (2, 3)}}
    )


def texture(shape: tuple[int, int, int], dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(20, 220, shape).astype(dtype)


def whole(store: Store) -> list[Region]:
    return [Region(image.name, 0, image.shape_ZYX[0]) for image in store.images]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_sample_contents(make_store: StoreMaker) -> None:
    store = make_store({"a": texture((3, 90, 70)), "b": texture((1, 64, 64), "uint16", 1)})
    dataset = PretrainDataset(store, whole(store), config(), seed=7)
    sample = dataset.sample(0)
    assert sample["image"].shape == (1, 32, 32)
    assert sample["image"].dtype == torch.float32
    assert torch.isfinite(sample["image"]).all()
    assert sorted(torch.cat([sample["visible"], sample["masked"]]).tolist()) == list(range(16))
    visible, masked = draw_mask((4, 4), config().mask, seed=7, index=0)
    assert torch.equal(sample["visible"], visible)
    assert torch.equal(sample["masked"], masked)
    assert dataset.samples_per_epoch == 3 * 6 + 4
    assert dataset.notes == []


def test_pure_function_of_seed_and_index(make_store: StoreMaker) -> None:
    store = make_store({"a": texture((4, 80, 80))})
    dataset = PretrainDataset(store, whole(store), config(clahe=True), seed=3)
    again = pickle.loads(pickle.dumps(dataset))  # noqa: S301 (a round trip of our own)
    backwards = {i: again.sample(i) for i in reversed(range(6))}
    assert all(equal(dataset.sample(i), backwards[i]) for i in range(6))
    assert not equal(dataset.sample(0), dataset.sample(1))
    other = PretrainDataset(store, whole(store), config(), seed=4)
    assert not equal(dataset.sample(0), other.sample(0))


def test_workers_and_resuming_do_not_change_the_stream(make_store: StoreMaker) -> None:
    store = make_store({"a": texture((4, 80, 80))})
    dataset = PretrainDataset(store, whole(store), config(), seed=0)
    streams = []
    for workers, first in ((0, 0), (2, 0), (2, 2)):
        with contextlib.closing(batches(dataset, first=first, batch_size=4, micro_batch=2, workers=workers)) as stream:
            streams.append(list(itertools.islice(stream, 8 - 2 * first)))
    assert all(equal(a, b) for a, b in zip(streams[0], streams[1], strict=True))
    assert all(equal(a, b) for a, b in zip(streams[0][4:], streams[2], strict=True))


def test_crops_are_pixels_of_the_image(make_store: StoreMaker) -> None:
    block = texture((2, 48, 60))
    store = make_store({"a": block})
    dataset = PretrainDataset(store, whole(store), config(crop_scale=(1.0, 1.0), flips=False), seed=0)
    normalised = (block - block.mean(dtype=float)) / block.std(dtype=float)
    windows = np.lib.stride_tricks.sliding_window_view(normalised, (32, 32), axis=(1, 2))
    for index in range(4):
        crop = dataset.sample(index)["image"][0].numpy()
        assert np.abs(windows - crop).max(axis=(-2, -1)).min() < 1e-4


def test_images_are_drawn_in_proportion_to_their_pixels(make_store: StoreMaker) -> None:
    store = make_store({"big": texture((3, 64, 64)), "small": texture((1, 64, 64))})
    dataset = PretrainDataset(store, whole(store), config(), seed=0)
    counts = Counter(dataset.describe(index).split("'")[1] for index in range(2000))
    assert 0.70 < counts["big"] / 2000 < 0.80
    sections = {dataset.describe(index) for index in range(200)}
    assert len(sections) == 4


def test_regions_are_respected(make_store: StoreMaker) -> None:
    block = np.concatenate([np.zeros((2, 64, 64)), np.full((2, 64, 64), 200)]).astype(np.uint8)
    block += texture(block.shape) // 20
    block[2:, :32] = 100
    store = make_store({"a": block})
    dataset = PretrainDataset(store, [Region("a", 2, 4, 32, 64)], config(), seed=0)
    assert all(dataset.sample(index)["image"].min() > 0.5 for index in range(20))


def test_blank_images_and_empty_areas_are_avoided(make_store: StoreMaker) -> None:
    half = texture((1, 64, 256))
    half[..., 128:] = 127
    store = make_store({"blank": np.full((5, 64, 64), 9, np.uint8), "half": half})
    dataset = PretrainDataset(store, whole(store), config(crop_scale=(0.5, 0.5)), seed=0)
    deviations = [dataset.sample(index)["image"].std() for index in range(60)]
    assert sum(float(d) < 0.05 for d in deviations) <= 3  # half of the area shows nothing
    assert dataset.notes == ["image 'blank' is blank and left out"]


def test_nan_pixels_stay_out_of_samples(make_store: StoreMaker) -> None:
    block = texture((1, 64, 64), "float32")
    block[0, ::7, ::5] = np.nan
    block[0, 3, 3] = np.inf
    store = make_store({"a": block})
    dataset = PretrainDataset(store, whole(store), config(), seed=0)
    assert all(torch.isfinite(dataset.sample(index)["image"]).all() for index in range(10))


def test_small_images_are_enlarged_and_said_so(make_store: StoreMaker) -> None:
    store = make_store({"small": texture((1, 20, 300)), "line": texture((1, 1, 300))})
    dataset = PretrainDataset(store, whole(store), config(), seed=0)
    assert dataset.sample(0)["image"].shape == (1, 32, 32)
    assert dataset.sample(0)["image"].std() > 0.3
    assert len(dataset.notes) == 2
    assert "'line'" in dataset.notes[0] and "left out" in dataset.notes[0]
    assert "'small'" in dataset.notes[1] and "enlarged" in dataset.notes[1]


def test_nothing_to_train_on(make_store: StoreMaker) -> None:
    store = make_store({"line": texture((1, 1, 300)), "blank": np.zeros((1, 99, 99), np.uint8)})
    with pytest.raises(InputError, match=r"nothing to train on.*'blank' is blank.*'line' is smaller"):
        PretrainDataset(store, whole(store), config(), seed=0)
    with pytest.raises(InputError, match="no images"):
        PretrainDataset(store, [], config(), seed=0)


def test_damage_names_image_and_section(make_store: StoreMaker) -> None:
    store = make_store({"a": texture((1, 64, 64))})
    for shard in (store.path / "images" / "a" / "0" / "c").rglob("*"):
        if shard.is_file():
            shard.unlink()
    dataset = PretrainDataset(store, whole(store), config(), seed=0)
    with pytest.raises(CorruptError, match="section 0 of image 'a'"):
        dataset.sample(0)


def test_unexpected_errors_name_image_and_section(make_store: StoreMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("odd")

    store = make_store({"a": texture((1, 64, 64))})
    dataset = PretrainDataset(store, whole(store), config(), seed=0)
    monkeypatch.setattr(Store, "read", fail)
    with pytest.raises(InputError, match="cannot load section 0 of image 'a': ValueError: odd"):
        dataset.sample(0)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_batch_of_raw_samples_becomes_the_samples(make_store: StoreMaker, dtype: str) -> None:
    store = make_store({"a": texture((2, 64, 80), dtype), "b": texture((1, 40, 50), "uint8")})
    dataset = PretrainDataset(store, whole(store), config(crop_scale=(0.5, 1.4)), seed=0)
    raw = [dataset.raw(index) for index in range(12)]
    assert all(sample["crop"].shape == raw[0]["crop"].shape for sample in raw)
    assert raw[0]["crop"].dtype == (torch.uint8 if dtype == "uint8" else torch.float32)
    batch = dataset.finish({name: torch.stack([sample[name] for sample in raw]) for name in raw[0]})
    for index in range(12):
        sample = dataset.sample(index)
        assert all(torch.equal(batch[name][index], sample[name]) for name in sample)


def test_grey_is_repeated_over_channels() -> None:
    assert as_channels(np.ones((4, 4), np.float32), 3).shape == (3, 4, 4)
