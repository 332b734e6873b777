"""Training in a process of its own, with the dashboard in front of it: both ends of that.

The command runs itself once more, word for word, in a new session: the terminal's signals (Ctrl-C, hang-up) do not
reach that trainer. So no logic exists twice, and the viewer never loads torch or touches the card. Until the run has
begun, what the trainer says is passed on, so an error in the settings or the data looks as if there were one process.
From then on the trainer writes to the run's console.txt and knows nothing of whether anyone watches.

    viewer                                   trainer (the environment variable _AFFMAE_TRAINER_PIPE is set)
    train_in_dashboard  --- starts --->      the same command
                        <-- the run ---      announcer: with its first event
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING

from affmae_cli import output

if TYPE_CHECKING:
    from affmae_engine.events import Event
    from affmae_engine.run_dir import RunDir

PIPE = "_AFFMAE_TRAINER_PIPE"
"""Environment variable with the descriptor on which a trainer says where its run is."""
_LAST_WORDS = 1 << 16
"""Bytes that are passed on at once."""
_LABEL = re.compile(r"(error|hint|warning|stopped|next): (.*)")
_STYLES = {"error": "bold red", "hint": "bold cyan", "warning": "yellow", "stopped": "bold yellow", "next": "bold cyan"}


def dashboard_wanted(*, no_tui: bool, quiet: bool, as_json: bool) -> bool:
    """Whether this command should train in a process of its own and show the dashboard: only in a terminal."""
    if no_tui or quiet or as_json or PIPE in os.environ or "RANK" in os.environ:  # RANK: one of several, by torchrun
        return False
    if os.environ.get("TERM", "dumb") == "dumb":
        return False
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))


def train_in_dashboard() -> int:
    """Run this very command in a new session and watch it; returns the exit code for the command.

    That is the trainer's when it ended, and 0 when the user left and training goes on.
    """
    from affmae_cli.dashboard.app import run_dashboard

    trainer = TrainerProcess.start()
    root = trainer.wait_for_run()
    if root is None:
        return trainer.exit_code()
    try:
        result = run_dashboard(root, child=trainer)
    except BaseException:
        output.say(f"the dashboard failed; training goes on. Watch it with: affmae watch {root}", label="warning")
        raise
    if result.outcome == "detach":
        with contextlib.suppress(OSError):  # the terminal may be gone
            output.say(f"training goes on; look again with: affmae watch {root}")
        return 0
    return trainer.see_out(root, asked=result.outcome == "stop")


class TrainerProcess:
    """A trainer that this process started, seen from outside. Use `start`."""

    def __init__(self, process: subprocess.Popen[bytes], pipe: int, words: IO[bytes]) -> None:
        self._process = process
        self._pipe = pipe
        self._words, self._passed_on = words, 0
        self._interrupted = False

    @classmethod
    def start(cls) -> TrainerProcess:
        """Run this process's own command line again, in a new session, without the terminal."""
        words = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the trainer)
        ours, theirs = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, *sys.orig_argv[1:]],
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                start_new_session=True,
                pass_fds=(theirs,),
                env={**os.environ, PIPE: str(theirs), "COLUMNS": str(output.console().width)},
            )
        finally:
            os.close(theirs)
        return cls(process, ours, words)

    @property
    def pid(self) -> int:
        """Its process id, which is also that of its session."""
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit code (minus the signal's number when it was killed); None while it works."""
        return self._process.poll()

    def wait_for_run(self) -> Path | None:
        """Pass on what the trainer says until it has begun; returns its run, or None when it ended before that."""
        with (
            self._passing_on_interrupts(),
            output.console().status("getting ready ..."),
            os.fdopen(self._pipe, "rb") as pipe,
        ):
            while not select.select([pipe], [], [], 0.1)[0]:
                self._relay(begun=False)
            said = pipe.readline()  # one short line, or the end
            if not said:
                self._process.wait()
        self._relay()
        if not said:
            return None
        found = json.loads(said)
        self._words.close()
        self._words, self._passed_on = Path(found["console"]).open("rb"), found["offset"]  # noqa: SIM115
        return Path(found["run"])

    def see_out(self, root: Path, *, asked: bool) -> int:
        """Wait for the trainer, which was asked to stop or has ended, pass on its last words, return its exit code."""
        if self.poll() is None:
            with output.console().status("stopping after this step, with a checkpoint ..." if asked else "ending ..."):
                try:
                    self._process.wait()
                except KeyboardInterrupt:
                    output.say(f"left while {root} saves and stops by itself")
                    return 128 + signal.SIGINT
        self._relay()
        return self.exit_code()

    def exit_code(self) -> int:
        """As a shell reports it; only when the trainer has ended."""
        code = self._process.wait()
        return code if code >= 0 else 128 - code

    def _relay(self, *, begun: bool = True) -> None:
        """Pass on what was written since; begun: lines that were only begun as well, because nothing follows."""
        # The trainer writes through the same description of the file, so its position is not ours to move.
        end = os.fstat(self._words.fileno()).st_size
        if end - self._passed_on > _LAST_WORDS:  # libraries may have said a lot; what matters comes last
            self._passed_on = end - _LAST_WORDS
        data = os.pread(self._words.fileno(), _LAST_WORDS, self._passed_on)
        if not begun:
            data = data[: data.rfind(b"\n") + 1]
        self._passed_on += len(data)
        for line in data.decode("utf-8", "replace").splitlines():
            match = _LABEL.fullmatch(line)
            if match:
                output.say(match[2], label=match[1], style=_STYLES[match[1]])
            else:
                output.say(line)

    @contextlib.contextmanager
    def _passing_on_interrupts(self) -> Iterator[None]:
        """Ctrl-C, which the terminal sends to us alone, goes to the trainer; the second one ends it at once."""

        def pass_on(_number: int, _frame: FrameType | None) -> None:
            self._process.send_signal(signal.SIGKILL if self._interrupted else signal.SIGINT)
            self._interrupted = True

        before = signal.signal(signal.SIGINT, pass_on)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def is_trainer() -> bool:
    """Whether this process was started by `TrainerProcess.start`."""
    return PIPE in os.environ


def announcer(run: RunDir) -> Callable[[Event], None]:
    """A sink that, with the run's first event, tells the viewer where the run is and turns to console.txt."""
    pipe = int(os.environ.pop(PIPE))
    os.set_inheritable(pipe, False)
    said = False

    def announce(_event: Event) -> None:
        nonlocal said
        if said:
            return
        said = True
        sys.stdout.flush()
        sys.stderr.flush()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        path = run.console
        try:
            console = os.open(path, flags, 0o666)
        except OSError:  # a full disk is told elsewhere
            path = Path(os.devnull)
            console = os.open(path, flags)
        where = {"run": str(run.root), "console": str(path), "offset": os.fstat(console).st_size}
        os.dup2(console, 1)
        os.dup2(console, 2)
        os.close(console)
        with contextlib.suppress(OSError):  # the viewer may be gone: its terminal was closed
            os.write(pipe, json.dumps(where).encode() + b"\n")
        os.close(pipe)

    return announce
