"""`affmae bench`: what it prints, writes and refuses."""

import json

import pytest
import torch
from typer.testing import CliRunner

from affmae_cli import bench_plan
from affmae_cli.main import app
from affmae_engine.bench import kernel_cases, step

SMALL = ("--resolutions", "64", "--batch", "2", "--device", "cpu")


def run(*args: str):
    return CliRunner().invoke(app, ["bench", *args])


def plan(**options) -> bench_plan.Plan:
    empty = {
        "sizes": None, "resolutions": None, "batch": "auto", "dtype": "auto", "device": "cpu", "quick": False,
        "steps": None, "models": "affmae,vit-mae", "vit": "compile", "operations": None, "out": None,
    }  # fmt: skip
    return bench_plan.make_plan(**{**empty, **options})


def test_steps_on_a_cpu(tmp_path) -> None:
    result = run(*SMALL, "--steps", "2", "-o", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert "affmae" in result.stdout and "vit-mae" in result.stdout
    assert "No card" in result.stderr and "tiny model" in result.stderr
    values = json.loads((tmp_path / "out" / "results.json").read_text())
    assert values["kind"] == "steps" and [r["status"] for r in values["results"]] == ["ok", "ok"]
    assert values["ratios"][0]["speed"] > 0 and values["gate"]["cases"] > 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "AFFMAE against ViT-MAE" in text and "No card" in text


def test_steps_as_json() -> None:
    result = run(*SMALL, "--steps", "1", "--models", "vit-mae", "--ops", "nearest_table", "--json", "-q")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["results"][0]["model"] == "vit-mae" and values["ratios"] == []
    assert values["mask_ratio"] == 0.5 and values["merge_keep"] == 0.4 and "torch" in values["versions"]
    assert result.stderr == ""


def test_kernels(tmp_path) -> None:
    result = CliRunner().invoke(
        app, ["benchmark", "--kernels", "--quick", *SMALL, "--ops", "token_merging", "-o", str(tmp_path), "--json"]
    )
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values == json.loads((tmp_path / "results.json").read_text())
    assert {r["op"] for r in values["results"]} == {"token_merging"}
    assert all(r["both"]["ms"] > 0 and r["worst_error"] < 1e-4 for r in values["results"])
    assert "token_merging" in (tmp_path / "report.md").read_text()


def test_a_profile_is_shown() -> None:
    result = run(*SMALL, "--steps", "1", "--models", "vit-mae", "--ops", "nearest_table", "--profile")
    assert result.exit_code == 0, result.output
    assert "dense attention" in result.stdout


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
def test_a_red_gate_prevents_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "measure_step", lambda *args, **options: pytest.fail("timed in spite of a red gate"))
    result = run(*SMALL, "--json")
    assert result.exit_code == 1 and result.stdout == ""
    assert "error: 3 of" in result.stderr and "token_merging" in result.stderr


def test_one_side_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB")

    monkeypatch.setattr(step, "_vit_mae", full)
    result = run(*SMALL, "--steps", "1", "--ops", "nearest_table", "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert [r["status"] for r in values["results"]] == ["ok", "out of memory"]
    assert values["results"][1]["ms"] is None and values["ratios"][0]["speed"] is None
    table = run(*SMALL, "--steps", "1", "--ops", "nearest_table").stdout
    assert "out of memory" in table


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
        (["--vit", "fast"], "unknown name 'fast'"),
        (["--models", "resnet"], "unknown name 'resnet'"),
        (["--ops", "conv"], "unknown name 'conv'"),
    ],
)
def test_bad_values_are_one_line(args: list[str], said: str) -> None:
    result = run(*args, "--device", "cpu")
    assert result.exit_code == 2 and result.stdout == ""
    assert said in result.stderr.splitlines()[0] and len(result.stderr.splitlines()) <= 2


def test_a_file_in_the_way_of_the_folder(tmp_path) -> None:
    (tmp_path / "file").touch()
    result = run(*SMALL, "-o", str(tmp_path / "file"))
    assert result.exit_code == 4 and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("size", "edge", "batch"), [("base", 512, 32), ("small", 512, 64), ("base", 1024, 8), ("small", 1024, 8)]
)
def test_default_batches(size: str, edge: int, batch: int) -> None:
    assert bench_plan.default_batch(size, edge) == batch


def test_defaults_without_a_card() -> None:
    made = plan()
    assert [(c.size, c.resolution, c.batch) for c in made.cases] == [("tiny", 128, 2)] * 2
    made = plan(sizes="small,base", resolutions="512,1024", batch="4")
    assert len(made.cases) == 8 and {c.batch for c in made.cases} == {4}
    assert {s.batch for s in made.gate_settings} == {2}
