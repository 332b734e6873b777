"""Cases of single operations, the gate before the clock."""

import pytest
import torch

from affmae_engine.bench import kernel_cases, kernels
from affmae_engine.bench.ceilings import Ceilings
from affmae_engine.bench.kernel_cases import OPERATIONS, Setting, all_cases
from affmae_engine.bench.kernels import run_cases

CPU = torch.device("cpu")
CEILINGS = Ceilings(gb_s=100, tflop_s=1)
TINY = Setting("tiny", 64, 2)


def run(operation: str, **options) -> list[kernels.KernelResult]:
    options = {"ceilings": CEILINGS, "seconds": 0.0, **options}
    return list(run_cases([TINY], CPU, torch.float32, operations=(operation,), **options))


def test_production_shapes() -> None:
    cases = all_cases([Setting("base", 512, 32), Setting("base", 1024, 8), Setting("small", 512, 32)])
    shapes = {(case.op, case.shape) for case in cases}
    assert ("cluster_attention", "B 32 N 2048 A 4 D 32") in shapes
    assert ("cluster_attention", "B 32 N 130 A 24 D 32") in shapes
    assert ("cluster_attention", "B 32 N 2048 A 3 D 32") in shapes
    assert ("token_merging", "B 32 N 819 K 327 C 256") in shapes
    assert ("point_attention", "B 32 Q 2048 self A 6 D 64") in shapes
    assert ("point_attention", "B 8 Q 8192 cross N 524 A 6 D 64") in shapes
    assert len(shapes) == len(cases)
    per_op = {op: sum(case.op == op for case in cases) for op in OPERATIONS}
    assert per_op == {
        "neighbourhoods": 8,
        "cluster_attention": 12,
        "token_merging": 9,
        "nearest_table": 8,
        "point_attention": 10,
        "residual_norm": 14,
        "bias_gelu": 12,
        "linear_relu": 2,
    }
    assert {"residual_norm", "bias_gelu", "linear_relu"} <= {case.op for case in cases if case.backward is not None}
    assert ("linear_relu", "B 32 N 2048 C 384 H 768") in shapes


def test_work_of_the_first_stage() -> None:
    """16.8 MB of features: four units forward, eight backward; the indices are a few per cent."""
    case = next(c for c in all_cases([Setting("base", 512, 32)]) if c.op == "cluster_attention")
    unit = 32 * 2048 * 128 * 2
    assert case.backward is not None
    assert case.forward(2).read_write == pytest.approx(4 * unit, rel=0.05)
    assert case.backward(2).read_write == pytest.approx(8 * unit, rel=0.05)
    assert case.forward(2).flops == 4 * 32 * 2048 * 65 * 128


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_is_right_and_timed(operation: str) -> None:
    results = run(operation)
    assert results
    for result in results:
        assert result.status == "ok", result.note
        assert result.backend == "reference" and result.reference_forward_ms is None
        assert result.forward is not None and result.forward["ms"] > 0
        assert (result.both is not None) == (operation not in ("neighbourhoods", "nearest_table"))


def test_gate_alone_takes_no_time() -> None:
    assert all(result.forward is None and result.errors for result in run("token_merging", ceilings=None))


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel_cases.cluster_attention

    def wrong(qkv, *args, backend):
        out = right(qkv, *args, backend=backend)
        return out if qkv.dtype == torch.float64 else out * 1.001

    monkeypatch.setattr(kernel_cases, "cluster_attention", wrong)
    monkeypatch.setattr(kernels, "measure", lambda *args, **options: pytest.fail("a wrong operation was timed"))
    for result in run("cluster_attention"):
        assert result.status == "wrong" and "result" in result.note
        assert result.forward is None and result.both is None


def test_a_wrong_gradient_of_the_last_image_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel_cases.merge_tokens

    def wrong(feat, *args, backend):
        if feat.dtype == torch.float64:
            return right(feat, *args, backend=backend)
        last = torch.cat([feat[:-1], feat[-1:].detach()])
        return right(last, *args, backend=backend)

    monkeypatch.setattr(kernel_cases, "merge_tokens", wrong)
    assert all(result.status == "wrong" and "d feat" in result.note for result in run("token_merging"))


def test_nan_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel_cases.point_attention

    def wrong(value, *args, backend):
        return right(value, *args, backend=backend) * (1.0 if value.dtype == torch.float64 else float("nan"))

    monkeypatch.setattr(kernel_cases, "point_attention", wrong)
    assert all(result.status == "wrong" for result in run("point_attention"))


@pytest.mark.parametrize(
    ("error", "status"), [(torch.OutOfMemoryError("no more"), "out of memory"), (RuntimeError("PTX"), "failed")]
)
def test_a_failure_is_a_result(monkeypatch: pytest.MonkeyPatch, error: Exception, status: str) -> None:
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(kernel_cases, "cluster_attention", fail)
    results = run("cluster_attention")
    assert len(results) == 4 and {result.status for result in results} == {status}
    assert all(str(error) in result.note for result in results)


def test_inputs_repeat() -> None:
    case = next(case for case in all_cases([TINY]) if case.op == "point_attention")
    first, second = (case.make(3, CPU, torch.float32) for _ in range(2))
    assert torch.equal(first.features["offset"], second.features["offset"])
    assert torch.equal(first.fixed["pos"], second.fixed["pos"])


@pytest.mark.gpu
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_on_a_card(operation: str) -> None:
    results = run_cases([TINY], torch.device("cuda"), torch.bfloat16, CEILINGS, operations=(operation,), seconds=0.01)
    for result in results:
        assert result.status == "ok", result.note
