"""Compile the kernels of every operation for GPUs that are not here and print what they need, a JSON object a line.

Run as a script without TRITON_INTERPRET, with names of operations. No GPU and no driver is used.
"""

import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from affmae_kernels.cases import cases, solve
from affmae_kernels.precompile import rehearse

ARCHITECTURES = (90, 120)
WORKERS = 2


class AbsentGpu:
    """Triton's driver of a GPU that can only be compiled for."""

    def __init__(self, architecture: int) -> None:
        self._target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@functools.cache
def resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory a thread: above 0 registers were spilled."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found is not None, done.stdout
    return int(found[1]), int(found[2])


def compile_operations(operations: Sequence[str], workers: int) -> list[Any]:
    """The kernels of their network-sized cases in bf16, forward and backward."""

    def call_all() -> None:
        for operation in operations:
            for case in cases(operation, network=True):
                solve(case, "meta", torch.bfloat16, "triton")

    return rehearse(call_all, workers=workers)


if __name__ == "__main__":
    for architecture in ARCHITECTURES:
        triton.runtime.driver.set_active(AbsentGpu(architecture))
        compile_operations(sys.argv[1:], WORKERS)
        for operation in sys.argv[1:]:
            # All are in Triton's cache by now.
            for kernel in compile_operations([operation], workers=1):
                registers, stack = resources(kernel.asm["cubin"])
                row = {
                    "operation": operation,
                    "kernel": kernel.metadata.name,
                    "arch": architecture,
                    "registers": registers,
                    "stack": stack,
                    "shared": kernel.metadata.shared,
                    "shuffles": kernel.asm["ptx"].count("shfl.sync"),
                }
                print(json.dumps(row))
