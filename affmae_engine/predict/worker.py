"""A process that computes blocks for another one, on the device that it sees: `python -m affmae_engine.predict.worker`.

It reads a JSON message a line from standard input and answers on standard output; `workers.py` is the other end.

    <- {"output": PATH}     the prediction to work on       -> {"ready": DESCRIPTION}
    <- {"block": N}         one more block of it            -> {"tiles": N} as they are done, {"block": N} when finished
    <- {"end": true}        no more blocks of it            -> {"end": WARNINGS}
                                                            -> {"error": MESSAGE, "hint": HINT, "kind": TYPE}
"""

from __future__ import annotations

import json
import queue
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

from affmae_engine.errors import AffmaeError, of_system, one_line
from affmae_engine.predict.job import Job
from affmae_engine.predict.predictor import Predictor
from affmae_engine.predict.run import compute_blocks


@cache
def predictor_of(weights: Path, device: str) -> Predictor:
    """The model on the device of this process; loaded once."""
    return Predictor.from_weights(weights, device="cuda" if device == "cuda" else "cpu")


def _tell(**message: Any) -> None:
    """Send a message; lines of several threads are not mixed."""
    with _telling:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()


_telling = threading.Lock()


class _Answers:
    """What is told while blocks are computed (`run.Events`)."""

    def tiles(self, count: int) -> None:
        """So many tiles are done."""
        _tell(tiles=count)

    def block(self, number: int) -> None:
        """A block is finished."""
        _tell(block=number)

    def check(self) -> None:
        """This process is ended by a signal; nothing has to be asked."""


def _work(messages: queue.Queue[dict[str, Any] | None]) -> None:
    while (message := messages.get()) is not None:
        job = Job.open(Path(message["output"]), predictor_of)
        _tell(ready=job.predictor.choice.description)
        ended = False

        def take(wait: bool) -> int | None:
            nonlocal ended
            if ended:
                return None
            try:
                following = messages.get(block=wait)
            except queue.Empty:
                return None
            ended = following is None or "block" not in following
            return None if following is None or ended else int(following["block"])

        compute_blocks(job, take, _Answers())
        _tell(end=job.warnings)


def main() -> None:
    """Work until standard input ends."""
    messages: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            messages.put(json.loads(line))
        messages.put(None)

    threading.Thread(target=listen, name="affmae-listen", daemon=True).start()
    try:
        _work(messages)
    except Exception as error:
        known = error if isinstance(error, AffmaeError) else of_system(error)
        if known is None:
            _tell(error=f"{type(error).__name__}: {one_line(error)}", hint="", kind="")
            raise
        _tell(error=known.message, hint=known.hint, kind=type(known).__name__)


if __name__ == "__main__":
    main()
