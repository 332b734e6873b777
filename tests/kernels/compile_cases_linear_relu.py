"""Compile cases of the ReLU's gradient."""

from compiling import CompileCase

from affmae_kernels.linear_relu import triton_impl as impl

CASES = [
    CompileCase(
        f"_relu_backward_kernel {dtype}",
        impl._relu_backward_kernel,
        dict.fromkeys(["DY", "Y", "DU"], f"*{dtype}") | {"PART": "*fp32", "N": "i32", "H": "i32"},
        {"RB": impl.RB, "CB": impl.CB},
        num_warps=impl.WARPS,
        aligned=("DY", "Y", "DU", "PART", "H"),
    )
    for dtype in ("bf16", "fp16", "fp32")
]
