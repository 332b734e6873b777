"""Alerts: told once, only for what happens while one watches, by the bell, the desktop and the user's command."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from affmae_cli.dashboard.alerts import Alerts, escape_sequences, run_command
from affmae_engine import events
from tests.cli.dashboard.conftest import Recorded
from tests.cli.dashboard.driving import Driver, drive, started, stepped
from tests.cli.dashboard.test_run_model import RunModel, ended, known, step, take
from tests.cli.dashboard.test_run_model import started as begun


def watched(model: RunModel, kind: str = "running") -> RunModel:
    from affmae_cli.dashboard.status import Status

    model.opening, model.status = False, Status(kind, kind)  # type: ignore[arg-type]
    return model


def test_what_had_happened_before_is_not_told() -> None:
    alerts = Alerts()
    model = watched(known(begun(), step(1), ended("finished")), "finished")
    assert alerts.of(model) == [] and alerts.of(model) == []


@pytest.mark.parametrize("kind", ["finished", "failed", "gone", "stopped", "stalled"])
def test_an_end_or_a_stall_is_told_once(kind: str) -> None:
    alerts, model = Alerts(), known(begun(), step(1))
    assert alerts.of(watched(model)) == []
    (text,) = alerts.of(watched(model, kind))
    assert "r " in text and kind in text
    assert alerts.of(model) == []
    assert alerts.of(watched(model)) == [] and len(alerts.of(watched(model, kind))) == 1  # again, after it went on


def test_divergence_and_skipped_steps_are_told() -> None:
    alerts, model = Alerts(), known(begun(), *(step(n, loss=2 - n / 100) for n in range(1, 100)))
    assert alerts.of(watched(model)) == []
    take(model, *(step(n, loss=5.0) for n in range(100, 140)))
    assert "diverges" in alerts.of(model)[0]
    skipped = step(140, loss=5.0)
    take(model, replace(skipped, skipped=3))
    assert alerts.of(model) == ["r: 3 steps with a loss or gradient that is not finite"]


def test_escape_sequences_hold_no_control_characters_of_the_message() -> None:
    said = escape_sequences("a\x1b]0;evil\x07b")
    assert said.count("\x1b") == 2 and said.count("\x07") == 2 and "a]0,evilb" in said


def test_the_command_gets_the_message_as_its_last_argument(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert (
        run_command(["sh", "-c", f'printf %s "$1" > {out}.part; mv {out}.part {out}', "sh"], "two words; $HOME") == ""
    )
    end = time.monotonic() + 10
    while not out.exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    assert out.read_text() == "two words; $HOME"
    assert "no-such-program" in run_command(["no-such-program"], "x")


def test_a_run_that_finishes_while_watched_starts_the_command(record: Callable[..., Recorded], tmp_path: Path) -> None:
    run, out = record(started(), stepped(99)), tmp_path / "told"

    async def do(driver: Driver) -> None:
        await driver.pilot.pause(0.7)
        assert not out.exists()
        run.add(events.RunEnded(step=100, status="finished", seconds=5.0))
        await driver.until(out.exists)
        await driver.see("live finished")

    with run.run.locked():
        drive(run.root, do, notify=["sh", "-c", f'printf %s "$1" > {out}', "sh"])
