"""What the machine is made of. Every part is looked up by itself: one that fails is reported, the others still show."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TypeVar

import torch

from affmae_engine.errors import first_line
from affmae_engine.runtime.device import why_no_cuda

_T = TypeVar("_T")
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_MEMORY_FILE = Path("/proc/meminfo")


@dataclass(frozen=True)
class Card:
    """One CUDA card. Memory in bytes; `free_bytes` is None where the card does not say."""

    index: int
    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int | None
    bf16: bool


@dataclass
class Machine:
    """The parts; None stands for one that is not there or could not be looked up, `problems` says why, by part."""

    versions: dict[str, str | None] = field(default_factory=dict)
    """affmae, python, torch and triton."""
    platform: str | None = None
    cuda_runtime: str | None = None
    """The CUDA version that torch was built with."""
    driver: str | None = None
    """The NVIDIA driver's version."""
    cards: list[Card] = field(default_factory=list)
    cpus: int | None = None
    """Processors that this process may use."""
    ram_bytes: int | None = None
    ram_free_bytes: int | None = None
    runs: Path | None = None
    """Where runs are written, or will be once that folder exists."""
    disk_free_bytes: int | None = None
    extras: dict[str, list[str]] = field(default_factory=dict)
    """Packages that are missing for each extra of affmae (`pip install "affmae[EXTRA]"`); none for one that works."""
    problems: dict[str, str] = field(default_factory=dict)


def look_around(runs: Path) -> Machine:
    """Looks every part up; never raises.

    Args:
        runs: folder of the runs; need not exist.
    """
    machine = Machine(runs=runs.absolute(), cuda_runtime=torch.version.cuda)
    problems = machine.problems
    machine.versions = {
        "affmae": installed("affmae"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
    }
    machine.extras = _attempt(problems, "extras", missing_by_extra) or {}
    machine.platform = _attempt(problems, "platform", platform.platform)
    machine.cpus = _attempt(problems, "processors", _processors)
    machine.ram_bytes, machine.ram_free_bytes = _attempt(problems, "memory", _memory) or (None, None)
    machine.disk_free_bytes = _attempt(problems, "disk", lambda: shutil.disk_usage(_existing(runs)).free)
    machine.cards = _attempt(problems, "card", find_cards) or []
    if machine.cards or _DRIVER_FILE.exists():
        machine.driver = _attempt(problems, "driver", _driver)
    if not machine.cards and "card" not in problems:
        problems["card"] = why_no_cuda()
    return machine


def installed(name: str) -> str | None:
    """Version of an installed package; None when it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def missing_by_extra() -> dict[str, list[str]]:
    """The packages that are not installed, by extra; extras for developers are left out. Empty when run from source."""
    try:
        requirements = requires("affmae") or []
    except PackageNotFoundError:
        return {}
    missing: dict[str, list[str]] = {}
    for requirement in requirements:
        extra, name = re.search(r"extra == ['\"]([\w-]+)", requirement), re.match(r"[\w.-]+", requirement)
        if extra and name and extra[1] != "dev":
            missing.setdefault(extra[1], []).extend([] if installed(name[0]) else [name[0]])
    return missing


def find_cards() -> list[Card]:
    """The CUDA cards that torch sees."""
    return [_card(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def _card(index: int) -> Card:
    properties = torch.cuda.get_device_properties(index)
    try:
        free: int | None = int(torch.cuda.mem_get_info(index)[0])
    except RuntimeError:  # another process has taken all of it
        free = None
    with torch.cuda.device(index):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Card(index, properties.name, (properties.major, properties.minor), properties.total_memory, free, bf16)


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        words = _DRIVER_FILE.read_text("utf-8").splitlines()[0].split()
        return next(word for word in words if word[0].isdigit() and "." in word)


def _processors() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory() -> tuple[int, int | None]:
    """Total and available main memory; what is available is known on Linux alone."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not _MEMORY_FILE.exists():
        return total, None
    lines = dict(line.split(":", 1) for line in _MEMORY_FILE.read_text("ascii").splitlines() if ":" in line)
    return total, int(lines["MemAvailable"].split()[0]) * 1024


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _attempt(problems: dict[str, str], part: str, look: Callable[[], _T]) -> _T | None:
    try:
        return look()
    except Exception as error:  # a part of the machine that cannot be looked up must not hide the others
        problems[part] = first_line(error)
        return None
