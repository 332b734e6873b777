"""A copy of a run's events for TensorBoard: the same scalars and pictures, in RUN/tensorboard.

metrics.jsonl stays the truth; this is for people who look from elsewhere. After a resume the steps that are done again
replace those from before (TensorBoard's purge step). The package is an optional extra.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from affmae_engine.errors import ConfigError
from affmae_engine.events import CheckpointSaved, Evaluated, Event, PreviewSaved, RunStarted, StepLogged, SystemSampled
from affmae_engine.run_dir import RunDir

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_SYSTEM_FIELDS = (
    "gpu_memory_used", "gpu_memory_others", "gpu_utilisation", "power", "temperature", "sm_clock", "memory_clock",
    "host_memory_used", "process_memory", "cpu",
)  # fmt: skip
_STEP_FIELDS = ("lr", "grad_norm", "images_per_s", "data_wait", "step_s", "memory_gib", "memory_peak_gib")


def check_installed() -> None:
    """Raises ConfigError when the package `tensorboard` is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("--tensorboard needs the package tensorboard", 'pip install "affmae[tensorboard]"')


@contextlib.contextmanager
def tensorboard_copy(run: RunDir) -> Iterator[TensorBoardCopy]:
    """A sink for the events of one trainer process.

    Raises:
        ConfigError: the package is missing.
    """
    check_installed()
    copy = TensorBoardCopy(run)
    try:
        yield copy
    finally:
        copy.close()


class TensorBoardCopy:
    """Writes each event as TensorBoard has it. Nothing is written before the run's first event."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._writer: SummaryWriter | None = None

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        if isinstance(event, RunStarted):
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._run.tensorboard), purge_step=event.step + 1)
        if self._writer is None:
            return
        for name, value in scalars(event).items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, getattr(event, "step", 0), event.time)
        if isinstance(event, PreviewSaved):
            self._picture(self._writer, event)
        if isinstance(event, (Evaluated, CheckpointSaved)):
            self._writer.flush()

    def close(self) -> None:
        """Write out what is left."""
        if self._writer is not None:
            self._writer.close()

    def _picture(self, writer: SummaryWriter, event: PreviewSaved) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(self._run.root / event.path) as picture:
            rgb_HWC = np.asarray(picture.convert("RGB"))
        name = Path(event.path).stem.partition("-")[2].partition("-")[2]
        writer.add_image(f"preview/{name or 'main'}", rgb_HWC, event.step, event.time, dataformats="HWC")


def scalars(event: Event) -> dict[str, float]:
    """The figures of an event by TensorBoard tag; empty for events without figures."""
    match event:
        case StepLogged():
            losses = {f"train/{name}": value for name, value in event.losses.items()}
            return losses | {f"run/{name}": getattr(event, name) for name in _STEP_FIELDS}
        case Evaluated():
            found = {f"held_out/{name}": value for name, value in event.metrics.items()}
            for label, scores in event.per_class.items():
                found |= {f"class/{label}/{name}": value for name, value in scores.items()}
            return found | {f"effective_rank/stage{i}": rank for i, rank in enumerate(event.effective_rank, 1)}
        case SystemSampled():
            return {f"system/{name}": getattr(event, name) for name in _SYSTEM_FIELDS}
        case _:
            return {}
