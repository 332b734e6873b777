"""`affmae watch`: which run is meant, the summary in every state, what is refused."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from affmae_cli.main import app
from affmae_engine import events
from affmae_engine.config import RunConfig
from affmae_engine.run_dir import RunDir, create

STEP = {
    "lr": 1e-3, "grad_norm": 1.0, "images_per_s": 412.0, "data_wait": 0.4, "step_s": 0.1, "memory_gib": 1.0,
    "memory_peak_gib": 2.0, "eta_s": 90.0,
}  # fmt: skip


TTY = SimpleNamespace(isatty=lambda: True)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def watch(*words: object, text: str = "") -> Result:
    return CliRunner().invoke(app, ["watch", *map(str, words)], input=text)


def make(name: str, *more: events.Event, task: str = "pretrain") -> RunDir:
    run = create(Path("runs") / name)
    run.write_config(RunConfig(), task)
    started = events.RunStarted(
        task=task, run=name, step=0, total_steps=100, resumed=False, device="NVIDIA X", precision="bf16",
        parameters=1, batch_size=2,
    )  # fmt: skip
    steps = [events.StepLogged(step=n, losses={"loss": 1 / n, "last": 0.5 / n}, **STEP) for n in range(1, 11)]
    run.metrics.write_text("".join(events.to_line(event) + "\n" for event in (started, *steps, *more)))
    return run


def test_a_live_run_at_80_columns_without_colours() -> None:
    evaluated = events.Evaluated(
        step=10, metrics={"score": 0.61}, per_class={"[red]axon": {"iou": 0.7, "dice": 0.8}}, best=True
    )
    machine = events.SystemSampled(
        step=10, gpu="NVIDIA X", gpu_memory_used=18.2, gpu_memory_total=31.5, gpu_memory_others=4.0,
        gpu_utilisation=0.97, power=310.0, power_limit=450.0, temperature=64.0, sm_clock=2400.0, memory_clock=9000.0,
        throttled=["power limit"], host_memory_used=20.0, host_memory_total=64.0, process_memory=3.0, cpu=0.4,
    )  # fmt: skip
    run = make("a", evaluated, machine, events.PreviewSaved(step=10, path="previews/step-000010.png"), task="finetune")
    with run.locked():
        result = watch("runs/a", "--once")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and all(len(line) <= 80 for line in lines) and "\x1b" not in result.stdout
    for part in (
        "finetune a  running", "10/100  10%", "to go", "412 images/s", "108.0 Mpx/s", "waits for data 40%",
        "data-bound: raise data.workers", "18.2 of 31.5 GiB, others 4.0  load 97%  310 of 450 W  64 °C",
        "throttled: power limit", "[red]axon  iou 0.7000  dice 0.8000", "memory 20.0 of 64.0 GiB", "step-000010.png",
        "other processes hold 4.0 GiB",
    ):  # fmt: skip
        assert part in result.stdout, part
    assert re.search(r" 1m[23]\ds to go", result.stdout)


def test_a_finished_a_failed_and_a_killed_run() -> None:
    make("done", events.RunEnded(step=10, status="finished", seconds=65.0))
    failed = make("bad", events.RunEnded(step=10, status="failed", seconds=5.0, message="the disk is full"))
    failed.log.write_text("".join(f"line {number}\n" for number in range(50)))
    make("killed")
    assert "finished: 10 steps in 1m05s" in watch("runs/done", "--once").stdout
    text = watch("runs/bad", "--once").stdout
    assert "failed at step 10: the disk is full" in text and "line 49" in text and "line 30" not in text
    assert "killed  gone" in watch("runs/killed", "--once").stdout


def test_json() -> None:
    make("a", events.RunEnded(step=10, status="finished", seconds=65.0))
    record = json.loads(watch("runs/a", "--json").stdout)
    assert record["status"] == "finished" and record["step"] == 10 and record["losses"]["loss"] == 0.1
    assert record["system"] == {} and record["eta_s"] == 0


def test_which_run_is_meant() -> None:
    nothing = watch("--once")
    assert nothing.exit_code == 3 and "no runs in runs" in nothing.stderr
    make("old", events.RunEnded(step=10, status="finished", seconds=1.0))
    first = make("first")
    assert "first  gone" in watch("--once").stdout  # the newest, when none is live
    with first.locked():
        make("newer", events.RunEnded(step=10, status="finished", seconds=1.0))
        assert "first  running" in watch("--once").stdout
        assert "first  running" in watch("runs", "--once").stdout  # a folder of runs
        second = make("second")
        with second.locked():
            several = watch("--once")
            assert several.exit_code == 2 and "2 runs are live" in several.stderr
            assert "runs/first" in several.stderr and "runs/second" in several.stderr


def test_with_several_live_runs_the_dashboard_opens_on_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr("affmae_cli.commands.watch.sys", SimpleNamespace(stdin=TTY, stdout=TTY))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(
        "affmae_cli.dashboard.app.run_dashboard", lambda root, **options: opened.append((root, options))
    )
    with make("first").locked(), make("second").locked():
        assert watch().exit_code == 0
        assert watch("runs/first", "--notify", "notify-send 'my run'").exit_code == 0
    (first, options), (second, named) = opened
    assert first.parent == Path("runs") and options["tab"] == "runs"
    assert second == Path("runs/first") and named["tab"] == "overview" and named["notify"] == ["notify-send", "my run"]


def test_of_many_classes_the_worst_are_shown_and_the_others_counted() -> None:
    scores = {f"class{n:02}": {"iou": abs(n - 10) / 20, "dice": 0.5} for n in range(40)}
    scores["class20"] = {"iou": math.nan, "dice": math.nan}
    make("a", events.Evaluated(step=10, metrics={"score": 0.5}, per_class=scores), task="finetune")
    text = watch("runs/a", "--once").stdout
    assert "the 12 worst of 40" in text and text.count("dice") == 12
    assert "class10" in text and "class39" not in text and "class20" not in text and "class00" not in text


def test_beside_json_nothing_else_is_a_result() -> None:
    make("a", events.RunEnded(step=10, status="finished", seconds=65.0))
    result = watch("runs/a", "--json", "--export", "a.svg", "--size", "80x24")
    assert json.loads(result.stdout)["status"] == "finished" and "a.svg" in result.stderr


def test_streams_that_are_closed_or_dumb(monkeypatch: pytest.MonkeyPatch) -> None:
    make("a", events.RunEnded(step=10, status="finished", seconds=65.0))
    code = "import sys; sys.stdin = None; from affmae_cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "watch", "runs/a", "--once"], capture_output=True, text=True)
    assert done.returncode == 0 and "finished" in done.stdout, done.stderr
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("affmae_cli.commands.watch.sys", SimpleNamespace(stdin=TTY, stdout=TTY))
    dumb = watch("runs/a")
    assert dumb.exit_code == 2 and "needs a terminal" in dumb.stderr


def test_what_is_refused() -> None:
    make("a")
    missing = watch("runs/b", "--once")
    assert missing.exit_code == 3 and "no such run: runs/b" in missing.stderr and "runs there: a" in missing.stderr
    no_terminal = watch("runs/a")
    assert no_terminal.exit_code == 2 and "--once" in no_terminal.stderr
    assert watch("runs/a", "--export", "x.svg", "--size", "big").exit_code == 2
    assert watch("runs/a", "--export", "missing/x.svg").exit_code == 4
    suffix = watch("runs/a", "--export", "x.jpg")
    assert suffix.exit_code == 2 and ".svg or .png" in suffix.stderr
    quote = watch("runs/a", "--once", "--notify", "say 'it")
    assert quote.exit_code == 2 and "--notify say 'it" in quote.stderr


def test_the_screen_as_a_file() -> None:
    make("a", events.RunEnded(step=10, status="finished", seconds=65.0))
    result = watch("runs/a", "--export", "out.svg", "--size", "100x30")
    assert result.exit_code == 0 and result.stdout == "out.svg\n"
    picture = Path("out.svg").read_text()
    assert picture.startswith("<svg") and "finished" in picture
    assert watch("runs/a", "--export", "out.png", "--size", "80x24", "--screen", "metrics").exit_code == 0
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
