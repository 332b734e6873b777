"""A quality comparison in the terminal: the table that fills in, and the lines where there is no terminal."""

import io

import pytest
from rich.console import Console

from affmae_cli import output, quality_view
from affmae_engine.bench.quality import Lengths, Part, PartResult, QualityPlan, Speed
from affmae_engine.bench.quality_run import Progress
from affmae_engine.config import RunConfig


@pytest.fixture
def plan() -> QualityPlan:
    configs = {("base", task): RunConfig() for task in ("pretrain", "finetune")}
    return QualityPlan(("base",), (0, 1, 2), (0.1, 0.25, 1.0), 60.0, 20.0, configs)


@pytest.fixture
def progress(plan: QualityPlan) -> Progress:
    """One chain done but for a failure, another one running."""
    made = Progress("training", results={part: PartResult.of(part) for part in plan.parts()}, eta_s=150.0)
    made.lengths = Lengths({("base", "affmae"): 812, ("base", "vit-mae"): 200}, {"base": 90})
    made.speeds = {("base", m, t): Speed(0.1) for m in ("affmae", "vit-mae") for t in ("pretrain", "finetune")}
    made.expected_s = 300.0
    for part in plan.chains()[0]:
        result = made.results[part]
        result.status, result.steps, result.train_s, result.startup_s = "ok", 812, 61.0, 1.0
        result.miou = None if part.init is None else 0.25 + (part.fraction or 0)
    failed = made.results[Part("base", "affmae", 0, "scratch", 0.1)]
    failed.status, failed.note, failed.miou = "out of memory", "80 GiB", None
    made.running["base-vit-mae-seed0-pretrain"] = (50, 200)
    return made


def test_the_table_fits_a_terminal_and_says_where_things_stand(plan, progress) -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(quality_view.board(plan, progress))
    text = console.file.getvalue()
    lines = [line for line in text.splitlines() if "AFFMAE" in line or "ViT-MAE" in line]
    assert len(lines) == 6 and max(map(len, text.splitlines())) <= 80
    assert "812" in lines[0] and "0.350" in lines[0] and "1.250" in lines[0] and "…" not in text
    assert "25%" in lines[1], "a quarter of its steps are done"
    assert "memory" in text and "7/42 trainings  eta 2m30s" in text


def test_lines_say_each_thing_once(plan, progress, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(output, "say", lambda text, **_: said.append(text))
    with quality_view.watching(plan, 2) as look:
        look(progress)
        look(progress)
    assert said[:4] == [
        "AFFMAE base: 812 pretraining steps of 100 ms in 1m00s",
        "ViT-MAE base: 200 pretraining steps of 100 ms in 1m00s",
        "finetuning base: 90 steps, both models",
        "35 trainings to do, 2 at a time: about 5m00s",
    ]
    assert "AFFMAE base, seed 0, pretraining: 812 steps in 60.0s" in said[4]
    assert "AFFMAE base, seed 0, from scratch, 10% of the labels: out of memory (80 GiB)  eta 2m30s" in said
    assert len(said) == 4 + 7


def test_what_was_finished_earlier_is_not_told_again(plan, progress, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(output, "say", lambda text, **_: said.append(text))
    progress.stage = "calibration"
    with quality_view.watching(plan, 1) as look:
        look(progress)
    assert said[0] == "6 of 42 parts were finished earlier and are taken over"
    assert len(said) == 2, "only the failure is told, which will be tried again"
    said.clear()
    with quality_view.watching(plan, 1, quiet=True) as look:
        look(progress)
    assert said == []
