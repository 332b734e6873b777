"""AdamW's update of all parameters in one launch.

A table names the chunks of all parameters by address, so one kernel walks through hundreds of tensors. Addresses of
tensors that live on do not change, also not those of gradients inside a captured step, so the table is made once.
Bound by memory traffic: 4 tensors in, 3 out.

Axes: P parameters, K chunks of at most BLOCK elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
WARPS = 4
FIELDS = tl.constexpr(6)
"""Of a chunk in the table: addresses of p, g, m and v, number of elements, index of the parameter."""


@triton.jit
def _at(TABLE, field: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer in a field of the table."""
    pointer = tl.load(TABLE + field).to(tl.pointer_type(tl.float32))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _adamw_kernel(
    TABLE, RATE, DECAY, CORRECTION, SCALE, FOUND_INF, beta1, beta2, eps, BLOCK: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """One program: one chunk. ALIGNED: all its addresses are multiples of 16."""
    if tl.load(FOUND_INF) == 0:
        TABLE += tl.program_id(0) * FIELDS
        count = tl.load(TABLE + 4).to(tl.int32)
        parameter = tl.load(TABLE + 5)
        rate = tl.load(tl.load(RATE + parameter).to(tl.pointer_type(tl.float32)))
        decay = tl.load(DECAY + parameter)
        correction1 = tl.load(CORRECTION + parameter * 2)
        correction2 = tl.load(CORRECTION + parameter * 2 + 1)
        i = tl.arange(0, BLOCK)
        real = i < count
        # [BLOCK]
        p = tl.load(_at(TABLE, 0, ALIGNED) + i, mask=real, other=0.0)
        g = tl.load(_at(TABLE, 1, ALIGNED) + i, mask=real, other=0.0) / tl.load(SCALE)
        m = tl.load(_at(TABLE, 2, ALIGNED) + i, mask=real, other=0.0)
        v = tl.load(_at(TABLE, 3, ALIGNED) + i, mask=real, other=0.0)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        p = p * (1 - rate * decay) - rate / correction1 * m / (tl.sqrt(v) / correction2 + eps)
        tl.store(_at(TABLE, 0, ALIGNED) + i, p, mask=real)
        tl.store(_at(TABLE, 2, ALIGNED) + i, m, mask=real)
        tl.store(_at(TABLE, 3, ALIGNED) + i, v, mask=real)


class ChunkTable:
    """The chunks of a list of parameters, on the device."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        moments: Sequence[Tensor],
        squares: Sequence[Tensor],
        gradients: Sequence[Tensor],
        rates: Sequence[Tensor],
        decays: Sequence[float],
        addresses: list[int],
    ) -> None:
        device = parameters[0].device
        self.addresses = addresses
        for p, g in zip(parameters, gradients, strict=True):
            if g.shape != p.shape or g.dtype != torch.float32 or not g.is_contiguous():
                raise ValueError(f"a gradient {g.dtype} {list(g.shape)} of a dense fp32 parameter {list(p.shape)}")
        # Every parameter is cut into chunks: their parameter, and their first element in it.
        sizes_P = np.array([p.numel() for p in parameters])
        chunks_P = -(-sizes_P // BLOCK)
        parameter_K = np.repeat(np.arange(len(sizes_P)), chunks_P)
        first_K = (np.arange(len(parameter_K)) - np.repeat(np.cumsum(chunks_P) - chunks_P, chunks_P)) * BLOCK
        table_K6 = np.empty((len(parameter_K), FIELDS.value), np.int64)
        for field, tensors in enumerate((parameters, gradients, moments, squares)):
            address_P = np.array([tensor.data_ptr() for tensor in tensors])
            table_K6[:, field] = address_P[parameter_K] + 4 * first_K
        table_K6[:, 4] = np.minimum(sizes_P[parameter_K] - first_K, BLOCK)
        table_K6[:, 5] = parameter_K
        aligned_K = (table_K6[:, :4] % 16 == 0).all(1)
        # Steps that are not captured have new gradients, and so a new table, each time: the copies do not wait.
        self.tables = {aligned: _copy(table_K6[aligned_K == aligned], device) for aligned in (True, False)}
        self.rate_P = _copy(np.array([rate.data_ptr() for rate in rates], np.int64), device)
        self.decay_P = _copy(np.array(decays, np.float32), device)
        # What is named by address must live as long as the table.
        self._kept = list(rates), list(parameters), list(moments), list(squares)


def _copy(values: np.ndarray, device: torch.device) -> Tensor:
    """The values on the device, in the order of its work; the host does not wait."""
    on_host = torch.from_numpy(values)
    return on_host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else on_host


def update(
    chunks: ChunkTable, step_P: Tensor, betas: tuple[float, float], eps: float, grad_scale: Tensor, found_inf: Tensor
) -> None:
    """See the package for the formula."""
    step_P += 1 - found_inf.to(step_P.dtype)
    # In float64: 1 - b2^t of the first steps would lose four digits in fp32.
    step_P1 = step_P.double()[:, None]
    correction_P2 = torch.cat([1 - betas[0] ** step_P1, (1 - betas[1] ** step_P1).sqrt()], 1).float()
    for aligned, table_K6 in chunks.tables.items():
        if len(table_K6):
            _adamw_kernel[(len(table_K6),)](
                TABLE=table_K6, RATE=chunks.rate_P, DECAY=chunks.decay_P, CORRECTION=correction_P2,
                SCALE=grad_scale.float(), FOUND_INF=found_inf.float(), beta1=betas[0], beta2=betas[1], eps=eps,
                BLOCK=BLOCK, ALIGNED=aligned, num_warps=WARPS,
            )  # fmt: skip
