"""Compile cases of GELU after a bias, and of the sums over rows."""

import torch
from compiling import CompileCase

from affmae_kernels import column_sums
from affmae_kernels.bias_gelu import triton_impl as impl


def _case(kernel, dtype: str, sizes: dict[str, str], constants: dict, warps: int) -> CompileCase:
    features = dict.fromkeys(["X", "Y", "DX", "DY"], f"*{dtype}")
    signature = features | dict.fromkeys(["BIAS", "PART", "OUT"], "*fp32") | sizes
    return CompileCase(
        f"{kernel.__name__} {dtype} {constants}",
        kernel,
        signature,
        constants,
        num_warps=warps,
        aligned=tuple(
            name for name in kernel.arg_names if name in ("C", "M") or signature.get(name, "").startswith("*")
        ),
    )


_TILE = {"RB": impl.RB, "CB": impl.CB}
_SIZES = {"N": "i32", "C": "i32"}
CASES = [_case(impl._gelu_forward_kernel, dtype, _SIZES, _TILE, impl.WARPS) for dtype in ("bf16", "fp32")]
CASES += [
    _case(
        impl._gelu_backward_kernel, dtype, _SIZES, {"RB": impl.BACKWARD_RB, "CB": impl.CB, "AGAIN": again}, impl.WARPS
    )
    for dtype, again in (("bf16", True), ("fp16", False), ("fp32", True))
]
for _dtype, _torch, _rows in (
    ("bf16", torch.bfloat16, 9000),
    ("fp32", torch.float32, 9000),
    ("fp32", torch.float32, 700),
):
    _options = column_sums.launch_options(_torch, _rows)
    _warps = _options.pop("num_warps")
    CASES.append(
        _case(column_sums._column_sums_kernel, _dtype, {"N": "i32", "M": "i32", "ROWS": "i32"}, _options, _warps)
    )
