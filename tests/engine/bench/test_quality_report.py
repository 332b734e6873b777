"""Figures over seeds, and the sentences and tables made of them."""

import pytest

from affmae_engine.bench import quality_report


def find(records, **wanted):
    (record,) = [r for r in records if all(r[name] == value for name, value in wanted.items())]
    return record


def test_mean_and_spread_over_seeds(quality_document) -> None:
    values = quality_document()
    record = find(values["summary"], model="vit-mae", init="scratch", fraction=1.0)
    assert record["miou"] == pytest.approx(0.51) and record["spread"] == pytest.approx(0.01)
    assert record["seeds"] == [0, 1, 2] and record["sections"] == 14 and record["failed"] == 0
    assert record["per_class"]["membrane"]["mean"] == pytest.approx(0.41)
    taken = find(values["times"], model="affmae")
    assert taken["seconds"] == {"mean": 10.0, "spread": 0.0}, "start-up is not counted"


def test_differences_are_taken_seed_by_seed(quality_document) -> None:
    values = quality_document()
    pretrained = find(values["differences"], init="pretrained", fraction=0.1)
    assert pretrained["mean"] == pytest.approx(0.05) and pretrained["spread"] == pytest.approx(0, abs=1e-9)
    assert pretrained["every_seed"]
    scratch = find(values["differences"], init="scratch", fraction=0.1)
    assert scratch["mean"] == pytest.approx(0, abs=1e-9) and not scratch["every_seed"]


def test_a_lead_in_every_seed_is_said_with_its_luck(quality_document) -> None:
    text = quality_report.markdown(quality_document())
    assert "With all labels (14 sections), pretrained: AFFMAE 0.660 ± 0.010, ViT-MAE 0.610 ± 0.010" in text
    assert "AFFMAE is ahead by 0.050, in every one of 3 seeds (with equal models that happens 1 time in 4)" in text
    assert "With 10% of the labels (1 section)" in text
    assert "800 crops and ViT-MAE on 200: 4.0 times as many. Taken were 10.0 s and 10.0 s" in text
    assert "These times" not in text
    assert "nothing was trained on, not even without labels: stack 16-19" in text
    assert "The held-out loss is the mean squared error of the model's last output" in text
    assert "by `affmae bench --quality`" in text and "Python 3.12; 16 processors" in text


def test_a_lead_within_the_spread_is_no_verdict(quality_document) -> None:
    text = quality_report.markdown(
        quality_document(lambda model, i, f, seed: 0.5 + 0.1 * (seed - 1) * (model == "affmae"))
    )
    assert "lies within the spread of 3 seeds: no verdict" in text and "is ahead" not in text


def test_one_seed_is_called_one_seed(quality_document) -> None:
    text = quality_report.markdown(quality_document(seeds=(0,)))
    assert "One seed has no spread" in text and "±" not in text.split("## How")[0]


def test_failures_are_rows(quality_document) -> None:
    values = quality_document(lambda m, i, f, seed: None if (m, seed) == ("vit-mae", 1) else 0.5)
    text = quality_report.markdown(values)
    assert "## What did not work" in text and "CUDA out of memory" in text
    assert "0.500 ± 0.000 (1 failed)" in text
    assert find(values["differences"], init="pretrained", fraction=1.0)["seeds"] == 2
    nothing = quality_report.markdown(quality_document(lambda m, i, f, s: None if m == "vit-mae" else 0.5))
    assert "is ahead" not in nothing and "3 failed" in nothing


def test_unequal_times_are_said(quality_document) -> None:
    values = quality_document()
    for record in values["times"]:
        record["seconds"]["mean"] = 9.0 if record["model"] == "affmae" else 10.0
    assert "These times are not equal" in quality_report.markdown(values)


def test_unfinished_is_said_and_charts_are_shown(quality_document) -> None:
    values = {**quality_document(), "complete": False}
    text = quality_report.markdown(values, ("label-efficiency-small.png",))
    assert "not finished" in text and "![label efficiency small](label-efficiency-small.png)" in text
