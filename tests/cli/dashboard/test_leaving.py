"""The ways to leave, which are about one's own trainer whatever is looked at."""

import subprocess
from collections.abc import Callable

import pytest

from affmae_cli.dashboard.control import DashboardResult
from affmae_cli.dashboard.dialogs import Question
from affmae_cli.dashboard.run_screen import RunScreen
from affmae_engine import events
from tests.cli.dashboard.conftest import Recorded
from tests.cli.dashboard.driving import Driver, drive, started, stepped


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


@pytest.mark.parametrize("other_ended", [False, True])
@pytest.mark.parametrize("died", [False, True])
def test_leaving_is_about_ones_own_run_whichever_is_looked_at(
    live: Recorded, record: Callable[..., Recorded], child: subprocess.Popen[bytes], other_ended: bool, died: bool
) -> None:
    ended = [events.RunEnded(step=100, status="finished", seconds=9.0)] if other_ended else []
    other = record(started(), stepped(100), *ended, name="other")

    async def do(driver: Driver) -> None:
        await driver.switch("other")
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
        await driver.until(lambda: driver.screen.model.status.ended)
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
