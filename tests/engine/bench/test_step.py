"""Timed training steps and what becomes of a failure."""

from typing import get_args

import pytest
import torch

from affmae_engine.bench import report, step
from affmae_engine.bench.step import StepCase, StepResult, measure_step, prepare_step, random_batches
from affmae_engine.config import TrainConfig
from affmae_engine.train.device import pick_device


@pytest.fixture
def choice():
    return pick_device(TrainConfig(device="cpu"))


def case(model: str, **options) -> StepCase:
    return StepCase(model, "tiny", 64, 2, **options)


@pytest.mark.parametrize("model", ["affmae", "vit-mae"])
def test_a_step_is_timed(choice, model: str) -> None:
    result = measure_step(case(model), choice, steps=2, warmup=1)
    assert result.status == "ok", result.note
    assert result.ms > 0 and result.repeats == 2
    assert result.images_per_s == pytest.approx(2e3 / result.ms)
    assert 0.9e6 < result.parameters < 1.1e6
    assert result.allocated_gib is None  # a card's figure


@pytest.mark.parametrize("model", ["affmae", "vit-mae"])
def test_a_step_trains(choice, model: str) -> None:
    prepared = prepare_step(case(model), choice)
    losses = [float(prepared.step()) for _ in range(8)]
    assert losses[-2] < losses[0] and losses[-1] < losses[1]  # two batches take turns


def test_both_models_get_the_same_batches() -> None:
    ours, theirs = (random_batches(case(model), torch.device("cpu")) for model in ("affmae", "vit-mae"))
    assert len(ours) == step.BATCHES
    assert all(torch.equal(a[name], b[name]) for a, b in zip(ours, theirs, strict=True) for name in a)
    assert not torch.equal(ours[0]["image"], ours[1]["image"])


def test_running_out_of_memory_is_a_result(choice, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        except RuntimeError as error:
            raise RuntimeError("backend='inductor' raised") from error

    monkeypatch.setattr(step, "_vit_mae", full)
    result = measure_step(case("vit-mae"), choice, steps=1, warmup=1)
    assert result.status == "out of memory" and result.ms is None
    assert "Tried to allocate" in result.note


def test_another_failure_is_a_result(choice, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args):
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setattr(step, "_affmae", broken)
    result = measure_step(case("affmae"), choice, steps=1, warmup=1)
    assert (result.status, result.note) == ("failed", "RuntimeError: no such kernel")


def test_a_step_that_diverges_has_no_speed(choice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "_losses", lambda model, batch: {"loss": sum(p.sum() for p in model.parameters()) / 0.0})
    result = measure_step(case("vit-mae"), choice, steps=1, warmup=1)
    assert result.status == "failed" and result.ms is None


def outcome(model: str, ms: float | None, memory: float | None = None, how: str = "") -> StepResult:
    status = "ok" if ms else "out of memory"
    return StepResult(model, "base", 512, 32, how=how, status=status, ms=ms, allocated_gib=memory)


def test_ratios_are_against_the_fastest_baseline() -> None:
    results = [outcome("affmae", 40, 10), outcome("vit-mae", 200, 30, "slow"), outcome("vit-mae", 160, 25, "fast")]
    (ratio,) = report.step_ratios(results)
    assert (ratio["speed"], ratio["memory"], ratio["against"]) == (4, 0.4, "fast")


def test_no_ratio_without_a_time() -> None:
    (ratio,) = report.step_ratios([outcome("affmae", 40, 10), outcome("vit-mae", None)])
    assert ratio["speed"] is None and ratio["memory"] is None
    assert report.step_ratios([outcome("affmae", 40)]) == []


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("model", "mode"), [("affmae", "compile"), *(("vit-mae", mode) for mode in get_args(step.VitMode))]
)
def test_steps_on_a_card(model: str, mode: str) -> None:
    choice = pick_device(TrainConfig())
    result = measure_step(case(model, vit_mode=mode), choice, steps=3, warmup=5, profile=True)
    assert result.status == "ok", result.note
    assert result.reserved_gib >= result.before_gib and result.allocated_gib > 0
    assert result.profile["total_ms"] > 0
