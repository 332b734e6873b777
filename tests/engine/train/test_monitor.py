"""The thread beside the loop: requests are taken at once, the machine is sampled, its failure costs nothing."""

import json
import threading
import time
from collections.abc import Callable

import pynvml
import pytest
import torch

from affmae_engine import events
from affmae_engine.errors import Interrupted
from affmae_engine.run_dir import CHECKPOINT, STOP
from affmae_engine.runtime.gpu_stats import Card, own_memory, throttle_reasons
from affmae_engine.train import monitor
from affmae_engine.train.monitor import Monitor, host_sample
from tests.engine.train.fitting import fit

GIB = 2**30


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def make(**changes) -> Monitor:
    parts = {"step": lambda: 3, "emit": lambda event: None, "take_requests": lambda: None, **changes}
    return Monitor(Card(torch.device("cpu")), **parts)


def test_samples_come_at_once_and_then_at_their_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "REQUESTS_EVERY_S", 0.01)
    seen: list[tuple[float, events.Event]] = []
    with make(emit=lambda event: seen.append((time.monotonic(), event)), sample_every_s=0.2):
        wait_until(lambda: len(seen) >= 3)
    after = len(seen)
    assert seen[2][0] - seen[0][0] >= 0.39
    sample = seen[0][1]
    assert isinstance(sample, events.SystemSampled) and sample.step == 3
    assert 0 < sample.process_memory < sample.host_memory_total and 0 <= sample.cpu <= 1
    assert sample.gpu == "" and sample.gpu_missing
    time.sleep(0.1)
    assert len(seen) == after, "nothing comes after the block"


def test_its_failure_does_not_reach_the_training(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(monitor, "REQUESTS_EVERY_S", 0.01)
    failed = threading.Event()

    def fail() -> None:
        failed.set()
        raise OSError("the network is gone")

    with make(take_requests=fail):
        assert failed.wait(20)
    assert "training goes on" in caplog.text


def test_requests_are_acknowledged_while_a_step_takes_long(make_toy, make_config, make_run) -> None:
    """Steps of two seconds, logged never: a request is still answered within one, and met after the step."""
    config = make_config(steps=100, log_every=100, eval_every=0, preview_every=0, checkpoint_every=0)
    run, steps, taken = make_run(config), [], {}
    asked = threading.Event()

    def slow(_batch: object) -> None:
        steps.append(time.monotonic())
        if len(steps) == 2:
            (run.control / STOP).touch()
            (run.control / CHECKPOINT).touch()
            (run.control / "nonsense").touch()
            asked.set()
            time.sleep(2.0)

    def see(event: events.Event) -> None:
        if isinstance(event, events.RequestTaken):
            taken[event.request] = time.monotonic()

    with pytest.raises(Interrupted):
        fit(run, config, make_toy(before=slow).task, sinks=[see])
    assert set(taken) == {STOP, CHECKPOINT} and all(at - steps[1] < 1.5 for at in taken.values())
    assert run.checkpoint_steps() == [2] and [entry.name for entry in run.control.iterdir()] == ["nonsense"]
    kinds = [json.loads(line)["kind"] for line in run.metrics.read_text().splitlines()]
    assert kinds[0] == "run_started" and kinds[-1] == "run_ended" and "system" in kinds
    assert kinds.count("request") == 2
    assert "asked to stop: after this step" in run.log.read_text()


def test_events_of_two_threads_do_not_mix(make_toy, make_config, make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "REQUESTS_EVERY_S", 0.001)
    monkeypatch.setattr(monitor, "SAMPLE_EVERY_S", 0.0)
    config = make_config(steps=60, log_every=1)
    run = make_run(config)
    fit(run, config, make_toy().task)
    found = [events.from_line(line) for line in run.metrics.read_text().splitlines()]
    assert None not in found
    assert [event.step for event in found if isinstance(event, events.StepLogged)] == list(range(1, 61))


def test_the_host() -> None:
    found = host_sample()
    assert set(found) == {"cpu", "host_memory_used", "host_memory_total", "process_memory"}


def test_reasons_in_words() -> None:
    assert throttle_reasons(pynvml.nvmlClocksEventReasonGpuIdle) == []
    bits = pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonSwThermalSlowdown
    assert throttle_reasons(bits) == ["power limit", "thermal"]


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        ([(7, 10 * GIB), (9, 3 * GIB)], 10 * GIB),  # by process id
        ([(70, int(9.5 * GIB)), (90, 3 * GIB)], int(9.5 * GIB)),  # in a container: by what torch reserved
        ([(70, 20 * GIB), (90, 3 * GIB)], None),
        ([(7, None)], None),
        ([], None),
    ],
)
def test_which_memory_is_ours(processes, expected) -> None:
    assert own_memory(processes, pid=7, reserved=9 * GIB) == expected


@pytest.mark.gpu
def test_a_card_tells_its_figures() -> None:
    torch.zeros(1 << 20, device="cuda")
    card = Card(torch.device("cuda", 0))
    found = card.sample()
    card.close()
    assert card.missing == "" and found["gpu"] == torch.cuda.get_device_name(0)
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    assert 0.9 * total < found["gpu_memory_total"] < 1.2 * total
    assert 0 < found["gpu_memory_used"] <= found["gpu_memory_total"]
    assert 0 <= found["gpu_utilisation"] <= 1 and 10 < found["temperature"] < 120 and found["power"] > 0
    assert found["gpu_memory_others"] >= 0
