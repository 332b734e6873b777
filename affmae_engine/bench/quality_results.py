"""results.json of a quality comparison: written after every part, and read again to go on or to be refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from affmae_engine.bench import quality_figures, quality_report, report
from affmae_engine.bench.quality import Lengths, Part, PartResult, QualityPlan
from affmae_engine.bench.quality_data import Parts, Sources, described, section_count
from affmae_engine.bench.quality_run import Progress, Speeds, speeds_from_json, speeds_to_json
from affmae_engine.data.store import Store
from affmae_engine.errors import ConfigError
from affmae_engine.events import finite

RESULTS = "results.json"
_OURS = frozenset({"data.zarr", "logs", "runs", "run.lock", "report.md"})
"""Entries of a folder whose comparison was stopped before it had results."""

_MUST_AGREE = {
    "budget_s": "--budget",
    "finetune_budget_s": "--finetune-budget",
    "configs": "settings (--preset, --config, --set)",
    "sources": "images or labels",
    "device": "device",
    "versions": "versions",
}
"""What an earlier attempt must have been made with, and what it is called. Seeds, fractions and sizes may grow."""


@dataclass(frozen=True)
class Earlier:
    """What an earlier attempt left in the folder."""

    speeds: Speeds = field(default_factory=dict)
    lengths: Lengths | None = None
    results: dict[Part, PartResult] = field(default_factory=dict)
    seconds: float = 0.0
    """That it took."""


def identity(plan: QualityPlan, sources: Sources, about: dict[str, Any]) -> dict[str, Any]:
    """What decides the results: two attempts with an equal one are one comparison."""
    values = {**plan.settings(), "sources": sources.as_dict(), "device": about["device"], "versions": about["versions"]}
    plain: dict[str, Any] = json.loads(json.dumps(finite(values)))
    return plain


def read_earlier(folder: Path, wanted: dict[str, Any]) -> Earlier:
    """Finished parts in the folder; empty when it is new.

    Args:
        folder: of the comparison.
        wanted: `identity` of the one that is asked for.

    Raises:
        ConfigError: the folder holds something else, or a comparison with other settings; says which.
    """
    path = folder / RESULTS
    if not path.is_file():
        strangers = [entry.name for entry in folder.iterdir() if entry.name not in _OURS] if folder.is_dir() else []
        if strangers:
            raise ConfigError(
                f"{folder} holds other things ({strangers[0]})", "choose a new or empty folder with -o/--out"
            )
        return Earlier()
    try:
        value = json.loads(path.read_text("utf-8"))
        if value["kind"] != "quality" or value["schema"] != report.SCHEMA:
            raise ConfigError(
                f"{folder} holds another benchmark ({value['kind']})", "choose another folder with -o/--out"
            )
        found = {**value["settings"], "sources": value["sources"]}
        found |= {"device": value["device"], "versions": value["versions"]}
        found["configs"] = {**found["configs"], **_absent(wanted["configs"], found["configs"])}
        asked = {**wanted, "configs": {**wanted["configs"], **_absent(found["configs"], wanted["configs"])}}
        differing = [title for name, title in _MUST_AGREE.items() if found[name] != asked[name]]
        if differing:
            raise ConfigError(
                f"{folder} holds a comparison with other {', '.join(differing)}{_example(found, wanted)}",
                "repeat the command it was made with to go on, or choose another folder with -o/--out",
            )
        results = [PartResult(**record) for record in value["results"]]
        finished = {result.part: result for result in results if result.status == "ok"}
        lengths = Lengths.from_json(value["lengths"]) if value["lengths"] else None
        return Earlier(speeds_from_json(value["speeds"]), lengths, finished, value["seconds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "choose another folder with -o/--out") from error


def refuse_narrower(plan: QualityPlan, earlier: Earlier, folder: Path) -> None:
    """Finished parts are never dropped.

    Raises:
        ConfigError: the folder has finished parts that the plan does not ask for.
    """
    extra = [part.name for part in earlier.results if part not in set(plan.parts())]
    if extra:
        raise ConfigError(
            f"{folder} holds {len(extra)} finished trainings that were not asked for now, such as {extra[0]}",
            "ask for at least the same sizes, seeds and shares of the labels, or choose another folder with -o/--out",
        )


def document(
    plan: QualityPlan,
    sources: Sources,
    about: dict[str, Any],
    store: Store,
    parts: Parts,
    progress: Progress,
    *,
    seconds: float,
) -> dict[str, Any]:
    """results.json (docs/bench-quality.md).

    Args:
        about: `report.circumstances`.
        seconds: that the comparison took so far, over all attempts.
    """
    results = [progress.results[part] for part in plan.parts()]
    records = [result.as_dict() for result in results]
    settings = identity(plan, sources, about)
    return report.document(
        "quality",
        about,
        records,
        complete=progress.stage == "done",
        seconds=seconds,
        sizes=plan.sizes,
        seeds=plan.seeds,
        fractions=plan.fractions,
        budget_s=plan.budget_s,
        finetune_budget_s=plan.finetune_budget_s,
        settings={name: settings[name] for name in ("budget_s", "finetune_budget_s", "configs")},
        sources=settings["sources"],
        data=_data(store, parts),
        speeds=speeds_to_json(progress.speeds),
        lengths=progress.lengths.to_json() if progress.lengths else None,
        summary=quality_figures.summarise(records),
        differences=quality_figures.differences(records),
        times=quality_figures.times(records),
    )


def write(folder: Path, values: dict[str, Any], charts: tuple[str, ...] = ()) -> None:
    """Write results.json and report.md into a folder that exists."""
    report.write(folder, values, quality_report.markdown(values, charts))


def _data(store: Store, parts: Parts) -> dict[str, Any]:
    return {
        "fingerprint": store.fingerprint(),
        "class_names": list(store.class_names),
        "test": described(store, parts.test),
        "test_sections": section_count(store, parts.test),
        "train": described(store, parts.train),
        "train_sections": section_count(store, parts.train),
        "pretrain_sections": section_count(store, parts.pretrain),
        "left_out": list(parts.left_out),
    }


def _absent(configs: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Configurations of sizes that the others lack: sizes may be added."""
    return {name: config for name, config in configs.items() if name not in others}


def _example(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """One setting that differs, in words."""
    before, now = found.get("configs") or {}, wanted["configs"]
    for key in sorted(before.keys() & now.keys()):
        for section, values in now[key].items():
            for name, value in values.items():
                old = before[key].get(section, {}).get(name)
                if old != value:
                    return f": {section}.{name} was {old}, is {value} now"
    return ""
