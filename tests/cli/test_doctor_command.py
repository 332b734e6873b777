"""`affmae doctor`: what it prints, its JSON and its exit codes."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import affmae_kernels.cases
from affmae_cli.main import app
from affmae_engine.doctor import diagnosis
from affmae_engine.doctor.selfcheck import Check
from affmae_kernels import launch
from tests import toy_operation
from tests.toy_operation import OPERATION


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """toy(wrong): no GPU, and the toy operation is the only one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(affmae_kernels.cases, "OPERATIONS", ())
    monkeypatch.setitem(sys.modules, f"affmae_kernels.{OPERATION}.cases", None)
    monkeypatch.setattr(diagnosis, "OPERATIONS", (OPERATION,))
    toy_operation.install()
    return toy_operation.install


def run(*arguments: str):
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_a_machine_without_a_gpu():
    result = run()
    assert result.exit_code == 0, result.output
    text = result.stdout
    assert text.startswith("Works, but slowly") and "compute capability 8.0 or newer" in text
    for title in ("This machine", "Which kernels run", "Self-check"):
        assert f"\n{title}" in text
    assert "Milliseconds" not in text, "a CPU is not timed"
    assert text.count(" right ") == 1 and "WRONG" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_json():
    result = run("--json")
    assert result.exit_code == 0 and result.stderr == ""
    document = json.loads(result.stdout)
    assert document["schema"] == 2
    assert (document["status"], document["wrong"], document["preset"]) == ("slow", [], "demo")
    assert document["machine"]["cards"] == [] and document["machine"]["problems"]["card"]
    assert document["machine"]["versions"]["torch"] == torch.__version__
    (row,) = document["operations"]
    assert row["operation"] == OPERATION and row["backend"] == "reference" and row["about"]
    (check,) = document["checks"]
    assert check["ok"] is True and 0 <= check["error"] <= check["limit"] and check["cases"] == 1
    assert document["timings"] == []


def test_a_wrong_operation_is_named(toy):
    toy(wrong=0.01)
    result = run("--quick")
    assert result.exit_code == 1
    assert result.stdout.startswith("Failed") and result.stdout.count("WRONG") == 1
    assert f"error: {OPERATION} (PyTorch, fp32) is wrong: " in result.stderr and "off by 1.0e-2" in result.stderr
    assert "hint: reinstall PyTorch" in result.stderr and "report it" in result.stderr
    document = json.loads(run("--quick", "--json").stdout)
    assert (document["status"], document["wrong"]) == ("failed", [OPERATION])


def test_a_wrong_kernel_is_named_with_the_way_out(monkeypatch):
    wrong = Check(OPERATION, "bf16", 1e-2, 0.032, "gradient of x", 8)
    monkeypatch.setattr(diagnosis, "run_checks", lambda *arguments: [wrong])
    monkeypatch.setattr(launch, "obstacle", lambda kind, index: None)
    result = run("--quick", "--set", "kernels.backend=triton")
    assert result.exit_code == 1
    assert f"error: {OPERATION} (Triton, bf16) is wrong: gradient of x is off by 3.2e-2" in result.stderr
    assert "hint: use --set kernels.backend=reference and report it" in result.stderr


def test_an_operation_that_raises_shows_no_traceback(monkeypatch):
    def broken(**arguments):
        raise RuntimeError("illegal memory access")

    module = sys.modules[f"affmae_kernels.{OPERATION}.cases"]
    monkeypatch.setattr(module, "CASES", [replace(case, call=broken) for case in module.CASES])
    result = run()
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert f"{OPERATION} (PyTorch, fp32) fails: RuntimeError: illegal memory access" in result.stderr


def test_triton_that_cannot_be_imported_is_the_reason(monkeypatch):
    monkeypatch.setattr(launch, "obstacle", lambda kind, index: "Triton cannot be imported (ImportError: no libcuda)")
    result = run("--quick", "--set", "kernels.backend=triton")
    assert result.exit_code == 1
    assert "Triton cannot be imported (ImportError: no libcuda)" in result.stdout
    assert "Triton cannot be imported" in result.stderr


def test_settings_are_those_of_other_commands(monkeypatch):
    monkeypatch.setenv("AFFMAE_KERNELS__BACKEND", "reference")
    document = json.loads(run("--quick", "--json").stdout)
    assert {row["backend"] for row in document["operations"]} == {"reference"}
    assert run("--set", "kernels.backend=cuda").exit_code == 2
    assert run("--device", "cuda").exit_code == 4
