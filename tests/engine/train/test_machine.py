"""What a machine does to a run while it trains: folders that vanish, data that changes, clocks that jump."""

import errno
import os
import random
import shutil
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from affmae_engine import checkpoint, events
from affmae_engine.config import RunConfig
from affmae_engine.errors import AffmaeError, CorruptError, ResourceError
from affmae_engine.run_dir import RunDir
from affmae_engine.train.metrics import Stopwatch
from affmae_engine.train.pretraining import PretrainTask
from tests.engine.train.fitting import fit

Make = Callable[..., object]


def at_step(step: int, action: Callable[[], object]) -> Callable[[events.Event], None]:
    """A sink that does something when that step is logged."""
    return lambda event: action() if isinstance(event, events.StepLogged) and event.step == step else None


def test_a_run_folder_that_vanishes_ends_the_run_with_its_reason(
    make_toy: Make, make_config: Make, make_run: Make
) -> None:
    config = make_config(steps=50, log_every=1, eval_every=0, checkpoint_every=1)
    run = make_run(config)
    elsewhere = run.root.with_name("unmounted")
    with pytest.raises(ResourceError, match=r"cannot write .*: its folder does not exist") as caught:
        fit(run, config, make_toy().task, sinks=[at_step(4, lambda: run.root.rename(elsewhere))])
    assert caught.value.exit_code == 4
    moved = RunDir(elsewhere)
    assert moved.checkpoint_steps()[0] in (2, 3), "3 may have been under way"
    checkpoint.verify(moved.checkpoint(moved.checkpoint_steps()[0]))
    found = [events.from_line(line) for line in moved.metrics.read_text().splitlines()]
    warned = [event.message for event in found if isinstance(event, events.Warned)]
    assert sum(message.startswith("no checkpoint of step") for message in warned) == 2
    assert fit(moved, config, make_toy().task, resume=True).status == "finished"


def test_a_folder_that_cannot_be_written_for_a_while_costs_checkpoints_not_the_run(
    make_toy: Make, make_config: Make, make_run: Make
) -> None:
    config = make_config(steps=9, log_every=1, eval_every=0, checkpoint_every=1, keep_checkpoints=9)
    run = make_run(config)
    aside = run.root / "aside"

    def block() -> None:
        run.checkpoints.rename(aside)
        run.checkpoints.touch()  # a file where the folder was

    def clear() -> None:
        time.sleep(0.5)  # step 4's checkpoint is tried meanwhile
        run.checkpoints.unlink()
        aside.rename(run.checkpoints)

    summary = fit(run, config, make_toy().task, sinks=[at_step(4, block), at_step(5, clear)])
    assert summary.status == "finished" and run.checkpoint_steps()[0] == 9
    assert 4 not in run.checkpoint_steps()


@pytest.mark.parametrize("damage", ["flip", "delete"])
def test_data_that_changes_under_the_run_is_never_trained_on(damage: str, make_store: Make, make_run: Make) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (6, 96, 96), dtype=np.uint8)
    config = RunConfig.model_validate(
        {
            "model": {"size": "tiny"},
            "data": {"crop_size": 64, "workers": 0, "holdout": 0.3},
            "mask": {"lattices": [4]},
            "train": {"steps": 99, "batch_size": 2, "device": "cpu", "log_every": 1, "checkpoint_every": 2},
        }
    )
    store = make_store({"a": noise})
    shards = [file for file in (store.path / "images").rglob("*") if file.is_file() and file.name != "zarr.json"]
    assert shards

    def spoil() -> None:
        for shard in shards:
            if damage == "delete":
                shard.unlink()
            else:
                data = bytearray(shard.read_bytes())
                for position in range(0, len(data) - 200, 50):
                    data[position] ^= 0x10
                shard.write_bytes(bytes(data))

    task = PretrainTask(config, store)
    config = task.config
    run = make_run(config)
    with pytest.raises(CorruptError, match=r"image 'a'") as caught:
        fit(run, config, task, sinks=[at_step(5, spoil)])
    assert caught.value.exit_code == 6 and "(section " in caught.value.message
    assert run.checkpoint_steps()[0] == 4
    assert run.read_json(run.summary)["status"] == "failed"


def test_jumps_of_the_wall_clock_change_no_duration(
    make_toy: Make, make_config: Make, make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: chance.uniform(-1e6, 2e9))
    config = make_config(log_every=1)
    run = make_run(config)
    seen: list[events.Event] = []
    summary = fit(run, config, make_toy().task, sinks=[seen.append])
    steps = [event for event in seen if isinstance(event, events.StepLogged)]
    assert 0 < summary.seconds < 60
    assert all(0 < event.step_s < 60 and 0 <= event.eta_s < 600 and 0 <= event.data_wait <= 1 for event in steps)
    assert all(0 <= event.seconds < 60 for event in seen if isinstance(event, events.CheckpointSaved))
    assert Stopwatch().started <= time.monotonic()


def test_the_newest_checkpoint_is_by_step_whatever_the_file_times(
    make_toy: Make, make_config: Make, make_run: Make
) -> None:
    config = make_config(steps=6, checkpoint_every=2, keep_checkpoints=9)
    run = make_run(config)
    fit(run, config, make_toy().task)
    for step, when in ((2, 4e9), (4, 1e9), (6, 0)):
        for file in [run.checkpoint(step), *run.checkpoint(step).iterdir()]:
            os.utime(file, (when, when))
    found = checkpoint.newest_valid(run, lambda message: None)
    assert found is not None and found.step == 6
    shutil.rmtree(run.checkpoint(6))
    seen: list[events.Event] = []
    fit(run, config, make_toy().task, resume=True, sinks=[seen.append])
    assert isinstance(seen[0], events.RunStarted) and seen[0].step == 4


def test_a_failing_evaluation_leaves_the_run_resumable(make_toy: Make, make_config: Make, make_run: Make) -> None:
    config = make_config(steps=6)
    run, toy = make_run(config), make_toy()
    out_of_memory = torch.OutOfMemoryError("Tried to allocate")

    def evaluate(model: torch.nn.Module, device: torch.device) -> None:
        raise out_of_memory

    toy.task.evaluate = evaluate
    with pytest.raises(AffmaeError, match="out of memory at step 3"):
        fit(run, config, toy.task)
    assert run.read_json(run.summary)["status"] == "failed"


def test_a_file_that_the_system_refuses_is_told_in_words(make_toy: Make, make_config: Make, make_run: Make) -> None:
    config = make_config(steps=6)
    run, toy = make_run(config), make_toy()

    def evaluate(model: torch.nn.Module, device: torch.device) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "labels/a.tif")

    toy.task.evaluate = evaluate
    with pytest.raises(PermissionError):
        fit(run, config, toy.task)
    assert run.read_json(run.summary)["message"] == "cannot use labels/a.tif: permission was denied"
    assert "Traceback" in run.log.read_text()
