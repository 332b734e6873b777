"""Patch embedding on tensor cores: only visible patches are computed, every convolution is a gathered product.

    z_l[t, y, x] = b + sum over taps of W[ky, kx] x_{l-1}[t', 2y + ky - 1, 2x + kx - 1],   x_l = GELU(LayerNorm(z_l))

Stride 2 and padding 1 reach into three neighbors only: the last column of the patch to the left, the last row of the
patch above, and the corner between them. Activations are rows [tokens * E * E, C] (E: edge of a patch's features),
followed by two more rows: what a masked neighbor shows, GELU(LayerNorm bias), and zeros for the outside. So a tap is a
gather of rows, whatever the neighbor is.

Gradients by convolution, nothing atomic:
    dz_{l-1} = LayerNorm and GELU backward of sum over taps of dz_l W^T: an input row of even y is read by tap ky = 1
               only, one of odd y by ky = 2 of the same output row and ky = 0 of the next, perhaps in the patch below;
    dW[tap]  = sum over rows of x_{l-1}[tap]^T dz_l, in partial sums by program.
    What reaches the row of the masked neighbors is W^T times the sum of dz_l over the rows that read it.
Kept are z_2, z_3, ...: z_1, the largest, comes from the image again, and every x_l from z_l, in the kernel of dz_l.

Axes: T tokens (visible patches of all images), M rows, C and D channels of a convolution's input and output, IC image
channels, K = 9 IC inputs of the first convolution, R rows of a tile, CB and DB channels of a block, P programs; CP, DP,
KP padded to powers of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from affmae_kernels.column_sums import column_sums
from affmae_kernels.gaussian import normal
from affmae_kernels.launch import architecture, multiprocessors, precision_of
from affmae_kernels.stem.reference import EPS

LEFT, ABOVE, CORNER, RIGHT, BELOW, LOWER_RIGHT = (tl.constexpr(column) for column in range(6))
"""Columns of the neighbor table: those a patch sees, then those that see it."""
DIRECTIONS = tl.constexpr(6)
MASKED, OUTSIDE = tl.constexpr(-1), tl.constexpr(-2)
"""Entries of the neighbor table that are no token."""

BACKWARD_PROGRAMS_PER_SM = 24
"""Most programs of the data gradient per multiprocessor, which holds 4 at a time; each leaves one line of sums."""
PROGRAMS_PER_TAP = 58
"""Most of the weight gradient, for each of the 9 taps: 4 for each of 132 multiprocessors."""
FORWARD_TILE, DATA_TILE, FIRST_DATA_TILE, WEIGHT_TILE = (128, 8192), (64, 4096), (32, 2048), (64, 8192)
"""Most rows and elements of a tile. Forward, the weights are read again for every tile. The data gradient before the
first convolution, which comes from the image again, needs the most registers. The fastest of those tried on an H200."""
REGISTERS_HOPPER, REGISTERS = 128, 168
"""Of that kernel: four or three blocks of it fit on a multiprocessor. On Blackwell 128 would spill."""
WINDOW_TILE = 1024
"""Most inputs of the first convolution in a tile of the data gradient."""
DEPTH = 64
"""Most channels of one step of a sum of products."""
SHARED_MEMORY = 101_376
"""Bytes that a block may use on the smallest GPUs (compute capability 12.0 and 8.6)."""
SIZES = ["M", "V", "HEIGHT", "WIDTH"]
"""Arguments that change with the batch and the image, so that a new size needs no new kernel."""


# Kernels. Numbers of rows fit in 32 bits (2^31 rows are more than 60 GB of features); offsets of elements take 64.


@triton.jit(do_not_specialize=["V", "CELLS", "COLUMNS"])
def _neighbors_kernel(CELL, RASTER, TABLE, V, CELLS, COLUMNS, BLOCK: tl.constexpr):
    """One program: TABLE [T, 6] of one image, the tokens around each token, MASKED or OUTSIDE."""
    b = tl.program_id(0)
    raster = RASTER + b.to(tl.int64) * CELLS
    lane = tl.arange(0, BLOCK)
    # The token in every cell of the canvas.
    for i0 in range(0, CELLS, BLOCK):
        tl.store(raster + i0 + lane, MASKED, mask=i0 + lane < CELLS)
    tl.debug_barrier()
    for i0 in range(0, V, BLOCK):
        token = b * V + i0 + lane
        real = i0 + lane < V
        tl.store(raster + tl.load(CELL + token, mask=real, other=0), token, mask=real)
    tl.debug_barrier()
    # Look the neighbors up, [BLOCK, 8] for the columns LEFT to LOWER_RIGHT.
    column = tl.arange(0, 8)
    step = tl.where(column >= RIGHT, 1, -1)
    dx = tl.where(column % 3 == ABOVE, 0, step)
    dy = tl.where(column % 3 == LEFT, 0, step)
    for i0 in range(0, V, BLOCK):
        token = b * V + i0 + lane
        real = (i0 + lane < V)[:, None] & (column < DIRECTIONS)[None, :]
        cell = tl.load(CELL + token, mask=i0 + lane < V, other=0).to(tl.int32)
        x = (cell % COLUMNS)[:, None] + dx[None, :]
        y = (cell // COLUMNS)[:, None] + dy[None, :]
        inside = real & (x >= 0) & (x < COLUMNS) & (y >= 0) & (y < CELLS // COLUMNS)
        found = tl.load(raster + y * COLUMNS + x, mask=inside, other=OUTSIDE)
        tl.store(TABLE + token[:, None] * DIRECTIONS + column[None, :], found, mask=real)


@triton.jit
def _owner(TABLE, token, y, x, real):
    """The token that holds position (y, x) counted from the patch's first row and column; -1 is in the neighbor."""
    direction = tl.where(y < 0, tl.where(x < 0, CORNER, ABOVE), LEFT)
    across = (y < 0) | (x < 0)
    found = tl.load(TABLE + token * DIRECTIONS + direction, mask=real & across, other=OUTSIDE)
    return tl.where(across, found, token)


@triton.jit
def _split(row, E: tl.constexpr):
    """(token, y, x) of rows [T, E, E]."""
    return row // (E * E), row // E % E, row % E


@triton.jit
def _input_row(owner, y, x, rows, E: tl.constexpr):
    """The row of [T, E, E] at (y, x) modulo E of the owner; the two rows after the last where there is no owner."""
    return tl.where(owner >= 0, (owner * E + (y & (E - 1))) * E + (x & (E - 1)), rows - 1 - owner)


@triton.jit
def _window(
    IMAGE, CELL, TABLE, row, M, V, HEIGHT, WIDTH,
    IC: tl.constexpr, PATCH: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """[R, KP] inputs of the first convolution, ordered as its weight [IC, 3, 3]; 0 where masked or outside."""
    k = tl.arange(0, KP)
    real = row < M
    token, oy, ox = _split(row, PATCH // 2)
    cell = tl.load(CELL + token, mask=real, other=0).to(tl.int32)
    b = (token // V).to(tl.int64)
    # [R, KP]
    y = 2 * oy[:, None] + (k % 9 // 3)[None, :] - 1
    x = 2 * ox[:, None] + (k % 3)[None, :] - 1
    used = real[:, None] & (k < 9 * IC)[None, :]
    owner = _owner(TABLE, token[:, None], y, x, used)
    canvas_x = cell % (WIDTH // PATCH)
    canvas_y = cell // (WIDTH // PATCH)
    line = (b[:, None] * IC + (k // 9)[None, :]) * HEIGHT + canvas_y[:, None] * PATCH + y
    return tl.load(IMAGE + line * WIDTH + canvas_x[:, None] * PATCH + x, mask=used & (owner >= 0), other=0.0)


@triton.jit
def _first_conv(window, WEIGHT, BIAS, DTYPE: tl.constexpr, IC: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
                KP: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """[R, CP] of the first convolution, rounded to DTYPE, as fp32."""
    k = tl.arange(0, KP)
    c = tl.arange(0, CP)
    # [KP, CP]
    weight = tl.load(
        WEIGHT + c[None, :] * (9 * IC) + k[:, None], mask=(k < 9 * IC)[:, None] & (c < C)[None, :], other=0.0
    )
    z = tl.dot(window.to(DTYPE), weight.to(DTYPE), input_precision=PREC)
    return _rounded(z, BIAS, DTYPE, C, CP)


@triton.jit
def _rounded(z, BIAS, DTYPE: tl.constexpr, C: tl.constexpr, CP: tl.constexpr):
    """z + bias, rounded to DTYPE as the reference does, as fp32."""
    c = tl.arange(0, CP)
    bias = tl.load(BIAS + c, mask=c < C, other=0.0).to(tl.float32)
    return (z + bias[None, :]).to(DTYPE).to(tl.float32)


@triton.jit
def _normalized(z, eps, C: tl.constexpr, CP: tl.constexpr):
    """(h, rstd): LayerNorm of rows without weight and bias; h is 0 beyond C."""
    inside = tl.arange(0, CP) < C
    mean = tl.sum(z, 1) / C
    centered = tl.where(inside[None, :], z - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centered * centered, 1) / C + eps)
    return centered * rstd[:, None], rstd


@triton.jit
def _store_beyond(X, NORM_BIAS, M, C: tl.constexpr, CP: tl.constexpr):
    """Stores the two rows after the M of the features: what a masked neighbor shows, and zeros."""
    c = tl.arange(0, CP)
    b = tl.load(NORM_BIAS + c, mask=c < C, other=0.0).to(tl.float32)
    beyond = X + M.to(tl.int64) * C + c
    tl.store(beyond, (b * normal(b)[0]).to(X.dtype.element_ty), mask=c < C)
    tl.store(beyond + C, tl.zeros([CP], X.dtype.element_ty), mask=c < C)


@triton.jit
def _store_activations(
    X, z, NORM_WEIGHT, NORM_BIAS, row, M, eps, C: tl.constexpr, CP: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    """Stores LayerNorm (and GELU unless LAST) of a tile z, and once the rows beyond."""
    c = tl.arange(0, CP)
    w = tl.load(NORM_WEIGHT + c, mask=c < C, other=0.0).to(tl.float32)
    b = tl.load(NORM_BIAS + c, mask=c < C, other=0.0).to(tl.float32)
    h, _ = _normalized(z, eps, C, CP)
    x = h * w[None, :] + b[None, :]
    if not LAST:
        x *= normal(x)[0]
        if tl.program_id(0) == 0:
            _store_beyond(X, NORM_BIAS, M, C, CP)
    at = row.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(X + at, x.to(X.dtype.element_ty), mask=(row < M)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=SIZES)
def _first_fwd_kernel(
    IMAGE, CELL, TABLE, WEIGHT, BIAS, NORM_WEIGHT, NORM_BIAS, Y, M, V, HEIGHT, WIDTH, eps,
    IC: tl.constexpr, PATCH: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr, R: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """One program: R rows of x_1 from the image."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    window = _window(IMAGE, CELL, TABLE, row, M, V, HEIGHT, WIDTH, IC, PATCH, KP)
    z = _first_conv(window, WEIGHT, BIAS, Y.dtype.element_ty, IC, C, CP, KP, PREC)
    _store_activations(Y, z, NORM_WEIGHT, NORM_BIAS, row, M, eps, C, CP, False)


@triton.jit(do_not_specialize=SIZES)
def _conv_fwd_kernel(
    X, TABLE, TAPS, BIAS, NORM_WEIGHT, NORM_BIAS, Z, Y, M, eps,
    E: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr,
    LAST: tl.constexpr, KEEP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One program: R of the M rows of z_l and x_l. X has patches of edge E; TAPS is [9, C, D]."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    real = row < M
    d = tl.arange(0, DP)
    token, oy, ox = _split(row, E // 2)
    left = _owner(TABLE, token, 2 * oy, 2 * ox - 1, real)
    above = _owner(TABLE, token, 2 * oy - 1, 2 * ox, real)
    corner = _owner(TABLE, token, 2 * oy - 1, 2 * ox - 1, real)
    z = tl.zeros([R, DP], tl.float32)
    BLOCKS: tl.constexpr = (C + CB - 1) // CB
    for step in range(9 * BLOCKS):
        tap = step // BLOCKS
        ky = tap // 3
        kx = tap % 3
        c = step % BLOCKS * CB + tl.arange(0, CB)
        owner = tl.where(ky == 0, tl.where(kx == 0, corner, above), tl.where(kx == 0, left, token))
        source = _input_row(owner, 2 * oy + ky - 1, 2 * ox + kx - 1, M * 4, E).to(tl.int64)
        # [R, CB]
        x = tl.load(X + source[:, None] * C + c[None, :], mask=real[:, None] & (c < C)[None, :], other=0.0)
        # [CB, DP]
        weight = tl.load(
            TAPS + (tap * C + c[:, None]) * D + d[None, :], mask=(c < C)[:, None] & (d < D)[None, :], other=0.0
        )
        z = tl.dot(x, weight, z, input_precision=PREC)
    z = _rounded(z, BIAS, Y.dtype.element_ty, D, DP)
    if KEEP:
        at = row.to(tl.int64)[:, None] * D + d[None, :]
        tl.store(Z + at, z.to(Z.dtype.element_ty), mask=real[:, None] & (d < D)[None, :])
    _store_activations(Y, z, NORM_WEIGHT, NORM_BIAS, row, M, eps, D, DP, LAST)


@triton.jit
def _norm_gradient(dy, h, rstd, w, C: tl.constexpr):
    """dz of LayerNorm from dy: rstd (g - mean(g) - h mean(g h)) with g = w dy."""
    g = dy * w[None, :]
    mean = tl.sum(g, 1) / C
    along = tl.sum(g * h, 1) / C
    return rstd[:, None] * (g - mean[:, None] - h * along[:, None])


@triton.jit(do_not_specialize=SIZES)
def _norm_bwd_kernel(
    DY, Z, NORM_WEIGHT, DZ, PART, M, eps, C: tl.constexpr, CP: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """One program: every P-th tile of R rows of dz_L, from the gradient of the result. Its sums of dweight, dbias of
    the LayerNorm and dbias of the convolution go to its line of PART [P, 3, C]."""
    c = tl.arange(0, CP)
    inside = c < C
    w = tl.load(NORM_WEIGHT + c, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([CP], tl.float32)
    dnorm_bias = tl.zeros([CP], tl.float32)
    dbias = tl.zeros([CP], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(M, R), tl.num_programs(0)):
        row = tile * R + tl.arange(0, R)
        at = row.to(tl.int64)[:, None] * C + c[None, :]
        real = (row < M)[:, None] & inside[None, :]
        # [R, CP]
        dy = tl.load(DY + at, mask=real, other=0.0).to(tl.float32)
        z = tl.load(Z + at, mask=real, other=0.0).to(tl.float32)
        h, rstd = _normalized(z, eps, C, CP)
        dz = _norm_gradient(dy, h, rstd, w, C)
        tl.store(DZ + at, dz.to(DZ.dtype.element_ty), mask=real)
        dweight += tl.sum(dy * h, 0)
        dnorm_bias += tl.sum(dy, 0)
        dbias += tl.sum(dz, 0)
    part = PART + tl.program_id(0) * 3 * C + c
    tl.store(part, dweight, mask=inside)
    tl.store(part + C, dnorm_bias, mask=inside)
    tl.store(part + 2 * C, dbias, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _conv_bwd_dx_kernel(
    DZ, TABLE, TAPS, Z, IMAGE, CELL, WEIGHT, BIAS, NORM_WEIGHT, NORM_BIAS, DX, X, PART, M, V, HEIGHT, WIDTH, eps,
    E: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, R: tl.constexpr,
    FIRST: tl.constexpr, IC: tl.constexpr, PATCH: tl.constexpr, KP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One program: dz_{l-1} in DX [4 M, C] from dz_l in DZ [M, D], and x_{l-1} in X [4 M + 2, C]; of every P-th pair of
    R output rows and parity. Input rows of one parity of (y, x) have the same taps.

    FIRST: z_1 comes from the image; dz_1 is not stored, the gradient of the first weight is summed instead.
    PART [P, 3 (+ KP), C]: sums of dweight and dbias of the LayerNorm, dbias of convolution l - 1 (and its dweight).
    """
    DTYPE: tl.constexpr = DZ.dtype.element_ty
    HALF: tl.constexpr = E // 2
    BLOCKS: tl.constexpr = (D + DB - 1) // DB
    c = tl.arange(0, CP)
    inside = c < C
    w = tl.load(NORM_WEIGHT + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(NORM_BIAS + c, mask=inside, other=0.0).to(tl.float32)
    dnorm_weight = tl.zeros([CP], tl.float32)
    dnorm_bias = tl.zeros([CP], tl.float32)
    dbias = tl.zeros([CP], tl.float32)
    if FIRST:
        dweight = tl.zeros([KP, CP], tl.float32)
    for unit in range(tl.program_id(0), tl.cdiv(M, R) * 4, tl.num_programs(0)):
        odd_y = unit % 4 // 2
        odd_x = unit % 2
        row = unit // 4 * R + tl.arange(0, R)
        real = row < M
        token, oy, ox = _split(row, HALF)
        # Tokens that may read the last row and column of this one.
        neighbors = TABLE + token * DIRECTIONS
        last_y = (oy == HALF - 1) & real
        last_x = (ox == HALF - 1) & real
        right = tl.load(neighbors + RIGHT, mask=last_x, other=OUTSIDE)
        below = tl.load(neighbors + BELOW, mask=last_y, other=OUTSIDE)
        lower_right = tl.load(neighbors + LOWER_RIGHT, mask=last_x & last_y, other=OUTSIDE)
        # dx: the outputs that read an input position, one for an even coordinate and two for an odd one.
        dx = tl.zeros([R, CP], tl.float32)
        for step in range((1 + odd_y) * (1 + odd_x) * BLOCKS):
            reader = step // BLOCKS
            d = step % BLOCKS * DB + tl.arange(0, DB)
            next_y = reader // (1 + odd_x)
            next_x = reader % (1 + odd_x)
            ky = 1 + odd_y * (1 - 2 * next_y)
            kx = 1 + odd_x * (1 - 2 * next_x)
            y = oy + next_y
            x = ox + next_x
            owner = tl.where(y == HALF, tl.where(x == HALF, lower_right, below), tl.where(x == HALF, right, token))
            source = ((owner * HALF + (y & (HALF - 1))) * HALF + (x & (HALF - 1))).to(tl.int64)
            # [R, DB]
            there = (real & (owner >= 0))[:, None] & (d < D)[None, :]
            dz = tl.load(DZ + source[:, None] * D + d[None, :], mask=there, other=0.0)
            # [DB, CP]
            weight = tl.load(
                TAPS + ((ky * 3 + kx) * C + c[None, :]) * D + d[:, None],
                mask=(d < D)[:, None] & inside[None, :],
                other=0.0,
            )
            dx = tl.dot(dz, weight, dx, input_precision=PREC)
        # z of these input rows, and LayerNorm and GELU backward.
        input_row = (token * E + 2 * oy + odd_y) * E + 2 * ox + odd_x
        at = input_row.to(tl.int64)[:, None] * C + c[None, :]
        used = real[:, None] & inside[None, :]
        if FIRST:
            window = _window(IMAGE, CELL, TABLE, input_row, M * 4, V, HEIGHT, WIDTH, IC, PATCH, KP)
            z = _first_conv(window, WEIGHT, BIAS, DTYPE, IC, C, CP, KP, PREC)
        else:
            z = tl.load(Z + at, mask=used, other=0.0).to(tl.float32)
        h, rstd = _normalized(z, eps, C, CP)
        u = h * w[None, :] + b[None, :]
        cumulative, density = normal(u)
        tl.store(X + at, (u * cumulative).to(DTYPE), mask=used)
        du = dx * (cumulative + u * density)
        dz = _norm_gradient(du, h, rstd, w, C)
        dnorm_weight += tl.sum(du * h, 0)
        dnorm_bias += tl.sum(du, 0)
        dbias += tl.sum(dz, 0)
        if FIRST:
            dweight = tl.dot(tl.trans(window.to(DTYPE)), dz.to(DTYPE), dweight, input_precision=PREC)
        else:
            tl.store(DX + at, dz.to(DTYPE), mask=used)
    if tl.program_id(0) == 0:
        _store_beyond(X, NORM_BIAS, M * 4, C, CP)
    LINES: tl.constexpr = 3 + KP if FIRST else 3
    part = PART + tl.program_id(0) * LINES * C + c
    tl.store(part, dnorm_weight, mask=inside)
    tl.store(part + C, dnorm_bias, mask=inside)
    tl.store(part + 2 * C, dbias, mask=inside)
    if FIRST:
        line = 3 + tl.arange(0, KP)
        tl.store(part[None, :] + line[:, None] * C, dweight, mask=inside[None, :])


@triton.jit(do_not_specialize=SIZES)
def _conv_bwd_dw_kernel(
    X, DZ, TABLE, PART, M,
    E: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, R: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """One program: the weight gradient of one tap and DB outputs, from every P-th tile of R of the M rows.

    PART [P, 9, C + 1, D]: dW, then the sum of dz over the rows that see a masked neighbor.
    """
    tap = tl.program_id(1)
    c = tl.arange(0, CP)
    d = tl.program_id(2) * DB + tl.arange(0, DB)
    dweight = tl.zeros([CP, DB], tl.float32)
    masked = tl.zeros([R, DB], tl.float32)  # summed over rows only at the end: that crosses warps
    for tile in range(tl.program_id(0), tl.cdiv(M, R), tl.num_programs(0)):
        row = tile * R + tl.arange(0, R)
        real = row < M
        token, oy, ox = _split(row, E // 2)
        y = 2 * oy + tap // 3 - 1
        x = 2 * ox + tap % 3 - 1
        owner = _owner(TABLE, token, y, x, real)
        source = _input_row(owner, y, x, M * 4, E).to(tl.int64)
        # [R, CP]
        feat = tl.load(X + source[:, None] * C + c[None, :], mask=real[:, None] & (c < C)[None, :], other=0.0)
        # [R, DB]
        at = row.to(tl.int64)[:, None] * D + d[None, :]
        dz = tl.load(DZ + at, mask=real[:, None] & (d < D)[None, :], other=0.0)
        dweight = tl.dot(tl.trans(feat), dz, dweight, input_precision=PREC)
        masked += tl.where((owner == MASKED)[:, None], dz.to(tl.float32), 0.0)
    part = PART + (tl.program_id(0) * 9 + tap).to(tl.int64) * (C + 1) * D + d
    tl.store(part[None, :] + c[:, None] * D, dweight, mask=(c < C)[:, None] & (d < D)[None, :])
    tl.store(part + C * D, tl.sum(masked, 0), mask=d < D)


# Launchers.


class _Layer(NamedTuple):
    """Parameters of one convolution and its LayerNorm."""

    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


class _Patches(NamedTuple):
    """What is seen of the images: [B, IC, H, W], int64 [B, V] cells, and int32 [T, 6] neighbors."""

    image: Tensor
    cell: Tensor
    table: Tensor
    patch: int

    def sizes(self) -> dict[str, int]:
        """Arguments of the kernels that read the image."""
        _, channels, height, width = self.image.shape
        padded = max(16, triton.next_power_of_2(9 * channels))
        return {
            "V": self.cell.shape[1],
            "HEIGHT": height,
            "WIDTH": width,
            "IC": channels,
            "PATCH": self.patch,
            "KP": padded,
        }


def _padded(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))


def _tile(dtype: torch.dtype, channels: int, most_rows: int, most: int) -> dict[str, int]:
    """Rows of a tile (R) and warps, where `channels` of a row stay in registers. Products of fp32 have no tensor cores
    and need more registers."""
    if dtype == torch.float32:
        return {"R": 16, "num_warps": 4}
    padded = _padded(channels)
    rows = min(most_rows, most // padded)
    return {"R": rows, "num_warps": 8 if rows * padded > 4096 else 4}


def _stages(dtype: torch.dtype, rows: int, most: int) -> int:
    """Steps under way at a time, each with `rows` of both factors in shared memory."""
    return min(most, SHARED_MEMORY // (rows * DEPTH * dtype.itemsize))


def launch_neighbors(cell_BV: Tensor, canvas_hw: tuple[int, int]) -> Tensor:
    """int32 [B * V, 6]: the tokens around each token."""
    batch, visible = cell_BV.shape
    height, width = canvas_hw
    raster = torch.empty(batch, height * width, dtype=torch.int32, device=cell_BV.device)
    table = torch.empty(batch * visible, DIRECTIONS.value, dtype=torch.int32, device=cell_BV.device)
    _neighbors_kernel[(batch,)](
        CELL=cell_BV, RASTER=raster, TABLE=table, V=visible, CELLS=height * width, COLUMNS=width, BLOCK=1024,
        num_warps=16,
    )  # fmt: skip
    return table


def launch_first_fwd(patches: _Patches, layer: _Layer, dtype: torch.dtype) -> Tensor:
    """x_1 [T * (p / 2)^2 + 2, C]."""
    rows = len(patches.table) * (patches.patch // 2) ** 2
    channels = len(layer.bias)
    y = torch.empty(rows + 2, channels, dtype=dtype, device=patches.image.device)
    tile = _tile(dtype, channels, *FORWARD_TILE) | {"num_warps": 4}
    _first_fwd_kernel[(triton.cdiv(rows, tile["R"]),)](
        IMAGE=patches.image, CELL=patches.cell, TABLE=patches.table, WEIGHT=layer.weight, BIAS=layer.bias,
        NORM_WEIGHT=layer.norm_weight, NORM_BIAS=layer.norm_bias, Y=y, M=rows, eps=EPS, C=channels,
        CP=_padded(channels), PREC=precision_of(dtype), **patches.sizes(), **tile,
    )  # fmt: skip
    return y


def launch_conv_fwd(
    x: Tensor, table: Tensor, taps: Tensor, layer: _Layer, edge: int, *, last: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """z_l [M, D] (empty unless kept) and x_l [M + 2, D] (the last [M, D]) from x_{l-1} with patches of `edge`."""
    rows = len(table) * (edge // 2) ** 2
    _, channels, width = taps.shape
    z = torch.empty(rows if keep else 0, width, dtype=x.dtype, device=x.device)
    y = torch.empty(rows if last else rows + 2, width, dtype=x.dtype, device=x.device)
    tile = _tile(x.dtype, width, *FORWARD_TILE)
    _conv_fwd_kernel[(triton.cdiv(rows, tile["R"]),)](
        X=x, TABLE=table, TAPS=taps, BIAS=layer.bias, NORM_WEIGHT=layer.norm_weight, NORM_BIAS=layer.norm_bias, Z=z,
        Y=y, M=rows, eps=EPS, E=edge, C=channels, CB=min(DEPTH, _padded(channels)), D=width, DP=_padded(width),
        LAST=last, KEEP=keep, PREC=precision_of(x.dtype),
        num_stages=_stages(x.dtype, tile["R"] + _padded(width), 3), **tile,
    )  # fmt: skip
    return z, y


def launch_norm_bwd(dy: Tensor, z: Tensor, layer: _Layer) -> tuple[Tensor, Tensor]:
    """dz of the last convolution, and fp32 [3, C]: gradients of the LayerNorm's weight and bias and the bias."""
    rows, channels = z.shape
    dz = torch.empty_like(z)
    padded = _padded(channels)
    tile = {"R": max(1, 2048 // padded), "num_warps": 4}
    programs = min(triton.cdiv(rows, tile["R"]), BACKWARD_PROGRAMS_PER_SM * multiprocessors(z.device))
    part = torch.empty(programs, 3 * channels, dtype=torch.float32, device=z.device)
    _norm_bwd_kernel[(programs,)](
        DY=dy, Z=z, NORM_WEIGHT=layer.norm_weight, DZ=dz, PART=part, M=rows, eps=EPS, C=channels, CP=padded, **tile
    )
    return dz, column_sums(part).view(-1, channels)


def launch_conv_bwd_dx(
    dz: Tensor, taps: Tensor, z: Tensor | None, below: _Layer, patches: _Patches, edge: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dz_{l-1} [4 M, C], x_{l-1} [4 M + 2, C], and the sums [3, C] of `launch_norm_bwd` for the layer `below`.

    z: z_{l-1}; None for the first convolution, whose dz is not stored and the gradient of whose weight follows in the
    sums, [3 + KP, C] with rows in the order of its inputs.
    """
    rows = len(dz)
    _, channels, width = taps.shape
    sizes = patches.sizes()
    first = z is None
    dx = torch.empty(0 if first else 4 * rows, channels, dtype=dz.dtype, device=dz.device)
    x = torch.empty(4 * rows + 2, channels, dtype=dz.dtype, device=dz.device)
    block = min(DEPTH, _padded(width))
    tile = _tile(dz.dtype, channels, *(FIRST_DATA_TILE if first else DATA_TILE))
    stages = _stages(dz.dtype, tile["R"] + _padded(channels), 2)
    registers = None
    if first:
        stages = 1  # a second one takes 40 registers more
        if sizes["KP"] == 16 and channels <= DEPTH and dz.dtype != torch.float32:
            registers = REGISTERS_HOPPER if architecture() == 90 else REGISTERS
        tile["R"] = min(tile["R"], WINDOW_TILE // sizes["KP"])
    programs = min(triton.cdiv(rows, tile["R"]) * 4, BACKWARD_PROGRAMS_PER_SM * multiprocessors(dz.device))
    lines = 3 + sizes["KP"] if first else 3
    part = torch.empty(programs, lines * channels, dtype=torch.float32, device=dz.device)
    _conv_bwd_dx_kernel[(programs,)](
        DZ=dz, TABLE=patches.table, TAPS=taps, Z=dz if z is None else z, IMAGE=patches.image, CELL=patches.cell,
        WEIGHT=below.weight, BIAS=below.bias, NORM_WEIGHT=below.norm_weight, NORM_BIAS=below.norm_bias, DX=dx,
        X=x, PART=part, M=rows, eps=EPS, E=edge, C=channels, CP=_padded(channels), D=width, DB=block, FIRST=first,
        PREC=precision_of(dz.dtype), num_stages=stages, maxnreg=registers, **sizes, **tile,
    )  # fmt: skip
    return dx, x, column_sums(part).view(lines, channels)


def launch_conv_bwd_dw(x: Tensor, dz: Tensor, table: Tensor, edge: int) -> tuple[Tensor, Tensor]:
    """fp32 dW [9, C, D], and [9, D]: the sum of dz over the rows whose tap is in a masked neighbor."""
    rows, width = dz.shape
    channels = x.shape[1]
    block = min(DEPTH, _padded(width))
    # With more rows to sum, tiles of twice as many are faster, where they do not spill.
    tall = edge > 2 and architecture() == 90
    tile = _tile(dz.dtype, channels, *((128, 8192) if tall else WEIGHT_TILE)) | {"num_warps": 4}
    programs = min(triton.cdiv(rows, tile["R"]), PROGRAMS_PER_TAP)
    part = torch.empty(programs, 9 * (channels + 1) * width, dtype=torch.float32, device=x.device)
    _conv_bwd_dw_kernel[(programs, 9, triton.cdiv(width, block))](
        X=x, DZ=dz, TABLE=table, PART=part, M=rows, E=edge, C=channels, CP=_padded(channels), D=width, DB=block,
        PREC=precision_of(dz.dtype), num_stages=3, **tile,
    )  # fmt: skip
    sums = column_sums(part).view(9, channels + 1, width)
    return sums[:, :-1], sums[:, -1]


# Autograd.


def _by_tap(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[9, C, D] in `dtype` of a weight [D, C, 3, 3]."""
    width, channels, _, _ = weight.shape
    taps = torch.empty(9, channels, width, dtype=dtype, device=weight.device)
    return taps.copy_(weight.detach().flatten(2).permute(2, 1, 0))


class _Stem(torch.autograd.Function):
    """Inputs: the images, the cells, the edge of a patch, the features' dtype, whether gradients will be asked for, and
    the four parameters of each layer in turn."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, cell: Tensor, patch: int, dtype: torch.dtype, keep: bool, *parameters: Tensor
    ) -> Tensor:
        layers = _layers(parameters)
        canvas_hw = image.shape[2] // patch, image.shape[3] // patch
        patches = _Patches(image, cell, launch_neighbors(cell, canvas_hw), patch)
        taps = [_by_tap(layer.weight, dtype) for layer in layers[1:]]
        x = launch_first_fwd(patches, layers[0], dtype)
        kept = []
        for i, layer in enumerate(layers[1:]):
            last = i == len(taps) - 1
            z, x = launch_conv_fwd(x, patches.table, taps[i], layer, patch >> i + 1, last=last, keep=keep)
            kept.append(z)
        if keep:
            ctx.save_for_backward(image, cell, patches.table, *parameters, *taps, *kept)
            ctx.patch = patch
        return x.view(*cell.shape, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dfeat: Tensor) -> tuple[Tensor | None, ...]:
        # Unpack: 4 parameters a layer; taps and z of all layers but the first.
        image, cell, table, *rest = ctx.saved_tensors
        patches = _Patches(image, cell, table, ctx.patch)
        count = ctx.patch.bit_length() - 1
        layers = _layers(rest[: 4 * count])
        taps, z = rest[4 * count : -(count - 1)], [None, *rest[-(count - 1) :]]

        dz, sums = launch_norm_bwd(dfeat.contiguous().view(z[-1].shape), z[-1], layers[-1])
        gradients: list[Tensor] = []
        for i in reversed(range(count - 1)):
            # Layer i through its features, and convolution i + 1, whose input they are.
            edge = ctx.patch >> i + 1
            dz_below, x, sums_below = launch_conv_bwd_dx(dz, taps[i], z[i], layers[i], patches, edge)
            dweight_9CD, masked_9D = launch_conv_bwd_dw(x, dz, table, edge)
            dweight = dweight_9CD.permute(2, 1, 0).reshape(layers[i + 1].weight.shape)
            gradients = [dweight, sums[2], sums[0], sums[1], *gradients]
            # Layer i through the constant that masked neighbors show.
            dmasked_C = (masked_9D[:, None] * taps[i]).sum((0, 2))
            sums_below[1] += torch.ops.aten.gelu_backward(dmasked_C, layers[i].norm_bias.float())
            dz, sums = dz_below, sums_below
        dfirst = sums[3 : 3 + 9 * image.shape[1]].t().reshape(layers[0].weight.shape)
        gradients = [dfirst, sums[2], sums[0], sums[1], *gradients]
        flat = [parameter for layer in layers for parameter in layer]
        return None, None, None, None, None, *(g.to(p.dtype) for g, p in zip(gradients, flat, strict=True))


def _layers(parameters: Sequence[Tensor]) -> list[_Layer]:
    return [_Layer(*parameters[i : i + 4]) for i in range(0, len(parameters), 4)]


def stem(
    image_BIHW: Tensor,
    visible_BV: Tensor | None,
    convs: Sequence[tuple[Tensor, Tensor]],
    norms: Sequence[tuple[Tensor, Tensor]],
    patch: int,
    dtype: torch.dtype,
) -> Tensor:
    """See the package for the formula and the shapes; features are computed in `dtype`."""
    batch, _, height, width = image_BIHW.shape
    if visible_BV is None:
        cells = height // patch * (width // patch)
        visible_BV = torch.arange(cells, device=image_BIHW.device).expand(batch, -1)
    parameters = [tensor.contiguous() for pair in zip(convs, norms, strict=True) for part in pair for tensor in part]
    keep = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
    feat_BVC: Tensor = _Stem.apply(
        image_BIHW.detach().contiguous(), visible_BV.contiguous(), patch, dtype, keep, *parameters
    )
    return feat_BVC
