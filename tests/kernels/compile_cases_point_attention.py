"""Compile cases of point attention: bf16 and fp32, short even and long uneven lists; heads of 64 in bf16 are hot."""

from compiling import CompileCase

from affmae_kernels.point_attention import triton, triton_backward, triton_table
from affmae_kernels.point_attention.triton_sample import launch_config

FEW_SHUFFLES = 12
"""With lanes along the rows that are summed it is 20 to 200."""
WIDE_STRIDES = ("VALUE_STRIDE", "DVALUE_STRIDE")
STRIDES = (*WIDE_STRIDES, "OFFSET_STRIDE", "LOGIT_STRIDE", "DOFFSET_STRIDE", "DLOGIT_STRIDE")
INTS = dict.fromkeys(["N", "NQ", "CANVAS_W", "CANVAS_H", "T", "E", "PARTS", *STRIDES], "i32")
INT_POINTERS = "POS RASTER TABLE PACKED COUNT RANK END ENTRY QUERY_POS PLACE BEGIN TOP SUM"
FEATURES = "OFFSET LOGIT VALUE OUT DOUT DOFFSET DLOGIT DVALUE"
OTHERS = dict.fromkeys(["DTAU", "DTAU_PART", "SCRATCH", "TAU"], "*fp32") | {"COLUMNS": "*i64"}
POINTERS = dict.fromkeys(INT_POINTERS.split(), "*i32") | OTHERS


def case(name: str, kernel, constants: dict, num_warps: int, dtype="bf16", most_shuffles=None) -> CompileCase:
    floats = dict.fromkeys(FEATURES.split(), f"*{dtype}")
    edge = {"EDGE": "*i64" if dtype == "fp32" else "*i32"}
    types = {n: t for n, t in (INTS | POINTERS | floats | edge).items() if n in kernel.arg_names}
    aligned = tuple(n for n, t in types.items() if t.startswith("*") or n in WIDE_STRIDES)
    hot = dtype == "bf16" and constants.get("D", 64) <= 64
    return CompileCase(name, kernel, types, constants, num_warps, aligned=aligned, hot=hot, most_shuffles=most_shuffles)


def attention_cases(dtype: str, width: int) -> list[CompileCase]:
    shape = {"H": 6, "S": 4, "D": width}
    row_bytes = width * (4 if dtype == "fp32" else 2)
    config = launch_config(2048, 2048, row_bytes)
    wide = {"WIDE": dtype == "fp32"}
    kind = f"{dtype} {width}"
    cases = [
        case(
            f"forward {kind}",
            triton._points_fwd_kernel,
            shape | {"QB": config.queries},
            1,
            dtype,
            FEW_SHUFFLES,
        ),
        case(
            f"main {kind}",
            triton_backward._points_bwd_main_kernel,
            shape | {"QB": config.backward_queries} | wide,
            2,
            dtype,
        ),
    ]
    for tokens in (2048, 819, 130):
        lists = launch_config(2048, tokens, row_bytes)
        constants = shape | {"TB": lists.tokens, "R": lists.edges, "DTAU_BLOCK": 256} | wide
        few = FEW_SHUFFLES if lists.tokens > 1 else None
        cases.append(case(f"dvalue {kind} of {tokens}", triton_backward._points_bwd_dvalue_kernel, constants, 1, dtype, few))
    return cases


CASES = [
    case("raster", triton_table._raster_kernel, {"BLOCK": 256}, 2),
    case("columns", triton_table._columns_kernel, {"XB": 64}, 1),
    case("merge 128", triton_table._merge_kernel, {"CELLS": 32, "BITS": 7}, 1),
    case("merge 256", triton_table._merge_kernel, {"CELLS": 32, "BITS": 8}, 1),
    case("rank", triton_table._rank_kernel, {"BLOCK": 1024}, 4),
    case("invert", triton_table._invert_kernel, {"BLOCK": 1024}, 4),
    case("count", triton_backward._points_bwd_count_kernel, {"H": 6, "S": 4, "BLOCK": 512}, 4),
    case("block sums", triton_backward._points_bwd_block_sums_kernel, {"H": 6, "BLOCK": 1024}, 4),
    case("place", triton_backward._points_bwd_place_kernel, {"H": 6, "BLOCK": 1024, "BLOCKS": 16}, 4),
    *(c for dtype in ("bf16", "fp32") for width in (32, 64) for c in attention_cases(dtype, width)),
    *attention_cases("bf16", 128),
]
