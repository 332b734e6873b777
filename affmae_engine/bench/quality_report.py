"""What a quality comparison found: figures over seeds, and a report that is read without knowing the machinery.

Everything is made from the document (results.json) alone, so a report and its charts can be made again elsewhere.
The spread is the sample standard deviation over seeds. Differences are taken seed by seed, because both models see
the same labelled sections in a seed, which removes what those sections have in common.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from affmae_engine.bench.quality import INITS, MODELS
from affmae_engine.bench.report import Table
from affmae_engine.train.report import duration

TITLES = {"affmae": "AFFMAE", "vit-mae": "ViT-MAE"}
INIT_TITLES = {"pretrained": "pretrained", "scratch": "from scratch"}
SHORT_BUDGET_S = 1800.0
"""Below this pretraining budget the report says that longer pretraining may change the order."""
TIME_TOLERANCE = 0.05
"""Relative difference of the models' pretraining times above which the report objects."""

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

    `clear`: every seed has the same sign, the mean is larger than the spread, and there are two seeds or more.
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
        clear = agree and abs(both["mean"] or 0.0) > (both["spread"] or 0.0)
        found.append({**key, "seeds": len(values), **both, "clear": clear})
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


def tables(document: Record) -> list[Table]:
    """Everything in rows: scores, differences, classes, time, failures."""
    made = []
    for size in document["sizes"]:
        of_size = {name: [r for r in document[name] if r["size"] == size] for name in ("summary", "times", "results")}
        gaps = [r for r in document["differences"] if r["size"] == size]
        made += [_score_table(size, of_size["summary"]), _difference_table(size, gaps)]
        made += [_class_table(size, of_size["summary"]), _time_table(size, of_size["times"], document["budget_s"])]
    failed = [r for r in document["results"] if r["status"] not in ("ok", "waiting", "running")]
    if failed:
        rows = [
            (r["size"], TITLES[r["model"]], str(r["seed"]), _what(r), r["status"], r["note"]) for r in failed
        ]
        made.append(Table("What did not work", ("size", "model", "seed", "part", "outcome", "why"), rows))
    return made


def markdown(document: Record, charts: Sequence[str] = ()) -> str:
    """report.md.

    Args:
        document: results.json.
        charts: file names of pictures beside the report.
    """
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    lines = ["# affmae bench: quality", "", f"{document['device']}; {versions}.", ""]
    lines += [f"**{remark}**\n" for remark in document["remarks"]]
    lines += ["## In short", "", *[f"- {sentence}" for sentence in in_short(document)], ""]
    lines += [f"![{name.removesuffix('.png').replace('-', ' ')}]({name})\n" for name in charts]
    lines += [table.markdown() for table in tables(document)]
    lines += ["## How it was done", "", *[f"- {sentence}" for sentence in how(document)]]
    return "\n".join(lines) + "\n"


def in_short(document: Record) -> list[str]:
    """The findings in sentences, the doubts included."""
    found = []
    for size in document["sizes"]:
        label = f" ({size})" if len(document["sizes"]) > 1 else ""
        for fraction in sorted({document["fractions"][-1], document["fractions"][0]}, reverse=True):
            found += _verdict(document, size, label, fraction)
        found += _gain(document, size, label)
        found += _equal_time(document, size, label)
    if not document["complete"]:
        found.append("The comparison is not finished: figures cover what is done so far.")
    if len(document["seeds"]) == 1:
        found.append("One seed has no spread: no difference in this report can be told from chance.")
    if document["budget_s"] < SHORT_BUDGET_S:
        found.append(
            f"{duration(document['budget_s'])} of pretraining is short. The order of the models, and whether "
            "pretraining pays, may change with more of it."
        )
    return found


def how(document: Record) -> list[str]:
    """What a reader must know to trust the figures, or to repeat them."""
    data, steps = document["data"], document["lengths"] or {"pretrain": [], "finetune": {}}
    tuning = ", ".join(f"{size} {n}" for size, n in steps["finetune"].items())
    found = [
        f"Scored on {data['test_sections']} labelled sections that nothing was trained on, not even without labels: "
        f"{data['test']}. Sections beside them were used by nobody, so no test section has a neighbour in training.",
        f"Finetuned on {data['train_sections']} labelled sections ({data['train']}), or a contiguous share of them that "
        "the seed chooses, the same for both models; a smaller share lies inside every larger one.",
        f"Pretrained on {data['pretrain_sections']} sections without their labels.",
        f"Equal time: {duration(document['budget_s'])} of training steps each, data loading included. Each model's "
        "speed was measured first, after compiling and the first steps, which are not counted on either side; its "
        "number of steps is the budget by that speed, so that the learning rate has come down when the time is over.",
        f"Equal steps in finetuning ({tuning}): there both models see the same crops in the same order, and a faster "
        f"model gains nothing. The slower one took about {duration(document['finetune_budget_s'])} for them.",
        "The model of the last step is scored; no checkpoint was chosen by its score.",
        "Both models share masks, loss, optimizer, schedule, augmentation and the settings of the preset; ± is the "
        "standard deviation over seeds (weights, crops, masks and the choice of labelled sections).",
        "A share is rounded to whole sections, one at least. Mean IoU is over the classes that occur in the test part.",
    ]
    if data["left_out"]:
        found.append(f"{len(data['left_out'])} unlabelled images are copies of labelled ones and were left out.")
    return found


def _verdict(document: Record, size: str, label: str, fraction: float) -> Iterator[str]:
    scores = {
        r["model"]: r
        for r in document["summary"]
        if (r["size"], r["fraction"], r["init"]) == (size, fraction, "pretrained") and r["miou"] is not None
    }
    gap = next(
        r for r in document["differences"] if (r["size"], r["fraction"], r["init"]) == (size, fraction, "pretrained")
    )
    if len(scores) < len(MODELS) or gap["mean"] is None:
        return
    ahead = "AFFMAE" if gap["mean"] > 0 else "ViT-MAE"
    texts = [f"{TITLES[model]} {_score(scores[model])}" for model in MODELS]
    if gap["clear"]:
        judged = f"{ahead} is ahead by {abs(gap['mean']):.3f}, in every one of {gap['seeds']} seeds."
    elif gap["seeds"] > 1:
        judged = f"The difference of {abs(gap['mean']):.3f} lies within the spread of {gap['seeds']} seeds: no verdict."
    else:
        judged = f"{ahead} is ahead by {abs(gap['mean']):.3f} in the one seed."
    yield f"{_labels(fraction, scores['affmae']['sections'])}{label}, pretrained: {texts[0]}, {texts[1]} mean IoU. {judged}"


def _gain(document: Record, size: str, label: str) -> Iterator[str]:
    for model in MODELS:
        texts = []
        for fraction in document["fractions"]:
            pair = {
                r["init"]: r["miou"]
                for r in document["summary"]
                if (r["size"], r["model"], r["fraction"]) == (size, model, fraction) and r["miou"] is not None
            }
            if len(pair) == len(INITS):
                texts.append(f"{pair['pretrained'] - pair['scratch']:+.3f} at {fraction:.0%} of the labels")
        if texts:
            yield f"What pretraining was worth to {TITLES[model]}{label} in mean IoU: {', '.join(texts)}."


def _equal_time(document: Record, size: str, label: str) -> Iterator[str]:
    pair = {r["model"]: r for r in document["times"] if r["size"] == size and r["seeds"]}
    if len(pair) < len(MODELS):
        return
    ours, theirs = pair["affmae"], pair["vit-mae"]
    yield (
        f"In equal time{label} AFFMAE trained on {ours['images']:,} crops and ViT-MAE on {theirs['images']:,} "
        f"({ours['images'] / theirs['images']:.2g} times as many)."
    )
    ratio = ours["seconds"]["mean"] / theirs["seconds"]["mean"]
    if abs(ratio - 1) > TIME_TOLERANCE:
        yield (
            f"The times{label} came out unequal: AFFMAE took {ratio:.2f} times as long as ViT-MAE. Read the scores with "
            "that in mind, or repeat with a longer budget on a quiet machine."
        )


def _score_table(size: str, summary: Sequence[Record]) -> Table:
    columns = [(model, init) for model in MODELS for init in INITS]
    rows = []
    for fraction in sorted({r["fraction"] for r in summary}):
        here = {(r["model"], r["init"]): r for r in summary if r["fraction"] == fraction}
        sections = next((r["sections"] for r in here.values() if r["sections"]), None)
        rows.append((f"{fraction:.0%}", str(sections or ""), *(_score(here[column]) for column in columns)))
    heads = [f"{TITLES[model]} {INIT_TITLES[init]}" for model, init in columns]
    return Table(f"Mean IoU on the test part ({size})", ("labels", "sections", *heads), rows)


def _difference_table(size: str, gaps: Sequence[Record]) -> Table:
    rows = []
    for fraction in sorted({r["fraction"] for r in gaps}):
        here = {r["init"]: r for r in gaps if r["fraction"] == fraction}
        cells = [_signed(here[init]) for init in INITS]
        rows.append((f"{fraction:.0%}", *cells))
    heads = [INIT_TITLES[init] for init in INITS]
    return Table(f"AFFMAE minus ViT-MAE, seed by seed ({size})", ("labels", *heads), rows)


def _class_table(size: str, summary: Sequence[Record]) -> Table:
    top = max((r["fraction"] for r in summary), default=1.0)
    here = {(r["model"], r["init"]): r["per_class"] for r in summary if r["fraction"] == top}
    columns = [(model, init) for model in MODELS for init in INITS]
    names = list(dict.fromkeys(name for classes in here.values() for name in classes))
    rows = [(name, *(_pm(here.get(column, {}).get(name)) for column in columns)) for name in names]
    heads = [f"{TITLES[model]} {INIT_TITLES[init]}" for model, init in columns]
    return Table(f"IoU by class, {top:.0%} of the labels ({size})", ("class", *heads), rows)


def _time_table(size: str, records: Sequence[Record], budget_s: float) -> Table:
    columns = ("model", "parameters", "budget s", "taken s", "start-up s", "steps", "ms a step", "crops", "held-out loss")
    rows = []
    for r in records:
        taken, loss = r["seconds"], r["held_out_loss"]
        cells = [TITLES[r["model"]], f"{r['parameters'] / 1e6:.1f} M" if r["parameters"] else "", f"{budget_s:g}"]
        if not r["seeds"]:
            rows.append((*cells, *[""] * 7))
            continue
        cells += [_pm(taken, 1), f"{r['startup_s']:.1f}", str(r["steps"]), f"{1e3 * r['step_s']:.1f}", f"{r['images']:,}"]
        rows.append((*cells, _pm(loss), f"{r['memory_gib']:.2f}" if r["memory_gib"] is not None else ""))
    return Table(f"Pretraining, equal time ({size})", (*columns, "peak GiB"), rows)


def _what(result: Record) -> str:
    if result["stage"] == "pretrain":
        return "pretraining"
    return f"finetuning {INIT_TITLES[result['init']]}, {result['fraction']:.0%} of the labels"


def _labels(fraction: float, sections: int | None) -> str:
    counted = f" ({sections} section{'s' * (sections != 1)})" if sections else ""
    return f"With all labels{counted}" if fraction == 1 else f"With {fraction:.0%} of the labels{counted}"


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
    text = f"{value['mean']:+.3f}" + (f" ± {value['spread']:.3f}" if value["spread"] is not None else "")
    return f"{text}, clear" if value["clear"] else text


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
