"""A finished quality comparison as results.json has it, with chosen scores, for the tests of what reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from affmae_engine.bench.quality import (
    INITS,
    MODELS,
    Part,
    PartResult,
    differences,
    figures_of,
    summarize,
    times,
)
from affmae_engine.bench.report import circumstances, document
from affmae_engine.config import TrainConfig
from affmae_engine.runtime.device import pick_device

Score = Callable[[str, str, float, int], float | None]
"""Mean IoU by model, init, fraction and seed; None: that part failed."""


@pytest.fixture
def quality_document() -> Callable[..., Any]:
    """`quality_document(score=usual, seeds=..., fractions=...)` -> results.json."""
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
    results = [asdict(_part_result(Part(model, seed))) for model in MODELS for seed in seeds]
    results += [
        asdict(_part_result(Part(m, s, i, f), score(m, i, f, s)))
        for m in MODELS
        for s in seeds
        for i in INITS
        for f in fractions
    ]
    about = circumstances(pick_device(TrainConfig(device="cpu")), {"size": "small"}, [])
    return document(
        "quality",
        about,
        results,
        figures_of(summarize(results)),
        complete=True,
        seconds=100.0,
        seeds=list(seeds),
        fractions=list(fractions),
        budget_s=10.0,
        finetune_budget_s=5.0,
        lengths={"pretrain": {"affmae": 100, "vit-mae": 25}, "finetune": 50},
        speeds=[],
        data={
            "test": "stack 16-19",
            "test_sections": 4,
            "train": "stack 0-13",
            "train_sections": 14,
            "pretrain_sections": 14,
            "left_out": [],
        },
        summary=summarize(results),
        differences=differences(results),
        times=times(results),
    )
