"""The doctor's parts: the machine, the self-check that can fail, timings, and the verdict."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import affmae_kernels
from affmae_engine.config import RunConfig
from affmae_engine.doctor import diagnosis, machine, selfcheck, timings
from affmae_engine.doctor.diagnosis import Diagnosis, Operation, diagnose, judge
from affmae_engine.doctor.machine import Card, Machine, look_around
from affmae_engine.doctor.selfcheck import CPU, EXACT, FLOATING, Check, Counted, Gathered, check, run_checks
from affmae_engine.errors import ResourceError
from affmae_kernels import launch
from affmae_kernels.cluster_attention import reference as attention
from affmae_kernels.dispatch import OPERATIONS
from affmae_kernels.neighbourhoods import reference as neighbourhoods

CARD = Card(0, "NVIDIA H200", (9, 0), 140 * 2**30, 139 * 2**30, True)
FORCED = RunConfig.model_validate({"kernels": {"backend": "triton"}, "train": {"device": "cpu"}})


@pytest.fixture
def few(monkeypatch):
    """Only the smallest problems."""
    monkeypatch.setattr(selfcheck, "SHAPES", selfcheck.SHAPES[1:3])
    monkeypatch.setattr(selfcheck, "SEEDS", (0,))


@pytest.fixture
def on_cpu(monkeypatch):
    """A machine without a card, whatever the tests run on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(("operation", "precision"), [*((o, "exact") for o in EXACT), *((o, "fp32") for o in FLOATING)])
def test_the_reference_is_right(operation, precision):
    found = check(operation, precision, CPU, "reference")
    assert found.ok and found.problems == len(selfcheck.SHAPES) * len(selfcheck.SEEDS)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_within_its_limit_but_not_within_that_of_fp32(precision, few):
    found = check("cluster_attention", precision, CPU, "reference")
    assert found.ok and found.error > selfcheck.LIMITS["fp32"]


def test_every_operation_is_described_checked_and_timed() -> None:
    assert tuple(diagnosis.OPERATIONS) == OPERATIONS
    assert set(selfcheck.EXACT) | set(selfcheck.FLOATING) == set(OPERATIONS)
    assert {operation for operation, _ in timings.TIMED.values()} == set(OPERATIONS)
    folders = {path.parent.name for path in Path(next(iter(affmae_kernels.__path__))).glob("*/reference.py")}
    assert folders == set(OPERATIONS)


def test_every_operation_of_a_run_is_checked(few):
    assert {found.operation for found in run_checks(CPU, ("fp32",), "reference")} == set(diagnosis.OPERATIONS)


def test_a_small_error_in_a_result_is_found(monkeypatch, few):
    right = attention.cluster_attention
    monkeypatch.setattr(
        attention,
        "cluster_attention",
        lambda qkv, *rest: right(qkv, *rest) * (1 + 5e-5 * (qkv.dtype != torch.float64)),
    )
    found = check("cluster_attention", "fp32", CPU, "reference")
    assert not found.ok and 1e-5 < found.error < 1e-4


def test_an_error_in_one_gradient_alone_is_found(monkeypatch, few):
    right = attention.cluster_attention

    def wrong(qkv, near, key, value, weight, bias):
        if qkv.dtype != torch.float64:
            bias = bias.detach() + 0.999 * (bias - bias.detach())
        return right(qkv, near, key, value, weight, bias)

    monkeypatch.setattr(attention, "cluster_attention", wrong)
    found = check("cluster_attention", "fp32", CPU, "reference")
    assert (found.ok, found.tensor) == (False, "gradient of bias")
    assert found.error == pytest.approx(1e-3, rel=0.01)


def test_an_order_that_depends_on_the_input_is_found(monkeypatch, few):
    right = neighbourhoods.cluster_order

    def wrong(pos_BN2, *rest):
        order_BN = right(pos_BN2, *rest)
        swapped = pos_BN2[:, 0, 0] > pos_BN2[:, -1, 0]
        return torch.where(swapped[:, None], order_BN.flip(1), order_BN)

    monkeypatch.setattr(neighbourhoods, "cluster_order", wrong)
    found = check("neighbourhoods", "exact", CPU, "reference")
    assert not found.ok and found.error > 0


def test_an_operation_that_raises_is_a_result(monkeypatch, few):
    def broken(*args):
        raise RuntimeError("PTX of the future\nand a long tail")

    monkeypatch.setattr(attention, "cluster_attention", broken)
    found = check("cluster_attention", "fp32", CPU, "reference")
    assert (found.ok, found.error, found.failure) == (False, None, "RuntimeError: PTX of the future")


def test_comparison():
    same, other = Gathered(), Gathered()
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    same.add(exact.float(), exact)
    other.add(exact.float() + torch.tensor([0.0, 0.5]), exact)
    assert (same.error(), other.error()) == (0, 0.1)
    other.add(torch.tensor([float("nan"), 0.0]), exact)
    assert math.isinf(other.error())
    zero = Gathered()
    zero.add(torch.tensor([0.5]), torch.zeros(1, dtype=torch.float64))
    assert zero.error() == 0.5
    with pytest.raises(ValueError, match="the shape is"):
        zero.add(torch.zeros(2), exact[:1])


def test_comparison_of_whole_numbers():
    counted = Counted()
    counted.add(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5]))
    assert counted.error() == 0.25
    counted.add(torch.tensor([1]), torch.tensor([1, 2]))
    assert math.isinf(counted.error())


@pytest.mark.parametrize("error", [math.nan, math.inf, None, 2e-5])
def test_a_check_that_did_not_pass_is_not_ok(error):
    assert not Check("x", "fp32", 1e-5, error, "result", 1).ok


def test_timings_have_a_row_for_every_operation():
    rows = list(timings.run_timings(CPU, "fp32", {}, "auto"))
    assert {row.operation for row in rows} == set(diagnosis.OPERATIONS)
    assert all(
        row.reference and row.reference.forward_ms > 0 and row.kernel is None and not row.failure for row in rows
    )
    assert [row.name for row in rows if row.reference.backward_ms is None] == ["neighbourhoods", "nearest_table"]


def test_a_timing_that_fails_is_a_row(monkeypatch):
    def broken(*args):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(timings, "measure", broken)
    rows = list(timings.run_timings(CPU, "fp32", {}, "auto"))
    assert [row.failure for row in rows] == ["OutOfMemoryError: no room"] * len(timings.TIMED)


def test_machine(tmp_path):
    found = look_around(tmp_path / "not" / "yet")
    assert found.disk_free_bytes > 0 and found.ram_bytes > 0 and found.cpus >= 1
    assert found.versions["torch"] == torch.__version__
    assert found.cards or found.problems["card"]
    assert not {"disk", "memory", "processors", "platform"} & set(found.problems)


def test_a_part_that_cannot_be_looked_up_hides_no_other(monkeypatch, tmp_path):
    def broken():
        raise RuntimeError("CUDA driver initialization failed")

    monkeypatch.setattr(machine, "find_cards", broken)
    monkeypatch.setattr(machine, "_memory", broken)
    found = look_around(tmp_path)
    assert found.problems["card"] == found.problems["memory"] == "RuntimeError: CUDA driver initialization failed"
    assert found.cpus and found.disk_free_bytes


def test_a_card_that_fails_when_asked_leaves_the_cpu(monkeypatch, few):
    real = diagnosis.pick_device

    def broken(config):
        if config.device != "cpu":
            raise RuntimeError("CUDA error: device is lost")
        return real(config)

    monkeypatch.setattr(diagnosis, "pick_device", broken)
    found = diagnose(RunConfig(), quick=True)
    assert found.status == "slow"
    assert found.machine.problems["card"] == "RuntimeError: CUDA error: device is lost"


def test_a_card_that_was_asked_for_and_is_not_there(on_cpu):
    with pytest.raises(ResourceError, match="no CUDA device"):
        diagnose(RunConfig.model_validate({"train": {"device": "cuda"}}), quick=True)


def test_a_kernel_that_cannot_run_as_asked(monkeypatch, few):
    monkeypatch.setattr(launch, "obstacle", lambda kind, index: "Triton cannot be imported (ImportError: no libcuda)")
    found = diagnose(FORCED)
    assert found.status == "failed" and found.wrong == list(diagnosis.OPERATIONS)
    assert {operation.reason for operation in found.operations} == {
        "Triton cannot be imported (ImportError: no libcuda)"
    }
    assert found.checks == [] and found.timings == []


def test_verdicts():
    operations = [Operation(name, "", "triton", "fastest on this card") for name in diagnosis.OPERATIONS]
    found = Diagnosis(Machine(cards=[CARD]), "", CARD, operations)
    assert judge(found) == ("ready", "Ready: Triton kernels on NVIDIA H200", "")
    found.operations = [replace(operations[0], backend="reference", reason="no room"), *operations[1:]]
    assert judge(found) == ("ready", "Ready: Triton kernels on NVIDIA H200, except for neighbourhoods", "no room")
    found.operations = [replace(each, backend="reference", reason="no compiler") for each in operations]
    assert judge(found) == ("slow", "Works, slowly: plain PyTorch on NVIDIA H200", "no compiler")
    found.checks = [Check("token_merging", "bf16", 1e-2, 0.5, "result", 1)]
    assert judge(found)[:2] == ("failed", "Not right: token_merging failed on this machine")
    found.card, found.checks = None, []
    assert judge(found)[1] == "Works, slowly: plain PyTorch on the CPU, as asked for"
    found.machine.cards = []
    assert judge(found)[1] == "Works, slowly: no usable NVIDIA card, plain PyTorch on the CPU"
    assert "8.0" in judge(found)[2]


@pytest.mark.gpu
def test_on_a_card():
    found = diagnose(RunConfig())
    assert found.status in ("ready", "slow"), found.document()
    assert {row.precision for row in found.checks} >= {"exact", "fp32", "fp16"}
    assert not [row for row in found.timings if row.failure]
