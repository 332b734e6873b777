"""Warped crops: interpolation, folding, several planes, bad arguments."""

import pytest
import torch

from affmae_kernels.warped_crops import Planes, warped_crops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = torch.tensor([[0.0, 1.0, 0.0, 0.0]])


def planes(values: torch.Tensor, start: tuple[int, int] = (0, 0), shape: tuple[int, int] | None = None) -> Planes:
    shape_B2 = torch.tensor([shape or tuple(values.shape)], dtype=torch.int32)
    width_B = torch.tensor([values.shape[1]], dtype=torch.int32)
    start_B2 = torch.tensor([start], dtype=torch.int32)
    gray, labels = values.flatten().to(torch.uint8), values.flatten().to(torch.int16)
    return Planes(gray, labels, torch.zeros(1, dtype=torch.int64), width_B, start_B2, shape_B2)


def made(source: Planes, y: list[float], x: list[float], backend: str) -> tuple[list[float], list[int]]:
    place = torch.tensor([[[y], [x]]])
    source = Planes(*(tensor.to(DEVICE) for tensor in source))
    image, labels = warped_crops(source, place.to(DEVICE), PLAIN.to(DEVICE), outside=-1, backend=backend)
    return image.flatten().tolist(), labels.flatten().tolist()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_images_are_bilinear_and_labels_nearest(backend: str) -> None:
    image, labels = made(planes(torch.arange(9).view(3, 3)), [0.5, 1.4, 0.5, 1.5], [1.0, 1.6, 0.0, 0.0], backend)
    assert image == pytest.approx([2.5, 5.8, 1.5, 4.5])
    assert labels == [1, 5, 0, 6]  # halves go to the even pixel


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_places_outside_are_mirrored_and_not_labeled(backend: str) -> None:
    image, labels = made(
        planes(torch.arange(9).view(3, 3)), [-1.0, 3.0, -0.25, 1.0, 6.0], [0.0, 0.0, 0.0, 2.4, 0.0], backend
    )
    assert image == pytest.approx([3, 3, 0.75, 4.6, 6])
    assert labels == [-1, -1, 0, 5, -1]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_window_is_read_like_the_whole_section(backend: str) -> None:
    whole = torch.arange(70).view(7, 10)
    window = planes(whole[2:6, 3:9], start=(2, 3), shape=(7, 10))
    place = [2.3, 4.9, 3.0], [3.1, 7.5, 8.0]
    assert made(window, *place, backend) == made(planes(whole), *place, backend)


def test_bad_arguments_are_named() -> None:
    source, place = planes(torch.zeros(3, 3)), torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match="place_B2HW must be"):
        warped_crops(source, place[:, :1], PLAIN, outside=-1)
    with pytest.raises(ValueError, match="width_B must be"):
        warped_crops(source._replace(width_B=torch.zeros(2)), place, PLAIN, outside=-1)
    with pytest.raises(ValueError, match="one length"):
        warped_crops(source._replace(labels_N=source.labels_N[:4]), place, PLAIN, outside=-1)
    with pytest.raises(ValueError, match="unknown dtypes"):
        warped_crops(source._replace(gray_N=source.gray_N.long()), place, PLAIN, outside=-1)
