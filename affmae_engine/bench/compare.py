"""Compares two results.json of the same kind, row by row: what got better, what got worse, what is noise.

A change counts only where it is larger than the measured spread: where the intervals of the two figures (fastest to
slowest round of a step, 20th to 80th percentile of an operation, mean ± standard deviation of a score) do not touch.
Memory has no spread; there 1 % counts. A score of one seed has none that is known, so it gets no verdict.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from affmae_engine.bench.report import SCHEMA, Table
from affmae_engine.errors import InputError

Record = Mapping[str, Any]
Verdict = Literal["better", "worse", "within the spread", "no spread known", "only before", "only now"]

RESULTS = "results.json"
MEMORY_TOLERANCE = 0.01
"""Relative change of memory that counts."""

_CIRCUMSTANCES = {
    "device": "the device",
    "dtype": "the precision",
    "versions": "versions",
    "cuda": "CUDA",
    "mask_ratio": "the mask ratio",
    "merge_keep": "rho",
    "budget_s": "the pretraining budget",
    "finetune_budget_s": "the finetuning budget",
}
"""Entries of a document that must be equal for a change to be ours, and what they are called."""


@dataclass(frozen=True)
class Figure:
    """A value and the interval that it was measured to lie in, which is None where no spread is known."""

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Metric:
    """One column of figures. rising: more is better. read: finds it in a result; None where there is none."""

    name: str
    unit: str
    rising: bool
    read: Callable[[Record], Figure | None]


@dataclass(frozen=True)
class Change:
    """One figure before and now; None where a side has none. percent: of the old value."""

    what: str
    metric: str
    unit: str
    old: float | None
    new: float | None
    percent: float | None
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """All changes, and warnings about circumstances that differ."""

    changes: tuple[Change, ...]
    warnings: tuple[str, ...]

    def table(self, old_name: str) -> Table:
        """As text."""
        rows = [
            (c.what, f"{c.metric} {c.unit}".strip(), _text(c.old), _text(c.new), _percent(c.percent), c.verdict)
            for c in self.changes
        ]
        return Table(f"Against {old_name}", ("what", "figure", "before", "now", "change", "verdict"), rows)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"changes": [vars(change) for change in self.changes], "warnings": list(self.warnings)}


def read_results(path: Path) -> dict[str, Any]:
    """A results.json, or the one in a folder.

    Raises:
        InputError: it is not there, not JSON, not of `affmae bench`, or of another version.
    """
    file = path / RESULTS if path.is_dir() else path
    hint = "name a results.json that `affmae bench -o DIR` wrote, or its folder"
    try:
        value = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no such file: {file}", hint) from error
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}", hint) from error
    except ValueError as error:
        raise InputError(f"{file} is not JSON", hint) from error
    if not isinstance(value, dict) or value.get("kind") not in _KINDS or not isinstance(value.get("results"), list):
        raise InputError(f"{file} is not a result of affmae bench", hint)
    if value.get("schema") != SCHEMA:
        raise InputError(
            f"{file} has schema {value.get('schema')!r}, this version writes {SCHEMA}",
            "compare with the version of affmae that wrote it, or measure anew",
        )
    return value


def compare(old: Record, new: Record) -> Comparison:
    """Every figure of two documents.

    Raises:
        InputError: they are of different kinds, or a record lacks what its kind must have.
    """
    if old["kind"] != new["kind"]:
        raise InputError(
            f"the old file holds {_KINDS[old['kind']].title}, this run {_KINDS[new['kind']].title}",
            "compare two benchmarks of the same kind",
        )
    kind = _KINDS[new["kind"]]
    try:
        before, now = kind.rows(old), kind.rows(new)
        changes = [
            change
            for what in dict.fromkeys([*now, *before])
            for metric in kind.metrics
            if (change := _change(what, metric, before.get(what), now.get(what))) is not None
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"a record of the old file cannot be read: {error}", "was the file edited?") from error
    return Comparison(tuple(changes), tuple(_warnings(old, new)))


def _change(what: str, metric: Metric, old: Record | None, new: Record | None) -> Change | None:
    before = metric.read(old) if old is not None else None
    now = metric.read(new) if new is not None else None
    if before is None and now is None:
        return None
    if before is None or now is None:
        verdict: Verdict = "only now" if before is None else "only before"
        return Change(
            what, metric.name, metric.unit, before.value if before else None, now.value if now else None, None, verdict
        )
    percent = 100 * (now.value - before.value) / before.value if before.value else None
    return Change(
        what, metric.name, metric.unit, before.value, now.value, percent, _verdict(before, now, rising=metric.rising)
    )


def _verdict(before: Figure, now: Figure, *, rising: bool) -> Verdict:
    if before.interval is None or now.interval is None:
        return "no spread known"
    if now.interval[0] > before.interval[1] or now.interval[1] < before.interval[0]:
        return "better" if (now.value > before.value) == rising else "worse"
    return "within the spread"


def _warnings(old: Record, new: Record) -> Iterator[str]:
    for name, title in _CIRCUMSTANCES.items():
        before, now = old.get(name), new.get(name)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            differing = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
            texts = [f"{key} {before.get(key, 'absent')} before, {now.get(key, 'absent')} now" for key in differing]
            yield f"{title} differ: {'; '.join(texts)}"
        else:
            yield f"{title} differs: {before} before, {now} now"


def _percentiles(name: str, part: str) -> Metric:
    """Milliseconds of a part of a record with their 20th and 80th percentile."""

    def read(record: Record) -> Figure | None:
        found = record[part]
        return None if found is None else Figure(found["ms"], (found["low_ms"], found["high_ms"]))

    return Metric(name, "ms", False, read)


def _rounds(record: Record) -> Figure | None:
    """Milliseconds of a step with the fastest and the slowest round."""
    return None if record["ms"] is None else Figure(record["ms"], (record["least_ms"], record["most_ms"]))


def _memory(record: Record) -> Figure | None:
    gib = record["allocated_gib"]
    margin = MEMORY_TOLERANCE / 2
    return None if gib is None else Figure(gib, (gib * (1 - margin), gib * (1 + margin)))


def _score(record: Record) -> Figure | None:
    if record["miou"] is None:
        return None
    miou, spread = record["miou"], record["spread"]
    return Figure(miou, None if spread is None else (miou - spread, miou + spread))


@dataclass(frozen=True)
class _Kind:
    """One kind of document: where its rows are, what names them, what is compared."""

    title: str
    key: tuple[str, ...]
    metrics: tuple[Metric, ...]
    where: str = "results"

    def rows(self, document: Record) -> dict[str, Record]:
        found: dict[str, Record] = {}
        for record in document[self.where]:
            named = {**record, **record.get("case", {})}
            found.setdefault(" ".join(_word(name, named[name]) for name in self.key), record)
        return found


def _word(name: str, value: Any) -> str:
    """A part of a row's name."""
    if name == "fraction":
        return f"{value:.0%} of the labels"
    return {"resolution": f"{value} px", "batch": f"batch {value}"}.get(name, str(value))


_KINDS = {
    "comparison": _Kind(
        "a comparison of speed and memory",
        ("model", "vit_mode", "work", "size", "resolution", "batch"),
        (Metric("step", "ms", False, _rounds), Metric("peak memory", "GiB", False, _memory)),
    ),
    "kernels": _Kind(
        "single operations",
        ("op", "size", "resolution", "shape", "backend"),
        (_percentiles("forward", "forward"), _percentiles("forward and backward", "both")),
    ),
    "quality": _Kind(
        "a quality comparison",
        ("size", "model", "init", "fraction"),
        (Metric("mean IoU", "", True, _score),),
        where="summary",
    ),
}


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:+.1f} %"
