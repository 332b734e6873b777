"""How far a request to the trainer has come, told by the events that follow it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from affmae_cli.dashboard.view import RunView
from affmae_engine.events import CheckpointSaved, Event, RequestTaken
from affmae_engine.run_dir import CHECKPOINT


@dataclass(frozen=True)
class Asked:
    """A request that was made from here. after: the newest event at that time, None when there was none."""

    name: str
    after: Event | None

    def progress(self, view: RunView) -> str:
        """Requested, acknowledged, or "" once it was met or nobody is left to meet it."""
        if view.status.ended:
            return ""
        later = list(view.recent)
        seen = next((i for i, event in enumerate(later) if event is self.after), -1)
        later = later[seen + 1 :]
        taken = next((i for i, e in enumerate(later) if isinstance(e, RequestTaken) and e.request == self.name), None)
        if taken is None:
            return _unseen(self.name)
        if self.name == CHECKPOINT and any(isinstance(event, CheckpointSaved) for event in later[taken:]):
            return ""
        return f"{self.name} acknowledged, it comes after this step"


def under_way(asked: Sequence[Asked], view: RunView) -> tuple[list[Asked], str]:
    """Those that are not met yet, and what is to be said of them and of what was requested elsewhere."""
    told = [(request, text) for request in asked if (text := request.progress(view))]
    ours = {request.name for request, _ in told}
    others = [_unseen(name) for name in view.requests if name not in ours and not view.status.ended]
    return [request for request, _ in told], "; ".join([*(text for _, text in told), *others])


def _unseen(name: str) -> str:
    return f"{name} requested, not yet seen by the trainer"
