"""Operations without tests of their own name arguments that do not fit together."""

from typing import Any

import pytest
import torch

from affmae_kernels.adamw import AdamW
from affmae_kernels.cases import Case, cases
from affmae_kernels.pixel_loss import pixel_loss


def small(operation: str, name: str) -> tuple[Case, dict[str, Any]]:
    """A case and its arguments."""
    (case,) = [case for case in cases(operation, network=False) if case.name == name]
    return case, case.prepare(backend="reference", **case.arguments("cpu", torch.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_BNC": torch.zeros(2, 7, 39)}, "40"),
        ({"norm_weight_C": torch.zeros(39)}, "39"),
        ({"weight_FC": torch.zeros(72, 39)}, "39"),
        ({"x_BNC": torch.zeros(2, 7, 40, dtype=torch.int64)}, "int64"),
    ],
)
def test_norm_linear(change: dict[str, Any], message: str) -> None:
    case, arguments = small("norm_linear", "odd sizes")
    with pytest.raises(ValueError, match=message):
        case.call(backend="auto", **{**arguments, **change})


def test_pixel_loss_of_patches() -> None:
    with pytest.raises(ValueError, match=r"target_BQP must be \[2, 7, 13\], as pred_BQP; got \[2, 7, 12\]"):
        pixel_loss(torch.zeros(2, 7, 13), torch.zeros(2, 7, 12))


def test_encoder_blocks() -> None:
    case, arguments = small("encoder_blocks", "one block")
    (block,) = arguments["blocks"]
    changes: list[tuple[dict[str, Any], str]] = [
        ({"feat_BNC": torch.zeros(2, 36, 64)}, r"\[B, N\] = \[2, 37\]; got torch.float32 \[2, 36, 64\]"),
        ({"blocks": []}, "at least one block"),
        ({"feat_BNC": torch.zeros(2, 37, 32)}, "2 heads of width 32 does not take 32 channels"),
        ({"blocks": [block._replace(hidden_bias_F=torch.zeros(5))]}, "MLP of 5 hidden channels"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            case.call(backend="auto", **{**arguments, **change})
    case, arguments = small("encoder_blocks", "two blocks with stochastic depth")
    with pytest.raises(ValueError, match="branch_scale"):
        case.call(backend="auto", **{**arguments, "blocks": arguments["blocks"][:1]})


def test_adamw() -> None:
    p, step_P, rate = [torch.zeros(3)], torch.zeros(1), [torch.tensor(0.1)]
    with pytest.raises(ValueError, match="different lengths"):
        AdamW(p, p, p, step_P, rate, [0.0, 0.0], betas=(0.9, 0.9), eps=1e-8)
    with pytest.raises(ValueError, match=r"moments \[2\] and \[3\] of a parameter \[3\]"):
        AdamW(p, [torch.zeros(2)], p, step_P, rate, [0.0], betas=(0.9, 0.9), eps=1e-8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sums": torch.zeros(2, 4, 70, 33)}, r"tiles \[12, 2, 16, 16\] need sums \[Z, 2, Y, X\]"),
        ({"weight_y": torch.zeros(12, 15)}, r"weights \[12, 16\]"),
        ({"origin": torch.zeros(12, 3, dtype=torch.int64)}, "origins int32"),
        ({"origin": torch.zeros(11, 3, dtype=torch.int32)}, r"origins \[12, 3\]"),
        ({"sums": torch.zeros(3, 2, 33, 70).transpose(2, 3)}, "contiguous"),
    ],
)
def test_tile_blending(change: dict[str, Any], message: str) -> None:
    case, arguments = small("tile_blending", "3 sections of 70 x 33 pixels, tiles of 16")
    with pytest.raises(ValueError, match=message):
        case.call(backend="auto", **{**arguments, **change})
