"""Benchmark processes that answer, crash, hang or refuse: real processes, without torch, so that they are quick."""

import os
import sys
import threading
import time

import pytest

from affmae_engine.bench import processes
from affmae_engine.bench.case import Answer, Case, Measurement, Request
from affmae_engine.bench.processes import Processes
from affmae_engine.errors import AffmaeError

REQUEST = Request(case=Case(model="vit-mae", size="tiny", resolution=64, batch=2), device="cpu", steps=1, warmup=1)


@pytest.fixture
def instead(monkeypatch: pytest.MonkeyPatch):
    """instead(code): processes run this Python code in place of the benchmark's."""
    return lambda code: monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", code))


def ask(timeout: float = 30.0) -> Measurement:
    with Processes(timeout) as running:
        return running.ask(REQUEST)


def test_a_process_started_ahead_answers_the_next_request_or_ends(instead) -> None:
    said = Answer(measurement=Measurement(ms=7.0)).model_dump_json()
    instead(f"import os, sys; sys.stdin.read() and print({said!r}.replace('7.0', str(os.getpid())))")
    with Processes(30, ahead=True) as running:
        running.ask(REQUEST)
        ahead = running._spare
        assert running.ask(REQUEST).ms == ahead.pid
        spare = running._spare
        assert spare.poll() is None
    assert spare.poll() is not None


def test_the_request_arrives_and_noise_is_no_answer(instead) -> None:
    said = Answer(measurement=Measurement(ms=7.0)).model_dump_json()
    instead(f"import sys; assert '\"vit-mae\"' in sys.stdin.read(); print('noise', file=sys.stderr); print({said!r})")
    assert ask().ms == 7.0
    instead("print('hello')")
    assert ask().status == "failed"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "signal 9; the system does this when main memory"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11"),
        ("raise ValueError('no such thing')", "exit code 1: ValueError: no such thing"),
        ("raise SystemExit(3)", "exit code 3: it said nothing"),
    ],
)
def test_a_crash_is_a_result(instead, code: str, said: str) -> None:
    instead(code)
    found = ask()
    assert found.status == "failed" and said in found.note


def test_a_process_that_hangs_is_given_up_and_ended(instead, tmp_path) -> None:
    file = str(tmp_path / "pid")
    instead(f"import os, pathlib, time; pathlib.Path({file!r}).write_text(str(os.getpid())); time.sleep(60)")
    began = time.monotonic()
    found = ask(timeout=2)
    assert (found.status, found.note) == ("timed out", "no answer within 2 s")
    assert time.monotonic() - began < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_an_error_for_the_user_comes_through(instead) -> None:
    said = Answer(error="no such store", hint="ingest it", exit_code=3).model_dump_json()
    instead(f"print({said!r})")
    with pytest.raises(AffmaeError, match="no such store") as error:
        ask()
    assert (error.value.hint, error.value.exit_code) == ("ingest it", 3)


def test_leaving_ends_what_runs(instead) -> None:
    instead("import time; time.sleep(60)")
    found: list[Measurement] = []
    with Processes(60) as running:
        thread = threading.Thread(target=lambda: found.append(running.ask(REQUEST)))
        thread.start()
        while not running._running:
            time.sleep(0.01)
    thread.join(10)
    assert not thread.is_alive() and found[0].status == "failed"
    with pytest.raises(RuntimeError, match="no process is started"):
        running.ask(REQUEST)
