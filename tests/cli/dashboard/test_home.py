"""The start screen: what is found in a folder, the next step, and forms made from the Typer commands."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from textual.pilot import Pilot
from textual.widgets import DataTable, Input, Static

from affmae_cli.commands import finetune, ingest, predict, pretrain
from affmae_cli.dashboard.forms import FormScreen, fields_of, words_of
from affmae_cli.dashboard.home import HomeApp, HomeScreen, look
from affmae_cli.dashboard.runs import RunsFolder
from tests.cli.dashboard.conftest import Trained

COMMANDS = {
    "ingest": ingest.ingest, "pretrain": pretrain.pretrain, "finetune": finetune.finetune, "predict": predict.predict,
}  # fmt: skip
Do = Callable[[HomeApp, Pilot[object]], Awaitable[None]]


def home(folder: Path, do: Do, size: tuple[int, int] = (120, 40), sees: str = "Next:") -> object:
    """Open the start screen, wait until it shows `sees`, do something, and return what it returned."""
    app = HomeApp(folder, COMMANDS)

    async def go() -> None:
        async with app.run_test(size=size) as pilot:
            for _ in range(200):
                await pilot.pause(0.02)
                if isinstance(app.screen, HomeScreen) and sees in text(app):
                    break
            await do(app, pilot)

    asyncio.run(go())
    return app.return_value


def text(app: HomeApp) -> str:
    return "\n".join(strip.text for strip in app.screen._compositor.render_strips())


@pytest.fixture
def lab(trained: Trained, tmp_path: Path) -> Path:
    """A folder with a dataset, both runs and a prediction."""
    shutil.copytree(trained.pretrain.parent, tmp_path / "runs")
    shutil.copytree(trained.pretrain.parent.parent / "em.zarr", tmp_path / "data" / "em.zarr")
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "stack-labels.tif").write_bytes(b"x")
    return tmp_path


def test_everything_in_a_folder_is_found(lab: Path) -> None:
    found = look(lab, RunsFolder(lab / "runs"))
    kinds = [(item.kind, str(item.path)) for item in found.items]
    assert ("dataset", "data/em.zarr") in kinds and ("result", "predictions/stack-labels.tif") in kinds
    assert {("run", "runs/pretrain"), ("run", "runs/finetune"), ("model", "runs/finetune")} <= set(kinds)
    assert found.form == "predict" and found.values == {"model": "runs/finetune"}


def test_the_next_step_follows_what_is_there(lab: Path) -> None:
    shutil.rmtree(lab / "runs" / "finetune")
    found = look(lab, RunsFolder(lab / "runs"))
    assert found.form == "finetune" and found.values == {"init_from": "runs/pretrain"}
    shutil.rmtree(lab / "runs")
    found = look(lab, RunsFolder(lab / "runs"))
    assert found.form == "pretrain" and found.values == {"data": "data/em.zarr"}
    shutil.rmtree(lab / "data")
    (lab / "scans").mkdir()
    (lab / "scans" / "a.tif").touch()
    shutil.rmtree(lab / "predictions")
    found = look(lab, RunsFolder(lab / "runs"))
    assert found.form == "ingest" and found.values == {"sources": "scans"}


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 60)])
def test_a_run_is_opened(lab: Path, size: tuple[int, int]) -> None:
    async def do(app: HomeApp, pilot: Pilot[object]) -> None:
        assert "Next:" in text(app) and "data/em.zarr" in text(app) and "mean IoU" in text(app)
        assert app.screen.query_one(DataTable).row_count == 5
        await pilot.press("down", "enter")

    assert home(lab, do, size, "mean IoU") in (["watch", "runs/pretrain"], ["watch", "runs/finetune"])


def test_an_empty_folder_says_what_to_do(tmp_path: Path) -> None:
    async def do(app: HomeApp, pilot: Pilot[object]) -> None:
        assert "nothing here yet" in text(app) and "affmae demo" in text(app)
        await pilot.press("enter", "q")

    assert home(tmp_path, do, sees="nothing here yet") is None


def test_a_form_shows_the_command_line_it_runs(lab: Path) -> None:
    async def do(app: HomeApp, pilot: Pilot[object]) -> None:
        await pilot.press("p")
        form = app.screen
        assert isinstance(form, FormScreen)
        form.query_one("#field-data", Input).value = "'my data.zarr' b.zarr"
        form.query_one("#field-steps", Input).value = "500"
        form.query_one("#field-set_", Input).value = "optim.lr=1e-3 'model.size=tiny'"
        form.query_one("#field-dry_run").value = True
        await pilot.pause()
        line = str(form.query_one("#form-line", Static).render())
        assert line.startswith("$ affmae pretrain 'my data.zarr' b.zarr") and "--steps 500" in line
        assert "--set optim.lr=1e-3 --set model.size=tiny" in line and "--dry-run" in line
        await pilot.press("ctrl+r")

    words = home(lab, do)
    assert isinstance(words, list) and words[:3] == ["pretrain", "my data.zarr", "b.zarr"] and "--dry-run" in words


def test_what_must_be_filled_in_is_said(tmp_path: Path) -> None:
    async def do(app: HomeApp, pilot: Pilot[object]) -> None:
        await pilot.press("i")
        assert "fill in: SOURCES" in text(app)
        await pilot.press("ctrl+r")
        assert isinstance(app.screen, FormScreen)
        await pilot.press("escape")
        assert isinstance(app.screen, HomeScreen)

    assert home(tmp_path, do) is None


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_form_with_help(name: str) -> None:
    fields = fields_of(COMMANDS[name])
    assert fields and all(field.help for field in fields if field.option)
    assert all(field.option.startswith("--") or not field.option for field in fields)


def test_a_new_option_appears_by_itself() -> None:
    def command(
        where: Annotated[list[str], typer.Argument(help="Files.")],
        kind: Annotated[Literal["a", "b"], typer.Option("--kind", help="Which.")] = "a",
        deep: Annotated[bool, typer.Option("--deep/--flat", help="How.")] = False,
        size: Annotated[int | None, typer.Option("-s", "--size", help="How large.")] = None,
    ) -> None:
        """Does something."""

    fields = fields_of(command)
    assert [(f.option, f.kind, f.many, f.required) for f in fields] == [
        ("", "text", True, True), ("--kind", "choice", False, False), ("--deep", "switch", False, False),
        ("--size", "text", False, False),
    ]  # fmt: skip
    assert fields[1].choices == ("a", "b") and fields[1].default == "a"
    assert words_of(fields, {"where": "x 'y z'", "kind": "a", "deep": True, "size": "3"}) == [
        "x", "y z", "--deep", "--size", "3",
    ]  # fmt: skip
    assert words_of(fields, {"where": "-x", "kind": "b"}) == ["--kind", "b", "--", "-x"]
    with pytest.raises(ValueError, match="quotation"):
        words_of(fields, {"where": "'open"})
