"""Which cases there are, and continuing a comparison; the children are stubs without torch."""

import json
import sys
from dataclasses import asdict

import pytest

from affmae_engine.bench import child
from affmae_engine.bench.child import Children
from affmae_engine.bench.networks import Measurement, SpeedCase
from affmae_engine.bench.speed import SpeedPlan, SpeedRun, cases_of, figures_of, ratios_of, tables_of
from affmae_engine.config import TrainConfig
from affmae_engine.runtime.device import pick_device

CPU = pick_device(TrainConfig(device="cpu"))
FAMILIES = ["affmae", "vit-mae"]
ABOUT = {"device": "a GPU", "versions": {"torch": "2.13.0"}, "git": {"commit": "abc", "modified": False}}

CHILD = """
import json, os, sys
(item,) = json.loads(sys.stdin.readline())["items"]
say = lambda **message: print(json.dumps({"index": 0, **message}), flush=True)
say(event="began")
case = item["case"]
if case["family"] == CRASHES: os.kill(os.getpid(), 11)
ms = {"affmae": 10.0, "vit-mae": 45.0}[case["family"]]
cold = "TRITON_CACHE_DIR" in os.environ and not os.path.exists(os.environ["TRITON_CACHE_DIR"])
say(event="ended", result={"status": STATUS, "ms": ms, "low_ms": ms - 1, "high_ms": ms + 1, "how": f"cold {cold}",
                           "allocated_gib": 2.0 if case["family"] == "affmae" else 8.0})
"""


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch):
    """stub(crashes=family, status="ok"): children answer like this."""

    def install(crashes: str = "", status: str = "ok") -> None:
        code = f"CRASHES, STATUS = {crashes!r}, {status!r}\n{CHILD}"
        monkeypatch.setattr(child, "COMMAND", (sys.executable, "-c", code))

    install()
    return install


def plan(tasks=("pretrain", "predict"), **fields) -> SpeedPlan:
    cases = cases_of(tasks, ["small"], [512], FAMILIES, ["trainer"], batch=4, memory_gib=0.0)
    return SpeedPlan(cases, CPU, **fields)


def measure(run: SpeedRun, **limits) -> list[str]:
    with Children(30) as children:
        return [case.name for case in run.run(children, **limits)]


def test_the_families_of_a_row_follow_each_other() -> None:
    cases = cases_of(["pretrain", "finetune"], ["base", "small"], [512, 1024], FAMILIES, ["trainer"], batch=None,
                     memory_gib=140.0)  # fmt: skip
    assert len(cases) == 16 and len({case.name for case in cases}) == 16
    for ours, theirs in zip(cases[::2], cases[1::2], strict=True):
        assert ours.row == theirs.row and (ours.family, theirs.family) == ("affmae", "vit-mae")


@pytest.mark.parametrize(
    ("task", "size", "resolution", "protocol", "memory", "batch"),
    [
        ("pretrain", "base", 512, "trainer", 140.0, 32),
        ("pretrain", "base", 1024, "trainer", 140.0, 8),
        ("pretrain", "small", 512, "trainer", 140.0, 64),
        ("pretrain", "small", 1024, "trainer", 140.0, 8),
        ("finetune", "base", 1024, "trainer", 140.0, 8),
        ("predict", "base", 512, "trainer", 140.0, 32),
        ("finetune", "base", 1024, "paper", 140.0, 4),
        ("pretrain", "base", 512, "trainer", 24.0, 16),
        ("pretrain", "base", 1024, "trainer", 6.0, 1),
    ],
)
def test_default_batches(task, size, resolution, protocol, memory, batch) -> None:
    (case,) = cases_of([task], [size], [resolution], ["affmae"], [protocol], batch=None, memory_gib=memory)
    assert case.batch == batch


def test_finished_cases_are_kept_and_the_rest_is_measured(stub, tmp_path) -> None:
    first = SpeedRun(plan(), ABOUT, tmp_path)
    begun = []
    with Children(30) as children:
        cases = first.run(children, begin=begun.append)
        assert next(cases) == begun[0] == plan().cases[0]
        cases.close()
    second = SpeedRun(plan(), ABOUT, tmp_path)
    assert len(second.waiting) == 3
    assert len(measure(second)) == 3 and not second.waiting
    assert SpeedRun(plan(), ABOUT, tmp_path).results == second.results


def test_nothing_starts_after_the_limit(stub, tmp_path) -> None:
    run = SpeedRun(plan(), ABOUT, tmp_path)
    assert measure(run, limit_s=0.0) == [] and len(run.waiting) == 4


@pytest.mark.parametrize(
    "changed", [{"device": "another GPU"}, {"versions": {"torch": "2.14.0"}}, {"git": {"commit": "def"}}]
)
def test_results_of_other_circumstances_are_not_taken_over(stub, tmp_path, changed) -> None:
    measure(SpeedRun(plan(), ABOUT, tmp_path))
    assert len(SpeedRun(plan(), {**ABOUT, **changed}, tmp_path).waiting) == 4
    assert len(SpeedRun(plan(profile=True), ABOUT, tmp_path).waiting) == 4, "the profile is missing"


def test_a_crash_is_a_row_and_is_tried_again(stub, tmp_path) -> None:
    stub(crashes="vit-mae")
    run = SpeedRun(plan(), ABOUT, tmp_path)
    measure(run)
    assert [found.status for found in run.results.values()] == ["ok", "failed", "ok", "failed"]
    assert ratios_of(run.results) == []
    text = "\n".join(table.markdown() for table in tables_of(run.results))
    assert "signal 11" in text
    assert [case.family for case in SpeedRun(plan(), ABOUT, tmp_path).waiting] == ["vit-mae", "vit-mae"]
    for file in (tmp_path / "cases").iterdir():
        file.write_text("{")
    assert len(SpeedRun(plan(), ABOUT, tmp_path).waiting) == 4, "a damaged file is no result"


def test_out_of_memory_is_final(stub, tmp_path) -> None:
    stub(status="out of memory")
    measure(SpeedRun(plan(), ABOUT, tmp_path))
    assert SpeedRun(plan(), ABOUT, tmp_path).waiting == []


def test_cold_cases_get_empty_caches(stub) -> None:
    run = SpeedRun(plan(("pretrain",), cold=True), ABOUT)
    measure(run)
    assert {found.how for found in run.results.values()} == {"cold True"}


def test_ratios_and_figures() -> None:
    ours, theirs = (SpeedCase("pretrain", family, "base", 512, 32) for family in FAMILIES)
    results = {
        ours: Measurement("ok", ms=10.0, low_ms=9.0, high_ms=12.0, allocated_gib=2.0),
        theirs: Measurement("ok", ms=45.0, low_ms=44.0, high_ms=48.0, allocated_gib=8.0),
    }
    (ratio,) = ratios_of(results)
    assert (ratio["speed"], ratio["memory"]) == (4.5, 0.25)
    assert (ratio["speed_low"], ratio["speed_high"]) == (44 / 12, 48 / 9)
    assert {(f.metric, f.value) for f in figures_of(results)} == {
        ("step", 10.0), ("step", 45.0), ("peak memory", 2.0), ("peak memory", 8.0),
    }  # fmt: skip
    text = tables_of(results)[0].markdown()
    assert "4.50x" in text and "3.67 to 5.33" in text
    assert Measurement(**json.loads(json.dumps(asdict(results[ours])))) == results[ours]
