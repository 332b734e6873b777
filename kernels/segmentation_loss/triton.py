"""Focal and Dice loss as one pass over the logits forward and one backward.

Forward, every program leaves four sums per class of its pixels of one image: p of the true class (hit), p, pixels,
and focal loss. A second small kernel adds them up in a fixed order and makes the losses of each image, and the three
numbers per class that the backward pass needs. Backward, softmax is recomputed from the logits:

    d dice / d p_nk  = slope_k - hit_slope_k [y_n = k]      (g_k below)
    d logits_nk      = d_dice p_nk (g_k - sum_j p_nj g_j) + d_focal s_n ([y_n = k] - p_nk)
    s_n = w_y / N (gamma (1 - p)^(gamma - 1) p log p - (1 - p)^gamma),   p = p_ny

Bound by memory traffic; nothing of full resolution is kept but the logits.

Axes: B images, N pixels in the order of the patches, K classes (KP: padded to a power of two), R pixels of a tile,
G programs per image, GP of them added up at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from affmae_kernels.segmentation_loss.reference import SMOOTH, TINY

TILE = 1024
"""Elements (pixels x padded classes) of a tile: 8 per thread, four sums each."""
PROGRAMS = 1056
"""Programs of a pass over the logits: 8 for each of 132 multiprocessors."""
SUMS = tl.constexpr(4)
"""Rows that a program of the forward pass leaves: hit, probability, pixels, focal loss."""
SLOPES = tl.constexpr(3)
"""Rows of an image that the backward pass reads: focal weight, slope and hit slope of Dice."""
_SMOOTH, _TINY = tl.constexpr(SMOOTH), tl.constexpr(TINY)


@triton.jit
def _power(x, EXPONENT: tl.constexpr):
    """x to a constant power, for x >= 0; 0 to the power of 0 is 1."""
    if EXPONENT == 0:
        power = x * 0.0 + 1.0
    elif EXPONENT == 1:
        power = x
    elif EXPONENT == 2:
        power = x * x
    else:
        power = tl.exp2(EXPONENT * tl.log2(x))
    return power


@triton.jit
def _softmax_tile(
    X, LABEL, image, pixel, N, H, W, COLUMNS, SB, SN, SK,
    K: tl.constexpr, KP: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Softmax of a tile of pixels of one image.

    Returns:
        p [R, KP] (0 for padded classes), log p of the true class [R], 1 - p of the true class [R], whether a class is
        the pixel's [R, KP], whether a pixel is counted [R].
    """
    k = tl.arange(0, KP)

    # Where the pixel is in the image: cell of the canvas, then row and column inside the patch.
    cell, inside = pixel // (P * P), pixel % (P * P)
    y = (cell // COLUMNS) * P + inside // P
    x = (cell % COLUMNS) * P + inside % P

    # [R] labels; counted: inside the image, and a class
    real = (pixel < N) & (y < H) & (x < W)
    where = (image.to(tl.int64) * H + y) * W + x
    label = tl.load(LABEL + where, mask=real, other=0).to(tl.int64)
    counted = real & (label >= 0) & (label < K)
    true = counted[:, None] & (k[None, :] == label[:, None])

    # [R, KP] logits; those of ignored pixels are 0, padded classes have no probability
    used = counted[:, None] & (k < K)[None, :]
    at = image.to(tl.int64) * SB + pixel.to(tl.int64)[:, None] * SN + k.to(tl.int64)[None, :] * SK
    logit = tl.load(X + at, mask=used, other=0.0).to(tl.float32)
    logit = tl.where((k < K)[None, :], logit, float("-inf"))

    shifted = logit - tl.max(logit, 1)[:, None]
    e = tl.exp(shifted)
    total = tl.sum(e, 1)
    p = e / total[:, None]
    log_p_true = tl.sum(tl.where(true, shifted, 0.0), 1) - tl.log(total)
    missing = tl.sum(tl.where(true, 0.0, p), 1)  # as a sum: 1 - p would cancel
    return p, log_p_true, missing, true, counted


@triton.jit(do_not_specialize=["N", "H", "W", "COLUMNS"])
def _seg_loss_fwd_kernel(
    X, LABEL, PART, N, H, W, COLUMNS, SB, SN, SK,
    K: tl.constexpr, KP: tl.constexpr, P: tl.constexpr, R: tl.constexpr, GAMMA: tl.constexpr,
):  # fmt: skip
    """One program: every G-th tile of an image; sums per class to PART [B, G, SUMS, KP]."""
    image = tl.program_id(1)
    hit = tl.zeros([R, KP], tl.float32)
    probability = tl.zeros([R, KP], tl.float32)
    pixels = tl.zeros([R, KP], tl.float32)
    focal = tl.zeros([R, KP], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, R), tl.num_programs(0)):
        pixel = tile * R + tl.arange(0, R)
        p, log_p, missing, true, counted = _softmax_tile(
            X, LABEL, image, pixel, N, H, W, COLUMNS, SB, SN, SK, K=K, KP=KP, P=P
        )
        loss = -_power(missing, GAMMA) * log_p
        hit += tl.where(true, p, 0.0)
        probability += tl.where(counted[:, None], p, 0.0)
        pixels += tl.where(true, 1.0, 0.0)
        focal += tl.where(true, loss[:, None], 0.0)
    # [KP] each
    row = (image.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * SUMS
    at = PART + row * KP + tl.arange(0, KP)
    tl.store(at, tl.sum(hit, 0))
    tl.store(at + KP, tl.sum(probability, 0))
    tl.store(at + 2 * KP, tl.sum(pixels, 0))
    tl.store(at + 3 * KP, tl.sum(focal, 0))


@triton.jit
def _sum_of_parts(PART, image, row, G, KP: tl.constexpr, GP: tl.constexpr):
    """[KP]: one of the SUMS of an image, over its G programs."""
    k = tl.arange(0, KP)
    total = tl.zeros([GP, KP], tl.float32)
    for first in range(0, G, GP):
        part = first + tl.arange(0, GP)
        at = ((image.to(tl.int64) * G + part) * SUMS + row)[:, None] * KP + k[None, :]
        # [GP, KP]
        total += tl.load(PART + at, mask=(part < G)[:, None], other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["G"])
def _seg_loss_finish_kernel(PART, WEIGHT, LOSS, SLOPE, G, K: tl.constexpr, KP: tl.constexpr, GP: tl.constexpr):
    """One program: the losses of one image to LOSS [B, 2], what the backward pass needs to SLOPE [B, SLOPES, KP]."""
    image = tl.program_id(0)
    images = tl.num_programs(0)
    k = tl.arange(0, KP)
    hit = _sum_of_parts(PART, image, 0, G, KP=KP, GP=GP)
    probability = _sum_of_parts(PART, image, 1, G, KP=KP, GP=GP)
    pixels = _sum_of_parts(PART, image, 2, G, KP=KP, GP=GP)
    focal = _sum_of_parts(PART, image, 3, G, KP=KP, GP=GP)
    weight = tl.load(WEIGHT + k, mask=k < K, other=0.0).to(tl.float32)  # [KP]

    counted = tl.maximum(tl.sum(pixels, 0), 1.0)
    share = tl.where(pixels > 0, weight, 0.0)
    share = share / tl.maximum(tl.sum(share, 0), _TINY)
    above, below = 2 * hit + _SMOOTH, probability + pixels + _SMOOTH
    tl.store(LOSS + image * 2, tl.sum(weight * focal, 0) / counted)
    tl.store(LOSS + image * 2 + 1, tl.sum(share * (1 - above / below), 0))

    at = SLOPE + image * SLOPES * KP + k
    share = share / images
    tl.store(at, weight / (counted * images))
    tl.store(at + KP, share * above / (below * below))
    tl.store(at + 2 * KP, share * 2 / below)


@triton.jit(do_not_specialize=["N", "H", "W", "COLUMNS"])
def _seg_loss_bwd_kernel(
    X, LABEL, SLOPE, DFOCAL, DDICE, DX, N, H, W, COLUMNS, SB, SN, SK,
    K: tl.constexpr, KP: tl.constexpr, P: tl.constexpr, R: tl.constexpr, GAMMA: tl.constexpr,
):  # fmt: skip
    """One program: every G-th tile of an image; gradients of its logits, 0 for ignored pixels."""
    image = tl.program_id(1)
    k = tl.arange(0, KP)
    dfocal, ddice = tl.load(DFOCAL).to(tl.float32), tl.load(DDICE).to(tl.float32)
    # [KP] each
    row = SLOPE + image * SLOPES * KP + k
    weight = tl.load(row) * dfocal
    slope = tl.load(row + KP) * ddice
    hit_slope = tl.load(row + 2 * KP) * ddice
    for tile in range(tl.program_id(0), tl.cdiv(N, R), tl.num_programs(0)):
        pixel = tile * R + tl.arange(0, R)
        p, log_p, missing, true, counted = _softmax_tile(
            X, LABEL, image, pixel, N, H, W, COLUMNS, SB, SN, SK, K=K, KP=KP, P=P
        )
        # Dice, through the softmax
        dp = slope[None, :] - tl.where(true, hit_slope[None, :], 0.0)
        dx = p * (dp - tl.sum(p * dp, 1)[:, None])
        # The focal loss: by log p of the true class, whose gradient is [y = k] - p. Written with `missing` where k is
        # the true class, for the precision of a sure pixel.
        d_log_p = -_power(missing, GAMMA)
        if GAMMA != 0:
            d_log_p += GAMMA * _power(missing, GAMMA - 1) * tl.sum(tl.where(true, p, 0.0), 1) * log_p
        d_log_p *= tl.sum(tl.where(true, weight[None, :], 0.0), 1)
        dx += d_log_p[:, None] * tl.where(true, missing[:, None], -p)
        dx = tl.where(counted[:, None], dx, 0.0)
        # [R, KP]
        at = image.to(tl.int64) * SB + pixel.to(tl.int64)[:, None] * SN + k.to(tl.int64)[None, :] * SK
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=(pixel < N)[:, None] & (k < K)[None, :])


def _launch_options(logits: Tensor, labels: Tensor, classes: int, gamma: float, patch: int | None) -> dict[str, Any]:
    """Sizes, strides and constants that both passes share. The logits are contiguous."""
    _, height, width = labels.shape
    edge = patch or 1
    rows, columns = triton.cdiv(height, edge), triton.cdiv(width, edge)
    pixels = rows * columns * edge * edge
    padded = max(2, triton.next_power_of_2(classes))
    # Steps in memory from pixel to pixel and from class to class.
    strides = {"SN": 1, "SK": pixels} if patch is None else {"SN": classes, "SK": 1}
    return {
        "N": pixels, "H": height, "W": width, "COLUMNS": columns, "SB": pixels * classes, **strides,
        "K": classes, "KP": padded, "P": edge, "R": max(1, TILE // padded), "GAMMA": float(gamma), "num_warps": 4,
    }  # fmt: skip


def _grid(options: dict[str, Any], images: int) -> tuple[int, int]:
    """Programs per image, and images."""
    return min(triton.cdiv(options["N"], options["R"]), triton.cdiv(PROGRAMS, images)), images


def _forward(
    logits: Tensor, labels: Tensor, weights: Tensor, gamma: float, patch: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean focal loss, mean Dice loss, slopes fp32 [B, SLOPES, KP]."""
    images, classes = len(labels), len(weights)
    options = _launch_options(logits, labels, classes, gamma, patch)
    grid = _grid(options, images)
    padded = options["KP"]
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": logits.device}
    part = torch.empty(images, grid[0], SUMS.value, padded, **fp32)
    loss = torch.empty(images, 2, **fp32)
    slope = torch.empty(images, SLOPES.value, padded, **fp32)
    _seg_loss_fwd_kernel[grid](X=logits, LABEL=labels, PART=part, **options)
    _seg_loss_finish_kernel[(images,)](
        PART=part, WEIGHT=weights, LOSS=loss, SLOPE=slope, G=grid[0],
        K=classes, KP=padded, GP=max(1, TILE // padded), num_warps=4,
    )  # fmt: skip
    focal, dice = loss.mean(0).unbind()
    return focal, dice, slope


def _backward(
    logits: Tensor,
    labels: Tensor,
    slope: Tensor,
    dfocal: Tensor,
    ddice: Tensor,
    classes: int,
    gamma: float,
    patch: int | None,
) -> Tensor:
    dlogits = torch.empty_like(logits)
    options = _launch_options(logits, labels, classes, gamma, patch)
    _seg_loss_bwd_kernel[_grid(options, len(labels))](
        X=logits, LABEL=labels, SLOPE=slope, DFOCAL=dfocal, DDICE=ddice, DX=dlogits, **options
    )
    return dlogits


class _SegmentationLoss(torch.autograd.Function):
    """Keeps the logits and the slopes of each image."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor, gamma: float, patch: int | None
    ) -> tuple[Tensor, Tensor]:
        logits, labels = logits.contiguous(), labels.contiguous()
        focal, dice, slope = _forward(logits, labels, weights, gamma, patch)
        ctx.save_for_backward(logits, labels, slope)
        ctx.classes, ctx.gamma, ctx.patch = len(weights), gamma, patch
        return focal, dice

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dfocal: Tensor, ddice: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, slope = ctx.saved_tensors
        dlogits = _backward(logits, labels, slope, dfocal, ddice, ctx.classes, ctx.gamma, ctx.patch)
        return dlogits, None, None, None, None


def segmentation_loss(
    logits: Tensor, labels_BHW: Tensor, class_weights_K: Tensor, gamma: float, patch: int | None
) -> tuple[Tensor, Tensor]:
    """See the package for the formulas and the shapes."""
    focal, dice = _SegmentationLoss.apply(logits, labels_BHW, class_weights_K.contiguous(), gamma, patch)
    return focal, dice
