"""The doctor's parts: the machine, the self-check that can fail, timings, and the verdict."""

import math
import sys
from dataclasses import replace

import pytest
import torch

import affmae_kernels.cases
from affmae_engine.config import RunConfig
from affmae_engine.doctor import diagnosis, machine, timings
from affmae_engine.doctor.diagnosis import Diagnosis, Operation, diagnose, judge
from affmae_engine.doctor.machine import Card, Machine, look_around
from affmae_engine.doctor.selfcheck import Check, check
from affmae_engine.errors import ResourceError
from affmae_kernels import launch
from tests import toy_operation
from tests.toy_operation import OPERATION

CPU = torch.device("cpu")
CARD = Card(0, "NVIDIA H200", (9, 0), 140 * 2**30, 139 * 2**30, True)
FORCED = RunConfig.model_validate({"kernels": {"backend": "triton"}, "train": {"device": "cpu"}})


@pytest.fixture
def on_cpu(monkeypatch):
    """A machine without a card, whatever the tests run on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def toy(monkeypatch):
    """toy(wrong): the toy operation is the only one."""
    monkeypatch.setattr(affmae_kernels.cases, "OPERATIONS", ())
    monkeypatch.setitem(sys.modules, f"affmae_kernels.{OPERATION}.cases", None)
    monkeypatch.setattr(diagnosis, "OPERATIONS", (OPERATION,))
    toy_operation.install()
    return toy_operation.install


def test_a_correct_operation(toy):
    found = check(OPERATION, "fp32", CPU, "reference")
    assert found.ok and found.cases == 1 and found.limit == 1e-5
    half = check(OPERATION, "bf16", CPU, "reference")
    assert half.ok and 1e-5 < half.error <= half.limit


def test_a_small_error_is_found(toy):
    toy(wrong=5e-5)
    found = check(OPERATION, "fp32", CPU, "reference")
    assert not found.ok and 1e-5 < found.error < 1e-4 and found.tensor


def test_a_wrong_whole_number_is_found(toy, monkeypatch):
    (small, _) = affmae_kernels.cases.cases(OPERATION)
    call = small.call

    def wrong(x, **more):
        found = call(x, **more)
        found["largest"][0, 0] += x.dtype != torch.float64
        return found

    module = sys.modules[f"affmae_kernels.{OPERATION}.cases"]
    monkeypatch.setattr(module, "CASES", [replace(small, call=wrong)])
    found = check(OPERATION, "fp32", CPU, "reference")
    assert (found.ok, found.tensor, found.limit, found.error) == (False, "largest", 0.0, 0.1)


def test_an_operation_that_raises_is_a_result(toy, monkeypatch):
    def broken(**arguments):
        raise RuntimeError("PTX of the future\nand a long tail")

    (small, _) = affmae_kernels.cases.cases(OPERATION)
    module = sys.modules[f"affmae_kernels.{OPERATION}.cases"]
    monkeypatch.setattr(module, "CASES", [replace(small, call=broken)])
    found = check(OPERATION, "fp32", CPU, "reference")
    assert (found.ok, found.error, found.failure) == (False, None, "RuntimeError: PTX of the future")
    monkeypatch.setattr(module, "CASES", [])
    assert not check(OPERATION, "fp32", CPU, "reference").ok, "an operation without cases is not checked"


@pytest.mark.parametrize("error", [math.nan, math.inf, None, 2e-5])
def test_a_check_that_did_not_pass_is_not_ok(error):
    assert not Check("x", "fp32", 1e-5, error, "result", 1).ok


def test_timings_are_of_the_network_cases(toy):
    (row,) = timings.run_timings(CPU, "fp32", {OPERATION: "reference"})
    assert row.shape == "large" and row.kernel is None and not row.failure
    assert row.reference.forward_ms > 0 and row.reference.both_ms > 0


def test_a_timing_that_fails_is_a_row(toy, monkeypatch):
    def broken(*args, **more):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(timings, "time_case", broken)
    rows = list(timings.run_timings(CPU, "fp32", {OPERATION: "reference", "no_such_operation": "reference"}))
    assert rows[0].failure == "OutOfMemoryError: no room" and rows[1].failure


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


def test_a_card_that_fails_when_asked_leaves_the_cpu(monkeypatch, toy):
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


def test_a_kernel_that_cannot_run_as_asked(monkeypatch, toy):
    monkeypatch.setattr(launch, "obstacle", lambda kind, index: "Triton cannot be imported (ImportError: no libcuda)")
    found = diagnose(FORCED)
    assert found.status == "failed" and found.wrong == [OPERATION]
    assert {operation.reason for operation in found.operations} == {
        "Triton cannot be imported (ImportError: no libcuda)"
    }
    assert found.checks == [] and found.timings == []


def test_verdicts():
    operations = [Operation(name, "", "triton", "fastest on this GPU") for name in ("stem", "token_merging")]
    found = Diagnosis(Machine(cards=[CARD]), "", CARD, operations)
    assert judge(found)[0] == "ready" and "NVIDIA H200" in judge(found)[1]
    found.operations = [replace(operations[0], backend="reference", reason="no room"), operations[1]]
    assert judge(found)[0] == "ready" and "except for stem" in judge(found)[1] and judge(found)[2] == "no room"
    found.operations = [replace(each, backend="reference", reason="no compiler") for each in operations]
    assert judge(found)[0] == "slow" and judge(found)[2] == "no compiler"
    found.checks = [Check("token_merging", "bf16", 1e-2, 0.5, "result", 1)]
    assert judge(found)[0] == "failed" and "token_merging" in judge(found)[1]
    found.card, found.checks = None, []
    assert judge(found)[0] == "slow"
    found.machine.cards = []
    assert judge(found)[0] == "slow" and "8.0" in judge(found)[2]


@pytest.mark.gpu
def test_on_a_card():
    found = diagnose(RunConfig())
    assert found.status in ("ready", "slow"), found.document()
    assert {row.precision for row in found.checks} >= {"fp32", "fp16"}
    assert not [row for row in found.timings if row.failure]
