"""A finished quality comparison as results.json has it, with chosen scores, for the tests of what reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from affmae_engine.bench import quality_figures
from affmae_engine.bench.quality import INITS, MODELS, Part, PartResult
from affmae_engine.bench.report import SCHEMA

Score = Callable[[str, str, float, int], float | None]
"""Mean IoU by model, init, fraction and seed; None: that part failed."""


@pytest.fixture
def quality_document() -> Callable[..., Any]:
    """`quality_document(score=usual, seeds=..., fractions=...)` -> results.json of one size."""
    return _document


def usual(model: str, init: str, fraction: float, seed: int) -> float:
    """AFFMAE ahead in every seed when pretrained; a draw from scratch; pretraining pays."""
    ahead = 0.05 if (model, init) == ("affmae", "pretrained") else 0.02 * (seed - 1) * (model == "affmae")
    return 0.3 + 0.2 * fraction + 0.1 * (init == "pretrained") + ahead + 0.01 * seed


def _part_result(part: Part, miou: float | None = None) -> PartResult:
    """A finished part; a finetuning without a score ran out of memory."""
    result = PartResult.of(part)
    result.status, result.steps, result.seconds, result.parameters = "ok", 100, 12.0, 1_000_000
    result.train_s, result.startup_s, result.step_s, result.loss = 10.5, 0.5, 0.1, 0.4
    if part.stage == "pretrain":
        result.images = 800 if part.model == "affmae" else 200
        result.held_out_loss = 0.6
    elif miou is None:
        result.status, result.note = "out of memory", "CUDA out of memory"
    else:
        result.miou, result.dice, result.sections = miou, miou, round(14 * (part.fraction or 1))
        result.per_class = {
            "cytoplasm": {"iou": miou + 0.1, "dice": miou, "pixels": 90.0},
            "membrane": {"iou": miou - 0.1, "dice": miou, "pixels": 10.0},
        }
    return result


def _document(
    score: Score = usual, *, seeds: tuple[int, ...] = (0, 1, 2), fractions: tuple[float, ...] = (0.1, 1.0)
) -> Any:
    parts = [Part("small", model, seed) for model in MODELS for seed in seeds]
    tuned = [Part("small", m, s, i, f) for m in MODELS for s in seeds for i in INITS for f in fractions]
    results = [_part_result(part).as_dict() for part in parts]
    results += [
        _part_result(part, score(part.model, part.init or "", part.fraction or 1.0, part.seed)).as_dict()
        for part in tuned
    ]
    return {
        "schema": SCHEMA, "kind": "quality", "device": "a card", "dtype": "bf16", "versions": {"torch": "2.13.0"},
        "card": {}, "python": "3.12", "platform": "Linux", "cpus": 16, "git": None, "created": "2026-11-25",
        "command": ["affmae", "bench", "--quality"], "mask_kind": "perlin", "mask_ratio": 0.5, "merge_keep": 0.4,
        "remarks": [], "complete": True, "seconds": 100.0, "sizes": ["small"], "seeds": list(seeds),
        "fractions": list(fractions), "budget_s": 10.0, "finetune_budget_s": 5.0,
        "lengths": {"pretrain": [], "finetune": {"small": 50}},
        "data": {
            "test": "stack 16-19", "test_sections": 4, "train": "stack 0-13", "train_sections": 14,
            "pretrain_sections": 14, "left_out": [],
        },
        "results": results,
        "summary": quality_figures.summarise(results),
        "differences": quality_figures.differences(results),
        "times": quality_figures.times(results),
    }  # fmt: skip
