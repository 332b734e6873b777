"""`affmae bench quality`: the plan from its options, and the comparison in its folder."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affmae_cli import output
from affmae_cli.settings import resolve
from affmae_engine.bench.quality import QualityPlan, distinct_fractions
from affmae_engine.config import RunConfig, Task
from affmae_engine.errors import AffmaeError, ConfigError

if TYPE_CHECKING:
    from affmae_engine.bench.quality_data import Sources

FINETUNE_SHARE = 0.25
"""Default of --finetune-budget as a share of --budget."""
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smh])")
_DECIDED = {
    "train.steps": "--budget and --finetune-budget decide the steps",
    "train.epochs": "--budget and --finetune-budget decide the steps",
    "train.seed": "--seeds decides the seeds",
    "model.family": "both families are trained",
}
"""Settings that a comparison makes itself."""
_CPU_REMARK = "No GPU: on a CPU the models train on a handful of crops; the scores only show that it runs."
_MIXED_REMARK = "GPUs of different kinds: only those like the first one are used, as equal time requires."


def make_plan(
    *,
    budget: str,
    finetune_budget: str | None,
    seeds: int,
    fractions: str,
    preset: str,
    config: Path | None,
    overrides: Sequence[str],
    device: str | None,
) -> QualityPlan:
    """Check the options and resolve the settings of both tasks.

    Raises:
        ConfigError: a wrong option or setting.
    """
    budget_s = seconds("--budget", budget)
    tuning_s = FINETUNE_SHARE * budget_s if finetune_budget is None else seconds("--finetune-budget", finetune_budget)
    shares = label_fractions(fractions)
    tasks: tuple[Task, ...] = ("pretrain", "finetune")
    configs: dict[Task, RunConfig] = {}
    for task in tasks:
        resolved = resolve(task, preset=preset, config_file=config, overrides=overrides, flags={"device": device})
        preset = resolved.preset  # `auto` is decided once
        for path, why in _DECIDED.items():
            if resolved.sources.get(path) == "--set":
                raise ConfigError(f"--set {path} cannot be used in a comparison: {why}")
        for name in resolved.config.model.size_overrides:
            raise ConfigError(f"model.{name} cannot be used in a comparison: ViT-MAE has only the sizes of model.size")
        configs[task] = resolved.config
    return QualityPlan(tuple(range(seeds)), shares, budget_s, tuning_s, configs)


def seconds(option: str, text: str) -> float:
    """A duration such as 30s, 10m, 1h or 1h30m, in seconds.

    Raises:
        ConfigError: it is not a duration, or zero.
    """
    compact = text.strip().lower()
    found = _DURATION.findall(compact)
    total = sum(float(number) * _UNITS[unit] for number, unit in found)
    units = [unit for _, unit in found]
    in_order = units == sorted(set(units), key="hms".index)
    if "".join(number + unit for number, unit in found) != compact or not in_order or not total:
        raise ConfigError(f"{option} must be a duration such as 30s, 10m or 1h; got {text!r}")
    return total


def label_fractions(text: str) -> tuple[float, ...]:
    """Shares of the labels in ascending order; the last one is 1.

    Raises:
        ConfigError: an entry is not a number above 0 and at most 1.
    """
    found = {1.0}
    for entry in filter(None, (entry.strip() for entry in text.split(","))):
        try:
            value = float(entry)
        except ValueError:
            value = 0.0
        if not 0 < value <= 1:
            raise ConfigError(f"--label-fractions must be numbers above 0 and at most 1; got {entry!r}")
        found.add(value)
    return tuple(sorted(found))


def run(plan: QualityPlan, sources: Sources, folder: Path) -> dict[str, Any]:
    """Do the comparison, or what is left of it; returns the content of results.json.

    Raises:
        ConfigError: the folder holds another comparison.
        InputError: images or labels that cannot be used.
        Interrupted: stopped on request; finished parts are kept.
        AffmaeError: no part could be scored.
    """
    from affmae_engine import atomic
    from affmae_engine.run_dir import RunDir
    from affmae_engine.runtime.signals import StopRequest

    folder = atomic.ensure_folder(folder).absolute()
    with RunDir(folder).locked(), StopRequest().installed() as stop:
        values = _compare(plan, sources, folder, stop)
    if not any(record["miou"] is not None for record in values["summary"]):
        raise AffmaeError("no part of the comparison could be scored", f"see {folder / 'report.md'} and logs/")
    return values


def _compare(plan: QualityPlan, sources: Sources, folder: Path, stop: Any) -> dict[str, Any]:
    from affmae_engine.bench import quality, quality_run, report
    from affmae_engine.bench.quality_data import collect, parts_of, section_count
    from affmae_engine.data.store import Store
    from affmae_engine.runtime.device import pick_device

    config = plan.configs["pretrain"]
    choice = pick_device(config.train)
    slots, mixed = quality_run.gpu_slots(choice.device.type)
    remarks = [_CPU_REMARK] if choice.device.type == "cpu" else []
    remarks += [_MIXED_REMARK] if mixed else []
    about = report.circumstances(choice, {"size": config.model.size}, remarks)
    about |= {"merge_keep": config.model.merge_keep, "mask_ratio": config.mask.ratio}
    earlier = quality_run.read_earlier(folder, quality_run.identity(plan, sources, about))
    output.say(f"{choice.description}; results in {folder}")

    # The comparison's own copy of the data: made once, and used by every later attempt.
    path = folder / "data.zarr"
    if earlier.speeds or earlier.results:
        store = Store.open(path)
    else:
        store = collect(sources, path, plan.configs["finetune"].finetune, should_stop=lambda: stop.requested)
    parts = parts_of(store, plan.test_fraction)
    fractions, notes = distinct_fractions(plan.fractions, section_count(store, parts.train))
    plan = replace(plan, fractions=fractions)
    about["remarks"] += notes
    for remark in about["remarks"]:
        output.say(remark, label="note", style="bold yellow")
    quality_run.refuse_narrower(plan, earlier, folder)

    began = time.monotonic() - earlier.seconds

    def document(state: quality_run.QualityRun) -> dict[str, Any]:
        return quality_run.document(state, sources, about, seconds=time.monotonic() - began)

    def commit(state: quality_run.QualityRun) -> None:
        values = document(state)
        report.write(folder, TITLE, values, quality.tables_of(values))

    state = quality_run.QualityRun(plan, folder, store, parts, slots, commit, output.say, stop, earlier)
    state.run()
    return document(state)


TITLE = "AFFMAE against ViT-MAE: what they learn in equal time"
