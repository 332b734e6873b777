"""From defaults, preset, file, environment and command line to one validated configuration.

Precedence, strongest first: flags and `--set`, environment `AFFMAE_SECTION__FIELD`, the user's TOML (`--config`), the
preset with the presets it extends, the defaults of `affmae_engine.config`. Every source becomes a flat layer
"section.field" -> (value, source), so an error can say where a wrong value came from and all errors are shown at once.

A file may give a section other values for one task, in `[task.finetune.SECTION]` or `[task.pretrain.SECTION]`. They
overlay the same file's own sections (for presets: those of the whole `extends` chain) before stronger layers are
merged over them, so they never hide what a user set.

`train.steps` and `train.epochs` are two ways to say one thing: a layer that sets one of them hides the other one in
weaker layers.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic import ValidationError

from affmae_cli import output
from affmae_cli.preset_files import PRESET_KEYS, preset_for_card, preset_tree, read_toml
from affmae_engine.config import REMOVED_FIELDS, RunConfig, Section, Task, without_removed
from affmae_engine.errors import ConfigError

ENVIRONMENT_PREFIX = "AFFMAE_"
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
SECTIONS: dict[str, type[Section]] = {name: info.annotation for name, info in RunConfig.model_fields.items()}  # type: ignore[misc]
FIELDS = tuple(f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields)
"""Every dotted path that can be set."""

_LENGTHS = ("train.steps", "train.epochs")


class Entry(NamedTuple):
    """A value and where it came from."""

    value: Any
    source: str


Layer = dict[str, Entry]


@dataclass(frozen=True)
class Resolved:
    """A validated configuration; `sources` has an entry for every dotted path that is not a default."""

    config: RunConfig
    task: Task | None
    preset: str
    sources: dict[str, str]


@dataclass
class _File:
    """The layers of one TOML file, or of a chain of presets merged together."""

    base: Layer = field(default_factory=dict)
    tasks: dict[str, Layer] = field(default_factory=lambda: {task: {} for task in TASKS})

    def over(self, weaker: _File) -> _File:
        return _File(
            merged(weaker.base, self.base), {task: merged(weaker.tasks[task], self.tasks[task]) for task in TASKS}
        )

    def layer(self, task: Task | None) -> Layer:
        return merged(self.base, self.tasks[task]) if task else self.base


def resolve(
    task: Task | None,
    *,
    preset: str | None = None,
    config_file: Path | None = None,
    overrides: Sequence[str] | None = None,
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
    unset: Collection[str] = (),
    quiet: bool = False,
) -> Resolved:
    """Merge all sources and validate the result.

    Args:
        task: whose `[task.*]` tables apply; None keeps the base sections.
        preset: name of a preset; None or "auto" picks one by the card found and says so on stderr.
        config_file: the user's TOML file.
        overrides: values of `--set`, each "section.field=value".
        flags: flags that set a field, by their name in `FLAGS`; None stands for a flag that was not given.
        environ: environment variables.
        unset: fields that are None in the user's file, which TOML cannot say.
        quiet: do not say which preset was picked.

    Raises:
        ConfigError: unknown preset, unreadable file, or wrong settings; the message lists all of them.
    """
    problems: list[str] = []
    given = {**_set_layer(overrides or (), problems), **_flag_layer(flags or {})}
    if all(path in given and given[path].value is not None for path in _LENGTHS):
        problems.append("train.steps and train.epochs are both given: choose one")
    environment = _environment_layer(environ, problems)
    user = _user_file(config_file, problems).layer(task) if config_file else {}
    user = {**{path: Entry(None, str(config_file)) for path in unset}, **user}
    chosen = merged(user, environment, given)
    name = _auto_preset(chosen, quiet=quiet) if preset in (None, "auto") else preset
    layer = merged(_preset_file(name, problems).layer(task), chosen)
    config = _validated(layer, problems)
    return Resolved(config, task, name, {path: entry.source for path, entry in layer.items()})


def merged(*layers: Layer) -> Layer:
    """Layers on top of each other, weakest first."""
    result: Layer = {}
    for layer in layers:
        for path, twin in (_LENGTHS, _LENGTHS[::-1]):
            if path in layer and layer[path].value is not None and twin not in layer:
                result.pop(twin, None)
        result.update(layer)
    return result


def _auto_preset(chosen: Layer, *, quiet: bool) -> str:
    name, why = "demo", "the CPU was asked for"
    if chosen.get("train.device", Entry("auto", "")).value != "cpu":
        import torch

        if torch.cuda.is_available():
            cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
            card = min(cards, key=lambda properties: properties.total_memory)
            gib = card.total_memory / 2**30
            name, why = preset_for_card(card.name, gib), f"{card.name}, {gib:.0f} GiB"
        else:
            why = "no CUDA card was found"
    if not quiet:
        output.say(f"preset {name}: {why} (choose another with --preset)")
    return name


def _preset_file(name: str, problems: list[str]) -> _File:
    chain, current = [name], preset_tree(name)
    result = _parsed(current, f"preset {name}", problems)
    while "extends" in current:
        parent = current["extends"]
        if parent in chain:
            raise ConfigError(f"presets extend each other in a circle: {' -> '.join([*chain, parent])}")
        chain.append(parent)
        current = preset_tree(parent, wanted_by=chain[-2])
        result = result.over(_parsed(current, f"preset {parent}", problems))
    return result


def _user_file(path: Path, problems: list[str]) -> _File:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"no such configuration file: {path}", "a preset is chosen with --preset NAME") from error
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from error
    tree = without_removed(read_toml(data, str(path)))
    if isinstance(tree.get("task"), dict):
        tree["task"] = {
            task: without_removed(sections) if isinstance(sections, dict) else sections
            for task, sections in tree["task"].items()
        }
    for key in PRESET_KEYS:
        if key in tree:
            del tree[key]
            problems.append(f"{key}: belongs into presets only; choose the preset with --preset [{path}]")
    return _parsed(tree, str(path), problems)


def _parsed(tree: Mapping[str, Any], source: str, problems: list[str]) -> _File:
    result = _File()
    for name, value in tree.items():
        if name in PRESET_KEYS:
            continue
        if name != "task":
            _add(result.base, name, value, source, problems)
            continue
        for task, sections in value.items() if isinstance(value, dict) else [("", value)]:
            if task not in TASKS or not isinstance(sections, dict):
                problems.append(
                    f"task.{task}: must be one of the tables [task.pretrain.*], [task.finetune.*] [{source}]"
                )
                continue
            for section, table in sections.items():
                _add(result.tasks[task], section, table, f"{source} [task.{task}]", problems)
    return result


def _set_layer(overrides: Iterable[str], problems: list[str]) -> Layer:
    layer: Layer = {}
    for override in overrides:
        path, equals, text = override.partition("=")
        if equals:
            _add(layer, path.strip(), _value(text), "--set", problems)
        else:
            problems.append(f"{override}: --set needs SECTION.FIELD=VALUE [--set]")
    return layer


def _flag_layer(flags: Mapping[str, Any]) -> Layer:
    return {
        FLAGS[name]: Entry(_value(value) if isinstance(value, str) else value, f"--{name}")
        for name, value in flags.items()
        if value is not None
    }


def _environment_layer(environ: Mapping[str, str], problems: list[str]) -> Layer:
    layer: Layer = {}
    known = {path.replace(".", "__").upper(): path for path in FIELDS}
    for name, text in sorted(environ.items()):
        if not name.startswith(ENVIRONMENT_PREFIX) or name in OTHER_ENVIRONMENT:
            continue
        key = name.removeprefix(ENVIRONMENT_PREFIX).upper()
        if key in known:
            layer[known[key]] = Entry(_value(text), f"environment {name}")
        else:
            near = [ENVIRONMENT_PREFIX + match for match in get_close_matches(key, known, n=1)]
            problems.append(f"{name} = {output.toml_value(text)}: unknown setting{_did_you_mean(near)} [environment]")
    return layer


def _value(text: str) -> Any:
    """A value typed by a user: TOML where it is TOML, `none` for None, else the text itself."""
    if text.strip().lower() == "none":
        return None
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _add(layer: Layer, path: str, value: Any, source: str, problems: list[str]) -> None:
    if path in FIELDS:
        layer[path] = Entry(value, source)
    elif isinstance(value, dict) and (value or path in SECTIONS):
        for key, item in value.items():
            _add(layer, f"{path}.{key}", item, source, problems)
    elif path in SECTIONS:
        problems.append(f"{path} = {output.toml_value(value)}: is a section; set one of its fields [{source}]")
    elif path in REMOVED_FIELDS:
        problems.append(f"{path} = {output.toml_value(value)}: no longer exists; leave it out [{source}]")
    else:
        problems.append(f"{path} = {output.toml_value(value)}: unknown field{_did_you_mean(_near(path))} [{source}]")


def _near(path: str) -> list[str]:
    """The known path nearest to a wrong one; a right field under a wrong or no section is nearer than a misspelling."""
    name = path.rpartition(".")[2]
    same = [known for known in FIELDS if known.rpartition(".")[2] == name]
    return get_close_matches(path, same or FIELDS, n=1, cutoff=0.0 if same else 0.6)


def _did_you_mean(near: Sequence[str]) -> str:
    return f" (did you mean {near[0]}?)" if near else ""


def _validated(layer: Layer, problems: list[str]) -> RunConfig:
    tree: dict[str, dict[str, Any]] = {}
    for path, entry in layer.items():
        section, _, key = path.partition(".")
        tree.setdefault(section, {})[key] = entry.value
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        problems += _value_problems(error, layer)
    if problems:
        count = f"{len(problems)} settings are wrong:\n  " if len(problems) > 1 else ""
        raise ConfigError(count + "\n  ".join(problems), "`affmae presets NAME` shows every field and its value")
    return config


def _value_problems(error: ValidationError, layer: Layer) -> list[str]:
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
        if path in layer:
            lines.append(f"{path} = {output.toml_value(layer[path].value)}: {text} [{layer[path].source}]")
            continue
        # A rule over several fields: the sources of those it names.
        named = [p for p in layer if p.startswith(path) and re.search(rf"\b{re.escape(p.rpartition('.')[2])}\b", text)]
        sources = ", ".join(dict.fromkeys(layer[p].source for p in named))
        lines.append(f"{path}: {text} [{sources}]" if path else f"{text} [{sources}]")
    return lines
