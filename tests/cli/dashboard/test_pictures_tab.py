"""Pictures and classes: always of the run that is shown, as new as they are, and never in the way of all else."""

from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace
from PIL import Image
from textual.events import MouseScrollDown
from textual.geometry import Region

from affmae_cli.dashboard.messages import RunChosen
from affmae_cli.dashboard.widgets import preview_wall
from affmae_cli.dashboard.widgets.chart import Chart
from affmae_cli.dashboard.widgets.preview_wall import PreviewWall
from affmae_engine import events
from tests.cli.dashboard.conftest import Recorded, Trained
from tests.cli.dashboard.driving import SIZES, Driver, drive, started, stepped

Record = Callable[..., Recorded]


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


def finetuned(record: Record, names: list[str]) -> Recorded:
    """A finetuning with these classes, the last one the worst."""
    scores = {name: {"iou": 0.9 - 0.8 * i / len(names), "dice": 0.5} for i, name in enumerate(names)}
    begun = replace(started(), task="finetune")
    found = events.Evaluated(step=40, metrics={"iou": 0.4, "dice": 0.5, "score": 0.4}, per_class=scores, best=True)
    run = record(begun, *(stepped(i) for i in range(1, 41)), found)
    run.add(drawn(run, 40, "red"))
    return run


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("count", [5, 120])
def test_many_classes_leave_room_for_everything_else(record: Record, size: tuple[int, int], count: int) -> None:
    run = finetuned(record, [f"class{i}" for i in range(count)])

    async def look(driver: Driver) -> None:
        inside = Region(0, 0, *size)
        events_list = driver.screen.query_one("#overview-events")
        assert driver.screen.query_one("#overview-loss").size.height >= size[1] // 5
        assert inside.contains_region(events_list.region) and events_list.size.height >= 3
        if size[0] >= 100 and count == 120:
            await driver.see("the worst classes", "class119", "more, see Pictures")
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
        await driver.see("120 classes   PageUp PageDown further classes")
        for turns in range(40):
            if table.scroll_y == table.max_scroll_y:
                break
            await driver.press("pagedown")
            await driver.until(lambda before=turns: table.scroll_y == table.scroll_target_y)
        await driver.see("class119")
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
        run.add(started(resumed=True), stepped(1))  # from the beginning: the evaluations are done again
        await driver.see("step 1 of 100", "not evaluated yet")

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
