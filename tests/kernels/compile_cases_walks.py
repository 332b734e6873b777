"""Compile cases of the walk lists."""

from compiling import CompileCase

from affmae_kernels.neighbourhoods import walks

CASES = [
    CompileCase(
        "adjacency",
        walks._adjacency_kernel,
        {"NEAREST": "*i32", "ADJACENT": "*u8", "ROWS": "i32", "K": "i32"},
        {"C": 8, "CP": 8, "KB": 128},
        num_warps=4,
        aligned=("NEAREST", "ADJACENT"),
    ),
    CompileCase(
        "compact",
        walks._compact_kernel,
        {"ADJACENT": "*u8", "ENTRY": "*i32", "COUNT": "*i32"}
        | dict.fromkeys(["OWN", "OTHER", "own_stride", "other_stride"], "i32"),
        {"EB": 1024},
        num_warps=4,
        aligned=("ADJACENT", "ENTRY", "COUNT"),
    ),
]
