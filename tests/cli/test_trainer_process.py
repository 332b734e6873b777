"""A real trainer behind a real terminal: watched, asked, left alone, killed, resumed, stopped.

The commands run under a pseudo-terminal, as a user has them. What the screens show is tested elsewhere; here it is the
processes, what they leave on disk, and that the terminal comes back as it was.
"""

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import tifffile
from typer.testing import CliRunner

from affmae_cli.main import app
from affmae_cli.trainer_process import TrainerProcess, dashboard_wanted
from affmae_engine.data.ingest import ingest
from affmae_engine.events import from_line
from affmae_engine.run_dir import RunDir

ALTERNATE, BACK, CURSOR = b"\x1b[?1049h", b"\x1b[?1049l", b"\x1b[?25h"
SMALL = (
    "model.size=tiny", "model.patch_size=8", "data.crop_size=64", "data.workers=0", "data.holdout=0.3",
    "mask.lattices=[4]", "train.batch_size=2", "train.micro_batch=2", "train.log_every=1", "train.eval_every=0",
    "train.preview_every=0", "train.checkpoint_every=0",
)  # fmt: skip


class Terminal:
    """A command under a pseudo-terminal of 100 x 30."""

    def __init__(self, folder: Path, *words: object) -> None:
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
            environment = {**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
            os.execve(sys.executable, [sys.executable, "-m", "affmae_cli", *map(str, words)], environment)
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self.shown = b""

    def until(self, wanted: bytes, seconds: float = 90.0) -> None:
        """Read until that was shown."""
        deadline = time.monotonic() + seconds
        while wanted not in self.shown:
            assert time.monotonic() < deadline, self.shown[-3000:].decode(errors="replace")
            if not self.read():
                assert wanted in self.shown, self.shown[-3000:].decode(errors="replace")

    def read(self, seconds: float = 0.1) -> bool:
        """Take what is there; False at the end."""
        if not select.select([self.master], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self.master, 1 << 16)
        except OSError:
            return False
        self.shown += data
        return bool(data)

    def press(self, key: bytes, answer: bytes) -> None:
        """Type a key and wait for what it brings."""
        self.shown = b""
        os.write(self.master, key)
        self.until(answer)

    def exit_code(self, seconds: float = 60.0) -> int:
        """Read to the end and wait."""
        deadline = time.monotonic() + seconds
        while self.read(1.0):
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kinds(run: RunDir) -> list[str]:
    lines = run.metrics.read_bytes().split(b"\n")[:-1] if run.metrics.exists() else []
    return [json.loads(line)["kind"] for line in lines]


def step(run: RunDir) -> int:
    found = [from_line(line) for line in run.metrics.read_text().splitlines()[-5:]]
    return max((event.step for event in found if event is not None), default=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    tifffile.imwrite(folder / "stack.tif", np.random.default_rng(0).integers(0, 255, (6, 96, 96), dtype=np.uint8))
    ingest([folder / "stack.tif"], folder / "em.zarr")
    return folder


@pytest.fixture
def run(folder: Path) -> Iterator[RunDir]:
    run = RunDir(folder / "runs" / "a")
    yield run
    holder = run.holder()
    if holder.state == "held" and holder.process is not None:
        os.kill(holder.process, signal.SIGKILL)


def pretrain(*more: object) -> list[object]:
    settings = [word for pair in SMALL for word in ("--set", pair)]
    return ["pretrain", "em.zarr", "--preset", "demo", "--device", "cpu", *settings, *more]


def summary(run: RunDir) -> str:
    result = CliRunner().invoke(app, ["watch", str(run.root), "--once"])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_run_from_start_to_stop_behind_terminals(folder: Path, run: RunDir) -> None:
    terminal = Terminal(folder, *pretrain("--steps", 1_000_000, "-o", "runs/a"))
    terminal.until(ALTERNATE)
    trainer = run.holder().process
    assert trainer is not None and trainer != terminal.pid and os.getsid(trainer) == trainer
    descriptors = {entry.name: str(entry.readlink()) for entry in Path(f"/proc/{trainer}/fd").iterdir()}
    assert descriptors["1"] == descriptors["2"] == str(run.console) and descriptors["0"] == "/dev/null"
    loaded = Path(f"/proc/{terminal.pid}/maps").read_text()
    assert "libtorch" not in loaded, "the viewer must not load torch"

    wait_for(lambda: "step" in kinds(run))
    (run.control / "checkpoint").touch()  # asked from elsewhere
    wait_for(lambda: "request" in kinds(run) and "checkpoint" in kinds(run), 10.0)

    os.close(terminal.master)  # the terminal is closed: hang-up
    os.waitpid(terminal.pid, 0)
    before = step(run)
    wait_for(lambda: step(run) > before + 3)
    assert run.holder().process == trainer and "running" in summary(run)

    again = Terminal(folder, "watch")  # the newest live run of runs/
    again.until(b"images/s")
    again.press(b"q", BACK)
    assert again.exit_code() == 0 and CURSOR in again.shown
    assert run.holder().process == trainer

    os.kill(trainer, signal.SIGKILL)
    wait_for(lambda: run.holder().state == "free")
    assert "gone" in summary(run) and "resume with: affmae pretrain --resume" in summary(run)

    resumed = Terminal(folder, "pretrain", "--resume", "runs/a")
    resumed.until(ALTERNATE)
    wait_for(lambda: run.holder().state == "held")
    resumed.until(b"images/s")
    resumed.press(b"q", b"Stop after a checkpoint")
    resumed.press(b"s", BACK)
    assert resumed.exit_code() == 130
    assert b"by request at step" in resumed.shown
    assert b"affmae pretrain --resume runs/a" in resumed.shown
    record = json.loads(run.summary.read_text())
    assert record["status"] == "stopped" and run.checkpoint_steps()[0] == record["step"]
    assert "stopped" in summary(run) and "Traceback" not in run.console.read_text()


def test_a_run_that_ends_gives_the_usual_last_lines(folder: Path) -> None:
    terminal = Terminal(folder, *pretrain("--steps", 3, "-o", "runs/short"))
    terminal.until(ALTERNATE)
    terminal.until(b"finished")
    terminal.press(b"q", BACK)
    assert terminal.exit_code() == 0
    after = terminal.shown.rpartition(BACK)[2].decode()
    assert "runs/short: 3 steps" in after and "affmae finetune --images" in after
    assert "finished" in summary(RunDir(folder / "runs" / "short"))


def test_what_fails_before_the_run_begins_looks_like_one_process(folder: Path) -> None:
    terminal = Terminal(folder, "pretrain", "missing.zarr", "--preset", "demo")
    assert terminal.exit_code() == 3
    text = terminal.shown.decode()
    assert "error: " in text and "missing.zarr" in text and "Traceback" not in text and ALTERNATE not in terminal.shown
    assert not any("missing.zarr" in " ".join(p.cmdline()) for p in psutil.Process().children(recursive=True))


def test_ctrl_c_before_the_run_begins_ends_both(folder: Path) -> None:
    terminal = Terminal(folder, *pretrain("--steps", 3, "-o", "runs/never"))
    terminal.until(b"getting ready")
    time.sleep(0.5)
    os.write(terminal.master, b"\x03")
    assert terminal.exit_code() == 130
    assert not (folder / "runs" / "never" / "metrics.jsonl").exists()


def test_the_dashboard_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not dashboard_wanted(no_tui=False, quiet=False, as_json=False)  # these streams are none
    for stream in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(getattr(sys, stream), "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert dashboard_wanted(no_tui=False, quiet=False, as_json=False)
    for option in ("no_tui", "quiet", "as_json"):
        assert not dashboard_wanted(**{"no_tui": False, "quiet": False, "as_json": False, option: True})
    monkeypatch.setenv("RANK", "0")
    assert not dashboard_wanted(no_tui=False, quiet=False, as_json=False)
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("TERM", "dumb")
    assert not dashboard_wanted(no_tui=False, quiet=False, as_json=False)


def said_before_a_run(code: str, capsys: pytest.CaptureFixture[str], *, ended: bool = False) -> str:
    """What is passed on of a trainer that runs `code` and ends without a run. ended: nobody looked before it had."""
    with tempfile.TemporaryFile() as words:
        ours, theirs = os.pipe()
        process = subprocess.Popen([sys.executable, "-c", code], stderr=words, pass_fds=(theirs,))
        os.close(theirs)
        if ended:
            process.wait()
        trainer = TrainerProcess(process, ours, words)
        assert trainer.wait_for_run() is None and trainer.exit_code() == 0
    return capsys.readouterr().err


def test_a_line_that_a_trainer_writes_in_pieces_is_passed_on_whole(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import os, time; os.write(2, b'error: the da'); time.sleep(0.5); os.write(2, b'ta\\nhint: no end')"
    said = said_before_a_run(code, capsys)
    assert "error: the data\n" in said and "hint: no end\n" in said


def test_of_much_that_a_trainer_said_the_end_is_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import os; [os.write(2, b'noise ' * 5000 + b'\\n') for _ in range(100)]; os.write(2, b'error: the end\\n')"
    said = said_before_a_run(code, capsys, ended=True)
    assert said.endswith("error: the end\n") and len(said) < 200_000
