"""Cluster attention: softmax attention over a token's neighbourhood and one learned blank token (method 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from affmae_kernels.cluster_attention import reference
from affmae_kernels.dispatch import choose_backend
from affmae_kernels.launch import DTYPES
from affmae_kernels.neighbourhoods import Neighbourhoods
from affmae_kernels.precision import without_autocast

__all__ = ["cluster_attention", "unsupported"]


def cluster_attention(
    qkv_BN3HD: Tensor,
    neighbourhoods: Neighbourhoods,
    blank_key_HD: Tensor,
    blank_value_HD: Tensor,
    bias_weight_H5: Tensor,
    bias_H: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """out_i = sum_j p_ij v_j + p_i,blank v_blank, with p_i the softmax over j in the neighbourhood of i and blank of

        logit_ij    = q_i . k_j / sqrt(D) + w_h . (dx, dy, d, dy/d, dx/d) + c_h,   (dx, dy) = pos_j - pos_i
        logit_blank = q_i . k_blank / sqrt(D)

    Both ratios are 0 at d = 0. Empty slots of a short last cluster take no part. Logits and softmax are computed in
    fp32 (float64 for float64 features), also under autocast.

    Args:
        qkv_BN3HD: queries, keys and values as one linear writes them, rows in the order of `neighbourhoods`; any
            floating dtype.
        neighbourhoods: of the N tokens.
        blank_key_HD, blank_value_HD: the blank token of each head; floating.
        bias_weight_H5, bias_H: the linear form w and c of each head; floating.
        backend: see `affmae_kernels.dispatch`.

    Returns:
        out_BNHD in the dtype of `qkv_BN3HD`. Gradients: all floating arguments.

    Raises:
        ValueError: when shapes do not fit together.
    """
    _check(qkv_BN3HD, neighbourhoods, blank_key_HD, blank_value_HD, bias_weight_H5, bias_H)
    obstacle = unsupported(qkv_BN3HD.dtype, qkv_BN3HD.shape[-1], neighbourhoods)
    choice = choose_backend(backend, "cluster_attention", qkv_BN3HD.device, obstacle)
    arguments = qkv_BN3HD, neighbourhoods, blank_key_HD, blank_value_HD, bias_weight_H5, bias_H
    if choice.name == "triton":
        from affmae_kernels.cluster_attention import triton

        return triton.cluster_attention(*arguments)
    with without_autocast(qkv_BN3HD):
        return reference.cluster_attention(*arguments)


def unsupported(dtype: torch.dtype, width: int, neighbourhoods: Neighbourhoods) -> str | None:
    """What the kernel cannot take of features of this dtype with heads of this width in these neighbourhoods."""
    if width not in (16, 32, 64):
        return f"heads of width {width}, only of 16, 32 or 64"
    if dtype not in DTYPES:
        return f"features of {dtype}"
    return neighbourhoods.unsupported()


def _check(
    qkv_BN3HD: Tensor,
    neighbourhoods: Neighbourhoods,
    blank_key_HD: Tensor,
    blank_value_HD: Tensor,
    bias_weight_H5: Tensor,
    bias_H: Tensor,
) -> None:
    if qkv_BN3HD.ndim != 5 or qkv_BN3HD.shape[2] != 3 or not qkv_BN3HD.is_floating_point():
        raise ValueError(f"qkv_BN3HD must be floating [B, N, 3, H, D]; got {qkv_BN3HD.dtype} {tuple(qkv_BN3HD.shape)}")
    if qkv_BN3HD.shape[:2] != neighbourhoods.pos_BN2.shape[:2]:
        raise ValueError(
            f"qkv_BN3HD {tuple(qkv_BN3HD.shape)} does not belong to neighbourhoods of [B, N] = "
            f"{list(neighbourhoods.pos_BN2.shape[:2])}"
        )
    heads, width = qkv_BN3HD.shape[3:]
    expected = {
        "blank_key_HD": (blank_key_HD, (heads, width)),
        "blank_value_HD": (blank_value_HD, (heads, width)),
        "bias_weight_H5": (bias_weight_H5, (heads, 5)),
        "bias_H": (bias_H, (heads,)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)} for {heads} heads of {width}; got {list(tensor.shape)}")
