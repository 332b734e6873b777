"""Masks: counts, determinism, coherence, ties."""

import numpy as np
import pytest
import torch

from affmae_engine.config import MaskConfig
from affmae_engine.errors import ConfigError
from affmae_engine.model.masking import draw_mask, perlin_field, restore_order, visible_count


@pytest.mark.parametrize(
    ("canvas", "ratio", "expected"),
    [((64, 64), 0.5, 2048), ((7, 9), 0.5, 31), ((10, 10), 0.9, 10), ((10, 10), 0.7, 30), ((5, 3), 0.6, 6)],
)
def test_visible_count_is_a_decimal_floor(canvas, ratio, expected) -> None:
    assert visible_count(canvas, ratio) == expected
    visible, masked = draw_mask(canvas, MaskConfig(ratio=ratio), seed=1, index=0)
    assert len(visible) == expected and visible.dtype == masked.dtype == torch.int64
    assert sorted(torch.cat([visible, masked]).tolist()) == list(range(canvas[0] * canvas[1]))
    assert visible.equal(visible.sort().values) and masked.equal(masked.sort().values)


@pytest.mark.parametrize("kind", ["perlin", "random"])
def test_mask_is_a_pure_function_of_seed_and_index(kind) -> None:
    config = MaskConfig(kind=kind)
    first = draw_mask((16, 16), config, seed=3, index=5)[0]
    torch.manual_seed(0)
    assert first.equal(draw_mask((16, 16), config, seed=3, index=5)[0])
    assert not first.equal(draw_mask((16, 16), config, seed=3, index=9)[0])
    assert not first.equal(draw_mask((16, 16), config, seed=4, index=5)[0])


def test_the_lowest_values_of_the_field_are_visible() -> None:
    config = MaskConfig(lattices=(4,), ratio=0.75)
    field = perlin_field((12, 20), 4, np.random.default_rng([7, 2, 0x6D61736B])).ravel()
    visible, masked = draw_mask((12, 20), config, seed=7, index=2)
    assert field[visible].max() <= field[masked].min()


def boundary(visible: torch.Tensor, side: int) -> int:
    """Pairs of neighbouring cells of which one is visible."""
    shown = torch.zeros(side * side).scatter(0, visible, 1.0).view(side, side)
    return int((shown.diff(dim=0).abs().sum() + shown.diff(dim=1).abs().sum()).item())


def test_holes_grow_as_the_lattice_gets_coarser() -> None:
    def mean_boundary(config: MaskConfig) -> float:
        return np.mean([boundary(draw_mask((64, 64), config, seed=0, index=i)[0], 64) for i in range(4)])

    coarse, fine = mean_boundary(MaskConfig(lattices=(4,))), mean_boundary(MaskConfig(lattices=(16,)))
    random = mean_boundary(MaskConfig(kind="random"))
    assert coarse < fine / 2 < random / 2


def test_lattices_are_spread_over_the_samples() -> None:
    config = MaskConfig(lattices=(2, 16))
    lengths = [boundary(draw_mask((32, 32), config, seed=0, index=i)[0], 32) for i in range(6)]
    assert max(lengths[0::2]) < min(lengths[1::2])


def test_field_is_smooth_centred_and_never_degenerate() -> None:
    field = np.stack([perlin_field((64, 64), 8, np.random.default_rng(i)) for i in range(20)])
    assert abs(field.mean()) < 0.02 and np.abs(field).max() < 1.0 and field.std() > 0.1
    assert np.abs(np.diff(field, axis=1)).max() < 0.5
    # A lattice as fine as the canvas or finer: cells must not all fall on lattice points, where the noise is 0.
    assert len(np.unique(perlin_field((16, 16), 64, np.random.default_rng(0)))) == 256


def test_restore_order_undoes_the_split() -> None:
    visible, masked = draw_mask((6, 7), MaskConfig(), seed=0, index=0)
    assert torch.cat([visible, masked])[restore_order(visible, masked)].tolist() == list(range(42))


def test_a_mask_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mask.ratio 0.5 leaves 0 of 1 tokens"):
        draw_mask((1, 1), MaskConfig(), seed=0, index=0)
