"""Which implementation of an operation runs, and why: one plain function, so that the reason can be shown."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, get_args

Backend = Literal["auto", "reference"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The implementation taken for one operation and the reason in words."""

    name: Literal["reference"]
    reason: str


def choose_backend(backend: str, op: str) -> Choice:
    """Resolves `backend` for operation `op`.

    Raises:
        ValueError: when `backend` is not one of `Backend`.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend of {op} must be one of {', '.join(get_args(Backend))}; got {backend!r}")
    reason = "asked for" if backend == "reference" else "the only implementation of this operation"
    choice = Choice("reference", reason)
    _logger.debug("%s runs as %s: %s", op, choice.name, choice.reason)
    return choice
