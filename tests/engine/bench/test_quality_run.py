"""Running a quality comparison: resuming, children that die, stopping. A child of a few lines stands in for training
here; tests/cli/test_bench_quality.py runs the real one."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from affmae_engine.bench import child, quality_run
from affmae_engine.bench.quality import Lengths, Part, QualityPlan, Speed
from affmae_engine.bench.quality_data import Parts, Sources
from affmae_engine.bench.quality_run import Earlier, QualityRun, gpu_slots, identity, read_earlier, refuse_narrower
from affmae_engine.config import RunConfig
from affmae_engine.errors import ConfigError, Interrupted, ResourceError
from affmae_engine.runtime.signals import StopRequest

CHILD = """
import json, os, sys, time
request = json.loads(sys.stdin.readline())
if os.environ.get("DIE") == "early": sys.exit("no such GPU")
say = lambda **message: print(json.dumps(message), flush=True)
for index, item in enumerate(request["items"]):
    part = item["part"]
    tail = "pretrain" if part["init"] is None else f"{part['init']}-{part['fraction']:g}"
    name = f"{part['model']}-seed{part['seed']}-{tail}"
    with open(os.path.join(item["runs"], "diary"), "a") as diary:
        diary.write(f"{'measure ' if item['calibrate_s'] else ''}{name}\\n")
    say(event="began", index=index)
    if item["calibrate_s"]:
        speed = {"step_s": 0.5 if part["model"] == "vit-mae" else 0.25}
        say(event="ended", index=index, result={"status": "ok", "speed": speed})
        continue
    if os.environ.get("DIE") == name: print("it hurts", file=sys.stderr, flush=True); os.kill(os.getpid(), 11)
    if os.environ.get("HANG") == name: time.sleep(60)
    stage = "pretrain" if part["init"] is None else "finetune"
    if stage == "pretrain":
        os.makedirs(os.path.join(item["runs"], name))
        open(os.path.join(item["runs"], name, "weights.safetensors"), "w")
    scores = {"held_out_loss": 0.5} if stage == "pretrain" else {"miou": 0.5}
    result = {**part, "stage": stage, "status": "ok", "steps": item["config"]["train"]["steps"], **scores}
    say(event="ended", index=index, result={"status": "ok", "result": result})
    if os.environ.get("GIVE_UP") == name: sys.exit()
"""
SOURCES = Sources(("images",), ("labels",))
ABOUT = {"device": "a GPU", "versions": {"torch": "2.13.0"}}


def make_plan(seeds=(0, 1), fractions=(0.5, 1.0), budget_s=10.0, lr=1e-3) -> QualityPlan:
    config = RunConfig.model_validate({"optim": {"lr": lr}})
    return QualityPlan(seeds, fractions, budget_s, 50.0, {"pretrain": config, "finetune": config})


class FakeStore:
    path = Path("store")


@pytest.fixture
def make_run(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """make_run(**fields of QualityRun) -> one with the short child."""
    monkeypatch.setattr(child, "COMMAND", (sys.executable, "-c", CHILD))

    def make(**fields) -> QualityRun:
        given = {
            "plan": make_plan(), "folder": tmp_path, "store": FakeStore(), "parts": Parts((), (), ()), "slots": [{}],
            "commit": lambda run: None, "say": lambda text: None, "stop": StopRequest(),
        }  # fmt: skip
        return QualityRun(**{**given, **fields})

    return make


def finished(run: QualityRun) -> QualityRun:
    run.run()
    return run


def diary(folder: Path) -> list[str]:
    return (folder / "runs" / "diary").read_text().split("\n")[:-1]


def statuses(run: QualityRun) -> dict[str, str]:
    return {part.name: result.status for part, result in run.results.items()}


def left_by(run: QualityRun, *without: Part) -> Earlier:
    kept = {part: result for part, result in run.results.items() if part not in without}
    return Earlier(run.speeds, run.lengths, kept)


def test_everything_is_measured_then_trained(make_run, tmp_path) -> None:
    commits = []
    run = finished(make_run(commit=lambda run: commits.append(sum(r.status == "ok" for r in run.results.values()))))
    assert set(statuses(run).values()) == {"ok"} and len(run.results) == 20 and run.complete
    assert run.lengths == Lengths({"affmae": 40, "vit-mae": 20}, 100)
    lines = diary(tmp_path)
    assert lines[:4] == [
        f"measure {m}-seed0-{what}" for m in ("affmae", "vit-mae") for what in ("pretrain", "scratch-1")
    ]
    assert lines[4:] == [part.name for part in make_plan().parts()]
    assert commits == [*range(21), 20], "results are written after every part"


def test_two_slots_share_the_work(make_run, tmp_path) -> None:
    run = finished(make_run(slots=[{"GPU": "0"}, {"GPU": "1"}]))
    assert set(statuses(run).values()) == {"ok"}
    assert sorted(diary(tmp_path)[4:]) == sorted(part.name for part in run.results)


def test_a_child_that_dies_costs_one_part(make_run, tmp_path) -> None:
    run = finished(make_run(slots=[{"DIE": "vit-mae-seed0-pretrained-1"}]))
    assert [name for name, status in statuses(run).items() if status != "ok"] == ["vit-mae-seed0-pretrained-1"]
    assert "it hurts" in run.results[Part("vit-mae", 0, "pretrained", 1.0)].note
    assert diary(tmp_path).count("vit-mae-seed0-pretrain") == 1, "the pretraining is not repeated"


def test_a_child_that_gives_up_is_followed_by_another(make_run, tmp_path) -> None:
    run = finished(make_run(slots=[{"GIVE_UP": "vit-mae-seed0-pretrain"}]))
    assert set(statuses(run).values()) == {"ok"}
    assert sorted(diary(tmp_path)[4:]) == sorted(part.name for part in run.results), "nothing is done twice"


def test_a_child_that_cannot_start_fails_its_work_once(make_run) -> None:
    run = finished(make_run(slots=[{"DIE": "early"}]))
    assert set(statuses(run).values()) == {"failed"}
    assert all("no such GPU" in result.note for result in run.results.values())


def test_finished_parts_are_taken_over(make_run, tmp_path) -> None:
    first = finished(make_run())
    before = len(diary(tmp_path))
    lost = Part("affmae", 1, "pretrained", 0.5)
    again = finished(make_run(earlier=left_by(first, lost)))
    assert diary(tmp_path)[before:] == [lost.name]
    assert again.results == first.results
    (tmp_path / "runs" / "affmae-seed1-pretrain" / "weights.safetensors").unlink()
    (tmp_path / "runs" / "affmae-seed1-pretrain").rmdir()
    finished(make_run(earlier=left_by(first, lost)))
    assert diary(tmp_path)[before + 1 :] == ["affmae-seed1-pretrain", lost.name], "weights are made again"


def test_seeds_can_be_added_later(make_run, tmp_path) -> None:
    first = finished(make_run())
    before = len(diary(tmp_path))
    finished(make_run(plan=make_plan(seeds=(0, 1, 2)), earlier=left_by(first)))
    assert {line.split("-seed")[1][0] for line in diary(tmp_path)[before:]} == {"2"}


def test_a_model_that_cannot_be_trained_is_rows(make_run, tmp_path) -> None:
    speeds = {("affmae", task): Speed(0.1) for task in ("pretrain", "finetune")}
    speeds |= {
        ("vit-mae", task): Speed(None, status="out of memory", note="large") for task in ("pretrain", "finetune")
    }
    run = finished(make_run(earlier=Earlier(speeds)))
    found = {part: (r.status, r.note) for part, r in run.results.items()}
    assert {v for part, v in found.items() if part.model == "vit-mae"} == {("out of memory", "large")}
    assert {v[0] for part, v in found.items() if part.model == "affmae"} == {"ok"}
    assert not any("vit-mae" in line for line in diary(tmp_path))


def test_stopping_ends_the_child_and_keeps_what_is_done(make_run) -> None:
    stop, last = StopRequest(), Part("affmae", 0, "pretrained", 0.5)

    def commit(run: QualityRun) -> None:
        if run.results[last].status == "ok":
            stop.request()

    run = make_run(slots=[{"HANG": "affmae-seed0-scratch-1"}], stop=stop, commit=commit)
    began = time.monotonic()
    with pytest.raises(Interrupted, match="finished parts are kept"):
        run.run()
    assert time.monotonic() - began < 20, "the sleeping process was ended"
    assert [name for name, status in statuses(run).items() if status == "ok"] == [
        "affmae-seed0-pretrain", "affmae-seed0-pretrained-1", "affmae-seed0-pretrained-0.5",
    ]  # fmt: skip


def test_results_that_cannot_be_written_end_it(make_run) -> None:
    def full(run: QualityRun) -> None:
        if any(result.status == "ok" for result in run.results.values()):
            raise ResourceError("the disk is full")

    with pytest.raises(ResourceError, match="the disk is full"):
        make_run(commit=full).run()


def test_a_short_budget_is_refused_before_training(make_run, tmp_path) -> None:
    with pytest.raises(ConfigError, match="--budget 1s allows 4 steps"):
        make_run(plan=make_plan(budget_s=1.0)).run()
    assert all(line.startswith("measure") for line in diary(tmp_path))


def test_one_slot_per_gpu_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_slots("cpu") == ([{}], False)

    def gpus(*names: str) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus("H100", "H100")
    slots, mixed = gpu_slots("cuda")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["0", "1"] and not mixed
    assert {slot["LOCAL_WORLD_SIZE"] for slot in slots} == {"2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    gpus("H100", "T4", "H100")
    slots, mixed = gpu_slots("cuda")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["3", "6"] and mixed


@pytest.fixture
def folder(tmp_path, quality_document):
    """A folder with a finished comparison."""
    plan = make_plan((0, 1, 2), (0.1, 1.0))
    speeds = [{"model": "affmae", "task": "pretrain", "speed": asdict(Speed(0.5))},
              {"model": "vit-mae", "task": "pretrain", "speed": asdict(Speed(None))}]  # fmt: skip
    values = {**quality_document(), "identity": identity(plan, SOURCES, ABOUT), "speeds": speeds}
    (tmp_path / "results.json").write_text(json.dumps(values))
    return tmp_path


def read(folder, plan: QualityPlan, **about) -> Earlier:
    return read_earlier(folder, identity(plan, SOURCES, {**ABOUT, **about}))


def test_finished_parts_come_back(folder) -> None:
    plan = make_plan((0, 1, 2), (0.1, 1.0))
    earlier = read(folder, plan)
    assert earlier.results.keys() == set(plan.parts())
    assert earlier.lengths == Lengths({"affmae": 100, "vit-mae": 25}, 50) and earlier.seconds == 100.0
    assert earlier.speeds == {("affmae", "pretrain"): Speed(0.5)}, "what failed is measured again"
    refuse_narrower(make_plan((0, 1, 2, 3), (0.1, 0.5, 1.0)), earlier, folder)
    with pytest.raises(ConfigError, match="holds 20 finished trainings that were not asked for"):
        refuse_narrower(make_plan((0,), (0.1, 1.0)), earlier, folder)


@pytest.mark.parametrize(
    ("changes", "about", "said"),
    [
        ({"budget_s": 11.0}, {}, "other --budget"),
        ({"lr": 0.5}, {}, r"other settings .*optim.lr was 0.001, is 0.5 now"),
        ({}, {"device": "another GPU"}, "other device"),
        ({}, {"versions": {"torch": "2.14.0"}}, "other versions"),
    ],
)
def test_what_must_agree(folder, changes, about, said) -> None:
    with pytest.raises(ConfigError, match=said):
        read(folder, make_plan(**changes), **about)


def test_what_else_a_folder_may_hold(tmp_path) -> None:
    assert read(tmp_path, make_plan()).results == {}
    (tmp_path / "data.zarr").mkdir()
    assert read(tmp_path, make_plan()).results == {}, "stopped while images were collected"
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"holds other files \(notes.txt\)"):
        read(tmp_path, make_plan())
    (tmp_path / "results.json").write_text('{"kind": "speed", "schema": 3}')
    with pytest.raises(ConfigError, match="holds another result"):
        read(tmp_path, make_plan())
    (tmp_path / "results.json").write_text('{"kind": "quality", "schema": 2}')
    with pytest.raises(ConfigError, match="schema 2"):
        read(tmp_path, make_plan())


def test_unfinished_and_failed_parts_are_done_again(folder) -> None:
    path = folder / "results.json"
    values = json.loads(path.read_text())
    unfinished = ("running", "waiting", "failed", "diverged", "out of memory")
    for record, status in zip(values["results"], unfinished, strict=False):
        record["status"] = status
    path.write_text(json.dumps(values))
    again = read(folder, make_plan()).results
    assert len(again) == 30 - 5 and Part("affmae", 0) not in again


def test_targets_exist() -> None:
    """The child finds its function by this name."""
    module, _, name = quality_run.TARGET.partition(":")
    assert callable(getattr(__import__(module, fromlist=[name]), name))
