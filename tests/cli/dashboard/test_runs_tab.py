"""The tab Runs: its table while runs come, go and change places, and the chart that compares them."""

import shutil
import time
from collections.abc import Callable

import pytest
from textual.widgets import DataTable

from affmae_cli.dashboard.panes import runs as runs_pane
from affmae_cli.dashboard.panes.runs import RunsPane
from affmae_cli.dashboard.reader import RunReader
from affmae_cli.dashboard.widgets.chart import Chart
from affmae_engine import events
from tests.cli.dashboard.conftest import Recorded, Trained
from tests.cli.dashboard.driving import Driver, drive, started, stepped

Record = Callable[..., Recorded]


def test_runs_are_listed_ordered_compared_and_switched(trained: Trained) -> None:
    async def look(driver: Driver) -> None:
        await driver.see("2 runs by age", "✔ finished")
        chart = driver.screen.query_one("#runs-chart", Chart)
        await driver.press("space", "down", "space")
        await driver.until(lambda: {trace.name for trace in chart.traces} == {"pretrain", "finetune"})
        await driver.press("n")
        await driver.see("held-out loss or IoU")
        await driver.press("o")
        await driver.see("2 runs by state")
        await driver.pilot.click("#runs-table", offset=(18, 1))
        await driver.see("2 runs by run")
        await driver.press("space")
        await driver.until(lambda: len(chart.traces) == 1)
        other = "finetune" if driver.screen.root == trained.pretrain else "pretrain"
        rows = [row.root.name for row in sorted(driver.screen.query_one("RunsPane").rows, key=lambda row: row.name)]
        await driver.press("ctrl+home", *["down"] * rows.index(other), "enter")
        await driver.until(lambda: driver.screen.root.name == other and driver.screen.tab == "overview")
        await driver.see(f"✔ finished  {other} {other}")

    drive(trained.pretrain, look, tab="runs")


def test_compared_runs_are_zoomed_over_their_own_length(record: Record) -> None:
    run = record(started(), *(stepped(i) for i in range(1, 41)))
    long = [stepped(i) for i in range(10, 10_001, 10)]
    record(started(total=10_000), *long, events.RunEnded(step=10_000, status="finished", seconds=9.0), name="long")

    async def look(driver: Driver) -> None:
        pane = driver.screen.query_one(RunsPane)
        await driver.until(lambda: driver.screen.query_one(DataTable).row_count == 2)
        await driver.press("space", "down", "space")
        chart = pane.query_one(Chart)
        await driver.until(lambda: len(chart.traces) == 2)
        for key, sees in (("plus", "steps 5k to 10k"), ("left", "steps 3.75k to 8.75k"), ("minus", "loss  smoothed")):
            await driver.press(key)
            await driver.see(sees)
        await driver.press("plus", "l", "2")
        await driver.see("loss  log axis, smoothed")
        assert "steps" not in driver.text()  # the run that is followed is seen whole
        await driver.press("plus")
        await driver.see("steps 20 to 40")
        await driver.press("7")
        await driver.see("loss  log axis, smoothed, steps 5k to 10k")
        await driver.press("0")
        assert pane.part == type(pane.part)()

    with run.run.locked():
        drive(run.root, look, tab="runs")


@pytest.fixture
def many(record: Record) -> list[Recorded]:
    """Thirty runs, the newest last; more than a table shows."""
    now = time.time()
    return [record(started(time=now - 900 + i), stepped(1, time=now - 800 + i), name=f"r{i:02d}") for i in range(30)]


def test_the_cursor_stays_on_its_run_when_runs_change_places(many: list[Recorded]) -> None:
    async def look(driver: Driver) -> None:
        pane = driver.screen.query_one(RunsPane)
        table = pane.query_one(DataTable)
        await driver.until(lambda: table.row_count == 30)
        await driver.press("down", "down")
        assert table.cursor_row == 2 and pane._under_cursor() == many[27].root
        for run in (many[0], many[1]):
            run.add(stepped(2))
        await driver.until(lambda: table.cursor_row == 4)
        assert pane._under_cursor() == many[27].root
        shutil.rmtree(many[1].root)
        await driver.until(lambda: table.row_count == 29)
        assert table.cursor_row == 3
        await driver.press("enter")
        await driver.until(lambda: driver.screen.root == many[27].root)

    drive(many[3].root, look, tab="runs", size=(100, 30))


def test_the_table_of_runs_stays_where_it_was_scrolled_to(many: list[Recorded]) -> None:
    async def look(driver: Driver) -> None:
        table = driver.screen.query_one("#runs-table", DataTable)
        await driver.until(lambda: table.row_count == 30)
        table.scroll_to(y=10, animate=False)
        await driver.until(lambda: table.scroll_y == 10)
        for run, step in ((many[0], 2), (many[1], 1_000_000)):  # a wider column is another table
            run.add(stepped(step))
            await driver.until(
                lambda step=step: any(row.step == step for row in driver.screen.query_one(RunsPane).rows)
            )
            await driver.pilot.pause(0.3)
            assert table.scroll_y == 10 and f"{many[15].root.name} " in driver.text()

    drive(many[3].root, look, tab="runs", size=(100, 30))


def test_a_table_whose_shape_stays_is_not_made_anew(many: list[Recorded], monkeypatch: pytest.MonkeyPatch) -> None:
    async def look(driver: Driver) -> None:
        table = driver.screen.query_one("#runs-table", DataTable)
        await driver.until(lambda: table.row_count == 30)
        await driver.until(lambda: any("r29" in line for line in driver.lines()))

        def refuse(columns: bool = False) -> None:
            raise AssertionError("cleared")

        monkeypatch.setattr(table, "clear", refuse)
        many[0].add(stepped(2, time=time.time() - 700))
        await driver.until(lambda: table.get_row_at(0)[2].plain == "r00")
        assert table.get_row_at(0)[4].plain == "2 of 100"

    drive(many[3].root, look, tab="runs", size=(120, 40))


def test_an_error_while_looking_at_runs_is_said_and_passes(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = record(started(), stepped(1)), record(started(), stepped(2), name="other")
    look_at, reading = runs_pane.RunsFolder.rows, RunReader.poll
    bad = {"folder"}

    def rows(folder: runs_pane.RunsFolder) -> list[runs_pane.RunRow]:
        if "folder" in bad:
            raise ValueError("a \x1b strange line")
        return look_at(folder)

    def poll(reader: RunReader, seconds: float = 0.1) -> bool:
        if reader.run.root.name in bad:
            raise ValueError("what is this")
        return reading(reader, seconds)

    monkeypatch.setattr(runs_pane.RunsFolder, "rows", rows)
    monkeypatch.setattr(RunReader, "poll", poll)

    async def look(driver: Driver) -> None:
        await driver.see("cannot look at the runs: ValueError: a \\x1b strange line", "0 runs")
        bad.clear()
        await driver.see("2 runs")
        assert "cannot look" not in driver.text()
        bad.add("other")
        await driver.press("space", "down", "space")
        await driver.see("cannot read other: ValueError: what is this")
        await driver.until(lambda: [t.name for t in driver.screen.query_one("#runs-chart", Chart).traces] == ["live"])
        bad.clear()
        await driver.until(lambda: len(driver.screen.query_one("#runs-chart", Chart).traces) == 2)
        assert other.root.exists() and "cannot read" not in driver.text()

    drive(run.root, look, tab="runs", size=(120, 40))
