"""What the dashboard shows: every state and tab at three sizes, real pictures, odd input, a growing run."""

import json
import re
import time
from collections.abc import Callable
from contextlib import nullcontext

import pytest

from affmae_cli.dashboard.chart import Chart
from affmae_engine import events
from tests.cli.dashboard.conftest import Recorded, Trained
from tests.cli.dashboard.driving import SIZES, Driver, drive, sampled, started, stepped

Record = Callable[..., Recorded]
TABS = ("1 Overview", "2 Metrics", "3 Pictures", "4 System", "5 Log", "6 Config", "7 Runs")


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
        ("running", ("● running", "step 40 of 100  40%", "1h0", "812 images/s", "data arrives in time")),
        ("stalled", ("▲ stalled", "no step for 1h0", "still holds the run", "it may be suspended")),
        ("finished", ("✔ finished", "step 100 of 100  100%", "finished in 1m15s")),
        ("stopped", ("■ stopped", "by request at step 40 of 100", "affmae pretrain --resume")),
        ("failed", ("✖ failed", "no space left in [/data]", "end of the log", "OSError: [Errno 28] No space left")),
        ("gone", ("✖ gone", "the trainer ended", "without a last event", "end of the log")),
    ],
)
def test_every_state_says_what_it_is(
    states: Callable[[str], tuple[Recorded, bool]], state: str, says: tuple[str, ...]
) -> None:
    run, held = states(state)

    async def look(driver: Driver) -> None:
        for size in SIZES:
            await driver.resize(size)
            await driver.see(*(text for text in says if size[0] > 80 or len(text) < 30), "Quit", *TABS)
            assert driver.screen.model.status.kind == ("waiting" if state == "unborn" else state)
            assert driver.screen.query_one("#overview-chart", Chart).size.height >= 6

    with run.run.locked() if held else nullcontext():
        drive(run.root, look, size=SIZES[0])


@pytest.mark.parametrize(
    "size", [SIZES[0], *(pytest.param(size, marks=pytest.mark.slow) for size in SIZES[1:])], ids=str
)
def test_every_tab_of_a_pretraining(trained: Trained, size: tuple[int, int]) -> None:
    expected = {
        "1": ("loss", "held-out", "all stages", "stage 4 only", "images/s", "what is hidden", "finished in"),
        "2": ("loss", "total loss"),
        "3": ("step 4  (2 of 2, newest)", "masked", "token kept"),
        "4": ("machine", "device", "kernels"),
        "5": ("log.txt", "INFO", "finished at step 4"),
        "6": ("model", "size", '"tiny"', "preset demo", "--set"),
        "7": ("state", "run", "task", "✔ finished", "finetune", "4/4", "best loss", "best IoU"),
    }

    async def look(driver: Driver) -> None:
        for key, texts in expected.items():
            await driver.press(key)
            if key == "6":
                driver.screen.query_one("#config-scroll").scroll_to(y=0, animate=False)
            shown = [text for text in texts if size[0] > 80 or text not in ("--set",)]
            await driver.see(*shown, *TABS)
            assert all(len(line.rstrip()) <= size[0] for line in driver.lines())

    drive(trained.pretrain, look, size=size)


def test_large_screens_show_more(trained: Trained) -> None:
    async def look(driver: Driver) -> None:
        await driver.see("original", "masked", "reconstruction", "last events", "4: checkpoint", "no GPU")
        await driver.press("2")
        await driver.see("learning rate", "gradient norm", "effective rank by encoder stage", "waiting for data")
        await driver.press("6")
        await driver.see("environment", "versions.torch")

    drive(trained.pretrain, look, size=(200, 60))


def test_the_overview_of_a_finetuning(trained: Trained) -> None:
    async def look(driver: Driver) -> None:
        await driver.see("Mean IoU 0.", "IoU of held-out images", "mean IoU", "image", "truth", "prediction", "errors")
        names = list(driver.screen.model.classes)
        chart = driver.screen.query_one("#overview-chart", Chart)
        assert {curve.name for curve in chart.curves} == {"mean IoU", *names}
        await driver.see(*names, "best")
        await driver.resize((80, 24))
        await driver.see("Mean IoU 0.", "mean IoU", *names)

    drive(trained.finetune, look)


def test_a_class_has_one_color_everywhere(trained: Trained) -> None:
    async def look(driver: Driver) -> None:
        chart = driver.screen.query_one("#overview-chart", Chart)
        colors = {curve.name: curve.color for curve in chart.curves}
        await driver.press("3")
        await driver.until(lambda: driver.screen.pane.query_one("#pictures-grid").preview.legend)
        for name, color in driver.screen.pane.query_one("#pictures-grid").preview.legend:
            plain = name.removesuffix(" (not colored)")
            if plain in colors:
                assert colors[plain].lower() == "#{:02x}{:02x}{:02x}".format(*color)

    drive(trained.finetune, look)


def test_the_gpu_in_figures_and_curves(record: Record) -> None:
    hot = sampled(throttled=["thermal limit"], temperature=91.0, time=time.time() + 60)
    run = record(started(), *(stepped(i) for i in range(1, 5)), sampled(), hot)

    async def look(driver: Driver) -> None:
        await driver.see("thermal throttling at 91 °C", "24.0 of 139.8 GiB", "peak 31.5", "others 3.5")
        await driver.see("97%", "612 of 700 W", "1830 of 1980 MHz", "throttled", "thermal limit")
        await driver.see("GPU power, W", "GPU temperature, °C", "GPU load, %", "GPU memory, GiB", "GPU clock, MHz")
        await driver.resize((80, 24))
        await driver.see("24.0 of 139.8 GiB", "612 of 700 W")
        await driver.press("1")
        await driver.see("24.0 of 139.8 GiB", "812 images/s")
        await driver.resize((120, 40))
        await driver.see("612 of 700 W", "91 °C", "24.0 of 139.8 GiB")

    drive(run.root, look, size=(200, 60), tab="system")


def test_what_cannot_be_measured_is_not_zero(record: Record) -> None:
    nan = float("nan")
    nothing = sampled(
        gpu="", gpu_missing="NVML: driver not loaded", gpu_memory_total=nan, gpu_memory_used=nan, gpu_memory_others=nan,
        gpu_utilisation=nan, power=nan, temperature=nan, sm_clock=nan,
    )  # fmt: skip
    run = record(started(), stepped(1), nothing)

    async def look(driver: Driver) -> None:
        await driver.see("NVML: driver not loaded", "20.0 GiB, at most 31.5")
        assert not re.search(r"\b(0\.0 of|nan)\b", driver.text()) and "GPU power" not in driver.text()

    drive(run.root, look, tab="system")


def test_a_run_is_followed_as_it_grows_through_damage(record: Record) -> None:
    run = record(started(), stepped(1, loss=0.9), name="[bold]x")

    async def look(driver: Driver) -> None:
        await driver.see("[bold]x", "0.9000")
        line = f"{events.to_line(stepped(2, loss=0.5))}\n".encode()
        run.add_bytes(line[:40])
        await driver.pilot.pause(0.7)
        assert "step 1 of 100" in driver.text()
        run.add_bytes(line[40:] + b'\x00\xff{"kind": "step"\n')
        await driver.see("step 2 of 100", "0.5000")
        run.add(events.Warned(step=2, message="watch [red]out[/red]\x1b[2J"))
        await driver.resize((200, 60))
        await driver.see("watch [red]out[/red]\\x1b[2J")
        run.run.log.write_text("a [link=x]line[/link]\n")
        await driver.press("5")
        await driver.see("a [link=x]line[/link]")

    with run.run.locked():
        drive(run.root, look)


@pytest.mark.slow
def test_a_finished_run_is_drawn_anew_after_a_resize(trained: Trained) -> None:
    async def look(driver: Driver) -> None:
        for key in "1234567":
            await driver.press(key)
            for size in ((80, 24), (200, 60), (80, 24)):
                await driver.resize(size)
                await driver.until(lambda size=size: len(driver.lines()) == size[1])
            if key in "12":
                await driver.until(lambda: any("⠁" <= char <= "⣿" for char in driver.text()))

    drive(trained.pretrain, look, size=(200, 60))


def test_a_configuration_that_cannot_be_read_is_shown_as_it_is(record: Record) -> None:
    run = record(started(), stepped(1))
    run.run.config.write_text("[train\nsteps = [b]5[/b]\n")

    async def look(driver: Driver) -> None:
        await driver.see("is not valid TOML", "steps = [b]5[/b]")

    drive(run.root, look, tab="config")


@pytest.mark.parametrize(("images", "shown"), [({"a": "01", "b": "02"}, "data.images"), (7, "data.images")])
def test_fingerprints_of_images_are_counted(record: Record, images: object, shown: str) -> None:
    run = record(started(), stepped(1))
    run.run.environment.write_text(json.dumps({"data": {"images": images}}))

    async def look(driver: Driver) -> None:
        driver.screen.query_one("#config-scroll").scroll_end(animate=False)
        await driver.see(shown)
        (row,) = [line for line in driver.lines() if shown in line]
        assert row.rstrip().endswith("7" if images == 7 else "2")

    drive(run.root, look, tab="config", size=(200, 60))


def test_charts_over_minutes_do_not_zoom_steps(record: Record) -> None:
    begun = time.time() - 3600
    samples = [sampled(time=begun + 60 * i) for i in range(60)]
    run = record(started(), *(stepped(i) for i in range(1, 41)), *samples)

    async def look(driver: Driver) -> None:
        chart = driver.screen.pane.query(Chart).first()
        chart.focus()
        await driver.press("plus")
        await driver.see("minutes 30 to 59")
        assert chart.view.span is not None
        await driver.press("1")
        assert driver.screen.query_one("#overview-chart", Chart).view.span is None

    drive(run.root, look, tab="system", size=(200, 60))


def test_a_chart_says_why_it_is_empty(record: Record) -> None:
    run = record(started(), *(stepped(i, loss=float("nan"), grad_norm=-1.0) for i in range(1, 61)))

    async def look(driver: Driver) -> None:
        await driver.see("step 60 of 100", "no finite value")
        await driver.press("2", "l")
        await driver.see("no value above zero")

    with run.run.locked():
        drive(run.root, look, size=(200, 60))
