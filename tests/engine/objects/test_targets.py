"""Targets for learning objects: against brute force, losses that can be minimized, and a full round trip."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy import ndimage

from affmae_engine.objects.decode import DecodeOptions
from affmae_engine.objects.targets import (
    IGNORE,
    InstanceLoss,
    ObjectValidation,
    channel_names,
    instance_targets,
    looks_like_ids,
    to_maps,
)


def dense_cells(shape: tuple[int, int] = (96, 128), count: int = 20, seed: int = 1) -> np.ndarray:
    """Touching cells without anything in between."""
    centers = np.random.default_rng(seed).uniform(0, 1, (count, 2)) * shape
    grid = np.stack(np.indices(shape), -1)[..., None, :]
    return (((grid - centers) ** 2).sum(-1).argmin(-1) + 1).astype(np.uint32) * np.uint32(1000)


@settings(max_examples=60, deadline=None)
@given(
    npst.arrays(np.uint32, st.tuples(st.integers(1, 8), st.integers(1, 8)), elements=st.sampled_from([0, 3, 4, 900]))
)
def test_boundary_and_distance_equal_brute_force(ids: np.ndarray) -> None:
    targets = instance_targets(ids, cap=3.0)
    y, x = np.indices(ids.shape)
    for i, j in np.ndindex(ids.shape):
        steps = np.abs(y - i) + np.abs(x - j)
        assert targets.boundary_HW[i, j] == (ids[steps <= 1] != ids[i, j]).any()
        other = ids != ids[i, j]
        gap = np.sqrt(((y - i) ** 2 + (x - j) ** 2)[other]).min() if other.any() else np.inf
        assert targets.distance_HW[i, j] == pytest.approx(min(gap / 3, 1) if ids[i, j] else 0)
    np.testing.assert_array_equal(targets.class_HW, ids > 0)


def test_classes_by_id_and_pixels_without_label() -> None:
    ids = np.array([[0, 5, 5], [7, 7, 9]])
    class_of = np.zeros(10, int)
    class_of[[5, 7]] = 2, 1
    targets = instance_targets(ids, class_of=class_of, ignore_id=9)
    assert targets.class_HW.tolist() == [[0, 2, 2], [1, 1, IGNORE]]


@pytest.mark.parametrize(
    ("values", "ids"),
    [
        ([0, 1, 2], False),
        ([0, 255], False),
        ([0, 128, 255], False),
        (range(60), True),
        ([0, 12, 90000], True),
        ([], False),
    ],
)
def test_ids_are_told_from_classes(values: list[int], ids: bool) -> None:
    assert looks_like_ids(values) == ids


def perfect_logits(targets: list, sharp: float = 12.0) -> torch.Tensor:
    """Logits that give back the targets."""
    images = []
    for t in targets:
        inside = torch.from_numpy(t.class_HW > 0).float()
        boundary = torch.from_numpy(t.boundary_HW)
        distance = torch.from_numpy(t.distance_HW).clamp(1e-4, 1 - 1e-4).logit()
        images.append(torch.stack([sharp * (1 - inside), sharp * inside, sharp * (2 * boundary - 1), distance]))
    return torch.stack(images)


def batch(targets: list) -> tuple[torch.Tensor, ...]:
    names = ("class_HW", "boundary_HW", "distance_HW")
    return tuple(torch.stack([torch.from_numpy(getattr(t, name)) for t in targets]) for name in names)


@pytest.mark.parametrize("dense", [True, False])
def test_perfect_maps_give_back_the_objects(dense: bool) -> None:
    ids = dense_cells()
    if not dense:
        ids = np.where(ndimage.binary_erosion(instance_targets(ids).boundary_HW == 0, iterations=4), ids, 0)
    maps = to_maps(perfect_logits([instance_targets(ids)]))[0].numpy()
    validation = ObjectValidation(DecodeOptions(sections=True, seed_distance=2, fill_holes=False))
    objects = validation.add(maps, ids)
    validation.add(maps, ids)
    scores = validation.scores()
    assert scores.true_objects == 2 * (len(np.unique(ids)) - (0 in ids))
    assert objects.max() == scores.predicted_objects / 2
    assert scores.f1_75 > 0.9 and scores.adapted_rand_error < 0.02
    assert len(maps) == len(channel_names(("background", "cell")))


def test_loss_is_small_for_perfect_maps_and_its_gradient_leads_there() -> None:
    targets = [instance_targets(dense_cells((32, 40), 6, seed)) for seed in (1, 2)]
    loss = InstanceLoss([1.0, 1.0])
    perfect = loss(perfect_logits(targets), *batch(targets))
    assert {name: v.item() for name, v in perfect.items()} == pytest.approx(dict.fromkeys(perfect, 0.0), abs=0.02)
    logits = torch.zeros(2, 4, 32, 40, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    first = loss(logits, *batch(targets))["loss"].item()
    for _ in range(60):
        optimizer.zero_grad()
        value = loss(logits, *batch(targets))["loss"]
        value.backward()
        optimizer.step()
    assert value.item() < 0.2 * first
    assert (to_maps(logits)[:, 2].round() == batch(targets)[1]).float().mean() > 0.98


def test_pixels_without_label_have_no_gradient() -> None:
    ids = dense_cells((32, 40), 6).astype(np.int64)
    ids[:, 20:] = -7
    targets = [instance_targets(ids, ignore_id=-7)]
    logits = torch.randn(1, 4, 32, 40, generator=torch.Generator().manual_seed(0), requires_grad=True)
    InstanceLoss([1.0, 2.0])(logits, *batch(targets))["loss"].backward()
    assert (logits.grad[..., 20:] == 0).all() and (logits.grad[..., :20] != 0).any()
    with pytest.raises(ValueError, match="channels"):
        InstanceLoss([1.0])(logits, *batch(targets))
