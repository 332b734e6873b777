"""Event lines: every kind comes back as it was; torn, foreign and newer lines do no harm."""

import json
import math
from typing import get_args

import pytest

from affmae_engine import events

EXAMPLES = [
    events.RunStarted(
        task="pretrain",
        run="runs/a",
        step=0,
        total_steps=10,
        resumed=False,
        device="cpu",
        precision="fp32",
        parameters=5,
        batch_size=8,
        backends={"cluster_attention": "reference"},
    ),
    events.StepLogged(
        step=1,
        losses={"loss": 0.5, "last": 0.4},
        lr=1e-4,
        grad_norm=2.0,
        images_per_s=3.0,
        data_wait=0.1,
        step_s=0.2,
        memory_gib=1.0,
        memory_peak_gib=2.0,
        eta_s=60.0,
    ),
    events.Evaluated(
        step=2, metrics={"score": 0.5}, per_class={"mito": {"iou": 0.5}}, effective_rank=[1.0, 2.5], best=True
    ),
    events.CheckpointSaved(step=3, path="checkpoints/step-000003", seconds=0.5),
    events.PreviewSaved(step=3, path="previews/step-000003.png"),
    events.Warned(step=4, message="slow"),
    events.SystemSampled(step=4, gpu="NVIDIA X", power=310.5, throttled=["power limit"]),
    events.RequestTaken(step=4, request="stop"),
    events.RunEnded(step=5, status="finished", seconds=9.0),
]


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: event.kind)
def test_round_trip(event):
    line = events.to_line(event)
    assert "\n" not in line
    assert next(iter(json.loads(line))) == "kind"
    for back in (events.from_line(line), events.from_line(line + "\n")):
        assert type(back) is type(event)
        assert repr(back) == repr(event)  # what is not known of the machine is NaN, which equals nothing


def test_what_is_not_known_of_the_machine_is_left_out():
    record = json.loads(events.to_line(events.SystemSampled(step=1, temperature=math.nan, cpu=0.5)))
    assert set(record) == {"kind", "time", "step", "gpu", "gpu_missing", "throttled", "cpu", "other_gpus"}


def test_every_kind_has_an_example():
    assert {type(event) for event in EXAMPLES} == set(get_args(events.AnyEvent))


def test_the_first_line_carries_the_schema_version():
    assert json.loads(events.to_line(EXAMPLES[0]))["schema"] == events.SCHEMA_VERSION


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks(number):
    event = events.Evaluated(step=1, metrics={"loss": number}, effective_rank=[number, 1.0])
    line = events.to_line(event)
    assert json.loads(line)["metrics"] == {"loss": None}
    back = events.from_line(line)
    assert math.isnan(back.metrics["loss"])
    assert math.isnan(back.effective_rank[0]) and back.effective_rank[1] == 1.0


@pytest.mark.parametrize("text", ["a\nb", "a\u2028b\x85c\r", "caf\udce9", "é中", 'quote " \\'])
def test_any_text_stays_on_one_line(text):
    line = events.to_line(events.Warned(step=1, message=text))
    assert line.isascii()
    assert len(line.splitlines()) == 1
    assert events.from_line(line).message == text


def test_every_torn_line_is_skipped():
    line = events.to_line(EXAMPLES[1])
    assert [events.from_line(line[:end]) for end in range(len(line))] == [None] * len(line)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "null",
        "3",
        "[]",
        "[1]",
        '"text"',
        "{}",
        '{"kind": "unheard"}',
        '{"kind": []}',
        '{"kind": "warning"}',
        "\x00",
    ],
)
def test_foreign_lines_are_skipped(line):
    assert events.from_line(line) is None


def test_fields_of_a_newer_version_are_dropped():
    record = {**json.loads(events.to_line(EXAMPLES[5])), "colour": "red"}
    assert events.from_line(json.dumps(record)) == EXAMPLES[5]


def test_finite():
    value = {"a": (1, math.nan), "b": [math.inf, "x"], "c": {"d": -math.inf, "e": True}}
    assert events.finite(value) == {"a": [1, None], "b": [None, "x"], "c": {"d": None, "e": True}}


def test_lines_of_the_first_version_are_read():
    """They lack fields that came later, and have a time of their own."""
    lines = [
        '{"kind": "run_started", "time": 1.5, "schema": 1, "task": "pretrain", "run": "a", "step": 0, '
        '"total_steps": 9, "resumed": false, "device": "CPU", "precision": "fp32", "parameters": 5, "batch_size": 2}',
        '{"kind": "step", "time": 2.5, "step": 1, "losses": {"loss": null, "last": 1}, "lr": 0.1, "grad_norm": null, '
        '"images_per_s": 3, "data_wait": 0, "step_s": 0.5, "memory_gib": 1, "memory_peak_gib": 1, "eta_s": 4}',
        '{"kind": "checkpoint", "time": 3.5, "step": 1, "path": "checkpoints/step-000001", "seconds": 0.5}',
    ]
    data = "".join(f"{line}\n" for line in lines).encode()
    started, step, saved = events.from_lines(data)
    assert [repr(event) for event in (started, step, saved)] == [repr(events.from_line(line)) for line in lines]
    assert started.batch_size == 2 and started.backends == {} and started.time == 1.5
    assert math.isnan(step.losses["loss"]) and step.losses["last"] == 1.0 and math.isnan(step.grad_norm)
    assert step.skipped == 0 and saved.stall_s == 0.0


def test_of_many_lines_only_the_damaged_are_lost():
    lines = [events.to_line(event).encode() for event in EXAMPLES]
    found = events.from_lines(b"\n".join([lines[0], b"\xff", b"", lines[5], b'{"kind": "step"', lines[8]]) + b"\n")
    assert [event.kind if event else None for event in found] == [
        "run_started", None, None, "warning", None, "run_ended",
    ]  # fmt: skip
