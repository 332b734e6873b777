"""Pictures and classes: always of the run that is shown, as new as they are, and never in the way of all else."""

from collections.abc import Callable

import pytest
from msgspec.structs import replace
from PIL import Image
from textual.geometry import Region

from affmae_cli.dashboard.chart import Chart
from affmae_cli.dashboard.panes.runs import RunsPane
from affmae_cli.dashboard.pictures import PictureGrid, arrangement, read_preview
from affmae_engine import events
from tests.cli.dashboard.conftest import Recorded, Trained
from tests.cli.dashboard.driving import SIZES, Driver, drive, started, stepped

Record = Callable[..., Recorded]


def test_a_finetuning_shows_its_classes_and_the_legend(trained: Trained) -> None:
    async def look(driver: Driver) -> None:
        grid = driver.screen.query_one("#pictures-grid", PictureGrid)
        await driver.see("step 2", "image", "truth", "prediction", "errors", "IoU", "Dice", "■ ", "wrong")
        assert [tile.title for tile in grid.shown[:4]] == ["image", "truth", "prediction", "errors"]
        assert driver.text().count("▀") > 500

    drive(trained.finetune, look, tab="pictures")


def test_the_slider_goes_through_time_and_keys_through_images(trained: Trained) -> None:
    async def look(driver: Driver) -> None:
        grid = driver.screen.query_one("#pictures-grid", PictureGrid)
        await driver.see("step 4  (2 of 2, newest)")
        await driver.press("left")
        await driver.see("step 2  (1 of 2)")
        await driver.press("left", "right")
        await driver.see("step 4  (2 of 2, newest)")
        every = len(grid.shown)
        assert every == 6 * grid.preview.rows
        await driver.press("down")
        await driver.until(lambda: len(grid.shown) == 6 and grid.first == min(1, grid.preview.rows - 1))
        await driver.press("up", *["minus"] * 3)
        await driver.until(lambda: len(grid.shown) == every)
        await driver.press("plus")
        assert len(grid.shown) == max(6, every - 6)

    drive(trained.pretrain, look, tab="pictures")


def test_a_picture_without_a_list_of_tiles_is_one_tile(tmp_path) -> None:
    Image.new("RGB", (60, 40), "red").save(tmp_path / "old.png")
    preview = read_preview(tmp_path / "old.png")
    assert [tile.rgb.shape for tile in preview.tiles] == [(40, 60, 3)] and not preview.problem


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"tiles": [{"title": "a"}], "legend": []}',
        '{"tiles": [], "legend": []}',
        '{"tiles": [{"title": "a", "row": 0, "main": true, "box": [90, 0, 5, 5]}], "legend": []}',
    ],
)
def test_a_damaged_list_of_tiles_costs_the_list_only(tmp_path, text: str) -> None:
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text("affmae-tiles", text)
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png", pnginfo=chunks)
    assert [tile.rgb.shape for tile in read_preview(tmp_path / "a.png").tiles] == [(40, 60, 3)]


def test_tiles_are_arranged_as_large_as_they_fit() -> None:
    assert arrangement(3, 90, 16) == (3, 1) and arrangement(3, 30, 60) == (1, 3) and arrangement(4, 60, 31) == (2, 2)
    assert arrangement(6, 200, 20, 3) == (3, 2)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"nonsense", "step-000007.png is not a picture"),
        (None, "step-000007.png was removed"),
        (b"cut", "cannot be read"),
    ],
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
        await driver.see("step 7", "▀▀▀")
        driver.screen.post_message(RunsPane.Chosen(other.root))
        await driver.see("step 8 of 100")
        driver.screen.action_tab(tab)
        await driver.see("preview")
        assert "▀▀▀" not in driver.text()

    drive(run.root, look, tab=tab, size=(120, 40))


@pytest.mark.parametrize("tab", ["overview", "pictures"])
def test_a_picture_that_is_made_again_is_shown_anew(record: Record, tab: str) -> None:
    run = record(started(), stepped(7))
    run.add(drawn(run, 7, "red"))

    async def look(driver: Driver) -> None:
        wall = driver.screen.pane.query_one(PictureGrid)
        assert wall.preview.tiles[0].rgb[0, 0].tolist() == [255, 0, 0]
        run.add(started(step=6, resumed=True), stepped(7), drawn(run, 7, "blue"))
        await driver.until(lambda: wall.preview.tiles and wall.preview.tiles[0].rgb[0, 0].tolist() == [0, 0, 255])

    with run.run.locked():
        drive(run.root, look, tab=tab, size=(120, 40))


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
        assert driver.screen.query_one("#overview-chart").size.height >= size[1] // 5
        if size[0] >= 100 and count == 120:
            await driver.see("class119", "better classes, see Pictures")
        elif size[0] >= 100:
            await driver.see(*(f"class{i} " for i in range(count)))
        await driver.press("3")
        grid, table = driver.screen.query_one("#pictures-grid"), driver.screen.query_one("#pictures-scroll")
        await driver.see("class0 ", "▀▀▀")
        assert grid.size.height >= size[1] // 3 and inside.contains_region(table.region)
        assert not grid.region.overlaps(table.region)

    with run.run.locked():
        drive(run.root, look, size=size)


def test_of_many_classes_the_worst_are_drawn(record: Record) -> None:
    run = finetuned(record, [f"class{i}" for i in range(40)])

    async def look(driver: Driver) -> None:
        chart = driver.screen.query_one("#overview-chart", Chart)
        assert [curve.name for curve in chart.curves] == ["mean IoU", *(f"class{i}" for i in range(39, 31, -1))]

    with run.run.locked():
        drive(run.root, look, size=(120, 40))


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
            "2": ("two lines",),
            "3": ("a\\x1b[31mb ", "two lines ", "a name that is too", "c "),
            "4": ("GPU\\x1b[2J X", "tri\\x1bton"),
            "7": (),
        }.items():
            await driver.press(key)
            await driver.see("fine\\x1btune", *sees)
            strips = driver.app.screen._compositor.render_strips()
            assert not any(ord(c) < 32 for strip in strips for segment in strip for c in segment.text)

    with run.run.locked():
        drive(run.root, look, size=(200, 60))
