"""Where a training step spends its time: the kernels of a few steps, by what they are for.

The project's own kernels are recognised by name, which no two share: every function under `@triton.jit` in the folder
of an operation belongs to that operation. What remains is sorted by patterns of the names that PyTorch's libraries give
their kernels.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import affmae_kernels

_OPERATIONS = {
    "cluster_attention": "cluster attention",
    "point_attention": "point attention",
    "token_merging": "merging",
    "neighbourhoods": "neighbourhoods",
    "residual_norm": "residual LayerNorm",
    "bias_gelu": "GELU",
    "linear_relu": "ReLU",
    "column_sums": "sums of partial sums",
}
"""By folder, or by file where an operation is one."""
_PATTERNS = (
    ("copies and casts", r"^triton_poi_fused__to_copy(_t|_view|_transpose)*_\d+$"),
    ("matrix products", r"^triton_(tem|mm)_"),
    ("normalisation and elementwise", r"^triton_"),
    ("dense attention", r"flash|fmha|sdpa|attention|scaled_dot"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|xmma|wgmma|splitK|::mm\b|addmm|bmm|gemv|matmul"),
    ("optimizer", r"adam|multi_tensor|lpnorm|foreach"),
    ("copies and casts", r"^mem(cpy|set)|copy_kernel|_copy|CatArray|FillFunctor|fill_kernel|transpose"),
    ("gather, scatter, sort", r"gather|scatter|index|sort|topk|radix|cub::|embedding|scan"),
    ("reductions", r"reduce_kernel|reduction|aten::(sum|mean)\b|norm_kernel_reduce"),
    ("normalisation and elementwise", r"layer_?norm|elementwise|gelu|relu|softmax|vectorized|dropout|random|aten::"),
)
"""Inductor's kernels come first: their names list what was fused. The CPU's operators all begin with aten::."""
_CPU_COPIES = re.compile(r"aten::(copy_|to|_to_copy|contiguous|clone|cat|fill_|zero_)")


@dataclass(frozen=True)
class Profile:
    """Milliseconds and launches a step by category, largest first, and the most expensive kernels."""

    categories: dict[str, tuple[float, float]]
    kernels: list[tuple[str, str, float, float]]
    """(category, name, milliseconds, launches), a step."""
    total_ms: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def profile_step(step: Callable[[], object], device: torch.device, *, steps: int = 3, top: int = 30) -> Profile:
    """Profiles `steps` calls. On a card these are kernels; on a CPU, operators with their own time."""
    own = operation_kernels()
    on_card = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU, activity.CUDA] if on_card else [activity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            step()
        if on_card:
            torch.cuda.synchronize(device)
    times = _device_times(profiler) if on_card else _cpu_times(profiler)
    return summarise(times, own, steps, top)


def summarise(times: dict[str, tuple[float, int]], own: dict[str, str], steps: int, top: int) -> Profile:
    """Sorts (milliseconds, launches) by kernel name into categories, a step.

    Args:
        times: by kernel name, over all steps.
        own: category by name of the project's kernels.
        steps: how many were profiled.
        top: kernels that are listed by name.
    """
    categories: dict[str, list[float]] = {}
    kernels = []
    for name, (milliseconds, launches) in times.items():
        category = category_of(name, own)
        sums = categories.setdefault(category, [0.0, 0.0])
        sums[0] += milliseconds / steps
        sums[1] += launches / steps
        kernels.append((category, name[:160], milliseconds / steps, launches / steps))
    ordered = sorted(categories.items(), key=lambda item: -item[1][0])
    return Profile(
        {name: (sums[0], sums[1]) for name, sums in ordered},
        sorted(kernels, key=lambda kernel: -kernel[2])[:top],
        sum(sums[0] for _, sums in ordered),
    )


def category_of(name: str, own: dict[str, str]) -> str:
    """What a kernel is for."""
    bare = re.split(r"[(<\s]", name, maxsplit=1)[0]
    if bare in own:
        return own[bare]
    for category, pattern in _PATTERNS:
        if re.search(pattern, name, re.IGNORECASE):
            return category
    return "other"


def operation_kernels() -> dict[str, str]:
    """Category by name of every Triton kernel of the project."""
    root = Path(next(iter(affmae_kernels.__path__)))
    found: dict[str, str] = {}
    for file in sorted(root.rglob("*.py")):
        category = _OPERATIONS.get(file.parent.name, _OPERATIONS.get(file.stem, "project, other"))
        for match in re.finditer(r"@triton\.jit(?:\([^)]*\))?[^\n]*\s+def (\w+)", file.read_text("utf-8")):
            found[match[1]] = category
    return found


def _device_times(profiler: torch.profiler.profile) -> dict[str, tuple[float, int]]:
    """Milliseconds and count by kernel name. Read from the trace: there kernels are told from annotations surely."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text("utf-8", errors="replace"))["traceEvents"]
    times: dict[str, tuple[float, int]] = {}
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            milliseconds, count = times.get(event["name"], (0.0, 0))
            times[event["name"]] = milliseconds + event.get("dur", 0) / 1e3, count + 1
    return times


def _cpu_times(profiler: torch.profiler.profile) -> dict[str, tuple[float, int]]:
    times: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        name = f"_copy {event.key}" if _CPU_COPIES.fullmatch(event.key) else event.key
        times[name] = event.self_cpu_time_total / 1e3, event.count
    return times
