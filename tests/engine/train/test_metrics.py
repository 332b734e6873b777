"""The metrics file, the sums on the device, the stopwatch, and events as text."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from affmae_engine import events
from affmae_engine.events import line
from affmae_engine.runtime.formatting import duration, number
from affmae_engine.train.metrics import MetricsFile, Recorder, Stopwatch, Window


def warned(text: str) -> events.Warned:
    return events.Warned(step=1, message=text)


def test_events_are_appended_and_a_torn_line_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path)
    first.write(warned("a" * 100_000))
    first.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "warn' + b"x" * 70_000)
    second = MetricsFile(path)
    second.write(warned("b"))
    second.close()
    assert path.read_bytes().startswith(whole)
    assert [events.from_line(text).message[0] for text in path.read_text().splitlines()] == ["a", "b"]


@pytest.mark.parametrize("content", [b"", b"torn", b"\n"])
def test_odd_beginnings(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    file = MetricsFile(path)
    file.write(warned("a"))
    file.close()
    assert events.from_line(path.read_text().splitlines()[-1]) is not None


def test_a_full_disk_keeps_the_lines_for_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    recorder = Recorder(path, [])
    recorder.emit(warned("one"))
    real, full = os.write, True

    def write(descriptor: int, data: bytes) -> int:
        if not full:
            return real(descriptor, data)
        real(descriptor, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("affmae_engine.train.metrics.os.write", write)
    recorder.emit(warned("two"))
    recorder.emit(warned("three"))
    full = False
    recorder.emit(warned("four"))
    recorder.close()
    assert [events.from_line(text).message for text in path.read_text().splitlines()] == ["one", "two", "three", "four"]


def add(window: Window, loss: float, bad: bool = False) -> None:
    window.add({"loss": torch.tensor(loss)}, torch.tensor(2 * loss), torch.tensor(bad))


def test_window_leaves_out_bad_steps_and_counts_streaks() -> None:
    window = Window(torch.device("cpu"))
    add(window, 1.0), add(window, math.nan, True), add(window, math.inf, True), add(window, 3.0)
    add(window, math.nan, True)
    means = window.read()
    assert means.losses == {"loss": 2.0} and means.grad_norm == 4.0
    assert (means.longest_streak, means.skipped, means.skipped_in_window) == (2, 3, 3)
    add(window, math.nan, True), add(window, math.nan, True)
    means = window.read()
    assert math.isnan(means.losses["loss"])
    assert (means.longest_streak, means.skipped, means.skipped_in_window) == (3, 5, 2)
    add(window, 5.0)
    assert window.read().longest_streak == 3  # the streak was open when the window began
    add(window, 5.0)
    assert window.read().longest_streak == 0


def test_window_goes_through_json_exactly() -> None:
    window, twin = Window(torch.device("cpu")), Window(torch.device("cpu"))
    add(window, 0.1), add(window, math.nan, True)
    twin.load_json(json.loads(json.dumps(window.to_json())))
    add(window, 0.7), add(twin, 0.7)
    assert window.read() == twin.read()


def test_stopwatch_leaves_asides_out_of_the_pace_but_not_out_of_the_eta() -> None:
    now = 100.0
    watch = Stopwatch(lambda: now)
    for _ in range(4):
        now += 1.0
        watch.waited(0.25)
        watch.stepped()
    with watch.interrupted("evaluation"):
        now += 8.0
    pace = watch.lap(batch_size=32)
    assert pace.step_s == pytest.approx(1.0)
    assert pace.images_per_s == pytest.approx(32.0)
    assert pace.data_wait == pytest.approx(0.25)
    left = watch.time_left(10, {"evaluation": 3, "checkpoint": 2}, {"evaluation": 99.0, "checkpoint": 0.5})
    assert left == pytest.approx(10 * 1.0 + 3 * 8.0 + 2 * 0.5), "a guess counts until there is a measurement"


def test_a_suspended_machine_does_not_spoil_the_eta() -> None:
    now = 0.0
    watch = Stopwatch(lambda: now)
    for lap in range(5):
        now += 3600.0 if lap == 3 else 1.0
        watch.stepped()
        watch.lap(1)
    assert watch.time_left(10, {}, {}) == pytest.approx(10.0)


def test_no_time_at_all_is_not_a_division_by_zero() -> None:
    watch = Stopwatch(lambda: 5.0)
    assert math.isfinite(watch.lap(1).images_per_s) and watch.time_left(0, {}, {}) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.9, "59s"), (61, "1m01s"), (720, "12m"), (3900, "1h05m"), (273_600, "3d04h"), (math.nan, "-")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers() -> None:
    assert [number(v) for v in (0.43123, 0.0, 1e-5, 12345.0, math.nan)] == [
        "0.4312",
        "0.0000",
        "1.00e-05",
        "1.23e+04",
        "n/a",
    ]


def test_step_line() -> None:
    event = events.StepLogged(
        step=120,
        losses={"loss": 0.43123, "last": 0.4},
        lr=3.5e-4,
        grad_norm=1.0,
        images_per_s=412.3,
        data_wait=0.031,
        step_s=0.1,
        memory_gib=1.0,
        memory_peak_gib=2.13,
        eta_s=720.0,
    )
    assert line(event, 2000) == (
        "step  120/2000  loss 0.4312  last 0.4000  lr 3.50e-04  412 images/s  wait 3%  2.1 GiB  eta 12m"
    )
