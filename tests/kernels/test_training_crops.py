"""Training crops: place, mean and detail survive resizing; turns; equalization beside scikit-image; bad arguments."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.exposure import equalize_adapthist
from torch import Tensor

from affmae_kernels.training_crops import TILE, equalize, training_crops
from affmae_kernels.training_crops.reference import CENTER, SCALE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = torch.tensor([[0.0, 1.0, -2.5, 2.5]])


def made(crop_YX: np.ndarray | Tensor, size: int, backend: str, *, turn: int = 0, clahe: bool = False) -> np.ndarray:
    crop = torch.as_tensor(crop_YX)[None]
    window = torch.tensor([[crop.shape[-1], turn]], dtype=torch.int32)
    arguments = (tensor.to(DEVICE) for tensor in (crop, window, PLAIN))
    return training_crops(*arguments, size, clahe=clahe, backend=backend)[0].cpu().numpy()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("edge", [16, 24, 32, 48, 100])
def test_resizing_keeps_place_and_mean(edge: int, backend: str) -> None:
    y, x = np.meshgrid(*[(np.arange(edge) + 0.5) / edge] * 2, indexing="ij")
    ramp = (y + 2 * x).astype(np.float32)
    v, u = np.meshgrid(*[(np.arange(32) + 0.5) / 32] * 2, indexing="ij")
    result = made(ramp, 32, backend)
    assert np.abs(result - (v + 2 * u))[4:-4, 4:-4].max() < 2e-3
    assert abs(result.mean() - ramp.mean()) < 5e-3


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_reduction_is_antialiased(backend: str) -> None:
    stripes = np.tile(np.array([-1, 1], np.float32), (128, 64))
    assert np.abs(made(stripes, 32, backend)).max() < 0.1


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_turns_are_the_eight_symmetries(backend: str) -> None:
    square = np.random.default_rng(0).normal(size=(7, 7)).astype(np.float32)
    for turn in range(8):
        wanted = np.rot90(square, turn % 4)
        assert np.array_equal(made(square, 7, backend, turn=turn), wanted[:, ::-1] if turn >= 4 else wanted)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("clahe", [False, True])
def test_images_without_contrast_are_0_and_outliers_are_cut(backend: str, clahe: bool) -> None:
    crop = torch.full((2, 9, 9), 200, dtype=torch.uint8)
    window = torch.tensor([[9, 0], [9, 0]], dtype=torch.int32)
    intensity = torch.tensor([[200.0, 0.0, 0.0, 0.0], [0.0, 2.0, 1.0, 1.0]])
    arguments = (tensor.to(DEVICE) for tensor in (crop, window, intensity))
    flat, bright = training_crops(*arguments, 9, clahe=clahe, backend=backend)
    assert (flat == 0).all()
    assert (bright == 10).all()  # an empty range: not equalized


def test_kernels_equal_the_reference_after_resizing_and_equalization() -> None:
    """A value between two bins may be counted in either: few pixels, and by no more than one bin."""
    crop = gaussian_filter(np.random.default_rng(1).normal(size=(100, 100)), 2).astype(np.float32) * 6
    found, plain = (made(crop, 90, backend, turn=5, clahe=True) for backend in ("triton", "reference"))
    off = np.abs(found - plain) > 1e-5
    assert off.mean() < 1e-2
    assert np.abs(found - plain).max() < 0.1


@pytest.mark.parametrize("size", [70, 64, 11])
def test_equalization_alone_equals_the_reference(size: int) -> None:
    image = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    low, high = torch.tensor([-2.0, 1.0], device=DEVICE), torch.tensor([2.5, 1.0], device=DEVICE)
    found, plain = (equalize(image, low, high, backend=backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(found, plain)
    assert torch.equal(found[1], image[1])  # an empty range


def test_equalization_is_close_to_scikit_image() -> None:
    random = np.random.default_rng(0)
    smooth = gaussian_filter(random.normal(size=(256, 256)), 3)
    unit = np.clip(0.5 + 0.2 * smooth / smooth.std() + 0.05 * random.normal(size=(256, 256)), 0, 1)
    unit[0, 0], unit[0, 1] = 0, 1  # it stretches its input
    library = equalize_adapthist(unit, kernel_size=TILE, clip_limit=0.01)
    found = equalize(torch.from_numpy(unit)[None], torch.zeros(1), torch.ones(1))[0].numpy() * SCALE + CENTER
    assert np.abs(found - library).mean() < 0.01
    assert np.abs(found - library).max() < 0.03


def test_bad_arguments_are_named() -> None:
    crop, window = torch.zeros(2, 4, 4, dtype=torch.uint8), torch.tensor([[4, 0], [4, 0]], dtype=torch.int32)
    with pytest.raises(ValueError, match="crop_BYX must be"):
        training_crops(crop[:, :3], window, PLAIN.repeat(2, 1), 4)
    with pytest.raises(ValueError, match="window_B2 must be"):
        training_crops(crop, window[:1], PLAIN.repeat(2, 1), 4)
    with pytest.raises(ValueError, match="intensity_B4 must be"):
        training_crops(crop, window, PLAIN, 4)
    with pytest.raises(ValueError, match="uint8 or float32"):
        training_crops(crop.long(), window, PLAIN.repeat(2, 1), 4)
