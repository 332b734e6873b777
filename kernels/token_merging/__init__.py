"""Token merging: which tokens survive a stage, and what they take along from their neighbours (method 3.4).

Three steps: `token_scores`, `select_survivors`, and `merge_tokens`, through which the scores get their gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from affmae_kernels.dispatch import Choice, choose_backend
from affmae_kernels.launch import DTYPES
from affmae_kernels.neighbourhoods import Neighbourhoods
from affmae_kernels.precision import without_autocast
from affmae_kernels.token_merging import reference

__all__ = ["merge_tokens", "select_survivors", "token_scores"]

WIDEST_SCORED = 4096
"""Most channels that the kernel of `token_scores` takes: a program holds whole rows."""
LARGEST_CANVAS = 2**30
"""Most canvas cells that the kernel of `select_survivors` takes: its keys must fit into int64."""


def token_scores(feat_BNC: Tensor, weight_1C: Tensor, bias_1: Tensor, *, backend: str = "auto") -> Tensor:
    """score = sigmoid(linear(feat)), in the dtype of the weight, also under autocast: the choice of survivors must not
    depend on rounding to 8 bits.

    Args:
        feat_BNC: features; any floating dtype.
        weight_1C, bias_1: of the linear layer; both of one floating dtype.
        backend: see `affmae_kernels.dispatch`.

    Returns:
        score_BN in [0, 1], in the dtype of `weight_1C`. Gradients: all arguments.

    Raises:
        ValueError: when shapes or dtypes do not fit together.
    """
    if feat_BNC.ndim != 3 or not feat_BNC.is_floating_point():
        raise ValueError(f"feat_BNC must be floating [B, N, C]; got {feat_BNC.dtype} {list(feat_BNC.shape)}")
    channels = feat_BNC.shape[2]
    if list(weight_1C.shape) != [1, channels] or list(bias_1.shape) != [1] or weight_1C.dtype != bias_1.dtype:
        raise ValueError(
            f"weight_1C and bias_1 must be [1, {channels}] and [1] of one dtype; got {list(weight_1C.shape)} "
            f"{weight_1C.dtype} and {list(bias_1.shape)} {bias_1.dtype}"
        )
    obstacle = None
    if feat_BNC.dtype not in DTYPES or weight_1C.dtype != torch.float32:
        obstacle = f"features of {feat_BNC.dtype} with weights of {weight_1C.dtype}"
    elif channels > WIDEST_SCORED:
        obstacle = f"{channels} channels, only up to {WIDEST_SCORED}"
    if _choose(backend, feat_BNC.device, obstacle).name == "triton":
        from affmae_kernels.token_merging import scores

        return scores.token_scores(feat_BNC, weight_1C, bias_1)
    with without_autocast(feat_BNC):
        return reference.token_scores(feat_BNC, weight_1C, bias_1)


@torch.no_grad()
def select_survivors(value_BN: Tensor, near: Neighbourhoods, count: int, *, backend: str = "auto") -> Tensor:
    """The rows of the `count` largest values of each image; ties go to the lower canvas index.

    NaN counts as infinite. All backends give the same rows.

    Args:
        value_BN: importance of each token; floating.
        near: neighbourhoods of the N tokens.
        count: K, from 1 to N.
        backend: see `affmae_kernels.dispatch`.

    Returns:
        survivors_BK: int64, ascending. No gradients.

    Raises:
        ValueError: when shapes do not fit together, or `count` is out of range.
    """
    expected = list(near.pos_BN2.shape[:2])
    if list(value_BN.shape) != expected or not value_BN.is_floating_point():
        raise ValueError(
            f"value_BN must be floating [B, N] = {expected}, as the neighbourhoods are; got {value_BN.dtype} "
            f"{list(value_BN.shape)}"
        )
    if not 1 <= count <= expected[1]:
        raise ValueError(f"count must be from 1 to {expected[1]}, the number of tokens; got {count}")
    height, width = near.canvas_hw
    obstacle = None
    if value_BN.dtype != torch.float32:
        obstacle = f"values of {value_BN.dtype}, only of torch.float32"
    elif height * width > LARGEST_CANVAS:
        obstacle = f"a canvas of {height} x {width} cells, only up to {LARGEST_CANVAS} cells"
    if _choose(backend, value_BN.device, obstacle).name == "triton":
        from affmae_kernels.token_merging import survivors

        return survivors.select_survivors(value_BN, near, count)
    return reference.select_survivors(value_BN, near, count)


def merge_tokens(
    feat_BNC: Tensor,
    score_BN: Tensor,
    survivors_BK: Tensor,
    neighbourhoods: Neighbourhoods,
    weight_45: Tensor,
    bias_4: Tensor,
    norm_weight_4: Tensor,
    norm_bias_4: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """z[k, c, j] = sum_i g_c(dx_i, dy_i) * score_i * feat[i, j] over the neighbourhood of survivor k, c = 1..4, with

        g = GELU(LayerNorm(linear(dx, dy, d, dy/d, dx/d))),   (dx, dy) = pos_i - pos_k

    Both ratios are 0 at d = 0; LayerNorm eps 1e-5; GELU exact. Computed in fp32 (float64 for float64 features), also
    under autocast.

    Args:
        feat_BNC: features, rows in the order of `neighbourhoods`; any floating dtype.
        score_BN: importance of each token; floating.
        survivors_BK: int64 rows of the survivors, in [0, N).
        neighbourhoods: of the N tokens.
        weight_45, bias_4: the linear from the geometry to 4 weights; floating.
        norm_weight_4, norm_bias_4: its LayerNorm; floating.
        backend: see `affmae_kernels.dispatch`.

    Returns:
        z_BK4C, flattened to [B, K, 4*C] with c outermost, in the dtype of `feat_BNC`. Gradients: all floating
        arguments.

    Raises:
        ValueError: when shapes do not fit together.
    """
    _check_merge(feat_BNC, score_BN, survivors_BK, neighbourhoods)
    parameters = {
        "weight_45": (weight_45, (4, 5)),
        "bias_4": (bias_4, (4,)),
        "norm_weight_4": (norm_weight_4, (4,)),
        "norm_bias_4": (norm_bias_4, (4,)),
    }
    for name, (tensor, shape) in parameters.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}; got {list(tensor.shape)}")
    obstacle = neighbourhoods.unsupported() if feat_BNC.dtype in DTYPES else f"features of {feat_BNC.dtype}"
    arguments = feat_BNC, score_BN, survivors_BK, neighbourhoods, weight_45, bias_4, norm_weight_4, norm_bias_4
    if _choose(backend, feat_BNC.device, obstacle).name == "triton":
        from affmae_kernels.token_merging import triton

        return triton.merge_tokens(*arguments)
    with without_autocast(feat_BNC):
        return reference.merge_tokens(*arguments)


def _choose(backend: str, device: torch.device, obstacle: str | None) -> Choice:
    return choose_backend(backend, "token_merging", device, obstacle)


def _check_merge(feat_BNC: Tensor, score_BN: Tensor, survivors_BK: Tensor, neighbourhoods: Neighbourhoods) -> None:
    if feat_BNC.ndim != 3 or not feat_BNC.is_floating_point():
        raise ValueError(f"feat_BNC must be floating [B, N, C]; got {feat_BNC.dtype} {tuple(feat_BNC.shape)}")
    expected = list(neighbourhoods.pos_BN2.shape[:2])
    if list(feat_BNC.shape[:2]) != expected or list(score_BN.shape) != expected:
        raise ValueError(
            f"feat_BNC {list(feat_BNC.shape)} and score_BN {list(score_BN.shape)} do not belong to neighbourhoods of "
            f"[B, N] = {expected}"
        )
    if survivors_BK.ndim != 2 or survivors_BK.shape[0] != expected[0] or survivors_BK.dtype != torch.int64:
        raise ValueError(
            f"survivors_BK must be int64 [B = {expected[0]}, K]; got {survivors_BK.dtype} {list(survivors_BK.shape)}"
        )
