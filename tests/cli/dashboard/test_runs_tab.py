"""The tab Runs: its table while runs come, go and change places; comparing, filtering, pinning, opening."""

import shutil
import time
from collections.abc import Callable

import pytest
from textual.widgets import DataTable

from affmae_cli.dashboard.chart import Chart
from affmae_cli.dashboard.panes.runs import RunsPane
from affmae_cli.dashboard.run_model import RunModel
from affmae_cli.dashboard.runs import RunsFolder
from affmae_engine import events
from tests.cli.dashboard.conftest import Recorded, Trained
from tests.cli.dashboard.driving import Driver, drive, started, stepped

Record = Callable[..., Recorded]


@pytest.mark.slow
def test_runs_are_listed_sorted_compared_and_opened(trained: Trained) -> None:
    async def look(driver: Driver) -> None:
        await driver.see("2 of 2 runs, sorted by age", "✔ finished", "demo", "pretrain")
        chart = driver.screen.pane.query_one(Chart)
        await driver.until(lambda: chart.curves)  # of the run under the cursor, before any is marked
        await driver.press("space", "down", "space")
        await driver.until(lambda: {curve.name for curve in chart.curves} >= {"pretrain", "finetune"})
        await driver.see("settings of", "train.steps")
        titles = []
        for _ in range(6):
            await driver.press("n")
            titles.append(chart.spec.title)
        assert len(set(titles)) == 6 and not any("IoU" in title and "loss" in title for title in titles)
        await driver.press("o")
        await driver.see("sorted by state")
        await driver.press("slash", *"finetune$|^nothing", "enter")
        await driver.press("slash", "escape")
        await driver.press("slash", *"demo.*em", "enter")
        await driver.until(lambda: "of 2 runs" in driver.text())
        await driver.press("slash", "escape")
        await driver.see("2 of 2 runs")
        pane = driver.screen.query_one(RunsPane)
        other = trained.pretrain if driver.screen.root == trained.finetune else trained.finetune
        await driver.press("ctrl+home", *["down"] * pane._listed.index(other), "enter")
        await driver.until(lambda: driver.screen.root == other and driver.screen.tab == "overview")

    drive(trained.pretrain, look, tab="runs", size=(200, 60))


@pytest.fixture
def many(record: Record) -> list[Recorded]:
    """Thirty runs, the newest last; more than a table shows."""
    now = time.time()
    return [record(started(time=now - 900 + i), stepped(1, time=now - 800 + i), name=f"r{i:02d}") for i in range(30)]


def test_the_cursor_stays_on_its_run_when_runs_change_places(many: list[Recorded]) -> None:
    async def look(driver: Driver) -> None:
        table = driver.screen.query_one(DataTable)
        await driver.until(lambda: table.row_count == 30)
        await driver.press("down", "down")
        assert table.cursor_row == 2
        for run in (many[0], many[1]):
            run.add(stepped(2))
        await driver.until(lambda: table.cursor_row == 4)
        shutil.rmtree(many[1].root)
        await driver.until(lambda: table.row_count == 29)
        assert table.cursor_row == 3
        await driver.press("enter")
        await driver.until(lambda: driver.screen.root == many[27].root)

    drive(many[3].root, look, tab="runs", size=(100, 30))


def test_a_pinned_run_stays_on_top(many: list[Recorded]) -> None:
    async def look(driver: Driver) -> None:
        table = driver.screen.query_one(DataTable)
        await driver.until(lambda: table.row_count == 30)
        await driver.press("down", "down", "down", "f")
        await driver.until(lambda: "r26" in table.get_row_at(0)[2].plain)
        many[0].add(stepped(2))
        await driver.until(lambda: "r00" in table.get_row_at(1)[2].plain)

    drive(many[3].root, look, tab="runs", size=(120, 40))


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 60)])
def test_the_table_fits_every_width(record: Record, size: tuple[int, int]) -> None:
    run = record(started(), stepped(1), name="a-name-that-is-much-too-long-for-any-table-" + "x" * 100)

    async def look(driver: Driver) -> None:
        await driver.see("best loss", "best IoU", "pretrain", "a-name")
        assert driver.screen.query_one(DataTable).virtual_size.width <= size[0]

    drive(run.root, look, tab="runs", size=size)


def test_an_error_while_reading_runs_is_said_and_passes(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record(started(), stepped(1))
    record(started(), stepped(2), name="other")
    reading, bad = RunsFolder.runs, {"folder"}

    def runs(folder: RunsFolder) -> list[RunModel]:
        if bad:
            raise ValueError("a \x1b strange line")
        return reading(folder)

    monkeypatch.setattr(RunsFolder, "runs", runs)

    async def look(driver: Driver) -> None:
        await driver.see("cannot read the runs: ValueError: a \\x1b strange line")
        bad.clear()
        await driver.see("2 of 2 runs")
        assert "cannot read" not in driver.text()

    drive(run.root, look, tab="runs", size=(120, 40))


def test_of_a_run_that_ended_the_age_grows(record: Record) -> None:
    run = record(started(), stepped(1), events.RunEnded(step=1, status="finished", seconds=1.0))
    model = RunsFolder(run.root.parent).runs()[0]
    model.now = lambda: model.last_time + 3600.0

    from affmae_cli.dashboard.runs import COLUMNS

    assert COLUMNS[-1].text(model) == "1h00m"
