"""What the figures of a run mean in words."""

import math

import numpy as np
import pytest

from affmae_cli.dashboard.columns import Columns
from affmae_cli.dashboard.verdicts import (
    collapse_verdict,
    diverged,
    headline,
    possible_ranks,
    speed_verdict,
    system_verdicts,
    trend,
)
from affmae_engine import events
from affmae_engine.config import RunConfig
from tests.cli.dashboard.test_run_model import started, step, take, training


def machine(**fields: object) -> events.SystemSampled:
    return events.SystemSampled(step=1, **fields)


@pytest.mark.parametrize(
    ("wait", "system", "on_cpu", "level", "words"),
    [
        (0.38, None, False, "bad", "data-bound: raise data.workers or move the dataset to a local disk"),
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
def test_speed_in_words(wait: float, system: object, on_cpu: bool, level: str, words: str) -> None:
    verdict = speed_verdict(wait, system, on_cpu=on_cpu)  # type: ignore[arg-type]
    assert verdict.level == level and words in verdict.text


def test_the_machine_in_words() -> None:
    assert system_verdicts(None) == [] and system_verdicts(machine()) == []
    crowded = machine(gpu="X", gpu_memory_used=23.9, gpu_memory_total=24.0, gpu_memory_others=5.2)
    texts = [verdict.text for verdict in system_verdicts(crowded)]
    assert texts == ["other processes hold 5.2 GiB of the GPU", "the GPU's memory is full"]
    assert system_verdicts(machine(gpu="X", gpu_missing="NVML: gone"))[0].text.startswith("no figures of the GPU")
    assert system_verdicts(machine(host_memory_used=15.9, host_memory_total=16.0))[0].level == "bad"


def test_collapse_is_told_from_a_stage_with_few_tokens() -> None:
    possible = possible_ranks(RunConfig())
    assert possible[0] == 96 and possible[3] == pytest.approx(4096 * 0.5 * 0.4**3 - 1)
    assert collapse_verdict([], [], possible) is None and collapse_verdict([math.nan], [math.nan], possible) is None
    found = collapse_verdict([40.0, 30.0], [50.0, 30.0], possible)
    assert found is not None and found.level == "good"
    found = collapse_verdict([40.0, 3.0], [50.0, 30.0], possible)
    assert found is not None and "stage 2 collapses" in found.text


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.linspace(3, 1, 40), "falling"),
        (np.exp(-np.arange(40) / 8), "falling slowly"),
        (np.exp(-np.arange(80) / 5), "flat"),
        (np.linspace(0, 1, 40), "rising"),
        (np.full(40, 2.0), "flat"),
        (np.array([1.0, 0.5]), ""),
        (np.full(40, math.nan), ""),
    ],
)
def test_how_a_curve_moves(values: np.ndarray, words: str) -> None:
    assert trend(np.arange(len(values), dtype=float), values) == words


def test_a_loss_above_its_start_has_diverged() -> None:
    steps = Columns()
    steps.extend(range(100), [{"losses.loss": 2.0 - n / 100} for n in range(100)])
    assert not diverged(steps)
    steps.extend(range(100, 140), [{"losses.loss": 4.0} for _ in range(40)])
    assert diverged(steps)


def test_the_headline_of_a_pretraining_says_what_is_explained() -> None:
    found = [
        events.Evaluated(step=n, metrics={"loss": 1 - n / 100, "explained": n / 100}, time=1000.0 + n)
        for n in (10, 20, 30, 40)
    ]
    said = headline(training(*found))
    assert said.level == "good"
    assert said.text == "explains 40% of what is hidden, still falling; data arrives in time; 50s left"
    worse = events.Evaluated(step=41, metrics={"loss": 2.0, "explained": -0.1}, time=1041.0)
    assert headline(training(worse)).text.startswith("no better than filling what is hidden with its mean so far")


def test_the_headline_of_a_finetuning_names_the_weakest_class() -> None:
    scores = {"axon": {"iou": 0.8}, "vesicle": {"iou": 0.3}, "unseen": {"iou": math.nan}}
    found = events.Evaluated(step=40, metrics={"iou": 0.55}, per_class=scores, time=1040.0)
    assert headline(training(found)).text.startswith("mean IoU 0.550; weakest: vesicle 0.300; data arrives")


def test_waiting_for_data_is_in_the_headline() -> None:
    model = training()
    take(model, started(40, resumed=True), *(step(n, wait=0.4) for n in range(41, 50)))
    assert "waits for data 40% of the time" in headline(model).text
