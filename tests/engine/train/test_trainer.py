"""The trainer on a toy task: what is written, what is skipped, how it stops."""

import json
import logging
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from affmae_engine import checkpoint, events
from affmae_engine.errors import BusyError, ConfigError, DivergedError, Interrupted, ResourceError
from affmae_engine.run_dir import CHECKPOINT, STOP, RunDir
from affmae_engine.runtime.signals import StopRequest
from affmae_engine.train.state import Snapshot
from tests.engine.train.fitting import fit

Make = Callable[..., object]


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return checkpoint.load_weights(run.root, which="last")[1]


def lines(run: RunDir) -> list[events.Event]:
    found = [events.from_line(text) for text in run.metrics.read_text().splitlines()]
    assert None not in found
    return [event for event in found if event is not None]


def of_kind(run: RunDir, kind: type) -> list:
    return [event for event in lines(run) if isinstance(event, kind)]


def test_a_run_writes_what_the_architecture_promises(make_toy: Make, make_config: Make, make_run: Make) -> None:
    config = make_config()
    run, toy, seen = make_run(config), make_toy(), []
    summary = fit(run, config, toy.task, sinks=[seen.append])
    assert [event.kind for event in lines(run)] == [event.kind for event in seen]
    kinds = "run_started step evaluated step step evaluated preview run_ended"
    assert [event.kind for event in seen if event.kind != "checkpoint"] == kinds.split()
    assert [event.step for event in seen if event.kind == "checkpoint"] == [3, 6], "reported when they are complete"
    assert seen[-2].kind == "checkpoint"
    assert toy.source.asked == list(range(6 * 4))
    assert run.checkpoint_steps() == [6, 3]
    assert json.loads(run.summary.read_text())["status"] == "finished" == summary.status
    assert json.loads(run.best.read_text())["step"] == summary.best_step == 6
    assert run.preview(6).read_bytes().startswith(b"\x89PNG")
    assert "step 6/6" in run.log.read_text()
    logged = of_kind(run, events.StepLogged)
    assert [event.step for event in logged] == [2, 4, 6]
    assert all(list(event.losses) == ["loss", "last"] for event in logged)
    assert all(event.images_per_s > 0 and event.eta_s >= 0 and 0 <= event.data_wait <= 1 for event in logged)
    assert not logging.getLogger("affmae_engine").handlers


def test_the_first_preview_does_not_wait_for_its_turn(
    make_toy: Make, make_config: Make, make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("affmae_engine.train.trainer.FIRST_PREVIEW_S", 0.0)
    for every, steps in ((100, [1, 6]), (0, [6])):
        config = make_config(preview_every=every)
        run = make_run(config, f"every-{every}")
        fit(run, config, make_toy().task)
        assert [event.step for event in of_kind(run, events.PreviewSaved)] == steps


def test_the_time_left_counts_evaluations_before_and_after_the_first(
    make_toy: Make, make_config: Make, make_run: Make
) -> None:
    config = make_config(steps=12, log_every=1, eval_every=3, checkpoint_every=0)
    run, task = make_run(config), make_toy().task
    evaluate = task.evaluate

    def slow(*arguments: object) -> object:
        time.sleep(0.2)
        return evaluate(*arguments)

    task.evaluate, task.evaluated_images = slow, 1e6
    fit(run, config, task)
    left = {event.step: event.eta_s for event in of_kind(run, events.StepLogged)}
    guess = 1e6 / 3 / of_kind(run, events.StepLogged)[0].images_per_s
    assert left[1] == pytest.approx(4 * guess, rel=0.1)
    assert 3 * 0.2 < left[5] < 3 * 0.2 + 1 and left[3] > 10 * left[5]
    assert 0.2 < left[11] < 0.2 + 0.5 and 0.2 < left[12] < 0.2 + 0.5, "the last evaluation is still to come"


def test_accumulation_gives_the_gradients_of_the_whole_batch(make_toy: Make, make_config: Make, make_run: Make) -> None:
    results = []
    for name, micro in (("whole", None), ("parts", 2)):
        config = make_config(micro_batch=micro)
        toy = make_toy()
        toy.task.model[3].p = 0.0  # dropout depends on the micro-batch
        run = make_run(config, name)
        fit(run, config, toy.task)
        results.append(weights(run))
        assert toy.source.asked == list(range(24))
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_poisoned_batch_changes_nothing_and_is_counted(
    precision: str, make_toy: Make, make_config: Make, make_run: Make
) -> None:
    config = make_config(
        steps=4, precision=precision, log_every=4, eval_every=0, checkpoint_every=1, keep_checkpoints=9
    )
    toy = make_toy(poisoned={2 * 4 + 1})
    run = make_run(config)
    fit(run, config, toy.task)
    before, after = checkpoint.Checkpoint(run.checkpoint(2), 2), checkpoint.Checkpoint(run.checkpoint(3), 3)
    for kind in ("weights", "optimizer"):
        a, b = getattr(before, kind)(), getattr(after, kind)()
        assert all(torch.equal(a[name], b[name]) for name in a)
    later = checkpoint.Checkpoint(run.checkpoint(4), 4).weights()
    assert any(not torch.equal(later[name], tensor) for name, tensor in after.weights().items())
    (step,) = of_kind(run, events.StepLogged)
    assert step.skipped == 1 and step.losses["loss"] == step.losses["loss"]
    (warning,) = of_kind(run, events.Warned)
    assert "1 step with a non-finite" in warning.message
    if precision == "fp16":
        assert after.state()["scaler"]["scale"] == before.state()["scaler"]["scale"] / 2


def test_clipping_bounds_the_update_and_zero_turns_it_off(make_toy: Make, make_config: Make, make_run: Make) -> None:
    moments = {}
    for clip in (0.0, 1e-3):
        config = make_config(steps=1)
        config = config.model_copy(update={"optim": config.optim.model_copy(update={"clip_norm": clip})})
        run = make_run(config, f"clip{clip}")
        fit(run, config, make_toy().task)
        (saved,) = [checkpoint.Checkpoint(run.checkpoint(1), 1)]
        firsts = [tensor for name, tensor in saved.optimizer().items() if name.endswith(".exp_avg")]
        moments[clip] = float(torch.nn.utils.get_total_norm(firsts)) / (1 - config.optim.betas[0])
        (step,) = of_kind(run, events.StepLogged)
        assert step.grad_norm > 0.1  # reported before clipping
    assert moments[0.0] == pytest.approx(step.grad_norm, rel=1e-4)
    assert moments[1e-3] == pytest.approx(1e-3, rel=1e-4)


def test_too_many_bad_steps_stop_the_run_without_saving(make_toy: Make, make_config: Make, make_run: Make) -> None:
    config = make_config(steps=20, max_nonfinite=3, eval_every=0, checkpoint_every=4)
    run = make_run(config)
    with pytest.raises(DivergedError, match=r"3 steps in a row.*checkpoint of step 4"):
        fit(run, config, make_toy(poisoned=set(range(5 * 4, 999))).task)
    assert run.checkpoint_steps() == [4]
    ended = lines(run)[-1]
    assert isinstance(ended, events.RunEnded) and ended.status == "failed"
    assert json.loads(run.summary.read_text())["status"] == "failed"


def test_weights_that_are_not_finite_are_never_saved(make_toy: Make, make_config: Make, make_run: Make) -> None:
    config = make_config(steps=3, checkpoint_every=3, log_every=3)
    toy = make_toy()

    def spoil(event: events.Event) -> None:
        if isinstance(event, events.StepLogged):
            toy.task.model[0].weight.data[0, 0] = float("inf")

    run = make_run(config)
    with pytest.raises(DivergedError, match="weights are not finite at step 3"):
        fit(run, config, toy.task, sinks=[spoil])
    assert run.checkpoint_steps() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_ends_cleanly(
    number: signal.Signals, make_toy: Make, make_config: Make, make_run: Make
) -> None:
    calls = []

    def raise_in_step_2(batch: object) -> None:
        calls.append(batch)
        if len(calls) == 2:
            signal.raise_signal(number)

    config = make_config(checkpoint_every=0, eval_every=0)
    run, before = make_run(config), signal.getsignal(number)
    with StopRequest().installed() as stop, pytest.raises(Interrupted) as caught:
        fit(run, config, make_toy(before=raise_in_step_2).task, stop=stop)
    assert signal.getsignal(number) is before
    assert caught.value.exit_code == 128 + number
    assert f"--resume {run.root}" in caught.value.hint
    assert run.checkpoint_steps() == [2]
    assert lines(run)[-1].status == "stopped"
    assert json.loads(run.summary.read_text())["status"] == "stopped"


@pytest.mark.parametrize("reads", range(1, 6))
def test_a_request_at_any_moment_of_a_step_ends_with_its_checkpoint(
    reads: int, make_toy: Make, make_config: Make, make_run: Make
) -> None:
    class Late(StopRequest):
        """Comes after it was looked at so many times."""

        left = reads

        @property
        def requested(self) -> bool:
            self.left -= 1
            return self.left < 0

    config = make_config(checkpoint_every=0, eval_every=0, steps=50)
    run = make_run(config)
    with pytest.raises(Interrupted):
        fit(run, config, make_toy().task, stop=Late())
    assert run.checkpoint_steps() == [json.loads(run.summary.read_text())["step"]]


def test_a_second_interrupt_takes_the_default_action() -> None:
    numbers = []
    with StopRequest(numbers.append).installed() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested and stop.reason == "SIGINT" and numbers == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest().installed() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_requests_in_the_control_folder_are_obeyed_and_removed(
    make_toy: Make, make_config: Make, make_run: Make
) -> None:
    config = make_config(steps=10, eval_every=0, checkpoint_every=0)
    run = make_run(config)
    (run.control / STOP).touch()  # left behind by an earlier process

    def ask(event: events.Event) -> None:
        if isinstance(event, events.StepLogged) and event.step in (2, 6):
            (run.control / (CHECKPOINT if event.step == 2 else STOP)).touch()

    with pytest.raises(Interrupted):
        fit(run, config, make_toy().task, sinks=[ask])
    assert run.checkpoint_steps() == [6, 2]
    assert list(run.control.iterdir()) == []


def test_best_and_newest_checkpoints_are_kept(make_toy: Make, make_config: Make, make_run: Make) -> None:
    config = make_config(steps=6, eval_every=1, checkpoint_every=1, keep_checkpoints=2)
    run = make_run(config)
    fit(run, config, make_toy(scores=[1.0, 9.0, 3.0, float("nan"), 2.0, 1.0]).task)
    assert run.checkpoint_steps() == [6, 5, 2]
    assert json.loads(run.best.read_text()) == {"step": 2, "metric": "score", "value": 9.0}
    assert [event.best for event in of_kind(run, events.Evaluated)] == [True, True, False, False, False, False]
    assert checkpoint.load_weights(run.root)[0].step == 2
    assert checkpoint.load_weights(run.root, which="last")[0].step == 6


def test_a_best_score_between_checkpoints_is_saved(make_toy: Make, make_config: Make, make_run: Make) -> None:
    config = make_config(steps=6, eval_every=2, checkpoint_every=0)
    run = make_run(config)
    fit(run, config, make_toy(scores=[1.0, 5.0, 3.0]).task)
    assert run.checkpoint_steps() == [6, 4]
    assert checkpoint.best_step(run) == 4


def test_failed_saves_are_survived_until_the_third(
    make_toy: Make, make_config: Make, make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(steps=12, eval_every=1, checkpoint_every=1)
    run, real, failing = make_run(config), Snapshot.write, {2, 3, 6, 7, 8}

    def write(snapshot: Snapshot, run: RunDir) -> Path:
        if snapshot.metadata.step in failing:
            raise ResourceError("disk full", "free some")
        return real(snapshot, run)

    monkeypatch.setattr(Snapshot, "write", write)
    with pytest.raises(ResourceError, match="disk full"):
        fit(run, config, make_toy(scores=[1, 5, 2, 3, 1, 1, 1, 1]).task)
    assert sorted(run.checkpoint_steps()) == [4, 5]
    assert checkpoint.best_step(run) == 4, "the best score that has a checkpoint"
    assert len(of_kind(run, events.Warned)) == 4
    assert lines(run)[-1].step == 9, "known in the step after"


def test_a_run_is_never_started_over_another(make_toy: Make, make_config: Make, make_run: Make) -> None:
    config = make_config()
    run = make_run(config)
    fit(run, config, make_toy().task)
    with pytest.raises(ConfigError, match="already contains a run"):
        fit(run, config, make_toy().task)


def test_a_second_trainer_is_refused(make_toy: Make, make_config: Make, make_run: Make) -> None:
    config = make_config()
    run = make_run(config)
    with run.locked(), pytest.raises(BusyError):
        fit(run, config, make_toy().task)


def test_a_failing_viewer_does_not_stop_the_training(make_toy: Make, make_config: Make, make_run: Make) -> None:
    config = make_config()
    run, calls = make_run(config), []

    def broken(event: events.Event) -> None:
        calls.append(event)
        raise BrokenPipeError

    assert fit(run, config, make_toy().task, sinks=[broken]).status == "finished"
    assert len(calls) == 1


def test_too_small_a_disk_is_found_before_training(
    make_toy: Make, make_config: Make, make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    run = make_run(config)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    toy = make_toy()
    with pytest.raises(ResourceError, match="need"):
        fit(run, config, toy.task)
    assert toy.source.asked == []


def test_out_of_memory_is_one_line_with_a_hint(make_toy: Make, make_config: Make, make_run: Make) -> None:
    def explode(batch: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    config = make_config()
    with pytest.raises(ResourceError, match="even with one image at a time") as caught:
        fit(make_run(config), config, make_toy(before=explode).task)
    assert "crop_size" in caught.value.hint
