"""Cluster attention: softmax attention over a token's neighbourhood and one learned blank token (method 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from affmae_kernels.cluster_attention import reference
from affmae_kernels.dispatch import choose_backend
from affmae_kernels.launch import DTYPES
from affmae_kernels.neighbourhoods import KERNEL_CLUSTER_SIZE, KERNEL_CLUSTERS, Neighbourhoods

__all__ = ["cluster_attention", "unsupported"]


def cluster_attention(
    qkv_BN3AD: Tensor,
    neighbourhoods: Neighbourhoods,
    blank_key_AD: Tensor,
    blank_value_AD: Tensor,
    bias_weight_A5: Tensor,
    bias_A: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """out_i = sum_j p_ij v_j + p_i,blank v_blank, with p_i the softmax over j in the neighbourhood of i and blank of

        logit_ij    = q_i . k_j / sqrt(D) + w_a . (dx, dy, d, dy/d, dx/d) + c_a,   (dx, dy) = pos_j - pos_i
        logit_blank = q_i . k_blank / sqrt(D)

    Both ratios are 0 at d = 0. Empty slots of a short last cluster take no part. Logits and softmax are computed in
    fp32 (float64 for float64 features), also under autocast.

    Args:
        qkv_BN3AD: queries, keys and values as one linear writes them, rows in the order of `neighbourhoods`; any
            floating dtype.
        neighbourhoods: of the N tokens.
        blank_key_AD, blank_value_AD: the blank token of each head; floating.
        bias_weight_A5, bias_A: the linear form w and c of each head; floating.
        backend: see `affmae_kernels.dispatch`.

    Returns:
        out_BNAD in the dtype of `qkv_BN3AD`. Gradients: all floating arguments.

    Raises:
        ValueError: when shapes do not fit together.
    """
    _check(qkv_BN3AD, neighbourhoods, blank_key_AD, blank_value_AD, bias_weight_A5, bias_A)
    obstacle = unsupported(qkv_BN3AD.dtype, qkv_BN3AD.shape[-1], neighbourhoods)
    choice = choose_backend(backend, "cluster_attention", qkv_BN3AD.device, obstacle)
    with torch.autocast(qkv_BN3AD.device.type, enabled=False):
        if choice.name == "triton":
            from affmae_kernels.cluster_attention import triton_impl

            return triton_impl.cluster_attention(
                qkv_BN3AD, neighbourhoods, blank_key_AD, blank_value_AD, bias_weight_A5, bias_A
            )
        return reference.cluster_attention(
            qkv_BN3AD, neighbourhoods, blank_key_AD, blank_value_AD, bias_weight_A5, bias_A
        )


def unsupported(dtype: torch.dtype, width: int, neighbourhoods: Neighbourhoods) -> str | None:
    """What the kernel cannot take of features of this dtype with heads of this width in these neighbourhoods."""
    if neighbourhoods.cluster_size != KERNEL_CLUSTER_SIZE:
        return f"clusters of {neighbourhoods.cluster_size} tokens, only of {KERNEL_CLUSTER_SIZE}"
    if neighbourhoods.count >= KERNEL_CLUSTERS:
        return f"{neighbourhoods.count} clusters, only fewer than {KERNEL_CLUSTERS}"
    if width not in (16, 32, 64):
        return f"heads of width {width}, only of 16, 32 or 64"
    return None if dtype in DTYPES else f"features of {dtype}"


def _check(
    qkv_BN3AD: Tensor,
    neighbourhoods: Neighbourhoods,
    blank_key_AD: Tensor,
    blank_value_AD: Tensor,
    bias_weight_A5: Tensor,
    bias_A: Tensor,
) -> None:
    if qkv_BN3AD.ndim != 5 or qkv_BN3AD.shape[2] != 3 or not qkv_BN3AD.is_floating_point():
        raise ValueError(f"qkv_BN3AD must be floating [B, N, 3, A, D]; got {qkv_BN3AD.dtype} {tuple(qkv_BN3AD.shape)}")
    if qkv_BN3AD.shape[:2] != neighbourhoods.pos_BN2.shape[:2]:
        raise ValueError(
            f"qkv_BN3AD {tuple(qkv_BN3AD.shape)} does not belong to neighbourhoods of [B, N] = "
            f"{list(neighbourhoods.pos_BN2.shape[:2])}"
        )
    heads, width = qkv_BN3AD.shape[3:]
    expected = {
        "blank_key_AD": (blank_key_AD, (heads, width)),
        "blank_value_AD": (blank_value_AD, (heads, width)),
        "bias_weight_A5": (bias_weight_A5, (heads, 5)),
        "bias_A": (bias_A, (heads,)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)} for {heads} heads of {width}; got {list(tensor.shape)}")
