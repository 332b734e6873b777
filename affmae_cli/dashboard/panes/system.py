"""System: every GPU, the CPU, memory, disk and wait for data, with their history."""

from __future__ import annotations

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Horizontal

from affmae_cli.dashboard.charts import machine_charts
from affmae_cli.dashboard.panes.chart_grid import ChartGrid
from affmae_cli.dashboard.panes.overview import machine_lines, training_lines, verdict_lines
from affmae_cli.dashboard.panes.pane import Pane, Panel, figure
from affmae_cli.dashboard.run_model import RunModel
from affmae_cli.dashboard.text import gib, of, one_line, share


class SystemPane(Pane):
    """Figures above, charts over minutes below."""

    def compose(self) -> ComposeResult:
        """What runs where; now; charts."""
        with Horizontal(id="system-figures"):
            yield Panel("machine", id="system-machine")
            yield Panel("this run", id="system-run")
        yield ChartGrid()

    def focus_first(self) -> None:
        if not self.query_one(ChartGrid).focus_first():
            self.focus()

    def take(self, model: RunModel) -> None:
        """Draw figures and charts; a chart that has no values is left out."""
        super().take(model)
        machine, run = self.query_one("#system-machine", Panel), self.query_one("#system-run", Panel)
        machine.put(Text("\n").join(_machine(model, machine)))
        lines = training_lines(model, run, run.size.width)
        run.put(Text("\n").join([*lines, *verdict_lines(model, run)]))
        self.query_one(ChartGrid).take(model, machine_charts(model))


def _machine(model: RunModel, panel: Panel) -> list[Text]:
    system, width, started = model.system, panel.size.width, model.started
    lines = []
    if started is not None:
        lines.append(figure("device", started.device, width))
        kernels = ", ".join(sorted(set(started.backends.values())))
        lines.append(figure("kernels", kernels, width))
    if system is None:
        return [*lines, Text("no sample of the machine yet", "dim")]
    if system.gpu:
        lines.append(figure("GPU", system.gpu, width))
    elif system.gpu_missing:
        lines.append(figure("GPU", f"none: {one_line(system.gpu_missing)}", width))
    lines += machine_lines(model, panel, width)
    if system.gpu:
        clocks = of(system.sm_clock, system.sm_clock_max, "MHz")
        lines.append(figure("GPU clock", clocks, width))
    if system.throttled:
        lines.append(figure("throttled", ", ".join(system.throttled), width, style="bold"))
    if not model.on_cpu:
        lines.append(figure("CPU load", share(system.cpu), width))
    lines.append(figure("memory", of(system.host_memory_used, system.host_memory_total, "GiB", 1), width))
    lines.append(figure("trainer", gib(system.process_memory), width))
    return lines
