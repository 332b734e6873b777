"""Selection of the survivors without a sort: one program per image.

Every token gets a distinct whole-number key that orders like (score, then lower canvas index). The K-th largest key is
found by bisection, one bit after the other; then the rows with a key at least as large are compacted in their order.
Up to `IN_REGISTERS` tokens the keys stay in registers, above that they are computed again for every bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from affmae_kernels.neighbourhoods import Neighbourhoods

IN_REGISTERS = 16_384
"""Most tokens of an image whose keys a program holds: 64 registers in each of 512 threads."""
LOOP_BLOCK = 8192
"""Tokens at a time of larger images."""
INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def _keys(VALUE, POS, n, N, width, CANVAS_BITS: tl.constexpr):
    """Keys of the tokens n of one image, int64 >= 0; -1 beyond the end."""
    # All of [len(n)]
    value = tl.load(VALUE + n, mask=n < N, other=0.0)
    x = tl.load(POS + n * 2, mask=n < N, other=0)
    y = tl.load(POS + n * 2 + 1, mask=n < N, other=0)
    # Bits of positive floats order like integers, those of negative ones the other way round; NaN counts as infinite,
    # and -0 as 0.
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(value == 0, 0, bits)
    bits = tl.where(value != value, INFINITY_BITS, bits)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2**31
    last: tl.constexpr = 2**CANVAS_BITS - 1
    key = (ordered << CANVAS_BITS) | (last - ((y * width + x) & last))
    return tl.where(n < N, key, -1)


@triton.jit(do_not_specialize=["N", "K", "width"])
def _survivors_kernel(
    VALUE, POS, OUT, N, K, width, CANVAS_BITS: tl.constexpr, BLOCK: tl.constexpr, IN_ONE: tl.constexpr
):  # fmt: skip
    """One program: the rows of the K largest keys of one image, ascending. IN_ONE: BLOCK holds all tokens."""
    b = tl.program_id(0).to(tl.int64)
    value = VALUE + b * N
    pos = POS + b * N * 2
    if IN_ONE:
        keys = _keys(value, pos, tl.arange(0, BLOCK), N, width, CANVAS_BITS)
    # The largest threshold that at least K keys reach
    threshold = tl.full([], 0, tl.int64)
    step = tl.full([], 1, tl.int64) << (31 + CANVAS_BITS)
    for _ in range(32 + CANVAS_BITS):
        higher = threshold + step
        if IN_ONE:
            count = tl.sum((keys >= higher).to(tl.int32), 0)
        else:
            count = 0
            for n0 in range(0, N, BLOCK):
                keys = _keys(value, pos, n0 + tl.arange(0, BLOCK), N, width, CANVAS_BITS)
                count += tl.sum((keys >= higher).to(tl.int32), 0)
        threshold = tl.where(count >= K, higher, threshold)
        step = step >> 1
    # Compaction in row order
    filled = 0
    for n0 in range(0, N, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        hit = (_keys(value, pos, n, N, width, CANVAS_BITS) >= threshold).to(tl.int32)
        slot = filled + tl.cumsum(hit, 0) - hit
        tl.store(OUT + b * K + slot, n.to(tl.int64), mask=(hit != 0) & (slot < K))
        filled += tl.sum(hit, 0)


def select_survivors(value_BN: Tensor, near: Neighbourhoods, count: int) -> Tensor:
    """See the package; value_BN is fp32."""
    batch, tokens = value_BN.shape
    height, width = near.canvas_hw
    survivors_BK = torch.empty(batch, count, dtype=torch.int64, device=value_BN.device)
    in_one = tokens <= IN_REGISTERS
    block = max(32, triton.next_power_of_2(tokens)) if in_one else LOOP_BLOCK
    _survivors_kernel[(batch,)](
        VALUE=value_BN.contiguous(), POS=near.pos_BN2, OUT=survivors_BK, N=tokens, K=count, width=width,
        CANVAS_BITS=(height * width - 1).bit_length(), BLOCK=block, IN_ONE=in_one, num_warps=min(16, max(1, block // 256)),
    )  # fmt: skip
    return survivors_BK
