"""`affmae slurm`: scripts, refusals, and their bodies run on this machine with stand-ins for srun and scontrol."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner, Result

from affmae_cli.main import app
from affmae_engine.run_dir import RunDir
from affmae_engine.slurm import Job, job_script
from tests.engine.trained import trained_run


def affmae(*words: object) -> Result:
    return CliRunner().invoke(app, ["slurm", *map(str, words)])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def header(script: str) -> set[str]:
    return set(re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE))


def test_a_training_on_several_nodes(here: Path) -> None:
    result = affmae(
        "pretrain", "data/em.zarr", "--steps", 100, "-o", "runs/em", "--nodes", 2, "--gpus-per-node", 4, "--seeds",
        "0-2", "--sbatch=--partition=gpu", "--setup", "module load cuda", "--python", "/opt/my env/bin/python",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    script = result.stdout
    assert {
        "--nodes=2", "--gpus-per-node=4", "--array=0-2", "--partition=gpu", "--signal=B:USR1@300", "--requeue",
    } <= header(script)  # fmt: skip
    assert "--nnodes=2 --nproc-per-node=4" in script
    assert "python='/opt/my env/bin/python'" in script
    assert 'pretrain data/em.zarr --steps 100 -o "$run" --seed "$SLURM_ARRAY_TASK_ID"' in script
    assert script.index("module load cuda") < script.index("-m affmae_cli")
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pretrain", "data.zarr"), "needs a place"),
        (("pretrain", "data.zarr", "-o", "r", "--stepz", "3"), "No such option"),
        (("pretrain", "data.zarr", "-o", "r", "--seed", "3"), "cannot be used in a job"),
        (("predict", "a.tif", "-o", "o.zarr", "--overwrite"), "cannot be used in a job"),
        (("pretrain", "data.zarr", "-o", "r", "--shards", "3"), "for prediction"),
        (("pretrain", "data.zarr", "-o", "r", "--time", "soon"), "no time limit"),
        (("pretrain", "data.zarr", "-o", "r", "--seeds", "0-"), "no seeds"),
        (("pretrain", "data.zarr", "-o", "r", "--sbatch=--x=1\n#SBATCH --y"), "not an option of sbatch"),
        (("predict", "a.tif", "-o", "o.zarr", "--seeds", "1"), "for training"),
        (("predict", "a.tif", "-o", "o.zarr", "--nodes", "2"), "runs on one node"),
        (("pretrain", "data.zarr", "-o", "runs/em"), "exists already"),
        (("pretrain", "data.zarr", "-o", "runs/x", "--seeds", "1,5-7"), "runs/x-seed6 exists already"),
        (("pretrain", "--resume", "runs/none"), "not a run"),
    ],
)
def test_mistakes_are_reported_before_the_job(here: Path, words: tuple[str, ...], message: str) -> None:
    trained_run(here / "runs" / "em", "pretrain")
    trained_run(here / "runs" / "x-seed6", "pretrain")
    result = affmae(*words)
    assert result.exit_code == 2
    assert message in result.stderr


def test_submitting(here: Path, stand_in: Callable[[str, str], None]) -> None:
    words = ("predict", "a.tif", "-m", "runs/seg", "-o", "o.zarr", "--shards", "4", "--submit")
    stand_in("sbatch", 'cat > received; echo "Submitted batch job 7"')
    result = affmae(*words)
    assert (result.exit_code, result.stdout.strip()) == (0, "Submitted batch job 7")
    assert "--array=0-3" in header(Path("received").read_text())
    stand_in("sbatch", 'echo "invalid partition" >&2; exit 1')
    result = affmae(*words)
    assert result.exit_code == 4
    assert "invalid partition" in result.stderr


def test_submitting_without_slurm(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(here))
    result = affmae("predict", "a.tif", "-o", "o.zarr", "--submit")
    assert result.exit_code == 4
    assert "sbatch was not found" in result.stderr


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """stand_in(NAME, SHELL) puts a command of that name before all others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, body: str) -> None:
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)

    return make


@pytest.fixture
def cluster(here: Path, stand_in: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node with a dataset and Slurm's environment; srun starts its command once per node, all of them here."""
    stand_in("scontrol", f'if [[ $1 == show ]]; then echo localhost; else echo "$@" >> {here}/scontrol.log; fi')
    stand_in(
        "srun",
        "for word; do [[ $word == --nodes=* ]] && nodes=${word#--nodes=}; done\n"
        "while [[ $1 == --* ]]; do shift; done\n"
        'for ((node = 0; node < nodes; node++)); do SLURM_NODEID=$node "$@" & jobs+=($!); done\n'
        'status=0; for job in "${jobs[@]}"; do wait "$job" || status=$?; done; exit $status',
    )
    settings = {
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost", "SLURM_ARRAY_TASK_ID": "1",
        "AFFMAE_MODEL__SIZE": "tiny", "AFFMAE_DATA__CROP_SIZE": "32", "AFFMAE_DATA__WORKERS": "0",
        "AFFMAE_TRAIN__DEVICE": "cpu", "AFFMAE_TRAIN__BATCH_SIZE": "2", "AFFMAE_TRAIN__LOG_EVERY": "1",
        "AFFMAE_TRAIN__MICRO_BATCH": "none", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    rng = np.random.default_rng(0)
    (here / "scans").mkdir()
    for number in range(3):
        tifffile.imwrite(here / f"scans/{number}.tif", rng.integers(0, 255, (96, 96)).astype(np.uint8))
    assert CliRunner().invoke(app, ["ingest", "scans", "-o", "data.zarr", "-q"]).exit_code == 0
    return here


def steps_logged(run: Path) -> int:
    if not RunDir(run).metrics.is_file():
        return 0
    return RunDir(run).metrics.read_text().count('"kind": "step"')


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "gpus"), [(1, 0), (2, 1)])
def test_a_signalled_training_is_queued_again_and_continues(cluster: Path, nodes: int, gpus: int) -> None:
    words = ("data.zarr", "--preset", "demo", "--steps", "80")
    job = Job("pretrain", words, Path("runs/em"), nodes=nodes, gpus=gpus, seeds="0-2", python=sys.executable)
    Path("job.sh").write_text(job_script(job))
    run = Path("runs/em-seed1")
    process = subprocess.Popen(["bash", "job.sh"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while steps_logged(run) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors
    assert Path("scontrol.log").read_text().split() == ["requeue", str(os.getpid())]
    (step,) = RunDir(run).checkpoint_steps()
    assert 0 < step < 80
    again = subprocess.run(["bash", "job.sh"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert RunDir(run).checkpoint_steps()[0] == 80
    assert RunDir(run).read_config().train.seed == 1
    assert json.loads(RunDir(run).summary.read_text())["status"] == "finished"
    assert len(Path("scontrol.log").read_text().splitlines()) == 1


def test_prediction_shards_and_their_stop(here: Path, stand_in: Callable[[str, str], None]) -> None:
    stand_in("scontrol", f'echo "$@" >> {here}/scontrol.log')
    # An interpreter that notes its arguments, and ends with an error when it is asked to stop.
    stand_in("python-here", f"""echo "$@" > {here}/arguments; trap 'exit 143' TERM; while true; do sleep 0.05; done""")
    job = Job("predict", ("a b.tif", "-m", "runs/seg"), Path("o.zarr"), shards=4, python="python-here")
    Path("job.sh").write_text(job_script(job))
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    process = subprocess.Popen(["bash", "job.sh"], env=environment)
    deadline = time.monotonic() + 20
    while not Path("arguments").is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)  # for the trap behind the start
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=20) == 0
    assert Path("arguments").read_text() == "-m affmae_cli predict a b.tif -m runs/seg -o o.zarr --shard 2/4\n"
    assert Path("scontrol.log").read_text() == "requeue 7\n"
    # Without the warning signal, a failure is a failure.
    process = subprocess.Popen(["bash", "job.sh"], env=environment)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143
    assert Path("scontrol.log").read_text() == "requeue 7\n"
