"""What a quality comparison consists of: parts, their lengths, results, statistics over seeds, tables.

A part is one training: a pretraining, or a finetuning with its score on the test part. Pretraining gets equal
wall-clock time: each model takes as many steps as its measured speed allows within the budget, so the cosine schedule
ends when the budget does. Finetuning gets equal steps: it is the measuring instrument, so both models see the same
labeled crops in the same order.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from affmae_engine.bench.report import TITLES, Figure, Table
from affmae_engine.config import RunConfig, Task
from affmae_engine.errors import ConfigError

Model = Literal["affmae", "vit-mae"]
Init = Literal["pretrained", "scratch"]
PartStatus = Literal["waiting", "running", "ok", "out of memory", "diverged", "failed"]

MODELS: tuple[Model, ...] = get_args(Model)
INITS: tuple[Init, ...] = get_args(Init)
TASKS: tuple[Task, ...] = get_args(Task)
INIT_TITLES = {"pretrained": "pretrained", "scratch": "from scratch"}

FEWEST_STEPS: Mapping[Task, int] = {"pretrain": 10, "finetune": 100}
"""Steps that a budget must allow. A segmenter finetuned for fewer gives every pixel the same class."""
_OPTIONS: Mapping[Task, str] = {"pretrain": "--budget", "finetune": "--finetune-budget"}

Record = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One training. init and fraction (of the labels) belong to finetunings; a pretraining has neither."""

    model: Model
    seed: int
    init: Init | None = None
    fraction: float | None = None

    @property
    def stage(self) -> Task:
        return "pretrain" if self.init is None else "finetune"

    @property
    def name(self) -> str:
        """Name of its run directory."""
        stem = f"{self.model}-seed{self.seed}"
        return f"{stem}-pretrain" if self.init is None else f"{stem}-{self.init}-{self.fraction:g}"


@dataclass(frozen=True)
class Speed:
    """Measured speed of one model and task.

    step_s: seconds per step in steady state; None where the model could not be trained, with the reason in `note`.
    startup_s: what the first steps took beyond that. micro_batch: images at a time that fit in memory.
    """

    step_s: float | None
    startup_s: float = 0.0
    micro_batch: int | None = None
    status: PartStatus = "ok"
    note: str = ""


Speeds = dict[tuple[Model, Task], Speed]


@dataclass(frozen=True)
class Lengths:
    """Steps of pretraining by model, and of every finetuning (None: no model can be finetuned)."""

    pretrain: dict[str, int]
    finetune: int | None

    def steps(self, part: Part) -> int:
        """Of one part."""
        return (self.pretrain.get(part.model) if part.stage == "pretrain" else self.finetune) or 0


@dataclass(frozen=True)
class QualityPlan:
    """A whole comparison.

    budget_s: seconds of one pretraining. finetune_budget_s: what a finetuning of the slower model takes; both models
    take that many steps. fractions: of the labels, ascending, the last one 1. configs: by task, of AFFMAE.
    """

    seeds: tuple[int, ...]
    fractions: tuple[float, ...]
    budget_s: float
    finetune_budget_s: float
    configs: Mapping[Task, RunConfig] = field(repr=False)

    @property
    def test_fraction(self) -> float:
        """Share of the labeled data that is scored, chosen as a validation part would be."""
        return self.configs["finetune"].finetune.val_fraction

    def parts(self) -> list[Part]:
        return [part for chain in self.chains() for part in chain]

    def chains(self) -> list[list[Part]]:
        """Parts that run one after the other on one GPU: a pretraining and the finetunings of that model and seed.

        The models take turns in going first, so that neither always has the machine when it is cold.
        """
        chains = []
        for number, seed in enumerate(self.seeds):
            for model in MODELS if number % 2 == 0 else MODELS[::-1]:
                tuned = [Part(model, seed, init, fraction) for init in INITS for fraction in reversed(self.fractions)]
                chains.append([Part(model, seed), *tuned])
        return chains

    def config_of(self, part: Part, steps: int, micro_batch: int | None = None) -> RunConfig:
        """The configuration of a part: evaluated and saved once, at its end.

        From scratch all layers get the full learning rate: decay by layers protects pretrained weights, and would leave
        random ones almost as they are.

        Args:
            part: which one.
            steps: its length.
            micro_batch: images at a time; None: as configured.
        """
        config = self.configs[part.stage]
        train = {
            "steps": steps,
            "epochs": None,
            "seed": part.seed,
            "eval_every": 0,
            "preview_every": 0,
            "checkpoint_every": 0,
            "keep_checkpoints": 1,
            "log_every": max(1, min(config.train.log_every, steps // 20)),
            "micro_batch": micro_batch or config.train.micro_batch,
        }
        decay = 1.0 if part.init == "scratch" else config.optim.layer_decay
        return config.model_copy(
            update={
                "optim": config.optim.model_copy(update={"layer_decay": decay}),
                "model": config.model.model_copy(update={"family": part.model}),
                "train": config.train.model_copy(update=train),
            }
        )

    def settings(self) -> Record:
        """What decides the result of a part, as JSON values: parts of equal settings can be taken over."""
        return {
            "budget_s": self.budget_s,
            "finetune_budget_s": self.finetune_budget_s,
            "configs": {task: config.model_dump(mode="json") for task, config in self.configs.items()},
        }

    def lengths(self, speeds: Speeds, earlier: Lengths | None = None) -> Lengths:
        """Steps from speeds. A model without a speed gets no steps.

        Args:
            speeds: of every model and task.
            earlier: lengths that parts were already trained with; these stay.

        Raises:
            ConfigError: a budget is too short for `FEWEST_STEPS` steps.
        """
        pretrain = dict(earlier.pretrain) if earlier else {}
        for model in MODELS:
            step_s = speeds[model, "pretrain"].step_s
            if step_s is not None and model not in pretrain:
                pretrain[model] = _steps("pretrain", self.budget_s, step_s)
        finetune = earlier.finetune if earlier else None
        known = [step_s for model in MODELS if (step_s := speeds[model, "finetune"].step_s) is not None]
        if known and finetune is None:
            finetune = _steps("finetune", self.finetune_budget_s, max(known))
        return Lengths(pretrain, finetune)


def _steps(task: Task, budget_s: float, step_s: float) -> int:
    steps, fewest = int(budget_s / step_s), FEWEST_STEPS[task]
    if steps < fewest:
        raise ConfigError(
            f"{_OPTIONS[task]} {budget_s:g}s allows {steps} steps of {step_s:.2g} s, fewer than {fewest}",
            f"at least {_OPTIONS[task]} {math.ceil(fewest * step_s)}s, or smaller steps: --set train.batch_size=N",
        )
    return steps


@dataclass
class PartResult:
    """What became of a part. Times in seconds; None where there is no figure."""

    model: Model
    seed: int
    stage: Task
    init: Init | None = None
    fraction: float | None = None
    sections: int | None = None
    """Labeled sections that were trained on."""
    status: PartStatus = "waiting"
    note: str = ""
    steps: int = 0
    images: int = 0
    """Crops seen in all steps."""
    parameters: int = 0
    train_s: float | None = None
    """All training steps, ..."""
    startup_s: float | None = None
    """... of which this is compiling, recording and first data, which the budget does not pay for."""
    step_s: float | None = None
    seconds: float | None = None
    """With building, scoring and saving."""
    memory_gib: float | None = None
    loss: float | None = None
    """Of the last steps, of the model's last output alone, which both families have."""
    held_out_loss: float | None = None
    """Of a pretraining, likewise, on the test part."""
    miou: float | None = None
    dice: float | None = None
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    """{class name: {"iou", "dice", "pixels"}} on the test part."""

    @classmethod
    def of(cls, part: Part) -> PartResult:
        """Of a part that has not begun."""
        return cls(part.model, part.seed, part.stage, part.init, part.fraction)

    @property
    def part(self) -> Part:
        return Part(self.model, self.seed, self.init, self.fraction)

    def describe(self) -> str:
        """The outcome in one line."""
        text = f"{TITLES[self.model]}, seed {self.seed}, {_what(asdict(self))}: "
        if self.status != "ok":
            return text + self.status + (f" ({self.note})" if self.note else "")
        score = f"held-out loss {self.held_out_loss:.4f}" if self.miou is None else f"mean IoU {self.miou:.3f}"
        return f"{text}{score} after {self.steps} steps in {(self.train_s or 0.0) - (self.startup_s or 0.0):.1f} s"


def distinct_fractions(fractions: Sequence[float], sections: int) -> tuple[tuple[float, ...], list[str]]:
    """Ascending fractions that are different numbers of sections, with a note on each one left out; 1 is always in."""
    kept: dict[int, float] = {}
    notes = []
    for fraction in sorted({*fractions, 1.0}, reverse=True):
        count = max(1, round(fraction * sections))
        if count in kept:
            notes.append(f"{fraction:.0%} of {sections} labeled sections is no fewer than {kept[count]:.0%}: left out")
        else:
            kept[count] = fraction
    return tuple(sorted(kept.values())), notes


def summarize(results: Sequence[Record]) -> list[Record]:
    """Scores by model, init and share of the labels: mean and sample standard deviation over the seeds."""
    found = []
    for key, members in _grouped([r for r in results if r["stage"] == "finetune"], "model", "init", "fraction"):
        good = [r for r in members if r["status"] == "ok"]
        miou = _mean([r["miou"] for r in good])
        classes = dict.fromkeys(name for r in good for name in r["per_class"])
        found.append(
            {
                **key,
                "sections": next((r["sections"] for r in members if r["sections"]), None),
                "seeds": sorted(r["seed"] for r in good),
                "failed": len(members) - len(good),
                "miou": miou["mean"],
                "spread": miou["spread"],
                "dice": _mean([r["dice"] for r in good])["mean"],
                "per_class": {
                    name: _mean([r["per_class"].get(name, {}).get("iou") for r in good]) for name in classes
                },
            }
        )  # fmt: skip
    return found


def differences(results: Sequence[Record]) -> list[Record]:
    """AFFMAE's mean IoU minus ViT-MAE's by init and share of the labels.

    Taken seed by seed, because both models see the same labeled sections in a seed. `every_seed`: two or more seeds all
    have the same sign, and the mean is larger than the spread.
    """
    found = []
    for key, members in _grouped([r for r in results if r["stage"] == "finetune"], "init", "fraction"):
        by_seed: dict[int, dict[str, float]] = {}
        for r in members:
            if r["status"] == "ok" and r["miou"] is not None:
                by_seed.setdefault(r["seed"], {})[r["model"]] = r["miou"]
        values = [pair["affmae"] - pair["vit-mae"] for pair in by_seed.values() if len(pair) == len(MODELS)]
        both = _mean(values)
        agree = len(values) >= 2 and (all(v > 0 for v in values) or all(v < 0 for v in values))
        every_seed = agree and abs(both["mean"]) > both["spread"]
        found.append({**key, "seeds": len(values), **both, "every_seed": every_seed})
    return found


def times(results: Sequence[Record]) -> list[Record]:
    """Pretraining by model: steps, images, seconds taken, held-out loss, memory."""
    found = []
    for key, members in _grouped([r for r in results if r["stage"] == "pretrain"], "model"):
        good = [r for r in members if r["status"] == "ok"]
        first: Record = good[0] if good else {}
        found.append(
            {
                **key,
                "seeds": len(good),
                **{name: first.get(name) for name in ("steps", "images", "parameters")},
                "seconds": _mean([r["train_s"] - r["startup_s"] for r in good]),
                "startup_s": _mean([r["startup_s"] for r in good])["mean"],
                "step_s": _mean([r["step_s"] for r in good])["mean"],
                "held_out_loss": _mean([r["held_out_loss"] for r in good]),
                "memory_gib": max((r["memory_gib"] for r in good if r["memory_gib"] is not None), default=None),
            }
        )
    return found


def figures_of(summary: Sequence[Record]) -> list[Figure]:
    """What `--compare` compares: mean IoU, mean plus and minus one standard deviation."""
    found = []
    for r in summary:
        if r["miou"] is not None:
            low, high = (None, None) if r["spread"] is None else (r["miou"] - r["spread"], r["miou"] + r["spread"])
            what = f"{r['model']}, {INIT_TITLES[r['init']]}, {r['fraction']:.0%} of the labels"
            found.append(Figure(what, "mean IoU", "", r["miou"], low, high, more_is_better=True))
    return found


def tables_of(document: Record) -> list[Table]:
    """Scores, differences, classes, pretraining, what the data was, failures; from results.json alone."""
    summary = document["summary"]
    columns = [(model, init) for model in MODELS for init in INITS]
    heads = [f"{TITLES[model]} {INIT_TITLES[init]}" for model, init in columns]
    scores, gaps = [], []
    for fraction in sorted({r["fraction"] for r in summary}):
        here = {(r["model"], r["init"]): r for r in summary if r["fraction"] == fraction}
        sections = next((str(r["sections"]) for r in here.values() if r["sections"]), "")
        scores.append((f"{fraction:.0%}", sections, *(_score(here[column]) for column in columns)))
        between = {r["init"]: r for r in document["differences"] if r["fraction"] == fraction}
        gaps.append((f"{fraction:.0%}", *(_signed(between[init]) for init in INITS)))
    all_labels = {
        (r["model"], r["init"]): r["per_class"] for r in summary if r["fraction"] == document["fractions"][-1]
    }
    names = dict.fromkeys(name for classes in all_labels.values() for name in classes)
    classes = [(name, *(_pm(all_labels.get(c, {}).get(name)) for c in columns)) for name in names]
    failed = [
        (TITLES[r["model"]], str(r["seed"]), _what(r), r["status"], r["note"])
        for r in document["results"]
        if r["status"] not in ("ok", "waiting", "running")
    ]
    return [
        Table(
            "Mean IoU on the test part, mean ± standard deviation over seeds", ("labels", "sections", *heads), scores
        ),
        Table("AFFMAE minus ViT-MAE, seed by seed", ("labels", *(INIT_TITLES[init] for init in INITS)), gaps),
        Table("IoU by class, all labels", ("class", *heads), classes),
        _time_table(document),
        _data_table(document),
        Table("Failures", ("model", "seed", "part", "outcome", "reason"), failed),
    ]


def _time_table(document: Record) -> Table:
    rows = []
    for r in document["times"]:
        if not r["seeds"]:
            continue
        rows.append(
            (
                TITLES[r["model"]],
                f"{r['parameters'] / 1e6:.1f} M",
                f"{document['budget_s']:g}",
                _pm(r["seconds"], 1),
                f"{r['startup_s']:.1f}",
                str(r["steps"]),
                f"{1e3 * r['step_s']:.1f}",
                f"{r['images']:,}",
                _pm(r["held_out_loss"]),
                f"{r['memory_gib']:.2f}" if r["memory_gib"] is not None else "",
            )
        )
    columns = ("model", "parameters", "budget s", "taken s", "start-up s", "steps", "ms per step", "crops")
    return Table("Pretraining, equal time", (*columns, "held-out loss", "peak GiB"), rows)


def _data_table(document: Record) -> Table:
    data, lengths = document["data"], document["lengths"]
    rows = [
        ("test part, seen by no training", str(data["test_sections"]), data["test"]),
        ("finetuning, all labels", str(data["train_sections"]), data["train"]),
        ("pretraining, without labels", str(data["pretrain_sections"]), ""),
    ]
    if data["left_out"]:
        rows.append(("left out, copies of labeled images", "", ", ".join(data["left_out"])))
    if lengths:
        rows.append(("steps of every finetuning", "", str(lengths["finetune"])))
    return Table("Data", ("", "sections", "which"), rows)


def _what(result: Record) -> str:
    if result["stage"] == "pretrain":
        return "pretraining"
    return f"finetuning {INIT_TITLES[result['init']]}, {result['fraction']:.0%} of the labels"


def _score(record: Record) -> str:
    text = _pm({"mean": record["miou"], "spread": record["spread"]})
    return f"{text} ({record['failed']} failed)".strip() if record["failed"] else text


def _pm(value: Record | None, digits: int = 3) -> str:
    """Mean ± spread; the spread only where there is one."""
    if value is None or value["mean"] is None:
        return ""
    text = f"{value['mean']:.{digits}f}"
    return text if value["spread"] is None else f"{text} ± {value['spread']:.{digits}f}"


def _signed(value: Record) -> str:
    if value["mean"] is None:
        return ""
    text = ("+" if value["mean"] >= 0 else "") + _pm(value)
    return f"{text}, every seed" if value["every_seed"] else text


def _mean(values: Sequence[float | None]) -> Record:
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(known) if known else None,
        "spread": statistics.stdev(known) if len(known) > 1 else None,
    }


def _grouped(results: Sequence[Record], *names: str) -> Iterator[tuple[Record, list[Record]]]:
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for result in results:
        groups.setdefault(tuple(result[name] for name in names), []).append(result)
    for values, members in groups.items():
        yield dict(zip(names, values, strict=True)), members
