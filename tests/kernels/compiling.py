"""Compiles kernels for cards that are not here and reads what they need; no card and no driver is used.

Run as a script in a process without TRITON_INTERPRET: it compiles every case of the modules that are named on the
command line, for every architecture, and prints one JSON object per case and architecture.
"""

import dataclasses
import functools
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED_MEMORY = {80: 166_912, 90: 232_448, 120: 101_376}
"""Largest shared memory of one block, in bytes, by architecture (CUDA C++ programming guide, compute capabilities)."""


@dataclass(frozen=True)
class CompileCase:
    """One kernel with one set of compile-time constants."""

    name: str
    kernel: Any
    signature: dict[str, str]
    """Type of every run-time argument, for example "*bf16", "*i32", "i32", "fp32"."""
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 1
    aligned: tuple[str, ...] = ()
    """Arguments that are divisible by 16, as pointers from torch are."""
    most_registers: int | None = None
    """The launch's own limit."""
    hot: bool = True
    """Whether it must not spill."""
    most_shuffles: int | None = None
    """Limit on exchanges between lanes: more mean that a tile is not spread over the lanes as the kernel wants it."""


@dataclass(frozen=True)
class Resources:
    """What the machine code needs."""

    module: str
    name: str
    arch: int
    hot: bool
    registers: int
    stack: int
    """Bytes of local memory a thread; above 0 registers were spilled."""
    shared: int
    tensor_cores: bool
    shuffles: int
    most_shuffles: int | None


def compile_case(module: str, case: CompileCase, arch: int) -> Resources:
    """Compiles one case of a module for one architecture, say 90 for compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {n: "constexpr" if n in case.constants else case.signature[n] for n in names}
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in case.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in case.aligned},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.most_registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = _resource_usage(compiled.asm["cubin"])
    return Resources(
        module=module,
        name=case.name,
        arch=arch,
        hot=case.hot,
        registers=int(usage[1]),
        stack=int(usage[2]),
        shared=compiled.metadata.shared,
        tensor_cores="mma" in compiled.asm["ptx"],
        shuffles=compiled.asm["ptx"].count("shfl.sync"),
        most_shuffles=case.most_shuffles,
    )


def _resource_usage(cubin: bytes) -> re.Match[str]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of resources: {done.stdout}")
    return found


def main(modules: list[str]) -> None:
    """Compiles the `CASES` of the named modules and prints their resources, a JSON object a line."""
    sys.path.insert(0, str(Path(__file__).parent))
    jobs: list[Callable[[], Resources]] = [
        functools.partial(compile_case, module, case, arch)
        for module in modules
        for case in importlib.import_module(module).CASES
        for arch in SHARED_MEMORY
    ]
    with ThreadPoolExecutor(2) as pool:
        for resources in pool.map(lambda job: job(), jobs):
            print(json.dumps(dataclasses.asdict(resources)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
