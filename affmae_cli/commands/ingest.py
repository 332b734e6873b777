"""`affmae ingest`: images and stacks, wherever they are, into one dataset store.

The result (a table, or JSON) goes to stdout, progress to stderr. Files that were refused are listed with their reason
and do not fail the command unless nothing at all could be taken.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from affmae_cli import output
from affmae_cli.options import AxesOption, ChannelOption, JsonOption, QuietOption, TrustSizesOption
from affmae_cli.pixel_size import PixelSizeOption, VoxelSize, parse_pixel_size

if TYPE_CHECKING:
    from affmae_engine.data.ingest import IngestProgress, IngestReport
    from affmae_engine.data.store_layout import StoredImage

_SECONDS_BETWEEN_LINES = 10.0
_MOST_ROWS = 40
_MOST_SKIPPED = 50
_SMALLEST_SERIES = 4


def ingest(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="Files, folders, patterns and URLs, mixed as you like.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="PATH", help="The dataset to make or add to.")] = Path(
        "data/em.zarr"
    ),
    pixel_size: PixelSizeOption = None,
    channel: ChannelOption = None,
    axes: AxesOption = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Threads; by default up to 8, one per core.")
    ] = None,
    trust_sizes: TrustSizesOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Collect images and stacks in one dataset, with statistics and a contact sheet.

    A second run adds only what is new; an interrupted one is continued by the same command.
    """
    from affmae_engine.data import ingest as engine
    from affmae_engine.errors import InputError, Interrupted
    from affmae_engine.runtime.signals import StopRequest

    pixel_nm = parse_pixel_size(pixel_size)
    stop = StopRequest()
    with stop.installed(), _progress(quiet) as on_progress:
        report = engine.ingest(
            list(sources),
            out,
            pixel_nm=pixel_nm,
            channel=channel,
            workers=workers,
            on_progress=on_progress,
            should_stop=lambda: stop.requested,
        )
    if json:
        output.print_json(_as_json(report))
    else:
        _show(report)
    if report.interrupted:
        raise Interrupted(
            f"{_count(report.images, 'image')} {'is' if report.images == 1 else 'are'} complete in {out}",
            "run the same command again to continue",
            signal_number=stop.signal_number or 2,
        )
    if not report.taken and not report.present:
        refused = len(report.skipped)
        raise InputError(
            f"nothing could be taken: {'the only file was' if refused == 1 else f'all {refused} files were'} refused",
            "the reasons are listed above",
        )


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[IngestProgress], None] | None]:
    """What shows the progress: a bar with the time left on a terminal, otherwise a line now and then."""
    if quiet:
        yield None
        return
    if not output.console().is_terminal:
        yield _Lines()
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f}%"),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[current]}", markup=False),
    )
    with Progress(*columns, console=output.console(), transient=True) as bar:
        task = bar.add_task("scanning", total=None, current="")

        def update(progress: IngestProgress) -> None:
            current = output.printable(progress.current)
            shown = current if len(current) <= 32 else f"{current[:14]}..{current[-16:]}"
            if progress.stage == "scan":
                bar.update(task, description=f"scanning {progress.done}/{progress.total}", current=shown)
                return
            text = f"image {min(progress.images_done + 1, progress.images_total)}/{progress.images_total}"
            bar.update(task, description=text, completed=progress.done, total=progress.total, current=shown)

        yield update


class _Lines:
    """Progress as plain lines, the first after some seconds."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()

    def __call__(self, progress: IngestProgress) -> None:
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        if progress.stage == "scan":
            output.say(f"scanned {progress.done} of {progress.total} files")
            return
        share = progress.done / max(1, progress.total)
        left = (now - self._started) * (1 - share) / share if share else None
        rate = progress.done / 2**20 / (now - self._started)
        text = f"{share:.0%}, image {progress.images_done + 1} of {progress.images_total}, {rate:.0f} MiB/s"
        output.say(text + (f", about {_duration(left)} left" if left is not None else ""))


def _show(report: IngestReport) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = _rows(report.taken)
    if rows:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("name", overflow="fold", min_width=14)
        for title in ("z × y × x", "type", "nm/px z, y, x", "mean ± std", "notes"):
            table.add_column(title, no_wrap=True)
        # The same few notes come up again and again: they are numbered and explained once below the table.
        numbers: dict[str, int] = {}
        for *cells, notes in rows[:_MOST_ROWS]:
            marks = " ".join(str(numbers.setdefault(note, len(numbers) + 1)) for note in notes)
            table.add_row(*map(Text, [*cells, marks]))
        output.show(table)
        for note, number in numbers.items():
            output.show(output.printable(f"{number:>3}  {note}"))
        if len(rows) > _MOST_ROWS:
            output.show(f"\n{len(rows) - _MOST_ROWS} rows more are in {report.store}/affmae/manifest.json")
        output.show("")
    if report.skipped:
        output.show(f"skipped {len(report.skipped)}:")
        for entry in report.skipped[:_MOST_SKIPPED]:
            output.show(output.printable(f"  {entry.reason}"))
        if len(report.skipped) > _MOST_SKIPPED:
            output.show(f"  ... and {len(report.skipped) - _MOST_SKIPPED} more, all in the manifest")
        output.show("")
    _show_totals(report)


def _show_totals(report: IngestReport) -> None:
    blank = sum(image.statistics.blank for image in report.taken)
    parts = [f"{_count(len(report.taken), 'image')} taken"]
    parts += [f"{len(report.present)} there already"] if report.present else []
    parts += [f"pixel size of {report.corrected} corrected"] if report.corrected else []
    parts += [f"{len(report.skipped)} skipped"] if report.skipped else []
    parts += [f"{blank} blank"] if blank else []
    output.show(f"{', '.join(parts)}; {_duration(report.seconds)}")
    if report.statistics is None:
        return
    total = report.statistics
    output.show(
        f"dataset   {report.store} ({_count(report.images, 'image')}, mean {total.mean:.4g}, std {total.std:.4g})"
    )
    output.show(f"overview  {report.overview}")


def _rows(images: Sequence[StoredImage]) -> list[tuple[Any, ...]]:
    """One row per image, the notes last; images of a numbered series that agree in everything else share a row."""
    from affmae_engine.data.readers.files import natural_key
    from affmae_engine.data.statistics import pool

    groups: dict[Any, list[StoredImage]] = {}
    for image in sorted(images, key=lambda image: natural_key(image.name)):
        key = (image.series_group, image.shape_ZYX, image.dtype.name, image.pixel_nm, image.notes)
        groups.setdefault(key, []).append(image)
    rows: list[tuple[Any, ...]] = []
    for group in groups.values():
        parts = [group] if len(group) >= _SMALLEST_SERIES else [[image] for image in group]
        for part in parts:
            first = part[0]
            statistics = pool([image.statistics for image in part])
            name = first.name if len(part) == 1 else f"{first.name} .. {part[-1].name} ({len(part)})"
            shape = "×".join(map(str, first.shape_ZYX))
            values = f"{_number(statistics.mean)} ± {_number(statistics.std)}"
            rows.append((name, shape, first.dtype.name, _nm(first.pixel_nm), values, first.notes))
    return rows


def _nm(pixel_nm: VoxelSize) -> str:
    if all(size is None for size in pixel_nm):
        return "unknown"
    return ", ".join("?" if size is None else _number(size) for size in pixel_nm)


def _as_json(report: IngestReport) -> dict[str, Any]:
    return {
        "store": report.store,
        "overview": report.overview,
        "images": report.images,
        "interrupted": report.interrupted,
        "seconds": round(report.seconds, 3),
        "statistics": report.statistics.to_dict() if report.statistics else None,
        "taken": [image.to_dict() for image in report.taken],
        "present": [vars(entry) for entry in report.present],
        "skipped": [vars(entry) for entry in report.skipped],
    }


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 or abs(value) >= 1e6 else f"{value:.0f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
