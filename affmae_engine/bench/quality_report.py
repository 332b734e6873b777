"""The report of a quality comparison: tables and sentences that are read without knowing the machinery.

Everything is made from the document (results.json) alone, so a report can be made again elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from affmae_engine.bench.comparison_report import clocks, commit
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


def tables(document: Record) -> list[Table]:
    """Everything in rows: scores, differences, classes, time, failures."""
    made: list[Table] = []
    for size in document["sizes"]:
        of_size = {name: [r for r in document[name] if r["size"] == size] for name in ("summary", "times", "results")}
        gaps = [r for r in document["differences"] if r["size"] == size]
        made += [_score_table(size, of_size["summary"]), _difference_table(size, gaps)]
        made += [_class_table(size, of_size["summary"]), _time_table(size, of_size["times"], document["budget_s"])]
    failed = [r for r in document["results"] if r["status"] not in ("ok", "waiting", "running")]
    if failed:
        rows = [(r["size"], TITLES[r["model"]], str(r["seed"]), _what(r), r["status"], r["note"]) for r in failed]
        made.append(Table("What did not work", ("size", "model", "seed", "part", "outcome", "why"), rows))
    return made


def markdown(document: Record, charts: Sequence[str] = ()) -> str:
    """report.md.

    Args:
        document: results.json.
        charts: file names of pictures beside the report.
    """
    lines = ["# AFFMAE against ViT-MAE: what they learn in equal time", ""]
    lines += [f"**{document['device'].split(',')[0]}**", ""]
    lines += [f"**{remark}**\n" for remark in document["remarks"]]
    lines += ["## In short", "", *[f"- {sentence}" for sentence in in_short(document)], ""]
    lines += [f"![{name.removesuffix('.png').replace('-', ' ')}]({name})\n" for name in charts]
    lines += [table.markdown() for table in tables(document)]
    lines += ["## How it was done", "", *[f"- {sentence}" for sentence in how(document)], ""]
    lines += ["## Circumstances", "", *[f"- {sentence}" for sentence in circumstances(document)]]
    return "\n".join(lines) + "\n"


def in_short(document: Record) -> list[str]:
    """The findings in sentences, the doubts included."""
    found: list[str] = []
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
    found: list[str] = [
        f"Scored on {data['test_sections']} labelled sections that nothing was trained on, not even without labels: "
        f"{data['test']}. Sections beside them were used by nobody, so no test section has a neighbour in training.",
        f"Finetuned on {data['train_sections']} labelled sections ({data['train']}), or a contiguous share of them "
        "that the seed chooses, the same for both models; a smaller share lies inside every larger one.",
        f"Pretrained on {data['pretrain_sections']} sections without their labels.",
        f"Equal time: {duration(document['budget_s'])} of training steps each, data loading included. Each model's "
        "speed was measured first, after compiling and the first steps, which are not counted on either side; its "
        "number of steps is the budget by that speed, so that the learning rate has come down when the time is over.",
        f"Equal steps in finetuning ({tuning}): there both models see the same crops in the same order, and a faster "
        f"model gains nothing. They are what the slower one, by its measured speed, does in "
        f"{duration(document['finetune_budget_s'])}.",
        "From scratch every layer has the full learning rate; decay by layers is for pretrained weights alone.",
        "The model of the last step is scored; no checkpoint was chosen by its score.",
        "The held-out loss is the mean squared error of the model's last output at the masked pixels of the test part. "
        "What AFFMAE is trained on besides, the outputs of two earlier decoder steps, is not in it.",
        "Both models share masks, loss, optimizer, schedule, augmentation and the settings of the preset; ± is the "
        "standard deviation over seeds (weights, crops, masks and the choice of labelled sections).",
        "A share is rounded to whole sections, one at least. Mean IoU is over the classes that occur in the test part.",
    ]
    if data["left_out"]:
        found.append(f"{len(data['left_out'])} unlabelled images are copies of labelled ones and were left out.")
    return found


def circumstances(document: Record) -> list[str]:
    """Machine, versions, commit, command, clocks."""
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    card = document["card"]
    driver = f"driver {card['driver']}; " if "driver" in card else ""
    found = [
        f"{document['device']}; {driver}{versions}; Python {document['python']}; "
        f"{document['cpus']} processors; {document['platform']}",
        commit(document["git"]),
        f"begun {document['created']} by `{' '.join(document['command'])}`, {duration(document['seconds'])} in all",
        f"{document['mask_kind']} masks of {document['mask_ratio']:.0%}, {document['merge_keep']:.0%} of the tokens "
        f"kept at each merging, autocast {document['dtype']}",
    ]
    if "clock_mhz" in card:
        found.append(f"the first card: {clocks(card)}")
    if "problem" in card:
        found.append(f"clocks and throttling are not known: {card['problem']}")
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
    if gap["every_seed"]:
        judged = (
            f"{ahead} is ahead by {abs(gap['mean']):.3f}, in every one of {gap['seeds']} seeds (with equal models that "
            f"happens 1 time in {2 ** (gap['seeds'] - 1)})."
        )
    elif gap["seeds"] > 1:
        judged = f"The difference of {abs(gap['mean']):.3f} lies within the spread of {gap['seeds']} seeds: no verdict."
    else:
        judged = f"{ahead} is ahead by {abs(gap['mean']):.3f} in the one seed."
    with_labels = _labels(fraction, scores["affmae"]["sections"])
    yield f"{with_labels}{label}, pretrained: {texts[0]}, {texts[1]} mean IoU. {judged}"


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
    mine, other = ours["seconds"]["mean"], theirs["seconds"]["mean"]
    ratio = mine / other
    yield (
        f"In equal time{label} AFFMAE trained on {ours['images']:,} crops and ViT-MAE on {theirs['images']:,}: "
        f"{ours['images'] / theirs['images']:.1f} times as many. Taken were {mine:.1f} s and {other:.1f} s of the "
        f"planned {document['budget_s']:g} s, a ratio of {ratio:.2f}."
    )
    if abs(ratio - 1) > TIME_TOLERANCE:
        yield (
            f"These times{label} are not equal. Read the scores with that in mind, or repeat with a longer budget on a "
            "quiet machine."
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
    columns = (
        "model",
        "parameters",
        "budget s",
        "taken s",
        "start-up s",
        "steps",
        "ms a step",
        "crops",
        "held-out loss",
    )
    rows = []
    for r in records:
        taken, loss = r["seconds"], r["held_out_loss"]
        cells = [TITLES[r["model"]], f"{r['parameters'] / 1e6:.1f} M" if r["parameters"] else "", f"{budget_s:g}"]
        if not r["seeds"]:
            rows.append((*cells, *[""] * 7))
            continue
        cells += [
            _pm(taken, 1),
            f"{r['startup_s']:.1f}",
            str(r["steps"]),
            f"{1e3 * r['step_s']:.1f}",
            f"{r['images']:,}",
        ]
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
    return f"{text}, every seed" if value["every_seed"] else text
