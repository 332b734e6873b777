"""What `affmae bench` measures, from its options: checked, with defaults by machine, before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar, get_args

from affmae_engine import atomic
from affmae_engine.bench.kernel_cases import OPERATIONS, Setting
from affmae_engine.bench.step import Model, StepCase, VitMode
from affmae_engine.config import ModelConfig, TrainConfig
from affmae_engine.errors import ConfigError
from affmae_engine.model.sizes import SIZES
from affmae_engine.train.device import DeviceChoice, exact_fp32, pick_device

Entry = TypeVar("Entry")

SMALLEST, LARGEST = 64, 4096
TINY = ("tiny", 128, 2)
"""Size, resolution and batch where there is no card, and for `--quick`."""
GATE_BATCH = 2

CPU_REMARK = "No card: these are times of plain PyTorch on a CPU; they show that it runs and say nothing about a card."
TINY_REMARK = "A tiny model on small images: the figures do not carry over to small or base."


@dataclass(frozen=True)
class Plan:
    """Everything to measure."""

    choice: DeviceChoice
    settings: list[Setting]
    """For single operations."""
    gate_settings: list[Setting]
    """The same shapes with a small batch: the check before steps are timed."""
    cases: list[StepCase]
    operations: tuple[str, ...]
    steps: int
    warmup: int
    seconds: float
    remarks: list[str]
    out: Path | None


def make_plan(
    *,
    sizes: str | None,
    resolutions: str | None,
    batch: str,
    dtype: str,
    device: str | None,
    quick: bool,
    steps: int | None,
    models: str,
    vit: str,
    operations: str | None,
    out: Path | None,
) -> Plan:
    """Checks the options and fills in what they leave open.

    Raises:
        ConfigError: an unknown name, a resolution or batch out of range.
        ResourceError: CUDA was asked for and is absent; the output folder cannot be written to.
    """
    chosen_models = _names("--models", models, get_args(Model))
    modes = _names("--vit", vit, get_args(VitMode))
    chosen_ops = OPERATIONS if operations is None else _names("--ops", operations, OPERATIONS)
    wanted_sizes = None if sizes is None else _names("--sizes", sizes, SIZES)
    wanted_edges = None if resolutions is None else _edges(resolutions)
    count = None if batch == "auto" else _whole("--batch", batch, 1, 65_536, " or auto")
    choice = pick_device(TrainConfig.model_validate({"device": device or "auto", "precision": dtype}))
    exact_fp32()
    on_card = choice.device.type == "cuda"
    small = quick or not on_card
    chosen_sizes = wanted_sizes or ([TINY[0]] if small else ["small", "base"])
    edges = wanted_edges or ([TINY[1]] if small else [512, 1024])
    remarks = [] if on_card else [CPU_REMARK]
    if "tiny" in chosen_sizes:
        remarks.append(TINY_REMARK)
    grid = [
        (size, edge, count or (TINY[2] if small else default_batch(size, edge)))
        for edge in edges
        for size in chosen_sizes
    ]
    cases = [
        StepCase(model=model, size=size, resolution=edge, batch=images, vit_mode=mode)  # type: ignore[arg-type]
        for size, edge, images in grid
        for model in chosen_models
        for mode in (modes if model == "vit-mae" and on_card else modes[:1])
    ]
    return Plan(
        choice=choice,
        settings=_kernel_settings(grid, same_batch=not small and count is None),
        gate_settings=[Setting(size, edge, min(images, GATE_BATCH)) for size, edge, images in grid],
        cases=cases,
        operations=tuple(chosen_ops),
        steps=steps or (3 if small else 30),
        warmup=1 if not on_card else 10,
        seconds=0.02 if small else 0.2,
        remarks=remarks,
        out=None if out is None else atomic.ensure_folder(out),
    )


def default_batch(size: str, edge: int) -> int:
    """Images that both models hold at once on a large card: 32 (small: 64) at 512 pixels, 8 at 1024."""
    pixels = (64 if size != "base" and edge <= 512 else 32) * 512**2
    return max(1, pixels // edge**2)


def _kernel_settings(grid: list[tuple[str, int, int]], *, same_batch: bool) -> list[Setting]:
    """Single operations run with one batch per resolution, so that what does not depend on the size runs once."""
    return [Setting(size, edge, default_batch("base", edge) if same_batch else images) for size, edge, images in grid]


def _names(option: str, text: str, known: Iterable[str]) -> list[str]:
    """Names of a comma-separated list, each once."""
    known = list(known)

    def check(name: str) -> str:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"{option}: unknown name {name!r}", hint)
        return name

    return _list(option, text, check)


def _edges(text: str) -> list[int]:
    patch = ModelConfig().patch_size

    def check(entry: str) -> int:
        edge = _whole("--resolutions", entry, SMALLEST, LARGEST)
        if edge % patch:
            raise ConfigError(f"--resolutions: {edge} is not a multiple of the patch of {patch} pixels")
        return edge

    return _list("--resolutions", text, check)


def _whole(option: str, text: str, low: int, high: int, more: str = "") -> int:
    wrong = ConfigError(f"{option} must be a whole number from {low} to {high}{more}; got {text!r}")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise wrong
    if not low <= int(text) <= high:
        raise wrong
    return int(text)


def _list(option: str, text: str, check: Callable[[str], Entry]) -> list[Entry]:
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if not entries:
        raise ConfigError(f"{option} is empty", "give one or more values, separated by commas")
    return list(dict.fromkeys(check(entry) for entry in entries))
