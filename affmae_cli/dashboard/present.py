"""A run's figures as labelled rows: units, wording and rounding. Pure; what is not known says so and is never zero."""

from __future__ import annotations

import math

from rich.cells import cell_len, set_cell_size

from affmae_cli.dashboard.one_line import one_line
from affmae_cli.dashboard.view import RunView
from affmae_cli.dashboard.widgets.figures import Bar, Figure, Tone
from affmae_cli.dashboard.worst import worst
from affmae_engine.runtime.formatting import number, rate

_TONES: dict[str, Tone] = {"good": "good", "note": "warn", "bad": "bad"}
_LONGEST_NAME = 24
NOT_AVAILABLE = "not available"


def training(view: RunView) -> tuple[Figure, ...]:
    """Throughput, step time, learning rate, wait for data."""
    step = view.latest
    if step is None:
        return (Figure("speed", "no step yet", "muted"),)
    megapixels = f"  {rate(view.megapixels_per_s)} Mpx/s" if math.isfinite(view.megapixels_per_s) else ""
    rows = [
        Figure("speed", f"{rate(step.images_per_s)} images/s{megapixels}", "strong"),
        Figure("step", f"{seconds(step.step_s)}   lr {step.lr:.1e}"),
        Figure("data wait", share(view.data_wait), bar=_bar(view.data_wait)),
    ]
    if step.skipped:
        rows.append(Figure("skipped", f"{step.skipped} steps that were not finite", "warn"))
    return tuple(rows)


def verdicts(view: RunView, most: int | None = None) -> tuple[Figure, ...]:
    """What the figures mean, worst first; `most`: at most so many."""
    order = ("bad", "note", "good")
    found = sorted(view.verdicts, key=lambda verdict: order.index(verdict.level))
    return tuple(Figure({"bad": "✖", "note": "▲", "good": "✔"}[v.level], v.text, _TONES[v.level]) for v in found[:most])


def losses(view: RunView) -> tuple[Figure, ...]:
    """The newest losses, beside each the held-out one of that name, and the other held-out metrics."""
    step, found = view.latest, view.evaluated
    if step is None:
        return (Figure("loss", "no step yet", "muted"),)
    held_out = dict(found.metrics) if found else {}
    rows = []
    for name, value in step.losses.items():
        beside = f"   held-out {number(held_out.pop(name))}" if name in held_out else ""
        rows.append(Figure(name, f"{number(value)}{beside}", "strong" if name == "loss" else "plain"))
    held_out.pop("score", None)  # the one of the others that decides
    rows += [Figure(f"held-out {name.replace('_', ' ')}", number(value)) for name, value in held_out.items()]
    rows.append(Figure("best", f"at step {view.best.step:,}" if view.best else "not evaluated yet", "muted"))
    return tuple(rows)


def classes(view: RunView, most: int | None = None) -> tuple[Figure, ...]:
    """IoU and Dice of every class, as a table with bars. `most`: at most so many rows, then the worst classes and how
    many are left out."""
    found = view.evaluated.per_class if view.evaluated else {}
    shown = list(found.items())
    if most is not None and len(shown) > most:
        shown = worst(found, most - 1)
    rows = [
        Figure(
            shortened(name),
            f"IoU {share(values.get('iou'))}  Dice {share(values.get('dice'))}",
            bar=_bar(values.get("iou")),
        )
        for name, values in shown
    ]
    if len(shown) < len(found):
        rows.append(Figure("...", f"{len(found) - len(shown)} more, see Pictures", "muted"))
    return tuple(rows)


def shortened(name: str) -> str:
    """A name on one line that leaves room beside it."""
    text = one_line(name)
    return text if cell_len(text) <= _LONGEST_NAME else f"{set_cell_size(text, _LONGEST_NAME - 1)}…"


def ranks(view: RunView) -> tuple[Figure, ...]:
    """Effective rank of every encoder stage, where it was measured."""
    found = view.evaluated.effective_rank if view.evaluated else []
    if not found:
        return ()
    return (Figure("rank", ", ".join(f"{value:.1f}" for value in found) + " by stage"),)


def memory(view: RunView) -> tuple[Figure, ...]:
    """Memory of the card, or of the process on a CPU: this run's now and at most, others', total."""
    step, system = view.latest, view.system
    peak = step.memory_peak_gib if step else math.nan
    if system is not None and math.isfinite(system.gpu_memory_total):
        total, others = system.gpu_memory_total, system.gpu_memory_others
        own = max(0.0, system.gpu_memory_used - _or_zero(others))
        bar = Bar(own / total, _or_zero(others) / total, peak / total if math.isfinite(peak) else None)
        return (
            Figure("VRAM", f"{system.gpu_memory_used:.1f} of {gib(total)}", "strong", bar),
            Figure("", f"this run {own:.1f}{peak_text(peak)}, others {gib(others)}"),
        )
    whose = "process" if view.on_cpu else "this run"
    if step is None:
        return (Figure(whose, NOT_AVAILABLE, "muted"),)
    return (Figure(whose, f"{gib(step.memory_gib)}{peak_text(peak)}"),)


def machine(view: RunView) -> tuple[Figure, ...]:
    """The card in few lines, or why there is nothing to show; the machine itself where training runs on its CPU."""
    system = view.system
    if system is None:
        return (*memory(view), Figure("card", f"{NOT_AVAILABLE}: no sample of the machine yet", "muted"))
    if not system.gpu or system.gpu_missing:
        why = "none in use, see System" if view.on_cpu else system.gpu_missing or "no card"
        return (*memory(view), *host(view)[:2], Figure("card", why, "muted"))
    heat = f"{system.temperature:.0f} °C" if math.isfinite(system.temperature) else NOT_AVAILABLE
    return (
        *memory(view),
        Figure("busy", share(system.gpu_utilisation), bar=_bar(system.gpu_utilisation)),
        Figure("power", f"{of(system.power, system.power_limit, 'W')}   {heat}"),
        Figure("clock", of(system.sm_clock, system.sm_clock_max, "MHz")),
    )


def card(view: RunView) -> tuple[Figure, ...]:
    """Utilisation, power, temperature and clocks of the card, or why there is nothing to show."""
    system = view.system
    if system is None:
        return (Figure("card", f"{NOT_AVAILABLE}: no sample of the machine yet", "muted"),)
    if not system.gpu or system.gpu_missing:
        return (Figure("card", system.gpu_missing or "no card: training runs on the CPU", "muted"),)
    clocks = of(system.sm_clock, system.sm_clock_max, "MHz")
    memory_clock = f", memory {system.memory_clock:.0f} MHz" if math.isfinite(system.memory_clock) else ""
    throttled = Figure("held back", ", ".join(system.throttled), "warn") if system.throttled else None
    return (
        Figure("card", system.gpu),
        Figure("busy", share(system.gpu_utilisation), bar=_bar(system.gpu_utilisation)),
        Figure("power", of(system.power, system.power_limit, "W"), bar=_bar(system.power / system.power_limit)),
        Figure("heat", f"{system.temperature:.0f} °C" if math.isfinite(system.temperature) else NOT_AVAILABLE),
        Figure("clock", clocks + memory_clock),
        *((throttled,) if throttled else ()),
    )


def host(view: RunView) -> tuple[Figure, ...]:
    """CPU and memory of the machine."""
    system = view.system
    if system is None:
        return (Figure("machine", f"{NOT_AVAILABLE}: no sample yet", "muted"),)
    used = _bar(system.host_memory_used / system.host_memory_total)
    return (
        Figure("CPU", share(system.cpu), bar=_bar(system.cpu)),
        Figure("memory", of(system.host_memory_used, system.host_memory_total, "GiB", 1), bar=used),
        Figure("trainer", gib(system.process_memory)),
    )


def about(view: RunView) -> tuple[Figure, ...]:
    """What runs, and where."""
    started = view.started
    if started is None:
        return (Figure("run", view.root.name),)
    kernels = sorted(set(started.backends.values()))
    return (
        Figure("task", started.task),
        Figure("model", f"{started.parameters / 1e6:.1f} M parameters, {started.precision}"),
        Figure("batch", f"{started.batch_size} images" + (f" of {view.config.image_size} px" if view.config else "")),
        Figure("device", started.device),
        Figure("kernels", ", ".join(kernels) or NOT_AVAILABLE),
    )


def seconds(value: float) -> str:
    """A step's time: 350 ms, 1.25 s."""
    if not math.isfinite(value):
        return NOT_AVAILABLE
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def gib(value: float) -> str:
    """Memory in GiB with one digit after the point."""
    return f"{value:.1f} GiB" if math.isfinite(value) else NOT_AVAILABLE


def peak_text(value: float) -> str:
    """The most memory so far, as an addition."""
    return f", at most {value:.1f}" if math.isfinite(value) else ""


def share(value: float | None) -> str:
    """A share of 1 in percent."""
    return f"{value:.0%}" if value is not None and math.isfinite(value) else NOT_AVAILABLE


def of(value: float, total: float, unit: str, digits: int = 0) -> str:
    """A value and its limit."""
    if not math.isfinite(value):
        return NOT_AVAILABLE
    limit = f" of {total:.{digits}f}" if math.isfinite(total) else ""
    return f"{value:.{digits}f}{limit} {unit}"


def _bar(value: float | None) -> Bar | None:
    return Bar(min(max(value, 0.0), 1.0)) if value is not None and math.isfinite(value) else None


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0
