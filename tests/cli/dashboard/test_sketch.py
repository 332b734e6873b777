"""A long run is drawn before it is read: the sketch has its shape and newest figures, and gives way to the whole."""

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from affmae_cli.dashboard import reader as reading
from affmae_cli.dashboard.app import DashboardApp, settled
from affmae_cli.dashboard.reader import RunReader
from affmae_cli.dashboard.sketch import sketch
from affmae_cli.dashboard.view import Viewer
from affmae_cli.dashboard.widgets.chart import Chart
from affmae_engine import events
from tests.cli.dashboard.conftest import Recorded
from tests.cli.dashboard.driving import Driver, sampled, started, stepped

STEPS = 100_000
Record = Callable[..., Recorded]


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of many steps whose loss is 1 - step/STEPS, with samples of the machine, and an end."""
    root = tmp_path_factory.mktemp("runs") / "long"
    root.mkdir()
    step, sample = events.to_line(stepped(123456789, loss=0.125)) + "\n", events.to_line(sampled()) + "\n"
    with (root / "metrics.jsonl").open("w") as file:
        file.write(events.to_line(started(total=STEPS)) + "\n")
        for number in range(1, STEPS + 1):
            file.write(step.replace("123456789", str(number)).replace("0.125", f"{1 - number / STEPS:.6f}"))
            if number % 100 == 0:
                file.write(sample)
        file.write(events.to_line(events.RunEnded(step=STEPS, status="finished", seconds=75.0)) + "\n")
    return root


def test_a_sketch_has_the_shape_and_the_newest_figures(long_run: Path) -> None:
    begun = time.process_time()
    state = sketch(long_run, long_run / "metrics.jsonl")
    assert time.process_time() - begun < 2.0  # measured: 0.1
    assert state.total_steps == STEPS and state.latest is not None and state.latest.step == STEPS
    assert state.ended is not None and state.ended.status == "finished"
    curve = state.steps.curve("losses.loss", points=2048)
    assert curve.x_N[0] < 10 and curve.x_N[-1] > STEPS - 10
    assert max(curve.x_N[1:] - curve.x_N[:-1]) < STEPS / 200
    assert abs(curve.mean_N - (1 - curve.x_N / STEPS)).max() < 0.01
    assert state.system is not None


def test_an_opened_run_is_sketched_until_it_is_read(long_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "SKETCHED_FROM", 1 << 20)
    reader = RunReader(long_run)
    viewer = Viewer(reader)
    assert not viewer.view(None, 0.0).drawable
    reader.poll(0.0)
    first = viewer.view(None, 0.0)
    assert first.opening and first.drawable and first.step == STEPS and len(first.steps["losses.loss"]) > 400
    assert first.status.text == "reading the run: 0%, curves are a sketch until then"
    reader.poll(0.0)
    assert "reading the run: 3%" in viewer.view(None, 0.0).status.text or reader.share_read > 0.02
    while reader.behind:
        reader.poll()
    whole = viewer.view(None, 0.0)
    assert not whole.opening and whole.drawable and whole.status.kind == "finished"
    assert len(reader.state.steps) == STEPS and reader.shown is reader.state


def test_the_screen_draws_the_sketch_and_says_so(long_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "SKETCHED_FROM", 1 << 20)
    go_on, poll = threading.Event(), RunReader.poll

    def held(reader: RunReader, seconds: float = 0.1) -> bool:
        if reader.shown is not None:  # the sketch is made: hold the rest back until it was seen
            go_on.wait(20)
        return poll(reader, seconds)

    monkeypatch.setattr(RunReader, "poll", held)
    app = DashboardApp(long_run)

    async def look() -> None:
        async with app.run_test(size=(120, 40)) as pilot:
            driver = Driver(app, pilot)
            try:
                await driver.see("curves are a sketch until then", f"step {STEPS:,} of {STEPS:,}")
                assert driver.screen.query_one("#pane-overview").query_one(Chart).traces
                assert not driver.screen.read_whole
            finally:
                go_on.set()
            await settled(pilot)
            await driver.see("✔ finished")
            assert "sketch" not in driver.text()

    asyncio.run(look())


def test_a_file_that_is_replaced_while_it_is_opened_is_sketched_anew(
    long_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "SKETCHED_FROM", 1 << 20)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes((long_run / "metrics.jsonl").read_bytes())
    reader = RunReader(tmp_path)
    reader.poll(0.0)
    reader.poll(0.0)
    metrics.write_text(events.to_line(started(total=9)) + "\n" + events.to_line(stepped(3)) + "\n")
    while reader.behind:
        reader.poll()
    assert reader.state.step == 3 and reader.shown is reader.state and len(reader.state.steps) == 1


def test_damage_and_nothing_are_sketched_too(record: Record) -> None:
    run = record(started())
    run.add_bytes(b"\x00\xff{" * 200_000 + b"\n" + f"{events.to_line(stepped(7))}\n".encode())
    assert sketch(run.root, run.run.metrics).step == 7
    run.run.metrics.unlink()
    assert sketch(run.root, run.run.metrics).latest is None
