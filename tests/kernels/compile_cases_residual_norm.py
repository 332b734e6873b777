"""Compile cases of the residual LayerNorm: at the decoder's width, and the encoder's seams."""

from compiling import CompileCase

from affmae_kernels.residual_norm import triton_impl as impl


def _case(kernel, dtype: str, width: int, drop: float, **flags: bool) -> CompileCase:
    options = impl.launch_options(width, backward=kernel is impl._norm_backward_kernel)
    warps = options.pop("num_warps")
    features = dict.fromkeys(["X", "BRANCH", "SUM", "Y", "DY", "DS", "DX", "DBRANCH"], f"*{dtype}")
    signature = features | dict.fromkeys(["WEIGHT", "BIAS", "OFFSET", "SCALE", "STAT", "PART"], "*fp32")
    signature |= {"SEED": "*i32", "N": "i32", "PER": "i32", "eps": "fp32"}
    return CompileCase(
        f"{kernel.__name__} {dtype} C={width} dropout={drop} {' '.join(name for name in flags if flags[name])}",
        kernel,
        signature,
        {"C": width, "DROP": drop} | options | flags,
        num_warps=warps,
        aligned=tuple(name for name in kernel.arg_names if signature.get(name, "").startswith("*")),
    )


CASES = [
    _case(impl._norm_forward_kernel, dtype, width, drop, BRANCHED=True, MOVED=True, SCALED=not drop)
    for dtype, width, drop in (("bf16", 384, 0.1), ("fp16", 128, 0.0), ("fp32", 384, 0.1), ("bf16", 768, 0.0))
] + [
    _case(impl._norm_backward_kernel, dtype, width, drop, ADDED=not drop, MOVED=True, SCALED=not drop, AGAIN=not drop)
    for dtype, width, drop in (("bf16", 384, 0.1), ("fp16", 128, 0.0), ("fp32", 384, 0.1), ("bf16", 768, 0.0))
]
