"""Operations: checked first, then timed; bounds and tables. On cases of a toy operation."""

import sys

import pytest
import torch

import affmae_kernels.cases
from affmae_engine.bench import child
from affmae_engine.bench.child import Children
from affmae_engine.bench.kernels import (
    figures_of,
    items_of,
    measure_operation,
    records_of,
    run_items,
    tables_of,
    time_case,
)
from affmae_engine.config import TrainConfig
from affmae_engine.runtime.device import pick_device
from tests import toy_operation

RUN = "from affmae_engine.bench.child import main; main()"
CPU = pick_device(TrainConfig(device="cpu"))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch):
    """toy(wrong): the toy operation is the only one, here and in child processes."""
    name = f"affmae_kernels.{toy_operation.OPERATION}.cases"
    monkeypatch.setattr(affmae_kernels.cases, "OPERATIONS", ())
    monkeypatch.setitem(sys.modules, name, None)  # both are put back afterwards

    def install(wrong: float = 0.0) -> None:
        toy_operation.install(wrong)
        code = f"import tests.toy_operation as toy; toy.install({wrong})\n" + RUN
        monkeypatch.setattr(child, "COMMAND", (sys.executable, "-c", code))

    install()
    return install


def everything(**options):
    with Children(60) as children:
        return list(run_items(items_of([toy_operation.OPERATION], CPU, reference=True), children))


def test_times_and_bytes(toy) -> None:
    case = toy_operation.case("x", 16, network=True)
    times = time_case(case, CPU.device, torch.float32, "reference", seconds=0.01)
    x = 2 * 5 * 16 * 4
    inputs, outputs = 2 * x + 2 * 16 * 4, x + 2 * 5 * 8
    assert times.forward_bytes == inputs + outputs
    assert times.both_bytes == inputs + outputs + x + inputs
    assert times.forward.ms > 0 and times.both.ms > 0


@pytest.mark.parametrize("operation", affmae_kernels.cases.OPERATIONS)
def test_every_operation_can_be_timed(operation: str) -> None:
    small = affmae_kernels.cases.cases(operation, network=False)
    times = [time_case(case, CPU.device, torch.float32, "reference", seconds=0.001) for case in small]
    assert all(found.forward.ms > 0 and found.forward_bytes > 0 for found in times)
    assert any(found.both for found in times) == (
        operation not in ("training_crops", "warped_crops", "tile_blending", "neighbourhoods", "adamw")
    )


def test_operations_are_checked_and_timed_in_children(toy) -> None:
    found = everything()
    assert [(item["what"], result["status"]) for item, result in found] == [
        ("ceilings", "ok"), ("check", "ok"), ("time", "ok"),
    ]  # fmt: skip
    records, ceilings = records_of(found)
    assert ceilings.gb_s > 0.1 and ceilings.tflop_s > 1e-4
    check, timed = records
    assert check["error"] < 1e-5 and timed["forward"]["ms"] > 0 and timed["both_bound_ms"] > 0
    assert {figure.metric for figure in figures_of(records)} == {"forward", "forward and backward"}
    text = "\n".join(table.markdown() for table in tables_of(records))
    assert "right" in text and "small" in text


def test_a_wrong_operation_is_not_timed(toy) -> None:
    toy(wrong=0.01)
    found = everything()
    assert [(item["what"], result["status"]) for item, result in found] == [("ceilings", "ok"), ("check", "wrong")]
    records, _ = records_of(found)
    assert "y 1.0e-02" in records[0]["note"] and figures_of(records) == []
    assert "wrong" in tables_of(records)[0].markdown()


def test_an_operation_that_raises_is_a_result(toy) -> None:
    item = {"what": "check", "operation": "no_such_operation", "name": "x", "device": "cpu", "dtype": "float32"}
    found = measure_operation(item, lambda message: None)
    assert found["status"] == "failed" and found["note"]


@pytest.mark.gpu
@pytest.mark.slow
def test_real_operations_on_a_gpu() -> None:
    choice = pick_device(TrainConfig(device="cuda"))
    with Children(300.0) as children:
        found = list(run_items(items_of(affmae_kernels.cases.OPERATIONS, choice, reference=False), children))
    assert [(item, result) for item, result in found if result["status"] != "ok"] == []
