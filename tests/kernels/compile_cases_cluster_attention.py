"""Compile cases of cluster attention: the shapes of the networks in half precision, and every head width in fp32."""

from typing import get_args

import torch
from compiling import CompileCase

from affmae_kernels.cluster_attention.triton_backward import _attention_key_kernel, _attention_query_kernel
from affmae_kernels.cluster_attention.triton_impl import _attention_forward_kernel
from affmae_kernels.cluster_attention.triton_pairs import Pass, launch_options
from affmae_kernels.launch import precision_of

_SIZES = dict.fromkeys(["N", "ENTRIES", "GROUPS", "A"], "i32") | {"scale": "fp32", "LINE": "i32"}
_POINTERS = {
    _attention_forward_kernel: ["BLANK_K", "BLANK_V", "LSE"],
    _attention_query_kernel: ["BLANK_K", "BLANK_V", "LSE", "DELTA", "PART"],
    _attention_key_kernel: ["LSE", "DELTA"],
}


_PASSES = dict(zip(_POINTERS, get_args(Pass), strict=True))
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _case(kernel, dtype: str, width: int, heads: int) -> CompileCase:
    features = dict.fromkeys(["QKV", "OUT", "DOUT", "DQKV"], f"*{dtype}")
    indices = dict.fromkeys(["POS", "ENTRY", "COUNT"], "*i32")
    signature = features | indices | dict.fromkeys(["WEIGHT", "BIAS", *_POINTERS[kernel]], "*fp32") | _SIZES
    options = launch_options(heads, width, _DTYPES[dtype], _PASSES[kernel])
    warps, stages, most = options.pop("num_warps"), options.pop("num_stages"), options.pop("maxnreg", None)
    return CompileCase(
        f"{kernel.__name__} {dtype} D={width} heads={heads}",
        kernel,
        signature,
        {"R": 16, "D": width, "STAGES": stages, "PREC": precision_of(_DTYPES[dtype])} | options,
        aligned=tuple(name for name in kernel.arg_names if signature.get(name, "").startswith("*") or name == "LINE"),
        num_warps=warps,
        num_stages=stages,
        most_registers=most,
        hot=dtype != "fp32",
    )


CASES = [
    _case(kernel, dtype, width, heads)
    for kernel in _POINTERS
    for dtype, width, heads in (
        ("bf16", 32, 4), ("bf16", 32, 6), ("bf16", 32, 3), ("fp16", 32, 4), ("bf16", 16, 4), ("bf16", 64, 2),
        ("fp32", 16, 2), ("fp32", 32, 1), ("fp32", 64, 1),
    )
]  # fmt: skip
