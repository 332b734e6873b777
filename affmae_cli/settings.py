"""One validated configuration from defaults, presets, the user's file, environment and command line.

Precedence, strongest first: flags and `--set`, environment `AFFMAE_SECTION__FIELD`, the user's TOML file (`--config`),
the preset and the presets it extends, the defaults of `affmae_engine.config`. pydantic-settings reads, merges and
validates. Three rules are ours:

- Every source has a name, so that an error and `--dry-run` can say where a value comes from. All errors are reported at
  once.
- A file may have values for one task, in `[task.finetune.SECTION]` or `[task.pretrain.SECTION]`. They override the
  file's own sections (for presets: those of the whole `extends` chain), but nothing that is stronger than the file.
- `train.steps` and `train.epochs` both set the length of a run, and the trainer prefers epochs. So a source that sets
  steps clears the epochs of weaker sources.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from affmae_cli import output
from affmae_cli.preset_files import PRESET_KEYS, preset_for_this_machine, preset_path, read_toml
from affmae_cli.settings_errors import Given, unknown_fields, unknown_variable, wrong_values
from affmae_engine.config import FIELDS, SECTIONS, RunConfig, Task, without_removed
from affmae_engine.errors import ConfigError

if TYPE_CHECKING:
    from affmae_engine.run_dir import RunDir

OTHER_ENVIRONMENT = ("AFFMAE_DEBUG", "AFFMAE_TEST_DATA", "AFFMAE_TRUST_SIZES")
"""Names with our prefix that are not settings."""

FLAGS = {
    "steps": "train.steps",
    "epochs": "train.epochs",
    "batch": "train.micro_batch",
    "seed": "train.seed",
    "device": "train.device",
}
"""Command-line flags that set a field: `--steps` and so on."""

TASKS: tuple[Task, ...] = get_args(Task)


class RunSettings(BaseSettings, RunConfig):
    """A `RunConfig` whose values come from sources."""

    model_config = SettingsConfigDict(env_prefix="AFFMAE_", env_nested_delimiter="__", case_sensitive=True)


@dataclass(frozen=True)
class Resolved:
    """A validated configuration; `sources` names the source of every dotted path that is not a default."""

    config: RunConfig
    task: Task | None
    preset: str
    sources: dict[str, str]


@dataclass(frozen=True)
class Layer:
    """A source of pydantic-settings and its name in messages."""

    name: str
    source: PydanticBaseSettingsSource

    @cached_property
    def values(self) -> dict[str, Any]:
        """The source's values by dotted path."""
        return dict(_leaves(self.source()))

    def given(self, rank: int) -> dict[str, Given]:
        """The values with the name of their source, which for the environment is that of the variable."""
        by_variable = isinstance(self.source, Environment)
        return {
            path: Given(value, f"{self.name} {_variable(path)}" if by_variable else self.name, rank)
            for path, value in self.values.items()
        }


class TomlFile(TomlConfigSettingsSource):
    """The sections of a TOML file.

    Attributes:
        about: what a preset says about itself, by key.
        tasks: sections of the tables `[task.*]` by task.
    """

    def _read_files(self, files: Any, *_: Any, **__: Any) -> dict[str, Any]:
        """Reads one file. The base class would skip a missing one, and does not say in which file an error is."""
        sections = without_removed(read_toml(files))
        self.about = {key: sections.pop(key) for key in PRESET_KEYS if key in sections}
        tables = sections.pop("task", {})
        self.tasks: dict[str, dict[str, Any]] = {}
        for task in TASKS:
            if isinstance(tables, dict) and isinstance(tables.get(task), dict):
                self.tasks[task] = without_removed(tables.pop(task))
        return {**sections, "task": tables} if tables else sections  # what is left of the tables is wrong


class Environment(EnvSettingsSource):
    """Variables `AFFMAE_SECTION__FIELD`; their values are parsed as those of `--set` are."""

    def __init__(self, environ: Mapping[str, str], problems: list[str]) -> None:
        super().__init__(RunSettings, case_sensitive=False)
        known = {_variable(path) for path in FIELDS}
        ours = {name: text for name, text in environ.items() if name.startswith("AFFMAE_")}
        self.env_vars = {name.lower(): text for name, text in ours.items() if name.upper() in known}
        others = sorted(name for name in ours if name.upper() not in known and name not in OTHER_ENVIRONMENT)
        problems += [unknown_variable(name, ours[name], known) for name in others]

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """Leaves the text as it is, for `parse_value`; the base class would accept only JSON."""
        return value

    def __call__(self) -> dict[str, Any]:
        return {
            section: {name: parse_value(text) for name, text in texts.items()}
            for section, texts in super().__call__().items()
        }


def resolve(
    task: Task | None,
    *,
    preset: str | None = None,
    config_file: Path | None = None,
    overrides: Sequence[str] | None = None,
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
    run: RunDir | None = None,
    quiet: bool = False,
) -> Resolved:
    """Merge all sources and validate the result.

    Args:
        task: whose `[task.*]` tables apply; None keeps the base sections.
        preset: name of a preset; None or "auto" picks one by the GPU found and says so on stderr.
        config_file: the user's TOML file.
        overrides: values of `--set`, each "section.field=value".
        flags: flags that set a field, by their name in `FLAGS`; None stands for a flag that was not given.
        environ: environment variables.
        run: a run whose settings take the place of preset and file, because it is continued.
        quiet: do not say which preset was picked.

    Raises:
        ConfigError: unknown preset, unreadable file, or wrong settings; the message lists all of them.
    """
    problems: list[str] = []
    layers = [  # strongest first, here and below
        *_command_line(overrides or (), flags or {}, problems),
        Layer("environment", Environment(environ, problems)),
    ]
    name = ""
    if run is not None:
        layers.append(_given(str(run.config), run.read_config().model_dump()))
    else:
        if config_file is not None:
            file = TomlFile(RunSettings, config_file)
            problems += unknown_fields(file.about, str(config_file))
            layers += _of_files({str(config_file): file}, task, problems)
        name = preset or "auto"
        if name == "auto":
            device = _merged(layers).get("train.device")
            name, why = preset_for_this_machine(on_cpu=device is not None and device.value == "cpu")
            if not quiet:
                output.say(f"preset {name}: {why} (choose another with --preset)")
        layers += _of_files(_preset_chain(name), task, problems)
    given = _merged(layers)
    steps, epochs = (given.get(f"train.{length}") for length in ("steps", "epochs"))
    if steps and epochs and steps.rank < epochs.rank:  # else epochs decide, as the trainer has it
        layers.insert(0, _given(steps.source, {"train": {"epochs": None}}))
    config = _validated(layers, problems)
    sources = {path: entry.source for path, entry in _merged(layers).items() if path in FIELDS}
    return Resolved(config, task, name, sources)


def parse_value(text: str) -> Any:
    """A value typed by a user: TOML where it is TOML, `none` for None, else the text itself."""
    if text.strip().lower() == "none":
        return None
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _command_line(overrides: Sequence[str], flags: Mapping[str, Any], problems: list[str]) -> list[Layer]:
    """A layer for every flag and for every `--set`, of which the last one is the strongest."""
    given = [(f"--{name}", FLAGS[name], value) for name, value in flags.items() if value is not None]
    for override in reversed(overrides):
        path, equals, text = override.partition("=")
        if equals and path.strip():
            given.append(("--set", path.strip(), text))
        else:
            problems.append(f"{override}: --set needs SECTION.FIELD=VALUE [--set]")
    layers = []
    for name, path, value in given:
        section, dot, field = path.partition(".")
        value = parse_value(value) if isinstance(value, str) else value
        layers.append(_given(name, {section: {field: value} if dot else value}))
    if all(any(layer.values.get(f"train.{length}") is not None for layer in layers) for length in ("steps", "epochs")):
        problems.append("train.steps and train.epochs are both given: choose one")
    return layers


def _given(name: str, sections: dict[str, Any]) -> Layer:
    return Layer(name, InitSettingsSource(RunSettings, sections))


def _preset_chain(name: str) -> dict[str, TomlFile]:
    """A preset, the one that it extends, and so on, by their names in messages."""
    chain: dict[str, TomlFile] = {}
    parent, child = name, ""
    while parent:
        if parent in chain:
            raise ConfigError(f"presets extend each other in a circle: {' -> '.join([*chain, parent])}")
        chain[parent] = TomlFile(RunSettings, preset_path(parent, wanted_by=child))
        parent, child = chain[parent].about.get("extends", ""), parent
    return {f"preset {name}": file for name, file in chain.items()}


def _of_files(files: Mapping[str, TomlFile], task: Task | None, problems: list[str]) -> list[Layer]:
    """The tables of the task of all files, then the sections of all files. Tables of another task are only checked."""
    tables = []
    for name, file in files.items():
        for key, sections in file.tasks.items():
            layer = _given(f"{name} [task.{key}]", sections)
            if key == task:
                tables.append(layer)
            else:
                problems += unknown_fields(layer.values, layer.name)
    return [*tables, *(Layer(name, file) for name, file in files.items())]


def _merged(layers: Sequence[Layer]) -> dict[str, Given]:
    """The strongest value of every path."""
    merged: dict[str, Given] = {}
    for rank, layer in reversed(list(enumerate(layers))):
        merged |= layer.given(rank)
    return merged


def _validated(layers: list[Layer], problems: list[str]) -> RunConfig:
    """The merged layers as a configuration.

    Raises:
        ConfigError: lists `problems` and every wrong value.
    """

    class Layered(RunSettings):
        """pydantic-settings asks a class for its sources; this one has those of this call."""

        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *_: Any, **__: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return tuple(layer.source for layer in layers)

    problems += [line for layer in layers for line in unknown_fields(layer.values, layer.name)]
    try:
        merged = Layered()
    except ValidationError as error:
        problems += wrong_values(error, _merged(layers))
    if problems:
        count = f"{len(problems)} settings are wrong:\n  " if len(problems) > 1 else ""
        raise ConfigError(count + "\n  ".join(problems), "`affmae presets NAME` shows every field and its value")
    return RunConfig(**{section: getattr(merged, section) for section in SECTIONS})


def _variable(path: str) -> str:
    """The environment variable of a field."""
    return f"AFFMAE_{path.replace('.', '__').upper()}"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted path; a table is a value where it is empty or stands for a field."""
    for key, value in tree.items():
        path = prefix + key
        if isinstance(value, dict) and value and path not in FIELDS:
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value
