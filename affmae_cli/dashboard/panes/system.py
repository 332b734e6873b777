"""System: every GPU, the CPU, memory, disk and wait for data, with their history."""

from __future__ import annotations

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Grid, Horizontal

from affmae_cli.dashboard.chart import Chart
from affmae_cli.dashboard.charts import machine_charts
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
        yield Grid(id="system-grid")

    def focus_first(self) -> None:
        """The first chart."""
        charts = self.query(Chart)
        (charts.first() if charts else self).focus()

    def take(self, model: RunModel) -> None:
        """Draw figures and charts; a chart that has no values is left out."""
        super().take(model)
        machine, run = self.query_one("#system-machine", Panel), self.query_one("#system-run", Panel)
        machine.update(Text("\n").join(_machine(model, machine)))
        run.update(Text("\n").join([*training_lines(model, run), *verdict_lines(model, run)]))
        specs = {spec.key: spec for spec in machine_charts(model)}
        grid = self.query_one("#system-grid", Grid)
        present = [chart.spec.key for chart in grid.query(Chart)]
        if present != list(specs):
            grid.remove_children()
            minutes = {key: "step" if key == "data_wait" else "minute" for key in specs}
            grid.mount_all(Chart(spec, x_name=minutes[key]) for key, spec in specs.items())
            self.call_after_refresh(self._draw)
        width = self.size.width
        grid.styles.grid_size_columns = max(1, min(len(specs), 1 if width < 100 else 2 if width < 160 else 3))
        self._draw()

    def _draw(self) -> None:
        if self.model is not None:
            for chart in self.query(Chart):
                chart.take(self.model)


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
    lines += machine_lines(model, panel)
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
