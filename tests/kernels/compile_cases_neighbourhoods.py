"""Compile cases of the neighbourhoods' kernels."""

from compiling import CompileCase

from affmae_kernels.neighbourhoods import triton_impl as impl

_TYPES = {
    **dict.fromkeys(["POS", "WALK", "COUNT", "FILLED", "ORDERED", "SUM", "NEAREST"], "*i32"),
    **dict.fromkeys(["RATIO", "CELL_RATIO", "CELL_CANVAS", "ORDER"], "*i64"),
    **dict.fromkeys(["N", "K", "rows", "columns", "cells", "width", "height", "slots", "size"], "i32"),
    **dict.fromkeys(["scale", "last_scale"], "i32"),
    "epsilon_bits": "i64",
}


def _case(name: str, kernel, constants: dict, num_warps: int) -> CompileCase:
    names = [argument for argument in kernel.arg_names if argument not in constants]
    return CompileCase(
        name,
        kernel,
        {argument: _TYPES[argument] for argument in names},
        constants,
        num_warps=num_warps,
        aligned=tuple(argument for argument in names if _TYPES[argument].startswith("*")),
    )


CASES = [
    _case("cells", impl._cell_kernel, {"ONE_CELL": False, "BLOCK": impl.TOKENS}, 4),
    _case("places", impl._place_kernel, {"BLOCK": impl.TOKENS}, 4),
    _case("sums", impl._sum_kernel, {"M": 8, "BLOCK": impl.TOKENS}, 4),
    _case("nearest", impl._nearest_kernel, {"C": 8, "CP": 8, "NB": 8, "KB": 256, "WIDE": False}, 1),
    _case("nearest wide", impl._nearest_kernel, {"C": 8, "CP": 8, "NB": 1, "KB": 1024, "WIDE": True}, 1),
]
