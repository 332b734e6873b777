"""Compile cases of the residual LayerNorm, at the decoder's width."""

from compiling import CompileCase

from affmae_kernels.residual_norm import triton_impl as impl


def _case(kernel, dtype: str, width: int, drop: float) -> CompileCase:
    options = impl.launch_options(width)
    warps = options.pop("num_warps")
    features = dict.fromkeys(["X", "BRANCH", "SUM", "Y", "DY", "DX", "DBRANCH"], f"*{dtype}")
    signature = features | dict.fromkeys(["WEIGHT", "BIAS", "PART"], "*fp32")
    signature |= {"SEED": "*i32", "N": "i32", "eps": "fp32"}
    return CompileCase(
        f"{kernel.__name__} {dtype} C={width} dropout={drop}",
        kernel,
        signature,
        {"C": width, "DROP": drop} | options,
        num_warps=warps,
        aligned=tuple(name for name in kernel.arg_names if signature.get(name, "").startswith("*")),
    )


CASES = [
    _case(kernel, dtype, width, drop)
    for kernel in (impl._forward_kernel, impl._backward_kernel)
    for dtype, width, drop in (("bf16", 384, 0.1), ("fp16", 128, 0.0), ("fp32", 384, 0.1))
]
