"""What a prediction would be: blocks, time and disk, before it is begun."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from affmae_engine import atomic
from affmae_engine.data.readers import Source
from affmae_engine.predict import outputs
from affmae_engine.predict.job import Job, PredictOptions
from affmae_engine.predict.outputs import Outputs
from affmae_engine.predict.predictor import Predictor
from affmae_engine.predict.work import Work


@dataclass(frozen=True)
class PlannedWork:
    """The work of one input. blocks, blocks_finished: that need the network. seconds: of the network alone for the
    tiles that are left, on one device like this one, at `tiles_per_s`, which was measured. disk_bytes: estimated."""

    source: Path
    labels: Path
    shape_ZYX: tuple[int, int, int]
    block_ZYX: tuple[int, int, int]
    blocks: int
    blocks_finished: int
    tile: int
    tiles: int
    batch: int
    tiles_per_s: float
    seconds: float
    disk_bytes: int
    free_bytes: int


def planned_work(source: Source, predictor: Predictor, targets: Outputs, options: PredictOptions) -> PlannedWork:
    """Look at an input and measure the network; nothing is written that stays.

    Raises:
        ConfigError, InputError, ResourceError: see `Job.start`.
    """
    if Work(targets.labels).read_plan() is not None:
        return _described(Job.start(source, predictor, targets, options), targets)
    with tempfile.TemporaryDirectory(prefix="affmae-plan-") as folder:
        aside = replace(targets, labels=Path(folder) / targets.labels.name)
        return _described(Job.start(source, predictor, aside, options), targets)


def _described(job: Job, targets: Outputs) -> PlannedWork:
    done = job.finished(job.numbers)
    tiles = sum(job.tiles_of(number) for number in job.numbers if number not in done)
    rate = job.network.tiles_per_second(job.batch, job.tile)
    z, y, x = (min(edge, n) for edge, n in zip(job.passes[0].grid.block, job.passes[0].grid.shape, strict=True))
    return PlannedWork(
        source=job.source.info.path,
        labels=targets.labels,
        shape_ZYX=job.source.info.shape_ZYX,
        block_ZYX=(z, y, x),
        blocks=len(job.numbers),
        blocks_finished=len(done),
        tile=job.tile,
        tiles=tiles,
        batch=job.batch,
        tiles_per_s=rate,
        seconds=tiles / rate,
        disk_bytes=outputs.needed_bytes(job),
        free_bytes=shutil.disk_usage(atomic.ensure_folder(targets.labels.parent)).free,
    )
