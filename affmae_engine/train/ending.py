"""How a run ends: whatever the reason, it is told in a last event, in summary.json and as an error of a known class."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch

from affmae_engine import atomic
from affmae_engine.errors import AffmaeError, Interrupted, ResourceError, of_system
from affmae_engine.events import RunEnded, finite
from affmae_engine.train.session import Session

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """How a run ended; summary.json. status: finished, stopped or failed. metrics: of the last evaluation."""

    status: str
    step: int
    total_steps: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    best_score: float | None = None
    message: str = ""


@contextlib.contextmanager
def ending(session: Session) -> Iterator[None]:
    """Whatever ends the block is told in a last event and in summary.json."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        _close(session, "failed", "out of memory")
        raise ResourceError(
            f"out of memory at step {session.state.step}",
            "close other programs on the card, or use a smaller data.crop_size or model.size",
        ) from error
    except Interrupted as error:
        _close(session, "stopped", error.message)
        raise
    except BaseException as error:
        known = error if isinstance(error, AffmaeError) else of_system(error) if isinstance(error, OSError) else None
        _close(session, "failed", known.message if known is not None else repr(error))
        if not isinstance(error, AffmaeError):
            _log.exception("the run failed")
        raise
    _close(session, "finished", "")


def _close(session: Session, status: str, message: str) -> None:
    if not session.ranks.first:
        return
    try:
        session.settle(wait=True)  # a checkpoint that is being written still counts
    except ResourceError as error:
        _log.error("%s", error.message)
    session.writer.close()
    session.recorder.emit(
        RunEnded(step=session.state.step, status=status, seconds=session.watch.seconds, message=message)
    )
    session.recorder.sync()
    try:
        atomic.commit_json(session.run.summary, finite(asdict(summarised(session, status, message))))
    except ResourceError as error:
        _log.error("%s", error.message)


def summarised(session: Session, status: str, message: str = "") -> Summary:
    """The run as it stands."""
    state = session.state
    best_step, best_score = state.best or (None, None)
    return Summary(
        status=status,
        step=state.step,
        total_steps=session.config.train.steps,
        seconds=session.watch.seconds,
        metrics=state.metrics,
        best_step=best_step,
        best_score=best_score,
        message=message,
    )
