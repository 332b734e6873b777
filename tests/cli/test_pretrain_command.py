"""`affmae pretrain` on a tiny dataset: new, refused, resumed, and stopped by signals."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from typer.testing import CliRunner, Result

import affmae_cli.main
import affmae_engine
import affmae_kernels
from affmae_cli.main import app
from affmae_engine import checkpoint
from affmae_engine.data.ingest import ingest
from affmae_engine.run_dir import RunDir

SMALL = (
    "model.size=tiny",
    "model.patch_size=8",
    "data.crop_size=64",
    "data.workers=0",
    "data.holdout=0.3",
    "mask.lattices=[4]",
    "train.batch_size=2",
    "train.micro_batch=2",
    "train.log_every=1",
    "train.checkpoint_every=2",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    blobs = np.random.default_rng(0).integers(0, 255, (6, 96, 96), dtype=np.uint8)
    tifffile.imwrite(folder / "stack.tif", blobs)
    return folder / "stack.tif"


@pytest.fixture(scope="module")
def dataset(source: Path) -> Path:
    store = source.parent / "em.zarr"
    ingest([source], store)
    return store


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def small(*more: str) -> list[str]:
    return ["--preset", "demo", "--device", "cpu", *(word for pair in (*SMALL, *more) for word in ("--set", pair))]


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["pretrain", *map(str, words)])


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "finished"
    result = run(dataset, *small(), "--steps", 2, "-o", root)
    assert result.exit_code == 0, result.output
    return root


def test_a_new_run(finished: Path, dataset: Path) -> None:
    names = {"config.toml", "environment.json", "metrics.jsonl", "log.txt", "summary.json", "best.json", "run.lock"}
    assert names <= {entry.name for entry in finished.iterdir()}
    assert json.loads((finished / "environment.json").read_text())["data"]["path"] == str(dataset)
    metadata, weights = checkpoint.load_weights(finished)
    assert metadata.step == 2 and metadata.config["train"]["steps"] == 2 and weights
    assert (finished / "previews" / "step-000002.png").is_file()


def test_the_default_place_is_a_new_name_each_time(dataset: Path, tmp_path: Path) -> None:
    results = [run(dataset, *small(), "--steps", 1, "--json") for _ in range(2)]
    found = [json.loads(result.stdout) for result in results]
    assert [record["run"] for record in found] == ["runs/pretrain-em", "runs/pretrain-em-2"]
    assert all(record["status"] == "finished" and record["step"] == 1 for record in found)
    assert "step 1/1" in results[0].stderr


def test_a_run_is_not_overwritten_without_being_told(finished: Path, dataset: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    result = run(dataset, *small(), "--steps", 1, "-o", finished)
    assert result.exit_code == 2 and "exists already" in result.stderr
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_run_that_holds_the_dataset_is_not_overwritten(finished: Path, dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "a")
    shutil.copytree(dataset, tmp_path / "a" / "em.zarr")
    result = run("a/em.zarr", "-o", "a", "--overwrite", "--steps", 1)
    assert result.exit_code == 2 and "a/em.zarr lies in the run that is to be replaced" in result.stderr
    assert RunDir(tmp_path / "a").checkpoint_steps()


def test_raw_images_are_sent_to_ingest(source: Path) -> None:
    result = run(source, source.parent)
    assert result.exit_code == 3
    assert "is not a dataset" in result.stderr and f"affmae ingest {source} {source.parent}" in result.stderr


@pytest.mark.parametrize(("words", "code"), [(["missing.zarr"], 3), (["--set", "optim.lrr=1"], 2), ([], 3)])
def test_bad_input_is_one_line_and_leaves_nothing(words: Sequence[str], code: int, tmp_path: Path) -> None:
    result = run(*words, "--preset", "demo")
    assert result.exit_code == code
    assert "error: " in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_name_is_told_before_torch_is_loaded() -> None:
    code = "import sys\nfrom affmae_cli.main import main\ntry:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    words = ["pretrain", "missing.zarr", "--preset", "demo"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 3 and done.stdout.strip() == "False", done.stderr


def test_init_from_takes_weights_only(finished: Path, dataset: Path, tmp_path: Path) -> None:
    result = run(dataset, *small("optim.lr=1e-9", "optim.min_lr=0"), "--steps", 1, "--init-from", finished, "-o", "b")
    assert result.exit_code == 0, result.output
    _, there = checkpoint.load_weights(finished)
    metadata, here = checkpoint.load_weights(tmp_path / "b")
    assert metadata.step == 1
    assert all(np.allclose(here[name], there[name], atol=1e-6) for name in there)
    environment = json.loads((tmp_path / "b" / "environment.json").read_text())
    assert environment["command"]["init_from"] == str(finished)


def test_resume_needs_nothing_else_and_more_steps_go_on(dataset: Path, tmp_path: Path) -> None:
    assert run(dataset, *small(), "--steps", 1, "-o", "a").exit_code == 0
    refused = run("--resume", "a")
    assert refused.exit_code == 2 and "is finished" in refused.stderr
    result = run("--resume", "a", "--steps", 3)
    assert result.exit_code == 0, result.output
    assert "resumed at step 1" in result.stderr
    assert RunDir(tmp_path / "a").read_config().train.steps == 3
    shorter = run("--resume", "a", "--steps", 2)
    assert shorter.exit_code == 2 and "shorter" in shorter.stderr


def test_resume_heeds_the_environment_for_fields_that_were_not_set(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = RunDir(finished).read_config()
    assert own.predict.tile is None and own.train.epochs is None
    monkeypatch.setenv("AFFMAE_PREDICT__TILE", "96")
    result = run("--resume", finished, "--steps", 3)
    assert result.exit_code == 2 and "predict.tile: not set in the run, 96 now" in result.stderr


def test_quiet_says_the_result_only(dataset: Path) -> None:
    result = run(dataset, *small(), "--steps", 1, "-o", "a", "-q")
    assert result.exit_code == 0 and result.stdout.startswith("a: 1 steps") and result.stderr == ""


def test_resume_refuses_other_settings_and_lists_them(finished: Path) -> None:
    result = run("--resume", finished, "--steps", 3, "--seed", 5, "--set", "optim.lr=0.5", "--set", "train.log_every=7")
    assert result.exit_code == 2
    assert "train.seed: 0 in the run, 5 now" in result.stderr and "optim.lr" in result.stderr
    assert "log_every" not in result.stderr


def test_resume_refuses_options_of_new_runs(finished: Path) -> None:
    result = run("--resume", finished, "-o", "x", "--overwrite")
    assert result.exit_code == 2 and "--out and --overwrite cannot go with --resume" in result.stderr


def test_resume_of_what_is_no_run_names_near_ones(finished: Path) -> None:
    result = run("--resume", finished.with_name("finishd"))
    assert result.exit_code == 3 and "finished" in result.stderr
    assert run("--resume", finished.parent).exit_code == 3


def test_resume_with_changed_data_says_what_changed(source: Path, tmp_path: Path) -> None:
    ingest([source], tmp_path / "em.zarr")
    assert run("em.zarr", *small(), "--steps", 1, "-o", "a").exit_code == 0
    extra = tmp_path / "extra.tif"
    tifffile.imwrite(extra, np.random.default_rng(1).integers(0, 255, (96, 96), dtype=np.uint8))
    ingest([extra], tmp_path / "em.zarr")
    result = run("--resume", "a", "--steps", 2)
    assert result.exit_code == 2 and re.search(r"1\s+added\s+\(extra\)", result.stderr)


def test_a_run_killed_before_its_first_checkpoint_starts_again(finished: Path, dataset: Path, tmp_path: Path) -> None:
    """From the weights that it started from."""
    result = run(dataset, *small(), "--steps", 2, "--init-from", finished, "-o", "a")
    assert result.exit_code == 0, result.output
    shutil.copytree("a", "killed")
    shutil.rmtree("killed/checkpoints/step-000002")
    for name in ("summary.json", "best.json"):
        Path("killed", name).unlink()
    result = run("--resume", "killed")
    assert result.exit_code == 0 and "starts again from step 0" in " ".join(result.stderr.split()), result.output
    a, b = (checkpoint.load_weights(tmp_path / name)[1] for name in ("a", "killed"))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_few_frames_lie_between_the_command_and_the_backward_pass(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = tuple(str(Path(module.__file__).parent) for module in (affmae_cli, affmae_engine, affmae_kernels))
    frames: list[list[str]] = []
    backward = torch.Tensor.backward

    def noted(tensor: torch.Tensor, *arguments: object, **options: object) -> None:
        frames.append([frame.name for frame in traceback.extract_stack() if frame.filename.startswith(ours)])
        backward(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "backward", noted)
    monkeypatch.setattr(sys, "argv", ["affmae", "pretrain", str(dataset), *small(), "--steps", "1", "-o", "a", "-q"])
    with pytest.raises(SystemExit) as ended:
        affmae_cli.main.main()
    assert not ended.value.code
    assert len(frames) == 1 and frames[0][0] == "main" and len(frames[0]) <= 7, frames


def test_files_of_a_run_follow_the_umask(dataset: Path, tmp_path: Path) -> None:
    before = os.umask(0o007)
    try:
        assert run(dataset, *small(), "--steps", 1, "-o", "a").exit_code == 0
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o660}, modes
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o770}, modes


def start(*words: object) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "affmae_cli", "pretrain", *map(str, words)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def wait_for(path: Path, text: str, process: subprocess.Popen, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if path.is_file() and text in path.read_text():
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize(
    ("number", "send"), [(signal.SIGTERM, os.killpg), pytest.param(signal.SIGINT, os.kill, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_tells_how_to_go_on(
    number: signal.Signals, send: Callable[[int, int], None], dataset: Path, tmp_path: Path
) -> None:
    """A scheduler's SIGTERM reaches the data loader too, which has yet to deliver most of a step."""
    process = start(dataset, *small("data.workers=1", "train.batch_size=32"), "--steps", 100_000, "-o", "a")
    wait_for(tmp_path / "a" / "metrics.jsonl", '"kind": "step"', process)
    send(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "affmae pretrain --resume a" in errors and "Traceback" not in errors
    run_dir = RunDir(tmp_path / "a")
    assert "data-loading process" not in run_dir.log.read_text()
    summary = json.loads(run_dir.summary.read_text())
    assert summary["status"] == "stopped" and run_dir.checkpoint_steps()[0] == summary["step"]


def test_a_second_interrupt_leaves_at_once(dataset: Path, tmp_path: Path) -> None:
    process = start(dataset, *small("train.batch_size=4000"), "--steps", 100_000, "-o", "a")
    wait_for(tmp_path / "a" / "metrics.jsonl", "run_started", process)
    time.sleep(0.3)  # in the middle of a step that takes minutes
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    process.communicate(timeout=20)
    assert time.monotonic() - began < 2
    assert process.returncode == -signal.SIGINT
    assert list((tmp_path / "a" / "checkpoints").iterdir()) == []
