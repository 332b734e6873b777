"""What a quality comparison consists of: models, seeds, shares of the labels, budgets, and the parts that follow.

A part is one training: a pretraining, or a finetuning with its score on the test part. Pretraining gets equal
wall-clock time: each model takes as many steps as its own measured speed allows within the budget, so the cosine
schedule ends when the budget does. Finetuning gets equal steps: it is the measuring instrument, both models shall see
the same labelled crops in the same order, and a faster model gains nothing there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from affmae_engine.config import RunConfig, Task
from affmae_engine.errors import ConfigError

Model = Literal["affmae", "vit-mae"]
Init = Literal["pretrained", "scratch"]
Status = Literal["waiting", "running", "ok", "out of memory", "diverged", "failed"]

MODELS: tuple[Model, ...] = get_args(Model)
INITS: tuple[Init, ...] = get_args(Init)
TASKS: tuple[Task, ...] = get_args(Task)

FEWEST_STEPS: Mapping[Task, int] = {"pretrain": 10, "finetune": 100}
"""Steps that a budget must allow. In fewer, pretraining has no schedule to speak of, and a segmenter stays near its
random beginning and gives every pixel the same class, so that all scores are equally bad."""

_DOING: Mapping[Task, str] = {"pretrain": "pretraining", "finetune": "finetuning"}


@dataclass(frozen=True)
class Part:
    """One training. init and fraction (of the labels) belong to finetunings; a pretraining has none."""

    size: str
    model: Model
    seed: int
    init: Init | None = None
    fraction: float | None = None

    @property
    def stage(self) -> Task:
        """What is trained."""
        return "pretrain" if self.init is None else "finetune"

    @property
    def name(self) -> str:
        """Name of its run directory, unique within a comparison."""
        stem = f"{self.size}-{self.model}-seed{self.seed}"
        return f"{stem}-pretrain" if self.init is None else f"{stem}-{self.init}-{self.fraction:g}"


@dataclass(frozen=True)
class Speed:
    """Seconds of one training step in steady state, and seconds of the first steps beyond that (compiling, recording,
    first data); None where a model could not be trained, with the reason. micro_batch: images at once that fit."""

    step_s: float | None
    startup_s: float = 0.0
    micro_batch: int | None = None
    status: Status = "ok"
    note: str = ""


@dataclass(frozen=True)
class Lengths:
    """Steps by (size, model) of pretraining and by size of finetuning."""

    pretrain: Mapping[tuple[str, Model], int]
    finetune: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """For results.json."""
        steps = [{"size": size, "model": model, "steps": n} for (size, model), n in self.pretrain.items()]
        return {"pretrain": steps, "finetune": dict(self.finetune)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Lengths:
        """What `to_json` made."""
        return cls({(r["size"], r["model"]): r["steps"] for r in value["pretrain"]}, dict(value["finetune"]))


@dataclass(frozen=True)
class QualityPlan:
    """A whole comparison.

    configs: by (size, task), for AFFMAE; `config_of` makes the others of them. budget_s: of one pretraining, seconds.
    finetune_budget_s: what the slower model's finetuning takes; both take that many steps. fractions: of the labels,
    rising, the last one 1. test_fraction: share of the labelled data that is scored.
    """

    sizes: tuple[str, ...]
    seeds: tuple[int, ...]
    fractions: tuple[float, ...]
    budget_s: float
    finetune_budget_s: float
    configs: Mapping[tuple[str, Task], RunConfig] = field(repr=False)

    @property
    def test_fraction(self) -> float:
        """`finetune.val_fraction`: the test part is chosen as a validation part would be."""
        return self.configs[self.sizes[0], "finetune"].finetune.val_fraction

    def parts(self) -> list[Part]:
        """All parts: by size, seed and model, pretraining first."""
        return [part for chain in self.chains() for part in chain]

    def chains(self) -> list[list[Part]]:
        """Parts that one process does one after the other: a pretraining and the finetunings of that model and seed.

        The models take turns in who goes first, so that neither always has the machine when it is cold.
        """
        chains = []
        for size in self.sizes:
            for number, seed in enumerate(self.seeds):
                for model in MODELS if number % 2 == 0 else MODELS[::-1]:
                    tuned = [Part(size, model, seed, init, f) for init in INITS for f in reversed(self.fractions)]
                    chains.append([Part(size, model, seed), *tuned])
        return chains

    def config_of(self, part: Part, steps: int, micro_batch: int | None = None) -> RunConfig:
        """What a part is trained with: evaluated, pictured and saved once, at its end.

        From scratch all layers get the full learning rate: decay by layers protects pretrained weights, and would leave
        random ones as they are, which nobody would do on purpose.

        Args:
            part: which one.
            steps: its length.
            micro_batch: images at once, which changes nothing but memory and time; None: as configured.
        """
        config = self.configs[part.size, part.stage]
        train = {
            "steps": steps, "epochs": None, "seed": part.seed, "eval_every": 0, "preview_every": 0,
            "checkpoint_every": 0, "keep_checkpoints": 1, "log_every": max(1, min(config.train.log_every, steps // 20)),
            "micro_batch": micro_batch or config.train.micro_batch,
        }  # fmt: skip
        decay = 1.0 if part.init == "scratch" else config.optim.layer_decay
        return config.model_copy(
            update={
                "optim": config.optim.model_copy(update={"layer_decay": decay}),
                "model": config.model.model_copy(update={"family": part.model}),
                "train": config.train.model_copy(update=train),
            }
        )

    def settings(self) -> dict[str, Any]:
        """What decides the result of a part, as JSON values: parts of equal settings can be taken over."""
        return {
            "budget_s": self.budget_s,
            "finetune_budget_s": self.finetune_budget_s,
            "configs": {f"{s} {task}": config.model_dump(mode="json") for (s, task), config in self.configs.items()},
        }

    def lengths(self, speeds: Mapping[tuple[str, Model, Task], Speed], *, earlier: Lengths | None = None) -> Lengths:
        """Steps from speeds. A model without a speed gets no steps, and its parts are failures.

        Args:
            speeds: of every size, model and task.
            earlier: lengths that parts were trained with already; these stay.

        Raises:
            ConfigError: a budget is too short for `FEWEST_STEPS` steps.
        """
        pretrain: dict[tuple[str, Model], int] = dict(earlier.pretrain) if earlier else {}
        finetune: dict[str, int] = dict(earlier.finetune) if earlier else {}
        for size in self.sizes:
            for model in MODELS:
                step_s = speeds[size, model, "pretrain"].step_s
                if step_s is not None and (size, model) not in pretrain:
                    pretrain[size, model] = _steps("pretrain", self.budget_s, step_s, f"{model} {size}")
            tuning = [speeds[size, model, "finetune"].step_s for model in MODELS]
            known = [step_s for step_s in tuning if step_s is not None]
            if known and size not in finetune:
                finetune[size] = _steps("finetune", self.finetune_budget_s, max(known), size)
        return Lengths(pretrain, finetune)


def _steps(stage: Task, budget_s: float, step_s: float, what: str) -> int:
    steps, fewest = int(budget_s / step_s), FEWEST_STEPS[stage]
    if steps < fewest:
        option = "--budget" if stage == "pretrain" else "--finetune-budget"
        raise ConfigError(
            f"{option} {budget_s:g}s allows {steps} steps of {_DOING[stage]} {what} ({step_s:.2g} s each), "
            f"fewer than {fewest}",
            f"at least {option} {math.ceil(fewest * step_s)}s, or smaller steps: --set train.batch_size=N",
        )
    return steps


@dataclass
class PartResult:
    """What became of a part. Times in seconds.

    seconds: all of it. train_s: its training steps, which the budget pays for; startup_s: what the first steps took
    beyond that (compiling, recording, first data). loss: of the last steps. held_out_loss: of a pretraining, on the
    test part. Both are of the model's last output alone, which both families have. miou and dice: means over the
    classes of the test part. per_class: {name: {"iou", "dice", "pixels"}}.
    """

    size: str
    model: Model
    seed: int
    stage: Task
    init: Init | None = None
    fraction: float | None = None
    sections: int | None = None
    """Labelled sections that were trained on."""
    status: Status = "waiting"
    note: str = ""
    steps: int = 0
    images: int = 0
    """Crops seen, in all steps."""
    parameters: int = 0
    train_s: float | None = None
    startup_s: float | None = None
    step_s: float | None = None
    seconds: float | None = None
    memory_gib: float | None = None
    """Most memory allocated on a card; resident set on a CPU."""
    loss: float | None = None
    held_out_loss: float | None = None
    miou: float | None = None
    dice: float | None = None
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, part: Part) -> PartResult:
        """Of a part that has not begun."""
        return cls(part.size, part.model, part.seed, part.stage, part.init, part.fraction)

    @property
    def part(self) -> Part:
        """Whose result it is."""
        return Part(self.size, self.model, self.seed, self.init, self.fraction)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def distinct_fractions(fractions: Sequence[float], sections: int) -> tuple[tuple[float, ...], list[str]]:
    """Fractions, rising, that are different numbers of sections, and a note on each that is not; 1 is always there."""
    kept: dict[int, float] = {}
    notes = []
    for fraction in sorted({*fractions, 1.0}, reverse=True):
        count = max(1, round(fraction * sections))
        if count in kept:
            notes.append(f"{fraction:.0%} of {sections} labelled sections is no fewer than {kept[count]:.0%}: left out")
        else:
            kept[count] = fraction
    return tuple(sorted(kept.values())), notes
