"""The report of a comparison, for someone who decides which network to train: first in words, then in tables.

Every sentence is made from the figures of the tables below it. What could not be measured is said in the same place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from affmae_engine.bench.report import Table, figure, profile_table
from affmae_engine.bench.results import Ratio, Result

_NAMES = {"affmae": "AFFMAE", "vit-mae": "ViT-MAE"}
_DOING = {"pretrain": "pretraining", "finetune": "finetuning", "predict": "predicting"}
_SHARES = {"a tenth": 1 / 10, "an eighth": 1 / 8, "a sixth": 1 / 6, "a fifth": 1 / 5, "a quarter": 1 / 4,
           "a third": 1 / 3, "half": 1 / 2, "two thirds": 2 / 3, "three quarters": 3 / 4}  # fmt: skip
_OUTCOMES = {
    "out of memory": "ran out of memory",
    "failed": "failed",
    "timed out": "took too long",
    "waiting": "was not measured",
}
_NEAR = 0.04
"""A share is called by the name of a fraction that it differs from by no more than this part."""

SMALL_PRINT = """\
A step is forward, loss, backward, clipping and fused AdamW, taken by the trainer's own code on random images; both
families get the same images, masks, loss, optimizer and decoder width, and have about the same number of parameters.
Finetuning trains a segmenter of five classes on all tokens; predicting is its forward pass. ViT-MAE runs at its best:
one matrix product for query, key and value, the attention that PyTorch picks for the card, compiled as a whole, and
with recorded steps where that is faster. AFFMAE runs as the trainer, or the predictor, runs it. Every figure is the
median over rounds, each in a process of its own, the families by turns; "rounds" gives the fastest and the slowest.
Memory is the peak of one process: what tensors took, and what PyTorch held. Operations count a multiplication and an
addition as two; norms and activations are left out. In the table of ratios, "times as fast" and "forward" are ViT-MAE's
times by AFFMAE's, and memory and operations are AFFMAE's by ViT-MAE's. The time to the first step is given with
everything compiled before, and as it was in the compiling phase, where several networks were compiled at once and
caches may have held some of it."""


def sentences(ratios: Sequence[Ratio], results: Sequence[Result]) -> list[str]:
    """What the figures say, one sentence per setting."""
    return [_sentence(ratio, *_sides(ratio, results)) for ratio in ratios]


def tables(results: Sequence[Result], ratios: Sequence[Ratio]) -> list[Table]:
    """Ratios first, then speed, memory, loading where it was measured, and profiles where they were asked for."""
    found = [ratio_table(ratios)] if ratios else []
    found += [speed_table(results), cost_table(results)]
    if any(result.data_images_per_s for result in results):
        found.append(loading_table(results))
    for result in results:
        profile = next((measured.profile for measured in result.rounds if measured.profile), None)
        if profile:
            found.append(profile_table(result.case.title, profile))
    return found


def ratio_table(ratios: Iterable[Ratio]) -> Table:
    """AFFMAE against ViT-MAE."""
    columns = ("task", "px", "network", "images", "times as fast", "rounds", "forward", "memory", "operations")
    rows = [
        (
            ratio.work,
            str(ratio.resolution),
            ratio.size,
            str(ratio.batch),
            figure(ratio.speed),
            _range(ratio.speed_least, ratio.speed_most),
            figure(ratio.forward_speed),
            figure(ratio.memory),
            f"1/{figure(ratio.flops)}" if ratio.flops else "",
            figure(ratio.max_batch),
        )
        for ratio in ratios
    ]
    return Table("AFFMAE against ViT-MAE", (*columns, "largest batch"), rows)


def speed_table(results: Iterable[Result]) -> Table:
    """Times and what follows from them."""
    columns = ("task", "px", "network", "images", "step ms", "rounds", "forward ms", "images/s", "Mpx/s", "runs as")
    rows = []
    for result in results:
        ok = result.status == "ok"
        rows.append(
            (
                *_name(result),
                figure(result.ms) if ok else result.status,
                _range(result.least_ms, result.most_ms),
                figure(result.forward_ms),
                figure(result.images_per_s),
                figure(result.mpx_per_s),
                result.how,
                result.note,
            )
        )
    return Table("Speed", (*columns, "note"), rows)


def cost_table(results: Iterable[Result]) -> Table:
    """Memory, arithmetic and how long it takes to begin."""
    columns = ("task", "px", "network", "images", "peak GiB", "held GiB", "parameters", "forward GFLOP/image")
    more = ("largest batch", "to first step, s", "the same, compiling, s")
    rows = [
        (
            *_name(result),
            figure(result.allocated_gib),
            figure(result.reserved_gib),
            f"{result.parameters / 1e6:.1f} M" if result.parameters else "",
            figure(result.forward_gflop),
            "" if result.max_batch is None else str(result.max_batch),
            figure(result.first_step_s),
            figure(result.compile_s),
        )
        for result in results
    ]
    return Table("Memory, arithmetic, time to the first step", (*columns, *more), rows)


def loading_table(results: Iterable[Result]) -> Table:
    """The same steps with random images and with a dataset through the trainer's loader."""
    rows = [
        (
            *_name(result),
            figure(result.images_per_s),
            figure(result.data_images_per_s),
            f"{result.data_wait:.0%}" if result.data_wait is not None else "",
        )
        for result in results
        if result.data_images_per_s
    ]
    columns = ("task", "px", "network", "images", "images/s", "with the dataset", "waiting for data")
    return Table("With data loading", columns, rows)


def markdown(
    values: dict[str, Any], results: Sequence[Result], ratios: Sequence[Ratio], more: Iterable[str] = ()
) -> str:
    """report.md.

    Args:
        values: the document as in results.json, for its circumstances.
        results, ratios: the same as records.
        more: further sections, each with its heading, before the circumstances.
    """
    card = values["device"].split(",")[0]
    lines = ["# AFFMAE against ViT-MAE on this machine", "", f"**{card}**", ""]
    lines += [f"*{remark}*\n" for remark in values["remarks"]]
    lines += [f"- {sentence}" for sentence in sentences(ratios, results)]
    lines += ["", *[table.without_empty_columns().markdown() for table in tables(results, ratios)], *more]
    return "\n".join([*lines, "## Circumstances", "", *_circumstances(values), "", SMALL_PRINT, ""])


def _circumstances(values: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in values["versions"].items())
    settings, gate, card = values["settings"], values["gate"], values["card"]
    driver = f"driver {card['driver']}; " if "driver" in card else ""
    lines = [
        f"- {values['device']}; {driver}{versions}; Python {values['python']}; "
        f"{values['cpus']} processors; {values['platform']}",
        f"- {commit(values['git'])}",
        f"- measured {values['created']} by `{' '.join(values['command'])}`: {settings['rounds']} rounds of "
        f"{settings['steps']} timed steps after {settings['warmup']}",
        f"- {values['mask_kind']} masks of {values['mask_ratio']:.0%}, {values['merge_keep']:.0%} of the tokens kept "
        f"at each merging, autocast {values['dtype']}",
        f"- AFFMAE's operations: {_backends(values['backends'])}",
        f"- before anything was timed, {gate['cases']} cases of the operations were compared with their float64 "
        f"references; largest relative error {gate['worst_error']:.1e}",
    ]
    if "clock_mhz" in card:
        lines.append(f"- {clocks(card)}")
    if card.get("other_processes"):
        lines.append(f"- {card['other_processes']} other processes were on the card")
    if "problem" in card:
        lines.append(f"- clocks and throttling are not known: {card['problem']}")
    return lines


def _backends(backends: dict[str, str]) -> str:
    kinds = set(backends.values())
    if len(kinds) == 1:
        return f"{kinds.pop()}, all of them"
    return ", ".join(f"{name} {backend}" for name, backend in backends.items())


def commit(git: dict[str, Any] | None) -> str:
    """Which commit was run, in words."""
    if git is None:
        return "not run from a checkout, so the commit is not known"
    return f"commit {git['commit'][:12]}{', with changes' if git['modified'] else ''}"


def clocks(card: dict[str, Any]) -> str:
    """What `CardWatch.record` saw under load, in words; it must have seen some."""
    clock, held = card["clock_mhz"], card["throttling"]
    causes = ", ".join(f"{name} ({share:.0%} of the time)" for name, share in held.items())
    return (
        f"clock {clock['least']} to {clock['most']} MHz under load, median {clock['median']:.0f} (the card's highest: "
        f"{card['most_clock_mhz']}); up to {card['temperature_c']} °C and {card['power_w']['most']:.0f} W of "
        f"{card['power_limit_w']:.0f}; {f'held down by {causes}' if held else 'nothing held it down'}"
    )


def _sides(ratio: Ratio, results: Sequence[Result]) -> tuple[Result, Result]:
    """AFFMAE's result, and that of ViT-MAE run in the fastest way."""
    setting = (ratio.work, ratio.size, ratio.resolution, ratio.batch)
    same = [r for r in results if (r.case.work, r.case.size, r.case.resolution, r.case.batch) == setting]
    ours = next(result for result in same if result.case.model == "affmae")
    theirs = [result for result in same if result.case.model != "affmae"]
    return ours, next((result for result in theirs if result.how == ratio.against), theirs[0])


def _sentence(ratio: Ratio, ours: Result, theirs: Result) -> str:
    where = f"{_DOING[ratio.work]} at {ratio.resolution} px, {ratio.batch} image{'s' * (ratio.batch != 1)} at a time"
    for side, other in ((ours, theirs), (theirs, ours)):
        if side.status != "ok":
            rest = f"; {_title(other)} takes {_rate(other)} there" if other.status == "ok" else ""
            return f"{_title(side)} {_OUTCOMES[side.status]}, {where}{rest}."
    if ratio.speed is None:
        return f"{_title(ours)} and {_title(theirs)}, {where}: not measured yet."
    slower = "" if ratio.speed >= 1 else "is slower: it "
    said = f"{slower}takes **{_times(ratio.speed)} times as many images**"
    memory = ""
    if ratio.memory is not None:
        gib = f"{figure(ours.allocated_gib)} against {figure(theirs.allocated_gib)} GiB"
        memory = f", in {_share(ratio.memory)} the memory ({gib})"
    rates = f"{_rate(ours)} against {figure(theirs.images_per_s)}"
    return f"{_title(ours)} {said} as {_title(theirs)}, {where} ({rates}){memory}."


def _times(value: float) -> str:
    """Two digits, as for a sentence."""
    return f"{value:.1f}" if 1 <= value < 10 else f"{value:.2g}" if value < 1 else f"{value:.0f}"


def _title(result: Result) -> str:
    return f"{_NAMES[result.case.model]}-{result.case.size}"


def _rate(result: Result) -> str:
    return f"{figure(result.images_per_s)} images/s"


def _share(value: float) -> str:
    """A share of something in words: "a third of", "42 % of", "1.2 times"."""
    for name, share in _SHARES.items():
        if abs(value / share - 1) <= _NEAR:
            return f"{name} of" if name != "half" else "half"
    return f"{value:.0%} of".replace("%", " %") if value < 1 else f"{figure(value)} times"


def _name(result: Result) -> tuple[str, str, str, str]:
    case = result.case
    return case.work, str(case.resolution), _title(result), str(case.batch)


def _range(least: float | None, most: float | None) -> str:
    return f"{figure(least)} to {figure(most)}" if least is not None and most is not None and least != most else ""
