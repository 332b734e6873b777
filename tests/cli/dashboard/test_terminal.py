"""The terminal is given back whatever ends the dashboard, on a real pseudo-terminal; and torch is never loaded."""

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.dashboard.conftest import Recorded
from tests.cli.dashboard.driving import started, stepped

PROGRAM = """
import sys
from pathlib import Path
from affmae_cli.dashboard import app
from affmae_cli.dashboard.run_screen import RunScreen
if sys.argv[2] == "broken":
    def action_pause(self): raise ValueError("a bug of ours")
    RunScreen.action_pause = action_pause
try:
    result = app.run_dashboard(Path(sys.argv[1]))
finally:
    print("TORCH" if "torch" in sys.modules else "LIGHT", flush=True)
print("OUTCOME", result.outcome, flush=True)
"""
ON = (b"\x1b[?1049h", b"\x1b[?1000h", b"\x1b[?25l")
OFF = (b"\x1b[?1049l", b"\x1b[?1000l", b"\x1b[?25h")


class Terminal:
    """A program behind a pseudo-terminal."""

    def __init__(self, *words: str) -> None:
        self.master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (24, 80))
        self.before = termios.tcgetattr(self.slave)
        environment = {**os.environ, "TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *words],
            stdin=self.slave, stdout=self.slave, stderr=self.slave, env=environment, start_new_session=True,
        )  # fmt: skip
        self.seen = b""

    def read_until(self, done: Callable[[], object], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, self.seen[-2000:].decode(errors="replace")
            if select.select([self.master], [], [], 0.05)[0]:
                self.seen += os.read(self.master, 1 << 16)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for descriptor in (self.master, self.slave):
            os.close(descriptor)


@pytest.mark.parametrize(
    ("ending", "code", "says"),
    [
        (b"q", 0, b"OUTCOME detach"),
        (signal.SIGTERM, 0, b"OUTCOME detach"),
        (signal.SIGHUP, 0, b"OUTCOME detach"),
        (signal.SIGINT, 0, b"OUTCOME detach"),
        (b"p", 1, b"a bug of ours"),
    ],
    ids=["q", "TERM", "HUP", "INT", "exception"],
)
def test_the_terminal_is_given_back(
    record: Callable[..., Recorded], ending: bytes | signal.Signals, code: int, says: bytes
) -> None:
    run = record(started(), stepped(7))
    with run.run.locked():
        terminal = Terminal(str(run.root), "broken" if ending == b"p" else "whole")
        try:
            terminal.read_until(lambda: b"812" in terminal.seen)
            assert all(sequence in terminal.seen for sequence in ON)
            if isinstance(ending, bytes):
                os.write(terminal.master, ending)
            else:
                terminal.process.send_signal(ending)
            terminal.read_until(lambda: terminal.process.poll() is not None)
            terminal.read_until(lambda: says in terminal.seen and b"LIGHT" in terminal.seen)
            assert terminal.process.returncode == code
            for on, off in zip(ON, OFF, strict=True):
                assert terminal.seen.rfind(off) > terminal.seen.rfind(on), off
            assert termios.tcgetattr(terminal.slave) == terminal.before
        finally:
            terminal.close()


@pytest.mark.parametrize("told", [True, False], ids=["hangup", "silence"])
def test_a_terminal_that_is_gone_ends_the_dashboard(record: Callable[..., Recorded], told: bool) -> None:
    run = record(started(), stepped(7))
    terminal = Terminal(str(run.root), "whole")
    try:
        terminal.read_until(lambda: b"812" in terminal.seen)
        os.close(terminal.slave)
        os.close(terminal.master)
        if told:
            terminal.process.send_signal(signal.SIGHUP)  # as the kernel does to the session's leader
        assert terminal.process.wait(timeout=30) == 129
    finally:
        terminal.process.kill()
        terminal.process.wait()


def test_the_dashboard_loads_no_torch(tmp_path: Path) -> None:
    program = "import sys, affmae_cli.dashboard.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
