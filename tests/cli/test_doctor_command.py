"""`affmae doctor`: what it prints, its JSON and its exit codes."""

import json

import pytest
import torch
from typer.testing import CliRunner

from affmae_cli.main import app
from affmae_engine.doctor import selfcheck
from affmae_kernels import launch
from affmae_kernels.cluster_attention import reference as attention
from affmae_kernels.dispatch import OPERATIONS


@pytest.fixture(autouse=True)
def small_and_without_a_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(selfcheck, "SHAPES", selfcheck.SHAPES[1:3])


@pytest.fixture
def wrong_attention(monkeypatch):
    """Cluster attention that is a little off in every precision but float64."""
    right = attention.cluster_attention
    monkeypatch.setattr(
        attention, "cluster_attention", lambda qkv, *rest: right(qkv, *rest) + 0.01 * (qkv.dtype != torch.float64)
    )


def run(*arguments: str):
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_a_machine_without_a_card():
    result = run()
    assert result.exit_code == 0, result.output
    first, *others = result.stdout.splitlines()
    assert first == "Works, slowly: no usable NVIDIA card, plain PyTorch on the CPU"
    text = "\n".join(others)
    assert "compute capability 8.0 or newer" in text
    for title in ("This machine", "Which kernels run", "Self-check", "Milliseconds of one call"):
        assert f"\n{title}" in text
    assert all(text.count(name) >= 3 for name in OPERATIONS)
    assert text.count(" right ") == len(OPERATIONS) and "WRONG" not in text
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_quick_leaves_the_timings_out():
    assert "Milliseconds" not in run("--quick").stdout


def test_json():
    result = run("--json")
    assert result.exit_code == 0 and result.stderr == ""
    document = json.loads(result.stdout)
    assert document["schema"] == 1
    assert (document["status"], document["wrong"], document["preset"]) == ("slow", [], "demo")
    assert document["machine"]["cards"] == [] and document["machine"]["problems"]["card"]
    assert document["machine"]["versions"]["torch"] == torch.__version__
    assert [row["operation"] for row in document["operations"]] == list(OPERATIONS)
    assert {row["backend"] for row in document["operations"]} == {"reference"}
    for row in document["checks"]:
        assert row["ok"] is True and 0 <= row["error"] <= row["limit"] and row["problems"] > 0
    for row in document["timings"]:
        assert row["kernel"] is None and row["reference"]["forward_ms"] > 0 and row["failure"] == ""


def test_a_wrong_operation_is_named(wrong_attention):
    result = run("--quick")
    assert result.exit_code == 1
    assert result.stdout.startswith("Not right: cluster_attention failed on this machine\n")
    assert result.stdout.count("WRONG") == 1
    assert "error: cluster_attention (PyTorch, fp32) is wrong: result is off by" in result.stderr
    assert "hint: reinstall PyTorch" in result.stderr and "report it" in result.stderr


def test_a_wrong_kernel_is_named_with_the_way_out(wrong_attention, monkeypatch):
    monkeypatch.setattr("affmae_engine.doctor.diagnosis.run_checks", checks_of_a_wrong_kernel)
    monkeypatch.setattr(launch, "obstacle", lambda kind, index: None)
    result = run("--quick", "--set", "kernels.backend=triton")
    assert result.exit_code == 1
    assert "error: cluster_attention (Triton, bf16) is wrong: gradient of qkv is off by 3.2e-2" in result.stderr
    assert "hint: use --set kernels.backend=reference and report it" in result.stderr


def checks_of_a_wrong_kernel(*arguments):
    return [selfcheck.Check("cluster_attention", "bf16", 1e-2, 0.032, "gradient of qkv", 8)]


def test_a_wrong_operation_in_json(wrong_attention):
    result = run("--quick", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert (document["status"], document["wrong"]) == ("failed", ["cluster_attention"])


def test_an_operation_that_raises_shows_no_traceback(monkeypatch):
    def broken(*args):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(attention, "cluster_attention", broken)
    result = run()
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "cluster_attention (PyTorch, fp32) fails: RuntimeError: illegal memory access" in result.stderr
    assert "cluster_attention could not be timed: RuntimeError: illegal memory access" in result.stdout


def test_triton_that_cannot_be_imported_is_the_reason(monkeypatch):
    monkeypatch.setattr(launch, "obstacle", lambda kind, index: "Triton cannot be imported (ImportError: no libcuda)")
    result = run("--quick", "--set", "kernels.backend=triton")
    assert result.exit_code == 1
    assert "Triton cannot be imported (ImportError: no libcuda)" in result.stdout
    assert "cannot run as asked: Triton cannot be imported" in result.stderr


def test_settings_are_those_of_other_commands(monkeypatch):
    monkeypatch.setenv("AFFMAE_KERNELS__BACKEND", "reference")
    assert "The reason: asked for" in run("--quick").stdout
    assert run("--set", "kernels.backend=cuda").exit_code == 2
    assert run("--device", "cuda").exit_code == 4
