"""All runs of a folder, without reading any of them whole: the beginning and the end of their events."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from affmae_cli.dashboard.charts import sparkline
from affmae_cli.dashboard.panes.metrics import pattern
from affmae_cli.dashboard.run_model import RunModel
from affmae_cli.dashboard.text import SIGNS, UNKNOWN, count, duration, number, one_line, rate
from affmae_engine.run_dir import list_runs

_SPARK = 12


class RunsFolder:
    """The runs directly under a folder. A run is looked at again only when its files changed or it may be alive."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[Path, tuple[object, RunModel]] = {}

    def runs(self) -> list[RunModel]:
        """Newest last event first."""
        known: dict[Path, tuple[object, RunModel]] = {}
        for run in list_runs(self.folder):
            stamp = tuple(_stamp(path) for path in (run.metrics, run.config, run.best))
            before = self._known.get(run.root)
            if before is None or before[0] != stamp or not before[1].status.ended:
                model = RunModel(run.root)
                model.glance()
                before = stamp, model
            known[run.root] = before
        self._known = known
        return sorted((model for _, model in known.values()), key=lambda model: -model.last_time)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


def best_score(model: RunModel, task: str) -> float:
    """Held-out loss of a pretraining's best checkpoint, or IoU of a finetuning's; NaN for runs of another task."""
    value = model.run.read_json(model.run.best).get("value")
    if model.task != task or not isinstance(value, float):
        return math.nan
    return -value if task == "pretrain" else value


def parent(model: RunModel) -> str:
    """Name of the run whose weights this one started from; "" for none."""
    command = model.environment.get("command")
    origin = command.get("init_from") if isinstance(command, dict) else None
    return one_line(Path(origin).name) if isinstance(origin, str) else ""


def preset(model: RunModel) -> str:
    """Name of the preset; "" when it is not known."""
    command = model.environment.get("command")
    found = command.get("preset") if isinstance(command, dict) else None
    return one_line(found) if isinstance(found, str) else ""


@dataclass(frozen=True)
class Column:
    """A column of the table of runs. text: of a cell; key: orders rows, low values first; right: aligned right.
    importance: columns of low importance go first where there is no room."""

    title: str
    text: Callable[[RunModel], str]
    key: Callable[[RunModel], Any]
    right: bool = False
    importance: int = 5


def _known(value: float, write: Callable[[float], str]) -> str:
    return write(value) if math.isfinite(value) else UNKNOWN


def _low(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _steps(model: RunModel) -> str:
    return f"{count(model.step)}/{count(model.total_steps)}" if model.total_steps else count(model.step)


def _speed(model: RunModel) -> float:
    return model.latest.images_per_s if model.latest else math.nan


def _curve(model: RunModel) -> str:
    scored = model.task == "finetune" and "iou" in model.held_out and len(model.held_out) > 1
    return sparkline(model.held_out, "iou", _SPARK) if scored else sparkline(model.steps, "losses.loss", _SPARK)


COLUMNS = (
    Column("state", lambda m: f"{SIGNS[m.status.kind]} {m.status.kind}", lambda m: m.status.kind, importance=9),
    Column("run", lambda m: one_line(m.root.name), lambda m: m.root.name, importance=10),
    Column("task", lambda m: one_line(m.task) or UNKNOWN, lambda m: m.task, importance=8),
    Column("preset", lambda m: preset(m) or UNKNOWN, preset, importance=3),
    Column("started from", lambda m: parent(m) or UNKNOWN, parent, importance=4),
    Column(
        "best loss",
        lambda m: _known(best_score(m, "pretrain"), number),
        lambda m: _low(best_score(m, "pretrain")),
        right=True,
        importance=7,
    ),
    Column(
        "best IoU",
        lambda m: _known(best_score(m, "finetune"), number),
        lambda m: _low(-best_score(m, "finetune")),
        right=True,
        importance=7,
    ),
    Column("curve", _curve, lambda m: 0, importance=5),
    Column("step", _steps, lambda m: -m.step, right=True, importance=6),
    Column("img/s", lambda m: _known(_speed(m), rate), lambda m: _low(-_speed(m)), right=True, importance=2),
    Column(
        "age", lambda m: duration(max(0.0, m.now() - m.last_time)), lambda m: -m.last_time, right=True, importance=5
    ),
)
NEWEST_FIRST = len(COLUMNS) - 1


def ordered(
    runs: Sequence[RunModel], column: int, *, reverse: bool = False, wanted: str = "", pinned: Sequence[Path] = ()
) -> list[RunModel]:
    """Runs by a column, equal ones by their newest event; pinned ones first; only those that match `wanted`."""
    found = pattern(wanted)
    shown = [m for m in runs if m.root in pinned or found.search(" ".join(c.text(m) for c in COLUMNS))]
    newest = sorted(shown, key=lambda m: -m.last_time)
    by_column = sorted(newest, key=COLUMNS[column].key, reverse=reverse)
    return sorted(by_column, key=lambda m: m.root not in pinned)


def config_difference(first: RunModel, second: RunModel) -> list[tuple[str, str, str]]:
    """(setting, its value in the first, its value in the second) where two configurations differ."""

    def flat(model: RunModel) -> dict[str, str]:
        tables = model.config.model_dump(mode="json") if model.config else {}
        return {f"{section}.{name}": str(value) for section, table in tables.items() for name, value in table.items()}

    a, b = flat(first), flat(second)
    return [(name, a.get(name, UNKNOWN), b.get(name, UNKNOWN)) for name in {**a, **b} if a.get(name) != b.get(name)]
