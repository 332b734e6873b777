"""What `affmae bench --quality` does, from its options: checked before anything is read or built."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from affmae_cli.bench_plan import names_in
from affmae_cli.pixel_size import parse_pixel_size
from affmae_cli.settings import resolve
from affmae_engine.bench.quality import QualityPlan, distinct_fractions
from affmae_engine.bench.quality_data import Sources
from affmae_engine.config import RunConfig, Task
from affmae_engine.errors import ConfigError
from affmae_engine.model.sizes import SIZES

FOLDER = Path("bench-quality")
"""Where results go without -o: a fixed name, so that the same command goes on."""
BUDGET, SEEDS, FRACTIONS = "10m", 3, "0.1,0.25"
FINETUNE_SHARE = 0.25
"""Of the pretraining budget, for one finetuning."""

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smh])")
_DECIDED = {
    "train.steps": "--budget and --finetune-budget decide the steps",
    "train.epochs": "--budget and --finetune-budget decide the steps",
    "train.seed": "--seeds decides the seeds",
    "model.family": "both families are trained",
}
"""Settings that a comparison makes itself."""


@dataclass(frozen=True)
class QualityOptions:
    """The options as typed; None for those that were not given."""

    images: Sequence[str] | None = None
    labels: Sequence[str] | None = None
    unlabelled: Sequence[str] | None = None
    budget: str | None = None
    finetune_budget: str | None = None
    seeds: int | None = None
    fractions: str | None = None
    sizes: str | None = None
    preset: str = "auto"
    config: Path | None = None
    set_: Sequence[str] | None = None
    device: str | None = None
    pixel_size: str | None = None

    def refuse_mixture(self, quality: bool, others: Mapping[str, object]) -> None:
        """Options of one mode mean nothing in the other, and are not ignored in silence.

        Args:
            quality: whether `--quality` was given.
            others: options of the other modes by name; true where given.

        Raises:
            ConfigError: names the first option that is out of place.
        """
        ours = {
            "--images": self.images, "--labels": self.labels, "--unlabelled": self.unlabelled, "--budget": self.budget,
            "--finetune-budget": self.finetune_budget, "--seeds": self.seeds, "--label-fractions": self.fractions,
            "--pixel-size": self.pixel_size, "--preset": self.preset != "auto", "--config": self.config,
            "--set": self.set_,
        }  # fmt: skip
        for name, given in (others if quality else ours).items():
            if given and quality:
                raise ConfigError(f"{name} has no place in --quality", "settings are made with --preset and --set")
            if given:
                raise ConfigError(f"{name} belongs to --quality", "affmae bench --quality --images I --labels L")


def make_plan(options: QualityOptions) -> tuple[QualityPlan, Sources]:
    """Checks the options and resolves the settings of both stages for every size.

    Raises:
        ConfigError: an option that is missing or wrong, or wrong settings.
    """
    missing = [name for name, given in (("--images", options.images), ("--labels", options.labels)) if not given]
    if missing:
        raise ConfigError(
            f"--quality needs {' and '.join(missing)}",
            "affmae bench --quality --images IMAGES --labels LABELS --budget 10m --seeds 3",
        )
    budget_s = seconds("--budget", options.budget if options.budget is not None else BUDGET)
    tuning_s = FINETUNE_SHARE * budget_s
    if options.finetune_budget is not None:
        tuning_s = seconds("--finetune-budget", options.finetune_budget)
    fractions = label_fractions(options.fractions if options.fractions is not None else FRACTIONS)
    sizes: list[str | None] = [None]  # the preset's own
    if options.sizes is not None:
        sizes = [*names_in("--sizes", options.sizes, SIZES)]
    configs: dict[tuple[str, Task], RunConfig] = {}
    preset = options.preset
    for size in sizes:
        for task in ("pretrain", "finetune"):
            overrides = [*(options.set_ or ()), *([f"model.size={size}"] if size else [])]
            resolved = resolve(
                task, preset=preset, config_file=options.config, overrides=overrides, flags={"device": options.device}
            )
            preset = resolved.preset  # `auto` is decided, and said, once
            for path, why in _DECIDED.items():
                if resolved.sources.get(path) == "--set":
                    raise ConfigError(f"--set {path} has no place in --quality: {why}")
            configs[resolved.config.model.size, task] = resolved.config
    plan = QualityPlan(
        sizes=tuple(dict.fromkeys(size for size, _ in configs)),
        seeds=tuple(range(options.seeds or SEEDS)),
        fractions=fractions,
        budget_s=budget_s,
        finetune_budget_s=tuning_s,
        configs=configs,
    )
    pixel_nm = parse_pixel_size(options.pixel_size)
    images, labels, more = (tuple(paths or ()) for paths in (options.images, options.labels, options.unlabelled))
    return plan, Sources(images, labels, more, pixel_nm)


def seconds(option: str, text: str) -> float:
    """A duration such as 30s, 10m, 1h or 1h30m, in seconds.

    Raises:
        ConfigError: it is none, or is zero.
    """
    compact = text.strip().lower()
    found = _DURATION.findall(compact)
    total = sum(float(number) * _UNITS[unit] for number, unit in found)
    units = [unit for _, unit in found]
    in_order = units == sorted(set(units), key="hms".index)
    if not found or "".join(number + unit for number, unit in found) != compact or not in_order or not total:
        raise ConfigError(f"{option} must be a duration such as 30s, 10m or 1h; got {text!r}")
    return total


def label_fractions(text: str) -> tuple[float, ...]:
    """Shares of the labels, rising, with 1 as the last.

    Raises:
        ConfigError: an entry is no number above 0 and at most 1.
    """
    found = {1.0}
    for entry in filter(None, (entry.strip() for entry in text.split(","))):
        try:
            value = float(entry)
        except ValueError:
            value = 0.0
        if not 0 < value <= 1:
            raise ConfigError(
                f"--label-fractions must be numbers above 0 and at most 1, such as 0.1,0.25; got {entry!r}"
            )
        found.add(value)
    return tuple(sorted(found))


def fitted(plan: QualityPlan, sections: int) -> tuple[QualityPlan, list[str]]:
    """The plan with those fractions that are different numbers of sections, and notes on the others."""
    fractions, notes = distinct_fractions(plan.fractions, sections)
    return replace(plan, fractions=fractions), notes
