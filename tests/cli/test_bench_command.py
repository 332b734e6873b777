"""`affmae bench`: what it measures, prints, writes and refuses."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

from affmae_cli import bench_plan, bench_view
from affmae_cli.main import app
from affmae_engine.bench import kernel_cases, processes
from affmae_engine.bench.case import Answer, Measurement
from affmae_engine.bench.comparison import Clock, Outcome
from affmae_engine.train.device import DeviceChoice

SMALL = ("--resolutions", "64", "--batch", "2", "--device", "cpu")


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["bench", *args])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """Both families, training and prediction, real processes."""
    out = tmp_path_factory.mktemp("bench") / "out"
    works = ("--task", "pretrain,predict", "--ops", "token_merging,nearest_table")
    return run(*SMALL, *works, "--rounds", "1", "--steps", "1", "-o", str(out)), out


def test_the_whole_command_without_a_card(whole) -> None:
    result, out = whole
    assert result.exit_code == 0, result.output
    assert "No card" in result.stderr and "tiny network" in result.stderr
    assert "round 1 of 1: affmae tiny, pretrain, 64 px, batch 2" in result.stderr
    assert "times as many images as ViT-MAE-tiny, predicting at 64 px, 2 images at a time" in result.stdout
    values = json.loads((out / "results.json").read_text())
    assert (values["schema"], values["kind"]) == (2, "comparison")
    order = [(r["case"]["work"], r["case"]["model"]) for r in values["results"]]
    assert order == [(w, m) for w in ("pretrain", "predict") for m in ("affmae", "vit-mae")]
    for record in values["results"]:
        assert record["status"] == "ok" and len(record["rounds"]) == 1, record["note"]
        assert record["ms"] > 0 and record["forward_ms"] > 0 and record["first_step_s"] > 0
        assert record["images_per_s"] == pytest.approx(2e3 / record["ms"])
        assert record["forward_gflop"] == pytest.approx(sum(record["forward_gflop_parts"].values()))
        assert record["allocated_gib"] is record["max_batch"] is None
    assert [ratio["work"] for ratio in values["ratios"]] == ["pretrain", "predict"]
    assert all(ratio["speed"] > 0 and ratio["flops"] > 1 for ratio in values["ratios"])
    assert values["gate"]["cases"] == 7 and values["gate"]["worst_error"] < 1e-4
    assert values["mask_ratio"] == 0.5 and values["merge_keep"] == 0.4 and "torch" in values["versions"]
    assert values["card"] == {} and set(values["backends"].values()) == {"reference"}
    assert values["settings"] == {"rounds": 1, "steps": 1, "warmup": 1}


def test_the_report_says_it_in_words_first(whole) -> None:
    text = (whole[1] / "report.md").read_text()
    summary, tables = text.split("\n## ", 1)
    assert summary.startswith("# AFFMAE against ViT-MAE") and summary.count("\n- AFFMAE-tiny") == 2
    assert "No card" in summary
    for heading in ("Speed", "Memory, arithmetic", "Circumstances"):
        assert f"## {heading}" in f"## {tables}"
    assert "float64" in text and "| peak GiB |" not in text  # a column without figures is left out


@pytest.fixture
def canned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that answer at once, without torch."""
    said = Answer(measurement=Measurement(ms=2.0, forward_ms=1.0, how="canned")).model_dump_json()
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", f"import sys; sys.stdin.read(); print({said!r})"))


@pytest.mark.usefixtures("canned")
def test_json_alone_on_stdout() -> None:
    result = run(*SMALL, "--models", "vit-mae", "--ops", "nearest_table", "--json", "-q")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert [r["case"]["model"] for r in values["results"]] == ["vit-mae"] and values["ratios"] == []
    assert len(values["results"][0]["rounds"]) == 2
    assert result.stderr == ""


def test_all_tasks_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finetuning is measured for real in test_measure.py."""
    said = {ms: Answer(measurement=Measurement(ms=ms, forward_ms=1.0, how="canned")).model_dump_json() for ms in (2, 5)}
    code = f"import sys; print({said[5]!r} if 'vit-mae' in sys.stdin.read() else {said[2]!r})"
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", code))
    works = ["pretrain", "finetune", "predict"]
    result = run(*SMALL, "--task", ",".join(works), "--rounds", "1", "--ops", "nearest_table", "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    order = [(r["case"]["work"], r["case"]["model"]) for r in values["results"]]
    assert order == [(work, model) for work in works for model in ("affmae", "vit-mae")]
    assert [(ratio["work"], ratio["speed"]) for ratio in values["ratios"]] == [(work, 2.5) for work in works]


def test_a_process_that_crashes_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    said = Answer(measurement=Measurement(ms=2.0, forward_ms=1.0, how="canned")).model_dump_json()
    code = (
        "import os, signal, sys\n"
        "if 'vit-mae' in sys.stdin.read(): os.kill(os.getpid(), signal.SIGSEGV)\n"
        f"print({said!r})"
    )
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", code))
    result = run(*SMALL, "--ops", "nearest_table", "-o", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "ViT-MAE-tiny failed, pretraining at 64 px, 2 images at a time; AFFMAE-tiny takes" in result.stdout
    values = json.loads((tmp_path / "results.json").read_text())
    assert [r["status"] for r in values["results"]] == ["ok", "failed"]
    assert "signal 11" in values["results"][1]["note"] and values["ratios"][0]["speed"] is None


def test_ctrl_c_leaves_what_was_measured(tmp_path) -> None:
    said = Answer(measurement=Measurement(ms=2.0, forward_ms=1.0, how="canned")).model_dump_json()
    worker = f"import sys, time; time.sleep(60 if 'vit-mae' in sys.stdin.read() else 0); print({said!r})"
    code = (
        "import sys\nfrom affmae_engine.bench import processes\n"
        f"processes.COMMAND = (sys.executable, '-c', {worker!r})\n"
        "from affmae_cli.main import main\nmain()"
    )
    args = ("bench", *SMALL, "--ops", "nearest_table", "-o", str(tmp_path))
    command = subprocess.Popen([sys.executable, "-c", code, *args], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "results.json").exists():
        assert time.monotonic() < deadline and command.poll() is None
        time.sleep(0.05)
    command.send_signal(signal.SIGINT)
    said = command.communicate(timeout=20)[1]
    assert command.returncode == 130 and "stopped: after 1 of 4 measurements" in said and "Traceback" not in said, said
    values = json.loads((tmp_path / "results.json").read_text())
    assert [r["status"] for r in values["results"]] == ["ok", "waiting"]


def test_kernels(tmp_path) -> None:
    result = CliRunner().invoke(
        app, ["benchmark", "--kernels", "--quick", *SMALL, "--sizes", "tiny", "--ops", "token_merging",
              "-o", str(tmp_path), "--json"]
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values == json.loads((tmp_path / "results.json").read_text())
    assert {r["op"] for r in values["results"]} == {"token_merging"}
    assert all(r["both"]["ms"] > 0 and r["worst_error"] < 1e-4 for r in values["results"])
    assert "token_merging" in (tmp_path / "report.md").read_text()


@pytest.fixture
def wrong_merging(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel_cases.merge_tokens

    def wrong(feat, *args, backend):
        return right(feat, *args, backend=backend) * (1.0 if feat.dtype == torch.float64 else 1.01)

    monkeypatch.setattr(kernel_cases, "merge_tokens", wrong)


@pytest.mark.usefixtures("wrong_merging")
def test_a_red_gate_prints_no_speed_of_that_operation(tmp_path) -> None:
    result = run("--kernels", *SMALL, "--ops", "token_merging,nearest_table", "-o", str(tmp_path))
    assert result.exit_code == 1
    assert "wrong" in result.stdout and "Traceback" not in result.output
    assert "error: 3 of 7 cases" in result.stderr
    for record in json.loads((tmp_path / "results.json").read_text())["results"]:
        timed = record["forward"] is not None
        assert timed == (record["op"] == "nearest_table")


@pytest.mark.usefixtures("wrong_merging")
def test_a_red_gate_prevents_the_comparison(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(processes, "_start", lambda: pytest.fail("a process began in spite of a red gate"))
    result = run(*SMALL, "--ops", "token_merging,nearest_table", "--json", "-o", str(tmp_path))
    assert result.exit_code == 1 and result.stdout == ""
    assert "error: 3 of" in result.stderr and "token_merging" in result.stderr
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--sizes", "smal"], "unknown name 'smal'"),
        (["--sizes", ","], "--sizes is empty"),
        (["--resolutions", "100"], "not a multiple of the patch"),
        (["--resolutions", "32"], "from 64 to 4096"),
        (["--resolutions", "big"], "from 64 to 4096"),
        (["--batch", "0"], "or auto"),
        (["--batch", "-3"], "or auto"),
        (["--task", "train"], "unknown name 'train'"),
        (["--vit", "fast"], "unknown name 'fast'"),
        (["--vit", "compile-fp32-residual", "--task", "predict"], "for --task pretrain alone"),
        (["--models", "resnet"], "unknown name 'resnet'"),
        (["--ops", "conv"], "unknown name 'conv'"),
        (["--quick", "--full"], "exclude each other"),
        (["--kernels", "--counters"], "on an NVIDIA card"),
    ],
)
def test_bad_values_are_one_line(args: list[str], said: str) -> None:
    result = run(*args, "--device", "cpu")
    assert result.exit_code == 2 and result.stdout == ""
    assert said in result.stderr.splitlines()[0] and len(result.stderr.splitlines()) <= 2


def test_data_that_is_no_dataset(tmp_path) -> None:
    result = run("--data", str(tmp_path / "none.zarr"), "--device", "cpu")
    assert result.exit_code == 3 and result.stderr.startswith("error: ") and "Traceback" not in result.output


def test_a_file_in_the_way_of_the_folder(tmp_path) -> None:
    (tmp_path / "file").touch()
    result = run(*SMALL, "-o", str(tmp_path / "file"))
    assert result.exit_code == 4 and "Traceback" not in result.output


def plan(**options) -> bench_plan.Plan:
    return bench_plan.make_plan(bench_plan.Options(**{"device": "cpu", **options}))


def described(made: bench_plan.Plan) -> list[tuple]:
    return [(c.model, c.size, c.resolution, c.batch, c.compile) for c in made.cases]


def test_plans_without_a_card() -> None:
    for options in ({}, {"quick": True}, {"full": True}):
        assert described(plan(**options)) == [(m, "tiny", 128, 2, False) for m in ("affmae", "vit-mae")]
    made = plan(sizes="small,base", resolutions="512,1024", batch="4", vit="compile,eager", max_batch=True)
    assert len(made.cases) == 8 and {c.batch for c in made.cases} == {4}
    assert {s.batch for s in made.gate_settings} == {2}
    assert not made.comparison.max_batch and not made.comparison.compile_first


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan for a card of 24 GiB; nothing is computed on it."""
    choice = DeviceChoice(torch.device("cuda", 0), torch.bfloat16, "bf16", "Card (24 GiB), bf16")
    monkeypatch.setattr(bench_plan, "pick_device", lambda config: choice)
    properties = SimpleNamespace(total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.usefixtures("card")
def test_plans_for_a_card() -> None:
    made = plan()
    assert described(made) == [(m, "small", 512, 32, False) for m in ("affmae", "vit-mae")]
    assert made.comparison.rounds == 2 and made.remarks == [bench_plan.QUICK_REMARK]
    made = plan(full=True, max_batch=True)
    assert described(made)[::2] == [
        ("affmae", "small", 512, 32, True), ("affmae", "base", 512, 16, True),
        ("affmae", "small", 1024, 8, True), ("affmae", "base", 1024, 4, True),
    ]  # fmt: skip
    assert made.comparison.rounds == 3 and made.remarks == [] and made.comparison.max_batch
    assert made.comparison.request.device == "cuda" and made.comparison.request.precision == "bf16"
    assert [s.batch for s in plan(kernels=True).settings] == [32, 32, 8, 8]  # of a large card, on every card
    assert [s.size for s in plan(kernels=True, quick=True).settings] == ["small"]
    assert described(plan(sizes="base")) == described(plan(sizes="base", resolutions="512,1024"))
    assert [c.vit_mode for c in plan(vit="compile,eager").cases] == ["auto", "compile", "eager"]
    assert all(c.compile for c in plan(quick=True, compile=True).cases)


def test_the_live_table_fills_in() -> None:
    cases = plan(sizes="tiny", resolutions="64").cases
    outcomes, clock = [Outcome(case) for case in cases], Clock({"round": 4})
    console = Console(width=110, record=True, force_terminal=True)
    view = bench_view.LiveTable(console)
    view.tell("check token_merging")
    console.print(view.render())
    assert "check token_merging" in console.export_text()
    view.follow(outcomes, clock)
    outcomes[0].rounds.append(Measurement(ms=10.0, allocated_gib=1.5))
    outcomes[0].doing, outcomes[1].doing = "", "round 1 of 2"
    clock.took("round", 30.0)
    view.changed(outcomes[1])
    console.print(view.render())
    text = console.export_text()
    assert "200" in text and "1.50" in text and "round 1 of 2: vit-mae tiny" in text
    assert "1/4" in text and "about 1m30s left" in text
    outcomes[1].rounds.append(Measurement(ms=40.0))
    outcomes[1].doing = ""
    console.print(view.render())
    assert "4.00 x" in console.export_text()
