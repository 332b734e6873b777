"""What is known of a run, event by event and file by file: live, finished, resumed, damaged, a million lines long."""

import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from affmae_cli.dashboard.control import request
from affmae_cli.dashboard.run_model import RunModel
from affmae_cli.dashboard.runs import RunsFolder, best_score, config_difference, ordered
from affmae_cli.dashboard.status import Kind, Life, status_of
from affmae_engine import events
from affmae_engine.config import RunConfig
from affmae_engine.errors import ResourceError
from affmae_engine.run_dir import RunDir, create

LIVE = Life("held", silent_s=1.0, progress_s=1.0, age_s=500.0)
CONFIG = RunConfig.model_validate({"train": {"eval_every": 50, "steps": 100}})


def started(step: int = 0, *, time: float = 1000.0, resumed: bool = False) -> events.RunStarted:
    return events.RunStarted(
        task="pretrain", run="r", step=step, total_steps=100, resumed=resumed, device="NVIDIA X", precision="bf16",
        parameters=1, batch_size=2, time=time,
    )  # fmt: skip


def step(number: int, *, time: float = 1000.0, loss: float | None = None, wait: float = 0.01) -> events.StepLogged:
    return events.StepLogged(
        step=number, losses={"loss": 1.0 / number if loss is None else loss}, lr=1e-3, grad_norm=1.0, images_per_s=10.0,
        data_wait=wait, step_s=0.1, memory_gib=1.0, memory_peak_gib=2.0, eta_s=60.0, time=time,
    )  # fmt: skip


def ended(status: str, *, number: int = 40, time: float = 1100.0, message: str = "") -> events.RunEnded:
    return events.RunEnded(step=number, status=status, seconds=100.0, message=message, time=time)


def saved(number: int) -> events.CheckpointSaved:
    return events.CheckpointSaved(step=number, path=f"checkpoints/step-{number:06d}", seconds=1.0, time=1041.0)


def take(model: RunModel, *found: events.Event) -> None:
    for event in found:  # one by one, as a live run comes
        model.apply([events.from_line(events.to_line(event))])


def known(*found: events.Event, config: RunConfig | None = CONFIG, now: float = 1050.0) -> RunModel:
    model = RunModel(Path("runs/r"), now=lambda: now)
    model.config = config
    take(model, *found)
    return model


def training(*more: events.Event, now: float = 1050.0) -> RunModel:
    return known(started(), *(step(number, time=1000.0 + number) for number in range(1, 41)), *more, now=now)


def life(**changes: object) -> Life:
    return Life(**{**LIVE.__dict__, **changes})


@pytest.mark.parametrize(
    ("model", "signs", "kind", "words"),
    [
        (known(), LIVE, "waiting", "waiting for the trainer"),
        (known(), life(lock="free", age_s=5.0), "waiting", "waiting for the trainer"),
        (known(), life(lock="free", where="process 7 on box"), "gone", "no trainer runs here (process 7 on box)"),
        (known(started()), life(progress_s=30.0), "waiting", "first step, 30s so far"),
        (known(started()), life(progress_s=2000.0), "stalled", "no step for 33m (none so far"),
        (training(), LIVE, "running", "training"),
        (training(), life(lock="unknown"), "running", "training"),
        (training(), life(progress_s=59.0), "running", "training"),
        (training(), life(progress_s=300.0), "stalled", "no step for 5m00s (usually one every 1s; expected"),
        (training(), life(progress_s=300.0, silent_s=300.0), "stalled", "it still holds the run"),
        (training(), life(lock="unknown", progress_s=300.0, silent_s=300.0), "stalled", "is not known here"),
        (training(), life(lock="free", where="process 7 on box"), "gone", "ended (process 7 on box) without a last"),
        (training(), life(exit_code=-9), "gone", "killed by signal 9"),
        (training(), life(exit_code=1), "gone", "exit code 1"),
        (training(ended("finished")), life(lock="free"), "finished", "finished: 40 steps in 1m40s"),
        (training(ended("finished")), life(lock="held"), "finished", "finished"),
        (training(ended("stopped", message="by SIGINT")), life(lock="free"), "stopped", "step 40: by SIGINT"),
        (training(ended("failed", message="disk full")), life(lock="free"), "failed", "failed at step 40: disk full"),
        (training(ended("stopped"), started(40, time=1200.0, resumed=True)), LIVE, "waiting", "first step"),
        (known(started(time=9000.0), step(1, time=1.0)), LIVE, "running", "training"),  # the clock was set back
        (known(started(), step(50, time=1050.0)), life(progress_s=300.0), "running", "evaluating at step 50"),
    ],
)  # fmt: skip
def test_states(model: RunModel, signs: Life, kind: Kind, words: str) -> None:
    status = status_of(model, signs)
    assert status.kind == kind and words in status.text
    assert status.ended == (kind in ("finished", "stopped", "failed", "gone"))


def test_what_can_be_done_is_said() -> None:
    resume = "affmae pretrain --resume runs/r"
    assert resume in status_of(training(saved(40), ended("failed")), LIVE).hint
    assert "--resume" not in status_of(training(ended("failed")), LIVE).hint
    assert resume in status_of(training(saved(40)), life(lock="free")).hint


def test_a_long_evaluation_is_no_stall_once_one_was_as_long() -> None:
    long = events.Evaluated(step=40, metrics={"loss": 1.0}, seconds=200.0, time=1300.0)
    assert status_of(training(long), life(progress_s=500.0)).kind == "running"
    assert status_of(training(long), life(progress_s=700.0)).kind == "stalled"


def test_progress_and_times_of_a_resumed_run() -> None:
    model = training(saved(30))
    assert (model.step, model.total_steps, model.progress) == (40, 100, 0.4)
    assert model.elapsed_s == 50.0 and model.eta_s == 50.0
    model.now = lambda: 2010.0
    take(model, started(30, time=2000.0, resumed=True), step(31, time=2001.0))
    assert model.step == 31 and model.elapsed_s == pytest.approx(41.0 + 10.0)
    assert model.steps.x_N.tolist() == list(range(1, 32))


def test_the_newest_of_every_kind_is_kept() -> None:
    best = events.Evaluated(
        step=20, metrics={"score": 0.5}, per_class={"axon": {"iou": 0.7}}, effective_rank=[30.0, 9.0], best=True
    )
    worse = events.Evaluated(step=30, metrics={"score": 0.4}, effective_rank=[20.0, 10.0])
    pictures = [events.PreviewSaved(step=n, path=f"previews/step-{n:06d}.png") for n in (20, 30, 30)]
    model = training(
        best, worse, *pictures, events.Warned(step=3, message="w"), events.SystemSampled(step=4, power=3.0)
    )
    assert model.best == best and model.evaluated == worse and model.highest_ranks == [30.0, 10.0]
    assert model.held_out.get("axon.iou")[1][0, 0] == pytest.approx(0.7)
    assert model.held_out.get("rank.2")[1][0].tolist() == [9.0, 10.0]
    assert [preview.path[-10:] for preview in model.previews] == ["000020.png", "000030.png"]
    assert model.system is not None and model.systems.last("power") == 3.0
    assert [event.kind for event in model.events][-1] == "warning"
    assert model.megapixels_per_s == pytest.approx(10 * 512**2 / 1e6)


def test_nothing_is_known_of_an_empty_run() -> None:
    model = known(config=None)
    assert (model.step, model.progress, model.elapsed_s) == (0, 0.0, 0.0)
    assert math.isnan(model.eta_s) and math.isnan(model.data_wait) and math.isnan(model.megapixels_per_s)
    assert model.verdicts[0].text == "too few steps yet to tell what limits the speed" and not model.previews


def test_the_start_of_the_data_workers_does_not_count_as_waiting() -> None:
    model = known(started(), step(1, wait=0.9))
    assert math.isnan(model.data_wait)
    take(model, step(2, wait=0.01))
    assert model.data_wait == pytest.approx(0.01) and "GPU-bound" in model.verdicts[0].text


def test_figures_of_several_gpus_are_columns_of_their_own() -> None:
    model = known(started())
    take(model, events.SystemSampled(step=1, gpu="X", power=300.0, other_gpus=[{"power": 310.0}]))
    assert model.systems.last("power") == 300.0 and model.systems.last("gpu1.power") == 310.0


@pytest.mark.parametrize(
    "damage",
    [
        b"\x00" * 40 + b"\n", b"\xff\xfe\n", b'{"kind": "step", "ste\n', b"\n", b"nonsense\n", b"[1, 2]\n", b"null\n",
        b'{"kind": "step", "step": "seven", "losses": {}}\n', b'{"kind": "of a newer version", "step": 3}\n',
        b'{"kind": "step", "step": 3, "losses": null}\n', b'{"step": 3}\n', b'{"kind": "step", "step": 3.5}\n',
        b'{"kind": "step", "step": 123456789012345678901, "losses": {}}\n',
        b'{"kind": "step", "step": -3, "losses": {}}\n', b'{"kind": "run_started", "step": "x"}\n',
        b'{"kind": "evaluated", "step": 3, "metrics": {"loss": "x"}}\n',
        b'{"kind": "warning", "step": 3, "message": 5}\n',
        b'{"kind": "warning", "step": 3, "message": "' + b"\xc3" + b'"}\n',
        b'{"kind": "warning", "time": 1e30, "step": 3, "message": "w"}\n',
        b'{"kind": "warning", "time": null, "step": 3, "message": "w"}\n',
        b'{"kind": "system", "time": 1e30, "step": 3}\n', b'{"kind": "system", "time": 1.0, "step": 3, "gpu": 3}\n',
    ],
    ids=range(22),
)  # fmt: skip
def test_a_damaged_line_costs_itself_only(tmp_path: Path, damage: bytes) -> None:
    def text(*found: events.Event) -> bytes:
        return b"".join(events.to_line(event).encode() + b"\n" for event in found)

    lines = text(started(), step(1)) + damage + text(step(2), events.Warned(step=2, message="w"))
    (tmp_path / "metrics.jsonl").write_bytes(lines)
    model = RunModel(tmp_path)
    model.poll()
    assert model.steps.x_N.tolist() == [1, 2] and model.step == 2
    assert [event.kind for event in model.events] == ["run_started", "warning"]


@pytest.mark.parametrize("field", [{"time": "x"}, {"time": None}, {"eta_s": "x"}, {"memory_peak_gib": []}])
def test_a_newest_step_with_an_odd_field_is_not_the_one_shown(field: dict[str, object]) -> None:
    model = known(started(), step(1))
    odd = json.dumps({**json.loads(events.to_line(step(3))), **field})
    model.apply([events.from_line(line) for line in (events.to_line(step(2)), odd)])
    assert model.latest is not None and model.latest.step == 2


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = create(tmp_path / "runs" / "a")
    made.write_config(RunConfig(), "pretrain")
    return made


def append(run: RunDir, *found: events.Event) -> None:
    with run.metrics.open("a") as file:
        file.writelines(events.to_line(event) + "\n" for event in found)


def steps(first: int, last: int, loss: float = 1.0) -> list[events.Event]:
    return [step(number, loss=loss, time=1000.0 + number) for number in range(first, last + 1)]


def test_a_live_run_is_followed(run: RunDir) -> None:
    clock = 0.0
    model = RunModel(run.root, clock=lambda: clock, now=lambda: 1000.0 + clock)
    with run.locked():
        assert not model.poll() and model.status.kind == "waiting"
        append(run, started(), *steps(1, 5))
        clock = 10.0
        assert model.poll() and model.status.kind == "running" and model.step == 5 and model.config == RunConfig()
        append(run, *steps(6, 7))
        assert model.poll() and model.step == 7 and not model.poll()
        clock = 400.0
        model.poll()
        assert model.status.kind == "stalled" and "it still holds the run" in model.status.text
        append(run, events.SystemSampled(step=7))
        model.poll()
        assert model.status.kind == "stalled" and "the process is alive" in model.status.text
    clock = 500.0
    model.poll()
    assert model.status.kind == "gone" and f"process {os.getpid()}" in model.status.text
    append(run, events.RunEnded(step=7, status="finished", seconds=3.0))
    model.poll()
    assert model.status.kind == "finished"


def test_an_overwritten_run_is_read_anew(run: RunDir) -> None:
    append(run, started(), *steps(1, 9))
    model = RunModel(run.root)
    model.poll()
    run.metrics.unlink()
    append(run, started(), *steps(1, 2, loss=7.0))
    assert model.poll() and model.step == 2 and model.steps.get("losses.loss")[1][0].tolist() == [7.0, 7.0]


def test_a_folder_that_is_no_run_is_shown_as_such(tmp_path: Path) -> None:
    model = RunModel(tmp_path / "nothing")
    model.poll()
    assert model.status.kind == "waiting" and "not a run directory" in model.problem and model.log_tail() == []
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "config.toml").write_text("not = [toml")
    model.poll()
    assert "not valid TOML" in model.problem


@pytest.mark.usefixtures("permissions_count")
def test_events_that_may_not_be_read_are_told_and_what_was_read_stays(run: RunDir) -> None:
    append(run, started(), *steps(1, 5))
    model = RunModel(run.root)
    model.poll()
    run.metrics.chmod(0)
    for seen in (model, RunModel(run.root)):
        assert not seen.poll() and not seen.opening
        assert seen.status.kind == "waiting" and "metrics.jsonl: permission was denied" in seen.status.text
    run.metrics.chmod(0o600)
    append(run, *steps(6, 7))
    assert model.poll() and model.step == 7 and model.status.kind != "waiting"


def test_a_run_that_is_removed_while_it_is_watched(run: RunDir, tmp_path: Path) -> None:
    append(run, started(), *steps(1, 5))
    model = RunModel(run.root)
    model.poll()
    run.root.rename(tmp_path / "elsewhere")
    assert model.poll() and model.status.kind == "gone" and "removed or renamed" in model.status.text


def test_the_child_that_ended_is_gone_even_while_the_lock_is_held(run: RunDir) -> None:
    append(run, started(), *steps(1, 3))
    model = RunModel(run.root, exit_code=lambda: -9)
    with run.locked():
        model.poll()
    assert model.status.kind == "gone" and "killed by signal 9" in model.status.text


def test_a_lock_of_another_machine_that_looks_free_proves_nothing(run: RunDir) -> None:
    run.lock.write_text("process 7 on elsewhere")
    append(run, started(), *(step(n, time=1000.0) for n in range(1, 4)))
    model = RunModel(run.root, now=lambda: 1001.0)
    model.poll()
    assert model.status.kind == "running"


def test_requests_are_files_and_their_fate_is_said(run: RunDir) -> None:
    append(run, started(), *steps(1, 3))
    with run.locked():
        model = RunModel(run.root, now=lambda: 1001.0)
        model.poll()
        assert model.requests == []
        request(run.root, "checkpoint")
        assert model.requests == ["checkpoint requested, not yet seen by the trainer"]
        (run.control / "checkpoint").unlink()
        append(run, events.RequestTaken(step=3, request="checkpoint"))
        model.poll()
        assert model.requests == ["checkpoint acknowledged, it comes after this step"]
        append(run, saved(3))
        model.poll()
        assert model.requests == []
    with pytest.raises(ResourceError):
        request(run.root / "missing", "stop")


def test_all_runs_of_a_folder(run: RunDir, tmp_path: Path) -> None:
    append(run, started(), *steps(1, 3000, loss=0.5), events.RunEnded(step=3000, status="finished", seconds=1.0))
    run.best.write_text('{"step": 5, "metric": "score", "value": -0.25}')
    other = create(tmp_path / "runs" / "b")
    other.write_config(CONFIG, "finetune")
    other.environment.write_text('{"task": "finetune"}')
    other.best.write_text('{"step": 5, "metric": "score", "value": 0.75}')
    (tmp_path / "runs" / "no run").mkdir()
    folder = RunsFolder(tmp_path / "runs")
    found = {model.root.name: model for model in folder.runs()}
    assert set(found) == {"a", "b"}
    first, second = found["a"], found["b"]
    assert (first.task, first.step, first.total_steps, first.status.kind) == ("pretrain", 3000, 100, "finished")
    # Losses and IoU are told apart.
    assert best_score(first, "pretrain") == 0.25 and math.isnan(best_score(first, "finetune"))
    assert best_score(second, "finetune") == 0.75 and math.isnan(best_score(second, "pretrain"))
    assert ("train.steps", str(RunConfig().train.steps), "100") in config_difference(first, second)
    again = {model.root.name: model for model in folder.runs()}
    assert again["a"] is first  # not read again
    append(run, started(3000, resumed=True))
    assert {model.root.name: model for model in folder.runs()}["a"].status.kind == "gone"
    assert RunsFolder(tmp_path / "elsewhere").runs() == []


def test_runs_are_sorted_filtered_and_pinned(tmp_path: Path) -> None:
    for name, loss in (("one", 0.3), ("two", 0.1), ("three", 0.2)):
        run = create(tmp_path / name)
        run.write_config(RunConfig(), "pretrain")
        append(run, started(time=1000.0), step(1), ended("finished"))
        run.best.write_text(json.dumps({"value": -loss}))
    runs = RunsFolder(tmp_path).runs()

    def names(**options: object) -> list[str]:
        return [model.root.name for model in ordered(runs, 5, **options)]  # type: ignore[arg-type]

    assert names() == ["two", "three", "one"] and names(reverse=True) == ["one", "three", "two"]
    assert names(wanted="^.*two|one") == ["two", "one"] and names(wanted="t[") == []
    assert names(pinned=[tmp_path / "one"]) == ["one", "two", "three"]


@pytest.mark.slow
def test_a_million_lines_are_opened_in_seconds_and_little_memory(tmp_path: Path) -> None:
    lines = [events.to_line(step(number)) + "\n" for number in range(1000, 2000)]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.write(events.to_line(started()) + "\n")
        for thousand in range(1000):
            file.writelines(line.replace('"step": ', f'"step": {thousand + 1}', 1) for line in lines)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    script = (
        "import psutil, sys; from pathlib import Path; from affmae_cli.dashboard.run_model import RunModel\n"
        "model = RunModel(Path(sys.argv[1]))\nmodel.poll(0.1)\nfirst = len(model.steps)\n"
        "while model.opening: model.poll()\n"
        "print(model.latest.step, int(model.steps.weight_N.sum()), first, 'torch' in sys.modules,"
        " 'textual' in sys.modules, psutil.Process().memory_info().rss // 2**20)"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    newest, count, first, torch, textual, memory = done.stdout.split()
    assert (torch, textual) == ("False", "False"), "reading a run must load neither torch nor Textual"
    assert int(newest) == 10001999 and int(count) == 1_000_000 and int(first) > 1000
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 20.0
    assert int(memory) < 120  # MiB


def test_columns_hold_what_the_lines_say(run: RunDir) -> None:
    append(run, started(), step(1, loss=0.5), step(2, loss=math.nan), step(3, loss=0.25))
    model = RunModel(run.root)
    model.poll()
    x_N, loss_3N = model.steps.get("losses.loss")
    np.testing.assert_array_equal(loss_3N[0], [0.5, np.nan, 0.25])
    assert x_N.tolist() == [1, 2, 3] and model.steps.last("images_per_s") == 10.0
