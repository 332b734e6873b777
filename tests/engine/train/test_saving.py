"""Checkpoints are written beside the training: it goes on, and what is written is the moment of the copy."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from affmae_engine import checkpoint, events
from affmae_engine.run_dir import RunDir
from affmae_engine.train.state import Snapshot
from tests.engine.train.fitting import fit

Make = Callable[..., object]


class Slow:
    """Writing waits until step `until` is under way. `problems`: it waited in vain, or two were written at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, until: int) -> None:
        self.steps, self.until = 0, until
        self.reached, self.busy = threading.Event(), threading.Lock()
        self.problems: list[str] = []
        self.real = Snapshot.write
        monkeypatch.setattr(Snapshot, "write", lambda snapshot, run: self.write(snapshot, run))

    def step(self, batch: object) -> None:
        self.steps += 1
        if self.steps == self.until:
            self.reached.set()

    def write(self, snapshot: Snapshot, run: RunDir) -> Path:
        if not self.busy.acquire(blocking=False):
            self.problems.append("two at once")
        if not self.reached.wait(30):
            self.problems.append("the training waited for the disk")
        path = self.real(snapshot, run)
        self.busy.release()
        return path


def recorded(run: RunDir) -> list[events.Event]:
    return [event for text in run.metrics.read_text().splitlines() if (event := events.from_line(text)) is not None]


def test_training_goes_on_and_the_copy_is_of_its_moment(
    make_toy: Make, make_config: Make, make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(steps=9, checkpoint_every=3, keep_checkpoints=9, eval_every=0)
    reference, run = make_run(config, "reference"), make_run(config, "run")
    fit(reference, config, make_toy().task)
    slow = Slow(monkeypatch, until=6)
    fit(run, config, make_toy(before=slow.step).task)
    assert slow.problems == []
    for step in (3, 6, 9):
        a, b = (checkpoint.Checkpoint(one.checkpoint(step), step) for one in (reference, run))
        for kind in ("weights", "optimizer"):
            x, y = getattr(a, kind)(), getattr(b, kind)()
            assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
        assert a.state() == b.state()
    saved = [event for event in recorded(run) if isinstance(event, events.CheckpointSaved)]
    assert [event.step for event in saved] == [3, 6, 9]
    assert all(event.stall_s <= event.seconds for event in saved[:1])


def test_a_checkpoint_under_way_is_finished_when_the_run_fails(
    make_toy: Make, make_config: Make, make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(steps=9, checkpoint_every=3, eval_every=0)
    run, slow = make_run(config), Slow(monkeypatch, until=5)

    def fail(batch: object) -> None:
        slow.step(batch)
        if slow.steps == 5:
            raise RuntimeError("a fault of the model")

    with pytest.raises(RuntimeError, match="fault of the model"):
        fit(run, config, make_toy(before=fail).task)
    assert run.checkpoint_steps() == [3] and slow.problems == []
    assert [event.kind for event in recorded(run)[-2:]] == ["checkpoint", "run_ended"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_minutes_bring_checkpoints_too(make_toy: Make, make_config: Make, make_run: Make) -> None:
    for minutes, expected in ((1e-9, [6, 5, 4, 3, 2, 1]), (60, [6]), (0, [6])):
        config = make_config(steps=6, checkpoint_every=0, eval_every=0, checkpoint_minutes=minutes, keep_checkpoints=9)
        run = make_run(config, f"run{minutes}")
        fit(run, config, make_toy().task)
        assert run.checkpoint_steps() == expected
