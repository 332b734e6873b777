"""The command under torchrun: two processes are one training, and one voice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

from affmae_cli.main import app
from affmae_engine import checkpoint
from affmae_engine.data.ingest import ingest
from affmae_engine.events import StepLogged, from_line
from affmae_engine.run_dir import RunDir

SETTINGS = (
    "model.size=tiny",
    "data.crop_size=64",
    "data.workers=0",
    "data.holdout=0.3",
    "mask.lattices=[4]",
    "train.batch_size=4",
    "train.micro_batch=2",
    "train.log_every=1",
    "train.checkpoint_every=2",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    tifffile.imwrite(folder / "stack.tif", np.random.default_rng(0).integers(0, 255, (6, 96, 96), dtype=np.uint8))
    ingest([folder / "stack.tif"], folder / "em.zarr")
    return folder


def start(folder: Path, *words: object) -> subprocess.Popen:
    """The command in two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [*launch, "-m", "affmae_cli", *map(str, words)]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def new(*more: str) -> list[str]:
    settings = (word for pair in (*SETTINGS, *more) for word in ("--set", pair))
    return ["pretrain", "em.zarr", "--preset", "demo", "--device", "cpu", *settings]


def losses(run: RunDir) -> list[float]:
    found = [from_line(text) for text in run.metrics.read_text().splitlines()]
    return [event.losses["loss"] for event in found if isinstance(event, StepLogged)]


@pytest.mark.slow
def test_two_processes_equal_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    process = start(folder, *new(), "--steps", 4, "-o", "two")
    assert CliRunner().invoke(app, [*new(), "--steps", "4", "-o", "one"]).exit_code == 0
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert out.count("two: 4 steps") == 1 == errors.count("2 x CPU") and "Warning" not in errors
    one, two = RunDir(folder / "one"), RunDir(folder / "two")
    assert losses(two)[:2] == pytest.approx(losses(one)[:2], rel=1e-6)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    a, b = (checkpoint.Checkpoint(run.checkpoint(4), 4).weights() for run in (one, two))
    assert a.keys() == b.keys()
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-4


@pytest.mark.slow
def test_what_is_refused_is_said_once(folder: Path) -> None:
    (folder / "taken").mkdir(), (folder / "taken" / "file").touch()
    refused = (
        new("train.batch_size=5", "train.micro_batch=1"),
        "odd",
        "error: train.batch_size (5) must be a multiple",
    )
    for words, out, text in (refused, (new(), "taken", "exists and is not a run directory")):
        process = start(folder, *words, "-o", out)
        _, errors = process.communicate(timeout=120)
        assert process.returncode and errors.count(text) == 1


def ranks_of(launcher: subprocess.Popen) -> dict[int, int]:
    """Process number of each rank under a launcher."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    found = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        rank = next((entry for entry in environment if entry.startswith(b"RANK=")), None)
        if rank is not None:
            found[int(rank[5:])] = int(child)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
def test_killing_one_ends_all_and_terminating_the_launcher_saves(folder: Path) -> None:
    run = RunDir(folder / "killed")
    process = start(folder, *new(), "--steps", 100_000, "-o", "killed")
    deadline = time.monotonic() + 90
    while not run.checkpoint_steps() and time.monotonic() < deadline:
        time.sleep(0.05)
    members = ranks_of(process)
    began = time.monotonic()
    os.kill(members[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 30 and process.returncode
    assert errors.count("error: another process of this run ended") == 1
    assert not [pid for pid in members.values() if Path(f"/proc/{pid}").exists()]
    killed_at = run.checkpoint_steps()[0]

    process = start(folder, "pretrain", "--resume", "killed")
    while run.checkpoint_steps()[0] == killed_at and time.monotonic() < deadline + 90:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert "stopped: by SIGTERM at step" in errors and "--resume killed" in errors
    summary = run.read_json(run.summary)
    assert summary["status"] == "stopped" and run.checkpoint_steps()[0] == summary["step"]
