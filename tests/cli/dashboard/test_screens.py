"""What the dashboard shows: every state and tab at three sizes, real pictures, odd input, a growing run."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from affmae_cli.dashboard.app import export_screen
from affmae_cli.dashboard.widgets.chart import Chart
from affmae_engine import events
from tests.cli.dashboard.conftest import Recorded, Trained
from tests.cli.dashboard.driving import SIZES, Driver, drive, sampled, started, stepped

Record = Callable[..., Recorded]
FOOTER = ("Leave", "Checkpoint", "Stop", "Pause", "Runs", "Copy path", "Theme", "Help")
TABS = ("1 Overview", "2 Curves", "3 Pictures", "4 System", "5 Log", "6 Config", "7 Runs")


@pytest.fixture
def states(record: Record) -> Callable[[str], tuple[Recorded, bool]]:
    """The run in a state, and whether a trainer holds it."""

    def make(state: str) -> tuple[Recorded, bool]:
        long_ago = time.time() - 4000
        ended = {
            "finished": events.RunEnded(step=100, status="finished", seconds=75.0),
            "stopped": events.RunEnded(step=40, status="stopped", seconds=75.0, message="by request at step 40 of 100"),
            "failed": events.RunEnded(step=40, status="failed", seconds=75.0, message="no space left in [/data]"),
        }
        match state:
            case "unborn":
                return record(), True
            case "waiting":
                return record(started()), True
            case "running":
                return record(started(), *(stepped(i) for i in range(1, 41)), sampled()), True
            case "stalled":
                old = [stepped(i, time=long_ago + i) for i in range(1, 41)]
                return record(started(time=long_ago), *old), True
            case "gone":
                return record(started(time=long_ago), stepped(40, time=long_ago + 9)), False
        last = 100 if state == "finished" else 40
        run = record(started(), stepped(last), ended[state])
        run.run.log.write_text("first line\nERROR the run failed\nOSError: [Errno 28] No space left on device\n")
        return run, False

    return make


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ("unborn", ("◌ waiting", "waiting for the trainer to begin")),
        ("waiting", ("◌ waiting", "waiting for the first step", "step 0 of 100", "time left not known yet")),
        ("running", ("● running", "step 40 of 100  40%", "1h0", "812 images/s", "GPU-bound: good")),
        ("stalled", ("▲ stalled", "no step for 1h0", "still holds the run", "it may be suspended")),
        ("finished", ("✔ finished", "step 100 of 100  100%", "100 steps in 1m15s")),
        ("stopped", ("■ stopped", "by request at step 40 of 100", "affmae pretrain --resume")),
        ("failed", ("✖ failed", "no space left in [/data]", "end of log.txt", "OSError: [Errno 28] No space left")),
        ("gone", ("✖ gone", "the trainer is gone", "without a word", "end of log.txt")),
    ],
)
def test_every_state_says_what_it_is(
    states: Callable[[str], tuple[Recorded, bool]], state: str, says: tuple[str, ...]
) -> None:
    run, held = states(state)

    async def look(driver: Driver) -> None:
        for size in SIZES:
            await driver.resize(size)
            await driver.see(*(text for text in says if size[0] > 80 or len(text) < 30), *FOOTER, *TABS)
            assert driver.screen.view is not None
            assert driver.screen.view.status.kind == ("waiting" if state == "unborn" else state)

    with run.run.locked() if held else nullcontext():
        drive(run.root, look, size=SIZES[0])


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_every_tab_of_a_pretraining(trained: Trained, size: tuple[int, int]) -> None:
    expected = {
        "1": ("loss", "step1", "held-out", "training", "images/s", "machine", "events", "finished at step 4"),
        "2": ("loss  smoothed", "step2", "last"),
        "3": ("preview of step 4", "← → 2 of 2", "masked", "from all stages"),
        "4": ("what it means", "no GPU: training runs on the CPU", "card", "memory", "CPU"),
        "5": ("log.txt", "INFO", "finished at step 4"),
        "6": ("model", "size", '"tiny"', "crop_size"),
        "7": ("state", "run", "task", "✔ finished", "finetune", "4 of 4"),
    }

    async def look(driver: Driver) -> None:
        for key, texts in expected.items():
            await driver.press(key)
            await driver.see(*texts, *TABS)
            assert not driver.screen.query("#config-problem").first().display or key != "6"
            assert all(len(line.rstrip()) <= size[0] for line in driver.lines())

    drive(trained.pretrain, look, size=size)


def test_large_screens_show_more(trained: Trained) -> None:
    async def look(driver: Driver) -> None:
        await driver.see("preview of step 4", "tokens by stage", "losses", "best")
        await driver.press("2")
        await driver.see("learning rate", "gradient norm", "effective rank per encoder stage", "data wait, %")
        await driver.press("6")
        await driver.see("environment", "versions.torch")

    drive(trained.pretrain, look, size=(200, 60))


def test_the_card_in_figures_and_curves(record: Record) -> None:
    hot = sampled(throttled=["thermal limit"], temperature=91.0, time=time.time() + 60)
    run = record(started(), *(stepped(i) for i in range(1, 5)), sampled(), hot)

    async def look(driver: Driver) -> None:
        await driver.see("thermal throttling at 91 °C", "24.0 of 139.8 GiB", "at most 31.5", "others 3.5 GiB")
        await driver.see("97%", "612 of 700 W", "1830 of 1980 MHz", "memory 3201 MHz", "held back  thermal limit")
        await driver.see("power over minutes, W", "temperature over minutes")
        await driver.resize((80, 24))
        await driver.see("24.0 of 139.8 GiB", "612 of 700 W", "VRAM over minutes")
        await driver.press("1")
        await driver.see("24.0 of 139.8 GiB", "612 of 700 W   91 °C")

    drive(run.root, look, size=(200, 60), tab="system")


def test_what_cannot_be_measured_is_not_zero(record: Record) -> None:
    nan = float("nan")
    nothing = sampled(
        gpu_missing="NVML: driver not loaded", gpu_memory_total=nan, gpu_memory_used=nan, gpu_memory_others=nan
    )
    run = record(started(), stepped(1), nothing)

    async def look(driver: Driver) -> None:
        await driver.see("NVML: driver not loaded", "20.0 GiB, at most 31.5")
        assert not re.search(r"\b(0\.0 of|nan)\b", driver.text())

    drive(run.root, look, tab="system")


def test_a_run_is_followed_as_it_grows_through_damage(record: Record) -> None:
    run = record(started(), stepped(1, loss=0.9), name="[bold]x")

    async def look(driver: Driver) -> None:
        await driver.see("[bold]x", "loss 0.9000")
        line = f"{events.to_line(stepped(2, loss=0.5))}\n".encode()
        run.add_bytes(line[:40])
        await driver.pilot.pause(0.7)
        assert "step 1 of 100" in driver.text()
        run.add_bytes(line[40:] + b'\x00\xff{"kind": "step"\n')
        await driver.see("step 2 of 100", "loss 0.5000")
        run.add(events.Warned(step=2, message="watch [red]out[/red]\x1b[2J"))
        await driver.see("watch [red]out[/red]\\x1b[2J")
        run.run.log.write_text("a [link=x]line[/link]\n")
        await driver.press("5")
        await driver.see("a [link=x]line[/link]")
        run.run.log.write_text("a [link=x]line[/link]\nanother\n")
        await driver.see("another")

    with run.run.locked():
        drive(run.root, look)


def test_a_configuration_that_cannot_be_read_is_shown_as_it_is(record: Record) -> None:
    run = record(started(), stepped(1))
    run.run.config.write_text("[train\nsteps = [b]5[/b]\n")

    async def look(driver: Driver) -> None:
        await driver.see("is not valid TOML", "steps = [b]5[/b]")

    drive(run.root, look, tab="config")


@pytest.mark.parametrize(("images", "shown"), [({"a": "01", "b": "02"}, "data.images  2"), (7, "data.images  7")])
def test_fingerprints_of_images_are_counted(record: Record, images: object, shown: str) -> None:
    run = record(started(), stepped(1))
    run.run.environment.write_text(json.dumps({"data": {"images": images}}))

    async def look(driver: Driver) -> None:
        driver.screen.query_one("#config-scroll").scroll_end(animate=False)
        await driver.see(shown)

    drive(run.root, look, tab="config", size=(200, 60))


def test_charts_over_minutes_speak_of_minutes_and_zoom_no_steps(record: Record) -> None:
    begun = time.time() - 3600
    samples = [sampled(time=begun + 60 * i) for i in range(60)]
    run = record(started(), *(stepped(i) for i in range(1, 41)), *samples)

    async def look(driver: Driver) -> None:
        chart = driver.screen.query_one("#system-chart-busy", Chart)
        await driver.see("CPU 21.0000")
        for column in (20, 21):
            await driver.pilot.hover(chart, offset=(column, 4))
        await driver.see("busy over minutes, %  minute")
        assert "step " not in str(chart.border_title)
        chart.post_message(Chart.Wheel(1, 5.0))
        await driver.press("plus", "left")
        assert driver.screen.settings.zoom.whole
        await driver.press("2")
        await driver.see("loss  smoothed")

    drive(run.root, look, tab="system", size=(200, 60))


def test_a_chart_says_why_it_is_empty(record: Record) -> None:
    nan = float("nan")
    seen: list[events.Event] = [started(), *(stepped(i, loss=nan, grad_norm=-1.0) for i in range(1, 61))]
    seen.insert(20, events.Evaluated(step=20, metrics={"loss": 0.5, "score": -0.5}))
    run = record(*seen)

    async def look(driver: Driver) -> None:
        await driver.press("n", "plus")
        assert driver.screen.settings.zoom.window(0.0, 60.0) == (30.0, 60.0)
        await driver.see("nothing in this part", "no finite value in this part: all are NaN or infinite")
        assert "not evaluated yet" not in driver.text() and "waiting for the first step" not in driver.text()
        await driver.press("0", "l")
        await driver.see("no value above zero, as a logarithmic axis needs")
        await driver.press("1", "l")
        await driver.see("step 60 of 100", "loss  smoothed")
        await driver.press("2", "n")
        assert "waiting for the first step" not in driver.text()

    with run.run.locked():
        drive(run.root, look, tab="curves", size=(200, 60))


def test_a_run_whose_losses_are_all_nan_says_so(record: Record) -> None:
    run = record(started(), *(stepped(i, loss=float("nan")) for i in range(1, 61)))

    async def look(driver: Driver) -> None:
        await driver.see("step 60 of 100", "no finite value: all are NaN or infinite")
        assert "waiting for the first step" not in driver.text()

    with run.run.locked():
        drive(run.root, look)


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "screen.svg"


def test_a_screen_is_saved_as_svg(trained: Trained, saved: Path) -> None:
    export_screen(trained.pretrain, saved, size=(160, 48), screen="overview")
    picture = saved.read_text()
    assert picture.startswith("<svg") and "finished" in picture and picture.count("▀") > 200
    assert re.search("affmae watch pretrain", picture.replace("&#160;", " "))
    shutil.rmtree(saved.parent)
