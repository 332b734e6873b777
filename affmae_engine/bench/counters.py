"""What bounds each kernel: hardware counters of one call of every operation, read by NVIDIA's `ncu`.

    bound = the largest of  bytes moved / copy rate,  instructions / issue rate

A kernel that does little for each byte can be no faster than its traffic, one that computes much can be no faster than
its instructions are issued (four a cycle and multiprocessor). Both are counted while it runs, so loops over data count
as often as they are walked; tensor products are instructions too, and never the largest term here. Times under a
profiler are those of single kernels with cold clocks: the ratio to the bound is what they are for.

Run as a script in the profiler: it calls every operation of the cases on its command line, with a mark before each.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from affmae_engine.bench.cases import Case, Setting
from affmae_engine.bench.kernel_cases import all_cases
from affmae_engine.bench.profile import operation_kernels
from affmae_engine.errors import ResourceError

MARK = "spin_kernel"
"""What `torch.cuda._sleep` launches: it tells one case from the next."""
METRICS = {
    "us": "gpu__time_duration.sum",
    "instructions": "smsp__inst_executed.sum",
    "bytes": "dram__bytes.sum",
    "cycles": "sm__cycles_elapsed.max",
    "registers": "launch__registers_per_thread",
}
_UNITS = {"": 1.0, "inst": 1.0, "cycle": 1.0, "register/thread": 1.0, "ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6}
_UNITS |= {"nsecond": 1e-3, "usecond": 1.0, "msecond": 1e3, "second": 1e6}
_UNITS |= {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
ISSUES = 4
"""Instructions that one multiprocessor can issue a cycle, on every card the kernels run on."""


@dataclass(frozen=True)
class KernelCount:
    """One kernel in one case. Times in microseconds; `over_bound` is us / bound_us."""

    op: str
    shape: str
    kernel: str
    us: float
    registers: int
    bytes_us: float
    issue_us: float

    @property
    def bound_us(self) -> float:
        """The larger of the two bounds."""
        return max(self.bytes_us, self.issue_us)

    @property
    def over_bound(self) -> float:
        """How many times its bound the kernel takes."""
        return self.us / self.bound_us

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "bound_us": self.bound_us, "over_bound": self.over_bound}


def count_kernels(
    settings: Sequence[Setting], operations: tuple[str, ...], dtype: torch.dtype, gb_s: float, multiprocessors: int
) -> list[KernelCount]:
    """Counters of the project's own kernels, case by case.

    Args:
        settings, operations: which cases, as for `kernels.run_cases`.
        dtype: of the features.
        gb_s: measured rate of a copy, 1e9 bytes per second.
        multiprocessors: of the card.

    Raises:
        ResourceError: `ncu` is absent or may not read the counters.
    """
    tool = shutil.which("ncu")
    if tool is None:
        raise ResourceError(
            "hardware counters need NVIDIA's profiler `ncu`, which is not on the PATH",
            "install Nsight Compute, or leave --counters out",
        )
    wanted = {
        "settings": [[setting.size, setting.resolution, setting.batch] for setting in settings],
        "operations": operations,
        "dtype": str(dtype).removeprefix("torch."),
    }
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "counters.csv"
        command = [
            tool, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--print-kernel-base", "function",
            "--metrics", ",".join(METRICS.values()), "--log-file", str(log), sys.executable, "-m", __name__,
            json.dumps(wanted),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        text = log.read_text("utf-8", errors="replace") if log.is_file() else ""
    if done.returncode:
        said = (text + done.stdout + done.stderr).strip().splitlines()
        raise ResourceError(
            f"ncu could not read the counters: {said[-1] if said else f'exit code {done.returncode}'}",
            "the driver may keep them for administrators (NVreg_RestrictProfilingToAdminUsers)",
        )
    cases = [(case.op, case.shape) for case in all_cases(list(settings), operations)]
    return parse_counts(text, cases, gb_s, multiprocessors)


def parse_counts(text: str, cases: Sequence[tuple[str, str]], gb_s: float, multiprocessors: int) -> list[KernelCount]:
    """`KernelCount`s from ncu's CSV (one line per kernel and metric); a mark begins each of `cases`, in order."""
    own = operation_kernels()
    found: list[KernelCount] = []
    number = -1
    for name, values in _launches(text):
        if MARK in name:
            number += 1
        elif name in own and 0 <= number < len(cases):
            issue = values["instructions"] / (ISSUES * multiprocessors * values["cycles"])
            op, shape = cases[number]
            traffic_us = values["bytes"] / gb_s / 1e3
            found.append(
                KernelCount(op, shape, name, values["us"], int(values["registers"]), traffic_us, issue * values["us"])
            )
    return found


def _launches(text: str) -> Iterable[tuple[str, dict[str, float]]]:
    """Each launch's name and metrics, in base units, in order."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    names = {metric: name for name, metric in METRICS.items()}
    launches: dict[str, tuple[str, dict[str, float]]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        _, values = launches.setdefault(row["ID"], (row["Kernel Name"], {}))
        if row["Metric Name"] in names:
            number = float(row["Metric Value"].replace(",", ""))
            values[names[row["Metric Name"]]] = number * _UNITS[row["Metric Unit"]]
    return launches.values()


def _call(case: Case, dtype: torch.dtype) -> None:
    """Runs a case forward and backward: twice to compile and warm up, once between the profiler's marks."""
    inputs = case.make(0, torch.device("cuda"), dtype)
    wanted = list(inputs.differentiable().values())

    def both() -> None:
        out = case.run(inputs, "triton")
        if case.backward is not None:
            torch.autograd.grad(out, wanted, torch.ones_like(out))

    both()
    both()
    torch.cuda.synchronize()
    runtime = torch.cuda.cudart()
    runtime.cudaProfilerStart()
    torch.cuda._sleep(1000)
    both()
    torch.cuda.synchronize()
    runtime.cudaProfilerStop()


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    chosen = [Setting(size, resolution, batch) for size, resolution, batch in asked["settings"]]
    for one in all_cases(chosen, tuple(asked["operations"])):
        _call(one, getattr(torch, asked["dtype"]))
        torch.cuda.empty_cache()
