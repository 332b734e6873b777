"""When a run is told to be ill: too many skipped steps, and losses that jump."""

from collections.abc import Callable

import numpy as np
import pytest

from affmae_engine import events
from affmae_engine.config import TrainConfig
from affmae_engine.errors import DivergedError
from affmae_engine.train.health import Health
from affmae_engine.train.metrics import Means
from tests.engine.train.fitting import fit

Make = Callable[..., object]


def window(skipped: int, steps: int = 10, streak: int = 0) -> Means:
    return Means({"loss": 1.0}, 1.0, streak, skipped, skipped, steps)


def test_a_falling_noisy_loss_is_no_jump_and_a_spike_is() -> None:
    rng, health = np.random.default_rng(0), Health()
    curve = 0.3 + np.exp(-np.arange(400) / 40) + 0.02 * rng.normal(size=400)
    assert [health.jump(float(loss), 8.0) for loss in curve] == [None] * 400
    assert health.jump(1.2, 8.0) == pytest.approx(0.3, abs=0.02)
    assert health.jump(0.31, 8.0) is None, "one outlier does not move the median"
    assert health.jump(float("nan"), 8.0) is None and health.jump(9.0, 0.0) is None


def test_a_constant_loss_may_waver_and_the_first_ones_are_not_judged() -> None:
    health = Health()
    assert [health.jump(loss, 8.0) for loss in (1.0, 5.0, 1.0)] == [None] * 3
    health = Health()
    assert [health.jump(1.0, 8.0) for _ in range(20)] == [None] * 20
    assert health.jump(1.07, 8.0) is None and health.jump(1.09, 8.0) == 1.0


def test_more_than_one_percent_of_the_last_thousand_steps() -> None:
    train, health = TrainConfig(), Health()
    for _ in range(200):  # one in 200: goes on for ever
        assert health.too_many_skipped(window(1, steps=200), train, overflows_expected=False) == ""
    health = Health()
    found = [health.too_many_skipped(window(1), train, overflows_expected=False) for _ in range(11)]
    assert found[:-1] == [""] * 10 and found[-1] == "11 of the last 1000 steps had a non-finite loss or gradient"
    health = Health()
    assert all(health.too_many_skipped(window(1), train, overflows_expected=True) == "" for _ in range(50))
    assert "25 steps in a row" in health.too_many_skipped(window(25, streak=25), train, overflows_expected=True)


def test_what_is_remembered_goes_through_a_checkpoint() -> None:
    health, again = Health(), Health()
    for loss in range(60):
        health.jump(float(loss), 8.0)
        health.too_many_skipped(window(loss % 2), TrainConfig(max_nonfinite_share=0), overflows_expected=False)
    again.load_json(health.to_json())
    assert again.to_json() == health.to_json() and len(again.losses) == 50 == again.losses.maxlen


def test_a_jump_and_its_samples_are_recorded(make_toy: Make, make_config: Make, make_run: Make) -> None:
    def spoil(batch: dict) -> None:
        calls.append(batch)
        if len(calls) == 15:
            batch["x"] *= 100

    calls: list[dict] = []
    config = make_config(steps=16, log_every=1, eval_every=0)
    run = make_run(config)
    seen: list[events.Event] = []
    fit(run, config, make_toy(before=spoil).task, sinks=[seen.append])
    (warning,) = [event for event in seen if isinstance(event, events.Warned)]
    assert warning.step == 15 and "the loss jumped to" in warning.message and "samples 56 to 59" in warning.message


def test_scattered_bad_steps_end_the_run(make_toy: Make, make_config: Make, make_run: Make) -> None:
    config = make_config(steps=200, log_every=5, eval_every=0, checkpoint_every=50)
    run = make_run(config)
    with pytest.raises(DivergedError, match=r"11 of the last 1000 steps .* up to step 115 \(samples 440 to 459\)"):
        fit(run, config, make_toy(poisoned={40 * k for k in range(1, 99)}).task)
    assert run.checkpoint_steps() == [100, 50]
