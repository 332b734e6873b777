"""Lines to columns and events; damage costs the damaged line only; a million lines are quick."""

import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from affmae_cli.dashboard.decode import Segment, decode
from affmae_engine import events


def step(number: int, loss: float = 0.5, **fields: float) -> events.StepLogged:
    values = {
        "lr": 3.5e-4, "grad_norm": 1.2, "images_per_s": 412.3, "data_wait": 0.03, "step_s": 0.08,
        "memory_gib": 18.2, "memory_peak_gib": 21.4, "eta_s": 725.0, **fields,
    }  # fmt: skip
    return events.StepLogged(step=number, losses={"loss": loss, "last": loss / 2}, **values)


def started(number: int = 0, total: int = 100, *, resumed: bool = False, time: float = 0.0) -> events.RunStarted:
    return events.RunStarted(
        task="pretrain", run="r", step=number, total_steps=total, resumed=resumed, device="NVIDIA X", precision="bf16",
        parameters=1, batch_size=2, **({"time": time} if time else {}),
    )  # fmt: skip


def text(*found: events.Event) -> bytes:
    return b"".join(events.to_line(event).encode() + b"\n" for event in found)


def steps_of(segments: list[Segment]) -> list[int]:
    return [number for s in segments if s.steps is not None for number in s.steps.step_N.tolist()]


def test_steps_become_columns_and_the_rest_events() -> None:
    best = events.Evaluated(step=2, metrics={"loss": 0.4}, best=True)
    machine = events.SystemSampled(step=2, power=300.0, time=7.0)
    (segment,) = decode(text(started(), step(1), step(2, math.nan), machine, best, step(3, 0.25)))
    assert segment.started is not None and segment.events == [segment.started, best]
    assert segment.steps is not None and segment.steps.step_N.tolist() == [1, 2, 3]
    losses = segment.steps.columns["losses.loss"]
    assert losses.dtype == np.float32 and losses[0] == 0.5 and np.isnan(losses[1]) and losses[2] == 0.25
    assert segment.steps.columns["losses.last"][2] == 0.125
    assert segment.steps.columns["images_per_s"][0] == np.float32(412.3)
    assert segment.steps.last.step == 3 and segment.steps.last.eta_s == 725.0
    assert segment.systems is not None and segment.systems.last == machine
    assert segment.systems.columns["power"].tolist() == [300.0]
    assert np.isnan(segment.systems.columns["cpu"]).all()


def test_each_trainer_process_is_a_segment() -> None:
    found = list(decode(text(step(1), started(0), step(2), started(1, resumed=True), step(2), step(3))))
    assert [segment.started.step if segment.started else None for segment in found] == [None, 0, 1]
    assert steps_of(found) == [1, 2, 2, 3]


def test_offsets_are_those_of_the_lines() -> None:
    data = text(started(), step(10), events.Warned(step=1, message="é"), step(20))
    (segment,) = decode(data, offset=1000)
    assert segment.steps is not None
    for offset, number in zip(segment.steps.offset_N.tolist(), (10, 20), strict=True):
        line = data[offset - 1000 :].split(b"\n")[0]
        assert json.loads(line)["step"] == number


@pytest.mark.parametrize(
    "damage",
    [
        b"\x00" * 40 + b"\n", b"\xff\xfe\n", b'{"kind": "step", "ste\n', b"\n", b"nonsense\n", b"[1, 2]\n", b"null\n",
        b'{"kind": "step", "step": "seven", "losses": {}}\n', b'{"kind": "of a newer version", "step": 3}\n',
        b'{"kind": "step", "step": 3, "losses": null}\n', b'{"step": 3}\n', b'{"kind": "step", "step": 3.5}\n',
        b'{"kind": "step", "step": 123456789012345678901, "losses": {}}\n',
        b'{"kind": "step", "step": -3, "losses": {}}\n',
        b'{"kind": "evaluated", "step": 3, "metrics": {"loss": "x"}}\n',
        b'{"kind": "run_started", "step": "x"}\n', b'{"kind": "warning", "step": 3, "message": 5}\n',
        b'{"kind": "warning", "step": 3, "message": "' + b"\xc3" + b'"}\n',
        b'{"kind": "warning", "time": 1e30, "step": 3, "message": "w"}\n',
        b'{"kind": "warning", "time": null, "step": 3, "message": "w"}\n',
        b'{"kind": "system", "time": 1e30, "step": 3}\n',
    ],
    ids=range(21),
)  # fmt: skip
def test_a_damaged_line_costs_itself_only(damage: bytes) -> None:
    found = list(decode(text(started(), step(1)) + damage + text(step(2), events.Warned(step=2, message="w"))))
    assert steps_of(found) == [1, 2]
    assert [event.kind for segment in found for event in segment.events] == ["run_started", "warning"]


def test_fields_of_a_newer_version_are_passed_over() -> None:
    record = {**json.loads(events.to_line(step(4))), "colour": {"a": [1]}}
    assert steps_of(list(decode(json.dumps(record).encode() + b"\n"))) == [4]


def test_losses_that_come_and_go() -> None:
    one, two = step(1), replace(step(2), losses={"loss": 1.0, "step1": 2.0})
    (segment,) = decode(text(one, two))
    assert segment.steps is not None
    assert np.isnan(segment.steps.columns["losses.step1"][0]) and segment.steps.columns["losses.step1"][1] == 2.0
    assert np.isnan(segment.steps.columns["losses.last"][1])


def test_a_last_line_that_lacks_a_field_takes_nothing_with_it() -> None:
    (segment,) = decode(text(step(1)) + b'{"kind": "step", "time": 1.0, "step": 2, "losses": {"loss": 1.0}}\n')
    assert segment.steps is not None and segment.steps.last.step == 1


@pytest.mark.parametrize(
    "field", [{"time": "x"}, {"time": None}, {"eta_s": "x"}, {"memory_peak_gib": []}, {"time": 1e30}]
)
def test_a_newest_step_that_is_odd_is_not_the_one_shown(field: dict[str, object]) -> None:
    odd = json.dumps({**json.loads(events.to_line(step(2))), **field}).encode() + b"\n"
    (segment,) = decode(text(step(1)) + odd)
    assert segment.steps is not None and segment.steps.last.step == 1


@pytest.mark.parametrize("field", [{"throttled": None}, {"gpu": None}, {"gpu": 3}, {"power": "much"}])
def test_a_newest_sample_that_is_odd_is_not_the_one_shown(field: dict[str, object]) -> None:
    machine = events.SystemSampled(step=2, power=300.0, time=7.0)
    odd = json.dumps({"kind": "system", "time": 8.0, "step": 3, **field}).encode() + b"\n"
    (segment,) = decode(text(machine) + odd)
    assert segment.systems is not None and segment.systems.last == machine


def test_a_loss_beyond_float32_is_not_known() -> None:
    (segment,) = decode(text(step(1, 1e39), step(2, -1e300), step(3)))
    assert segment.steps is not None
    assert np.isnan(segment.steps.columns["losses.loss"][:2]).all() and segment.steps.columns["losses.loss"][2] == 0.5


def test_nothing() -> None:
    assert list(decode(b"")) == []


def test_a_million_lines_are_opened_in_seconds_and_little_memory(tmp_path: Path) -> None:
    """Measured: 2.0 s and 56 MiB with the interpreter, on one core of a shared machine; the bound is generous."""
    lines = [events.to_line(step(number, 1.0 / number)) + "\n" for number in range(1000, 2000)]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.write(events.to_line(started(total=1_000_000)) + "\n")
        for thousand in range(1000):
            file.writelines(line.replace('"step": ', f'"step": {thousand + 1}', 1) for line in lines)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    script = (
        "import psutil, sys; from pathlib import Path; from affmae_cli.dashboard.reader import RunReader\n"
        "reader = RunReader(Path(sys.argv[1]))\nreader.poll()\nwhile reader.behind: reader.poll()\n"
        "print(reader.state.latest.step, len(reader.state.steps), 'torch' in sys.modules, 'textual' in sys.modules,"
        " psutil.Process().memory_info().rss // 2**20)"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    words = done.stdout.split()
    assert words[2:4] == ["False", "False"], "the reader must load neither torch nor Textual"
    assert int(words[0]) == 10001999 and int(words[1]) == 1_000_000
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 10.0, time.monotonic() - begun
    assert int(words[4]) < 100  # MiB
