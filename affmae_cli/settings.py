"""One validated configuration from defaults, presets, the user's file, environment and command line.

Precedence, strongest first: flags and `--set`, environment `AFFMAE_SECTION__FIELD`, the user's TOML file (`--config`),
the preset and the presets it extends, the defaults of `affmae_engine.config`. pydantic-settings reads, merges and
validates. Three rules are ours:

- Every source has a name, so that an error and `--dry-run` can say where a value comes from. All errors are reported at
  once.
- A file may have values for one task, in `[task.finetune.SECTION]` or `[task.pretrain.SECTION]`. They override the
  file's own sections (for presets: those of the whole `extends` chain), but nothing that is stronger than the file.
- `train.steps` and `train.epochs` both set the length of a run. A source that sets one of them hides the other one in
  weaker sources.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
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
from affmae_cli.preset_files import PRESET_KEYS, preset_for_card, preset_path, read_toml
from affmae_engine.config import FIELDS, REMOVED_FIELDS, SECTIONS, RunConfig, Task
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

_LENGTHS = ("steps", "epochs")


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


class Layer(PydanticBaseSettingsSource):
    """A source of pydantic-settings with a name, reduced to fields that exist.

    Args:
        name: for messages; "{path}" in it stands for the name of a field's environment variable.
        source: where the values come from.
        problems: gets a line for everything that is not a field.
        skip: paths that are left out without a word.

    Attributes:
        values: value by dotted path.
    """

    def __init__(
        self, name: str, source: PydanticBaseSettingsSource, problems: list[str], *, skip: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(RunSettings)
        self.name = name
        self.values: dict[str, Any] = {}
        for path, value in _leaves(source()):
            if path in FIELDS:
                self.values[path] = value
            elif path not in skip and not (path in SECTIONS and value == {}):
                problems.append(f"{path} = {output.toml_value(value)}: {_why_unknown(path)} [{name}]")

    def name_of(self, path: str) -> str:
        """The name of the source of one field."""
        return self.name.replace("{path}", _variable(path))

    def __call__(self) -> dict[str, Any]:
        """The values by section and field, without a length that a stronger source replaces."""
        stronger = self.current_state.get("train", {})
        for one, other in (_LENGTHS, _LENGTHS[::-1]):
            if stronger.get(one) is not None and other not in stronger:
                self.values.pop(f"train.{other}", None)
        return _tree(self.values)

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Demanded by the base class, whose `__call__` is replaced."""
        return self.values.get(field_name), field_name, False


class TomlFile(TomlConfigSettingsSource):
    """The sections of a TOML file; `toml_data` also has its tables of tasks and what a preset says about itself."""

    def _read_files(self, files: Any, *_: Any, **__: Any) -> dict[str, Any]:
        """Reads the one file. The base class would pass over a missing file and does not say which one is wrong."""
        return read_toml(files)

    def __call__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__call__().items() if key not in (*PRESET_KEYS, "task")}


class Environment(EnvSettingsSource):
    """Variables `AFFMAE_SECTION__FIELD`; their values are parsed as those of `--set` are."""

    def __init__(self, environ: Mapping[str, str], problems: list[str]) -> None:
        super().__init__(RunSettings, case_sensitive=False)
        known = {_variable(path): path for path in FIELDS}
        self.env_vars = {}
        for name, text in sorted(environ.items()):
            if not name.startswith("AFFMAE_") or name in OTHER_ENVIRONMENT:
                continue
            if name.upper() in known:
                self.env_vars[name.lower()] = text
            else:
                hint = _did_you_mean(get_close_matches(name.upper(), known, n=1))
                problems.append(f"{name} = {output.toml_value(text)}: unknown setting{hint} [environment]")

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """Leaves the text as it is, for `parse_value`; the base class would accept only JSON."""
        return value

    def __call__(self) -> dict[str, Any]:
        sections = super().__call__()
        return {
            section: {name: parse_value(text) for name, text in texts.items()} for section, texts in sections.items()
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
    # strongest first, here and below
    layers = _command_line(overrides or (), flags or {}, problems)
    layers.append(Layer("environment {path}", Environment(environ, problems), problems))
    name = ""
    if run is not None:
        layers.append(_values(str(run.config), run.read_config().model_dump(), problems))
    else:
        if config_file is not None:
            layers += _user_file(config_file, task, problems)
        name = _auto_preset(layers, quiet=quiet) if preset in (None, "auto") else str(preset)
        layers += _preset(name, task, problems)
    config = _validated(layers, problems)
    sources = {path: layer.name_of(path) for layer in reversed(layers) for path in layer.values}
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
    layers = []
    for name, value in flags.items():
        if value is not None:
            value = parse_value(value) if isinstance(value, str) else value
            layers.append(_values(f"--{name}", _tree({FLAGS[name]: value}), problems))
    for override in reversed(overrides):
        path, equals, text = override.partition("=")
        if equals:
            layers.append(_values("--set", _tree({path.strip(): parse_value(text)}), problems))
        else:
            problems.append(f"{override}: --set needs SECTION.FIELD=VALUE [--set]")
    if all(any(layer.values.get(f"train.{length}") is not None for layer in layers) for length in _LENGTHS):
        problems.append("train.steps and train.epochs are both given: choose one")
    return layers


def _values(name: str, tree: dict[str, Any], problems: list[str]) -> Layer:
    return Layer(name, InitSettingsSource(RunSettings, tree), problems)


def _user_file(path: Path, task: Task | None, problems: list[str]) -> list[Layer]:
    """The user's file: the table of the task over the sections."""
    file = TomlFile(RunSettings, path)
    problems += [
        f"{key}: belongs into presets only; choose the preset with --preset [{path}]"
        for key in PRESET_KEYS
        if key in file.toml_data
    ]
    return [*_task_table(file, str(path), task, problems), Layer(str(path), file, problems, skip=REMOVED_FIELDS)]


def _preset(name: str, task: Task | None, problems: list[str]) -> list[Layer]:
    """A preset and those it extends: the tables of the task over the sections."""
    tables: list[Layer] = []
    sections: list[Layer] = []
    chain: list[str] = []
    parent: str | None = name
    while parent is not None:
        if parent in chain:
            raise ConfigError(f"presets extend each other in a circle: {' -> '.join([*chain, parent])}")
        file = TomlFile(RunSettings, preset_path(parent, wanted_by=chain[-1] if chain else ""))
        tables += _task_table(file, f"preset {parent}", task, problems)
        sections.append(Layer(f"preset {parent}", file, problems))
        chain.append(parent)
        parent = file.toml_data.get("extends")
    return [*tables, *sections]


def _task_table(file: TomlFile, name: str, task: Task | None, problems: list[str]) -> list[Layer]:
    """A layer for `[task.TASK.*]` of a file, if it has one; what else is under `task` is a problem."""
    tables = file.toml_data.get("task", {})
    layers = []
    for key, sections in tables.items() if isinstance(tables, dict) else [("", tables)]:
        if key not in TASKS or not isinstance(sections, dict):
            problems.append(f"task.{key}: must be one of the tables [task.pretrain.*], [task.finetune.*] [{name}]")
            continue
        table = InitSettingsSource(RunSettings, sections)
        layer = Layer(f"{name} [task.{key}]", table, problems, skip=REMOVED_FIELDS)  # checked for all tasks
        layers += [layer] if key == task else []
    return layers


def _auto_preset(chosen: Sequence[Layer], *, quiet: bool) -> str:
    """The preset for the smallest GPU of this machine, unless a layer asks for the CPU."""
    name, why = "demo", "the CPU was asked for"
    if next((layer.values["train.device"] for layer in chosen if "train.device" in layer.values), "auto") != "cpu":
        import torch

        if torch.cuda.is_available():
            cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
            card = min(cards, key=lambda properties: properties.total_memory)
            gib = card.total_memory / 2**30
            name, why = preset_for_card(card.name, gib), f"{card.name}, {gib:.0f} GiB"
        else:
            why = "no CUDA GPU was found"
    if not quiet:
        output.say(f"preset {name}: {why} (choose another with --preset)")
    return name


def _validated(layers: list[Layer], problems: list[str]) -> RunConfig:
    """The merged layers as a configuration.

    Raises:
        ConfigError: lists `problems` and every wrong value.
    """

    class Layered(RunSettings):
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *_: Any, **__: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return tuple(layers)

    try:
        merged = Layered()
    except ValidationError as error:
        problems += _wrong_values(error, layers)
    if problems:
        count = f"{len(problems)} settings are wrong:\n  " if len(problems) > 1 else ""
        raise ConfigError(count + "\n  ".join(problems), "`affmae presets NAME` shows every field and its value")
    return RunConfig(**{section: getattr(merged, section) for section in SECTIONS})


def _wrong_values(error: ValidationError, layers: Sequence[Layer]) -> list[str]:
    """A line for every field, with its value, what is wrong with it and its source."""
    reasons: dict[str, list[str]] = {}
    for item in error.errors(include_url=False, include_context=False):
        path = ".".join(str(part) for part in item["loc"][:2])
        reason = item["msg"].removeprefix("Value error, ").replace("Input should", "must").split(", unable to")[0]
        reason = reason.replace("Field required", "is missing")
        if len(item["loc"]) > 2 and isinstance(item["loc"][2], int):
            reason = f"item {item['loc'][2] + 1} {reason}"
        reasons.setdefault(path, []).append(reason)
    lines = []
    for path, texts in reasons.items():
        text = " or ".join(dict.fromkeys(texts))
        layer = next((layer for layer in layers if path in layer.values), None)
        if layer is not None:
            lines.append(f"{path} = {output.toml_value(layer.values[path])}: {text} [{layer.name_of(path)}]")
            continue
        # A rule over several fields: the sources of those it names.
        named = {p: layer.name_of(p) for layer in reversed(layers) for p in layer.values if _names(text, path, p)}
        sources = ", ".join(dict.fromkeys(named.values()))
        lines.append(f"{path}: {text} [{sources}]" if path else f"{text} [{sources}]")
    return lines


def _names(text: str, section: str, path: str) -> bool:
    """Whether a message on a section ("": on all of them) has the name of this field in it."""
    return path.startswith(section) and bool(re.search(rf"\b{re.escape(path.rpartition('.')[2])}\b", text))


def _why_unknown(path: str) -> str:
    if path in SECTIONS:
        return "is a section; set one of its fields"
    if path in REMOVED_FIELDS:
        return "no longer exists; leave it out"
    # A right field under a wrong section, or under none, is nearer than a misspelling.
    name = path.rpartition(".")[2]
    same = [known for known in FIELDS if known.rpartition(".")[2] == name]
    return "unknown field" + _did_you_mean(get_close_matches(path, same or FIELDS, n=1, cutoff=0.0 if same else 0.6))


def _did_you_mean(near: Sequence[str]) -> str:
    return f" (did you mean {near[0]}?)" if near else ""


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


def _tree(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by section and field from values by dotted path; a path without a dot stays what it is."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        section, dot, name = path.partition(".")
        if dot:
            tree.setdefault(section, {})[name] = value
        else:
            tree[section] = value
    return tree
