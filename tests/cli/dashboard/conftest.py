"""Runs to look at: two real ones, trained for a moment on the phantom, and recorded ones made of chosen events."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from affmae_cli.main import app
from affmae_engine import events
from affmae_engine.config import RunConfig
from affmae_engine.data.ingest import ingest
from affmae_engine.data.phantom import generate, write_tiff
from affmae_engine.run_dir import RunDir, create
from tests.cli.dashboard.driving import started, stepped

SMALL = (
    "data.crop_size=64",
    "data.workers=0",
    "train.batch_size=2",
    "train.micro_batch=2",
    "train.log_every=1",
    "train.eval_every=2",
    "train.preview_every=2",
    "train.checkpoint_every=2",
)


@dataclass(frozen=True)
class Trained:
    """A pretraining and a finetuning of a few steps, in one folder."""

    pretrain: Path
    finetune: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    phantom = generate((4, 128, 128), seed=25)
    phantom = replace(phantom, labels_ZYX=(phantom.labels_ZYX > 0).astype(np.uint8))
    write_tiff(phantom, folder / "images.tif", folder / "labels.tif")
    ingest([folder / "images.tif"], folder / "em.zarr")
    small = ["--preset", "demo", "--device", "cpu", *(word for pair in SMALL for word in ("--set", pair)), "--quiet"]
    found = Trained(folder / "runs" / "pretrain", folder / "runs" / "finetune")
    images = ["--images", folder / "images.tif", "--labels", folder / "labels.tif"]
    for words in (
        ["pretrain", folder / "em.zarr", *small, "--steps", 4, "-o", found.pretrain],
        ["finetune", *images, "--init-from", found.pretrain, *small, "--steps", 2, "-o", found.finetune],
    ):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
    return found


@dataclass
class Recorded:
    """A run directory that is written event by event, as a trainer would."""

    run: RunDir
    written: list[events.Event] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return self.run.root

    def add(self, *found: events.Event) -> None:
        self.written += found
        self.add_bytes("".join(f"{events.to_line(event)}\n" for event in found).encode())

    def add_bytes(self, data: bytes) -> None:
        with self.run.metrics.open("ab") as file:
            file.write(data)


@pytest.fixture
def record(tmp_path: Path) -> Callable[..., Recorded]:
    """record(event, ..., name="live") -> a run under runs/ with these events."""

    def make(*found: events.Event, name: str = "live") -> Recorded:
        run = create(tmp_path / "runs" / name)
        run.write_config(RunConfig.model_validate({"train": {"steps": 100, "eval_every": 50}}), "pretrain")
        recorded = Recorded(run)
        recorded.add(*found)
        return recorded

    return make


@pytest.fixture(autouse=True)
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal of whoever runs the tests must not matter."""
    for name in ("NO_COLOR", "COLORTERM", "TEXTUAL_THEME"):
        monkeypatch.delenv(name, raising=False)
    assert "TEXTUAL" not in os.environ


@pytest.fixture
def live(record: Callable[..., Recorded]) -> Iterator[Recorded]:
    """A run that a trainer (this process) holds."""
    run = record(started(), *(stepped(i) for i in range(1, 41)))
    with run.run.locked():
        yield run


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands where the trainer would."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()
