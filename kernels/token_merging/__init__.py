"""Token merging: every survivor gathers its neighbourhood with learned positional weights and scores (method 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from affmae_kernels.dispatch import choose_backend
from affmae_kernels.launch import DTYPES
from affmae_kernels.neighbourhoods import KERNEL_CLUSTER_SIZE, KERNEL_CLUSTERS, Neighbourhoods
from affmae_kernels.token_merging import reference

__all__ = ["merge_tokens"]


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
    _check(feat_BNC, score_BN, survivors_BK, neighbourhoods)
    parameters = {
        "weight_45": (weight_45, (4, 5)),
        "bias_4": (bias_4, (4,)),
        "norm_weight_4": (norm_weight_4, (4,)),
        "norm_bias_4": (norm_bias_4, (4,)),
    }
    for name, (tensor, shape) in parameters.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}; got {list(tensor.shape)}")
    choice = choose_backend(backend, "token_merging", feat_BNC.device, _unsupported(feat_BNC, neighbourhoods))
    with torch.autocast(feat_BNC.device.type, enabled=False):
        if choice.name == "triton":
            from affmae_kernels.token_merging import triton_impl

            return triton_impl.merge_tokens(
                feat_BNC, score_BN, survivors_BK, neighbourhoods, weight_45, bias_4, norm_weight_4, norm_bias_4
            )
        return reference.merge_tokens(
            feat_BNC, score_BN, survivors_BK, neighbourhoods, weight_45, bias_4, norm_weight_4, norm_bias_4
        )


def _unsupported(feat_BNC: Tensor, neighbourhoods: Neighbourhoods) -> str | None:
    """What the kernel cannot take of these arguments."""
    if neighbourhoods.cluster_size != KERNEL_CLUSTER_SIZE:
        return f"clusters of {neighbourhoods.cluster_size} tokens, only of {KERNEL_CLUSTER_SIZE}"
    if neighbourhoods.count >= KERNEL_CLUSTERS:
        return f"{neighbourhoods.count} clusters, only fewer than {KERNEL_CLUSTERS}"
    return None if feat_BNC.dtype in DTYPES else f"features of {feat_BNC.dtype}"


def _check(feat_BNC: Tensor, score_BN: Tensor, survivors_BK: Tensor, neighbourhoods: Neighbourhoods) -> None:
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


@torch.no_grad()
def select_survivors(value_BN, near, count, *, backend="auto"):
    pos_BN2 = near.pos_BN2
    canvas_BN = torch.argsort(pos_BN2[..., 1] * near.canvas_hw[1] + pos_BN2[..., 0], dim=1)
    rank_BN = torch.argsort(torch.gather(value_BN, 1, canvas_BN), dim=1, descending=True, stable=True)
    return torch.gather(canvas_BN, 1, rank_BN[:, :count]).sort(dim=1).values


def token_scores(feat_BNC, weight, bias, *, backend="auto"):
    with torch.autocast(feat_BNC.device.type, enabled=False):
        return torch.nn.functional.linear(feat_BNC.to(weight.dtype), weight, bias).squeeze(-1).sigmoid()
