"""Runs: all runs of the folder in a table; marked ones are compared in one chart, two of them setting by setting."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rich.cells import cell_len
from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.coordinate import Coordinate
from textual.message import Message
from textual.reactive import reactive
from textual.widgets import DataTable, Input
from textual.worker import get_current_worker

from affmae_cli.dashboard.chart import Chart
from affmae_cli.dashboard.charts import ChartSpec, main_chart
from affmae_cli.dashboard.colors import curve_color
from affmae_cli.dashboard.panes.metrics import FilterInput
from affmae_cli.dashboard.panes.pane import Pane, Panel
from affmae_cli.dashboard.plot import Curve, curve_of
from affmae_cli.dashboard.run_model import RunModel
from affmae_cli.dashboard.runs import COLUMNS, NEWEST_FIRST, RunsFolder, config_difference, ordered
from affmae_cli.dashboard.text import cut, one_line
from affmae_cli.dashboard.verdicts import headline

SECONDS_BETWEEN_LOOKS = 1.0
COMPARISONS = (
    ("held-out loss", "held_out", "loss"),
    ("mean IoU", "held_out", "iou"),
    ("explained share of what is hidden", "held_out", "explained"),
    ("training loss", "steps", "losses.loss"),
    ("learning rate", "steps", "lr"),
    ("images per second", "steps", "images_per_s"),
)
"""Curves in which runs are compared: title, columns, column. Losses and IoU are never in one chart."""
_GAP = 2
_X = "step of the runs"  # zoomed by themselves, since runs differ in length


class RunsPane(Pane):
    """order: the column that sorts. marked: runs that are compared. pinned: runs that stay on top. shown: which of
    `COMPARISONS`; None picks the one of the first run's task. looked: whether the folder, and the run under the cursor,
    was read."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "Open", tooltip="Show this run in all tabs"),
        Binding("space", "mark", "Compare", tooltip="Mark the run for comparison"),
        Binding("o", "order", "Sort", tooltip="Sort by the next column"),
        Binding("O", "reverse", "Reverse", show=False, key_display="O"),
        Binding("slash", "filter", "Filter", key_display="/"),
        Binding("f", "pin", "Pin", tooltip="Keep the run on top"),
        Binding("n", "curve", "Curve", tooltip="Compare the next curve"),
    ]
    order: reactive[int] = reactive(NEWEST_FIRST, init=False)
    reverse: reactive[bool] = reactive(False, init=False)
    marked: reactive[tuple[Path, ...]] = reactive((), init=False)
    pinned: reactive[tuple[Path, ...]] = reactive((), init=False)
    shown: reactive[int | None] = reactive(None, init=False)

    @dataclass
    class Chosen(Message):
        """A run is to be shown in all tabs."""

        root: Path

    @dataclass
    class Listed(Message):
        """The folder was looked at. read: marked runs, and the one under the cursor, with their curves."""

        runs: list[RunModel]
        read: dict[Path, RunModel]
        problem: str = ""

        def can_replace(self, message: Message) -> bool:
            """Each holds everything."""
            return isinstance(message, RunsPane.Listed)

    def __init__(self, **kwargs: str) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.runs: list[RunModel] = []
        self._read: dict[Path, RunModel] = {}
        self._listed: list[Path] = []
        self._under: Path | None = None
        self._problem = ""
        self.looked = False
        self._drawn: object = None
        self._wake = threading.Event()

    def compose(self) -> ComposeResult:
        yield FilterInput("runs (name, task, state, preset)", id="runs-filter")
        yield DataTable(id="runs-table", cursor_type="row", cell_padding=_GAP // 2, classes="panel")
        with Horizontal(id="runs-bottom"):
            yield Chart(ChartSpec("compared", "", lambda _: [], x_name=_X))
            with VerticalScroll(id="runs-side", can_focus=False):
                yield Panel("this run", id="runs-about")

    def focus_first(self) -> None:
        self.query_one(DataTable).focus()

    def take(self, model: RunModel) -> None:
        super().take(model)
        self._draw()

    @work(thread=True, exclusive=True, group="runs", exit_on_error=False)
    def follow(self, folder: Path) -> None:
        """Look at the folder again and again, until the worker is cancelled."""
        worker, found, read = get_current_worker(), RunsFolder(folder), dict[Path, RunModel]()
        runs: list[RunModel] = []
        while not worker.is_cancelled:
            problem, behind, wanted = "", False, dict.fromkeys((*self.marked, *filter(None, [self._under])))
            try:
                runs = found.runs()
                for root in wanted:
                    model = read.setdefault(root, RunModel(root))
                    model.poll()
                    behind |= model.opening
            except Exception as error:  # whatever a run holds must not end the view of the others
                problem = f"cannot read the runs: {type(error).__name__}: {error}"
            self.post_message(self.Listed(runs, {root: read[root] for root in wanted if root in read}, problem))
            self._wake.wait(0.05 if behind else SECONDS_BETWEEN_LOOKS)
            self._wake.clear()

    def leave(self) -> None:
        """Stop looking."""
        self.workers.cancel_group(self, "runs")
        self._wake.set()

    def on_runs_pane_listed(self, message: Listed) -> None:
        message.stop()
        self.runs, self._read, self._problem = message.runs, message.read, message.problem
        self._draw()
        self.looked = self._under is None or self._under in self._read

    def _draw(self) -> None:
        self._draw_table()
        self._draw_chart()
        self._draw_about()

    def watch_order(self) -> None:
        self._draw()
        self._wake.set()

    watch_reverse = watch_marked = watch_pinned = watch_shown = watch_order

    @on(Input.Changed, "#runs-filter")
    def _filtered(self) -> None:
        self._draw()

    @on(Input.Submitted, "#runs-filter")
    def _filter_done(self) -> None:
        self.focus_first()

    @on(DataTable.RowHighlighted)
    def _moved(self) -> None:
        under = self._under_cursor()
        if under != self._under:
            self._under = under
            self._wake.set()

    @on(DataTable.HeaderSelected)
    def _order_by(self, event: DataTable.HeaderSelected) -> None:
        title = event.column_key.value
        at = next((i for i, column in enumerate(COLUMNS) if column.title == title), None)
        if at is not None:
            self.order, self.reverse = at, self.order == at and not self.reverse

    @on(DataTable.RowSelected)
    def action_open(self) -> None:
        root = self._under_cursor()
        if root is not None:
            self.post_message(self.Chosen(root))

    def action_mark(self) -> None:
        root = self._under_cursor()
        if root is not None:
            self.marked = tuple(r for r in self.marked if r != root) if root in self.marked else (*self.marked, root)

    def action_pin(self) -> None:
        root = self._under_cursor()
        if root is not None:
            self.pinned = tuple(r for r in self.pinned if r != root) if root in self.pinned else (*self.pinned, root)

    def action_order(self) -> None:
        self.order, self.reverse = (self.order + 1) % len(COLUMNS), False

    def action_reverse(self) -> None:
        self.reverse = not self.reverse

    def action_filter(self) -> None:
        self.query_one(FilterInput).open()

    def action_curve(self) -> None:
        self.shown = (self._comparison() + 1) % len(COMPARISONS)

    def _under_cursor(self) -> Path | None:
        at = self.query_one(DataTable).cursor_row
        return self._listed[at] if 0 <= at < len(self._listed) else None

    @property
    def _compared(self) -> list[RunModel]:
        """The marked runs, or the one under the cursor."""
        wanted = self.marked or tuple(filter(None, [self._under]))
        return [self._read[root] for root in wanted if root in self._read]

    def _comparison(self) -> int:
        if self.shown is not None:
            return self.shown
        compared = self._compared
        return 1 if compared and compared[0].task == "finetune" else 0

    def _draw_table(self) -> None:
        table = self.query_one(DataTable)
        runs = ordered(
            self.runs, self.order, reverse=self.reverse, wanted=self.query_one(FilterInput).value, pinned=self.pinned
        )
        order = f"{COLUMNS[self.order].title}{', reversed' if self.reverse else ''}"
        table.border_title = (
            one_line(self._problem) or f"{len(runs)} of {len(self.runs)} runs, sorted by {order}; Enter opens one"
        )
        cells = [[one_line(column.text(model)) for column in COLUMNS] for model in runs]
        widths = [max(map(cell_len, (column.title, *texts))) for column, *texts in zip(COLUMNS, *cells, strict=True)]
        room = self.size.width - 3 - _GAP
        kept = set(range(len(COLUMNS)))
        for at in sorted(kept, key=lambda i: COLUMNS[i].importance):
            if sum(widths[i] + _GAP for i in kept) <= room:
                break
            if COLUMNS[at].importance < 7:
                kept.discard(at)
        over = sum(widths[i] + _GAP for i in kept) - room
        widths[1] = max(8, widths[1] - max(0, over))
        followed = self.model.root if self.model else None
        rows = [
            [self._mark(model.root), *(self._cell(row, i, widths[i], model.root == followed) for i in sorted(kept))]
            for model, row in zip(runs, cells, strict=True)
        ]
        if self._drawn == (rows, sorted(kept), [widths[i] for i in sorted(kept)]):
            return
        self._drawn = rows, sorted(kept), [widths[i] for i in sorted(kept)]
        under = self._under_cursor()
        self._listed = [model.root for model in runs]
        table.clear(columns=True)
        table.add_column("", width=2, key="mark")
        for i in sorted(kept):
            title = COLUMNS[i].title.rjust(widths[i]) if COLUMNS[i].right else COLUMNS[i].title
            table.add_column(Text(title), width=widths[i], key=COLUMNS[i].title)
        for row in rows:
            table.add_row(*row)
        if under in self._listed:
            table.cursor_coordinate = Coordinate(self._listed.index(under), 0)
        self._under = self._under_cursor()
        self._wake.set()

    def _mark(self, root: Path) -> Text:
        pin = "^" if root in self.pinned else " "
        if root not in self.marked:
            return Text(f" {pin}")
        return Text("■", self._color(root)).append(pin, "default")

    def _color(self, root: Path) -> str:
        wanted = self.marked or tuple(filter(None, [self._under]))
        return curve_color("", wanted.index(root)) if root in wanted else "default"

    def _cell(self, row: list[str], at: int, width: int, followed: bool) -> Text:
        text = cut(row[at], width)
        style = "bold" if followed and COLUMNS[at].title == "run" else ""
        return Text(text.rjust(width) if COLUMNS[at].right else text, style, no_wrap=True)

    def _draw_chart(self) -> None:
        chart, compared = self.query_one(Chart), self._compared
        title, columns, column = COMPARISONS[self._comparison()]
        curves: list[Curve] = []
        if len(compared) == 1 and self.shown is None:
            spec = main_chart(compared[0])
            title, curves = f"{one_line(compared[0].root.name)}: {spec.title}", list(spec.curves(compared[0]))
        else:
            for model in compared:
                name = one_line(model.root.name)
                curves.append(curve_of(getattr(model, columns), column, name, self._color(model.root)))
        empty = f"no {title} in {'these runs' if len(compared) > 1 else 'this run'}; n shows another curve"
        chart.spec = ChartSpec(
            "compared", title, lambda _: [], empty, may_log=True, may_smooth=columns == "steps", x_name=_X
        )
        chart.show(curves)

    def _draw_about(self) -> None:
        panel, compared = self.query_one("#runs-about", Panel), self._compared
        width = max(20, panel.size.width)
        if len(compared) == 2:
            first, second = compared
            rows = config_difference(first, second)
            panel.border_title = f"settings of {one_line(first.root.name)} and {one_line(second.root.name)}"
            value = max(6, (width - 26) // 2)
            lines = [
                f"{cut(one_line(n), 24):<24} {cut(one_line(a), value):<{value}} {cut(one_line(b), value)}"
                for n, a, b in rows
            ]
            panel.put(Text("\n".join(lines) or "the same settings"))
        elif compared:
            model = compared[-1]
            panel.border_title = one_line(model.root.name)
            status = one_line(model.status.text) + (f"\n{one_line(model.status.hint)}" if model.status.hint else "")
            hint = "\n\nspace marks runs to compare; two marked runs also show the settings in which they differ"
            panel.put(Text(f"{headline(model).text}\n\n{status}").append(hint, "dim"))
        else:
            panel.border_title = "this run"
            panel.put(Text("no run here yet" if not self.runs else "reading the run", "dim"))
