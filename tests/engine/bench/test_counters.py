"""Hardware counters: ncu's lines become bounds; a missing or refused profiler is an error with a remedy."""

import pytest
import torch

from affmae_engine.bench import counters
from affmae_engine.bench.cases import Setting
from affmae_engine.bench.report import counter_table
from affmae_engine.errors import ResourceError

HEADER = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
CASES = [("cluster_attention", "B 32 N 2048"), ("bias_gelu", "B 32 N 9")]


def launch(number: int, kernel: str, **metrics: tuple[str, str]) -> list[str]:
    return [
        f'"{number}","7","{kernel}","{counters.METRICS[name]}","{unit}","{value}"'
        for name, (value, unit) in metrics.items()
    ]


def some(us="100", bytes_="30.0", instructions="5,280,000", cycles="200,000") -> dict[str, tuple[str, str]]:
    return {
        "us": (us, "us"), "bytes": (bytes_, "Mbyte"), "instructions": (instructions, "inst"),
        "cycles": (cycles, "cycle"), "registers": ("168", "register/thread"),
    }  # fmt: skip


def test_bounds_by_bytes_and_by_instructions() -> None:
    lines = [
        "==PROF== Connected to process 7", HEADER,
        *launch(0, "spin_kernel", **some()),
        *launch(1, "_attention_forward_kernel", **some()),
        *launch(2, "vectorized_elementwise_kernel", **some()),
        *launch(3, "spin_kernel", **some()),
        *launch(4, "_gelu_forward_kernel", **some(bytes_="240.0", instructions="528")),
    ]  # fmt: skip
    first, second = counters.parse_counts("\n".join(lines), CASES, gb_s=3000.0, multiprocessors=132)
    # 5.28 M instructions at 4 x 132 a cycle are 10,000 of 200,000 cycles: 5 % of 100 us; 30 MB at 3 TB/s are 10 us.
    assert (first.op, first.shape, first.kernel, first.registers) == (*CASES[0], "_attention_forward_kernel", 168)
    assert first.issue_us == pytest.approx(5) and first.bytes_us == pytest.approx(10)
    assert first.bound_us == pytest.approx(10) and first.over_bound == pytest.approx(10)
    assert second.op == "bias_gelu" and second.bound_us == second.bytes_us == pytest.approx(80)
    assert second.as_dict()["over_bound"] == pytest.approx(1.25)


def test_the_table_names_kernel_and_bound() -> None:
    count = counters.KernelCount(
        "bias_gelu", "B 2 N 9", "_gelu_forward_kernel", us=12, registers=40, bytes_us=8, issue_us=3
    )
    table = counter_table([count])
    assert dict(zip(table.columns, table.rows[0], strict=True)) == {
        "operation": "bias_gelu", "shape": "B 2 N 9", "kernel": "gelu_forward_kernel", "us": "12.0", "bytes us": "8.00",
        "issue us": "3.00", "times bound": "1.50", "registers": "40",
    }  # fmt: skip


def test_without_the_profiler_the_error_names_it(monkeypatch) -> None:
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    with pytest.raises(ResourceError, match=r"ncu.*not on the PATH"):
        counters.count_kernels([Setting("tiny", 128, 1)], ("bias_gelu",), torch.bfloat16, 3000.0, 132)


def test_a_profiler_that_fails_says_why(monkeypatch, tmp_path) -> None:
    refusing = tmp_path / "ncu"
    refusing.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM' >&2\nexit 9\n")
    refusing.chmod(0o755)
    monkeypatch.setattr(counters.shutil, "which", lambda name: str(refusing))
    with pytest.raises(ResourceError, match="ERR_NVGPUCTRPERM"):
        counters.count_kernels([Setting("tiny", 128, 1)], ("bias_gelu",), torch.bfloat16, 3000.0, 132)


@pytest.mark.gpu
def test_counters_of_a_real_kernel() -> None:
    if counters.shutil.which("ncu") is None:
        pytest.skip("needs Nsight Compute")
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    found = counters.count_kernels([Setting("tiny", 128, 2)], ("bias_gelu",), torch.bfloat16, 3000.0, multiprocessors)
    assert {count.kernel for count in found} >= {"_gelu_forward_kernel", "_gelu_backward_kernel"}
    assert all(0 < count.bound_us < count.us for count in found)
