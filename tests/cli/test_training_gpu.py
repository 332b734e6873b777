"""Training on cards as a user starts it: exact resume, several cards, a card that runs full, a process that dies.

Every test starts the command itself, because memory, recorded graphs and process groups belong to whole processes.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import tifffile
import torch
from scipy.ndimage import gaussian_filter

from affmae_engine import checkpoint
from affmae_engine.data.ingest import ingest
from affmae_engine.events import StepLogged, Warned, from_line
from affmae_engine.run_dir import RunDir

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(600)]
DEVICE = "cuda"
SETTINGS = {
    "model.size": "small", "model.drop_path": 0, "model.decoder_dropout": 0, "data.crop_size": 256, "data.workers": 2,
    "data.holdout": 0.2, "optim.warmup_steps": 2, "train.batch_size": 32, "train.micro_batch": 8, "train.log_every": 1,
    "train.eval_every": 0, "train.preview_every": 0, "train.checkpoint_every": 4,
    "kernels.cuda_graph": "false",
}  # fmt: skip
CAPPED = """
import sys, torch
torch.cuda.set_per_process_memory_fraction(float(sys.argv.pop(1)))
from affmae_cli.main import main
main()
"""
two_cards = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a dataset of blobs."""
    folder = tmp_path_factory.mktemp("cards")
    blobs = gaussian_filter(np.random.default_rng(0).normal(size=(8, 1024, 1024)), (0, 4, 4))
    tifffile.imwrite(folder / "stack.tif", ((blobs - blobs.min()) / np.ptp(blobs) * 255).astype(np.uint8))
    ingest([folder / "stack.tif"], folder / "em.zarr")
    return folder


def pretrain(name: str, steps: int, **changed: object) -> list[str]:
    """Words of the command; keyword arguments are settings, with __ for the dot."""
    settings = SETTINGS | {key.replace("__", "."): value for key, value in changed.items()}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return ["pretrain", "em.zarr", "--preset", "em-base", "--device", DEVICE, *words, "--steps", str(steps), "-o", name]


def start(folder: Path, words: list[str], *, cards: int = 1, program: tuple[str, ...] = ()) -> subprocess.Popen:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cards)] if cards > 1 else []
    seen = {} if cards > 1 else {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    return subprocess.Popen(
        [sys.executable, *launch, *(program or ("-m", "affmae_cli")), *words], cwd=folder, env={**os.environ, **seen},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def train(folder: Path, name: str, steps: int, *, cards: int = 1, **changed: object) -> RunDir:
    """A whole training, which must succeed."""
    process = start(folder, pretrain(name, steps, **changed), cards=cards)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-3000:]
    return RunDir(folder / name)


def resume(folder: Path, name: str, *more: str) -> RunDir:
    process = start(folder, ["pretrain", "--resume", name, *more])
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-3000:]
    return RunDir(folder / name)


def events(run: RunDir) -> list[object]:
    return [from_line(line) for line in run.metrics.read_text().splitlines()]


def losses(run: RunDir) -> dict[int, float]:
    return {event.step: event.losses["loss"] for event in events(run) if isinstance(event, StepLogged)}


def warnings(run: RunDir) -> list[str]:
    return [event.message for event in events(run) if isinstance(event, Warned)]


def assert_same_bits(one: RunDir, other: RunDir, step: int) -> None:
    a, b = (checkpoint.Checkpoint(run.checkpoint(step), step) for run in (one, other))
    for kind in ("weights", "optimizer"):
        x, y = getattr(a, kind)(), getattr(b, kind)()
        assert x.keys() == y.keys() and [name for name in x if not torch.equal(x[name], y[name])] == []


@pytest.mark.parametrize("recorded", ["false", "true"])
def test_killed_and_resumed_ends_with_the_same_bits(folder: Path, recorded: str) -> None:
    changed = {"kernels__cuda_graph": recorded, "model__drop_path": 0.1, "model__decoder_dropout": 0.1}
    whole = train(folder, f"whole-{recorded}", 12, train__precision="bf16", **changed)
    parts = RunDir(folder / f"parts-{recorded}")
    shutil.copytree(whole.root, parts.root)
    shutil.rmtree(parts.checkpoint(12))  # as a kill between steps 8 and 12 leaves it
    (parts.root / "summary.json").unlink()
    assert_same_bits(whole, resume(folder, parts.root.name), 12)
    assert losses(parts) == losses(whole)


def test_auto_takes_what_fits(folder: Path) -> None:
    process = start(
        folder, [*pretrain("auto", 6, data__crop_size=512, train__batch_size=512, data__workers=8), "--batch", "auto"]
    )
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0, said[-3000:]
    told = warnings(RunDir(folder / "auto"))
    assert any("is auto" in text for text in told) and not any("out of memory" in text for text in told)


@pytest.mark.parametrize("recorded", ["false", "true"])
def test_a_card_that_runs_full_costs_speed_alone(folder: Path, recorded: str) -> None:
    changed = {"data__crop_size": 512, "data__workers": 0, "train__batch_size": 64, "kernels__cuda_graph": recorded}
    small = train(folder, f"small-{recorded}", 8, train__micro_batch=4, **changed)
    share = 6 * 2**30 / torch.cuda.get_device_properties(0).total_memory
    words = pretrain(f"big-{recorded}", 8, train__micro_batch=64, **changed)
    process = start(folder, words, program=("-c", CAPPED, str(share)))
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-3000:]
    big = RunDir(folder / f"big-{recorded}")
    assert any("which is repeated" in text for text in warnings(big))
    assert losses(big) == pytest.approx(losses(small), rel=3e-3)


@two_cards
@pytest.mark.parametrize("recorded", ["false", "true"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-5), ("bf16", 3e-3)])
def test_two_cards_equal_one_and_resume_on_one(folder: Path, precision: str, tolerance: float, recorded: str) -> None:
    changed = {"train__precision": precision, "kernels__cuda_graph": recorded}
    one = train(folder, f"one-{precision}-{recorded}", 8, **changed)
    two = train(folder, f"two-{precision}-{recorded}", 8, cards=2, **changed)
    assert losses(two) == pytest.approx(losses(one), rel=tolerance)
    assert max(losses(resume(folder, two.root.name, "--steps", "10"))) == 10


@two_cards
@pytest.mark.parametrize("recorded", ["false", "true"])
def test_a_process_that_dies_ends_all_and_the_run_goes_on(folder: Path, recorded: str) -> None:
    name = f"killed-{recorded}"
    launcher = start(folder, pretrain(name, 100_000, kernels__cuda_graph=recorded), cards=2)
    run, deadline = RunDir(folder / name), time.monotonic() + 200
    while not run.checkpoint_steps() and launcher.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    ranks = {child.environ().get("RANK"): child for child in psutil.Process(launcher.pid).children()}
    assert "1" in ranks, launcher.communicate()[0][-3000:]
    ranks["1"].send_signal(signal.SIGKILL)
    began = time.monotonic()
    launcher.communicate(timeout=120)
    assert launcher.returncode and time.monotonic() - began < 60
    assert not any(child.is_running() for child in ranks.values())
    last = run.checkpoint_steps()[0]
    checkpoint.verify(run.checkpoint(last))
    assert run.read_json(run.summary)["status"] == "failed"
    process = start(folder, ["pretrain", "--resume", name])
    while run.checkpoint_steps()[0] < last + 8 and process.poll() is None and time.monotonic() < deadline + 200:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 143, said[-3000:]
    assert max(losses(run)) >= last + 8
