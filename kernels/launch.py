"""Whether Triton kernels can run here, and the few pure functions that all launchers share.

The interpreter (TRITON_INTERPRET=1 before Triton is imported) runs kernels on CPU tensors, for tests; it computes bf16
wrongly, so only fp32 goes through it.
"""

from __future__ import annotations

import functools
import os

import torch

OLDEST_CAPABILITY = (8, 0)
"""Ampere: bf16 tensor cores and asynchronous copies. Older cards train with the reference."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreting() -> bool:
    """Whether Triton was told to interpret kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


_found: dict[tuple[str, int], str | None] = {}


def obstacle(device_type: str, index: int) -> str | None:
    """Why no Triton kernel can run on this device, in words that name the remedy; None when they can.

    Looked for once per process and device.
    """
    key = device_type, index
    if key not in _found:
        _found[key] = _look_for_obstacle(device_type, index)
    return _found[key]


def _look_for_obstacle(device_type: str, index: int) -> str | None:
    """The last check compiles and runs a tiny kernel, which finds a missing C compiler, a driver that is too old, and
    a read-only cache."""
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({_first_line(error)}); pip install triton"
    if device_type == "cpu":
        return None if interpreting() else "the tensors are on the CPU"
    if device_type != "cuda" or torch.version.cuda is None:
        return f"the kernels are made for NVIDIA cards, not for {device_type!r}"
    if interpreting():
        return "TRITON_INTERPRET=1 is set, which runs kernels on the CPU; unset it"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}; the kernels "
            f"need {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} (Ampere)"
        )
    try:
        from affmae_kernels.probe import run

        run(index)
    except Exception as error:  # whatever goes wrong while compiling means the same to the user
        return f"Triton {triton.__version__} cannot compile on this machine ({_first_line(error)})"
    return None


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU, by which persistent kernels choose their number of programs; 4 elsewhere."""
    if device.type == "cpu" or not torch.cuda.is_available():
        return 4
    return torch.cuda.get_device_properties(None if device.type == "meta" else device).multi_processor_count


def architecture() -> int:
    """Compute capability of the GPU that kernels are compiled for, such as 90 or 120; 0 in the interpreter."""
    if interpreting():
        return 0
    from triton.runtime import driver

    found: int = driver.active.get_current_target().arch
    return found


def precision_of(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot: exact products for fp32 features, the native ones otherwise."""
    return "ieee" if dtype == torch.float32 else "tf32"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
