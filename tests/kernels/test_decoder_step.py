"""The decoder step beyond its cases: dropout, and bad input."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from affmae_kernels.cases import cases
from affmae_kernels.decoder_step import decoder_step, points

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CANVAS = (3, 3)


def problem() -> dict[str, Any]:
    """Arguments of the case of two queries and four tokens."""
    (case,) = [case for case in cases("decoder_step") if case.name == "two queries"]
    made = case.prepare(backend="triton", **case.arguments(DEVICE, torch.float32))
    code_TC = torch.linspace(-1, 1, 9 * 64, device=DEVICE).view(9, 64)
    return {**made, "code_TC": code_TC, "heads": 2}


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_gradients_belong_to_the_elements_that_dropout_kept(backend: str) -> None:
    """The change of the result along a line, with the numbers drawn alike, is what the gradients say."""
    arguments = problem()
    x, feat, weights = (arguments.pop(name) for name in ("x_BQC", "feat_BNE", "weights"))
    torch.manual_seed(1)
    upstream, x_way, feat_way = torch.randn_like(x), torch.randn_like(x), torch.randn_like(feat)

    def result(step: float) -> Tensor:
        torch.manual_seed(2)
        moved = {"x_BQC": x + step * x_way, "feat_BNE": feat + step * feat_way}
        return (decoder_step(**moved, **arguments, weights=weights, dropout=0.3, backend=backend) * upstream).sum()

    dx, dfeat = torch.autograd.grad(result(0.0), (x, feat))
    with torch.no_grad():
        slope = (result(2e-3) - result(-2e-3)) / 4e-3
    torch.testing.assert_close((dx * x_way).sum() + (dfeat * feat_way).sum(), slope, rtol=1e-2, atol=1e-2)


def test_dropout_draws_anew_in_every_step_and_alike_from_one_seed() -> None:
    arguments = problem()
    torch.manual_seed(2)
    first, other = (decoder_step(**arguments, dropout=0.3, backend="triton") for _ in range(2))
    torch.manual_seed(2)
    again = decoder_step(**arguments, dropout=0.3, backend="triton")
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_BQC": torch.zeros(2, 3, 64)}, r"x_BQC must be floating with one row per point \[2, 2\]"),
        ({"feat_BNE": torch.zeros(2, 4, 64).long()}, r"feat_BNE must be floating with one row per point \[2, 4\]"),
        ({"heads": 3}, "3 heads do not divide 64 channels"),
        ({"code_TC": torch.zeros(8, 64)}, "must share a canvas"),
        ({"queries": points(torch.zeros(2, 2, 2).int(), (4, 3), backend="reference")}, "must share a canvas"),
        ({"feat_BNE": torch.zeros(2, 4, 32)}, r"source_weight_CE \[64, 64\] does not map 32 to 64 channels"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\); got 1.0"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder_step(**{**problem(), **change})
