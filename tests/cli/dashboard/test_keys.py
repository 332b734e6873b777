"""Every key: requests to the trainer, pausing, charts, copying, themes, help, and the ways to leave."""

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from affmae_cli.dashboard.messages import RunChosen
from affmae_cli.dashboard.panes.curves import CurvesPane
from affmae_cli.dashboard.result import DashboardResult
from affmae_cli.dashboard.screens.help import HelpScreen
from affmae_cli.dashboard.screens.question import Question
from affmae_cli.dashboard.screens.run import TABS, RunScreen
from affmae_cli.dashboard.widgets.status_line import StatusLine
from affmae_engine import events
from tests.cli.dashboard.conftest import Recorded
from tests.cli.dashboard.driving import SIZES, Driver, drive, started, stepped


@pytest.fixture
def live(record: Callable[..., Recorded]) -> Iterator[Recorded]:
    """A run that a trainer (this process) holds."""
    run = record(started(), *(stepped(i) for i in range(1, 41)))
    with run.run.locked():
        yield run


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands where the trainer would."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


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
        await switch(driver, "other")
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


def test_a_merely_watched_run_is_left_at_once(live: Recorded) -> None:
    async def do(driver: Driver) -> None:
        await driver.press("q")

    assert drive(live.root, do) == DashboardResult("detach")


@pytest.mark.parametrize(
    ("keys", "outcome", "asked"),
    [
        (["q", "d"], "detach", False),
        (["q", "enter"], "detach", False),
        (["q", "s"], "stop", True),
        (["ctrl+c", "down", "enter"], "stop", True),
        (["ctrl+c", "ctrl+c"], "detach", False),
        (["q", "escape"], None, False),
    ],
)
def test_leaving_a_run_of_ones_own_asks_what_becomes_of_it(
    live: Recorded, child: "subprocess.Popen[bytes]", keys: list[str], outcome: str | None, asked: bool
) -> None:
    async def do(driver: Driver) -> None:
        await driver.press(keys[0])
        await driver.until(lambda: isinstance(driver.app.screen, Question))
        await driver.press(*keys[1:])
        if outcome is None:
            await driver.until(lambda: isinstance(driver.app.screen, RunScreen))

    result = drive(live.root, do, child=child, size=(80, 24))
    assert (result and result.outcome) == outcome
    assert (live.run.control / "stop").exists() is asked


def test_a_run_of_ones_own_that_ended_is_left_at_once(
    record: Callable[..., Recorded], child: "subprocess.Popen[bytes]"
) -> None:
    run = record(started(), stepped(100), events.RunEnded(step=100, status="finished", seconds=9.0))
    child.kill()
    child.wait()

    async def do(driver: Driver) -> None:
        await driver.press("q")

    assert drive(run.root, do, child=child) == DashboardResult("ended")


async def switch(driver: Driver, name: str) -> None:
    """Follow another run of the folder."""
    driver.screen.post_message(RunChosen(driver.screen.root.parent / name))
    await driver.see(name)
    await driver.until(lambda: driver.screen.newest is not None and driver.screen.newest.root.name == name)


@pytest.mark.parametrize("other_ended", [False, True])
@pytest.mark.parametrize("died", [False, True])
def test_leaving_is_about_ones_own_run_whichever_is_looked_at(
    live: Recorded, record: Callable[..., Recorded], child: subprocess.Popen[bytes], other_ended: bool, died: bool
) -> None:
    ended = [events.RunEnded(step=100, status="finished", seconds=9.0)] if other_ended else []
    other = record(started(), stepped(100), *ended, name="other")

    async def do(driver: Driver) -> None:
        await switch(driver, "other")
        if died:
            child.kill()
            child.wait()
        await driver.press("q")
        if not died:
            await driver.see("live is still training")
            await driver.press("d")

    with other.run.locked():
        assert drive(live.root, do, child=child) == DashboardResult("ended" if died else "detach")


def test_a_run_that_ended_while_the_view_stands_still_is_left_at_once(
    live: Recorded, child: subprocess.Popen[bytes]
) -> None:
    async def do(driver: Driver) -> None:
        await driver.press("p")
        live.add(events.RunEnded(step=41, status="failed", seconds=4.0, message="out of memory"))
        await driver.until(lambda: driver.screen.newest is not None and driver.screen.newest.status.ended)
        await driver.press("q")

    assert drive(live.root, do, child=child) == DashboardResult("ended")


def test_a_run_that_ends_under_the_question_is_not_said_to_go_on(
    live: Recorded, child: subprocess.Popen[bytes]
) -> None:
    async def do(driver: Driver) -> None:
        await driver.press("q")
        await driver.see("live is still training")
        child.kill()
        child.wait()
        await driver.press("d")

    assert drive(live.root, do, child=child) == DashboardResult("ended")


@pytest.mark.parametrize("dialog", ["question_mark", "s"])
def test_ctrl_c_in_another_dialog_closes_it_and_asks(
    live: Recorded, child: subprocess.Popen[bytes], dialog: str
) -> None:
    async def do(driver: Driver) -> None:
        await driver.press(dialog)
        await driver.until(lambda: not isinstance(driver.app.screen, RunScreen))
        await driver.press("ctrl+c")
        await driver.see("live is still training", "Detach")
        assert [type(screen) for screen in driver.app.screen_stack[-2:]] == [RunScreen, Question]
        await driver.press("escape")
        await driver.until(lambda: isinstance(driver.app.screen, RunScreen))
        await driver.press("ctrl+c")
        await driver.see("live is still training")
        await driver.press("ctrl+c")

    assert drive(live.root, do, child=child) == DashboardResult("detach")
    assert not (live.run.control / "stop").exists()


def test_keys_that_come_before_the_question_ask_no_second_one(live: Recorded, child: subprocess.Popen[bytes]) -> None:
    async def do(driver: Driver) -> None:
        driver.app.action_leave()  # as a slow terminal or a busy machine hands over `q` and `s` at once
        driver.screen.action_stop()
        await driver.see("Stop after a checkpoint", "Detach")
        assert [type(screen) for screen in driver.app.screen_stack[-2:]] == [RunScreen, Question]
        await driver.press("d")

    assert drive(live.root, do, child=child) == DashboardResult("detach")
