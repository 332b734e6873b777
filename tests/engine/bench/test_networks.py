"""One case measured in this process, and what becomes of a failure."""

import itertools
import time
from typing import Any

import numpy as np
import pytest
import torch

from affmae_engine.bench import loading, networks
from affmae_engine.bench.child import Children
from affmae_engine.bench.loading import with_loading
from affmae_engine.bench.networks import Measurement, SpeedCase, build_network, make_step, measure_case, random_batches
from affmae_engine.bench.speed import SpeedPlan
from affmae_engine.config import TrainConfig
from affmae_engine.data.loading import PREFETCH
from affmae_engine.runtime.device import pick_device
from affmae_engine.train.metrics import Stopwatch
from affmae_engine.train.step import EAGER_STEPS

CPU = pick_device(TrainConfig(device="cpu"))
FAMILIES = ("affmae", "vit-mae")


def case(family: str = "affmae", **fields: Any) -> SpeedCase:
    return SpeedCase(**{"task": "pretrain", "family": family, "size": "tiny", "resolution": 64, "batch": 2, **fields})


def measured(asked: SpeedCase, **plan: Any) -> Measurement:
    """The measurement as it comes back from a child process."""
    return Measurement(**measure_case(SpeedPlan((asked,), CPU, **plan).request(asked), lambda message: None))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", ["pretrain", "finetune", "predict"])
def test_a_case_is_measured(family: str, task: str) -> None:
    found = measured(case(family, task=task))
    assert found.status == "ok", found.note
    assert 0 < found.low_ms <= found.ms <= found.high_ms and found.steps > 0
    assert found.images_per_s == pytest.approx(2e3 / found.ms)
    assert 0 < found.first_step_s < found.ready_s and found.parameters > 0
    assert found.allocated_gib is None and found.gpu == {} and found.note == ""
    assert set(found.end_to_end) == ({"tiff", "zarr"} if task == "predict" else set())
    assert all(rate > 0 for rate in found.end_to_end.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_trains(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "WARMUP_RATE", 1.0)
    asked = case(family)
    take = make_step(asked, build_network(asked, CPU)[0], CPU, itertools.cycle(random_batches(asked, CPU.device)))
    losses = [float(take()) for _ in range(12)]
    assert losses[-2] < losses[0] and losses[-1] < losses[1]  # two batches take turns


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_the_paper_protocol_computes_gradients_and_updates_nothing(task: str) -> None:
    asked = case(task=task, protocol="paper")
    model, _ = build_network(asked, CPU)
    take = make_step(asked, model, CPU, iter(random_batches(asked, CPU.device)))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    assert float(take()) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_both_families_get_the_same_batches() -> None:
    for task in ("pretrain", "finetune"):
        ours, theirs = (random_batches(case(family, task=task), CPU.device) for family in FAMILIES)
        assert all(torch.equal(a[name], b[name]) for a, b in zip(ours, theirs, strict=True) for name in a)
        assert not torch.equal(ours[0]["image"], ours[1]["image"])


def test_top_kernels() -> None:
    found = measured(case("vit-mae"), profile=True)
    assert any("mm" in name and ms > 0 and launches >= 1 for name, ms, launches in found.kernels)


def test_steps_with_a_dataset(make_store) -> None:
    store = make_store({"a": np.random.default_rng(0).integers(0, 255, (4, 96, 96), np.uint8)})
    found = measured(case(), data=store.path)
    assert found.status == "ok", found.note
    assert found.data_images_per_s > 0 and 0 <= found.data_wait <= 1


@pytest.mark.parametrize("slower", [0.5, 1.1, 1.5])
def test_what_the_loader_prepared_ahead_is_not_its_speed(slower: float, make_store, monkeypatch) -> None:
    """On a clock of its own: steps of one second, and a loader that begins with a full supply."""
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
    asked = case(resolution=32)
    monkeypatch.setattr(loading, "batches", stream)
    monkeypatch.setattr(loading, "worker_count", lambda setting: 2)
    monkeypatch.setattr(loading, "Stopwatch", Steps)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    rate, wait = with_loading(asked, build_network(asked, CPU)[0], CPU, store.path, clahe=False)
    assert wait == pytest.approx(max(0.0, 1 - 1 / slower), abs=1e-6)
    assert rate == pytest.approx(2 / max(1.0, slower))
    assert len(taken) == (EAGER_STEPS + 2) + 2 * ahead + max(loading.FEWEST_STEPS, 2 * ahead)


def test_a_missing_dataset_costs_its_own_figure_only(tmp_path) -> None:
    found = measured(case(), data=tmp_path / "nothing.zarr")
    assert found.status == "ok" and found.ms > 0 and found.data_images_per_s is None
    assert "nothing.zarr" in found.note


def test_out_of_memory_is_a_result() -> None:
    found = measured(case(resolution=4096, batch=2**30))  # 67 TB of images
    assert found.status == "out of memory" and found.ms is None and "allocate" in found.note


def test_out_of_memory_behind_another_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        except RuntimeError as error:
            raise RuntimeError("backend='inductor' raised") from error

    monkeypatch.setattr(networks, "build_network", full)
    found = measured(case("vit-mae"))
    assert found.status == "out of memory" and "Tried to allocate" in found.note


def test_a_diverging_step_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def infinite(asked: SpeedCase):
        return lambda model, batch: {"loss": sum(p.sum() for p in model.parameters()) / 0.0}

    monkeypatch.setattr(networks, "losses_of", infinite)
    found = measured(case("vit-mae"))
    assert found.status == "failed" and found.ms is None and "loss" in found.note


@pytest.mark.gpu
@pytest.mark.parametrize("protocol", ["trainer", "paper"])
@pytest.mark.parametrize("task", ["pretrain", "finetune", "predict"])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu(family: str, task: str, protocol: str) -> None:
    """In a child process: a capture that fails must not reach the tests after this one."""
    asked = case(family, task=task, protocol=protocol)
    request = SpeedPlan((asked,), pick_device(TrainConfig(device="cuda")), profile=True).request(asked)
    with Children(300.0) as children:
        *_, last = children.run("affmae_engine.bench.networks:measure_case", [request])
    assert last["event"] == "ended", last
    found = Measurement(**last["result"])
    assert found.status == "ok", found.note
    assert found.reserved_gib >= found.allocated_gib > 0 and found.caches in ("cold", "warm")
    assert found.kernels and "sm_clock" in found.gpu and "recorded" in found.how
