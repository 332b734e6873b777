"""Overview: the run in one sentence, the chart that decides, pictures, the machine, the last events."""

from __future__ import annotations

import math
import time

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.widgets import Digits

from affmae_cli.dashboard.chart import Chart
from affmae_cli.dashboard.charts import LOSS, MACHINE, known, main_chart, sparkline
from affmae_cli.dashboard.colors import class_color, curve_color
from affmae_cli.dashboard.columns import Columns
from affmae_cli.dashboard.panes.pane import History, Lines, Pane, Panel, bar, figure, in_columns
from affmae_cli.dashboard.pictures import PictureGrid
from affmae_cli.dashboard.run_model import RunModel
from affmae_cli.dashboard.text import cut, duration, gib, number, of, one_line, rate, seconds, share
from affmae_cli.dashboard.verdicts import Level, headline, worst_classes
from affmae_engine.events import CheckpointSaved, Evaluated, Event, PreviewSaved, RunEnded, Warned, line

LEVEL_STYLES: dict[Level, str] = {"good": "$success", "note": "$primary", "bad": "$error"}
_SIGNS: dict[Level, str] = {"good": "✔", "note": "▲", "bad": "✖"}
_MOST_BARS = 8


class OverviewPane(Pane):
    """The figures of a live or finished run at a glance."""

    def compose(self) -> ComposeResult:
        """The sentence; chart and figures; pictures and events."""
        yield Lines(id="headline")
        with Horizontal(id="overview-top"):
            yield Chart(LOSS, id="overview-chart")
            with Vertical(id="overview-side"):
                yield Digits("", id="overview-score")
                yield Panel("IoU by class", id="overview-classes")
                yield Panel("now", id="overview-now")
        with Horizontal(id="overview-bottom"):
            yield PictureGrid(main_only=True, id="overview-picture")
            yield Panel("last events", id="overview-events")
        yield Panel("end of the log", id="overview-log")

    def focus_first(self) -> None:
        self.query_one(Chart).focus()

    def take(self, model: RunModel) -> None:
        super().take(model)
        shown = {"-classes": bool(worst_classes(model)), "-broken": model.status.kind in ("failed", "gone")}
        if any(self.has_class(name) != value for name, value in shown.items()):
            for name, value in shown.items():
                self.set_class(value, name)
            self.call_after_refresh(self.take, model)  # once what appeared has its size
        self.query_one(Chart).take(model, main_chart(model))
        said = headline(model)
        sentence = self.query_one("#headline", Lines)
        sentence.set_classes(f"level-{said.level}")
        sentence.put(Text(f"{_SIGNS[said.level]} {said.text[:1].upper()}{said.text[1:]}"))
        self._take_picture(model)
        self._take_classes(model)
        now = self.query_one("#overview-now", Panel)
        columns = 2 if now.size.width >= 70 else 1
        now.put(in_columns(self._now(model, now, now.size.width // columns - columns + 1), now.size.width, columns))
        events = self.query_one("#overview-events", Panel)
        events.put(Text("\n").join(event_lines(model, events.size.width)[-max(1, events.size.height) :]))
        if shown["-broken"]:
            log = self.query_one("#overview-log", Panel)
            lines = [cut(one_line(text), log.size.width) for text in model.log_tail(1 << 14)[-8:]]
            log.put(Text("\n".join(lines)))

    def _take_picture(self, model: RunModel) -> None:
        picture = self.query_one(PictureGrid)
        newest = model.previews[-1] if model.previews else None
        picture.path = model.root / newest.path if newest else None
        picture.stamp = newest.time if newest else 0.0
        every = model.config.train.preview_every if model.config else 0
        if newest is None and every and not model.status.ended:
            picture.border_title = "preview (the first within a minute)"
        else:
            picture.border_title = f"step {newest.step:,}" if newest else "preview"

    def _take_classes(self, model: RunModel) -> None:
        scores = worst_classes(model)
        value = model.evaluated.metrics.get("iou", math.nan) if model.evaluated else math.nan
        self.query_one("#overview-score", Digits).update(f"{value:.3f}" if math.isfinite(value) else "")
        panel = self.query_one("#overview-classes", Panel)
        panel.border_title = "mean IoU, and IoU by class"
        width, numbers = panel.size.width, model.classes
        lines = []
        for name, score in sorted(scores[:_MOST_BARS], key=lambda item: numbers[item[0]]):
            color = panel.paint(class_color(numbers[name]))
            text = Text(f"{cut(one_line(name), 14):<14} ", no_wrap=True).append_text(
                bar(score, max(4, width - 22), color)
            )
            lines.append(text.append(f" {score:.3f}" if math.isfinite(score) else "     -"))
        if len(scores) > _MOST_BARS:
            lines.append(Text(f"and {len(scores) - _MOST_BARS} better classes, see Pictures", "dim"))
        if model.best is not None and scores:
            best = model.best.metrics.get("iou", math.nan)
            lines.append(figure("best", f"{number(best)} at step {model.best.step:,}", width))
        panel.put(Text("\n").join(lines))

    def _now(self, model: RunModel, panel: Panel, width: int) -> list[Text]:
        lines = [*training_lines(model, panel, width), *machine_lines(model, panel, width)]
        return lines if panel.size.width > width else [*lines, *verdict_lines(model, panel)]


def training_lines(model: RunModel, panel: Panel, width: int) -> list[Text]:
    """Loss, speed, wait for data, memory."""
    step = model.latest
    if step is None:
        return []
    speed = _history(panel, model.steps, "images_per_s", "images_per_s")
    megapixels = f", {rate(model.megapixels_per_s)} Mpx/s" if math.isfinite(model.megapixels_per_s) else ""
    held_out = model.evaluated.metrics.get("loss", math.nan) if model.evaluated else math.nan
    loss = f"{number(step.losses.get('loss', math.nan))}"
    lines = [
        figure("loss", loss + (f", held-out {number(held_out)}" if math.isfinite(held_out) else ""), width),
        figure("speed", f"{rate(step.images_per_s)} images/s{megapixels}", width, history=speed, style="bold"),
        figure("step", f"{seconds(step.step_s)}, lr {step.lr:.1e}", width),
        figure("data wait", share(model.data_wait), width),
    ]
    if step.skipped:
        lines.append(
            figure("skipped", f"{step.skipped} steps that were not finite", width, style=panel.paint("#E4713C"))
        )
    if not known(model.systems, "gpu_memory_used"):
        memory = f"{gib(step.memory_gib)}, at most {gib(step.memory_peak_gib)}"
        lines.append(figure("memory", memory, width))
    return lines


def machine_lines(model: RunModel, panel: Panel, width: int) -> list[Text]:
    """Memory, load, power and temperature of the GPU with their history; of the CPU where there is none."""
    system = model.system
    if system is None:
        return []
    peak = model.latest.memory_peak_gib if model.latest else math.nan
    used = of(system.gpu_memory_used, system.gpu_memory_total, "GiB", 1)
    values = {
        "memory": (used, system.gpu_memory_total),
        "load": (share(system.gpu_utilisation), 100.0),
        "power": (of(system.power, system.power_limit, "W"), system.power_limit),
        "temperature": (f"{system.temperature:.0f} °C", math.nan),
        "cpu": (share(system.cpu), 100.0),
    }
    lines = []
    for machine in MACHINE:
        if machine.key not in values or not known(model.systems, machine.column):
            continue
        if machine.key == "cpu" and not model.on_cpu:
            continue
        text, top = values[machine.key]
        history = _history(panel, model.systems, machine.column, machine.key, top / machine.factor)
        lines.append(figure(machine.title.replace("temperature", "temp"), text, width, history=history))
        if machine.key == "memory":
            others = system.gpu_memory_others
            own = system.gpu_memory_used - (others if math.isfinite(others) else 0.0)
            lines.append(figure("", f"run {own:.1f}, peak {peak:.1f}, others {others:.1f}", width))
    return lines


def verdict_lines(model: RunModel, panel: Panel) -> list[Text]:
    """What can be done about the run, the most urgent first."""
    colors = {"good": "#2FB592", "note": "#56B4E9", "bad": "#F0703A"}
    order = ("bad", "note", "good")
    found = sorted(model.verdicts if model.latest else [], key=lambda verdict: order.index(verdict.level))
    return [Text().append(f"{_SIGNS[v.level]} ", panel.paint(colors[v.level])).append(one_line(v.text)) for v in found]


def event_lines(model: RunModel, width: int) -> list[Text]:
    """Notable events, oldest first, with their times of day."""
    lines = []
    for event in list(model.events):
        text, style = _event_text(event, model.total_steps)
        if text:
            lines.append(Text().append(time.strftime("%H:%M:%S ", time.localtime(event.time)), "dim"))
            lines[-1].append(cut(one_line(text), max(0, width - 9)), style)
    return lines


def _event_text(event: Event, total_steps: int) -> tuple[str, str]:
    """An event in few words, and its style."""
    match event:
        case Evaluated():
            name = next((n for n in ("iou", "loss") if n in event.metrics), "")
            value = number(event.metrics[name]) if name else ""
            return f"{event.step:,}: {'IoU' if name == 'iou' else name} {value}{' best' if event.best else ''}", ""
        case CheckpointSaved():
            return f"{event.step:,}: checkpoint", "dim"
        case PreviewSaved():
            return f"{event.step:,}: preview", "dim"
        case Warned() | RunEnded():
            return line(event, total_steps), "bold"
        case _:
            return line(event, total_steps), ""


def _history(panel: Panel, columns: Columns, name: str, key: str, top: float = math.nan) -> History:
    return lambda width: Text(sparkline(columns, name, width, top), panel.paint(curve_color(key)))


def progress_line(model: RunModel) -> str:
    """How far the run is, and how long it takes."""
    if not model.total_steps:
        return ""
    left = ""
    if not model.status.ended:
        left = f"  {duration(model.eta_s)} left" if math.isfinite(model.eta_s) else "  time left not known yet"
    done = f"step {model.step:,} of {model.total_steps:,}  {model.progress:.0%}"
    return f"{done}  {duration(model.elapsed_s)}{left}"
