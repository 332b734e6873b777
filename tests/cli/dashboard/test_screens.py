"""What the dashboard shows: every state and tab at three sizes, real pictures, odd input, a growing run."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from textual.events import MouseScrollDown
from textual.geometry import Region
from textual.widgets import DataTable

from affmae_cli.dashboard.app import export_screen
from affmae_cli.dashboard.messages import RunChosen
from affmae_cli.dashboard.panes import runs as runs_pane
from affmae_cli.dashboard.panes.runs import RunsPane
from affmae_cli.dashboard.reader import RunReader
from affmae_cli.dashboard.widgets import preview_wall
from affmae_cli.dashboard.widgets.chart import Chart
from affmae_cli.dashboard.widgets.preview_wall import PreviewWall
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


def test_a_finetuning_shows_its_classes_and_the_newest_overlay(trained: Trained) -> None:
    async def look(driver: Driver) -> None:
        await driver.see("classes", "IoU", "Dice", "prediction")
        await driver.press("3")
        wall = driver.screen.query_one("#pictures-wall", PreviewWall)
        await driver.see("preview of step 2", "prediction", "truth", "classes")
        assert [tile.title for tile in wall.tiles[:4]] == ["prediction", "truth", "image", "errors"]
        assert driver.picture().count("▀") > 500

    drive(trained.finetune, look)


def test_pictures_are_turned_over_resized_and_followed(trained: Trained) -> None:
    async def look(driver: Driver) -> None:
        wall = driver.screen.query_one("#pictures-wall", PreviewWall)
        await driver.press("left")
        await driver.see("preview of step 2", "1 of 2")
        await driver.press("left", "right")
        await driver.see("preview of step 4", "2 of 2")
        many = wall.layout_of_tiles
        await driver.press("plus", "plus", "plus", "plus")
        assert wall.layout_of_tiles == (1, 1)
        await driver.press("down")
        assert wall.first == 1
        await driver.see("from all stages")
        await driver.press("up", "up", "0")
        assert wall.first == 0 and wall.layout_of_tiles == many

    drive(trained.pretrain, look, tab="pictures")


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"nonsense", "step-000007.png is not a picture"), (None, "step-000007.png is gone"), (b"cut", "cannot be read")],
)
def test_a_picture_that_is_damaged_or_gone_is_a_sentence(
    record: Record, trained: Trained, data: bytes | None, says: str
) -> None:
    run = record(started(), stepped(7), events.PreviewSaved(step=7, path="previews/step-000007.png"))
    if data is not None:
        whole = next(trained.pretrain.glob("previews/*.png")).read_bytes()
        run.run.preview(7).write_bytes(whole[:2000] if data == b"cut" else data)

    async def look(driver: Driver) -> None:
        await driver.see(says)

    drive(run.root, look, tab="pictures")


def drawn(run: Recorded, step: int, colour: str) -> events.PreviewSaved:
    """A preview of one colour, written as the trainer does, and its event."""
    run.run.preview(step).parent.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64), colour).save(run.run.preview(step))
    return events.PreviewSaved(step=step, path=str(run.run.preview(step).relative_to(run.root)))


@pytest.mark.parametrize("tab", ["overview", "pictures"])
def test_a_run_without_previews_shows_none_of_another(record: Record, tab: str) -> None:
    run, other = record(started(), stepped(7)), record(started(), stepped(8), name="other")
    run.add(drawn(run, 7, "red"))

    async def look(driver: Driver) -> None:
        await driver.see("preview of step 7", "▀▀▀")
        driver.screen.post_message(RunChosen(other.root))
        await driver.see("step 8 of 100")
        driver.screen.action_tab(tab)
        await driver.see("no preview yet")
        assert "preview of step 7" not in driver.text() and "▀▀▀" not in driver.text()

    drive(run.root, look, tab=tab, size=(120, 40))


@pytest.mark.parametrize("tab", ["overview", "pictures"])
def test_a_picture_that_is_made_again_is_shown_anew(record: Record, tab: str) -> None:
    run = record(started(), stepped(7))
    run.add(drawn(run, 7, "red"))

    async def look(driver: Driver) -> None:
        wall = driver.screen.pane.query_one(PreviewWall)
        assert wall.tiles[0].rgb[0, 0].tolist() == [255, 0, 0]
        run.add(started(step=6, resumed=True), stepped(7), drawn(run, 7, "blue"))
        await driver.until(lambda: wall.tiles and wall.tiles[0].rgb[0, 0].tolist() == [0, 0, 255])

    with run.run.locked():
        drive(run.root, look, tab=tab, size=(120, 40))


def test_a_preview_of_an_unforeseen_kind_is_a_sentence(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record(started(), stepped(7))
    run.add(drawn(run, 7, "red"))

    def fail(path: Path) -> None:
        raise MemoryError("too large")

    monkeypatch.setattr(preview_wall, "read_tiles", fail)

    async def look(driver: Driver) -> None:
        await driver.see("step-000007.png cannot be read: MemoryError: too large")

    drive(run.root, look, tab="pictures")


def test_pictures_take_on_the_colours_of_a_theme(record: Record) -> None:
    run = record(started(), stepped(7))
    run.add(drawn(run, 7, "red"))

    async def look(driver: Driver) -> None:
        wall = driver.screen.query_one("#pictures-wall", PreviewWall)

        def background() -> str:
            title = driver.app.screen._compositor.render_strips()[wall.region.y + 1].crop(wall.region.x + 1)
            return str(next(segment.style.bgcolor for segment in title if segment.style is not None))

        wall.refresh()
        await driver.until(lambda: driver.text() and wall._strips)
        dark = background()
        await driver.press("t")
        await driver.until(lambda: background() != dark)
        assert background() == str(wall.rich_style.bgcolor)

    drive(run.root, look, tab="pictures")


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


def finetuned(record: Record, names: list[str]) -> Recorded:
    """A finetuning with these classes, the last one the worst."""
    scores = {name: {"iou": 0.9 - 0.8 * i / len(names), "dice": 0.5} for i, name in enumerate(names)}
    begun = replace(started(), task="finetune")
    found = events.Evaluated(step=40, metrics={"iou": 0.4, "dice": 0.5, "score": 0.4}, per_class=scores, best=True)
    run = record(begun, *(stepped(i) for i in range(1, 41)), found)
    run.add(drawn(run, 40, "red"))
    return run


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("count", [5, 200])
def test_many_classes_leave_room_for_everything_else(record: Record, size: tuple[int, int], count: int) -> None:
    run = finetuned(record, [f"class{i}" for i in range(count)])

    async def look(driver: Driver) -> None:
        inside = Region(0, 0, *size)
        events_list = driver.screen.query_one("#overview-events")
        assert driver.screen.query_one("#overview-loss").size.height >= size[1] // 5
        assert inside.contains_region(events_list.region) and events_list.size.height >= 3
        if size[0] >= 100 and count == 200:
            await driver.see("the worst classes", "class199", "more, see Pictures")
        elif size[0] >= 100:
            await driver.see(*(f"class{i} " for i in range(count)))
        await driver.press("3")
        wall, table = (driver.screen.query_one(f"#pictures-{part}") for part in ("wall", "classes"))
        await driver.see("class0 ", "▀▀▀")
        assert wall.size.height >= size[1] // 3 and inside.contains_region(table.region)
        assert not wall.region.overlaps(table.region)
        if count == 5:
            assert not table.max_scroll_y and "PageDown" not in driver.text()
            return
        await driver.see("200 classes   PageUp PageDown further classes")
        for turns in range(40):
            if table.scroll_y == table.max_scroll_y:
                break
            await driver.press("pagedown")
            await driver.until(lambda before=turns: table.scroll_y == table.scroll_target_y)
        await driver.see("class199")
        await driver.press("down", "pageup")
        await driver.until(lambda: table.scroll_y < table.max_scroll_y)
        table.scroll_home(animate=False)
        await driver.pilot._post_mouse_events([MouseScrollDown], table, (5, 2), button=0)
        await driver.until(lambda: table.scroll_y > 0)

    with run.run.locked():
        drive(run.root, look, size=size)


def test_of_many_classes_the_worst_are_drawn(record: Record) -> None:
    run = finetuned(record, [f"class{i}" for i in range(40)])

    async def look(driver: Driver) -> None:
        await driver.press("n")
        await driver.see("held-out metrics, the worst 8 of 40 classes")
        chart = driver.screen.query_one("#curves-held-out", Chart)
        assert [t.name for t in chart.traces] == ["iou", "dice", *(f"class{i} IoU" for i in range(39, 31, -1))]

    with run.run.locked():
        drive(run.root, look, tab="curves", size=(80, 24))


def test_names_of_classes_stay_on_their_line_and_reach_the_terminal_as_text(record: Record) -> None:
    run = finetuned(record, ["a\x1b[31mb", "two\nlines", "a name that is too long for any column", "c"])
    run.add(
        replace(
            started(step=40, resumed=True), task="fine\x1btune", device="GPU\x1b[2J\nX", backends={"k": "tri\x1bton"}
        )
    )

    async def look(driver: Driver) -> None:
        for key, sees in {
            "1": (),
            "2": ("a\\x1b[31mb IoU", "two lines IoU"),
            "3": ("a\\x1b[31mb ", "two lines ", "a name that is too long…", "c "),
            "4": ("GPU\\x1b[2J X", "tri\\x1bton"),
        }.items():
            await driver.press(key)
            if key == "2":
                await driver.press("n")
            await driver.see("fine\\x1btune", *sees)
            strips = driver.app.screen._compositor.render_strips()
            assert not any(ord(c) < 32 for strip in strips for segment in strip for c in segment.text)

    with run.run.locked():
        drive(run.root, look, size=(200, 60))


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


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "screen.svg"


def test_a_screen_is_saved_as_svg(trained: Trained, saved: Path) -> None:
    export_screen(trained.pretrain, saved, size=(160, 48), screen="overview")
    picture = saved.read_text()
    assert picture.startswith("<svg") and "finished" in picture and picture.count("▀") > 200
    assert re.search("affmae watch pretrain", picture.replace("&#160;", " "))
    shutil.rmtree(saved.parent)
