"""What all benchmarks share: circumstances, tables, results.json, report.md, comparison with an earlier result."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from affmae_engine import atomic
from affmae_engine.config import MaskConfig, ModelConfig
from affmae_engine.errors import InputError
from affmae_engine.events import finite
from affmae_engine.runtime.device import DeviceChoice
from affmae_engine.train.environment import command_line, git_state

SCHEMA = 3
RESULTS, REPORT = "results.json", "report.md"
TITLES = {"affmae": "AFFMAE", "vit-mae": "ViT-MAE"}
"""The families that are compared, and what tables call them."""

_CIRCUMSTANCES = ("device", "precision", "versions", "settings")
"""Entries of two documents that must be equal for a change to be the code's."""


@dataclass(frozen=True)
class Table:
    """Cells of text under a title."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def without_empty_columns(self) -> Table:
        """The table with those columns that have text in any row."""
        used = [i for i in range(len(self.columns)) if any(row[i] for row in self.rows)]
        return Table(self.title, tuple(self.columns[i] for i in used), [tuple(r[i] for i in used) for r in self.rows])

    def markdown(self) -> str:
        """As a Markdown table under a heading."""
        lines = [f"## {self.title}", "", _line(self.columns), _line("---" for _ in self.columns)]
        return "\n".join([*lines, *map(_line, self.rows)]) + "\n"


@dataclass(frozen=True)
class Figure:
    """One number that can be compared with an earlier result.

    low, high: the interval it was measured to lie in; None where no spread is known. more_is_better: of a score.
    """

    what: str
    metric: str
    unit: str
    value: float
    low: float | None
    high: float | None
    more_is_better: bool = False


def circumstances(choice: DeviceChoice, settings: Mapping[str, Any], remarks: Sequence[str]) -> dict[str, Any]:
    """Where, when, with what and how something is measured.

    Args:
        choice: device and precision.
        settings: what was asked for, as JSON values.
        remarks: what a reader has to know first.
    """
    found = {name: _version(name) for name in ("affmae", "torch", "triton")}
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "device": choice.description,
        "precision": choice.precision,
        "versions": {name: number for name, number in found.items() if number},
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "git": git_state(),
        "merge_keep": ModelConfig().merge_keep,
        "mask_ratio": MaskConfig().ratio,
        "settings": dict(settings),
        "remarks": list(remarks),
    }


def document(
    kind: str, about: Mapping[str, Any], records: Sequence[Mapping[str, Any]], figures: Sequence[Figure], **more: Any
) -> dict[str, Any]:
    """A whole result as JSON values; numbers that are not finite become None.

    Args:
        kind: "speed", "kernels" or "quality".
        about: `circumstances`.
        records: one per case.
        figures: what `compare` compares.
        more: further entries.
    """
    rows = [asdict(entry) for entry in figures]
    plain: dict[str, Any] = finite(
        {"schema": SCHEMA, "kind": kind, **about, **more, "figures": rows, "results": list(records)}
    )
    return plain


def write(
    folder: Path, title: str, values: Mapping[str, Any], tables: Sequence[Table], charts: Sequence[str] = ()
) -> None:
    """Write results.json and report.md into an existing folder; `charts` are file names in it."""
    atomic.commit_json(folder / RESULTS, dict(values))
    atomic.commit_text(folder / REPORT, markdown(title, values, tables, charts))


def markdown(title: str, values: Mapping[str, Any], tables: Sequence[Table], charts: Sequence[str] = ()) -> str:
    """report.md: remarks, charts, tables, circumstances."""
    lines = [f"# {title}", "", f"**{values['device']}**", ""]
    lines += [f"*{remark}*\n" for remark in values["remarks"]]
    lines += [f"![{name.removesuffix('.png').replace('-', ' ')}]({name})\n" for name in charts]
    shown = [table.without_empty_columns() for table in tables]
    lines += [table.markdown() for table in shown if table.rows]
    return "\n".join([*lines, _circumstances_table(values).markdown()])


def figure(value: float | None) -> str:
    """Three significant digits without an exponent; "" for None."""
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 5)}f}"


def spread(low: float | None, high: float | None) -> str:
    """The interval in text; "" where there is none."""
    return f"{figure(low)} to {figure(high)}" if low is not None and high is not None and low != high else ""


def read_results(path: Path, kind: str) -> dict[str, Any]:
    """An earlier results.json, or the one in a folder.

    Raises:
        InputError: it is missing, damaged, of another kind or of another version.
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
    if not isinstance(value, dict) or "kind" not in value or not isinstance(value.get("results"), list):
        raise InputError(f"{file} is not a result of affmae bench", hint)
    if value.get("schema") != SCHEMA:
        raise InputError(
            f"{file} has schema {value.get('schema')!r}, this version reads {SCHEMA}",
            "compare with the version of affmae that wrote it, or measure again",
        )
    if value["kind"] != kind:
        raise InputError(f"{file} holds a result of `affmae bench {value['kind']}`, not of `bench {kind}`", hint)
    return value


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[Table, list[str]]:
    """Every figure before and now, and what else differs.

    A change is better or worse only where the intervals of the two figures do not overlap.

    Raises:
        InputError: the old document is damaged.
    """
    try:
        before, now = ({(f["what"], f["metric"]): Figure(**f) for f in d["figures"]} for d in (old, new))
    except (KeyError, TypeError) as error:
        raise InputError(f"a record of the old file cannot be read: {error}", "was the file edited?") from error
    rows = []
    for key in dict.fromkeys([*now, *before]):
        first, second = before.get(key), now.get(key)
        known = second or first
        assert known is not None
        change = ""
        if first and second and first.value:
            change = f"{100 * (second.value - first.value) / first.value:+.1f} %"
        cells = [figure(first.value if first else None), figure(second.value if second else None), change]
        rows.append((known.what, f"{known.metric} {known.unit}".strip(), *cells, _verdict(first, second)))
    warnings = [
        f"{name} differs: {old.get(name)} before, {new.get(name)} now"
        for name in _CIRCUMSTANCES
        if old.get(name) != new.get(name)
    ]
    return Table("Compared with before", ("what", "figure", "before", "now", "change", "verdict"), rows), warnings


def _verdict(before: Figure | None, now: Figure | None) -> str:
    if before is None or now is None:
        return "only now" if before is None else "only before"
    if before.low is None or before.high is None or now.low is None or now.high is None:
        return "no spread known"
    if now.low > before.high or now.high < before.low:
        return "better" if (now.value > before.value) == now.more_is_better else "worse"
    return "within the spread"


def _circumstances_table(values: Mapping[str, Any]) -> Table:
    git = values["git"]
    versions = ", ".join(f"{name} {number}" for name, number in values["versions"].items())
    rows = [
        ("device", values["device"]),
        ("versions", f"{versions}, Python {values['python']}"),
        ("commit", f"{git['commit'][:12]}{', modified' if git['modified'] else ''}" if git else "not a checkout"),
        ("machine", f"{values['cpus']} CPU cores, {values['platform']}"),
        ("command", f"`{' '.join(values['command'])}`, {values['created']}"),
        ("model", f"rho {values['merge_keep']}, mask ratio {values['mask_ratio']}, autocast {values['precision']}"),
        *((name.replace("_", " "), str(value)) for name, value in values["settings"].items()),
    ]
    return Table("Circumstances", ("", "value"), rows)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
