"""Charts of a result as PNG files, drawn from results.json alone.

The two colors are from Okabe and Ito's palette for color blindness; hatching and line style repeat the distinction for
print. Matplotlib is imported when a chart is drawn, without pyplot, so there is no global state and no display.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affmae_engine import atomic
from affmae_engine.bench.quality import INIT_TITLES
from affmae_engine.bench.report import TITLES, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Chart

COLORS = {"affmae": "#0072B2", "vit-mae": "#D55E00"}

_DPI = 150
_BAR = 0.36
_DODGE = 0.012
"""Shift of each curve along the logarithmic axis, so that error bars do not hide each other."""
_STYLE = {
    "font.size": 11,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#DDDDDD",
    "legend.frameon": False,
}

Record = Mapping[str, Any]


def draw(document: Record, folder: Path) -> tuple[str, ...]:
    """Draw a results.json into a folder; returns the names of the files.

    Raises:
        ImportError: Matplotlib is missing.
        ResourceError: a file cannot be written.
    """
    import matplotlib

    names = []
    with matplotlib.rc_context(_STYLE):
        for name, chart in _charts(document):
            buffer = io.BytesIO()
            chart.savefig(buffer, format="png", dpi=_DPI)
            atomic.commit_bytes(folder / name, buffer.getvalue())
            names.append(name)
    return tuple(names)


def _charts(document: Record) -> Iterator[tuple[str, Chart]]:
    if document["kind"] == "quality" and any(r["miou"] is not None for r in document["summary"]):
        yield "label-efficiency.png", label_efficiency(document)
    if document["kind"] == "speed":
        records = [{**r["case"], **r} for r in document["results"] if r["ms"]]
        for task in dict.fromkeys(r["task"] for r in records):
            own = [r for r in records if r["task"] == task and r["protocol"] == "trainer"]
            if own:
                yield f"speed-and-memory-{task}.png", speed_and_memory(own, f"{task}; {document['device']}")


def speed_and_memory(records: list[dict[str, Any]], title: str) -> Chart:
    """Images per second and peak memory, a pair of bars for every size and resolution, with the ratio above it."""
    from matplotlib.figure import Figure as Chart

    panels = [("images_per_s", "images/s (more is better)", "vit-mae")]
    if any(r["allocated_gib"] for r in records):  # known on a GPU only
        panels.append(("allocated_gib", "peak GiB (less is better)", "affmae"))
    chart = Chart(figsize=(4.5 * len(panels), 4.2), layout="constrained")
    (axes,) = chart.subplots(1, len(panels), squeeze=False)
    for panel, (name, unit, of) in zip(axes, panels, strict=True):
        _bars(panel, records, name, unit, of=of)
    chart.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    chart.suptitle(title, x=0.01, ha="left", fontsize=11)
    return chart


def _bars(axes: Axes, records: list[dict[str, Any]], name: str, unit: str, *, of: str) -> None:
    """Heights relative to ViT-MAE's, the figures themselves as text. of: the family that the ratio divides by."""
    groups = list(dict.fromkeys((r["size"], r["resolution"], r["batch"]) for r in records))
    for place, group in enumerate(groups):
        found = {r["family"]: r[name] for r in records if (r["size"], r["resolution"], r["batch"]) == group and r[name]}
        base = found.get("vit-mae") or next(iter(found.values()), 1.0)
        for side, family in enumerate(TITLES):
            height = found.get(family, 0.0) / base
            at = place + (side - 0.5) * (_BAR + 0.03)
            label = TITLES[family] if place == 0 else None
            hatch = "" if family == "affmae" else "//"
            axes.bar(at, height, _BAR, color=COLORS[family], label=label, hatch=hatch, edgecolor="white")
            text = figure(found[family]) if family in found else "none"
            axes.annotate(text, (at, height), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=9)
        if len(found) == len(TITLES):
            (other,) = (family for family in TITLES if family != of)
            ratio = f"{found[other] / found[of]:.1f}×"
            top = (place, max(found.values()) / base)
            axes.annotate(ratio, top, xytext=(0, 16), textcoords="offset points", ha="center", weight="bold")
    axes.set_xticks(range(len(groups)), [f"{size}\n{edge} px\nbatch {batch}" for size, edge, batch in groups])
    axes.margins(y=0.2)
    axes.set_ylabel(f"{unit}, ViT-MAE = 1")


def label_efficiency(document: Record) -> Chart:
    """Mean IoU over the share of the labels: a curve per model and start, bars for the spread over seeds."""
    from matplotlib.figure import Figure as Chart
    from matplotlib.ticker import FixedLocator, NullLocator

    chart = Chart(figsize=(8, 5.2), layout="constrained")
    axes = chart.add_subplot()
    summary = sorted((r for r in document["summary"] if r["miou"] is not None), key=lambda r: r["fraction"])
    curves = [(model, init) for model in TITLES for init in INIT_TITLES]
    for number, (model, init) in enumerate(curves):
        own = [r for r in summary if (r["model"], r["init"]) == (model, init)]
        if not own:
            continue
        shift = 10 ** (_DODGE * (number - (len(curves) - 1) / 2))
        full = init == "pretrained"
        axes.errorbar(
            [100 * r["fraction"] * shift for r in own],
            [r["miou"] for r in own],
            yerr=[r["spread"] or 0.0 for r in own],
            color=COLORS[model],
            linestyle="-" if full else "--",
            marker="o" if full else "s",
            markerfacecolor=COLORS[model] if full else "white",
            capsize=4,
            label=f"{TITLES[model]}, {INIT_TITLES[init]}",
        )
    sections = {r["fraction"]: r["sections"] for r in summary}
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([100 * fraction for fraction in sections]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{fraction:.0%}\n{count} sections" for fraction, count in sections.items()])
    axes.set_xlabel("labels used for finetuning")
    axes.set_ylabel("mean IoU on the test part")
    axes.set_title(f"{document['budget_s']:g} s of pretraining each, {len(document['seeds'])} seeds")
    axes.legend()
    return chart
