"""The configuration sections: defaults, strictness, ranges, rules over several fields, help texts."""

import pytest
from pydantic import ValidationError

from affmae_engine.config import RunConfig, Section

SECTIONS = {name: info.annotation for name, info in RunConfig.model_fields.items()}


def refused(tree: dict) -> str:
    """The text of the error that a configuration is refused with."""
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate(tree)
    return str(caught.value)


def test_defaults_are_valid_and_survive_a_round_trip():
    config = RunConfig()
    assert RunConfig.model_validate(config.model_dump()) == config
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_every_field_has_a_help_text(section):
    assert issubclass(section, Section)
    assert section.__doc__
    assert [name for name, info in section.model_fields.items() if not info.description] == []


def test_nothing_can_be_changed_or_added():
    config = RunConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = 1.0
    with pytest.raises(ValidationError, match="frozen"):
        config.optim = config.optim
    assert "Extra inputs" in refused({"optim": {"lrr": 1}})
    assert "Extra inputs" in refused({"optimm": {}})


@pytest.mark.parametrize(
    ("section", "field", "values"),
    [
        ("model", "size", ["huge"]),
        ("model", "patch_size", [0, 3, 64]),
        ("model", "merge_keep", [0, 1.1, float("nan")]),
        ("data", "crop_size", [0, -8, 0.5]),
        ("data", "crop_scale", [(0, 1), (1, 0.5), (1, 5), (0.5,)]),
        ("data", "workers", [-1, "many"]),
        ("data", "holdout", [1.0, -0.1]),
        ("mask", "ratio", [0, 1]),
        ("mask", "lattices", [(), (0,)]),
        ("optim", "lr", [0, -1, float("inf")]),
        ("optim", "betas", [(0.9,), (0.9, 1.0), (float("nan"), 0.9)]),
        ("train", "steps", [0, 1.5]),
        ("train", "epochs", [0, float("inf")]),
        ("train", "micro_batch", [0]),
        ("train", "device", ["mps"]),
        ("finetune", "val_fraction", [0, 1]),
        ("finetune", "ignore_label", [-1]),
        ("predict", "overlap", [0.95, -0.1]),
        ("kernels", "backend", ["cuda"]),
    ],
)
def test_ranges_and_choices(section, field, values):
    for value in values:
        text = refused({section: {field: value}})
        assert section in text and field in text


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        ({"model": {"neighbours": 60}}, ["neighbours (60)", "cluster_size (8)"]),
        ({"train": {"batch_size": 10, "micro_batch": 4}}, ["train.batch_size (10)", "train.micro_batch (4)"]),
        ({"train": {"batch_size": 2, "micro_batch": 4}}, ["train.batch_size (2)", "train.micro_batch (4)"]),
        ({"optim": {"lr": 1e-7}}, ["optim.min_lr (1e-06)", "optim.lr (1e-07)"]),
        ({"finetune": {"class_names": ["a", "b"], "class_weights": [1]}}, ["class_weights (1", "class_names (2"]),
        ({"finetune": {"class_names": ["a", "b", "a"]}}, ["class_names", "differ", ": a"]),
        ({"finetune": {"focal_weight": 0, "dice_weight": 0}}, ["focal_weight", "dice_weight"]),
    ],
)
def test_rules_over_several_fields_name_all_of_them(tree, names):
    text = refused(tree)
    assert [name for name in names if name not in text] == []


@pytest.mark.parametrize(("crop", "patch", "expected"), [(512, 8, 512), (500, 8, 504), (1, 16, 16), (17, 16, 32)])
def test_image_size_is_whole_tokens(crop, patch, expected):
    config = RunConfig.model_validate({"data": {"crop_size": crop}, "model": {"patch_size": patch}})
    assert config.image_size == expected
