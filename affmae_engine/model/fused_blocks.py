"""A stage's blocks with every seam in one pass: the same function as `Block` after `Block`, on a card with kernels.

    _Attend, _FeedForward     s = x + scale (branch + offset);  y = LN(s);  the next branch, without its bias
    run_blocks                both in turn through a stage, and the stage's LayerNorm at the end

Unusual: forward and backward are written out, because automatic differentiation needs a pass of its own for every
addition, normalisation, cast and bias gradient between the matrix products. Here a residual addition, stochastic
depth, the bias of the layer before and the LayerNorm after share one kernel in each direction. Kept for the backward
pass are s and its statistics, queries, keys and values, the attention's output, and the MLP's hidden layer before
GELU; y and GELU are written again by the kernels that differentiate them. Needs no compiler.

Axes: B batch, N tokens, C channels, H hidden channels, A heads, D head width; R = B * N rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from affmae_engine.model.block import Block
from affmae_engine.model.norm import LayerNorm
from affmae_kernels import bias_gelu, cluster_attention, residual_norm
from affmae_kernels.dispatch import choose_backend
from affmae_kernels.neighbourhoods import Neighbourhoods
from affmae_kernels.products import weight_gradient


def run_blocks(
    blocks: Iterable[nn.Module], norm: LayerNorm, feat_BNC: Tensor, near: Neighbourhoods, backend: str
) -> tuple[Tensor, Tensor]:
    """`norm(x)` and x, where x is `feat_BNC` after all blocks, in the dtype that they compute in.

    Where a kernel cannot run, the blocks are called one after the other; `affmae_kernels.dispatch` says why.
    """
    every = [block for block in blocks if isinstance(block, Block)]
    dtype = _compute_dtype(feat_BNC)
    if not _fusible(every[0], feat_BNC.to(dtype), near, backend):
        for block in every:
            feat_BNC = block(feat_BNC, near)
        return norm(feat_BNC), feat_BNC
    with torch.autocast(feat_BNC.device.type, enabled=False):
        return _run_fused(every, norm, feat_BNC.to(dtype).contiguous(), near)


def _compute_dtype(feat_BNC: Tensor) -> torch.dtype:
    kind = feat_BNC.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else feat_BNC.dtype


def _fusible(block: Block, feat_BNC: Tensor, near: Neighbourhoods, backend: str) -> bool:
    width = feat_BNC.shape[-1] // block.attention.heads
    obstacles = {
        "cluster_attention": cluster_attention.unsupported(feat_BNC.dtype, width, near),
        "residual_norm": residual_norm.unsupported(feat_BNC),
        "bias_gelu": bias_gelu.unsupported(feat_BNC),
    }
    return all(
        choose_backend(backend, op, feat_BNC.device, obstacle).name == "triton" for op, obstacle in obstacles.items()
    )


def _run_fused(blocks: list[Block], norm: LayerNorm, x: Tensor, near: Neighbourhoods) -> tuple[Tensor, Tensor]:
    branch: Tensor | None = None
    offset: Tensor | None = None
    scale: Tensor | None = None
    scales = _branch_scales(blocks, x)
    lowered = _lowered(blocks, x.dtype)
    for index, block in enumerate(blocks):
        attention, (w_qkv, b_qkv, w_out, w_first, w_last) = block.attention, lowered[index]
        x, branch = _Attend.apply(
            x, branch, offset, scale, block.norm1.weight, block.norm1.bias, attention.qkv.weight, attention.qkv.bias,
            attention.position.weight, attention.position.bias, attention.blank_key, attention.blank_value,
            attention.output.weight, near, attention.heads, w_qkv, b_qkv, w_out,
        )  # fmt: skip
        offset, scale = attention.output.bias, None if scales is None else scales[2 * index]
        first, last = block.mlp[0], block.mlp[-1]
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        x, branch = _FeedForward.apply(
            x, branch, offset, scale, block.norm2.weight, block.norm2.bias, first.weight, first.bias, last.weight,
            w_first, w_last,
        )  # fmt: skip
        offset, scale = last.bias, None if scales is None else scales[2 * index + 1]
    assert branch is not None
    return residual_norm.residual_norm(
        x, branch, norm.weight, norm.bias, offset_C=offset, scale_B=scale, eps=norm.eps, backend="triton"
    )


def _branch_scales(blocks: list[Block], x: Tensor) -> tuple[Tensor, ...] | None:
    """Per branch, in order, the factor of each image (fp32 [B]): 0, or 1 / (1 - rate); None where nothing is dropped.

    The same distribution as `DropPath`; the draws come in another order.
    """
    if not blocks[0].training or not any(block.drop_path.rate for block in blocks):
        return None
    keep = torch.stack([block.drop_path.keep for block in blocks]).repeat_interleave(2)[:, None]
    drawn = torch.rand(len(keep), len(x), device=x.device)
    return ((drawn < keep) / keep).unbind(0)


def _lowered(blocks: list[Block], dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """Of each block the matrix and bias of queries, keys and values, and the matrices of the attention's output and of
    the MLP, in `dtype`; all are copied by a launch or two."""
    wanted: list[Tensor] = []
    for block in blocks:
        qkv, output, first, last = block.attention.qkv, block.attention.output, block.mlp[0], block.mlp[-1]
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        wanted += [t.detach() for t in (qkv.weight, qkv.bias, output.weight, first.weight, last.weight)]
    copies = wanted
    if any(tensor.dtype != dtype for tensor in wanted):
        copies = [torch.empty_like(tensor, dtype=dtype) for tensor in wanted]
        torch._foreach_copy_(copies, wanted)
    return [tuple(copies[at : at + 5]) for at in range(0, len(copies), 5)]


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


class _Attend(torch.autograd.Function):
    """(s, branch) from the last sum and branch: s = x + scale (branch + offset), then cluster attention of LN(s).

    The first call of a stage has no branch. `w_qkv`, `b_qkv` and `w_out` are the
    parameters in the features' dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, offset: Tensor | None, scale: Tensor | None, norm_weight: Tensor,
        norm_bias: Tensor, qkv_weight: Tensor, qkv_bias: Tensor, position_weight: Tensor, position_bias: Tensor,
        blank_key: Tensor, blank_value: Tensor, out_weight: Tensor, near: Neighbourhoods, heads: int,
        w_qkv: Tensor, b_qkv: Tensor, w_out: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        from affmae_kernels.cluster_attention import triton as attention

        norm = _Norm.forward(x, branch, offset, norm_weight, norm_bias, scale)
        y, s, *_ = norm
        qkv = torch.addmm(b_qkv, _rows(y), w_qkv.t()).view(*x.shape[:2], 3, heads, -1)
        network = [tensor.float() for tensor in (position_weight, position_bias, blank_key, blank_value)]
        out, lse = attention.forward(qkv, near, *network)
        ctx.save_for_backward(*_Norm.kept(norm), scale, w_qkv, w_out, *network, qkv, out, lse)
        ctx.near = near
        ctx.moved = offset is not None
        s = s.view_as(s) if s is x else s  # an input that is returned unchanged would not be a result
        return s, (_rows(out.flatten(2)) @ w_out.t()).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ds: Tensor | None, dbranch: Tensor) -> tuple[Tensor | None, ...]:
        from affmae_kernels.cluster_attention import triton as attention
        from affmae_kernels.column_sums import column_sums

        s, stat, weight, bias, scale, w_qkv, w_out, *network, qkv, out, lse = ctx.saved_tensors
        drows = _rows(dbranch.contiguous())
        dout_weight = weight_gradient(drows, _rows(out.flatten(2)))
        dout = (drows @ w_out).view_as(out)
        arguments = dout, qkv, ctx.near, *network, out, lse
        dqkv, *of_network, _ = attention.backward(*arguments)
        dqkv = dqkv.flatten(2).flatten(0, 1)
        dy = (dqkv @ w_qkv).view_as(s)
        dx, dprevious, y, dweight, dbias, doffset = _Norm.backward(
            dy, _contiguous(ds), s, stat, weight, bias, scale, ctx.moved
        )
        return (
            dx, dprevious if ctx.needs_input_grad[1] else None, doffset, None, dweight, dbias,
            weight_gradient(dqkv, _rows(y)), column_sums(dqkv), *of_network, dout_weight,
            None, None, None, None, None,
        )  # fmt: skip


class _FeedForward(torch.autograd.Function):
    """(s, branch) from the last sum and branch: s = x + scale (branch + offset), then the MLP of LN(s)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, offset: Tensor, scale: Tensor | None, norm_weight: Tensor,
        norm_bias: Tensor, first_weight: Tensor, first_bias: Tensor, last_weight: Tensor, w_first: Tensor,
        w_last: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        from affmae_kernels.bias_gelu import triton_impl as gelu

        norm = _Norm.forward(x, branch, offset, norm_weight, norm_bias, scale)
        y, s, *_ = norm
        hidden = _rows(y) @ w_first.t()
        b_first = first_bias.float()
        ctx.save_for_backward(*_Norm.kept(norm), scale, w_first, b_first, w_last, hidden)
        return s, (gelu.launch_forward(hidden, b_first) @ w_last.t()).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ds: Tensor | None, dbranch: Tensor) -> tuple[Tensor | None, ...]:
        from affmae_kernels.bias_gelu import triton_impl as gelu

        s, stat, weight, bias, scale, w_first, b_first, w_last, hidden = ctx.saved_tensors
        drows = _rows(dbranch.contiguous())
        dhidden, activated, dfirst_bias = gelu.launch_backward(drows @ w_last, hidden, b_first, again=True)
        assert activated is not None
        dlast_weight = weight_gradient(drows, activated)
        del activated
        dy = (dhidden @ w_first).view_as(s)
        dx, dprevious, y, dweight, dbias, doffset = _Norm.backward(
            dy, _contiguous(ds), s, stat, weight, bias, scale, True
        )
        dfirst_weight = weight_gradient(dhidden, _rows(y))
        return dx, dprevious, doffset, None, dweight, dbias, dfirst_weight, dfirst_bias, dlast_weight, None, None


class _Norm:
    """The seam at the head of both functions: launches of the residual LayerNorm without dropout."""

    @staticmethod
    def forward(
        x: Tensor, branch: Tensor | None, offset: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """y, s, statistics, and the affine parameters in fp32."""
        from affmae_kernels.residual_norm import triton_impl as norm

        weight, bias = weight.float(), bias.float()
        offset = None if offset is None else offset.float()
        return *norm.launch_forward(x, branch, offset, weight, bias, bias, scale, 0.0, LayerNorm.EPS), weight, bias

    @staticmethod
    def kept(result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `backward` needs of `forward`'s result."""
        return result[1:]

    @staticmethod
    def backward(
        dy: Tensor, ds: Tensor | None, s: Tensor, stat: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
        moved: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        """dx, dbranch, y once more, and the gradients of weight, bias and offset."""
        from affmae_kernels.residual_norm import triton_impl as norm

        dx, dbranch, y, sums = norm.launch_backward(
            dy, ds, s, stat, weight, bias, bias, scale, 0.0, moved=moved, again=True
        )
        assert y is not None
        return dx, dbranch, y, sums[0], sums[1], sums[2] if moved else None
