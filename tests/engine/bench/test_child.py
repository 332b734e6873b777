"""Items in child processes that answer, crash, hang or lose their GPU: real processes, without torch."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from affmae_engine.bench.child import COMMAND, Children

TARGET = """
import os, signal, sys, time, types

def work(item, tell):
    print("noise on stdout")
    tell({"event": "step", "step": 1})
    if item == "hang":
        time.sleep(60)
    if item == "crash":
        raise ValueError("no such thing")
    if isinstance(item, int):
        os.kill(os.getpid(), item)
    if item == "lose gpu":
        def rand(*args, **more): raise RuntimeError("an illegal memory access was encountered")
        cuda = types.SimpleNamespace(is_available=lambda: True, synchronize=lambda: None)
        sys.modules["torch"] = types.SimpleNamespace(rand=rand, cuda=cuda)
        return {"status": "failed", "pid": os.getpid()}
    return {"status": "ok", "pid": os.getpid(), "value": float("nan")}
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """In which the targets above can be imported."""
    (tmp_path / "bench_target.py").write_text(TARGET)
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}


def run(items, environment, target: str = "bench_target:work", timeout: float | None = 30.0, log=None) -> list[dict]:
    with Children(timeout) as children:
        return list(children.run(target, items, environment=environment, log=log))


def outcomes(messages: list[dict]) -> list[tuple[int, str]]:
    return [(m["index"], m["event"]) for m in messages if m["event"] in ("ended", "failed")]


def test_items_are_done_in_order_in_one_process(environment, tmp_path) -> None:
    messages = run(["a", "b"], environment, log=tmp_path / "log")
    assert [(m["index"], m["event"]) for m in messages] == [
        (i, event) for i in (0, 1) for event in ("began", "step", "ended")
    ]
    results = [m["result"] for m in messages if m["event"] == "ended"]
    assert len({result["pid"] for result in results}) == 1
    assert results[0]["value"] is None, "JSON has no NaN"
    assert "noise on stdout" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("item", "reason"),
    [("crash", "exit code 1): ValueError: no such thing"), (9, "the process was killed"), (11, "signal 11")],
)
def test_a_crash_costs_one_item(environment, item, reason) -> None:
    messages = run(["a", item, "b"], environment)
    assert outcomes(messages) == [(0, "ended"), (1, "failed"), (2, "ended")]
    (failure,) = [m for m in messages if m["event"] == "failed"]
    assert reason in failure["reason"] and not failure["timed_out"]


def test_a_hanging_item_is_given_up_and_its_process_ended(environment) -> None:
    began = time.monotonic()
    messages = run(["hang", "a"], environment, timeout=2.0)
    assert outcomes(messages) == [(0, "failed"), (1, "ended")]
    assert next(m for m in messages if m["event"] == "failed")["timed_out"]
    assert time.monotonic() - began < 20


def test_a_child_that_lost_its_gpu_is_replaced(environment) -> None:
    messages = run(["a", "lose gpu", "b"], environment)
    assert outcomes(messages) == [(0, "ended"), (1, "ended"), (2, "ended")]
    first, second, third = (m["result"]["pid"] for m in messages if m["event"] == "ended")
    assert first == second != third


def test_a_child_that_cannot_start_fails_all_items(environment) -> None:
    messages = run(["a", "b"], environment, target="no_such_module:work")
    assert outcomes(messages) == [(0, "failed"), (1, "failed")]
    assert "no_such_module" in messages[0]["reason"]


def test_ending_stops_what_runs_and_starts_no_more(environment) -> None:
    with Children() as children:
        threading.Timer(1.0, children.end).start()
        messages = list(children.run("bench_target:work", ["hang", "a"], environment=environment))
    assert outcomes(messages) == []
    assert list(children.run("bench_target:work", ["a"], environment=environment)) == []


def test_a_child_exits_when_its_parent_is_gone(environment) -> None:
    process = subprocess.Popen(
        COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write('{"target": "bench_target:work", "items": ["hang"]}\n')
    process.stdin.flush()
    assert "began" in process.stdout.readline() and process.poll() is None
    process.stdin.close()
    assert process.wait(20) == 1
    process.stdout.close()
