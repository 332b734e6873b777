"""Pictures as pixels: when the optional package is used, on a real pseudo-terminal, and where its widgets are put."""

import importlib.util
import os
import pty
import select
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from textual.geometry import Size
from textual.widget import Widget

from affmae_cli.dashboard import pixels
from affmae_cli.dashboard.pictures import PictureGrid
from affmae_cli.dashboard.pixels import pixel_widget
from affmae_engine.events import PreviewSaved
from tests.cli.dashboard.conftest import Recorded
from tests.cli.dashboard.driving import Driver, drive, started, stepped

SIXEL, PLAIN = b"\x1b[?63;4;22c", b"\x1b[?62;c"
KITTY, OLD_KITTY = b"\x1bP>|kitty(0.35.2)\x1b\\" + PLAIN, b"\x1bP>|kitty(0.26.5)\x1b\\" + PLAIN


class Canvas(Widget):
    """Takes and measures a picture as the package's widgets do."""

    def __init__(self, picture: Image.Image) -> None:
        super().__init__()
        self.picture = picture

    def get_content_width(self, container: Size, viewport: Size) -> int:
        return min(container.width, 2 * container.height)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return width // 2


class OtherCanvas(Canvas):
    """For the other protocol."""


RENDERABLES = SimpleNamespace(SixelImage="sixel", TGPImage="kitty", HalfcellImage="half cells")
WIDGETS = SimpleNamespace(SixelImage=Canvas, TGPImage=OtherCanvas)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """(master, slave) of the terminal that the process has for its own; the package is as good as installed."""
    master, slave = pty.openpty()
    tty.setraw(slave)  # what is answered before it is asked for must not be lost
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(pixels, "_PATIENCE_S", 0.1)
    monkeypatch.setattr(pixels, "_AT_ONCE_S", 0.1)
    with os.fdopen(slave, "r", closefd=False) as keys, os.fdopen(slave, "w", closefd=False) as screen:
        monkeypatch.setattr(sys, "__stdin__", keys)
        monkeypatch.setattr(sys, "__stdout__", screen)
        yield master, slave
    os.close(master)
    os.close(slave)


def package(monkeypatch: pytest.MonkeyPatch, found: str) -> list[str]:
    """What the package would find out of the terminal; returns a list that grows when it is imported."""
    renderables, asked = SimpleNamespace(**vars(RENDERABLES), Image=found), []

    def load() -> tuple[SimpleNamespace, SimpleNamespace]:
        asked.append("imported")
        return renderables, WIDGETS

    monkeypatch.setattr(pixels, "_modules", load)
    return asked


@pytest.mark.parametrize(
    ("answer", "found", "chosen"),
    [
        (SIXEL, "sixel", Canvas),
        (KITTY, "kitty", OtherCanvas),
        (OLD_KITTY, "kitty", None),
        (PLAIN, "kitty", None),
        (PLAIN, "half cells", None),
        (b"", "sixel", None),
        (b"abc", "sixel", None),
    ],
    ids=["sixel", "kitty", "old kitty", "nameless", "neither", "no answer", "keys"],
)
def test_what_is_chosen_for_an_answer(
    terminal: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
    answer: bytes,
    found: str,
    chosen: type[Widget] | None,
) -> None:
    master, slave = terminal
    asked, before = package(monkeypatch, found), termios.tcgetattr(slave)
    os.write(master, answer)
    assert pixel_widget("auto") is chosen
    assert os.read(master, 100) == b"\x1b[>q\x1b[c" and termios.tcgetattr(slave) == before
    assert not select.select([slave], [], [], 0)[0]  # nothing of the answer is left to be read as keys
    assert bool(asked) == answer.endswith((SIXEL, PLAIN))  # a terminal that is slow is not asked by the package


def test_blocks_a_missing_package_and_no_terminal_ask_nothing(
    terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    master, _ = terminal
    asked = package(monkeypatch, "sixel")
    assert pixel_widget("blocks") is None
    with monkeypatch.context() as missing:
        missing.setattr(importlib.util, "find_spec", lambda name: None)
        assert pixel_widget("auto") is None
    with Path(os.devnull).open() as nothing, monkeypatch.context() as piped:
        piped.setattr(sys, "__stdin__", nothing)
        assert pixel_widget("auto") is None
    assert asked == [] and not select.select([master], [], [], 0)[0]


def test_an_error_of_the_package_means_half_blocks(terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("the terminal said something else")

    monkeypatch.setattr(pixels, "_modules", fail)
    os.write(terminal[0], SIXEL)
    assert pixel_widget("auto") is None


@pytest.fixture
def pictured(record: Callable[..., Recorded]) -> Recorded:
    """A run with one preview, a grey ramp."""
    run = record(started(), stepped(7), PreviewSaved(step=7, path="previews/ramp.png"))
    (run.root / "previews").mkdir(exist_ok=True)
    Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (64, 1))).save(run.root / "previews" / "ramp.png")
    return run


def test_a_widget_of_pixels_takes_the_place_of_half_blocks(pictured: Recorded) -> None:
    async def look(driver: Driver) -> None:
        wall = driver.screen.query_one("#pictures-grid", PictureGrid)
        await driver.until(lambda: len(wall.query(Canvas)) == 1 and wall.query_one(Canvas).size.width)
        canvas = wall.query_one(Canvas)
        assert canvas.picture.size == (64, 64) and canvas.region.width == 2 * canvas.region.height
        assert wall.region.contains_region(canvas.region) and "▀" not in driver.text()
        await driver.resize((80, 24))
        await driver.until(lambda: [c.region.height for c in wall.query(Canvas)] == [wall.size.height - 1])

    drive(pictured.root, look, tab="pictures", pixels=Canvas)


def test_without_the_package_there_are_half_blocks(pictured: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    async def look(driver: Driver) -> None:
        assert driver.text().count("▀") > 500

    drive(pictured.root, look, tab="pictures", pixels=pixel_widget("auto"))


def test_the_package_draws_sixels(pictured: Recorded) -> None:
    widgets = pytest.importorskip("textual_image.widget")

    async def look(driver: Driver) -> None:
        await driver.until(lambda: "\x1bP0;0;0q" in driver.text())
        assert "▀" not in driver.text()

    drive(pictured.root, look, tab="pictures", pixels=widgets.SixelImage)
