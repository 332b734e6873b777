"""Following a run directory, live or not, and the table of all runs of a folder."""

import fcntl
import math
import os
import threading
import time
from itertools import count
from pathlib import Path

import pytest
from msgspec.structs import replace

from affmae_cli.dashboard.control import pending_requests, request_checkpoint, request_stop
from affmae_cli.dashboard.reader import RunReader
from affmae_cli.dashboard.runs import RunsFolder, glance
from affmae_engine import events
from affmae_engine.config import RunConfig
from affmae_engine.errors import BusyError, ResourceError
from affmae_engine.run_dir import RunDir, create

STEP = {
    "lr": 1e-3, "grad_norm": 1.0, "images_per_s": 10.0, "data_wait": 0.0, "step_s": 0.1, "memory_gib": 1.0,
    "memory_peak_gib": 2.0, "eta_s": 5.0,
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = create(tmp_path / "runs" / "a")
    made.write_config(RunConfig(), "pretrain")
    return made


def append(run: RunDir, *found: events.Event) -> None:
    with run.metrics.open("a") as file:
        file.writelines(events.to_line(event) + "\n" for event in found)


def started(step: int = 0, *, resumed: bool = False) -> events.RunStarted:
    return events.RunStarted(
        task="pretrain", run="a", step=step, total_steps=100, resumed=resumed, device="CPU (1 threads)",
        precision="fp32", parameters=1, batch_size=2,
    )  # fmt: skip


def steps(first: int, last: int, loss: float = 1.0) -> list[events.Event]:
    return [events.StepLogged(step=number, losses={"loss": loss}, **STEP) for number in range(first, last + 1)]


def test_a_live_run_is_followed(run: RunDir) -> None:
    now = 0.0
    reader = RunReader(run.root, clock=lambda: now)
    with run.locked():
        assert not reader.poll() and reader.status.kind == "waiting"
        append(run, started(), *steps(1, 5))
        now = 10.0
        assert reader.poll() and reader.status.kind == "running" and reader.state.step == 5
        assert reader.state.config == RunConfig() and reader.state.on_cpu
        append(run, *steps(6, 7))
        assert reader.poll() and reader.state.step == 7 and not reader.poll()
        now = 400.0
        reader.poll()
        assert reader.status.kind == "stalled" and "it still holds the run" in reader.status.text
        append(run, events.SystemSampled(step=7))
        reader.poll()
        assert reader.status.kind == "stalled" and "the process is alive" in reader.status.text
    now = 500.0
    reader.poll()
    assert reader.status.kind == "gone" and f"process {os.getpid()}" in reader.status.text and reader.state.left
    append(run, events.RunEnded(step=7, status="finished", seconds=3.0))
    reader.poll()
    assert reader.status.kind == "finished"


def test_an_overwritten_run_is_read_anew(run: RunDir) -> None:
    append(run, started(), *steps(1, 9))
    reader = RunReader(run.root)
    reader.poll()
    run.metrics.unlink()
    append(run, started(), *steps(1, 2, loss=7.0))
    assert reader.poll()
    assert reader.state.step == 2 and reader.state.steps.curve("losses.loss").mean_N.tolist() == [7.0, 7.0]


def test_a_folder_that_is_no_run_is_shown_as_such(tmp_path: Path) -> None:
    reader = RunReader(tmp_path / "nothing")
    reader.poll()
    assert reader.status.kind == "waiting" and "not a run directory" in reader.problem
    assert reader.log_tail(5) == [] and reader.config_text() == "" and reader.environment() == {}
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "config.toml").write_text("not = [toml")
    reader.poll()
    assert "not valid TOML" in reader.problem and reader.config_text() == "not = [toml"


@pytest.mark.usefixtures("permissions_count")
def test_events_that_may_not_be_read_are_told_and_what_was_read_stays(run: RunDir) -> None:
    append(run, started(), *steps(1, 5))
    reader = RunReader(run.root)
    reader.poll()
    run.metrics.chmod(0)
    for seen in (reader, RunReader(run.root)):
        assert not seen.poll() and not seen.behind
        assert seen.status.kind == "waiting" and "metrics.jsonl: permission was denied" in seen.status.text
    assert reader.state.step == 5
    run.metrics.chmod(0o600)
    append(run, *steps(6, 7))
    assert reader.poll() and reader.state.step == 7 and reader.status.kind != "waiting"


def test_a_run_that_is_removed_while_it_is_watched(run: RunDir, tmp_path: Path) -> None:
    append(run, started(), *steps(1, 5))
    reader = RunReader(run.root)
    reader.poll()
    run.root.rename(tmp_path / "elsewhere")
    assert reader.poll() and reader.status.kind == "gone" and "removed or renamed" in reader.status.text
    (tmp_path / "elsewhere").rename(run.root)
    assert reader.poll() and reader.state.step == 5 and "removed" not in reader.status.text


def test_the_child_that_ended_is_gone_even_while_the_lock_cannot_be_told(run: RunDir) -> None:
    append(run, started(), *steps(1, 3))
    reader = RunReader(run.root, exit_code=lambda: -9)
    with run.locked():
        reader.poll()
    assert reader.status.kind == "gone" and "killed by signal 9" in reader.status.text


def test_zooming_reads_the_file_again_and_leaves_out_what_was_done_again(run: RunDir) -> None:
    append(run, started(), *steps(1, 20_000), started(15_000, resumed=True), *steps(15_001, 30_000, loss=2.0))
    reader = RunReader(run.root)
    reader.poll(10.0)
    assert reader.state.steps.stride > 1
    curve = reader.zoom(14_990, 15_010).curve("losses.loss")
    assert curve.x_N.tolist() == list(range(14_990, 15_011))
    assert curve.mean_N.tolist() == [1.0] * 11 + [2.0] * 10
    run.metrics.unlink()
    assert len(reader.zoom(1, 5)) == 0


def test_looking_at_the_lock_does_not_keep_a_trainer_out(run: RunDir) -> None:
    assert run.holder().state == "free"
    with run.locked():
        found = run.holder()
        assert found.state == "held" and found.process == os.getpid()
        with pytest.raises(BusyError), run.locked():
            pass
    assert run.holder().state == "free" and run.holder().process == os.getpid()
    with run.lock.open("rb") as viewer:
        fcntl.flock(viewer, fcntl.LOCK_SH)
        threading.Timer(0.03, fcntl.flock, (viewer, fcntl.LOCK_UN)).start()
        with run.locked():
            assert run.holder().state == "held"


def test_a_lock_of_another_machine_that_looks_free_proves_nothing(run: RunDir) -> None:
    run.lock.write_text("process 7 on elsewhere")
    assert run.holder().state == "unknown"
    append(run, started(), *steps(1, 3))
    reader = RunReader(run.root)
    reader.poll()
    assert reader.status.kind == "running"


def test_requests_are_files(run: RunDir) -> None:
    assert pending_requests(run.root) == []
    request_stop(run.root)
    request_checkpoint(run.root)
    assert sorted(entry.name for entry in run.control.iterdir()) == ["checkpoint", "stop"]
    assert pending_requests(run.root) == ["stop", "checkpoint"]
    with pytest.raises(ResourceError):
        request_stop(run.root / "missing")


def test_all_runs_of_a_folder(run: RunDir, tmp_path: Path) -> None:
    append(run, started(), *steps(1, 3000, loss=0.5), events.RunEnded(step=3000, status="finished", seconds=1.0))
    run.best.write_text('{"step": 5, "metric": "score", "value": -0.25}')
    other = create(tmp_path / "runs" / "b")
    other.write_config(RunConfig(), "finetune")
    other.environment.write_text('{"task": "finetune"}')
    (tmp_path / "runs" / "no run").mkdir()
    folder = RunsFolder(tmp_path / "runs")
    rows = {row.name: row for row in folder.rows()}
    assert set(rows) == {"a", "b"}
    row = rows["a"]
    assert (row.task, row.step, row.total_steps, row.status.kind, row.live) == (
        "pretrain",
        3000,
        100,
        "finished",
        False,
    )
    assert (row.loss, row.best, row.images_per_s) == (0.5, 0.25, 10.0)
    run.best.write_text('{"value": 1' + "0" * 400 + "}")
    assert math.isnan(glance(run.root).best)
    assert rows["b"].task == "finetune" and rows["b"].live and rows["b"].loss != rows["b"].loss
    assert {row.name: row for row in folder.rows()}["a"] is row  # not read again
    append(run, started(3000, resumed=True))
    assert {row.name: row for row in folder.rows()}["a"].status.kind == "gone"
    assert glance(tmp_path / "runs" / "missing").status.kind == "waiting"
    assert RunsFolder(tmp_path / "elsewhere").rows() == []


def test_runs_are_ordered_by_their_events_however_slow_the_looking_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    for name, age in (("older", 100.0), ("newer", 99.9)):
        run = create(tmp_path / "runs" / name)
        run.write_config(RunConfig(), "pretrain")
        ended = events.RunEnded(step=1, status="finished", seconds=1.0, time=now - age)
        append(run, replace(started(), time=now - age), ended)
        os.utime(run.config, (now - age, now - age))
    clock = count(now, 10.0)
    monkeypatch.setattr("affmae_cli.dashboard.runs.time.time", lambda: next(clock))
    folder = RunsFolder(tmp_path / "runs")
    (newer, older) = folder.rows()
    assert (newer.name, older.name) == ("newer", "older")
    assert folder.rows() == [newer, older]
    first = newer.age_s
    assert newer.age_s == pytest.approx(first + 10)  # a row that is kept grows old
