"""A long run at a glance: the beginning, pieces from all over the middle, and the end of its events.

Reading hundreds of megabytes takes seconds, a sketch takes a fraction of one. Its curves have the whole run's shape
with most steps left out, its figures and last events are the true ones. What lies between the pieces (evaluations,
earlier processes) is not in it, so it serves only until the run is read whole.
"""

from __future__ import annotations

import os
from pathlib import Path

from affmae_cli.dashboard.decode import Segment, decode
from affmae_cli.dashboard.state import RunState
from affmae_cli.dashboard.tail import tail_bytes

PIECES = 400
"""Places in the file that are looked at: two for every column of a wide chart."""
_HEAD, _PIECE, _TAIL = 1 << 14, 1 << 12, 1 << 17


def sketch(root: Path, metrics: Path, *, pieces: int = PIECES) -> RunState:
    """What can be told at once. Never raises for what the file holds or lacks.

    Args:
        root: the run directory.
        metrics: its metrics.jsonl.
        pieces: how many places between the beginning and the end are looked at; 0 for those two alone.
    """
    state = RunState(root)
    try:
        with metrics.open("rb") as file:
            head = file.read(_HEAD)
            state.apply(Segment(started=segment.started) for segment in decode(head[: head.rfind(b"\n") + 1]))
            end = file.seek(0, os.SEEK_END) - _TAIL
            for number in range(pieces if end > 0 else 0):
                start = end * number // pieces
                file.seek(start)
                piece = file.read(_PIECE)
                begin = piece.find(b"\n") + 1 if start else 0
                lines = piece[begin : piece.rfind(b"\n") + 1]
                state.apply(Segment(None, each.steps, each.systems) for each in decode(lines, start + begin))
    except OSError:
        return state
    state.apply(decode(tail_bytes(metrics, _TAIL), max(0, end)))  # they begin at most a line later
    return state
