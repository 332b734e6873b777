"""The root command: its help, how quickly it answers, and what it must not import."""

import json
import resource
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from affmae_cli.main import app

HEAVY = ("torch", "numpy", "scipy", "zarr", "textual", "pydantic_settings", "PIL", "tifffile")


def commands() -> list[tuple[str, ...]]:
    """The words of every command, those of `bench` included."""
    root = typer.main.get_command(app)
    names = [(name,) for name in root.commands]
    return [*names, *(("bench", name) for name in root.commands["bench"].commands)]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([*words, "--help"] for words in commands())])
def test_help_and_version_import_nothing_heavy(arguments):
    code = (
        "import sys, json; from affmae_cli.main import app\n"
        f"try: app({arguments!r})\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"print(json.dumps(sorted(set({HEAVY!r}) & set(sys.modules))), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stderr.splitlines()[-1]) == []
    assert done.stdout


def test_help_answers_in_under_300_ms():
    """Measured as processor time, the best of ten at most, so that a busy machine does not decide."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "affmae_cli", "--help"], capture_output=True, check=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert any(once() < 0.3 for _ in range(10))


def test_the_help_lists_every_command_in_the_order_of_the_work():
    root = typer.main.get_command(app)
    assert sorted(root.list_commands(typer.Context(root))) == sorted(root.commands)
    text = CliRunner().invoke(app, ["--help"]).stdout
    text = text[text.index("Commands") :]
    places = [text.index(f" {name} ") for name in ("ingest", "pretrain", "finetune", "predict", "bench", "doctor")]
    assert places == sorted(places)


def test_help_tells_the_story():
    text = CliRunner().invoke(app, ["--help"]).stdout
    story = [text.index(f"affmae {step}") for step in ("demo", "ingest", "pretrain", "finetune", "predict", "watch")]
    assert story == sorted(story)


def test_no_arguments_show_the_help():
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    assert "Usage" in result.stdout + result.stderr


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("affmae ")


def test_unknown_commands_and_options_are_usage_errors():
    assert CliRunner().invoke(app, ["presetz"]).exit_code == 2
    assert CliRunner().invoke(app, ["presets", "--no-such"]).exit_code == 2


@pytest.mark.parametrize("words", commands())
def test_every_option_has_a_help_text(words):
    command = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    assert command.help
    assert [parameter.name for parameter in command.params if not getattr(parameter, "help", None)] == []
    for parameter in command.params:
        assert all(opt.startswith("--") or len(opt) == 2 for opt in parameter.opts if opt.startswith("-"))
