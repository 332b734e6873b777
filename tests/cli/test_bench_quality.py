"""`affmae bench quality` end to end on the phantom: what it writes, how it continues, what it refuses; its options."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from affmae_cli.bench_quality import label_fractions, make_plan, seconds
from affmae_cli.main import app
from affmae_engine.bench import quality, quality_run
from affmae_engine.data.phantom import generate, write_tiff
from affmae_engine.errors import ConfigError

pytestmark = pytest.mark.slow
TINY = {
    "AFFMAE_DATA__CROP_SIZE": "32", "AFFMAE_DATA__WORKERS": "0", "AFFMAE_TRAIN__BATCH_SIZE": "2",
    "AFFMAE_TRAIN__MICRO_BATCH": "2", "AFFMAE_FINETUNE__CLASS_NAMES": '["a", "b", "c", "d", "e"]',
}  # fmt: skip


def bench(*args: object, env: dict[str, str] | None = None):
    return CliRunner().invoke(app, ["bench", *map(str, args)], env=TINY | (env or {}))


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """Calibrations and budgets of a fraction of a second, on any machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(quality, "FEWEST_STEPS", {"pretrain": 1, "finetune": 1})
        patch.setattr(quality_run, "SHORTEST_CALIBRATION_S", 0.1)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and a finished comparison of one seed in `out`, with what it printed beside it."""
    folder = tmp_path_factory.mktemp("quality")
    write_tiff(generate((10, 48, 48), seed=25), folder / "images.tif", folder / "labels.tif")
    done = bench(*command(folder))
    assert done.exit_code == 0, done.output
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder


def command(folder: Path, *, budget: str = "0.5s", out: str = "out") -> list[object]:
    return [
        "quality", "--images", folder / "images.tif", "--labels", folder / "labels.tif", "--budget", budget,
        "--finetune-budget", "0.25s", "--seeds", 1, "--label-fractions", "", "--preset", "demo", "--device", "cpu",
        "-o", folder / out,
    ]  # fmt: skip


def test_report_results_and_chart(finished: Path) -> None:
    values = json.loads((finished / "out" / "results.json").read_text())
    assert values["kind"] == "quality" and values["complete"]
    assert len(values["results"]) == 2 * (1 + 2)
    assert {record["status"] for record in values["results"]} == {"ok"}
    tuned = [record for record in values["results"] if record["stage"] == "finetune"]
    assert all(0 <= record["miou"] <= 1 and set(record["per_class"]) == set("abcde") for record in tuned)
    assert {record["sections"] for record in tuned} == {7}
    assert len({record["steps"] for record in tuned}) == 1, "both models are finetuned for equal steps"
    for model in ("affmae", "vit-mae"):
        (taken,) = [record for record in values["times"] if record["model"] == model]
        (speed,) = [s["speed"] for s in values["speeds"] if (s["model"], s["task"]) == (model, "pretrain")]
        assert taken["steps"] == int(0.5 / speed["step_s"]), "the budget by the measured speed"
        assert taken["seconds"]["mean"] > 0
    assert values["data"]["test_sections"] == 2 and values["data"]["train_sections"] == 7
    with Image.open(finished / "out" / "label-efficiency.png") as chart:
        chart.verify()
    report = (finished / "out" / "report.md").read_text()
    assert "label-efficiency.png" in report and "No GPU" in report and "Mean IoU" in report
    assert "Mean IoU on the test part" in (finished / "stdout").read_text()
    said = (finished / "stderr").read_text()
    assert "measuring how fast each model trains" in said and "6 trainings to do" in said
    assert said.count("mean IoU") == 4 and "Traceback" not in said


def test_the_same_command_continues_where_it_stopped(finished: Path) -> None:
    path = finished / "out" / "results.json"
    before = json.loads(path.read_text())
    lost = next(
        r for r in before["results"] if (r["model"], r["init"], r["fraction"]) == ("vit-mae", "pretrained", 1.0)
    )
    interrupted = json.loads(path.read_text())
    interrupted["results"] = [r if r != lost else {**r, "status": "running", "miou": None} for r in before["results"]]
    path.write_text(json.dumps(interrupted))
    done = bench(*command(finished), "--json")
    assert done.exit_code == 0, done.output
    assert "5 of 6 parts were finished earlier" in done.stderr and done.stderr.count("mean IoU") == 1
    after = json.loads(done.stdout)
    scores = {name: [r["miou"] for r in values["results"]] for name, values in (("a", before), ("b", after))}
    assert scores["a"] == scores["b"], "the part that was lost came out as before, the others were kept"
    assert after["speeds"] == before["speeds"] and after["complete"]

    again = bench(*command(finished), "--compare", finished / "out")
    assert again.exit_code == 0, again.output
    assert "no spread known" in again.stdout and "better" not in again.stdout


def test_other_settings_are_another_comparison(finished: Path) -> None:
    before = (finished / "out" / "results.json").read_bytes()
    other = bench(*command(finished, budget="3s"))
    assert other.exit_code == 2 and "a comparison with other --budget" in other.stderr
    other = bench(*command(finished), "--set", "optim.lr=0.5")
    assert other.exit_code == 2 and ", is 0.5 now" in other.stderr and "optim.lr was" in other.stderr
    assert (finished / "out" / "results.json").read_bytes() == before
    values = json.loads(before)
    for record in values["results"]:
        record["seed"] = 7
    shutil.copytree(finished / "out" / "data.zarr", finished / "more" / "data.zarr")
    (finished / "more" / "results.json").write_text(json.dumps(values))
    other = bench(*command(finished, out="more"))
    assert other.exit_code == 2 and "6 finished trainings that were not asked for" in other.stderr
    (finished / "more" / "results.json").write_text("{")
    other = bench(*command(finished, out="more"))
    assert other.exit_code == 2 and "cannot be read" in other.stderr
    (finished / "thesis").mkdir()
    (finished / "thesis" / "chapter.txt").write_text("years of work")
    other = bench(*command(finished, out="thesis"))
    assert other.exit_code == 2 and "holds other files (chapter.txt)" in other.stderr


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ([], 2, "--images"),
        (["--images", "nowhere"], 2, "--labels"),
        (["--images", "nowhere", "--labels", "nowhere", "--preset", "demo"], 3, "nowhere"),
        (["--images", "i", "--labels", "l", "--compare", "nowhere.json"], 3, "no such file: nowhere.json"),
    ],
)
def test_what_is_refused(args, code, said, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["bench", "quality", *args])
    assert done.exit_code == code and said in done.stderr and done.stdout == ""
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30s", 30), ("10m", 600), ("1h", 3600), ("1.5m", 90), (" 2H ", 7200), ("1h30m", 5400), ("1m5s", 65)],
)
def test_durations(text: str, expected: float) -> None:
    assert seconds("--budget", text) == expected


@pytest.mark.parametrize("text", ["", "10", "ten", "0s", "-5s", "5 m x", "5d", "m", "1m1m", "5s1h", "1e3s", "nan"])
def test_wrong_durations(text: str) -> None:
    with pytest.raises(ConfigError, match="--budget must be a duration"):
        seconds("--budget", text)


def test_fractions() -> None:
    assert label_fractions("0.25,0.1") == (0.1, 0.25, 1.0)
    assert label_fractions("1, 0.5,0.5") == (0.5, 1.0)
    assert label_fractions("") == (1.0,)
    for wrong in ("0", "1.1", "a", "-0.5", "nan", "10%"):
        with pytest.raises(ConfigError, match="--label-fractions must be numbers"):
            label_fractions(wrong)


def plan(**changes):
    given = {
        "budget": "10m", "finetune_budget": None, "seeds": 3, "fractions": "0.1", "preset": "demo", "config": None,
        "overrides": [], "device": "cpu",
    }  # fmt: skip
    return make_plan(**{**given, **changes})


def test_a_plan_from_options() -> None:
    made = plan(overrides=["optim.lr=0.003"])
    assert made.seeds == (0, 1, 2) and made.fractions == (0.1, 1.0)
    assert (made.budget_s, made.finetune_budget_s) == (600, 150)
    assert {config.optim.lr for config in made.configs.values()} == {0.003}
    assert plan(finetune_budget="20s").finetune_budget_s == 20


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": "soon"}, "--budget must be"),
        ({"finetune_budget": "1"}, "--finetune-budget must be"),
        ({"overrides": ["train.steps=5"]}, "decide the steps"),
        ({"overrides": ["train.seed=5"]}, "--seeds decides"),
        ({"overrides": ["model.family=vit-mae"]}, "both families are trained"),
        ({"overrides": ["model.depths=[1, 1, 1, 1]"]}, "ViT-MAE has only"),
        ({"overrides": ["optim.lrr=1"]}, "optim.lrr"),
        ({"preset": "nope"}, "nope"),
    ],
)
def test_plans_that_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(**changes)
    assert said in caught.value.message
