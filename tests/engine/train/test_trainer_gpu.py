"""The loop on a card: no synchronisation inside a step, skipping and resuming as on the CPU."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from affmae_engine import checkpoint
from affmae_engine.config import KernelsConfig, OptimConfig, RunConfig, TrainConfig
from affmae_engine.data.ingest import ingest
from affmae_engine.data.labels import IGNORE
from affmae_engine.data.store import Store
from affmae_engine.errors import Interrupted
from affmae_engine.model.build import build_segmenter, encoder_layers
from affmae_engine.run_dir import create
from affmae_engine.runtime.device import pick_device
from affmae_engine.train.losses import SegmentationLoss
from affmae_engine.train.metrics import Stopwatch, Window
from affmae_engine.train.optim import build_adamw, layer_decay_groups, set_learning_rate
from affmae_engine.train.pretraining import PretrainTask
from affmae_engine.train.step import EAGER_STEPS, TrainStep, seed_forward
from affmae_engine.train.trainer import Trainer
from tests.engine.train.fitting import fit

pytestmark = pytest.mark.gpu
Make = Callable[..., object]


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_never_waits_for_the_card(record: bool, precision: str, make_toy: Make, make_config: Make) -> None:
    choice = pick_device(TrainConfig(device="cuda", precision=precision))
    config, task = make_config(), make_toy().task
    model = task.model.to(choice.device)
    optimizer = build_adamw(task.parameter_groups(config.optim), config.optim)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
    window = Window(choice.device)
    batches = iter([{"x": torch.randn(4, 6).pin_memory()} for _ in range(2 * (EAGER_STEPS + 3))])

    take_step = TrainStep(model, task.losses, optimizer, scaler, choice, accumulate=2, clip_norm=1.0, record=record)

    def step() -> None:
        result = take_step(batches, seed=torch.manual_seed, watch=Stopwatch())
        window.add(result.losses, result.grad_norm, result.bad)

    for _ in range(EAGER_STEPS + 1):  # lazy initialisation and recording may synchronise
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert window.read().skipped == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_poisoned_batch_changes_nothing_on_the_card(
    precision: str, make_toy: Make, make_config: Make, make_run: Make
) -> None:
    config = make_config(device="cuda", steps=4, precision=precision, checkpoint_every=1, keep_checkpoints=9)
    run = make_run(config)
    fit(run, config, make_toy(poisoned={2 * 4 + 1}).task)
    before, after, later = (checkpoint.Checkpoint(run.checkpoint(step), step) for step in (2, 3, 4))
    for kind in ("weights", "optimizer"):
        a, b = getattr(before, kind)(), getattr(after, kind)()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(tensor, later.weights()[name]) for name, tensor in after.weights().items())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resumed_equals_uninterrupted_on_the_card(
    precision: str, make_toy: Make, make_config: Make, make_run: Make
) -> None:
    whole, parts = (make_run(make_config(device="cuda", precision=precision), name) for name in ("whole", "parts"))
    fit(whole, make_config(device="cuda", precision=precision), make_toy().task)
    short = make_config(device="cuda", precision=precision)
    sinks = [lambda event: (parts.control / "stop").touch() if event.kind == "step" and event.step == 2 else None]
    with pytest.raises(Interrupted):
        fit(parts, short, make_toy().task, sinks=sinks)
    fit(parts, short, make_toy().task, resume=True)
    a, b = (checkpoint.Checkpoint(run.checkpoint(6), 6) for run in (whole, parts))
    for kind in ("weights", "optimizer"):
        x, y = getattr(a, kind)(), getattr(b, kind)()
        assert all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_recorded_step_gives_the_same_bits(
    precision: str, accumulate: int, make_toy: Make, make_config: Make
) -> None:
    choice = pick_device(TrainConfig(device="cuda", precision=precision))
    data = [{"x": torch.randn(4, 6)} for _ in range(accumulate * (EAGER_STEPS + 4))]
    weights, losses = [], []
    for record in (False, True):
        config, task = make_config(), make_toy().task
        model = task.model.to(choice.device)
        optimizer = build_adamw(task.parameter_groups(config.optim), config.optim)
        scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
        take_step = TrainStep(
            model, task.losses, optimizer, scaler, choice, accumulate=accumulate, clip_norm=0.1, record=record
        )
        batches = iter(data)
        for step in range(EAGER_STEPS + 4):
            set_learning_rate(optimizer, 1e-3 * (step + 1))
            taken = take_step(batches, seed=torch.manual_seed, watch=Stopwatch())
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        losses.append(float(taken.losses["loss"]))
    assert losses[0] == losses[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["affmae", "vit-mae"])
def test_a_recorded_finetuning_step_gives_the_same_bits(family: str, precision: str, accumulate: int) -> None:
    """With stochastic depth and dropout, learning rates by layer, and images whose sides are no whole patches."""
    choice = pick_device(TrainConfig(device="cuda", precision=precision))
    config = RunConfig.model_validate({"model": {"family": family, "size": "tiny", "drop_path": 0.2}})
    generator = torch.Generator().manual_seed(0)
    data = [
        {
            "image": torch.randn(3, 1, 60, 68, generator=generator),
            "labels": torch.randint(IGNORE, 3, (3, 60, 68), generator=generator),
        }
        for _ in range(accumulate * (EAGER_STEPS + 3))
    ]
    outcomes = []
    for record in (False, True):
        torch.manual_seed(0)
        model = build_segmenter(config.model, 3).to(choice.device).train()
        loss = SegmentationLoss(config.finetune, config.loss, [1.0, 2.0, 0.5])
        groups = layer_decay_groups(model, OptimConfig(layer_decay=0.6), encoder_layers(config.model))
        optimizer = build_adamw(groups, config.optim)
        take_step = TrainStep(
            model,
            lambda model, batch, loss=loss: loss(model(batch["image"]), batch["labels"]),
            optimizer,
            torch.amp.GradScaler("cuda", enabled=False),
            choice,
            accumulate=accumulate,
            clip_norm=1.0,
            record=record,
        )
        batches, losses = iter(data), []
        for step in range(EAGER_STEPS + 3):
            set_learning_rate(optimizer, 1e-3 * (step + 1))
            taken = take_step(batches, seed=partial(seed_forward, 0, step, 0), watch=Stopwatch())
            losses.append({name: float(value) for name, value in taken.losses.items()})
        outcomes.append((losses, {name: tensor.clone() for name, tensor in model.state_dict().items()}))
    (losses, weights), (recorded_losses, recorded_weights) = outcomes
    assert losses == recorded_losses
    assert [name for name in weights if not torch.equal(weights[name], recorded_weights[name])] == []


BROKEN_CAPTURE = """
import torch
from affmae_engine.runtime.cuda_graphs import CudaGraphedFunction

def waits(inputs):
    torch.rand(4, device="cuda")
    return {"x": inputs["x"] * float(inputs["x"].sum())}

inputs = {"x": torch.ones(4, device="cuda")}
torch.manual_seed(5)
expected = torch.rand(3, device="cuda")
try:
    CudaGraphedFunction(waits, inputs, torch.cuda.graph_pool_handle())
except RuntimeError:
    pass
else:
    raise SystemExit("the capture did not break")
assert torch.cuda.current_stream() == torch.cuda.default_stream()
torch.manual_seed(5)
assert torch.equal(torch.rand(3, device="cuda"), expected)
def draws(inputs):
    return {"x": inputs["x"] + torch.rand(4, device="cuda")}

graph = CudaGraphedFunction(draws, inputs, torch.cuda.graph_pool_handle())
torch.manual_seed(5)
first = graph(inputs)["x"].clone()
torch.manual_seed(5)
assert torch.equal(graph(inputs)["x"], first) and not torch.equal(first, inputs["x"])
"""


def test_a_process_goes_on_after_a_broken_capture() -> None:
    """In a process of its own: where that fails, nothing random works any more."""
    done = subprocess.run([sys.executable, "-c", BROKEN_CAPTURE], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("where", ["losses", "update"])
def test_memory_short_in_a_recording_halves_the_micro_batch(
    where: str, precision: str, make_toy: Make, make_config: Make, make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at any shortage: the step is repeated in halves, which are recorded in their turn."""
    failures, replays = [], []
    norm, replay = torch.nn.utils.get_total_norm, torch.cuda.CUDAGraph.replay

    def allocate_too_much(here: str) -> None:
        if here == where and not failures and torch.cuda.is_current_stream_capturing():
            failures.append(here)
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

    def short_norm(*arguments: object, **options: object) -> torch.Tensor:  # between unscaling and the update
        allocate_too_much("update")
        return norm(*arguments, **options)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", short_norm)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph))[1])
    events = {}
    for record in (False, True):
        config = make_config(device="cuda", precision=precision, steps=12, batch_size=8, log_every=1)
        config = config.model_copy(update={"kernels": KernelsConfig(cuda_graph=record)})
        run = make_run(config, f"run-{record}")
        toy = make_toy(before=lambda batch: allocate_too_much("losses"))
        toy.task.model[3].p = 0.0  # dropout depends on the micro-batch
        fit(run, config, toy.task)
        events[record] = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert failures == [where]
    assert len(replays) == (12 - 3 - EAGER_STEPS) * 3, "two micro-batches and the update, from the seventh step on"
    warnings = [event["message"] for event in events[True] if event["kind"] == "warning"]
    (warning,) = [message for message in warnings if message.startswith("out of memory")]
    assert "in step 4, which is repeated: 4 images at a time, 2 times a step" in warning
    plain, recorded = ([e["losses"]["loss"] for e in events[r] if e["kind"] == "step"] for r in (False, True))
    assert recorded == pytest.approx(plain, rel=1e-3 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize(("family", "workers"), [("affmae", 0), ("affmae", 4), ("vit-mae", 4)])
def test_both_families_train_recorded(family: str, workers: int, tmp_path: Path) -> None:
    """A recorded run (of ViT-MAE: compiled too) follows the plain one, and its losses go on falling after the capture.

    With workers, a thread of this process copies batches to pinned memory while the graphs are recorded.
    """
    losses = {}
    generator = np.random.default_rng(0)
    tifffile.imwrite(tmp_path / "a.tif", generator.integers(0, 255, (8, 160, 160), np.uint8).astype(np.uint8))
    ingest([tmp_path / "a.tif"], tmp_path / "em.zarr")
    for fast in (False, True):
        asked = RunConfig.model_validate(
            {
                "model": {"family": family, "size": "tiny", "decoder_dropout": 0, "drop_path": 0},
                "data": {"crop_size": 128, "workers": workers},
                "train": {"steps": 12, "batch_size": 4, "device": "cuda", "precision": "fp32", "log_every": 1},
                "kernels": {"backend": "auto" if fast or family == "affmae" else "reference", "cuda_graph": fast},
                "optim": {"lr": 1e-3, "warmup_steps": 2},
            }
        )
        task = PretrainTask(asked, Store.open(tmp_path / "em.zarr"))
        run = create(tmp_path / f"run-{fast}")
        run.write_config(task.config, "pretrain")
        Trainer(run, task).fit()
        events = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        losses[fast] = [event["losses"]["loss"] for event in events if event["kind"] == "step"]
    assert losses[True] == pytest.approx(losses[False], rel=2e-3)
    assert losses[True][-1] < losses[True][0]
