"""The shipped presets, the choice by card, and `affmae presets`."""

import json
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from affmae_cli import preset_files, settings
from affmae_cli.main import app

NAMES = preset_files.preset_names()


def leaves(tree: dict, prefix: str = "") -> dict:
    """Every value of a TOML tree by its dotted path."""
    flat = {}
    for key, value in tree.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def test_the_promised_presets_exist():
    promised = {"demo", "laptop-8gb-em", "rtx3090-em", "rtx4090-em", "rtx5090-em", "h200-em", "paper-em", "em-base"}
    assert promised <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_loads_for_both_tasks(name):
    for task in (None, *settings.TASKS):
        resolved = settings.resolve(task, preset=name, environ={})
        assert resolved.preset == name
        fixed = name == "demo" or (name == "paper-em" and task != "finetune")
        assert (resolved.config.train.micro_batch == "auto") is not fixed
    assert settings.resolve("finetune", preset=name, environ={}).config.optim.weight_decay == 0.0075


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_says_what_it_is_for(name):
    text = (preset_files.preset_folder() / f"{name}.toml").read_text("utf-8")
    assert text.startswith("# ")
    assert len(text.splitlines()) <= 60
    assert tomllib.loads(text)["about"]


@pytest.mark.parametrize("name", NAMES)
def test_no_preset_restates_a_value_of_its_parents(name):
    tree = preset_files.preset_tree(name)
    own = leaves({key: value for key, value in tree.items() if key not in preset_files.PRESET_KEYS})
    inherited: dict = {}
    while "extends" in tree:
        tree = preset_files.preset_tree(tree["extends"])
        inherited = {**leaves(tree), **inherited}
    assert [path for path, value in own.items() if path in inherited and inherited[path] == value] == []


def test_the_paper_preset_is_the_paper_s_recipe():
    config = settings.resolve("pretrain", preset="paper-em", environ={}).config
    assert (config.model.size, config.model.patch_size, config.model.merge_keep) == ("base", 8, 0.4)
    assert (config.data.crop_size, config.data.clahe, config.mask.ratio) == (512, True, 0.5)
    optim, train = config.optim, config.train
    assert (optim.lr, optim.min_lr, optim.betas, optim.weight_decay) == (3.5e-4, 1e-6, (0.883, 0.935), 0.05)
    assert (optim.warmup_steps, optim.clip_norm) == (10_000, 5.0)
    assert (train.batch_size, train.micro_batch, train.epochs) == (288, 48, 400)


@pytest.mark.parametrize(
    ("card", "memory_gib", "name"),
    [
        ("NVIDIA GeForce RTX 3050 Laptop GPU", 3.8, "laptop-8gb-em"),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", 7.6, "laptop-8gb-em"),
        ("NVIDIA RTX A4000", 15.7, "laptop-8gb-em"),
        ("NVIDIA GeForce RTX 3090", 23.6, "rtx3090-em"),
        ("NVIDIA RTX A5000", 23.7, "rtx3090-em"),
        ("NVIDIA GeForce RTX 4090", 23.5, "rtx4090-em"),
        ("NVIDIA GeForce RTX 5090", 31.4, "rtx5090-em"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "rtx5090-em"),
        ("NVIDIA H200", 139.8, "h200-em"),
        ("NVIDIA B200", 178.0, "h200-em"),
    ],
)
def test_the_preset_for_a_card(card, memory_gib, name):
    assert preset_files.preset_for_card(card, memory_gib) == name


def test_auto_takes_the_smallest_visible_card(monkeypatch, capsys):
    cards = [
        SimpleNamespace(name="NVIDIA H200", total_memory=int(139.8 * 2**30)),
        SimpleNamespace(name="NVIDIA GeForce RTX 4090", total_memory=int(23.5 * 2**30)),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: cards[index])
    assert settings.resolve("pretrain", preset="auto", environ={}).preset == "rtx4090-em"
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "preset rtx4090-em: NVIDIA GeForce RTX 4090, 24 GiB (choose another with --preset)"
    ]


@pytest.mark.parametrize("asked", [{"flags": {"device": "cpu"}}, {"overrides": ["train.device=cpu"]}])
def test_auto_without_a_card(monkeypatch, capsys, asked):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert settings.resolve("pretrain", environ={}).preset == "demo"
    assert "no CUDA GPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert settings.resolve("pretrain", environ={}, **asked).preset == "demo"
    assert "the CPU was asked for" in capsys.readouterr().err


class TestCommand:
    def run(self, *arguments: str):
        return CliRunner().invoke(app, ["presets", *arguments])

    def test_list(self):
        result = self.run()
        assert result.exit_code == 0
        assert all(name in result.stdout for name in NAMES)
        assert "24 GB" in result.stdout and "288 (6 x 48)" in result.stdout

    def test_list_as_json(self):
        records = {record["name"]: record for record in json.loads(self.run("--json").stdout)}
        assert list(records) == [preset.name for preset in preset_files.list_presets()]
        assert records["h200-em"]["card_gb"] == 141
        assert records["demo"]["card_gb"] is None
        assert records["paper-em"]["size"] == "base"

    @pytest.mark.parametrize("name", NAMES)
    def test_what_is_shown_can_be_used_as_a_file(self, name, tmp_path: Path):
        shown = tmp_path / "shown.toml"
        shown.write_text(self.run(name).stdout, "utf-8")
        for task in settings.TASKS:
            expected = settings.resolve(task, preset=name, environ={}).config
            assert settings.resolve(task, preset="em-base", config_file=shown, environ={}).config == expected

    def test_one_preset_shows_sources_and_what_finetuning_changes(self):
        text = self.run("h200-em").stdout
        assert tomllib.loads(text)["task"]["finetune"]["optim"]["layer_decay"] == 0.6
        assert "# preset h200-em" in text and "# preset em-base" in text

    def test_one_task(self):
        tree = tomllib.loads(self.run("h200-em", "--task", "finetune").stdout)
        assert tree["optim"]["layer_decay"] == 0.6
        assert "task" not in tree

    def test_one_preset_as_json(self):
        record = json.loads(self.run("demo", "--json").stdout)
        assert record["config"]["model"]["size"] == "tiny"
        assert record["sources"]["model.size"] == "preset demo"

    def test_settings_of_the_environment_do_not_show(self, monkeypatch):
        monkeypatch.setenv("AFFMAE_MODEL__SIZE", "base")
        assert tomllib.loads(self.run("demo").stdout)["model"]["size"] == "tiny"

    def test_unknown_name(self):
        result = self.run("rtx4090")
        assert result.exit_code == 2
        assert result.stdout == ""
        assert "error: unknown preset: rtx4090" in result.stderr
        assert "did you mean rtx4090-em" in result.stderr

    def test_a_task_needs_a_name(self):
        assert self.run("--task", "finetune").exit_code == 2
