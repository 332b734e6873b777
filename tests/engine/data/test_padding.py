"""Padding: what is border-connected and constant, and nothing else."""

import numpy as np
import pytest

from affmae_engine.data.padding import padding_mask


def micrograph(seed: int = 0, shape: tuple[int, int] = (120, 150), dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(seed).integers(40, 220, shape).astype(dtype)


@pytest.mark.parametrize("fill", ["black", "noisy", "white", "gray"])
@pytest.mark.parametrize("shape", ["strip", "corner", "frame"])
def test_padding_of_any_shape_is_found(fill: str, shape: str):
    section = micrograph()
    y, x = np.mgrid[:120, :150]
    padded = {"strip": x < 12, "corner": x + y < 60, "frame": (x < 9) | (y < 9) | (x >= 141) | (y >= 111)}[shape]
    noise = np.random.default_rng(1).integers(0, 4, section.shape)
    values = {"black": 0 * noise, "noisy": noise, "white": 255 + 0 * noise, "gray": 128 + 0 * noise}[fill]
    section[padded] = values[padded]
    found = padding_mask(section)
    assert (found & ~padded).sum() <= 3 and (padded & ~found).sum() < 0.02 * padded.sum()


def test_dark_structures_are_no_padding():
    section = micrograph()
    section[50:80, 50:80] = 0  # inside
    section[40:44, :30] = 2  # touches the border, but is thin
    section[0:6, 100:106] = 0  # touches the border, but is small
    assert not padding_mask(section).any()


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_other_types_have_padding_too(dtype: str):
    section = micrograph(dtype=dtype) * 16
    section[:, :20] = 0
    np.testing.assert_array_equal(padding_mask(section).sum(axis=0), [120] * 20 + [0] * 130)
    if dtype == "float32":
        section[60, 60] = np.nan
        assert padding_mask(section)[60, 60]


def test_constant_sections_are_padding_and_drawings_have_none():
    assert padding_mask(np.full((40, 40), 7, np.uint8)).all()
    drawing = np.zeros((100, 100), np.uint8)
    drawing[30:70, 30:70] = 255
    assert not padding_mask(drawing).any()
