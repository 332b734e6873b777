"""Training samples for segmentation: image and labels in step, purity, rare classes, borders, bad labels."""

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from affmae_engine.config import DataConfig, FinetuneConfig, ModelConfig, RunConfig
from affmae_engine.data.labels import IGNORE
from affmae_engine.data.normalise import Normalisation
from affmae_engine.data.segmentation import ClassIndex, SegmentationDataset, sections_of
from affmae_engine.data.segmentation_augment import (
    change_intensities,
    draw_intensities,
    draw_warp,
    gaussian_noise,
    largest_reach,
    source_coordinates,
    window_of,
)
from affmae_engine.data.split import Region
from affmae_engine.data.store import Store
from affmae_engine.errors import InputError
from affmae_kernels.warped_crops.reference import fold

STILL = FinetuneConfig(elastic=0, rotation=0, scale=0, photometric=0)


def pattern(depth: int, height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels 0..2 in smooth blobs, and an image that is 60 * label: what one shows, the other must show."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 3, (depth, height // 16 + 2, width // 16 + 2))
    labels = coarse.repeat(16, 1).repeat(16, 2)[:, :height, :width].astype(np.uint8)
    return labels * np.uint8(60), labels


def make_dataset(store: Store, *, seed: int = 0, size: int = 64, regions: list[Region] | None = None, **fields: Any):
    config = RunConfig(
        model=ModelConfig(size="tiny"), data=DataConfig(crop_size=size), finetune=FinetuneConfig(**fields)
    )
    regions = regions or [Region(image.name, 0, image.shape_ZYX[0]) for image in store.images]
    return SegmentationDataset(
        store, regions, config, classes=len(store.class_names), normalisation=Normalisation(), seed=seed
    )


@pytest.fixture
def store(make_labelled_store: Callable[..., Store]) -> Store:
    return make_labelled_store({"a": pattern(3, 150, 130), "b": pattern(1, 40, 50, seed=1)})


def test_image_and_labels_move_in_step(store: Store):
    dataset = make_dataset(store, photometric=0)
    for index in range(8):
        sample = dataset.sample(index)
        image, labels = sample["image"][0], sample["labels"]
        assert image.shape == labels.shape == (64, 64)
        assert (image.dtype, labels.dtype) == (torch.float32, torch.int64)
        level = {int(k): float(image[labels == k].median()) for k in labels.unique() if k != IGNORE}
        for k, grey in level.items():
            # away from blob borders (bilinear against nearest) every pixel has the grey of its class
            assert ((image[labels == k] - grey).abs() < 0.1).float().mean() > 0.8
        assert [level[k] for k in sorted(level)] == sorted(level.values())


def test_a_sample_is_a_pure_function_of_seed_and_index(store: Store):
    one, again, other = make_dataset(store), make_dataset(store), make_dataset(store, seed=1)
    later = again.sample(5)
    again = pickle.loads(pickle.dumps(again))  # noqa: S301 (as worker processes get it)
    for name, tensor in one.sample(5).items():
        assert torch.equal(tensor, again.sample(5)[name])
        assert torch.equal(tensor, later[name])
        assert not torch.equal(tensor, one.sample(6)[name])
        assert not torch.equal(tensor, other.sample(5)[name])
    assert one.describe(5).startswith(("a, section", "b, section"))


def test_without_augmentation_a_crop_is_a_part_of_the_image(make_labelled_store: Callable[..., Store]):
    image = np.arange(80 * 90, dtype=np.uint16).reshape(1, 80, 90)
    labels = (np.arange(80 * 90).reshape(1, 80, 90) % 2).astype(np.uint8)
    store = make_labelled_store({"a": (image, labels)})
    config = RunConfig(model=ModelConfig(size="tiny"), data=DataConfig(crop_size=32, flips=False), finetune=STILL)
    scale = Normalisation("dataset", mean=3600.0, std=1000.0)
    dataset = SegmentationDataset(store, [Region("a", 0, 1)], config, classes=2, normalisation=scale, seed=0)
    sample = dataset.sample(3)
    row = 1000 * sample["image"][0, 0]
    torch.testing.assert_close(row - row[0], torch.arange(32.0), atol=1e-3, rtol=0)
    assert (sample["labels"] != IGNORE).all()


def test_an_image_smaller_than_the_crop_is_mirrored_and_not_learned_there(store: Store):
    dataset = make_dataset(store, regions=[Region("b", 0, 1)], elastic=0, rotation=0, scale=0, photometric=0)
    sample = dataset.sample(0)
    known = sample["labels"] != IGNORE
    assert int(known.sum()) == 40 * 50
    assert sample["image"].isfinite().all()
    assert sample["image"][0][~known].std() > 0


def test_a_region_of_rows_stays_within_its_rows(make_labelled_store: Callable[..., Store]):
    labels = np.zeros((1, 120, 90), np.uint8)
    labels[:, 60:] = 1
    labels[:, 55:60] = 2
    store = make_labelled_store({"a": (labels * np.uint8(100), labels)})
    dataset = make_dataset(store, regions=[Region("a", 0, 1, 0, 55)], size=32)
    assert dataset.index.counts == (55 * 90, 0, 0)
    assert all(set(dataset.sample(i)["labels"].unique().tolist()) <= {0, IGNORE} for i in range(10))


def test_rare_classes_are_seen_often(make_labelled_store: Callable[..., Store]):
    labels = np.zeros((2, 300, 300), np.uint8)
    labels[0, 150:154, 20:24] = 1
    labels[:, 200:, 200:] = 2
    store = make_labelled_store({"a": (labels * np.uint8(50), labels)})
    dataset = make_dataset(store, size=32)
    seen = [int((dataset.sample(i)["labels"] == 1).any()) for i in range(90)]
    assert sum(seen) > 6  # about a ninth of the samples; by chance it would be one in a hundred


def test_the_ignore_label_is_ignored_and_sparse_annotation_is_found(make_labelled_store: Callable[..., Store]):
    labels = np.full((1, 400, 400), 255, np.uint8)
    labels[0, :20, :20], labels[0, :20, 20:40] = 0, 1
    store = make_labelled_store({"a": (pattern(1, 400, 400)[0], labels)}, ignore_label=255)
    dataset = make_dataset(store, size=32, ignore_label=255)
    assert dataset.index.counts == (400, 400)
    found = [bool((dataset.sample(i)["labels"] != IGNORE).any()) for i in range(20)]
    assert all(found)


def test_a_label_that_is_no_class_never_reaches_the_loss(store: Store):
    with pytest.raises(InputError, match=r"labels of a, section 0, have values 2; the classes are 0 to 1"):
        ClassIndex.build(store, sections_of(store, [Region("a", 0, 1)]), classes=2, ignore_label=None, seed=0)


def test_large_sets_are_read_window_by_window(store: Store, monkeypatch: pytest.MonkeyPatch):
    kept = make_dataset(store)
    monkeypatch.setattr("affmae_engine.data.segmentation._KEPT_BYTES", 0)
    read = make_dataset(store)
    for index in range(4):
        assert all(torch.equal(kept.sample(index)[name], read.sample(index)[name]) for name in ("image", "labels"))


def test_an_epoch_covers_the_pixels_once(store: Store):
    assert make_dataset(store).samples_per_epoch == round((3 * 150 * 130 + 40 * 50) / 64**2)


def test_a_batch_of_raw_samples_becomes_the_samples(store: Store):
    dataset = make_dataset(store)
    raw = [dataset.raw(index) for index in range(6)]
    batch = dataset.finish({name: torch.stack([sample[name] for sample in raw]) for name in raw[0]})
    for index in range(6):
        for name, tensor in dataset.sample(index).items():
            torch.testing.assert_close(batch[name][index], tensor, rtol=1e-5, atol=1e-5)


def test_sections_kept_on_the_device_give_the_same_samples(store: Store):
    read, kept = make_dataset(store), make_dataset(store)
    kept.keep_on(torch.device("cpu"), 10)
    assert "window" in kept.raw(0)  # too large
    kept.keep_on(torch.device("cpu"), 2**30)
    there = pickle.loads(pickle.dumps(kept))  # noqa: S301 (as worker processes get it)
    for index in range(6):
        raw = there.raw(index)
        assert sum(tensor.numel() for tensor in raw.values()) < 1000
        batch = kept.finish({name: tensor[None] for name, tensor in raw.items()})
        for name, tensor in read.sample(index).items():
            assert torch.equal(batch[name][0], tensor)


def test_single_samples_are_made_on_the_host_wherever_sections_are_kept(store: Store):
    read, kept = make_dataset(store), make_dataset(store)
    kept.keep_on(torch.device("meta"), 2**30)
    assert "window" not in kept.raw(0)
    for name, tensor in read.sample(3).items():
        assert torch.equal(kept.sample(3)[name], tensor)


def coordinates(seed: int, size: int, config: FinetuneConfig, *, flips: bool = False) -> np.ndarray:
    warp = draw_warp(np.random.default_rng(seed), size, config, flips=flips)
    matrix, lattice = torch.from_numpy(warp.matrix_22)[None], torch.from_numpy(warp.lattice_2PP)[None]
    return source_coordinates(matrix, lattice, size, config.elastic)[0].numpy()


NOTHING = FinetuneConfig(elastic=0, rotation=0, scale=0)


def test_the_warp_has_no_folds_and_no_larger_displacement_than_asked():
    for seed in range(5):
        warp = coordinates(seed, 96, FinetuneConfig(elastic=12, rotation=0, scale=0))
        assert np.hypot(*(warp - coordinates(seed, 96, NOTHING))).max() <= 12
        dy, dx = np.gradient(warp[0]), np.gradient(warp[1])
        assert (dy[0] * dx[1] - dy[1] * dx[0]).min() > 0  # orientation is kept everywhere


def test_no_warp_reaches_farther_than_it_says():
    config = FinetuneConfig(elastic=12, rotation=170, scale=0.4)
    for seed in range(20):
        warp = draw_warp(np.random.default_rng(seed), 40, config, flips=True)
        found = np.abs(coordinates(seed, 40, config, flips=True)).max((1, 2))
        assert (found <= np.array(warp.reach(40)) + 1e-3).all()
        assert max(warp.reach(40)) <= largest_reach(40, config)


@given(center=st.floats(-30, 60), reach=st.floats(0.5, 90), length=st.integers(1, 40), share=st.floats(-1, 1))
def test_the_window_holds_what_is_touched(center: float, reach: float, length: int, share: float):
    window = window_of(center, reach, length)
    place = fold(torch.tensor([center + share * reach]), torch.tensor([length]))[0]
    assert 0 <= window.start <= float(place.floor()) and float(place.ceil()) < window.stop <= length


def test_without_anything_drawn_the_warp_is_the_identity():
    warp = coordinates(0, 5, NOTHING)
    np.testing.assert_allclose(warp[0][:, 0], [-2, -1, 0, 1, 2], atol=1e-6)
    np.testing.assert_allclose(warp[1][0], [-2, -1, 0, 1, 2], atol=1e-6)


def test_flips_and_quarter_turns_reach_all_eight_orientations():
    corners = set()
    for seed in range(60):
        warp = coordinates(seed, 3, NOTHING, flips=True)
        corners.add(tuple(np.rint(warp[:, [0, 0], [0, 2]]).astype(int).ravel().tolist()))
    assert len(corners) == 8


def test_coordinates_fold_at_the_outermost_pixels():
    folded, outside = fold(torch.tensor([-2, -0.4, 0, 3, 3.4, 4, 6, 7]), torch.tensor(4))
    torch.testing.assert_close(folded, torch.tensor([2, 0.4, 0, 3, 2.6, 2, 0, 1]), atol=1e-6, rtol=0)
    assert outside.tolist() == [True, False, False, False, False, True, True, True]
    assert fold(torch.tensor([-3.0, 0, 9]), torch.tensor(1))[0].tolist() == [0, 0, 0]


def test_intensity_changes_scale_with_their_strength():
    image = torch.randn(8, 40, 40, generator=torch.Generator().manual_seed(0))
    seed = torch.arange(8, dtype=torch.int32)

    def changed(strength: float) -> torch.Tensor:
        drawn = [draw_intensities(np.random.default_rng(s), strength) for s in range(8)]
        return change_intensities(image, torch.from_numpy(np.stack(drawn)), seed)

    torch.testing.assert_close(changed(0.0), image, atol=1e-5, rtol=0)
    weak, strong = ((changed(strength) - image).abs().mean() for strength in (0.05, 0.4))
    assert strong > 3 * weak
    flat = change_intensities(torch.zeros(1, 8, 8), torch.tensor([[1.1, 1.0, 0.1, 0.1]]), seed[:1])
    assert flat.isfinite().all()


def test_noise_is_normal_and_differs_between_seeds_and_pixels():
    noise = gaussian_noise(torch.tensor([1, 2, -7], dtype=torch.int32), (200, 300))
    assert noise.mean().abs() < 0.01 and (noise.std() - 1).abs() < 0.01
    assert (noise.abs() > 2).float().mean() == pytest.approx(0.0455, abs=0.003)
    flat = noise.flatten(1)
    assert torch.corrcoef(torch.cat([flat[:, 1:], flat[:, :-1]])).fill_diagonal_(0).abs().max() < 0.02
    again = gaussian_noise(torch.tensor([2], dtype=torch.int32), (200, 300))
    assert torch.equal(again[0], noise[1])
