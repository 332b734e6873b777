"""Worker processes of a quality comparison as their parent sees them: where they run, what they tell, why they died."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from affmae_engine.bench.quality_worker import Job
from affmae_engine.doctor.machine import find_cards

_GRACE_S = 10.0
COMMAND = (sys.executable, "-m", "affmae_engine.bench.quality_worker")


class Process:
    """A started worker.

    Args:
        job: what it does.
        environment: variables over this process's own.
        log: file that takes its stderr.

    Attributes:
        ready: whether it got as far as opening the store. ended: names of the work it finished.
    """

    def __init__(self, job: Job, environment: Mapping[str, str], log: Path) -> None:
        self.log, self.ready, self.ended = log, False, set[str]()
        self._lock = threading.Lock()
        with log.open("ab") as errors:
            # A session of its own: Ctrl-C reaches the comparison alone, which then decides.
            self._child = subprocess.Popen(
                COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8",
                env={**os.environ, **environment}, start_new_session=True,
            )  # fmt: skip
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once, which `messages` will show
            self._child.stdin.write(job.to_json() + "\n")
            self._child.stdin.flush()

    def messages(self) -> Iterator[dict[str, Any]]:
        """What it tells, until it ends."""
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if not line.startswith("{"):  # something printed while modules were loaded
                continue
            message = json.loads(line)
            self.ready = self.ready or message["event"] == "ready"
            if message["event"] == "ended":
                self.ended.add(message["name"])
            yield message
        self._child.wait()

    @property
    def gave_up(self) -> bool:
        """Whether it ended in order, after some of its work: another process is to do the rest."""
        return bool(self.ended) and self._child.wait() == 0

    def death(self) -> str:
        """Why it ended early, in a line."""
        code = self._child.wait()
        if code == -signal.SIGKILL:
            return "the process was killed; perhaps the machine ran out of memory"
        last = ""
        with contextlib.suppress(OSError):
            lines = self.log.read_text("utf-8", errors="replace").strip().splitlines()
            last = lines[-1][:200] if lines else ""
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"the process died ({how}): {last}" if last else f"the process died ({how})"

    def end(self) -> None:
        """End it and all that it started; no effect on one that is over. Safe from several threads."""
        with self._lock:
            if self._child.poll() is None:
                self._signal(signal.SIGTERM)
                try:
                    self._child.wait(_GRACE_S)
                except subprocess.TimeoutExpired:
                    self._signal(signal.SIGKILL)
                    self._child.wait()
            if self._child.stdin is not None and not self._child.stdin.closed:
                with contextlib.suppress(BrokenPipeError):
                    self._child.stdin.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, number)


def card_slots(device: str) -> tuple[list[dict[str, str]], bool]:
    """Environment variables of the processes that may run side by side, and whether cards were left out.

    Args:
        device: "cuda": one process per visible card of the first one's kind (CUDA_VISIBLE_DEVICES chooses, as
            everywhere); "cpu": one.
    """
    if device != "cuda":
        return [{}], False
    cards = find_cards()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in chosen.split(",") if name.strip()] or [str(card.index) for card in cards]
    alike = [name for name, card in zip(names, cards, strict=False) if card.name == cards[0].name]
    # LOCAL_WORLD_SIZE makes the processes share the cores for data loading, as the ranks of one machine do.
    slots = [{"CUDA_VISIBLE_DEVICES": name, "LOCAL_WORLD_SIZE": str(len(alike))} for name in alike]
    return slots, len(alike) < len(cards)
