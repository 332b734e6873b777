"""Every key: requests to the trainer, pausing, charts, copying, themes, help, and the ways to leave."""

from collections.abc import Callable

import pytest

from affmae_cli.dashboard.messages import RunChosen
from affmae_cli.dashboard.panes.curves import CurvesPane
from affmae_cli.dashboard.screens.help import HelpScreen
from affmae_cli.dashboard.screens.run import TABS, RunScreen
from affmae_cli.dashboard.widgets.status_line import StatusLine
from affmae_engine import events
from tests.cli.dashboard.conftest import Recorded
from tests.cli.dashboard.driving import SIZES, Driver, drive, started, stepped


def test_what_was_requested_elsewhere_is_said(live: Recorded) -> None:
    async def do(driver: Driver) -> None:
        assert not driver.screen.query_one(StatusLine).asked
        (live.run.control / "stop").touch()
        await driver.see("stop requested, not yet seen by the trainer")
        (live.run.control / "stop").unlink()
        await driver.until(lambda: not driver.screen.query_one(StatusLine).asked)

    drive(live.root, do)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_a_checkpoint_and_a_stop_are_asked_for_acknowledged_and_met(live: Recorded, size: tuple[int, int]) -> None:
    async def do(driver: Driver) -> None:
        await driver.press("c")
        assert (live.run.control / "checkpoint").exists()
        await driver.see("checkpoint requested, not yet seen")
        (live.run.control / "checkpoint").unlink()
        live.add(events.RequestTaken(step=41, request="checkpoint"))
        await driver.see("checkpoint acknowledged", "asked to save a checkpoint")
        live.add(events.CheckpointSaved(step=41, path="checkpoints/step-000041", seconds=0.2))
        await driver.until(lambda: not driver.screen.query_one(StatusLine).asked)
        await driver.press("s")
        await driver.see("Stop live?", "Stop after a checkpoint", "Esc  cancel")
        await driver.press("escape")
        assert not (live.run.control / "stop").exists() and isinstance(driver.app.screen, RunScreen)
        await driver.press("s", "s")
        await driver.until((live.run.control / "stop").exists)
        await driver.see("stop requested")

    drive(live.root, do, size=size)


def test_a_run_that_ended_takes_no_requests(record: Callable[..., Recorded]) -> None:
    run = record(started(), stepped(40), events.RunEnded(step=40, status="stopped", seconds=1.0))

    async def do(driver: Driver) -> None:
        await driver.press("c", "s")
        assert isinstance(driver.app.screen, RunScreen) and not list(run.run.control.iterdir())

    drive(run.root, do)


def test_a_request_that_cannot_be_written_is_said(live: Recorded) -> None:
    live.run.control.rmdir()
    live.run.control.write_text("in the way")

    async def do(driver: Driver) -> None:
        await driver.press("c")
        await driver.see("cannot write")

    drive(live.root, do)


def test_a_paused_view_stands_still(live: Recorded) -> None:
    async def do(driver: Driver) -> None:
        await driver.press("p")
        await driver.see("view paused, p goes on")
        live.add(stepped(41, loss=0.123))
        await driver.until(lambda: driver.screen._newest.step == 41)
        assert "step 40 of 100" in driver.text() and "step 41 of 100" not in driver.text()
        await driver.press("p")
        await driver.see("step 41 of 100")

    drive(live.root, do)


def test_what_was_written_while_the_view_stood_still_is_shown_afterwards(live: Recorded) -> None:
    live.run.log.write_text("one\n")

    async def do(driver: Driver) -> None:
        await driver.see("one")
        await driver.press("p")
        live.run.log.write_text("one\nlast words\n")
        live.run.config.write_text("[train]\nsteps = 321\n")
        await driver.until(lambda: driver.screen._text is not None and "321" in driver.screen._text.config)
        assert "last words" not in driver.text()
        await driver.press("p")
        await driver.see("last words")
        await driver.press("6")
        await driver.see("steps  321")

    drive(live.root, do, tab="log")


def test_switching_ends_the_pause_and_shows_nothing_of_the_run_before(
    live: Recorded, record: Callable[..., Recorded]
) -> None:
    other = record(name="other")
    live.run.log.write_text("words of the first run\n")
    live.run.config.write_text("[train]\nsteps = 321\n")

    async def do(driver: Driver) -> None:
        for number in range(1, 7):
            await driver.press(str(number))
        await driver.press("p")
        driver.screen._follow = lambda root: None  # type: ignore[method-assign]  # as long as nothing of it was read
        driver.screen.post_message(RunChosen(other.root))
        await driver.see("◌ waiting  run other", "reading the run")
        assert not driver.screen.paused and "view paused" not in driver.text()
        for number, sees in zip(
            range(1, 7), ("no step yet", "waiting for", "no preview", "no sample", "log", ""), strict=True
        ):
            await driver.press(str(number))
            await driver.see(sees)
            assert not any(text in driver.text() for text in ("step 40", "812", "words of", "321", "NVIDIA", "live"))
        await driver.press("c", "s")
        assert isinstance(driver.app.screen, RunScreen) and not list(other.run.control.iterdir())

    drive(live.root, do)


def test_after_switching_requests_reach_the_run_that_is_shown(live: Recorded, record: Callable[..., Recorded]) -> None:
    other = record(started(), stepped(7), name="other")

    async def do(driver: Driver) -> None:
        await driver.press("p")
        await driver.switch("other")
        await driver.see("step 7 of 100")
        await driver.press("y", "c")
        assert driver.app.clipboard == str(other.root) and (other.run.control / "checkpoint").exists()

    with other.run.locked():
        drive(live.root, do)
    assert not list(live.run.control.iterdir())


def test_keys_of_charts(live: Recorded) -> None:
    async def do(driver: Driver) -> None:
        screen = driver.screen
        for key, expected in (
            ("l", "loss  log axis, smoothed"),
            ("m", "loss  log axis"),
            ("plus", "loss  log axis, steps 20 to 40"),
            ("left", "loss  log axis, steps 15 to 35"),
            ("minus", "loss  log axis"),
            ("equals_sign", "steps 20 to 40"),
            ("left", "steps 15 to 35"),
            ("right", "steps 20 to 40"),
        ):
            await driver.press(key)
            await driver.see(expected)
        await driver.press("0", "l", "m")
        assert screen.settings == type(screen.settings)()
        curves = screen.query_one(CurvesPane)
        await driver.press("2", "n")
        await driver.see("held-out metrics")
        assert curves.main == 1
        await driver.press(*["n"] * 6)
        assert curves.main == 0

    drive(live.root, do, size=(80, 24))


def test_tabs_by_number_and_by_mouse(live: Recorded) -> None:
    async def do(driver: Driver) -> None:
        for number, name in enumerate(TABS, 1):
            await driver.press(str(number))
            assert driver.screen.tab == name
        await driver.press("1", "r")
        assert driver.screen.tab == "runs"
        await driver.pilot.click("#--content-tab-curves")
        await driver.until(lambda: driver.screen.tab == "curves")

    drive(live.root, do)


def test_the_path_is_copied_and_themes_change(live: Recorded) -> None:
    async def do(driver: Driver) -> None:
        await driver.press("y")
        assert driver.app.clipboard == str(live.root)
        await driver.see("copied:")
        dark = driver.app.theme
        await driver.press("t")
        assert driver.app.theme != dark and not driver.app.current_theme.dark
        await driver.press("t")
        assert driver.app.theme == dark

    drive(live.root, do)


def test_help_names_every_key(live: Recorded) -> None:
    async def do(driver: Driver) -> None:
        bindings = [b for b in RunScreen.BINDINGS if b.id]
        assert len(bindings) == len(RunScreen.BINDINGS) and all(b.description for b in bindings)
        await driver.press("question_mark")
        assert isinstance(driver.app.screen, HelpScreen)
        await driver.see("Ask for a checkpoint now", "Logarithmic axis", "Dark or light", "▲ stalled")
        await driver.press("escape")
        assert isinstance(driver.app.screen, RunScreen)

    drive(live.root, do, size=(120, 60))
