"""Merging of sources: precedence, task tables, chains, value parsing, and the list of all errors."""

import itertools
import os
import threading
from pathlib import Path

import pytest

from affmae_cli import dry_run, preset_files, settings
from affmae_engine.config import RunConfig
from affmae_engine.errors import ConfigError
from affmae_engine.run_dir import RunDir


@pytest.fixture
def preset_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of presets of the test's own, with one preset `p` that sets nothing."""
    folder = tmp_path / "presets"
    folder.mkdir()
    (folder / "p.toml").write_text('about = "for a test"\n')
    monkeypatch.setattr(preset_files, "preset_folder", lambda: folder)
    return folder


def resolve(task=None, **arguments) -> settings.Resolved:
    """Resolve with the empty preset and an empty environment, unless told otherwise."""
    return settings.resolve(task, **{"preset": "p", "environ": {}, **arguments})


def problems(task=None, **arguments) -> list[str]:
    """The lines of the error that a resolution ends in."""
    with pytest.raises(ConfigError) as caught:
        resolve(task, **arguments)
    lines = caught.value.message.splitlines()
    return [line.strip() for line in (lines if len(lines) == 1 else lines[1:])]


def test_nothing_given_is_the_defaults(preset_folder):
    resolved = resolve()
    assert resolved.config == RunConfig()
    assert resolved.sources == {}
    assert (resolved.preset, resolved.task) == ("p", None)


SOURCES = ["default", "preset", "file", "environment", "set", "flag"]


@pytest.mark.parametrize(("weaker", "stronger"), list(itertools.combinations(SOURCES[1:], 2)))
def test_every_pair_of_sources_keeps_its_order(preset_folder, tmp_path, weaker, stronger):
    user = tmp_path / "user.toml"
    user.write_text("[train]\nseed = 2\n" if "file" in (weaker, stronger) else "")
    if "preset" in (weaker, stronger):
        (preset_folder / "p.toml").write_text("[train]\nseed = 1\n")
    resolved = resolve(
        config_file=user,
        environ={"AFFMAE_TRAIN__SEED": "3"} if "environment" in (weaker, stronger) else {},
        overrides=["train.seed=4"] if "set" in (weaker, stronger) else [],
        flags={"seed": 5 if "flag" in (weaker, stronger) else None},
    )
    assert resolved.config.train.seed == SOURCES.index(stronger)
    names = {
        "file": str(user),
        "environment": "environment AFFMAE_TRAIN__SEED",
        "set": "--set",
        "flag": "--seed",
    }
    assert resolved.sources == {"train.seed": names[stronger]}


def test_sources_are_merged_field_by_field(preset_folder, tmp_path):
    (preset_folder / "p.toml").write_text("[optim]\nlr = 1e-3\nweight_decay = 0.2\n")
    user = tmp_path / "user.toml"
    user.write_text("[optim]\nweight_decay = 0.3\n")
    optim = resolve(config_file=user, overrides=["optim.clip_norm=1"]).config.optim
    assert (optim.lr, optim.weight_decay, optim.clip_norm) == (1e-3, 0.3, 1.0)


class TestTaskTables:
    def test_overlay_of_the_same_file(self, preset_folder):
        (preset_folder / "p.toml").write_text(
            "[optim]\nlr = 1e-3\nclip_norm = 2\n[task.finetune.optim]\nlr = 1e-4\n[task.pretrain.mask]\nratio = 0.6\n"
        )
        assert resolve().config.optim.lr == 1e-3
        assert resolve("pretrain").config.optim.lr == 1e-3
        assert resolve("pretrain").config.mask.ratio == 0.6
        tuned = resolve("finetune")
        assert (tuned.config.optim.lr, tuned.config.optim.clip_norm, tuned.config.mask.ratio) == (1e-4, 2.0, 0.5)
        assert tuned.sources["optim.lr"] == "preset p [task.finetune]"

    def test_a_user_value_beats_the_table_of_a_preset(self, preset_folder, tmp_path):
        (preset_folder / "p.toml").write_text("[task.finetune.optim]\nlr = 1e-4\n")
        user = tmp_path / "user.toml"
        user.write_text("[optim]\nlr = 5e-5\n")
        assert resolve("finetune", config_file=user).config.optim.lr == 5e-5
        user.write_text("[optim]\nlr = 5e-5\n[task.finetune.optim]\nlr = 6e-5\n")
        assert resolve("finetune", config_file=user).config.optim.lr == 6e-5
        assert resolve("pretrain", config_file=user).config.optim.lr == 5e-5

    def test_a_child_s_base_value_does_not_hide_its_parent_s_table(self, preset_folder):
        (preset_folder / "parent.toml").write_text("[optim]\nlr = 1e-3\n[task.finetune.optim]\nlr = 1e-4\n")
        (preset_folder / "p.toml").write_text('extends = "parent"\n[optim]\nlr = 2e-3\n')
        assert resolve("pretrain").config.optim.lr == 2e-3
        assert resolve("finetune").config.optim.lr == 1e-4

    def test_a_child_s_table_is_merged_over_its_parent_s(self, preset_folder):
        (preset_folder / "parent.toml").write_text("[task.finetune.optim]\nlr = 1e-4\nclip_norm = 3\n")
        (preset_folder / "p.toml").write_text('extends = "parent"\n[task.finetune.optim]\nlr = 2e-4\n')
        optim = resolve("finetune").config.optim
        assert (optim.lr, optim.clip_norm) == (2e-4, 3.0)

    def test_not_from_the_command_line(self, preset_folder):
        assert "only files have tables for tasks" in problems(overrides=["task.finetune.optim.lr=1"])[0]

    def test_wrong_tables(self, preset_folder, tmp_path):
        user = tmp_path / "user.toml"
        user.write_text("[task.predict.optim]\nlr = 1\n[task.finetune.optim]\nlrr = 1\n")
        first, second = problems(config_file=user)
        assert "optim.lrr = 1: unknown field (did you mean optim.lr?)" in first and "[task.finetune]" in first
        assert "task.predict.optim.lr = 1" in second and "[task.finetune.*]" in second
        user.write_text("task = 3\n")
        assert len(problems(config_file=user)) == 1


class TestChain:
    def test_three_generations(self, preset_folder):
        (preset_folder / "a.toml").write_text("[train]\nseed = 1\nsteps = 1\nbatch_size = 1\n")
        (preset_folder / "b.toml").write_text('extends = "a"\n[train]\nsteps = 2\nbatch_size = 2\n')
        (preset_folder / "p.toml").write_text('extends = "b"\n[train]\nbatch_size = 3\n')
        resolved = resolve()
        train = resolved.config.train
        assert (train.seed, train.steps, train.batch_size) == (1, 2, 3)
        assert [resolved.sources[f"train.{name}"] for name in ("seed", "steps", "batch_size")] == [
            "preset a",
            "preset b",
            "preset p",
        ]

    def test_circle(self, preset_folder):
        (preset_folder / "a.toml").write_text('extends = "p"\n')
        (preset_folder / "p.toml").write_text('extends = "a"\n')
        assert problems() == ["presets extend each other in a circle: p -> a -> p"]

    def test_missing_parent(self, preset_folder):
        (preset_folder / "p.toml").write_text('extends = "gone"\n')
        assert problems() == ["unknown preset: gone (extended by preset p)"]

    def test_unknown_field_of_a_parent(self, preset_folder):
        (preset_folder / "a.toml").write_text("[optim]\nlrr = 1\n")
        (preset_folder / "p.toml").write_text('extends = "a"\n')
        assert problems() == ["optim.lrr = 1: unknown field (did you mean optim.lr?) [preset a]"]


class TestLength:
    """Of steps and epochs the stronger source wins, although the configuration has both."""

    def test_steps_hide_the_epochs_of_a_preset(self, preset_folder):
        (preset_folder / "p.toml").write_text("[train]\nepochs = 4\n")
        assert resolve().config.train.epochs == 4
        train = resolve(flags={"steps": 7}).config.train
        assert (train.steps, train.epochs) == (7, None)
        assert resolve(overrides=["train.steps=7"]).config.train.epochs is None

    def test_epochs_win_over_the_steps_of_a_preset(self, preset_folder):
        (preset_folder / "p.toml").write_text("[train]\nsteps = 4\n")
        assert resolve(flags={"epochs": 2.0}).config.train.epochs == 2

    def test_clearing_one_keeps_the_other(self, preset_folder):
        (preset_folder / "p.toml").write_text("[train]\nsteps = 4\nepochs = 2\n")
        train = resolve(overrides=["train.epochs=none"]).config.train
        assert (train.steps, train.epochs) == (4, None)

    def test_both_on_the_command_line(self, preset_folder):
        assert "choose one" in problems(flags={"steps": 7}, overrides=["train.epochs=2"])[0]


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("optim.lr=1e-4", "optim.lr", 1e-4),
        ("optim.betas=[0.8, 0.9]", "optim.betas", (0.8, 0.9)),
        ("model.size=base", "model.size", "base"),
        ('model.size="base"', "model.size", "base"),
        ("data.flips=false", "data.flips", False),
        ("data.flips=False", "data.flips", False),
        ("data.workers=3", "data.workers", 3),
        ("data.workers=auto", "data.workers", "auto"),
        ("train.micro_batch=none", "train.micro_batch", None),
        ('finetune.class_names=["bg", "a=b"]', "finetune.class_names", ("bg", "a=b")),
        (" train.seed = 3", "train.seed", 3),
        ("optim={lr = 0.5}", "optim.lr", 0.5),
    ],
)
def test_values_of_set(preset_folder, text, path, value):
    config = resolve(overrides=[text]).config
    section, name = path.split(".")
    assert getattr(getattr(config, section), name) == value


def test_the_last_set_wins(preset_folder):
    assert resolve(overrides=["train.seed=1", "train.seed=2"]).config.train.seed == 2


def test_environment_values_are_parsed_like_those_of_set(preset_folder):
    environ = {"AFFMAE_OPTIM__BETAS": "[0.8, 0.9]", "AFFMAE_MODEL__SIZE": "base", "AFFMAE_TRAIN__MICRO_BATCH": "none"}
    config = resolve(environ=environ).config
    assert (config.optim.betas, config.model.size, config.train.micro_batch) == ((0.8, 0.9), "base", None)


def test_other_environment_names_are_left_alone(preset_folder):
    environ = {
        "AFFMAE_DEBUG": "1",
        "AFFMAE_TRUST_SIZES": "1",
        "AFFMAE_TEST_DATA": "/somewhere",
        "PATH": "/bin",
        "MY_AFFMAE_X": "1",
    }
    assert resolve(environ=environ).sources == {}


class TestErrors:
    def test_all_problems_at_once_with_source_value_and_nearest_name(self, preset_folder, tmp_path):
        user = tmp_path / "user.toml"
        user.write_text('extends = "x"\n[optim]\nlrr = 0.002\n[optimm]\nlr = 1\n[mask]\nratio = 1.5\n')
        lines = problems(
            config_file=user,
            overrides=["a.b", "=3", "lr=1", "train.steps=abc", "optim=3"],
            environ={"AFFMAE_OPTIM__LRR": "1", "AFFMAE_TRAIN__SEED": "-1"},
        )
        assert sorted(lines) == sorted(
            [
                "a.b: --set needs SECTION.FIELD=VALUE [--set]",
                "=3: --set needs SECTION.FIELD=VALUE [--set]",
                "lr = 1: unknown field (did you mean optim.lr?) [--set]",
                "optim = 3: is a section; set one of its fields [--set]",
                'AFFMAE_OPTIM__LRR = "1": unknown setting (did you mean AFFMAE_OPTIM__LR?) [environment]',
                f'extends = "x": belongs into presets only; choose the preset with --preset [{user}]',
                f"optim.lrr = 0.002: unknown field (did you mean optim.lr?) [{user}]",
                f"optimm.lr = 1: unknown field (did you mean optim.lr?) [{user}]",
                f"mask.ratio = 1.5: must be less than 1 [{user}]",
                "train.seed = -1: must be greater than or equal to 0 [environment AFFMAE_TRAIN__SEED]",
                'train.steps = "abc": must be a valid integer [--set]',
            ]
        )

    def test_a_single_problem_is_the_whole_message(self, preset_folder):
        with pytest.raises(ConfigError) as caught:
            resolve(overrides=["optim.lr=-1"])
        assert caught.value.message == "optim.lr = -1: must be greater than 0 [--set]"
        assert caught.value.exit_code == 2

    def test_rules_over_several_fields_name_the_sources_of_all(self, preset_folder):
        (preset_folder / "p.toml").write_text("[train]\nmicro_batch = 4\n")
        line = problems(overrides=["train.batch_size=10"])[0]
        assert line.startswith("train.batch_size (10) must be a multiple of train.micro_batch (4)")
        assert "preset p" in line and "--set" in line
        line = problems(overrides=["model.neighbours=63"])[0]
        assert line == "model: neighbours (63) must be a multiple of cluster_size (8) [--set]"

    def test_choices_and_items(self, preset_folder):
        assert problems(overrides=["data.workers=many"]) == [
            "data.workers = \"many\": must be a valid integer or must be 'auto' [--set]"
        ]
        assert problems(overrides=["optim.betas=[0.9]"]) == ["optim.betas = [0.9]: item 2 is missing [--set]"]
        assert "optim.lr = inf: must be a finite number" in problems(overrides=["optim.lr=inf"])[0]

    def test_missing_preset(self, preset_folder):
        with pytest.raises(ConfigError, match="unknown preset: pp") as caught:
            resolve(preset="pp")
        assert caught.value.hint == "did you mean p? there are p, and auto"
        with pytest.raises(ConfigError) as caught:
            resolve(preset="my.toml")
        assert "--config my.toml" in caught.value.hint

    def test_files(self, preset_folder, tmp_path):
        path = tmp_path / "user.toml"
        assert problems(config_file=path) == [f"no such configuration file: {path}"]
        assert "cannot read" in problems(config_file=tmp_path)[0]
        path.write_text("[optim]\nlr = \n")
        assert f"{path} is not valid TOML: Invalid value (at line 2" in problems(config_file=path)[0]
        path.write_bytes(b"[optim]\n# caf\xe9\n")
        assert "not UTF-8 text (at line 2)" in problems(config_file=path)[0]
        path.write_bytes("\ufeff[train]\nseed = 9\n".encode())
        assert resolve(config_file=path).config.train.seed == 9


def test_a_written_configuration_can_be_given_back(preset_folder, tmp_path):
    """What `--dry-run` prints resolves to the same configuration, also with both lengths in it."""
    resolved = resolve(overrides=["train.epochs=3", "finetune.class_names=['a\"b', 'é']", "train.micro_batch=4"])
    path = tmp_path / "again.toml"
    path.write_text(dry_run.config_toml(resolved.config.model_dump(), resolved.sources), "utf-8")
    assert resolve(config_file=path).config == resolved.config


def test_removed_fields_are_ignored_in_files_and_refused_elsewhere(preset_folder, tmp_path):
    user = tmp_path / "user.toml"
    user.write_text("[kernels]\ncompile = true\n[task.finetune.kernels]\ncompile = false\n")
    assert resolve("finetune", config_file=user).config == RunConfig()
    (problem,) = problems(overrides=["kernels.compile=false"])
    assert problem.startswith("kernels.compile = false: no longer exists")


class TestOddInput:
    @pytest.mark.parametrize(
        ("text", "path", "reason"),
        [
            ("[Optim]\nlr = 1\n[optim]\nlr = 2\n", "Optim.lr = 1", "did you mean optim.lr?"),
            ("[[optim]]\nlr = 1\n", "optim = [{lr = 1}]", "is a section"),
            ("optim = 3\n", "optim = 3", "is a section"),
            ('[model]\n"a(" = 1\nneighbours = 63\n', "model.a( = 1", "unknown field"),
            ("[optim.lr]\na = 1\n", "optim.lr = {a = 1}", "must be a valid number"),
            ("[nothing]\n", "nothing = {}", "unknown field"),
            ("auto = true\n", "auto = true", "belongs into presets only"),
            ("task = 3\n", "task = 3", "only files have tables for tasks"),
        ],
    )
    def test_files(self, preset_folder, tmp_path, text, path, reason):
        user = tmp_path / "user.toml"
        user.write_text(text)
        first = problems(config_file=user)[0]
        assert first.startswith(f"{path}: ") and reason in first and f"[{user}" in first

    @pytest.mark.parametrize(
        "override",
        ["optim.lr=1979-05-27", "a.b.c=1", "optim.=3", "Optim.lr=3", "model.a(=3", "optim=none", f"a{'.a' * 5000}=1"],
    )
    def test_command_line(self, preset_folder, override):
        path, _, _ = override.partition("=")
        assert problems(overrides=[override])[0].startswith(f"{path} = ")

    def test_values_nested_beyond_what_can_be_read(self, preset_folder, tmp_path):
        user = tmp_path / "user.toml"
        user.write_text("a = " + "[" * 20000 + "]" * 20000)
        assert "is not valid TOML" in problems(config_file=user)[0]
        assert problems(overrides=["optim.lr=" + "[" * 20000])[0].startswith("optim.lr = ")

    @pytest.mark.parametrize("text", ["[0.8", "0.8,0.9", "", "{", "[0.8, 0.9, 1]"])
    def test_lists_in_the_environment(self, preset_folder, text):
        (line,) = problems(environ={"AFFMAE_OPTIM__BETAS": text})
        assert line.startswith("optim.betas = ") and line.endswith("[environment AFFMAE_OPTIM__BETAS]")

    def test_a_whole_section_in_the_environment(self, preset_folder):
        (line,) = problems(environ={"AFFMAE_OPTIM": '{"lr": 1}'})
        assert "unknown setting (did you mean AFFMAE_OPTIM__LR?)" in line

    def test_names_of_variables_in_any_case(self, preset_folder):
        assert resolve(environ={"AFFMAE_optim__Lr": "0.5"}).config.optim.lr == 0.5

    def test_a_file_that_is_named_like_a_source(self, preset_folder, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("environment").write_text("[optim]\nlr = 0.5\n")
        assert resolve(config_file=Path("environment")).sources == {"optim.lr": "environment"}

    def test_a_pipe(self, preset_folder, tmp_path):
        """As a shell's `--config <(command)` gives it."""
        os.mkfifo(tmp_path / "pipe")
        writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("[optim]\nlr = 0.5\n",))
        writer.start()
        assert resolve(config_file=tmp_path / "pipe").config.optim.lr == 0.5
        writer.join()


def test_steps_of_a_user_replace_the_epochs_of_a_run(preset_folder, tmp_path):
    run = RunDir(tmp_path)
    run.write_config(RunConfig.model_validate({"train": {"steps": 12, "epochs": 3}, "optim": {"lr": 0.5}}), "pretrain")
    assert resolve(run=run).config == run.read_config()
    train = resolve(run=run, flags={"steps": 20}).config.train
    assert (train.steps, train.epochs) == (20, None)
    assert resolve(run=run, overrides=["train.seed=4"]).sources["optim.lr"] == str(run.config)


def test_a_default_is_not_taken_from_a_preset_when_a_run_is_continued(preset_folder, tmp_path):
    run = RunDir(tmp_path)
    run.write_config(RunConfig(), "pretrain")
    (preset_folder / "p.toml").write_text("[predict]\ntile = 64\n")
    assert resolve(run=run).config.predict.tile is None
