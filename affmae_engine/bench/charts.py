"""Charts of a benchmark as PNG files, drawn from results.json alone, so that any machine can draw them.

Colours are two of Okabe and Ito's, which people with any colour vision tell apart; line style and marker say the same
again, for print. Matplotlib is imported when a chart is drawn, and without pyplot: no global state, no display.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affmae_engine import atomic
from affmae_engine.bench.quality import INITS, MODELS
from affmae_engine.bench.quality_report import INIT_TITLES, TITLES
from affmae_engine.errors import AffmaeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"affmae": "#0072B2", "vit-mae": "#D55E00"}
_INK, _GRID = "#222222", "#DDDDDD"
_DPI = 150
_DODGE = 0.012
"""Shift of each curve along the (logarithmic) axis, so that error bars do not hide each other."""
_WORK = {"pretrain": "Pretraining step", "finetune": "Finetuning step", "predict": "Prediction"}
_BAR = 0.36
_ABOVE: dict[str, Any] = {"textcoords": "offset points", "ha": "center"}
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _GRID,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}

Record = Mapping[str, Any]


class NoCharts(AffmaeError):
    """Nothing can be drawn here; everything else can go on."""


def draw(document: Record, folder: Path) -> tuple[str, ...]:
    """Draw what a results.json holds into a folder; returns the names of the files.

    Raises:
        NoCharts: Matplotlib is missing or does not load.
        ResourceError: a file cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise NoCharts(
            f"no charts: matplotlib cannot be imported ({error})", "pip install matplotlib, then repeat the command"
        ) from error
    names = []
    with matplotlib.rc_context(_STYLE):
        for name, figure in _figures(document):
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=_DPI)
            atomic.commit_bytes(folder / name, buffer.getvalue())
            names.append(name)
    return tuple(names)


def _figures(document: Record) -> Iterator[tuple[str, Figure]]:
    if document["kind"] == "quality":
        for size in document["sizes"]:
            if any(r["size"] == size and r["miou"] is not None for r in document["summary"]):
                yield f"label-efficiency-{size}.png", label_efficiency(document, size)
    elif document["kind"] == "comparison":
        for work, records in _by_work(document["results"]).items():
            yield f"speed-and-memory-{work}.png", speed_and_memory(records, work, document["device"])


def label_efficiency(document: Record, size: str) -> Figure:
    """Mean IoU over the share of the labels: one curve per model and start, bars for the spread, dots for the seeds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.add_subplot()
    summary = [r for r in document["summary"] if r["size"] == size and r["miou"] is not None]
    fractions = sorted({r["fraction"] for r in summary})
    curves = [(model, init) for model in MODELS for init in INITS]
    for number, (model, init) in enumerate(curves):
        shift = 10 ** (_DODGE * (number - (len(curves) - 1) / 2))
        curve = sorted((r for r in summary if (r["model"], r["init"]) == (model, init)), key=lambda r: r["fraction"])
        if curve:
            _curve(axes, curve, shift, COLOURS[model], init, f"{TITLES[model]}, {INIT_TITLES[init]}")
            dots = [r for r in document["results"] if (r["size"], r["model"], r["init"]) == (size, model, init)]
            dots = [r for r in dots if r["miou"] is not None]
            axes.plot(
                [100 * r["fraction"] * shift for r in dots], [r["miou"] for r in dots],
                linestyle="none", marker=".", markersize=4, color=COLOURS[model], alpha=0.45, zorder=1,
            )  # fmt: skip
    sections = {r["fraction"]: r["sections"] for r in summary}
    axes.set_xscale("log")
    axes.set_xlim(100 * fractions[0] / 1.25, 100 * fractions[-1] * 1.25)
    axes.xaxis.set_major_locator(FixedLocator([100 * fraction for fraction in fractions]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{fraction:.0%}\n{_sections(sections[fraction])}" for fraction in fractions])
    axes.set_xlabel("labels used for finetuning")
    axes.set_ylabel("mean IoU on the test part")
    axes.set_title(_quality_title(document, size))
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.17), ncols=2, columnspacing=2.5, handlelength=3)
    return figure


def speed_and_memory(records: Sequence[Record], work: str, device: str) -> Figure:
    """Throughput and, from a card, peak memory by resolution: panels for each size, with the ratio over each pair.

    Args:
        records: results of a comparison, each with the fields of its case beside its figures.
        work: what was measured.
        device: in words.
    """
    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys(r["size"] for r in records))
    known = any(r["allocated_gib"] for r in records)  # not on a CPU
    figure = Figure(figsize=(9, 0.9 + 3.1 * len(sizes)), layout="constrained")
    rows = figure.subplots(len(sizes), 2 if known else 1, squeeze=False)
    for size, panels in zip(sizes, rows, strict=True):
        of_size = [r for r in records if r["size"] == size]
        _bars(panels[0], of_size, "mpx_per_s", f"{size}: throughput", "Mpx/s (more is better)", faster=True)
        if known:
            _bars(panels[1], of_size, "allocated_gib", f"{size}: peak memory", "GiB (less is better)", faster=False)
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=2)
    figure.suptitle(f"{_WORK[work]}, AFFMAE against ViT-MAE; {device}", x=0.01, ha="left", fontsize=11)
    return figure


def _curve(axes: Axes, curve: Sequence[Record], shift: float, colour: str, init: str, label: str) -> None:
    full = init == "pretrained"
    axes.errorbar(
        [100 * r["fraction"] * shift for r in curve],
        [r["miou"] for r in curve],
        yerr=[r["spread"] or 0.0 for r in curve],
        color=colour,
        linestyle="-" if full else (0, (4, 2)),
        linewidth=2,
        marker="o" if full else "s",
        markersize=7,
        markerfacecolor=colour if full else "white",
        markeredgewidth=1.6,
        elinewidth=1.3,
        capsize=4,
        label=label,
        zorder=3 if full else 2,
    )


def _bars(axes: Axes, records: Sequence[Record], name: str, title: str, unit: str, *, faster: bool) -> None:
    """Pairs of bars by resolution. faster: the ratio is AFFMAE's by ViT-MAE's (else the other way round)."""
    groups = list(dict.fromkeys((r["resolution"], r["batch"]) for r in records))
    highest = max((r[name] or 0.0 for r in records), default=0.0) or 1.0
    for side, model in enumerate(MODELS):
        heights = [_best(records, group, model, name) for group in groups]
        places = [i + (side - 0.5) * (_BAR + 0.03) for i in range(len(groups))]
        axes.bar(
            places, [height or 0.0 for height in heights], _BAR, color=COLOURS[model], label=TITLES[model],
            hatch="" if model == "affmae" else "//", edgecolor="white", linewidth=0,
        )  # fmt: skip
        for place, height in zip(places, heights, strict=True):
            text = f"{height:.3g}" if height else "no figure"
            axes.annotate(text, (place, height or 0.0), xytext=(0, 2), fontsize=9, **_ABOVE)
    for i, group in enumerate(groups):
        ours, theirs = (_best(records, group, model, name) for model in MODELS)
        if ours and theirs:
            words = _ratio(ours / theirs if faster else theirs / ours, faster)
            axes.annotate(words, (i, max(ours, theirs)), xytext=(0, 17), weight="bold", **_ABOVE)
    axes.set_xticks(range(len(groups)), [f"{edge} px\nbatch {batch}" for edge, batch in groups])
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylim(0, 1.28 * highest)
    axes.set_ylabel(unit)
    axes.set_title(title)


def _ratio(ratio: float, faster: bool) -> str:
    if ratio >= 1:
        return f"{ratio:.1f}× " + ("faster" if faster else "less memory")
    return f"{1 / ratio:.1f}× " + ("slower" if faster else "more memory")


def _best(records: Sequence[Record], group: tuple[int, int], model: str, name: str) -> float | None:
    """The figure of the fastest way that a model was run."""
    same = [r for r in records if (r["resolution"], r["batch"]) == group and r["model"] == model and r["ms"]]
    return min(same, key=lambda r: r["ms"])[name] if same else None


def _by_work(results: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in results:
        found.setdefault(record["case"]["work"], []).append({**record["case"], **record})
    return found


def _quality_title(document: Record, size: str) -> str:
    from affmae_engine.train.report import duration

    seeds = len(document["seeds"])
    spread = f"{seeds} seeds, bars: standard deviation" if seeds > 1 else "one seed"
    return f"{size}, {duration(document['budget_s'])} of pretraining each; {spread}"


def _sections(count: int | None) -> str:
    return "" if count is None else f"{count} section{'s' * (count != 1)}"
