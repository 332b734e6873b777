"""The pool of a quality comparison: resuming, processes that die, stopping. A worker of a few lines stands in for
training here; tests/cli/test_bench_quality.py runs the real one."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from affmae_engine.bench import quality_process
from affmae_engine.bench.quality import Lengths, Part, QualityPlan, Speed
from affmae_engine.bench.quality_data import Parts
from affmae_engine.bench.quality_process import card_slots
from affmae_engine.bench.quality_run import QualityRun, speeds_from_json, speeds_to_json
from affmae_engine.config import RunConfig
from affmae_engine.errors import ConfigError, Interrupted, ResourceError
from affmae_engine.train.signals import StopRequest

WORKER = """
import json, os, signal, sys, time
job = json.loads(sys.stdin.readline())
with open(os.path.join(job["runs"], "diary"), "a") as diary:
    say = lambda **message: print(json.dumps(message), flush=True)
    say(event="ready") if os.environ.get("DIE") != "early" else sys.exit("no such card")
    for work in job["work"]:
        part = work["part"]
        fields = ("size", "model", "seed", "init", "fraction")
        stem = f"{part['size']}-{part['model']}-seed{part['seed']}"
        name = stem + ("-pretrain" if part["init"] is None else f"-{part['init']}-{part['fraction']:g}")
        diary.write(f"{'measure ' if work['calibrate_s'] else ''}{name}\\n"); diary.flush()
        say(event="began", name=name)
        if work["calibrate_s"]:
            say(event="ended", name=name, speed={"step_s": 0.5 if part["model"] == "vit-mae" else 0.25})
            continue
        if os.environ.get("DIE") == name: print("it hurts", file=sys.stderr, flush=True); os.kill(os.getpid(), 11)
        if os.environ.get("HANG") == name: time.sleep(60)
        say(event="step", name=name, step=5, total=10)
        stage = "pretrain" if part["init"] is None else "finetune"
        if stage == "pretrain":
            os.makedirs(os.path.join(job["runs"], name))
            open(os.path.join(job["runs"], name, "weights.safetensors"), "w")
        result = {**part, "stage": stage, "status": "ok", "steps": work["config"]["train"]["steps"], "seconds": 1.0}
        say(event="ended", name=name, result={**result, "miou": None if stage == "pretrain" else 0.5})
        if os.environ.get("GIVE_UP") == name: sys.exit()
"""


@pytest.fixture
def plan() -> QualityPlan:
    configs = {("tiny", task): RunConfig() for task in ("pretrain", "finetune")}
    return QualityPlan(("tiny",), (0, 1), (0.5, 1.0), 10.0, 50.0, configs)


class FakeStore:
    path = Path("store")


@pytest.fixture
def make_run(tmp_path, plan, monkeypatch: pytest.MonkeyPatch):
    """make_run(**fields of QualityRun) -> one with the short worker."""
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(quality_process, "COMMAND", (sys.executable, str(tmp_path / "worker.py")))

    def make(**fields) -> QualityRun:
        given = {
            "plan": plan, "folder": tmp_path, "store": FakeStore(), "parts": Parts((), (), ()), "slots": [{}],
            "commit": lambda progress: None, "look": lambda progress: None, "stop": StopRequest(),
        }  # fmt: skip
        return QualityRun(**{**given, **fields})

    return make


def diary(folder: Path) -> list[str]:
    return (folder / "runs" / "diary").read_text().split("\n")[:-1]


def statuses(progress) -> dict[str, str]:
    return {part.name: result.status for part, result in progress.results.items()}


def test_everything_is_measured_then_trained(make_run, tmp_path, plan) -> None:
    commits = []
    run = make_run(commit=lambda progress: commits.append(sum(r.status == "ok" for r in progress.results.values())))
    progress = run.run()
    assert set(statuses(progress).values()) == {"ok"} and len(progress.results) == 20
    assert progress.lengths == Lengths({("tiny", "affmae"): 40, ("tiny", "vit-mae"): 20}, {"tiny": 100})
    lines = diary(tmp_path)
    assert lines[:4] == [
        f"measure tiny-{m}-seed0-{what}" for m in ("affmae", "vit-mae") for what in ("pretrain", "scratch-1")
    ]
    assert lines[4:] == [part.name for part in plan.parts()]
    assert commits == [*range(21), 20], "results are written after every part"
    assert progress.eta_s == 0 and progress.expected_s > 4 * 10


def test_two_slots_share_the_work(make_run, tmp_path) -> None:
    progress = make_run(slots=[{"CARD": "0"}, {"CARD": "1"}]).run()
    assert set(statuses(progress).values()) == {"ok"}
    assert sorted(diary(tmp_path)[4:]) == sorted(part.name for part in progress.results)


def test_a_process_that_dies_costs_one_part(make_run, tmp_path) -> None:
    progress = make_run(slots=[{"DIE": "tiny-vit-mae-seed0-pretrained-1"}]).run()
    found = statuses(progress)
    assert [name for name, status in found.items() if status != "ok"] == ["tiny-vit-mae-seed0-pretrained-1"]
    note = progress.results[Part("tiny", "vit-mae", 0, "pretrained", 1.0)].note
    assert note == "the process died (signal 11): it hurts"
    assert diary(tmp_path).count("tiny-vit-mae-seed0-pretrain") == 1, "the pretraining is not repeated"


def test_a_process_that_gives_up_is_followed_by_another(make_run, tmp_path) -> None:
    progress = make_run(slots=[{"GIVE_UP": "tiny-vit-mae-seed0-pretrain"}]).run()
    assert set(statuses(progress).values()) == {"ok"}
    assert sorted(diary(tmp_path)[4:]) == sorted(part.name for part in progress.results), "nothing is done twice"


def test_a_process_that_never_gets_ready_fails_its_work_once(make_run) -> None:
    progress = make_run(slots=[{"DIE": "early"}]).run()
    assert set(statuses(progress).values()) == {"failed"}
    assert {r.note for r in progress.results.values()} == {"the process died (exit code 1): no such card"}


def test_finished_parts_are_taken_over(make_run, tmp_path, plan) -> None:
    first = make_run().run()
    before = len(diary(tmp_path))
    lost = Part("tiny", "affmae", 1, "pretrained", 0.5)
    kept = {part: result for part, result in first.results.items() if part != lost}
    again = make_run(speeds=first.speeds, lengths=first.lengths, results=kept).run()
    assert diary(tmp_path)[before:] == [lost.name]
    assert again.results == first.results
    (tmp_path / "runs" / "tiny-affmae-seed1-pretrain" / "weights.safetensors").unlink()
    (tmp_path / "runs" / "tiny-affmae-seed1-pretrain").rmdir()
    make_run(speeds=first.speeds, lengths=first.lengths, results=kept).run()
    assert diary(tmp_path)[before + 1 :] == ["tiny-affmae-seed1-pretrain", lost.name], "weights are made again"


def test_more_seeds_can_be_added_later(make_run, tmp_path, plan) -> None:
    first = make_run().run()
    before = len(diary(tmp_path))
    larger = QualityPlan(plan.sizes, (0, 1, 2), plan.fractions, plan.budget_s, plan.finetune_budget_s, plan.configs)
    make_run(plan=larger, speeds=first.speeds, lengths=first.lengths, results=first.results).run()
    assert {line.split("-seed")[1][0] for line in diary(tmp_path)[before:]} == {"2"}


def test_a_model_that_cannot_be_trained_is_rows(make_run, tmp_path, plan) -> None:
    speeds = {("tiny", m, task): Speed(0.1) for m in ("affmae", "vit-mae") for task in ("pretrain", "finetune")}
    for task in ("pretrain", "finetune"):
        speeds["tiny", "vit-mae", task] = Speed(None, status="out of memory", note="too large")
    progress = make_run(speeds=speeds).run()
    found = {part: (r.status, r.note) for part, r in progress.results.items()}
    assert {v for part, v in found.items() if part.model == "vit-mae"} == {("out of memory", "too large")}
    assert {v[0] for part, v in found.items() if part.model == "affmae"} == {"ok"}
    assert not any("vit-mae" in line for line in diary(tmp_path))


def test_stopping_ends_the_process_and_keeps_what_is_done(make_run, tmp_path) -> None:
    stop, seen = StopRequest(), []

    def look(progress) -> None:
        seen[:] = [dict(statuses(progress))]
        if "tiny-affmae-seed0-scratch-1" in progress.running:
            stop.request()

    begun = time.monotonic()
    with pytest.raises(Interrupted, match="finished parts are kept"):
        make_run(slots=[{"HANG": "tiny-affmae-seed0-scratch-1"}], stop=stop, look=look).run()
    assert time.monotonic() - begun < 20, "the sleeping process was ended"
    assert [name for name, status in seen[0].items() if status == "ok"] == [
        "tiny-affmae-seed0-pretrain", "tiny-affmae-seed0-pretrained-1", "tiny-affmae-seed0-pretrained-0.5",
    ]  # fmt: skip
    assert not [t for t in threading.enumerate() if t is not threading.main_thread() and "_serve" in t.name]


def test_results_that_cannot_be_written_end_it(make_run) -> None:
    def full(progress) -> None:
        if any(result.status == "ok" for result in progress.results.values()):
            raise ResourceError("the disk is full")

    with pytest.raises(ResourceError, match="the disk is full"):
        make_run(commit=full).run()


def test_a_short_budget_is_refused_before_training(make_run, tmp_path, plan) -> None:
    short = QualityPlan(plan.sizes, plan.seeds, plan.fractions, 1.0, 5.0, plan.configs)
    with pytest.raises(ConfigError, match="--budget 1s allows 4 steps of pretraining affmae tiny"):
        make_run(plan=short).run()
    assert all(line.startswith("measure") for line in diary(tmp_path))


def test_speeds_survive_json() -> None:
    speeds = {("tiny", "affmae", "pretrain"): Speed(0.5, 1.0, 8), ("tiny", "vit-mae", "pretrain"): Speed(None)}
    found = speeds_from_json(speeds_to_json(speeds))
    assert found == {("tiny", "affmae", "pretrain"): Speed(0.5, 1.0, 8)}, "what failed is tried again"


def test_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    assert card_slots("cpu") == ([{}], False)
    Card = type("Card", (), {})

    def cards(*names: str):
        made = []
        for index, name in enumerate(names):
            card = Card()
            card.index, card.name = index, name
            made.append(card)
        return lambda: made

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(quality_process, "find_cards", cards("H100", "H100"))
    slots, mixed = card_slots("cuda")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["0", "1"] and not mixed
    assert {slot["LOCAL_WORLD_SIZE"] for slot in slots} == {"2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    monkeypatch.setattr(quality_process, "find_cards", cards("H100", "T4", "H100"))
    slots, mixed = card_slots("cuda")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["3", "6"] and mixed


def test_a_worker_ends_when_its_comparison_is_gone() -> None:
    code = (
        "import sys, time; from affmae_engine.bench.lifeline import end_with_parent; sys.stdin.readline(); "
        "end_with_parent(sys.stdin); print('waiting', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("a job\n")
    process.stdin.flush()
    assert process.stdout.readline() == "waiting\n" and process.poll() is None
    process.stdin.close()
    assert process.wait(20) == 1
