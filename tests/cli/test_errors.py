"""What failures show: text, stream, exit code; of known errors, interruptions, closed and full outputs, and bugs."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from affmae_cli import output
from affmae_cli.errors import ErrorGroup
from affmae_cli.main import app as affmae
from affmae_engine import errors


def application(failure: BaseException) -> typer.Typer:
    """An application with the command `fail`, which raises."""
    app = typer.Typer(cls=ErrorGroup)

    @app.callback()
    def root() -> None:
        """Needed for a single command to be a group."""

    @app.command()
    def fail() -> None:
        output.show("a result")
        raise failure

    return app


def run(failure: BaseException):
    return CliRunner().invoke(application(failure), ["fail"])


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.AffmaeError, 1),
        (errors.ConfigError, 2),
        (errors.InputError, 3),
        (errors.ResourceError, 4),
        (errors.BusyError, 5),
        (errors.CorruptError, 6),
        (errors.DivergedError, 7),
    ],
)
def test_known_errors(kind, code):
    result = run(kind("it broke", "mend it"))
    assert result.exit_code == code
    assert result.stdout == "a result\n"
    assert result.stderr == "error: it broke\nhint: mend it\n"


def test_a_file_that_the_system_refuses():
    result = run(PermissionError(errno.EACCES, "Permission denied", "theirs/a.tif"))
    assert result.exit_code == 3
    assert result.stderr == "error: cannot use theirs/a.tif: permission was denied\nhint: check who may use it\n"


@pytest.mark.usefixtures("permissions_count")
def test_commands_where_nothing_may_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs" / "runs").mkdir(parents=True)
    (tmp_path / "theirs").chmod(0)
    try:
        for words in (
            ["watch", "theirs/runs", "--once"],
            ["check", "theirs/store"],
            ["ingest", "theirs/a.tif", "-o", "out"],
            ["ingest", "x" * 300, "-o", "out"],
            ["ingest", "theirs", "-o", "out"],
        ):
            result = CliRunner().invoke(affmae, words)
            assert result.exit_code == 3 and "error: " in result.stderr, words
            assert any(why in result.output for why in ("permission was denied", "the name is too long")), words
    finally:
        (tmp_path / "theirs").chmod(0o700)


def test_no_hint_no_line():
    assert run(errors.InputError("it broke")).stderr == "error: it broke\n"


def test_a_clean_stop_is_not_called_an_error():
    result = run(errors.Interrupted("stopped after step 5", signal_number=signal.SIGTERM))
    assert result.exit_code == 143
    assert result.stderr == "stopped: stopped after step 5\n"


def test_ctrl_c():
    result = run(KeyboardInterrupt())
    assert result.exit_code == 130
    assert result.stderr == "stopped: interrupted\n"


def test_a_reader_that_left_is_not_an_error():
    result = run(BrokenPipeError())
    assert result.exit_code == 141
    assert result.stderr == ""


def test_other_exceptions_are_not_hidden():
    result = run(ZeroDivisionError("a bug"))
    assert isinstance(result.exception, ZeroDivisionError)


def test_debug_adds_the_traceback(monkeypatch, capsys):
    monkeypatch.setenv("AFFMAE_DEBUG", "1")
    try:
        raise errors.InputError("it broke") from ValueError("the cause")
    except errors.InputError as error:
        from affmae_cli.errors import report

        report(error)
    text = capsys.readouterr().err
    assert "Traceback" in text and "the cause" in text
    assert text.endswith("error: it broke\n")


@pytest.mark.parametrize("message", ["[bold]scan[/bold].tif", "[/oops] x", "a:smile:b", "[link=x]y[/]"])
def test_markup_in_messages_is_shown_as_it_is(message):
    result = run(errors.InputError(f"cannot read {message}", message))
    assert result.stderr == f"error: cannot read {message}\nhint: {message}\n"


def test_control_characters_and_undecodable_names_are_shown_not_sent():
    name = os.fsdecode(b"a\x1b[31m\xff\r.tif")
    result = run(errors.InputError(f"cannot read {name}\n  second line"))
    assert result.stderr == "error: cannot read a\\x1b[31m\\udcff\\r.tif\n  second line\n"


def test_long_messages_are_not_wrapped():
    message = "word " * 100 + "end"
    assert run(errors.InputError(message)).stderr == f"error: {message}\n"


def process(code: str, **options) -> subprocess.Popen:
    """A child that runs Python code with the repository's packages."""
    environment = {**os.environ, "COLUMNS": "100", **options.pop("env", {})}
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment, **options)


PRESETS = "import sys; from affmae_cli.main import main; sys.argv[1:] = ['presets', 'demo']; main()"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["presets"], ["presets", "demo"], ["presets", "--json"]])
def test_a_full_disk_behind_stdout(arguments):
    with Path("/dev/full").open("w") as full:
        child = process(PRESETS.replace("['presets', 'demo']", repr(arguments)), stdout=full)
        _, text = child.communicate(timeout=60)
    assert child.returncode == 4
    assert text == "error: cannot write to standard output: No space left on device\n"


def test_a_closed_pipe_is_quiet():
    reading, writing = os.pipe()
    os.close(reading)
    child = process(PRESETS, stdout=writing)
    os.close(writing)
    _, text = child.communicate(timeout=60)
    assert (child.returncode, text) == (141, "")


def test_closed_streams():
    code = f"import os; os.close(1); os.execv({sys.executable!r}, [{sys.executable!r}, '-c', {PRESETS!r}])"
    child = process(code)
    _, text = child.communicate(timeout=60)
    assert (child.returncode, text) == (0, "")


@pytest.mark.parametrize("arguments", [["presets"], ["--help"], ["presets", "caf\u00e9"]])
def test_ascii_streams(arguments):
    child = process(
        PRESETS.replace("['presets', 'demo']", ascii(arguments)),
        stdout=subprocess.PIPE,
        env={"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    out, text = child.communicate(timeout=60)
    assert (out + text).isascii()
    assert "\x1b" not in out + text
    assert "Traceback" not in text
    if "caf\u00e9" in arguments:
        assert child.returncode == 2 and "caf\\xe9" in text
    else:
        assert child.returncode == 0 and "demo" in out
