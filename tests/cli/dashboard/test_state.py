"""What a run is doing, in every state; what its figures mean."""

import math
from pathlib import Path

import pytest

from affmae_cli.dashboard.decode import decode
from affmae_cli.dashboard.state import RunState
from affmae_cli.dashboard.status import Kind, Life, status_of
from affmae_cli.dashboard.verdicts import collapse_verdict, possible_ranks, speed_verdict, system_verdicts
from affmae_engine import events
from affmae_engine.config import RunConfig

LIVE = Life("held", silent_s=1.0, progress_s=1.0, age_s=500.0)
CONFIG = RunConfig.model_validate({"train": {"eval_every": 50, "steps": 100}})


def started(step: int = 0, *, time: float = 1000.0, resumed: bool = False) -> events.RunStarted:
    return events.RunStarted(
        task="pretrain", run="r", step=step, total_steps=100, resumed=resumed, device="NVIDIA X", precision="bf16",
        parameters=1, batch_size=2, time=time,
    )  # fmt: skip


def step(number: int, *, time: float, eta: float = 60.0, wait: float = 0.01) -> events.StepLogged:
    return events.StepLogged(
        step=number, losses={"loss": 1.0 / number}, lr=1e-3, grad_norm=1.0, images_per_s=10.0, data_wait=wait,
        step_s=0.1, memory_gib=1.0, memory_peak_gib=2.0, eta_s=eta, time=time,
    )  # fmt: skip


def ended(status: str, *, number: int = 40, time: float = 1100.0, message: str = "") -> events.RunEnded:
    return events.RunEnded(step=number, status=status, seconds=100.0, message=message, time=time)


def run(*found: events.Event, config: RunConfig | None = CONFIG) -> RunState:
    state = RunState(Path("runs/r"))
    state.config = config
    for event in found:  # one by one, as a live run comes
        state.apply(decode(events.to_line(event).encode() + b"\n"))
    return state


def training(*more: events.Event) -> RunState:
    return run(started(), *(step(number, time=1000.0 + number) for number in range(1, 41)), *more)


def saved(number: int, time: float = 1041.0) -> events.CheckpointSaved:
    return events.CheckpointSaved(step=number, path=f"checkpoints/step-{number:06d}", seconds=1.0, time=time)


def life(**changes: object) -> Life:
    return Life(**{**LIVE.__dict__, **changes})


@pytest.mark.parametrize(
    ("state", "signs", "kind", "words"),
    [
        (run(), LIVE, "waiting", "waiting for the trainer"),
        (run(), life(lock="free", age_s=5.0), "waiting", "waiting for the trainer"),
        (run(), life(lock="free", where="process 7 on box"), "gone", "no trainer works here (process 7 on box)"),
        (run(started()), life(progress_s=30.0), "waiting", "first step, 30s so far"),
        (run(started()), life(progress_s=2000.0), "stalled", "no step for 33m (none came yet"),
        (training(), LIVE, "running", "training"),
        (training(), life(lock="unknown"), "running", "training"),
        (training(), life(progress_s=59.0), "running", "training"),
        (training(), life(progress_s=300.0), "stalled", "no step for 5m00s (one comes every 1s; at most 1m00s"),
        (training(), life(progress_s=300.0, silent_s=300.0), "stalled", "it still holds the run"),
        (training(), life(lock="unknown", progress_s=300.0, silent_s=300.0), "stalled", "cannot be told from here"),
        (training(), life(lock="free", where="process 7 on box"), "gone", "gone (process 7 on box) without a word"),
        (training(), life(exit_code=-9), "gone", "killed by signal 9"),
        (training(), life(exit_code=1), "gone", "exit code 1"),
        (training(ended("finished")), life(lock="free"), "finished", "finished: 40 steps in 1m40s"),
        (training(ended("finished")), life(lock="held"), "finished", "finished"),
        (training(ended("stopped", message="by SIGINT")), life(lock="free"), "stopped", "step 40: by SIGINT"),
        (training(ended("failed", message="disk full")), life(lock="free"), "failed", "failed at step 40: disk full"),
        (training(ended("stopped"), started(40, time=1200.0, resumed=True)), LIVE, "waiting", "first step"),
        (run(started(time=9000.0), step(1, time=1.0)), LIVE, "running", "training"),  # the clock was set back
        (training(started(40, time=5.0, resumed=True)), LIVE, "waiting", "first step"),  # it was ahead before
        (run(started(), step(50, time=1050.0)), life(progress_s=300.0), "running", "evaluating at step 50"),
    ],
)  # fmt: skip
def test_states(state: RunState, signs: Life, kind: Kind, words: str) -> None:
    status = status_of(state, signs)
    assert status.kind == kind and words in status.text
    assert status.ended == (kind in ("finished", "stopped", "failed", "gone"))


def test_what_can_be_done_is_said() -> None:
    resume = "affmae pretrain --resume runs/r"
    assert resume in status_of(training(saved(40), ended("failed")), LIVE).hint
    assert "--resume" not in status_of(training(ended("failed")), LIVE).hint
    assert resume in status_of(training(saved(40)), life(lock="free")).hint
    assert resume in status_of(training(ended("stopped")), LIVE).hint


def test_a_clock_that_was_set_back_hides_no_step() -> None:
    state = run(started(time=9000.0), step(1, time=1000.0), step(2, time=1001.0))
    assert state.current and state.step == 2 and state.eta_s(1001.0) == 60.0
    for event in (started(2, time=500.0, resumed=True), step(3, time=501.0)):
        assert state.step == 2 and (state.current or math.isnan(state.eta_s(501.0)))
        state.apply(decode(events.to_line(event).encode() + b"\n"))
    assert state.step == 3


def test_a_long_evaluation_is_no_stall_once_one_was_as_long() -> None:
    long = events.Evaluated(step=40, metrics={"loss": 1.0}, seconds=200.0, time=1300.0)
    assert status_of(training(long), life(progress_s=500.0)).kind == "running"
    assert status_of(training(long), life(progress_s=700.0)).kind == "stalled"


def test_progress_and_times_of_a_resumed_run() -> None:
    state = training(saved(30))
    assert (state.step, state.total_steps, state.progress) == (40, 100, 0.4)
    assert state.elapsed_s(1050.0) == 50.0 and state.eta_s(1050.0) == 50.0
    for event in (started(30, time=2000.0, resumed=True), step(31, time=2001.0)):
        state.apply(decode(events.to_line(event).encode() + b"\n"))
    assert state.step == 31 and state.elapsed_s(2010.0) == pytest.approx(41.0 + 10.0)
    assert state.steps.curve("losses.loss").x_N.tolist() == list(range(1, 32))
    state.left = True
    assert state.elapsed_s(9999.0) == pytest.approx(41.0 + 1.0) and math.isnan(state.eta_s(9999.0))


def test_whatever_comes_is_kept() -> None:
    found = events.Evaluated(
        step=20, metrics={"score": 0.5}, per_class={"axon": {"iou": 0.7}}, effective_rank=[30.0, 9.0], best=True
    )
    worse = events.Evaluated(step=30, metrics={"score": 0.4}, effective_rank=[20.0, 10.0])
    pictures = [events.PreviewSaved(step=n, path=f"previews/step-{n:06d}.png") for n in (20, 30, 30)]
    state = training(
        found, worse, *pictures, events.Warned(step=3, message="w"), events.SystemSampled(step=4, power=3.0)
    )
    assert state.best == found and state.evaluated == worse and state.highest_ranks == [30.0, 10.0]
    assert state.held_out.curve("axon.iou").mean_N[0] == pytest.approx(0.7)
    assert state.held_out.curve("rank.2").mean_N.tolist() == [9.0, 10.0]
    assert state.preview == Path("runs/r/previews/step-000030.png") and len(state.previews) == 2
    assert state.warnings == 1 and state.system is not None and len(state.systems) == 1
    assert [event.kind for event in state.recent][-1] == "warning"
    assert state.megapixels_per_s == pytest.approx(10 * 512**2 / 1e6)


def test_nothing_is_known_of_an_empty_run() -> None:
    state = run(config=None)
    assert (state.step, state.progress, state.elapsed_s(1.0)) == (0, 0.0, 0.0)
    assert math.isnan(state.eta_s(1.0)) and math.isnan(state.data_wait) and math.isnan(state.megapixels_per_s)
    assert state.verdicts()[0].text == "too few steps yet to tell what limits the speed" and state.preview is None


def machine(**fields: object) -> events.SystemSampled:
    return events.SystemSampled(step=1, **fields)


@pytest.mark.parametrize(
    ("wait", "system", "on_cpu", "level", "words"),
    [
        (0.38, None, False, "bad", "data-bound: raise data.workers or move the store to a local disk"),
        (0.38, None, True, "bad", "data-bound"),
        (0.10, None, False, "note", "partly data-bound"),
        (0.01, None, False, "good", "GPU-bound: good"),
        (0.01, machine(gpu_utilisation=0.99, throttled=["power limit"]), False, "good", "at its power limit"),
        (0.01, machine(gpu_utilisation=0.3), False, "note", "half idle"),
        (0.38, machine(throttled=["thermal"], temperature=88.0, sm_clock=900.0, sm_clock_max=2400.0), False, "bad",
         "thermal throttling at 88 °C (900 of 2400 MHz)"),
        (0.01, None, True, "note", "no GPU"),
        (math.nan, None, False, "note", "too few steps yet to tell what limits the speed"),
    ],
)  # fmt: skip
def test_speed_in_words(wait: float, system, on_cpu: bool, level: str, words: str) -> None:
    verdict = speed_verdict(wait, system, on_cpu=on_cpu)
    assert verdict.level == level and words in verdict.text


def test_the_machine_in_words() -> None:
    assert system_verdicts(None) == [] and system_verdicts(machine()) == []
    crowded = machine(gpu="X", gpu_memory_used=23.9, gpu_memory_total=24.0, gpu_memory_others=5.2)
    texts = [verdict.text for verdict in system_verdicts(crowded)]
    assert texts == ["other processes hold 5.2 GiB of the card", "the card's memory is full"]
    assert system_verdicts(machine(gpu="X", gpu_missing="NVML: gone"))[0].text.startswith("no figures of the card")
    assert system_verdicts(machine(host_memory_used=15.9, host_memory_total=16.0))[0].level == "bad"


def test_collapse_is_told_from_a_stage_with_few_tokens() -> None:
    possible = possible_ranks(RunConfig())
    assert possible[0] == 96 and possible[3] == pytest.approx(4096 * 0.5 * 0.4**3 - 1)
    assert collapse_verdict([], [], possible) is None and collapse_verdict([math.nan], [math.nan], possible) is None
    assert collapse_verdict([40.0, 30.0], [50.0, 30.0], possible).level == "good"
    assert "stage 2 collapses" in collapse_verdict([40.0, 3.0], [50.0, 30.0], possible).text
    assert "stage 4 collapses" in collapse_verdict([40.0, 30, 20, 1.0], [40.0, 30, 20, 1.0], possible).text
    assert collapse_verdict([1.0], [1.0], [1.5]).level == "good"


def test_the_start_of_the_data_workers_is_no_verdict() -> None:
    state = run(started(), step(1, time=1010.0, wait=0.9))
    assert state.data_wait == pytest.approx(0.9) and "too few steps" in state.verdicts()[0].text
    state.apply(decode(events.to_line(step(2, time=1011.0, wait=0.01)).encode() + b"\n"))
    assert state.data_wait == pytest.approx(0.01) and "GPU-bound" in state.verdicts()[0].text
    both = b"".join(events.to_line(step(n, time=2000.0 + n, wait=1.0 / n)).encode() + b"\n" for n in (1, 100))
    state.apply(decode(events.to_line(started(time=2000.0)).encode() + b"\n" + both))
    assert state.data_wait == pytest.approx(0.01)
