"""The choice of an implementation, and the tiles that bound memory."""

import subprocess
import sys

import pytest
import torch

import affmae_kernels.precision as precision
from affmae_kernels import dispatch, launch
from affmae_kernels.dispatch import choose_backend

CPU = torch.device("cpu")
CARD = torch.device("cuda", 0)


def test_choice_has_a_reason() -> None:
    assert choose_backend("reference", "x", CARD).reason == "asked for"
    assert choose_backend("auto", "x", CPU).reason == "the tensors are on the CPU"
    assert choose_backend("auto", "x", torch.device("meta")).name == "reference"


def test_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="backend of x must be one of auto, triton, reference; got 'tpu'"):
        choose_backend("tpu", "x", CPU)


def test_card_that_cannot_falls_back_with_one_warning(monkeypatch, caplog) -> None:
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(launch, "obstacle", lambda kind, index: "compute capability 7.5")
    for _ in range(3):
        choice = choose_backend("auto", "x", CARD)
        assert choice == dispatch.Choice("reference", "compute capability 7.5")
    assert choose_backend("auto", "y", CARD).name == "reference"
    assert [record.message.count("compute capability 7.5") for record in caplog.records] == [1]
    with pytest.raises(ValueError, match=r"x cannot run as a Triton kernel: compute capability 7.5; set"):
        choose_backend("triton", "x", CARD)


def test_arguments_that_a_kernel_does_not_take_go_to_the_reference(monkeypatch, caplog) -> None:
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(launch, "obstacle", lambda kind, index: None)
    assert choose_backend("auto", "x", CARD) == dispatch.Choice("triton", "fastest on this card")
    assert "a head width of 4" in choose_backend("auto", "x", CARD, "a head width of 4").reason
    assert "x: the kernel does not take a head width of 4" in caplog.text
    with pytest.raises(ValueError, match="does not take a head width of 4"):
        choose_backend("triton", "x", CARD, "a head width of 4")


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch) -> None:
    monkeypatch.setattr(launch, "_found", {})
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    with pytest.raises(ValueError, match="the tensors are on the CPU"):
        choose_backend("triton", "x", CPU)


def test_tiles_cover_all_rows_in_order(monkeypatch) -> None:
    monkeypatch.setattr(precision, "TILE_ELEMENTS", 30)
    seen: list[int] = []

    def rows(part: slice) -> torch.Tensor:
        seen.append(part.stop - part.start)
        return torch.arange(part.start, part.stop)

    with torch.no_grad():
        assert precision.in_tiles(10, 8, rows, dim=0).tolist() == list(range(10))
    assert seen == [3, 3, 3, 1]
    assert precision.in_tiles(10, 1000, rows, dim=0).tolist() == list(range(10))


def test_features_of_half_precision_are_computed_in_fp32() -> None:
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    assert [precision.compute_dtype(torch.zeros(1, dtype=d)) for d in dtypes] == [torch.float32] * 3 + [torch.float64]


def test_predicting_does_not_load_the_compiler() -> None:
    """That would take longer than all the rest of a prediction's start."""
    code = "import sys, affmae_engine.predict.predictor; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
