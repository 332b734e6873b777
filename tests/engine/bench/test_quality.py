"""The plan of a quality comparison, figures over seeds, and the tables made of them."""

import pytest

from affmae_engine.bench.quality import Lengths, Part, QualityPlan, Speed, tables_of
from affmae_engine.bench.report import compare
from affmae_engine.config import RunConfig
from affmae_engine.errors import ConfigError


def plan(**changes) -> QualityPlan:
    config = RunConfig.model_validate({"optim": {"layer_decay": 0.6}})
    given = {"seeds": (0, 1, 2), "fractions": (0.1, 0.25, 1.0), "budget_s": 60.0, "finetune_budget_s": 20.0}
    return QualityPlan(**{**given, **changes}, configs={"pretrain": config, "finetune": config})


def find(records, **wanted):
    (record,) = [r for r in records if all(r[name] == value for name, value in wanted.items())]
    return record


def table(values, title: str) -> str:
    (found,) = [table for table in tables_of(values) if table.title.startswith(title)]
    return found.markdown()


def test_both_models_are_trained_in_every_combination() -> None:
    parts = plan().parts()
    assert len(parts) == len(set(parts)) == len({part.name for part in parts}) == 2 * 3 * (1 + 2 * 3)
    order = ["affmae", "vit-mae"], ["vit-mae", "affmae"], ["affmae", "vit-mae"]
    assert [chain[0].model for chain in plan().chains()] == [model for pair in order for model in pair]
    assert all(chain[0].stage == "pretrain" for chain in plan().chains())


def test_models_differ_in_nothing_but_the_family() -> None:
    for init, fraction in ((None, None), ("scratch", 0.25)):
        ours, theirs = (plan().config_of(Part(model, 1, init, fraction), 50) for model in ("affmae", "vit-mae"))
        assert ours.model.family == "affmae" and theirs.model.family == "vit-mae"
        assert ours.model_copy(update={"model": theirs.model}) == theirs
        assert (ours.train.steps, ours.train.seed, ours.train.eval_every, ours.train.checkpoint_every) == (50, 1, 0, 0)
    assert plan().config_of(Part("affmae", 0), 50, micro_batch=2).train.micro_batch == 2


def test_from_scratch_all_layers_get_the_full_rate() -> None:
    decays = {part.init: plan().config_of(part, 50).optim.layer_decay for part in plan().parts()}
    assert decays == {None: 0.6, "pretrained": 0.6, "scratch": 1.0}


def test_steps_follow_from_speeds() -> None:
    speeds = {
        ("affmae", "pretrain"): Speed(0.1), ("vit-mae", "pretrain"): Speed(0.4),
        ("affmae", "finetune"): Speed(0.05), ("vit-mae", "finetune"): Speed(0.2),
    }  # fmt: skip
    lengths = plan().lengths(speeds)
    assert lengths == Lengths({"affmae": 600, "vit-mae": 150}, 100), "both finetune as many steps as the slower one"
    faster = {key: Speed(speed.step_s / 2) for key, speed in speeds.items()}
    assert plan().lengths(faster, lengths) == lengths, "finished parts must not get other lengths"
    broken = {**speeds, ("vit-mae", "pretrain"): Speed(None, status="out of memory")}
    assert plan().lengths(broken).pretrain == {"affmae": 600}
    with pytest.raises(ConfigError, match="--budget 60s allows 6 steps"):
        plan().lengths({**speeds, ("vit-mae", "pretrain"): Speed(10.0)})
    with pytest.raises(ConfigError, match="allows 80 steps") as refused:
        plan().lengths({**speeds, ("affmae", "finetune"): Speed(0.25)})
    assert "--finetune-budget 25s" in refused.value.hint


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


def test_tables_have_scores_times_and_data(quality_document) -> None:
    values = quality_document()
    assert "0.660 ± 0.010" in table(values, "Mean IoU") and "0.610 ± 0.010" in table(values, "Mean IoU")
    assert "+0.050 ± 0.000, every seed" in table(values, "AFFMAE minus ViT-MAE")
    assert "800" in table(values, "Pretraining") and "stack 16-19" in table(values, "Data")


def test_one_seed_has_no_spread(quality_document) -> None:
    text = "".join(t.markdown() for t in tables_of(quality_document(seeds=(0,))) if "Mean IoU" not in t.title)
    assert "±" not in text and "every seed" not in text


def test_failures_are_rows(quality_document) -> None:
    values = quality_document(lambda m, i, f, seed: None if (m, seed) == ("vit-mae", 1) else 0.5)
    assert "CUDA out of memory" in table(values, "Failures")
    assert "0.500 ± 0.000 (1 failed)" in table(values, "Mean IoU")
    assert find(values["differences"], init="pretrained", fraction=1.0)["seeds"] == 2


def test_scores_are_compared_by_mean_and_deviation(quality_document) -> None:
    old, one = quality_document(), quality_document(seeds=(0,))
    new = quality_document(lambda m, i, f, seed: 0.9 + 0.001 * seed if i == "pretrained" else 0.5)
    verdicts = {row[0]: row[-1] for row in compare(old, new)[0].rows}
    assert verdicts["affmae, pretrained, 100% of the labels"] == "better"
    assert {row[-1] for row in compare(one, old)[0].rows} == {"no spread known"}
