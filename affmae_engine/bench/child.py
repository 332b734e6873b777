"""Work items in child processes: the one way in which every benchmark runs its cases.

    parent   Children.run(target, items) starts `python -m affmae_engine.bench.child` and yields its messages
    child    reads one line of JSON from stdin, calls `target(item, tell)` for each item, prints messages

Messages are lines of JSON on the child's stdout; what libraries print goes to stderr, which is logged. A child that
crashes or exceeds the timeout costs the item it was working on. A child whose GPU stops answering after a failed item
(an illegal access, a broken CUDA graph capture) exits, and a new child continues with the remaining items.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from affmae_engine.events import finite

COMMAND = (sys.executable, "-m", "affmae_engine.bench.child")
_GRACE_S = 10.0

Message = dict[str, Any]
"""`event` and `index` (of the item). Events: "began"; "ended" with `result`; "failed" with `reason` and `timed_out`;
and whatever the target passes to `tell`."""
Tell = Callable[[Message], None]


class Children:
    """Starts child processes and ends those that still run when the context is left.

    Args:
        timeout: seconds without a message while the child works on an item; None: no limit.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self._timeout = timeout
        self._running: set[_Child] = set()
        self._lock = threading.Lock()
        self._ending = False

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def run(
        self,
        target: str,
        items: Sequence[Mapping[str, Any]],
        *,
        log: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Iterator[Message]:
        """Messages about the items, in order. May be called from several threads.

        Args:
            target: "package.module:function"; the function takes an item and `tell`, and returns a dict with "status".
            items: JSON values.
            log: file that gets the children's stderr; None: a temporary file.
            environment: variables on top of this process's own.
        """
        left = list(range(len(items)))
        while left and not self._is_ending():
            child = _Child(target, [items[index] for index in left], log, environment or {})
            began: int | None = None
            finished: set[int] = set()
            with self._registered(child):
                for message in child.messages(self._timeout):
                    message["index"] = left[message["index"]]
                    if message["event"] == "began":
                        began = message["index"]
                    elif message["event"] == "ended":
                        finished.add(message["index"])
                        began = None
                    yield message
                reason, timed_out = child.death(), child.timed_out
            if self._is_ending():
                return
            left = [index for index in left if index not in finished]
            if began is None and finished:
                continue  # it ended in order, after a failure that left its GPU unusable
            # A child that died before its first item would die again: all of its items have failed.
            victims = left if began is None else [began]
            for index in victims:
                yield {"event": "failed", "index": index, "reason": reason, "timed_out": timed_out}
            left = [index for index in left if index not in victims]

    def _is_ending(self) -> bool:  # a method: another thread may set it at any time
        return self._ending

    def end(self) -> None:
        """End all children and start no more. Safe from any thread."""
        self._ending = True
        with self._lock:
            running = list(self._running)
        for child in running:
            child.end()

    @contextlib.contextmanager
    def _registered(self, child: _Child) -> Iterator[None]:
        with self._lock:
            self._running.add(child)
        try:
            if self._ending:
                child.end()
            yield
        finally:
            child.end()
            with self._lock:
                self._running.discard(child)


class _Child:
    """One started process."""

    def __init__(self, target: str, items: Sequence[Any], log: Path | None, environment: Mapping[str, str]) -> None:
        self.timed_out = False
        self._lock = threading.Lock()
        self._log = tempfile.TemporaryFile() if log is None else log.open("a+b")  # noqa: SIM115 (closed by `end`)
        # A session of its own: Ctrl-C reaches the parent alone, which then ends its children.
        self._process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
            env={**os.environ, **environment},
            start_new_session=True,
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once, which `messages` shows
            self._process.stdin.write(json.dumps({"target": target, "items": list(items)}) + "\n")
            self._process.stdin.flush()

    def messages(self, timeout: float | None) -> Iterator[Message]:
        assert self._process.stdout is not None
        timer = self._restarted(None, timeout)
        try:
            for line in self._process.stdout:
                if line.startswith("{"):  # anything else was printed while modules were imported
                    message = json.loads(line)
                    timer = self._restarted(timer, None if message["event"] == "ended" else timeout)
                    yield message
        finally:
            self._restarted(timer, None)
        self._process.wait()

    def death(self) -> str:
        """Why it ended early, in one line."""
        code = self._process.returncode
        if self.timed_out:
            return "no result within the time limit"
        if code == -signal.SIGKILL:
            return "the process was killed; perhaps the machine ran out of memory"
        with self._lock:
            if self._log.closed:
                return "the process was stopped"
            self._log.seek(0)
            lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"the process died ({how}): {lines[-1][:200] if lines else 'no output'}"

    def end(self) -> None:
        """End it and the processes it started; no effect on one that is over."""
        with self._lock:
            if self._process.poll() is None:
                self._signal(signal.SIGTERM)
                try:
                    self._process.wait(_GRACE_S)
                except subprocess.TimeoutExpired:
                    self._signal(signal.SIGKILL)
                    self._process.wait()
            if self._process.stdin is not None and not self._process.stdin.closed:
                with contextlib.suppress(BrokenPipeError):
                    self._process.stdin.close()
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._log.close()

    def _restarted(self, timer: threading.Timer | None, timeout: float | None) -> threading.Timer | None:
        """Stop a timer, and start one that kills the process after `timeout` seconds (None: no timer)."""

        def give_up() -> None:
            self.timed_out = True
            self._signal(signal.SIGKILL)

        if timer is not None:
            timer.cancel()
        if timeout is None:
            return None
        timer = threading.Timer(timeout, give_up)
        timer.daemon = True
        timer.start()
        return timer

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def _exit_with_parent(stdin: TextIO) -> None:
    """Exit when the parent is gone: it holds the other end of stdin and never writes again."""

    def watch() -> None:
        stdin.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _gpu_answers() -> bool:
    """Whether this process can still compute; after some errors every CUDA call or every random number fails."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return True
    try:
        torch.rand(1, device="cuda")
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def main() -> None:
    """Work through the items of one request."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())
    _exit_with_parent(sys.stdin)

    def tell(message: Message, index: int) -> None:
        channel.write(json.dumps(finite({**message, "index": index})) + "\n")
        channel.flush()

    module, _, name = request["target"].partition(":")
    function = getattr(importlib.import_module(module), name)
    for index, item in enumerate(request["items"]):
        tell({"event": "began"}, index)
        result = function(item, lambda message, index=index: tell(message, index))
        tell({"event": "ended", "result": result}, index)
        if result["status"] != "ok" and not _gpu_answers():
            return


if __name__ == "__main__":
    main()
