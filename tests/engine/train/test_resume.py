"""A resumed run is the uninterrupted one, bit for bit; what cannot be resumed says why."""

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from affmae_engine import events
from affmae_engine.config import RunConfig
from affmae_engine.errors import ConfigError, CorruptError, Interrupted
from affmae_engine.run_dir import RunDir, create
from affmae_engine.train import checkpoint, state
from affmae_engine.train.loop import fit
from affmae_engine.train.pretraining import pretrain_task
from affmae_engine.train.signals import StopRequest

Make = Callable[..., object]


def tensors(run: RunDir, step: int) -> dict[str, torch.Tensor]:
    saved = checkpoint.Checkpoint(run.checkpoint(step), step)
    return {**saved.weights(), **saved.optimizer()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logged(run: RunDir) -> dict[int, tuple]:
    found = [events.from_line(text) for text in run.metrics.read_text().splitlines()]
    steps = {e.step: (e.losses, e.lr, e.grad_norm, e.skipped) for e in found if isinstance(e, events.StepLogged)}
    evaluations = {-e.step: (e.metrics, e.best) for e in found if isinstance(e, events.Evaluated)}
    return {**steps, **evaluations}


def fit_until(run: RunDir, config: RunConfig, make_toy: Make, step: int, **toy: object) -> None:
    """Train and stop as after a signal in `step`."""
    stop, seen = StopRequest(), []

    def count(batch: object) -> None:
        seen.append(batch)
        if len(seen) == step:
            stop.request()

    with pytest.raises(Interrupted):
        fit(run, config, make_toy(before=count, **toy).task, stop=stop)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_interrupted_and_resumed_equals_uninterrupted(
    stop_at: int, precision: str, make_toy: Make, make_config: Make, make_run: Make
) -> None:
    config = make_config(precision=precision, steps=6)
    whole, parts = make_run(config, "whole"), make_run(config, "parts")
    poisoned = {9}
    fit(whole, config, make_toy(poisoned=poisoned).task)
    fit_until(parts, config, make_toy, stop_at, poisoned=poisoned)
    torch.manual_seed(99)
    toy = make_toy(poisoned=poisoned)
    seen: list[events.Event] = []
    fit(parts, config, toy.task, resume=True, sinks=[seen.append])
    assert same(tensors(whole, 6), tensors(parts, 6))
    assert logged(whole) == logged(parts)
    assert toy.source.asked == list(range(stop_at * 4, 6 * 4))
    assert isinstance(seen[0], events.RunStarted) and seen[0].resumed and seen[0].step == stop_at
    assert whole.read_json(whole.best) == parts.read_json(parts.best)


def test_what_a_kill_left_behind_is_cleaned_and_a_damaged_newest_skipped(
    make_toy: Make, make_config: Make, make_run: Make
) -> None:
    config = make_config(steps=9)
    whole, parts = make_run(config, "whole"), make_run(config, "parts")
    fit(whole, config, make_toy().task)
    fit_until(parts, config, make_toy, 7)
    assert parts.checkpoint_steps() == [7, 6]
    weights = parts.checkpoint(7) / checkpoint.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    (parts.checkpoints / ".step-000008.ff.partial").mkdir()
    with parts.metrics.open("a") as file:
        file.write('{"kind": "step", "st')  # torn by the kill
    seen: list[events.Event] = []
    fit(parts, config, make_toy().task, resume=True, sinks=[seen.append])
    assert seen[0].step == 6
    warnings = [event.message for event in seen if isinstance(event, events.Warned)]
    assert len(warnings) == 2 and "step 7" in warnings[0] and "step-000007.damaged" in warnings[1]
    assert same(tensors(whole, 9), tensors(parts, 9))
    assert all(events.from_line(text) is not None for text in parts.metrics.read_text().splitlines())
    assert list(parts.checkpoints.glob(".*")) == []


def test_more_steps_continue_on_the_longer_cosine(make_toy: Make, make_config: Make, make_run: Make) -> None:
    config = make_config(steps=6)
    run = make_run(config)
    fit(run, config, make_toy().task)
    fit(run, make_config(steps=8), make_toy().task, resume=True)
    assert run.checkpoint_steps()[0] == 8
    rates = {step: value[1] for step, value in logged(run).items() if step > 0}
    assert rates[8] == pytest.approx(1e-6) and len(rates) == 4
    assert run.read_config().train.steps == 8


def test_resuming_a_complete_run_trains_nothing(make_toy: Make, make_config: Make, make_run: Make) -> None:
    config = make_config()
    run = make_run(config)
    first = fit(run, config, make_toy().task)
    toy = make_toy()
    again = fit(run, config, toy.task, resume=True)
    assert toy.source.asked == [] and again.metrics == first.metrics and again.best_step == first.best_step


def test_no_checkpoint_is_never_a_silent_fresh_start(make_toy: Make, make_config: Make, make_run: Make) -> None:
    config = make_config()
    with pytest.raises(ConfigError, match="no checkpoint to continue from"):
        fit(make_run(config), config, make_toy().task, resume=True)


def test_all_checkpoints_damaged_is_an_error(make_toy: Make, make_config: Make, make_run: Make) -> None:
    config = make_config()
    run = make_run(config)
    fit(run, config, make_toy().task)
    for step in run.checkpoint_steps():
        (run.checkpoint(step) / checkpoint.STATE).write_text("{}")
    with pytest.raises(CorruptError):
        fit(run, config, make_toy().task, resume=True)


def test_other_data_is_refused(make_toy: Make, make_config: Make, make_run: Make) -> None:
    config = make_config()
    run = make_run(config)
    fit(run, config, make_toy().task)
    with pytest.raises(ConfigError, match="data is not what"):
        fit(run, config, make_toy(fingerprint="b").task, resume=True)


def test_generators_go_through_json() -> None:
    torch.manual_seed(1), random.seed(2), np.random.seed(3)  # noqa: NPY002
    random.gauss(0, 1)
    record = json.loads(json.dumps(state._generators()))
    expected = torch.rand(3), random.gauss(0, 1), np.random.standard_normal(3)  # noqa: NPY002
    state._set_generators(record)
    found = torch.rand(3), random.gauss(0, 1), np.random.standard_normal(3)  # noqa: NPY002
    assert torch.equal(found[0], expected[0]) and found[1] == expected[1] and (found[2] == expected[2]).all()


@pytest.mark.parametrize("forgotten", ["optimizer", "weights", "step", "window", "step seed"])
def test_a_restore_that_forgets_something_is_caught(
    forgotten: str, make_toy: Make, make_config: Make, make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: the equality above really depends on each part."""
    config = make_config()
    whole, parts = make_run(config, "whole"), make_run(config, "parts")
    fit(whole, config, make_toy().task)
    fit_until(parts, config, make_toy, 3)
    if forgotten == "optimizer":
        monkeypatch.setattr(state, "load_optimizer_tensors", lambda *args: None)
    elif forgotten == "weights":
        monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *args, **kwargs: None)
    elif forgotten == "step":
        real = checkpoint.Checkpoint.state
        monkeypatch.setattr(checkpoint.Checkpoint, "state", lambda self: {**real(self), "step": 0})
    elif forgotten == "window":
        monkeypatch.setattr(state.Window, "load_json", lambda *args: None)
    else:
        monkeypatch.setattr("affmae_engine.train.loop.seed_forward", lambda *args: None)
    fit(parts, config, make_toy().task, resume=True)
    assert not (same(tensors(whole, 6), tensors(parts, 6)) and logged(whole) == logged(parts))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a forked process cannot use the card that its parent used")
def test_killed_again_and_again_still_ends_bit_equal(make_toy: Make, make_config: Make, make_run: Make) -> None:
    config = make_config(steps=100, checkpoint_every=1, eval_every=5)
    whole = make_run(config, "whole")
    fit(whole, config, make_toy().task)
    killed, kills = make_run(config, "killed"), 0
    chance = random.Random(0)
    for _ in range(40):
        if killed.read_json(killed.summary).get("status") == "finished":
            break
        process = os.fork()
        if process == 0:
            with contextlib.suppress(BaseException):
                if not killed.checkpoint_steps():
                    create(killed.root, overwrite=True).write_config(config, "pretrain")
                fit(killed, config, make_toy().task, resume=bool(killed.checkpoint_steps()))
            os._exit(0)
        time.sleep(chance.uniform(0.0, 0.15))
        if kills < 15:
            os.kill(process, signal.SIGKILL)
            kills += 1
        os.waitpid(process, 0)
    assert kills > 2
    assert same(tensors(whole, 100), tensors(killed, 100))
    assert logged(whole) == logged(killed)
    assert list(killed.checkpoints.glob(".*")) == []


def test_the_real_model_resumes_bit_equal_whatever_the_number_of_workers(make_store: Make, make_run: Make) -> None:
    blob = np.random.default_rng(0).integers(0, 255, (6, 96, 96), dtype=np.uint8)
    store = make_store({"a": blob})

    def config_with(workers: int) -> RunConfig:
        return RunConfig.model_validate(
            {
                "model": {"size": "tiny", "patch_size": 8},
                "data": {"crop_size": 64, "workers": workers, "holdout": 0.3},
                "mask": {"lattices": [4, 8]},
                "optim": {"lr": 1e-3},
                "train": {"steps": 6, "batch_size": 2, "micro_batch": 1, "device": "cpu", "log_every": 2},
            }
        )

    whole, parts = make_run(config_with(2), "whole"), make_run(config_with(0), "parts")
    fit(whole, *pretrain_task(config_with(2), store))
    stop, calls = StopRequest(), []
    config, task = pretrain_task(config_with(0), store)

    def losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        calls.append(batch)
        if len(calls) == 3 * 2:
            stop.request()
        return task.losses(model, batch)

    with pytest.raises(Interrupted):
        fit(parts, config, replace(task, losses=losses), stop=stop)
    fit(parts, *pretrain_task(config_with(0), store), resume=True)
    assert same(tensors(whole, 6), tensors(parts, 6))
    assert logged(whole) == logged(parts)
