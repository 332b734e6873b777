"""`bench speed`: AFFMAE against ViT-MAE, case by case, in pieces if need be.

Each case runs in a fresh process. Its measurement is kept in the output folder as `cases/NAME.json`, so that the same
command continues where it stopped. The two families of a row follow each other: a partial report has whole rows.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from affmae_engine import atomic
from affmae_engine.bench.child import Children
from affmae_engine.bench.networks import Family, Measurement, Protocol, SpeedCase, SpeedTask
from affmae_engine.bench.report import TITLES, Figure, Table, figure, spread
from affmae_engine.runtime.device import DeviceChoice

TIMEOUT_S = 900.0
MEMORY_TOLERANCE = 0.01
"""Relative change of memory that counts when results are compared."""
PAPER_BATCH = 4
"""Batch of the published benchmark."""
FINETUNE_BATCH = 8
"""Batch of the finetuning presets."""
_PIXELS = {"base": 32 * 512**2, "small": 64 * 512**2, "tiny": 64 * 512**2}
"""Pixels of a batch at up to 512 px; above, `_LARGE_PIXELS` for every size."""
_LARGE_PIXELS = 32 * 512**2
_GIB_PER_IMAGE = {"base": 0.8, "small": 0.4, "tiny": 0.1}
"""Memory of ViT-MAE, the larger of the two, pretraining at 512 px, measured on an H200."""
_TASK_MEMORY = {"pretrain": 1.0, "finetune": 1.8, "predict": 0.5}
_LEAST_GIB, _USABLE = 2.0, 0.85


@dataclass(frozen=True)
class SpeedPlan:
    """What is measured, and how. cold: every case begins with empty compiler caches."""

    cases: tuple[SpeedCase, ...]
    choice: DeviceChoice
    profile: bool = False
    data: Path | None = None
    cold: bool = False

    def request(self, case: SpeedCase) -> dict[str, Any]:
        """What the child process is given (`networks.measure_case`)."""
        return {
            "case": asdict(case),
            "device": self.choice.device.type,
            "precision": self.choice.precision,
            "profile": self.profile,
            "data": None if self.data is None else str(self.data.absolute()),
        }


def cases_of(
    tasks: Sequence[SpeedTask],
    sizes: Sequence[str],
    resolutions: Sequence[int],
    families: Sequence[Family],
    protocols: Sequence[Protocol],
    *,
    batch: int | None,
    memory_gib: float,
) -> tuple[SpeedCase, ...]:
    """All combinations, the families of one row next to each other.

    Args:
        batch: images; None: by task, size and resolution, fewer where ViT-MAE would not fit.
        memory_gib: of the GPU.
    """
    return tuple(
        SpeedCase(task, family, size, edge, batch or default_batch(task, size, edge, protocol, memory_gib), protocol)
        for protocol in protocols
        for task in tasks
        for edge in resolutions
        for size in sizes
        for family in families
    )


def default_batch(task: SpeedTask, size: str, resolution: int, protocol: Protocol, memory_gib: float) -> int:
    """Images per batch, a power of two that both families can hold."""
    if protocol == "paper":
        return PAPER_BATCH
    pixels = _PIXELS[size] if resolution <= 512 else _LARGE_PIXELS
    wanted = FINETUNE_BATCH if task == "finetune" else max(1, pixels // resolution**2)
    per_image = _GIB_PER_IMAGE[size] * _TASK_MEMORY[task] * (resolution / 512) ** 2
    fitting = int(max(1.0, (_USABLE * memory_gib - _LEAST_GIB) / per_image))
    return 1 << (min(wanted, fitting).bit_length() - 1)


@dataclass
class SpeedRun:
    """A comparison in a folder.

    Args:
        plan: what to measure.
        about: `report.circumstances`; finished cases are taken over only from equal device, versions and commit.
        folder: where finished cases are kept; None: nowhere.
    """

    plan: SpeedPlan
    about: Mapping[str, Any]
    folder: Path | None = None
    results: dict[SpeedCase, Measurement] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.results = {case: self._kept(case) or Measurement() for case in self.plan.cases}

    @property
    def waiting(self) -> list[SpeedCase]:
        """Cases without a measurement."""
        return [case for case, found in self.results.items() if found.status == "waiting"]

    def run(
        self,
        children: Children,
        *,
        limit_s: float | None = None,
        begin: Callable[[SpeedCase], None] = lambda case: None,
    ) -> Iterator[SpeedCase]:
        """Measure what is waiting; yields each case when its result is there.

        Args:
            children: starts the processes.
            limit_s: start no case after this many seconds.
            begin: called with each case before it starts.
        """
        began = time.monotonic()
        for case in self.waiting:
            if limit_s is not None and time.monotonic() - began >= limit_s:
                return
            begin(case)
            self.results[case] = self._measured(case, children)
            self._keep(case)
            yield case

    def _measured(self, case: SpeedCase, children: Children) -> Measurement:
        with tempfile.TemporaryDirectory() as empty:
            caches = {"TRITON_CACHE_DIR": f"{empty}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{empty}/inductor"}
            messages = children.run(
                "affmae_engine.bench.networks:measure_case",
                [self.plan.request(case)],
                environment=caches if self.plan.cold else None,
            )
            for message in messages:
                if message["event"] == "ended":
                    return Measurement(**message["result"])
                if message["event"] == "failed":
                    return Measurement("timed out" if message["timed_out"] else "failed", message["reason"])
        return Measurement()

    def _identity(self, case: SpeedCase) -> dict[str, Any]:
        about = {name: self.about[name] for name in ("device", "versions", "git")}
        values = {"about": about, "request": self.plan.request(case), "cold": self.plan.cold}
        found: dict[str, Any] = json.loads(json.dumps(values))
        return found

    def _file(self, case: SpeedCase) -> Path | None:
        return None if self.folder is None else self.folder / "cases" / f"{case.name}.json"

    def _kept(self, case: SpeedCase) -> Measurement | None:
        """An earlier result of the same case. What failed is tried again."""
        file = self._file(case)
        try:
            value = json.loads(file.read_text("utf-8")) if file is not None else None
            if value is None or value["identity"] != self._identity(case):
                return None
            found = Measurement(**value["measurement"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if found.status in ("ok", "out of memory") else None

    def _keep(self, case: SpeedCase) -> None:
        file = self._file(case)
        if file is not None:
            atomic.ensure_folder(file.parent)
            atomic.commit_json(file, {"identity": self._identity(case), "measurement": asdict(self.results[case])})


def records_of(results: Mapping[SpeedCase, Measurement]) -> list[dict[str, Any]]:
    """One record per case for results.json."""
    return [{"case": asdict(case), **asdict(found)} for case, found in results.items()]


def ratios_of(results: Mapping[SpeedCase, Measurement]) -> list[dict[str, Any]]:
    """AFFMAE against ViT-MAE, one record per row in which both were measured.

    `speed` is ViT-MAE's time by AFFMAE's, with `speed_low` and `speed_high` by the rounds; `memory` is AFFMAE's peak by
    ViT-MAE's.
    """
    found = []
    for case, ours in results.items():
        theirs = _other(case, results)
        if case.family != "affmae" or theirs is None or ours.ms is None or theirs.ms is None:
            continue
        record = {
            "task": case.task,
            "size": case.size,
            "resolution": case.resolution,
            "batch": case.batch,
            "protocol": case.protocol,
            "speed": theirs.ms / ours.ms,
            "speed_low": theirs.low_ms / ours.high_ms if theirs.low_ms and ours.high_ms else None,
            "speed_high": theirs.high_ms / ours.low_ms if theirs.high_ms and ours.low_ms else None,
            "memory": ours.allocated_gib / theirs.allocated_gib
            if ours.allocated_gib and theirs.allocated_gib
            else None,
        }
        found.append(record)
    return found


def figures_of(results: Mapping[SpeedCase, Measurement]) -> list[Figure]:
    """What `--compare` compares: step time and peak memory."""
    found = []
    for case, measured in results.items():
        if measured.ms is not None:
            found.append(Figure(case.name, "step", "ms", measured.ms, measured.low_ms, measured.high_ms))
        if measured.allocated_gib is not None:
            gib, margin = measured.allocated_gib, MEMORY_TOLERANCE / 2
            found.append(Figure(case.name, "peak memory", "GiB", gib, gib * (1 - margin), gib * (1 + margin)))
    return found


def tables_of(results: Mapping[SpeedCase, Measurement]) -> list[Table]:
    """The comparison, the cases, loading where it was measured, and the top kernels where they were asked for."""
    tables = [_ratio_table(results), _case_table(results), _loading_table(results), _end_to_end_table(results)]
    for case, measured in results.items():
        rows = [(name, figure(ms), figure(launches)) for name, ms, launches in measured.kernels]
        tables.append(Table(f"Top kernels: {case.name}", ("kernel", "ms per step", "launches"), rows))
    return tables


def _ratio_table(results: Mapping[SpeedCase, Measurement]) -> Table:
    rows = []
    for ratio in ratios_of(results):
        row = tuple(ratio[name] for name in ("task", "size", "resolution", "batch", "protocol"))
        ours, theirs = (
            next(found for case, found in results.items() if case.row == row and case.family == family)
            for family in TITLES
        )
        rows.append(
            (
                *_row(row),
                figure(ours.ms),
                figure(theirs.ms),
                f"{figure(ratio['speed'])}x",
                spread(ratio["speed_low"], ratio["speed_high"]),
                figure(ratio["memory"]),
            )
        )
    columns = (*_ROW, "AFFMAE ms", "ViT-MAE ms", "times as fast", "over rounds", "memory ratio")
    return Table("AFFMAE against ViT-MAE", columns, rows)


def _case_table(results: Mapping[SpeedCase, Measurement]) -> Table:
    rows = []
    for case, found in results.items():
        gpu = found.gpu
        rows.append(
            (
                *_row(case.row),
                TITLES[case.family],
                figure(found.ms) if found.status == "ok" else found.status,
                spread(found.low_ms, found.high_ms),
                figure(found.images_per_s),
                figure(found.allocated_gib),
                figure(found.reserved_gib),
                figure(found.first_step_s),
                found.caches,
                f"{found.parameters / 1e6:.1f} M" if found.parameters else "",
                f"{gpu['sm_clock']:.0f}" if "sm_clock" in gpu else "",
                ", ".join(gpu.get("throttled", ())),
                found.how,
                found.note,
            )
        )
    figures = ("ms", "rounds", "images/s", "peak GiB", "held GiB", "first step s", "caches", "parameters")
    return Table("Cases", (*_ROW, "network", *figures, "clock MHz", "throttled by", "runs as", "note"), rows)


def _loading_table(results: Mapping[SpeedCase, Measurement]) -> Table:
    rows = [
        (
            *_row(case.row),
            TITLES[case.family],
            figure(found.images_per_s),
            figure(found.data_images_per_s),
            _share(found.data_wait),
            figure(found.clahe_images_per_s),
            _share(found.clahe_wait),
        )
        for case, found in results.items()
        if found.data_images_per_s is not None
    ]
    columns = (*_ROW, "network", "images/s", "with loading", "waiting", "and with CLAHE", "waiting for both")
    return Table("With data loading", columns, rows)


def _end_to_end_table(results: Mapping[SpeedCase, Measurement]) -> Table:
    """The whole of `affmae predict` beside its network."""
    rows = [
        (*_row(case.row), TITLES[case.family], output, figure(found.images_per_s), figure(rate), _share(share))
        for case, found in results.items()
        for output, rate in found.end_to_end.items()
        for share in (rate / found.images_per_s if found.images_per_s else None,)
    ]
    columns = (*_ROW, "network", "output", "tiles/s of the network", "tiles/s end to end", "share")
    return Table("Prediction, end to end", columns, rows)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


_ROW = ("task", "size", "px", "batch", "protocol")


def _row(row: tuple[Any, ...]) -> tuple[str, ...]:
    """Cells of `SpeedCase.row`; the usual protocol is not named."""
    *cells, protocol = row
    return (*map(str, cells), "" if protocol == "trainer" else protocol)


def _other(case: SpeedCase, results: Mapping[SpeedCase, Measurement]) -> Measurement | None:
    """What was found for the other family in the same row."""
    return next((found for c, found in results.items() if c.row == case.row and c.family != case.family), None)
