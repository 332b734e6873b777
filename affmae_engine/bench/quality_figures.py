"""Figures of a quality comparison over its seeds: scores, differences, times.

The spread is the sample standard deviation. Differences are taken seed by seed, because both models see the same
labelled sections in a seed, which removes what those sections have in common. Records in, records out, as in
results.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from affmae_engine.bench.quality import MODELS

Record = dict[str, Any]


def summarise(results: Sequence[Record]) -> list[Record]:
    """Scores by size, model, init and share of the labels: mean and spread over the seeds that have one."""
    found = []
    for key, members in _grouped([r for r in results if r["stage"] == "finetune"], "size", "model", "init", "fraction"):
        good = [r for r in members if r["status"] == "ok"]
        classes = {name: None for r in good for name in r["per_class"]}
        per_class = {
            name: _mean_and_spread([r["per_class"][name]["iou"] for r in good if name in r["per_class"]])
            for name in classes
        }
        miou = _mean_and_spread([r["miou"] for r in good])
        sections = [r["sections"] for r in members if r["sections"]]
        found.append(
            {
                **key,
                "sections": sections[0] if sections else None,
                "seeds": sorted(r["seed"] for r in good),
                "failed": len(members) - len(good),
                "miou": miou["mean"],
                "spread": miou["spread"],
                "dice": _mean_and_spread([r["dice"] for r in good])["mean"],
                "per_class": per_class,
            }
        )
    return found


def differences(results: Sequence[Record]) -> list[Record]:
    """AFFMAE's mean IoU minus ViT-MAE's, seed by seed, by size, init and share of the labels.

    `every_seed`: all of two or more seeds have the same sign, and the mean is larger than the spread.
    """
    found = []
    for key, members in _grouped([r for r in results if r["stage"] == "finetune"], "size", "init", "fraction"):
        by_seed: dict[int, dict[str, float]] = {}
        for r in members:
            if r["status"] == "ok" and r["miou"] is not None:
                by_seed.setdefault(r["seed"], {})[r["model"]] = r["miou"]
        values = [pair["affmae"] - pair["vit-mae"] for pair in by_seed.values() if len(pair) == len(MODELS)]
        both = _mean_and_spread(values)
        agree = len(values) >= 2 and (all(v > 0 for v in values) or all(v < 0 for v in values))
        every_seed = agree and abs(both["mean"]) > both["spread"]
        found.append({**key, "seeds": len(values), **both, "every_seed": every_seed})
    return found


def times(results: Sequence[Record]) -> list[Record]:
    """Pretraining by size and model: steps, images, seconds as planned for and as taken, held-out loss, memory."""
    found = []
    for key, members in _grouped([r for r in results if r["stage"] == "pretrain"], "size", "model"):
        good = [r for r in members if r["status"] == "ok"]
        taken = [r["train_s"] - r["startup_s"] for r in good]
        found.append(
            {
                **key,
                "seeds": len(good),
                "steps": good[0]["steps"] if good else None,
                "images": good[0]["images"] if good else None,
                "parameters": good[0]["parameters"] if good else None,
                "seconds": _mean_and_spread(taken),
                "startup_s": _mean_and_spread([r["startup_s"] for r in good])["mean"],
                "step_s": _mean_and_spread([r["step_s"] for r in good])["mean"],
                "held_out_loss": _mean_and_spread([r["held_out_loss"] for r in good]),
                "memory_gib": max((r["memory_gib"] for r in good if r["memory_gib"] is not None), default=None),
            }
        )
    return found


def _mean_and_spread(values: Sequence[float | None]) -> Record:
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
