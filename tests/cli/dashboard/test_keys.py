"""Every key: requests to the trainer, pausing, charts, full screen, copying, themes, palette, help."""

from collections.abc import Callable

import pytest

from affmae_cli.dashboard.chart import Chart
from affmae_cli.dashboard.dialogs import FullScreen, HelpScreen
from affmae_cli.dashboard.pictures import PictureGrid
from affmae_cli.dashboard.plot import ChartView
from affmae_cli.dashboard.run_screen import TABS, RunScreen
from affmae_engine import events
from tests.cli.dashboard.conftest import Recorded, Trained
from tests.cli.dashboard.driving import Driver, drive, started, stepped


def test_a_checkpoint_and_a_stop_are_asked_for_acknowledged_and_met(live: Recorded) -> None:
    async def do(driver: Driver) -> None:
        await driver.press("c")
        assert (live.run.control / "checkpoint").exists()
        await driver.see("checkpoint requested, not yet seen")
        (live.run.control / "checkpoint").unlink()
        live.add(events.RequestTaken(step=41, request="checkpoint"))
        await driver.see("checkpoint acknowledged")
        live.add(events.CheckpointSaved(step=41, path="checkpoints/step-000041", seconds=0.2))
        await driver.until(lambda: "acknowledged" not in driver.text())
        await driver.press("s")
        await driver.see("Stop live?", "Stop after a checkpoint", "Esc  cancel")
        await driver.press("escape")
        assert not (live.run.control / "stop").exists() and isinstance(driver.app.screen, RunScreen)
        await driver.press("s", "s")
        await driver.until((live.run.control / "stop").exists)
        await driver.see("stop requested")

    drive(live.root, do, size=(80, 24))


def test_a_run_that_ended_takes_no_requests(record: Callable[..., Recorded]) -> None:
    run = record(started(), stepped(40), events.RunEnded(step=40, status="stopped", seconds=1.0))

    async def do(driver: Driver) -> None:
        await driver.press("c", "s")
        assert isinstance(driver.app.screen, RunScreen) and not list(run.run.control.iterdir())
        assert "Checkpoint" not in driver.lines()[-1]

    drive(run.root, do)


def test_a_request_that_cannot_be_written_is_said(live: Recorded) -> None:
    live.run.control.rmdir()
    live.run.control.write_text("in the way")

    async def do(driver: Driver) -> None:
        await driver.press("c")
        await driver.see("cannot write")

    drive(live.root, do)


def test_a_paused_display_stands_still(live: Recorded) -> None:
    async def do(driver: Driver) -> None:
        await driver.press("p")
        await driver.see("display paused, p resumes it")
        live.add(stepped(41, loss=0.123))
        await driver.until(lambda: driver.screen.model.step == 41)
        assert "step 40 of 100" in driver.text() and "step 41 of 100" not in driver.text()
        await driver.press("p")
        await driver.see("step 41 of 100")

    drive(live.root, do)


@pytest.mark.slow
def test_after_switching_requests_reach_the_run_that_is_shown(live: Recorded, record: Callable[..., Recorded]) -> None:
    other = record(started(), stepped(7), name="other")
    live.run.log.write_text("words of the first run\n")

    async def do(driver: Driver) -> None:
        for number in range(1, 7):
            await driver.press(str(number))
        await driver.press("p")
        await driver.switch("other")
        await driver.see("step 7 of 100")
        assert "paused" not in driver.text()
        for number in range(1, 7):
            await driver.press(str(number))
            assert not any(text in driver.text() for text in ("step 40 of", "words of the first"))
        await driver.press("y", "c")
        assert driver.app.clipboard == str(other.root) and (other.run.control / "checkpoint").exists()

    with other.run.locked():
        drive(live.root, do)
    assert not list(live.run.control.iterdir())


def test_one_view_for_all_charts(live: Recorded) -> None:
    async def do(driver: Driver) -> None:
        chart = driver.screen.query_one("#overview-chart", Chart)
        for key, sees in (
            ("l", "loss  (log axis)"),
            ("plus", "steps 20 to 40"),
            ("left", "step 40"),
            ("left", "step 40"),
        ):
            await driver.press(key)
            await driver.see(sees)
        assert chart.view.cursor is not None and chart.view.cursor < 40
        await driver.press("m")
        assert not chart.view.smoothing
        # The charts of Metrics have the same zoom and cursor.
        await driver.press("2")
        charts = list(driver.screen.pane.query(Chart))
        await driver.until(lambda: all(c.curves for c in driver.screen.pane.query(Chart)))
        assert len(charts) > 3
        await driver.press("right")
        await driver.until(
            lambda: {c.view for c in driver.screen.query(Chart) if c.spec.x_name == "step"} == {chart.view}
        )
        await driver.press("minus", "0")
        await driver.until(lambda: chart.view == ChartView(log=True, smoothing=False))

    drive(live.root, do)


def test_the_cursor_of_the_mouse_is_on_every_chart(live: Recorded) -> None:
    async def do(driver: Driver) -> None:
        charts = list(driver.screen.pane.query(Chart))
        await driver.pilot.hover(charts[0], offset=(30, 3))
        await driver.until(lambda: all(chart.view.cursor is not None for chart in charts))
        assert len({chart.view.cursor for chart in charts}) == 1

    drive(live.root, do, tab="metrics")


def test_metrics_are_filtered(live: Recorded) -> None:
    async def do(driver: Driver) -> None:
        await driver.press("slash", *"grad|rate")
        await driver.until(lambda: {c.spec.key for c in driver.screen.pane.query(Chart)} == {"lr", "grad_norm"})
        await driver.press("enter")
        assert isinstance(driver.screen.focused, Chart)
        await driver.press("slash", "escape")
        await driver.until(lambda: len(driver.screen.pane.query(Chart)) > 3)
        await driver.press("slash", *"[")  # no regular expression: nothing has this text
        await driver.until(lambda: not driver.screen.pane.query(Chart))

    drive(live.root, do, tab="metrics")


def test_a_chart_and_a_picture_fill_the_screen(trained: Trained) -> None:
    async def do(driver: Driver) -> None:
        await driver.press("enter")
        assert isinstance(driver.app.screen, FullScreen)
        whole = driver.app.screen.query_one(Chart)
        await driver.until(lambda: whole.size.width >= 118 and whole.size.height >= 30)
        await driver.see("held-out")
        await driver.press("l")
        await driver.until(lambda: whole.view.log)
        await driver.press("escape")
        assert isinstance(driver.app.screen, RunScreen)
        await driver.press("3", "enter")
        picture = driver.app.screen.query_one(PictureGrid)
        await driver.until(lambda: picture.size.height >= 30 and picture.shown)
        await driver.see("masked", "reconstruction", "▀▀▀")

    drive(trained.pretrain, do)


@pytest.mark.slow
def test_tabs_by_number_and_by_mouse(live: Recorded) -> None:
    async def do(driver: Driver) -> None:
        for number, name in enumerate(TABS, 1):
            await driver.press(str(number))
            assert driver.screen.tab == name
        await driver.press("1", "r")
        assert driver.screen.tab == "runs"
        await driver.pilot.click("#--content-tab-metrics")
        await driver.until(lambda: driver.screen.tab == "metrics")

    drive(live.root, do)


def test_the_footer_has_the_keys_of_the_tab(live: Recorded) -> None:
    async def do(driver: Driver) -> None:
        for tab, keys in {
            "2": ("Filter", "Zoom"),
            "3": ("Time", "Image"),
            "5": ("Search",),
            "7": ("Compare", "Pin"),
        }.items():
            await driver.press(tab)
            await driver.until(lambda keys=keys: all(key in driver.lines()[-1] for key in (*keys, "Quit", "Help")))

    drive(live.root, do, size=(160, 48))


def test_the_path_is_copied_and_themes_change(live: Recorded) -> None:
    async def do(driver: Driver) -> None:
        await driver.press("y")
        assert driver.app.clipboard == str(live.root)
        await driver.see("copied:")
        await driver.press("t")
        assert not driver.app.current_theme.dark
        await driver.press("t")
        assert driver.app.current_theme.dark

    drive(live.root, do)


def test_the_command_palette_opens_a_tab(live: Recorded) -> None:
    async def do(driver: Driver) -> None:
        await driver.press("ctrl+p", *"tab system")
        await driver.see("Tab System")
        await driver.press("down", "enter")
        await driver.until(lambda: isinstance(driver.app.screen, RunScreen) and driver.screen.tab == "system")

    drive(live.root, do)


def test_help_names_every_key(live: Recorded) -> None:
    async def do(driver: Driver) -> None:
        await driver.press("question_mark")
        assert isinstance(driver.app.screen, HelpScreen)
        await driver.see(
            "Ask the trainer for a checkpoint", "Logarithmic or linear axis", "Dark or light", "Keep the run on top"
        )
        await driver.press("escape")
        assert isinstance(driver.app.screen, RunScreen)

    drive(live.root, do, size=(120, 60))


@pytest.mark.slow
def test_the_log_is_searched_and_stays_put_while_scrolled_up(live: Recorded) -> None:
    lines = [f"line {n:03d}" + (" needle" if n in (20, 120) else "") for n in range(200)]
    live.run.log.write_text("\n".join(lines) + "\n")

    async def do(driver: Driver) -> None:
        await driver.see("line 199")
        live.run.log.write_text("\n".join([*lines, "line 200"]) + "\n")
        await driver.see("line 200")  # the end is followed
        await driver.press("slash", *"needle", "enter")
        await driver.see("line 120 needle")
        await driver.press("N")
        await driver.see("line 020 needle")
        top = driver.lines()[4]
        live.run.log.write_text("\n".join([*lines, "line 200", "line 201"]) + "\n")
        await driver.pilot.pause(0.8)
        assert driver.lines()[4] == top and "line 201" not in driver.text()
        await driver.press("n", "end")
        await driver.see("line 201")
        await driver.press("1", "5")  # a second visit shows whole lines
        await driver.see("line 201")

    drive(live.root, do, tab="log")
