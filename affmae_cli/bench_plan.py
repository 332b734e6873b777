"""What `affmae bench` measures, from its options: checked, with defaults by machine, before anything is built."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar, get_args

import torch

from affmae_engine import atomic
from affmae_engine.bench.batches import default_batch
from affmae_engine.bench.case import Case, Model, Request, VitMode, Work
from affmae_engine.bench.comparison import Settings
from affmae_engine.bench.kernel_cases import OPERATIONS, Setting
from affmae_engine.config import ModelConfig, TrainConfig
from affmae_engine.data.store import Store
from affmae_engine.errors import ConfigError
from affmae_engine.model.sizes import SIZES
from affmae_engine.train.device import DeviceChoice, exact_fp32, pick_device

Entry = TypeVar("Entry")

SMALLEST, LARGEST = 64, 4096
TINY = ("tiny", 128, 2)
"""Size, resolution and batch where there is no card."""
QUICK_SIZES, QUICK_EDGES = ["small"], [512]
FULL_SIZES, FULL_EDGES = ["small", "base"], [512, 1024]
GATE_BATCH = 2
LARGE_CARD_GIB = 80.0
"""Batches of single operations are those of such a card on every card, so that their figures compare."""

CPU_REMARK = (
    "No card: these are times of plain PyTorch on a CPU. They show that everything runs; they say little about a card, "
    "where other parts of the work take the time."
)
TINY_REMARK = "A tiny network on small images: the figures do not carry over to small or base."
QUICK_REMARK = (
    "A quick look: AFFMAE's layers are not compiled, as in training runs of less than 2000 steps; long runs compile "
    "them and are faster (--full, or --compile; the first time it takes some two minutes). ViT-MAE is compiled."
)


@dataclass(frozen=True)
class Plan:
    """Everything to measure."""

    choice: DeviceChoice
    settings: list[Setting]
    """For single operations."""
    gate_settings: list[Setting]
    """The same shapes with a small batch: the check before networks are timed."""
    cases: list[Case]
    comparison: Settings
    operations: tuple[str, ...]
    seconds: float
    remarks: list[str]
    out: Path | None
    timeout: float
    ahead: bool
    """Whether there are processors to spare for loading the next process."""


@dataclass(frozen=True)
class Options:
    """What the command was given; None is what was left open. Lists are text, separated by commas."""

    sizes: str | None = None
    resolutions: str | None = None
    batch: str = "auto"
    task: str = "pretrain"
    models: str = "affmae,vit-mae"
    vit: str = "auto"
    dtype: str = "auto"
    device: str | None = None
    quick: bool = False
    full: bool = False
    compile: bool | None = None
    rounds: int | None = None
    steps: int | None = None
    max_batch: bool = False
    data: Path | None = None
    profile: bool = False
    timeout: float = 900.0
    kernels: bool = False
    counters: bool = False
    operations: str | None = None
    out: Path | None = None


def make_plan(options: Options) -> Plan:
    """Checks the options and fills in what they leave open.

    Raises:
        ConfigError: an unknown name, a number out of range, options that exclude each other.
        InputError: `data` is not a dataset.
        ResourceError: CUDA was asked for and is absent; the output folder cannot be written to.
    """
    works = names_in("--task", options.task, get_args(Work))
    models = names_in("--models", options.models, get_args(Model))
    modes = names_in("--vit", options.vit, get_args(VitMode))
    chosen_ops = OPERATIONS if options.operations is None else names_in("--ops", options.operations, OPERATIONS)
    sizes = None if options.sizes is None else names_in("--sizes", options.sizes, SIZES)
    edges = None if options.resolutions is None else _edges(options.resolutions)
    count = None if options.batch == "auto" else _whole("--batch", options.batch, 1, 65_536, " or auto")
    if options.quick and options.full:
        raise ConfigError("--quick and --full exclude each other")
    if "compile-fp32-residual" in modes and works != ["pretrain"]:
        raise ConfigError("--vit compile-fp32-residual is there for --task pretrain alone")
    if options.data is not None:
        Store.open(options.data)
    choice = pick_device(TrainConfig.model_validate({"device": options.device or "auto", "precision": options.dtype}))
    exact_fp32()
    on_card = choice.device.type == "cuda"
    if options.counters and not (options.kernels and on_card):
        raise ConfigError("--counters goes with --kernels, on an NVIDIA card")
    quick = options.quick or not (options.full or options.kernels or sizes or edges)
    grids = {"quick": (QUICK_SIZES, QUICK_EDGES), "full": (FULL_SIZES, FULL_EDGES), "cpu": ([TINY[0]], [TINY[1]])}
    usual = grids["cpu" if not on_card else "quick" if quick else "full"]
    sizes, edges = sizes or usual[0], edges or usual[1]
    memory = torch.cuda.get_device_properties(choice.device).total_memory / 2**30 if on_card else 0.0
    compiled = on_card and (options.compile if options.compile is not None else not quick)

    def images(work: str, size: str, edge: int) -> int:
        return count or (default_batch(work, size, edge, memory) if on_card else TINY[2])

    settings = [(work, size, edge, images(work, size, edge)) for work in works for edge in edges for size in sizes]
    cases = [
        case
        for setting in settings
        for model in models
        for case in _cases(setting, model, modes if on_card else ["auto"], compiled=compiled)
    ]
    grid = [(size, edge, images("pretrain", size, edge)) for edge in edges for size in sizes]
    return Plan(
        choice=choice,
        settings=_kernel_settings(grid, same_batch=on_card and count is None),
        gate_settings=[Setting(size, edge, min(number, GATE_BATCH)) for size, edge, number in grid],
        cases=cases,
        comparison=_settings(options, choice, cases[0], quick=quick, memory=memory),
        operations=tuple(chosen_ops),
        seconds=0.02 if quick or not on_card else 0.2,
        remarks=_remarks(sizes, on_card=on_card, uncompiled=on_card and "affmae" in models and not compiled),
        out=None if options.out is None else atomic.ensure_folder(options.out),
        timeout=options.timeout,
        ahead=on_card and _processors() >= 4,
    )


def _cases(setting: tuple[str, str, int, int], model: str, modes: list[str], *, compiled: bool) -> list[Case]:
    """One network in one setting, in every way that it is to be run."""
    work, size, edge, images = setting
    fields = {"model": model, "work": work, "size": size, "resolution": edge, "batch": images, "compile": compiled}
    return [Case.model_validate({**fields, "vit_mode": mode}) for mode in (modes if model == "vit-mae" else ["auto"])]


def _settings(options: Options, choice: DeviceChoice, case: Case, *, quick: bool, memory: float) -> Settings:
    on_card = choice.device.type == "cuda"
    steps = options.steps or (3 if not on_card else 10 if quick else 20)
    request = Request(
        case=case,
        device="cuda" if on_card else "cpu",
        precision=choice.precision,  # type: ignore[arg-type]
        steps=steps,
        warmup=5 if on_card else 1,
        profile=options.profile,
        data=None if options.data is None else str(options.data),
    )
    return Settings(
        rounds=options.rounds or (2 if quick or not on_card else 3),
        request=request,
        compile_first=on_card,
        max_batch=options.max_batch and on_card,
        memory_gib=memory,
        compilers=max(1, min(6, _processors() // 3)),
    )


def _remarks(sizes: list[str], *, on_card: bool, uncompiled: bool) -> list[str]:
    remarks = [] if on_card else [CPU_REMARK]
    if "tiny" in sizes:
        remarks.append(TINY_REMARK)
    return [*remarks, QUICK_REMARK] if uncompiled else remarks


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _kernel_settings(grid: list[tuple[str, int, int]], *, same_batch: bool) -> list[Setting]:
    """Single operations run with one batch per resolution, so that what does not depend on the size runs once."""
    return [
        Setting(size, edge, default_batch("pretrain", "base", edge, LARGE_CARD_GIB) if same_batch else images)
        for size, edge, images in grid
    ]


def names_in(option: str, text: str, known: Iterable[str]) -> list[str]:
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
