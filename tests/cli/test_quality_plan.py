"""Options of `affmae bench --quality`: durations, shares, settings, and what is refused."""

import pytest

from affmae_cli.quality_plan import QualityOptions, fitted, label_fractions, make_plan, seconds
from affmae_engine.bench.quality import Part, Speed
from affmae_engine.errors import ConfigError


def options(**changes) -> QualityOptions:
    given = {
        "images": ["i.tif"], "labels": ["l.tif"], "unlabelled": [], "budget": "10m", "finetune_budget": None,
        "seeds": 3, "fractions": "0.1,0.25", "sizes": None, "preset": "demo", "config": None, "set_": [],
        "device": "cpu", "pixel_size": None,
    }  # fmt: skip
    return QualityOptions(**{**given, **changes})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30s", 30), ("10m", 600), ("1h", 3600), ("1.5m", 90), (" 2H ", 7200), ("1h30m", 5400), ("1m5s", 65)],
)
def test_durations(text: str, expected: float) -> None:
    assert seconds("--budget", text) == expected


@pytest.mark.parametrize("text", ["", "10", "ten", "0s", "-5s", "5 m x", "5d", "m", "1m1m", "5s1h", "1e3s", "nan"])
def test_wrong_durations(text: str) -> None:
    with pytest.raises(ConfigError, match="--budget must be a duration"):
        seconds("--budget", text)


def test_fractions() -> None:
    assert label_fractions("0.25,0.1") == (0.1, 0.25, 1.0)
    assert label_fractions("1, 0.5,0.5") == (0.5, 1.0)
    assert label_fractions("") == (1.0,)
    for wrong in ("0", "1.1", "a", "-0.5", "nan", "10%"):
        with pytest.raises(ConfigError, match="--label-fractions must be numbers"):
            label_fractions(wrong)


def test_a_plan_has_both_models_in_every_combination() -> None:
    plan, sources = make_plan(options(sizes="tiny,small"))
    assert plan.sizes == ("tiny", "small") and plan.seeds == (0, 1, 2) and plan.fractions == (0.1, 0.25, 1.0)
    assert plan.budget_s == 600 and plan.finetune_budget_s == 150
    parts = plan.parts()
    assert len(parts) == len(set(parts)) == 2 * 3 * 2 * (1 + 2 * 3)
    assert len({part.name for part in parts}) == len(parts)
    assert {chain[0].model for chain in plan.chains()} == {"affmae", "vit-mae"}
    assert all(chain[0].stage == "pretrain" for chain in plan.chains())
    assert sources.as_dict()["images"][0].endswith("/i.tif")


def test_models_differ_in_nothing_but_the_family() -> None:
    plan, _ = make_plan(options(set_=["optim.lr=0.003"]))
    for init, fraction in ((None, None), ("scratch", 0.25)):
        ours, theirs = (plan.config_of(Part("tiny", model, 1, init, fraction), 50) for model in ("affmae", "vit-mae"))
        assert ours.model.family == "affmae" and theirs.model.family == "vit-mae"
        assert ours.model_copy(update={"model": theirs.model}) == theirs
        assert (ours.train.steps, ours.train.seed, ours.optim.lr) == (50, 1, 0.003)
        assert ours.train.eval_every == ours.train.checkpoint_every == 0
    assert plan.config_of(Part("tiny", "affmae", 0), 50, micro_batch=2).train.micro_batch == 2


def test_from_scratch_no_layer_is_held_back() -> None:
    plan, _ = make_plan(options(set_=["optim.layer_decay=0.6"]))
    decays = {part.init: plan.config_of(part, 50).optim.layer_decay for part in plan.parts()}
    assert decays == {None: 0.6, "pretrained": 0.6, "scratch": 1.0}


def test_steps_follow_from_speeds() -> None:
    plan, _ = make_plan(options(budget="60s", finetune_budget="20s"))
    speeds = {
        ("tiny", "affmae", "pretrain"): Speed(0.1), ("tiny", "vit-mae", "pretrain"): Speed(0.4),
        ("tiny", "affmae", "finetune"): Speed(0.05), ("tiny", "vit-mae", "finetune"): Speed(0.2),
    }  # fmt: skip
    lengths = plan.lengths(speeds)
    assert lengths.pretrain == {("tiny", "affmae"): 600, ("tiny", "vit-mae"): 150}
    assert lengths.finetune == {"tiny": 100}, "both take the steps of the slower one"
    assert type(lengths).from_json(lengths.to_json()) == lengths
    faster = {key: Speed(speed.step_s / 2) for key, speed in speeds.items()}
    assert plan.lengths(faster, earlier=lengths) == lengths, "finished parts must not get other lengths"
    broken = {**speeds, ("tiny", "vit-mae", "pretrain"): Speed(None, status="out of memory")}
    assert plan.lengths(broken).pretrain == {("tiny", "affmae"): 600}
    with pytest.raises(ConfigError, match="--budget 60s allows 6 steps of pretraining vit-mae tiny"):
        plan.lengths({**speeds, ("tiny", "vit-mae", "pretrain"): Speed(10.0)})
    with pytest.raises(ConfigError, match="allows 80 steps of finetuning tiny") as refused:
        plan.lengths({**speeds, ("tiny", "affmae", "finetune"): Speed(0.25)})
    assert "--finetune-budget 25s" in refused.value.hint


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": [], "labels": []}, "needs --images and --labels"),
        ({"labels": []}, "needs --labels"),
        ({"budget": "soon"}, "--budget must be"),
        ({"finetune_budget": "1"}, "--finetune-budget must be"),
        ({"sizes": "huge"}, "unknown name 'huge'"),
        ({"set_": ["train.steps=5"]}, "train.steps has no place"),
        ({"set_": ["train.seed=5"]}, "--seeds decides"),
        ({"set_": ["model.family=vit-mae"]}, "both families are trained"),
        ({"set_": ["optim.lrr=1"]}, "optim.lrr"),
        ({"preset": "nope"}, "nope"),
        ({"pixel_size": "x"}, "--pixel-size"),
    ],
)
def test_what_is_refused(changes: dict, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(options(**changes))
    assert said in caught.value.message


def test_too_few_sections_for_a_fraction() -> None:
    plan, _ = make_plan(options())
    plan, notes = fitted(plan, 4)
    assert plan.fractions == (0.25, 1.0) and len(notes) == 1
