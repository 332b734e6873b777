"""What is wrong with settings: one line for each, with the path, the value, the reason and the source."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from pydantic import ValidationError

from affmae_cli.output import toml_value
from affmae_cli.preset_files import PRESET_KEYS
from affmae_engine.config import FIELDS, REMOVED_FIELDS, SECTIONS


class Given(NamedTuple):
    """A value and where it comes from; of two sources the one of lower rank is stronger."""

    value: Any
    source: str
    rank: int


def unknown_fields(values: Mapping[str, Any], source: str) -> list[str]:
    """A line for every dotted path that is not a field."""
    return [
        f"{path} = {toml_value(value)}: {_why_unknown(path)} [{source}]"
        for path, value in values.items()
        if path not in FIELDS and not (path in SECTIONS and value == {})
    ]


def unknown_variable(name: str, text: str, known: Iterable[str]) -> str:
    """A line for an environment variable that is none of the known ones."""
    near = get_close_matches(name.upper(), known, n=1)
    return f"{name} = {toml_value(text)}: unknown setting{_did_you_mean(near)} [environment]"


def wrong_values(error: ValidationError, given: Mapping[str, Given]) -> list[str]:
    """A line for every field with a wrong value and for every broken rule over several fields."""
    reasons: dict[str, list[str]] = {}
    for item in error.errors(include_url=False, include_context=False):
        if item["type"] in ("extra_forbidden", "model_type"):  # see `unknown_fields`
            continue
        reason = item["msg"].removeprefix("Value error, ").replace("Input should", "must").split(", unable to")[0]
        reason = reason.replace("Field required", "is missing")
        if len(item["loc"]) > 2 and isinstance(item["loc"][2], int):
            reason = f"item {item['loc'][2] + 1} {reason}"
        reasons.setdefault(".".join(map(str, item["loc"][:2])), []).append(reason)
    lines = []
    for path, texts in reasons.items():
        text = " or ".join(dict.fromkeys(texts))
        if path in FIELDS and path in given:
            lines.append(f"{path} = {toml_value(given[path].value)}: {text} [{given[path].source}]")
        else:
            # A rule over the fields of a section (or of all, ""): the sources of those that it names.
            named = [p for p in FIELDS if p.startswith(path) and re.search(rf"\b{p.rpartition('.')[2]}\b", text)]
            sources = ", ".join(dict.fromkeys(given[p].source for p in named if p in given))
            lines.append(f"{path}: {text} [{sources}]" if path else f"{text} [{sources}]")
    return lines


def _why_unknown(path: str) -> str:
    if path in SECTIONS:
        return "is a section; set one of its fields"
    if path in REMOVED_FIELDS:
        return "no longer exists; leave it out"
    if path in PRESET_KEYS:
        return "belongs into presets only; choose the preset with --preset"
    if path.partition(".")[0] == "task":
        return "only files have tables for tasks: [task.pretrain.*] and [task.finetune.*]"
    # A right field under a wrong section, or under none, is nearer than a misspelling.
    name = path.rpartition(".")[2]
    same = [known for known in FIELDS if known.rpartition(".")[2] == name]
    return "unknown field" + _did_you_mean(get_close_matches(path, same or FIELDS, n=1, cutoff=0.0 if same else 0.6))


def _did_you_mean(near: list[str]) -> str:
    return f" (did you mean {near[0]}?)" if near else ""
