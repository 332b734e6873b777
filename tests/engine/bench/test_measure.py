"""One case measured in this process, and what becomes of a failure."""

import time
from typing import Any, get_args

import numpy as np
import pytest
import torch

from affmae_engine.bench import loading, measure, step
from affmae_engine.bench.case import CLASSES, Case, Measurement, Request, VitMode
from affmae_engine.bench.loading import with_loading
from affmae_engine.bench.measure import answer
from affmae_engine.bench.step import make_network, make_step, random_batches
from affmae_engine.config import TrainConfig
from affmae_engine.data.loading import PREFETCH
from affmae_engine.train.device import pick_device
from affmae_engine.train.metrics import Stopwatch
from affmae_engine.train.step import EAGER_STEPS

CPU = TrainConfig(device="cpu")


def case(model: str = "affmae", **fields: Any) -> Case:
    return Case(model=model, **{"size": "tiny", "resolution": 64, "batch": 2, **fields})


def request(asked: Case, **fields: Any) -> Request:
    return Request(case=asked, **{"device": "cpu", "steps": 2, "warmup": 1, **fields})


@pytest.mark.parametrize("model", ["affmae", "vit-mae"])
@pytest.mark.parametrize("work", ["pretrain", "finetune", "predict"])
def test_a_case_is_measured(model: str, work: str) -> None:
    found = answer(request(case(model, work=work)))
    assert found.status == "ok", found.note
    assert found.ms > 0 and found.repeats == 2 and found.low_ms <= found.ms <= found.high_ms
    assert found.forward_ms == found.ms if work == "predict" else found.forward_ms > 0
    assert 0 < found.first_step_s < found.ready_s
    assert 0.9e6 < found.parameters < 1.1e6
    assert found.allocated_gib is None and found.note == ""  # memory is a card's figure


def test_a_try_takes_no_time() -> None:
    found = answer(request(case(), what="try"))
    assert found.status == "ok" and found.ms is None and found.ready_s > 0


@pytest.mark.parametrize("model", ["affmae", "vit-mae"])
def test_a_step_trains(model: str) -> None:
    choice = pick_device(CPU)
    asked = case(model)
    batches = random_batches(asked, choice.device)
    take = make_step(asked, make_network(asked, choice, recorded=False), choice, iter(batches * 8))
    losses = [float(take()) for _ in range(8)]
    assert losses[-2] < losses[0] and losses[-1] < losses[1]  # two batches take turns


def test_both_families_get_the_same_batches() -> None:
    for work in ("pretrain", "finetune"):
        ours, theirs = (random_batches(case(m, work=work), torch.device("cpu")) for m in ("affmae", "vit-mae"))
        assert len(ours) == step.BATCHES
        assert all(torch.equal(a[name], b[name]) for a, b in zip(ours, theirs, strict=True) for name in a)
        assert not torch.equal(ours[0]["image"], ours[1]["image"])
    assert ours[0]["labels"].unique().tolist() == list(range(CLASSES))


def test_where_the_time_goes() -> None:
    found = answer(request(case("vit-mae"), profile=True))
    assert found.profile["total_ms"] > 0 and "dense attention" in found.profile["categories"]


def test_steps_with_a_dataset(make_store) -> None:
    store = make_store({"a": np.random.default_rng(0).integers(0, 255, (4, 96, 96), np.uint8)})
    found = answer(request(case(), data=str(store.path)))
    assert found.status == "ok", found.note
    assert found.data_images_per_s > 0 and 0 <= found.data_wait <= 1


@pytest.mark.parametrize("slower", [0.5, 1.1, 1.5])
def test_what_the_loader_prepared_ahead_is_not_its_speed(slower: float, make_store, monkeypatch) -> None:
    """On a clock of its own, steps of one second and a loader whose supply is full at the beginning."""
    now, taken, ahead = [0.0], [], 2 * PREFETCH

    def stream(dataset, *, batch_size: int, workers: int, **more: object):
        assert workers == 2
        ready = [0.0] * ahead
        samples = [dataset.sample(i) for i in range(batch_size)]
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        while True:
            now[0] = max(now[0], ready[len(taken)])
            taken.append(now[0])
            ready.append(max(ready[-1], now[0]) + slower)  # whoever takes a batch has another one begun
            yield batch

    class Steps(Stopwatch):
        def __init__(self) -> None:
            super().__init__(lambda: now[0])

        def stepped(self) -> None:
            now[0] += 1.0
            super().stepped()

    store = make_store({"a": np.random.default_rng(0).integers(0, 255, (2, 64, 64), np.uint8)})
    asked, choice, found = request(case(resolution=32), data=str(store.path)), pick_device(CPU), Measurement()
    monkeypatch.setattr(loading, "batches", stream)
    monkeypatch.setattr(loading, "worker_count", lambda setting: 2)
    monkeypatch.setattr(loading, "Stopwatch", Steps)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with_loading(found, asked, choice, make_network(asked.case, choice, recorded=False))
    assert found.data_wait == pytest.approx(max(0.0, 1 - 1 / slower), abs=1e-6)
    assert found.data_images_per_s == pytest.approx(2 / max(1.0, slower))
    assert len(taken) == (EAGER_STEPS + 2) + 4 * ahead, "first steps; the supply; as many steps; twice as many timed"


def test_a_dataset_that_is_none(tmp_path) -> None:
    found = answer(request(case(), data=str(tmp_path / "nothing.zarr")))
    assert found.status == "ok" and found.ms > 0 and found.data_images_per_s is None
    assert found.note.startswith("with the dataset: ") and "nothing.zarr" in found.note


def test_main_memory_that_runs_out_is_a_result() -> None:
    found = answer(request(case(resolution=4096, batch=2**30)))  # 67 TB of images
    assert found.status == "out of memory" and found.ms is None
    assert "allocate" in found.note


def test_memory_that_runs_out_behind_another_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        except RuntimeError as error:
            raise RuntimeError("backend='inductor' raised") from error

    monkeypatch.setattr(step, "_compile_vit", full)
    found = answer(request(case("vit-mae")))
    assert found.status == "out of memory" and "Tried to allocate" in found.note


def test_another_failure_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setattr(step, "_accelerate_affmae", broken)
    found = answer(request(case()))
    assert (found.status, found.note) == ("failed", "RuntimeError: no such kernel")


def test_a_step_that_diverges_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        step, "_reconstruction", lambda model, batch: {"loss": sum(p.sum() for p in model.parameters()) / 0.0}
    )
    found = answer(request(case("vit-mae")))
    assert found.status == "failed" and found.ms is None and "loss" in found.note


def test_a_forward_pass_that_fails_costs_its_own_figure_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measure, "make_forward", full)
    found = answer(request(case("vit-mae")))
    assert found.status == "ok" and found.ms > 0 and found.forward_ms is None
    assert found.note.startswith("forward pass alone: ")


@pytest.mark.gpu
@pytest.mark.parametrize("work", ["pretrain", "finetune", "predict"])
@pytest.mark.parametrize(("model", "mode"), [("affmae", "auto"), *(("vit-mae", mode) for mode in get_args(VitMode))])
def test_on_a_card(model: str, mode: str, work: str) -> None:
    if mode == "compile-fp32-residual" and work != "pretrain":
        pytest.skip("there for pretraining alone")
    asked = Case(model=model, work=work, size="tiny", resolution=64, batch=2, vit_mode=mode)
    found = answer(Request(case=asked, device="cuda", steps=3, warmup=2, profile=True))
    assert found.status == "ok", found.note
    assert found.note == "" and found.forward_ms > 0
    assert found.reserved_gib >= found.allocated_gib > 0
    assert found.profile["total_ms"] > 0
    assert (len(found.modes_ms) == 2) == (mode == "auto" and model == "vit-mae" and work != "predict")
