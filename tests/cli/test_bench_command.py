"""`affmae bench speed` and `bench kernels`: what they measure, print, write and refuse."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import affmae_kernels.cases
from affmae_cli.main import app
from affmae_engine.bench import child
from tests import toy_operation

SMALL = ("--sizes", "tiny", "--resolutions", "64", "--batch", "2", "--device", "cpu")
RUN = "from affmae_engine.bench.child import main; main()"
STUB = """
import json, os, sys, time
(item,) = json.loads(sys.stdin.readline())["items"]
say = lambda **message: print(json.dumps({"index": 0, **message}), flush=True)
say(event="began")
family = item["case"]["family"]
if family == CRASHES: os.kill(os.getpid(), 11)
if family == HANGS: time.sleep(60)
ms = {"affmae": 2.0, "vit-mae": 5.0}[family]
say(event="ended", result={"status": "ok", "ms": ms, "low_ms": 1.0, "high_ms": 6.0})
"""


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["bench", *args])


def stub_code(crashes: str = "", hangs: str = "") -> str:
    return f"CRASHES, HANGS = {crashes!r}, {hangs!r}\n{STUB}"


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch):
    """stub(crashes=family): children answer at once, without torch."""

    def install(**how: str) -> None:
        monkeypatch.setattr(child, "COMMAND", (sys.executable, "-c", stub_code(**how)))

    install()
    return install


@pytest.mark.slow
def test_the_whole_command_without_a_gpu(tmp_path) -> None:
    result = run("speed", *SMALL, "-o", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "No GPU" in result.stderr and "AFFMAE against ViT-MAE" in result.stdout
    values = json.loads((tmp_path / "results.json").read_text())
    assert values["kind"] == "speed" and values["complete"]
    assert [(r["case"]["task"], r["case"]["family"]) for r in values["results"]] == [
        ("pretrain", "affmae"), ("pretrain", "vit-mae"),
    ]  # fmt: skip
    for record in values["results"]:
        assert record["status"] == "ok", record["note"]
        assert record["ms"] > 0 and record["first_step_s"] > 0
    assert values["ratios"][0]["speed"] > 0 and values["ratios"][0]["memory"] is None
    report = (tmp_path / "report.md").read_text()
    assert "## Cases" in report and "## Circumstances" in report and "| peak GiB |" not in report


def test_bench_alone_is_the_quick_comparison(stub) -> None:
    result = run()
    assert result.exit_code == 0, result.output
    assert "2.50x" in result.stdout


def test_json_alone_on_stdout(stub) -> None:
    result = run("speed", "pretrain", "finetune", "predict", *SMALL, "--families", "vit-mae", "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert [r["case"]["task"] for r in values["results"]] == ["pretrain", "finetune", "predict"]
    assert values["ratios"] == []


def test_a_crash_is_a_row_and_the_same_command_continues(stub, tmp_path) -> None:
    stub(crashes="vit-mae")
    result = run("speed", *SMALL, "-o", str(tmp_path))
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [r["status"] for r in records] == ["ok", "failed"] and "signal 11" in records[1]["note"]
    stub(crashes="affmae")
    result = run("speed", *SMALL, "-o", str(tmp_path), "--compare", str(tmp_path), "--json")
    values = json.loads(result.stdout)
    assert [r["status"] for r in values["results"]] == ["ok", "ok"], "only what failed is measured again"
    assert [change["verdict"] for change in values["changes"]] == ["within the spread", "only now"]


def test_a_limit_stops_between_cases(stub, tmp_path) -> None:
    result = run("speed", *SMALL, "--limit", "0", "-o", str(tmp_path))
    assert result.exit_code == 0 and "2 of 2 cases left" in result.stderr
    values = json.loads((tmp_path / "results.json").read_text())
    assert not values["complete"] and [r["status"] for r in values["results"]] == ["waiting", "waiting"]


def test_ctrl_c_keeps_what_was_measured(tmp_path) -> None:
    code = (
        "import sys\nfrom affmae_engine.bench import child\n"
        f"child.COMMAND = (sys.executable, '-c', {stub_code(hangs='vit-mae')!r})\n"
        "from affmae_cli.main import main\nmain()"
    )
    arguments = ("bench", "speed", *SMALL, "-o", str(tmp_path))
    command = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "results.json").exists():
        assert time.monotonic() < deadline and command.poll() is None
        time.sleep(0.05)
    command.send_signal(signal.SIGINT)
    said = command.communicate(timeout=20)[1]
    assert command.returncode == 130 and "1 of 2 cases left" in said and "Traceback" not in said, said
    values = json.loads((tmp_path / "results.json").read_text())
    assert [r["status"] for r in values["results"]] == ["ok", "waiting"]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch):
    """toy(wrong): the toy operation is the only one, here and in child processes."""
    monkeypatch.setattr(affmae_kernels.cases, "OPERATIONS", ())
    monkeypatch.setitem(sys.modules, f"affmae_kernels.{toy_operation.OPERATION}.cases", None)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))

    def install(wrong: float = 0.0) -> None:
        toy_operation.install(wrong)
        code = f"import tests.toy_operation as toy; toy.install({wrong})\n" + RUN
        monkeypatch.setattr(child, "COMMAND", (sys.executable, "-c", code))

    install()
    return install


def test_kernels(toy, tmp_path) -> None:
    result = run("kernels", "--device", "cpu", "-o", str(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values == json.loads((tmp_path / "results.json").read_text())
    check, timed = values["results"]
    assert check["error"] < 1e-5 and timed["both"]["ms"] > 0
    assert "GB/s" in values["settings"]["measured ceilings"]


def test_a_wrong_operation_ends_with_an_error(toy, tmp_path) -> None:
    toy(wrong=0.01)
    result = run("kernels", "--device", "cpu", "-o", str(tmp_path))
    assert result.exit_code == 1 and "wrong" in result.stdout and "Traceback" not in result.output
    assert f"error: 1 of 1 cases are wrong or do not run, first {toy_operation.OPERATION}, small" in result.stderr
    assert [r["what"] for r in json.loads((tmp_path / "results.json").read_text())["results"]] == ["check"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["speed", "train"], "unknown name 'train'"),
        (["speed", "--sizes", "smal"], "unknown name 'smal'"),
        (["speed", "--sizes", ","], "--sizes is empty"),
        (["speed", "--families", "resnet"], "unknown name 'resnet'"),
        (["speed", "--resolutions", "100"], "multiples of"),
        (["speed", "--resolutions", "32"], "from 64 to 4096"),
        (["speed", "--resolutions", ","], "--resolutions is empty"),
        (["kernels", "conv"], "unknown name 'conv'"),
    ],
)
def test_bad_values_are_one_line(args: list[str], said: str) -> None:
    result = run(*args, "--device", "cpu")
    assert result.exit_code == 2 and result.stdout == ""
    assert said in result.stderr.splitlines()[0] and len(result.stderr.splitlines()) <= 2


@pytest.mark.parametrize("option", ["--kernels", "--quality", "--full"])
def test_options_of_earlier_versions_are_usage_errors(option: str) -> None:
    assert run(option).exit_code == 2


def test_data_that_is_no_dataset(tmp_path) -> None:
    result = run("speed", "--data", str(tmp_path / "none.zarr"), "--device", "cpu")
    assert result.exit_code == 3 and result.stderr.startswith("error: ") and "Traceback" not in result.output


def test_a_file_in_the_way_of_the_folder(tmp_path) -> None:
    (tmp_path / "file").touch()
    result = run("speed", *SMALL, "-o", str(tmp_path / "file"))
    assert result.exit_code == 4 and "Traceback" not in result.output


def test_an_old_result_that_cannot_be_used_is_refused_before_measuring(tmp_path) -> None:
    result = run("speed", "--device", "cpu", "--compare", str(tmp_path / "nowhere.json"))
    assert result.exit_code == 3 and "no such file" in result.stderr
    (tmp_path / "old.json").write_text('{"kind": "kernels", "schema": 3, "results": []}')
    result = run("speed", "--device", "cpu", "--compare", str(tmp_path / "old.json"))
    assert result.exit_code == 3 and "bench kernels" in result.stderr
