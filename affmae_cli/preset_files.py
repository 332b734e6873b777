"""The preset files: reading them, listing them, choosing one for a GPU. `settings` merges them."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from typing import TYPE_CHECKING, Any

from affmae_engine.errors import ConfigError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable
    from pathlib import Path

PRESET_KEYS = ("extends", "about", "card_gb", "auto")
"""What a preset says about itself, besides sections."""


@dataclass(frozen=True)
class Preset:
    """What the list of presets shows of one: its purpose and the memory (GB) of the GPU that it is made for.

    `auto` is whether `--preset auto` may choose it.
    """

    name: str
    about: str
    card_gb: float | None
    auto: bool


def preset_names() -> list[str]:
    """Names of all presets, sorted."""
    return sorted(
        entry.name.removesuffix(".toml") for entry in preset_folder().iterdir() if entry.name.endswith(".toml")
    )


def preset_folder() -> Traversable:
    """Where the presets are."""
    return resources.files("affmae_presets")


def list_presets() -> list[Preset]:
    """All presets: those for no GPU first, then by memory and name."""
    found = []
    for name in preset_names():
        tree = preset_tree(name)
        found.append(Preset(name, tree.get("about", ""), tree.get("card_gb"), tree.get("auto", True)))
    return sorted(found, key=lambda preset: (preset.card_gb or 0, preset.name))


def preset_for_card(card: str, memory_gib: float) -> str:
    """The largest preset that fits into a GPU's memory; of several, the one named after the GPU.

    Args:
        card: name of the GPU as its driver gives it.
        memory_gib: its memory; what is sold as 24 GB reports a little less than 24 GiB.
    """
    sized = [preset for preset in list_presets() if preset.auto and preset.card_gb]
    fitting = [preset for preset in sized if (preset.card_gb or 0) * 0.9 <= memory_gib]
    plain = re.sub(r"[^a-z0-9]", "", card.lower())
    if not fitting:
        return sized[0].name
    return max(fitting, key=lambda preset: (preset.card_gb or 0, preset.name.split("-")[0] in plain)).name


def preset_for_this_machine(*, on_cpu: bool) -> tuple[str, str]:
    """The preset that `--preset auto` takes, for the smallest GPU of several, and why; `on_cpu`: no GPU is wanted."""
    if on_cpu:
        return "demo", "the CPU was asked for"
    import torch

    if not torch.cuda.is_available():
        return "demo", "no CUDA GPU was found"
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    card = min(cards, key=lambda properties: properties.total_memory)
    gib = card.total_memory / 2**30
    return preset_for_card(card.name, gib), f"{card.name}, {gib:.0f} GiB"


def preset_path(name: str, *, wanted_by: str = "") -> Traversable:
    """The file of a preset.

    Args:
        name: name of the preset.
        wanted_by: the preset that extends it, for the message.

    Raises:
        ConfigError: there is no such preset.
    """
    names = preset_names()
    if name not in names:
        if name.endswith(".toml"):
            raise ConfigError(f"unknown preset: {name}", f"your own file is given with --config {name}")
        near = get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        where = f" (extended by preset {wanted_by})" if wanted_by else ""
        raise ConfigError(f"unknown preset: {name}{where}", f"{hint}there are {', '.join(names)}, and auto")
    return preset_folder() / f"{name}.toml"


def preset_tree(name: str) -> dict[str, Any]:
    """The content of a preset file.

    Raises:
        ConfigError: there is no such preset, or it is not valid TOML.
    """
    return read_toml(preset_path(name))


def read_toml(path: Path | Traversable) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        ConfigError: it is not there, cannot be read, or is not valid TOML; the message has the line.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"no such configuration file: {path}", "a preset is chosen with --preset NAME") from error
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from error
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is not valid TOML: its values are nested too deeply") from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path} is not valid TOML: it is not UTF-8 text (at line {line})") from error
