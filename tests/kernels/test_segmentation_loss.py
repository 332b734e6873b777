"""The segmentation loss: values computed by hand, layouts, ignored pixels, refused arguments."""

import math

import pytest
import torch
from torch import Tensor

from affmae_kernels.segmentation_loss import segmentation_loss

BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def loss(logits: Tensor, labels: Tensor, weights: list[float], **options: object) -> tuple[Tensor, Tensor]:
    return segmentation_loss(logits.to(DEVICE), labels.to(DEVICE), torch.tensor(weights, device=DEVICE), **options)


@BACKENDS
def test_two_pixels_by_hand(backend: str) -> None:
    """Probabilities (0.75, 0.25) and (0.5, 0.5), labels 0 and 1, a third pixel ignored."""
    logits = torch.tensor([[math.log(3), 0.0, 9.0], [0.0, 0.0, -9.0]])[None, :, None]  # [1, 2, 1, 3]
    labels = torch.tensor([[[0, 1, -1]]])
    focal, dice = loss(logits, labels, [1.0, 3.0], gamma=2.0, backend=backend)
    assert float(focal) == pytest.approx((1 * 0.25**2 * -math.log(0.75) + 3 * 0.5**2 * -math.log(0.5)) / 2, rel=1e-5)
    first, second = 1 - 2 * 0.75 / (1.25 + 1), 1 - 2 * 0.5 / (0.75 + 1)
    assert float(dice) == pytest.approx((1 * first + 3 * second) / 4, rel=1e-4)


@BACKENDS
def test_images_count_alike_and_one_without_labels_as_zero(backend: str) -> None:
    logits = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(4, (3, 5, 6), generator=torch.Generator().manual_seed(1))
    labels[0, 1:], labels[2] = -1, -1
    batch = loss(logits, labels, [1.0] * 4, backend=backend)
    each = [loss(logits[i : i + 1], labels[i : i + 1], [1.0] * 4, backend=backend) for i in range(3)]
    assert each[2] == (0, 0)
    for whole, parts in zip(batch, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.stack(parts).mean())


@BACKENDS
@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int64])
def test_ignored_pixels_have_no_say_and_no_gradient(backend: str, label_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (2, 6, 7), generator=generator)
    ignored = torch.rand(labels.shape, generator=generator) < 0.4
    labels = labels.masked_fill(ignored, 255 if label_dtype == torch.uint8 else -1).to(label_dtype)
    logits = torch.randn(2, 3, 6, 7, generator=generator)
    found = []
    for value in (0.0, float("inf"), float("nan")):
        leaf = logits.masked_fill(ignored[:, None], value).requires_grad_()
        focal, dice = loss(leaf, labels, [1.0, 2.0, 3.0], backend=backend)
        (gradient,) = torch.autograd.grad(focal + dice, leaf)
        assert (gradient.movedim(1, -1)[ignored] == 0).all()
        assert (gradient.movedim(1, -1)[~ignored] != 0).all()
        found.append((focal, dice, gradient))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@BACKENDS
def test_both_layouts_are_the_same_loss(backend: str) -> None:
    """Pixels of the patches beyond the image get a gradient of 0."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 3, 8, 12, generator=generator)
    labels = torch.randint(-1, 3, (2, 7, 9), generator=generator)
    image = whole[..., :7, :9].clone().requires_grad_()
    # [B, h, w, p, p, K]
    patches = whole.unflatten(3, (3, 4)).unflatten(2, (2, 4)).permute(0, 2, 4, 3, 5, 1).reshape(2, 6, 48)
    patches.requires_grad_()
    a = loss(image, labels, [1.0] * 3, backend=backend)
    b = loss(patches, labels, [1.0] * 3, patch=4, backend=backend)
    torch.testing.assert_close(a, b)
    (by_image,) = torch.autograd.grad(sum(a), image)
    (by_patch,) = torch.autograd.grad(sum(b), patches)
    back = by_patch.view(2, 2, 3, 4, 4, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 8, 12)
    torch.testing.assert_close(back[..., :7, :9], by_image)
    assert (back[..., 7:, :] == 0).all() and (back[..., 9:] == 0).all()


@BACKENDS
def test_sure_and_right_has_no_gradient_to_speak_of(backend: str) -> None:
    labels = torch.tensor([[[0, 1], [1, 0]]])
    logits = torch.stack([60.0 - 120.0 * labels, 120.0 * labels - 60.0], 1).requires_grad_()
    focal, dice = loss(logits, labels, [1.0, 1.0], backend=backend)
    (gradient,) = torch.autograd.grad(focal + dice, logits)
    assert focal.item() == 0 and dice.item() == pytest.approx(0, abs=1e-6)
    assert gradient.isfinite().all() and gradient.abs().max() < 1e-6


def test_half_precision_logits_are_scored_in_fp32() -> None:
    logits = torch.randn(1, 3, 4, 4).bfloat16()
    labels = torch.randint(3, (1, 4, 4))
    exact = loss(logits.float(), labels, [1.0] * 3, backend="reference")
    found = loss(logits, labels, [1.0] * 3, backend="reference")
    assert all(value.dtype == torch.float32 for value in found)
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gamma": 0.5}, "gamma must be 0 or at least 1"),
        ({"logits": torch.zeros(2, 4, 5, 6)}, r"floating \[2, 3, 5, 6\]"),
        ({"logits": torch.zeros(2, 3, 5, 6, dtype=torch.int64)}, "floating"),
        ({"patch": 4}, r"floating \[2, 4, 48\]"),
        ({"patch": 0}, "patch must be at least 1"),
        ({"labels": torch.zeros(2, 5, 6)}, "labels must be whole numbers"),
        ({"weights": torch.ones(3, 1)}, r"class_weights must be floating \[K\]"),
        ({"backend": "fast"}, "backend of segmentation_loss"),
    ],
)
def test_wrong_arguments_are_named(changed: dict, message: str) -> None:
    given = {
        "logits": torch.zeros(2, 3, 5, 6),
        "labels": torch.zeros(2, 5, 6, dtype=torch.int64),
        "weights": torch.ones(3),
    }
    options = {name: value for name, value in changed.items() if name not in given}
    logits, labels, weights = (given | {n: v for n, v in changed.items() if n in given}).values()
    with pytest.raises(ValueError, match=message):
        segmentation_loss(logits, labels, weights, **options)
