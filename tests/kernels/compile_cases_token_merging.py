"""Compile cases of token merging."""

import torch
from compiling import CompileCase

from affmae_kernels.launch import precision_of
from affmae_kernels.token_merging.triton_backward import _merging_token_kernel, _merging_weight_kernel
from affmae_kernels.token_merging.triton_impl import _merging_forward_kernel
from affmae_kernels.token_merging.triton_pairs import SIZES, launch_options

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _case(kernel, dtype: str) -> CompileCase:
    options = launch_options(_DTYPES[dtype], weight_gradient=kernel is _merging_weight_kernel)
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    types = dict.fromkeys(["FEAT", "OUT", "DZ", "DFEAT"], f"*{dtype}") | {"SURVIVORS": "*i64"}
    types |= dict.fromkeys(["SCORE", "PARAMETERS", "DSCORE", "PART"], "*fp32")
    types |= dict.fromkeys(["POS", "ENTRY", "COUNT"], "*i32") | dict.fromkeys([*SIZES, "LAST", "C"], "i32")
    return CompileCase(
        f"{kernel.__name__} {dtype}",
        kernel,
        types,
        {"R": 16, "PREC": precision_of(_DTYPES[dtype])} | options,
        num_warps=warps,
        num_stages=stages,
        aligned=("C", *(name for name in kernel.arg_names if types.get(name, "").startswith("*"))),
        hot=dtype != "fp32",
    )


CASES = [
    _case(kernel, dtype)
    for kernel in (_merging_forward_kernel, _merging_token_kernel, _merging_weight_kernel)
    for dtype in _DTYPES
]
