"""The segmentation loss: agreement with its formula, exact ignoring, absent classes, auxiliary logits, weights."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from affmae_engine.config import FinetuneConfig, LossConfig
from affmae_engine.data.labels import IGNORE
from affmae_engine.errors import ConfigError
from affmae_engine.train.losses import SegmentationLoss, weights_from_counts

WEIGHTS = (0.5, 1.0, 1.5)


def make_loss(**fields: float) -> SegmentationLoss:
    return SegmentationLoss(FinetuneConfig(**fields), LossConfig(), WEIGHTS)


def make_batch(*, present: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, 6, 5, generator=generator).requires_grad_()
    labels = torch.randint(0, present, (2, 6, 5), generator=generator)
    return logits, labels


def test_focal_and_dice_follow_their_formulas():
    logits, labels = make_batch()
    losses = make_loss(focal_gamma=2.0)({"logits": logits}, labels)
    p = logits.softmax(1)
    onehot = F.one_hot(labels, 3).movedim(-1, 1).float()
    w = torch.tensor(WEIGHTS)
    p_true = (p * onehot).sum(1)
    focal = (w[labels] * -((1 - p_true) ** 2) * p_true.log()).mean()
    hit, size = (p * onehot).sum((2, 3)), (p + onehot).sum((2, 3))
    dice = (((1 - 2 * hit / size) * w).sum(1) / w.sum()).mean()
    torch.testing.assert_close(losses["focal"], focal)
    torch.testing.assert_close(losses["dice"], dice, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(losses["loss"], losses["focal"] + losses["dice"])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_micro_batches_add_up_to_the_batch(precision: torch.dtype) -> None:
    """Four images, one without labels, one with a rare class, one labelled in part: the same gradients in any cut."""
    generator = torch.Generator().manual_seed(0)
    logits = {
        name: torch.randn(4, 3, 8, 8, generator=generator).to(precision).requires_grad_()
        for name in ("logits", "logits_step2", "logits_step1")
    }
    labels = torch.randint(0, 2, (4, 8, 8), generator=generator)
    labels[1] = IGNORE
    labels[2, :6] = IGNORE
    labels[3, :2, :2] = 2
    loss = make_loss()
    totals, gradients = {}, {}
    for cut in ((4,), (2, 2), (1, 3), (1, 1, 1, 1)):
        pieces = zip(*(tensor.split(cut) for tensor in (*logits.values(), labels)), strict=True)
        shares = [
            loss(dict(zip(logits, piece[:-1], strict=True)), piece[-1])["loss"] * len(piece[-1]) / 4 for piece in pieces
        ]
        totals[cut] = torch.stack(shares).sum()
        gradients[cut] = torch.autograd.grad(totals[cut], list(logits.values()))
    for cut, total in totals.items():
        torch.testing.assert_close(total, totals[4,])
        for gradient, whole in zip(gradients[cut], gradients[4,], strict=True):
            torch.testing.assert_close(gradient, whole)
    for gradient in gradients[4,]:
        assert (gradient[1] == 0).all() and (gradient[[0, 2, 3]].flatten(1).abs().amax(1) > 0).all()


def test_an_image_without_labels_counts_as_nothing() -> None:
    logits, labels = make_batch()
    labels[1] = IGNORE
    both, first = make_loss()({"logits": logits}, labels), make_loss()({"logits": logits[:1]}, labels[:1])
    assert first["loss"] > 0
    for name in ("loss", "focal", "dice"):
        torch.testing.assert_close(both[name], first[name] / 2)


def test_without_focusing_the_focal_loss_is_cross_entropy():
    logits, labels = make_batch()
    loss = SegmentationLoss(FinetuneConfig(focal_gamma=0.0), LossConfig(), (1.0, 1.0, 1.0))
    torch.testing.assert_close(loss({"logits": logits}, labels)["focal"], F.cross_entropy(logits, labels))


def test_ignored_pixels_have_no_gradient_and_no_say():
    logits, labels = make_batch()
    ignored = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    labels = labels.masked_fill(ignored, IGNORE)
    loss = make_loss()
    value = loss({"logits": logits, "logits_step2": logits * 2, "logits_step1": logits * 3}, labels)["loss"]
    value.backward()
    assert logits.grad is not None
    assert (logits.grad.movedim(1, -1)[ignored] == 0).all()
    assert (logits.grad.movedim(1, -1)[~ignored].abs().sum(-1) > 0).all()
    with torch.no_grad():
        other = torch.where(ignored[:, None], torch.full_like(logits, float("inf")), logits)
        again = loss({"logits": other, "logits_step2": other * 2, "logits_step1": other * 3}, labels)["loss"]
    torch.testing.assert_close(again, value.detach(), rtol=0, atol=0)


def test_nothing_to_learn_gives_zero_and_finite_gradients():
    logits, labels = make_batch()
    losses = make_loss()({"logits": logits}, torch.full_like(labels, IGNORE))
    losses["loss"].backward()
    assert losses["loss"].item() == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_an_absent_class_neither_adds_a_constant_nor_blows_up():
    _, labels = make_batch(present=2)
    sure = (F.one_hot(labels, 3).movedim(-1, 1) * 60.0 - 30.0).requires_grad_()
    losses = make_loss()({"logits": sure}, labels)
    losses["loss"].backward()
    assert losses["loss"].item() < 1e-4  # perfect, although class 2 never occurs
    assert sure.grad is not None
    assert torch.isfinite(sure.grad).all()
    assert sure.grad.abs().max() < 1e-3


def test_auxiliary_logits_count_with_their_weights():
    logits, labels = make_batch()
    aux2, aux1 = make_batch(seed=1)[0], make_batch(seed=2)[0]
    loss = SegmentationLoss(FinetuneConfig(), LossConfig(step2=0.25, step1=0.0), WEIGHTS)
    losses = loss({"logits": logits, "logits_step2": aux2, "logits_step1": aux1}, labels)
    assert list(losses) == ["loss", "focal", "dice", "step2"]
    alone = loss({"logits": aux2}, labels)["loss"]
    torch.testing.assert_close(losses["step2"], alone)
    torch.testing.assert_close(losses["loss"], losses["focal"] + losses["dice"] + 0.25 * alone)


def test_logits_of_weight_0_get_a_gradient_of_zeros() -> None:
    """Processes that exchange gradients wait for one of every parameter. Not even values that are not finite count."""
    logits, labels = make_batch()
    unused = torch.full_like(logits, float("inf"), requires_grad=True)
    loss = SegmentationLoss(FinetuneConfig(), LossConfig(step2=0.0, step1=0.0), WEIGHTS)
    losses = loss({"logits": logits, "logits_step2": unused, "logits_step1": unused * 2}, labels)
    losses["loss"].backward()
    assert list(losses) == ["loss", "focal", "dice"]
    assert torch.equal(losses["loss"], loss({"logits": logits}, labels)["loss"])
    assert unused.grad is not None and (unused.grad == 0).all()


def test_half_precision_logits_are_scored_in_float32():
    logits, labels = make_batch()
    losses = make_loss()({"logits": logits.detach().bfloat16()}, labels)
    assert losses["loss"].dtype == torch.float32


def test_unbounded_focusing_is_refused():
    with pytest.raises(ConfigError, match="focal_gamma"):
        make_loss(focal_gamma=0.5)


def test_class_weights_follow_the_inverse_square_root():
    assert weights_from_counts([100, 100]) == (1.0, 1.0)
    common, rare = weights_from_counts([900, 100])
    assert rare / common == pytest.approx(3.0, rel=1e-3)
    assert common + rare == pytest.approx(2.0, rel=1e-3)
    assert weights_from_counts([50, 0, 50]) == (1.0, 1.0, 1.0)
    assert weights_from_counts([0, 0]) == (1.0, 1.0)
    assert min(weights_from_counts([10**9, 1])) == 0.1
