"""Patch embedding by strided convolutions that see nothing of masked patches (method sections 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from affmae_kernels.dispatch import choose_backend
from affmae_kernels.launch import DTYPES
from affmae_kernels.precision import feature_dtype, without_autocast
from affmae_kernels.stem import reference

__all__ = ["stem", "unsupported"]

PATCHES = (8, 16)
"""Patch sizes of the kernels."""
MOST_CHANNELS = 4
"""Most image channels of the kernels: all 9 taps of the first convolution are one product."""
WIDEST, WIDEST_LAST = 128, 256
"""Most channels that the kernels take between convolutions and after the last: a row stays in registers."""


def stem(
    image_BIHW: Tensor,
    visible_BV: Tensor | None,
    convs: Sequence[tuple[Tensor, Tensor]],
    norms: Sequence[tuple[Tensor, Tensor]],
    patch: int,
    *,
    backend: str = "auto",
) -> Tensor:
    """Embeds the visible patches of images.

        x_0 = image;   z_l = conv3x3(x_{l-1}, stride 2, padding 1);   x_l = GELU(LayerNorm(z_l)), the last without GELU

    Masked patches are set to 0 in x_0 and in every z_l, so a visible patch sees a masked neighbor as 0 in the image and
    as GELU(LayerNorm bias) later; outside the image it sees 0. GELU is exact; LayerNorm is over channels, eps 1e-5.

    Args:
        image_BIHW: [B, I, H, W] floating; `patch` divides H and W.
        visible_BV: int64 [B, V], distinct canvas indices y * (W / patch) + x in any order; None: every cell, in canvas
            order.
        convs: log2(patch) pairs (weight [C', C, 3, 3], bias [C']), floating.
        norms: as many pairs (weight [C'], bias [C']), floating.
        patch: edge of a patch in pixels, a power of two from 2.
        backend: see `affmae_kernels.dispatch`.

    Returns:
        feat_BVC in the order of `visible_BV`, in autocast's dtype where that is on, else in the image's. LayerNorm
        statistics are fp32 (float64 for float64). Gradients: all weights and biases. The image gets none from the
        kernels.

    Raises:
        ValueError: when shapes, dtypes or the number of layers do not fit together.
    """
    _check(image_BIHW, visible_BV, convs, norms, patch)
    dtype = feature_dtype(image_BIHW)
    choice = choose_backend(backend, "stem", image_BIHW.device, unsupported(dtype, convs, patch))
    if choice.name == "triton":
        from affmae_kernels.stem import triton

        return triton.stem(image_BIHW, visible_BV, convs, norms, patch, dtype)
    with without_autocast(image_BIHW):
        return reference.stem(image_BIHW, visible_BV, convs, norms, patch, dtype)


def unsupported(dtype: torch.dtype, convs: Sequence[tuple[Tensor, Tensor]], patch: int) -> str | None:
    """What the kernels cannot take, in words; None: they take it."""
    if dtype not in DTYPES:
        return f"features of {dtype}"
    if patch not in PATCHES:
        return f"patches of {patch} pixels, only of {' and '.join(map(str, PATCHES))}"
    channels, *widths = [weight.shape[1] for weight, _ in convs] + [convs[-1][0].shape[0]]
    if channels > MOST_CHANNELS:
        return f"{channels} image channels, only up to {MOST_CHANNELS}"
    if any(width % 16 for width in widths) or max(widths[:-1]) > WIDEST or widths[-1] > WIDEST_LAST:
        return f"widths of {widths}, only multiples of 16 up to {WIDEST}, the last up to {WIDEST_LAST}"
    return None


def _check(
    image_BIHW: Tensor,
    visible_BV: Tensor | None,
    convs: Sequence[tuple[Tensor, Tensor]],
    norms: Sequence[tuple[Tensor, Tensor]],
    patch: int,
) -> None:
    if patch < 2 or patch & (patch - 1):
        raise ValueError(f"patch must be a power of two from 2; got {patch}")
    layers = patch.bit_length() - 1
    if len(convs) != layers or len(norms) != layers:
        raise ValueError(f"patch {patch} takes {layers} convs and norms; got {len(convs)} and {len(norms)}")
    shape = list(image_BIHW.shape)
    if image_BIHW.ndim != 4 or not image_BIHW.is_floating_point() or shape[2] % patch or shape[3] % patch:
        raise ValueError(f"image_BIHW must be floating, its sides multiples of {patch}; got {image_BIHW.dtype} {shape}")
    if visible_BV is not None and (
        visible_BV.ndim != 2 or visible_BV.dtype != torch.int64 or visible_BV.shape[0] != shape[0]
    ):
        raise ValueError(f"visible_BV must be int64 [{shape[0]}, V]; got {visible_BV.dtype} {list(visible_BV.shape)}")
    channels = shape[1]
    for i, ((weight, bias), norm) in enumerate(zip(convs, norms, strict=True)):
        width = weight.shape[0]
        if weight.shape != (width, channels, 3, 3) or bias.shape != (width,):
            raise ValueError(
                f"convs[{i}] must be [C', {channels}, 3, 3] and [C']; got {list(weight.shape)} and {list(bias.shape)}"
            )
        if any(tensor.shape != (width,) for tensor in norm):
            raise ValueError(f"norms[{i}] must be two of [{width}]; got {[list(tensor.shape) for tensor in norm]}")
        channels = width
