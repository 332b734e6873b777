"""A benchmark process: `python -m affmae_engine.bench.worker` reads a request from its input and prints the answer.

Unusual: the answer is one line of JSON on the standard output as it was when the process began; whatever libraries
print meanwhile goes to the standard error. The interpreter, torch and everything else is loaded before the request is
read, so that a process can be started ahead and waits, without having touched the card.
"""

from __future__ import annotations

import os
import sys

from affmae_engine.bench.case import Answer, Request
from affmae_engine.bench.measure import answer
from affmae_engine.errors import AffmaeError


def main() -> None:
    """Answers one request. An error of ours is part of the answer; any other ends the process with a traceback."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as out:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        text = sys.stdin.read()
        if not text.strip():  # started ahead and not needed
            return
        try:
            found = Answer(measurement=answer(Request.model_validate_json(text)))
        except AffmaeError as error:
            found = Answer(error=error.message, hint=error.hint, exit_code=error.exit_code)
        out.write(found.model_dump_json() + "\n")


if __name__ == "__main__":
    main()
