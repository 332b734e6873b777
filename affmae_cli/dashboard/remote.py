"""Runs on another machine, over the user's ssh. The other side needs a POSIX shell and access to the run folder.

One ssh connection runs a small shell script that answers one request a line. A thread copies what is new into a
temporary folder, where the dashboard reads it like any run: metrics.jsonl and log.txt grow by what was appended, small
files and previews are copied whole. Requests to the trainer go the other way. A connection that is lost is made anew;
training goes on in any case.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from affmae_cli.dashboard.run_model import ORIGIN
from affmae_engine.errors import InputError
from affmae_engine.run_dir import REQUESTS

SECONDS_BETWEEN_LOOKS, SECONDS_UNTIL_AGAIN = 1.0, 5.0
_REFRESH_S = 20.0
"""Small files of the same size are copied again after this long."""
_CHUNK = 4 << 20
_PREVIEWS = 20
_NAME = re.compile(
    r"(?:[^/\n]+/)?(?:config\.toml|(?:environment|best|summary)\.json|run\.lock|metrics\.jsonl|log\.txt"
    r"|previews/[^/\n]+\.png|control/(?:stop|checkpoint))"
)
"""Files that are copied; any other name in the listing is passed over."""
_GROWING = ("metrics.jsonl", "log.txt")
_SCRIPT = r"""
cd -- "$1" || exit 3
while IFS=' ' read -r what offset count name; do
  case $what in
    L) for f in config.toml environment.json best.json summary.json run.lock metrics.jsonl log.txt previews/*.png \
         control/stop control/checkpoint */config.toml */environment.json */best.json */summary.json */run.lock \
         */metrics.jsonl */log.txt */previews/*.png */control/stop */control/checkpoint
       do [ -f "$f" ] && printf '%s %s\n' "$(($(wc -c < "$f")))" "$f"; done; echo end;;
    G) n=$(($(wc -c < "$name" || echo 0) - offset)); [ "$n" -gt "$count" ] && n=$count; [ "$n" -lt 0 ] && n=0
       echo "$n"; tail -c +$((offset + 1)) -- "$name" | head -c "$n";;
    T) : > "$name" && echo ok || echo failed;;
  esac
done
"""


@dataclass(frozen=True)
class Remote:
    """A folder on another machine: host as ssh takes it (user@host), and the path there."""

    host: str
    path: str

    @classmethod
    def parse(cls, text: str) -> Remote | None:
        """[user@]host:path; None for anything else, such as a path with a slash before the colon."""
        match = re.fullmatch(r"([A-Za-z0-9_][\w.@%+-]*):(.*)", text)
        return cls(match[1], match[2] or ".") if match else None


class Mirror:
    """Copies what is new of the folder into `folder`. Not for use by several threads at once."""

    def __init__(self, remote: Remote, folder: Path) -> None:
        self.remote, self.folder = remote, folder
        (folder / ORIGIN).write_text(f"{remote.host}:{remote.path}", "utf-8")
        self._process: subprocess.Popen[bytes] | None = None
        self._copied: dict[str, tuple[int, float]] = {}

    def sync(self) -> None:
        """Copy what is new.

        Raises:
            OSError: the connection was lost or never came about; the text says why.
        """
        self._send_requests()
        sizes = self._listing()
        previews = sorted(name for name in sizes if name.endswith(".png"))
        dropped = {name for name in previews if name not in self._copied} - set(previews[-_PREVIEWS:])
        for name in sorted(sizes, key=lambda name: not name.endswith("config.toml")):
            if name in dropped or "control/" in name:
                continue
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("config.toml"):
                (path.parent / "control").mkdir(exist_ok=True)
            if name.endswith(_GROWING):
                self._append(name, path, sizes[name])
            elif name.endswith("run.lock"):
                self._copy_lock(name, path)
            else:
                self._copy(name, path, sizes[name])
        for name in REQUESTS:  # what the trainer took is taken here
            for path in self.folder.glob(f"**/control/{name}"):
                if path.relative_to(self.folder).as_posix() not in sizes:
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        """End the connection."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _send_requests(self) -> None:
        for name in REQUESTS:
            for path in self.folder.glob(f"**/control/{name}"):
                if path.stat().st_size == 0:  # not sent yet
                    self._ask(f"T 0 0 {path.relative_to(self.folder).as_posix()}")
                    if self._line() == "ok":
                        path.write_bytes(b"sent")

    def _listing(self) -> dict[str, int]:
        self._ask("L 0 0 -")
        sizes = {}
        while (line := self._line()) != "end":
            size, _, name = line.partition(" ")
            if _NAME.fullmatch(name) and size.isdigit() and ".." not in name.split("/"):
                sizes[name] = int(size)
        return sizes

    def _append(self, name: str, path: Path, size: int) -> None:
        here = path.stat().st_size if path.exists() else 0
        if size < here:  # replaced by another file
            path.unlink()
            here = 0
        while here < size:
            data = self._get(name, here, _CHUNK)
            if not data:
                return
            with path.open("ab") as file:
                file.write(data)
            here += len(data)

    def _copy(self, name: str, path: Path, size: int) -> None:
        known = self._copied.get(name, (-1, 0.0))
        if known[0] != size or (not name.endswith(".png") and time.monotonic() - known[1] > _REFRESH_S):
            data = self._get(name, 0, 64 << 20)
            partial = path.with_name(f".{path.name}.partial")
            partial.write_bytes(data)
            partial.replace(path)
            self._copied[name] = size, time.monotonic()

    def _copy_lock(self, name: str, path: Path) -> None:
        """The lock itself cannot be seen from here, only who held it last; so whether it is held is not known."""
        text = self._get(name, 0, 512)
        path.write_bytes((text if b" on " in text else b"process 0 on another machine") + b" (over ssh)")

    def _get(self, name: str, offset: int, count: int) -> bytes:
        self._ask(f"G {offset} {count} {name}")
        size = self._line()
        if not size.isdigit():
            raise ConnectionError(f"{self.remote.host} answered {size[:80]!r}")
        output = self._output
        data = output.read(int(size))
        if len(data) < int(size):
            raise ConnectionError(f"the connection to {self.remote.host} was lost")
        return data

    @property
    def _output(self) -> IO[bytes]:
        assert self._process is not None and self._process.stdout is not None
        return self._process.stdout

    def _ask(self, line: str) -> None:
        if self._process is None or self._process.poll() is not None:
            command = f"exec sh -c {shlex.quote(_SCRIPT)} affmae {shlex.quote(self.remote.path)}"
            self._process = subprocess.Popen(
                ["ssh", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3", "--", self.remote.host, command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C of the dashboard is not for ssh
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # told by the missing answer
            self._process.stdin.write(line.encode("utf-8", "surrogateescape") + b"\n")
            self._process.stdin.flush()

    def _line(self) -> str:
        line = self._output.readline()
        if line.endswith(b"\n"):
            return line[:-1].decode("utf-8", "surrogateescape")
        assert self._process is not None and self._process.stdin is not None and self._process.stderr is not None
        with contextlib.suppress(OSError):  # it may hold a request that nobody reads any more
            self._process.stdin.close()
        said = self._process.stderr.read().decode("utf-8", "replace").strip().splitlines()
        code = self._process.wait()
        self._process = None
        if code == 3:
            raise FileNotFoundError(f"no such folder on {self.remote.host}: {self.remote.path}")
        raise ConnectionError(said[-1] if said else f"ssh ended with exit code {code}")


@contextlib.contextmanager
def mirrored(remote: Remote) -> Iterator[Path]:
    """A local copy of the folder that a thread keeps up to date.

    Raises:
        InputError: ssh is missing, cannot connect, or the folder does not exist.
    """
    with tempfile.TemporaryDirectory(prefix="affmae-watch-") as folder:
        root = Path(folder) / (Path(remote.path).name or remote.host)
        root.mkdir()
        mirror, stop = Mirror(remote, root), threading.Event()
        try:
            mirror.sync()
        except OSError as error:
            mirror.close()
            text = error.strerror or str(error)
            raise InputError(
                f"{remote.host}:{remote.path}: {text}", f"try: ssh {remote.host} ls {remote.path}"
            ) from error

        def keep_up() -> None:
            while not stop.wait(pause[0]):
                try:
                    mirror.sync()
                    pause[0] = SECONDS_BETWEEN_LOOKS
                except (OSError, ValueError):  # the connection; it is made anew
                    mirror.close()
                    pause[0] = SECONDS_UNTIL_AGAIN

        pause = [SECONDS_BETWEEN_LOOKS]
        thread = threading.Thread(target=keep_up, daemon=True)
        thread.start()
        try:
            yield root
        finally:
            stop.set()
            mirror.close()
            thread.join(5)
