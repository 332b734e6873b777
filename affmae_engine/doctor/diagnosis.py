"""Everything put together: machine, choice of kernels, self-check, timings, and one verdict."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from affmae_engine.config import RunConfig
from affmae_engine.doctor.machine import Card, Machine, look_around
from affmae_engine.doctor.selfcheck import Check, run_checks
from affmae_engine.doctor.timings import OperationTiming, run_timings
from affmae_engine.errors import AffmaeError, first_line
from affmae_engine.runtime.device import DeviceChoice, exact_fp32, pick_device
from affmae_kernels import launch
from affmae_kernels.cases import OPERATIONS
from affmae_kernels.dispatch import choose_backend
from affmae_kernels.launch import OLDEST_CAPABILITY

NEEDS = (
    f"The kernels need an NVIDIA GPU of compute capability {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} or newer "
    "(RTX 30 series, A100)."
)


@dataclass(frozen=True)
class Operation:
    """Which implementation an operation gets and why; backend None: it cannot run as requested."""

    operation: str
    about: str
    backend: str | None
    reason: str


@dataclass
class Diagnosis:
    """What was found; filled from the top down."""

    machine: Machine
    device: str
    """Where the operations were tried, in words."""
    card: Card | None = None
    operations: list[Operation] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    timings: list[OperationTiming] = field(default_factory=list)
    status: Literal["ready", "slow", "failed"] = "failed"
    verdict: str = ""
    remark: str = ""

    @property
    def wrong(self) -> list[str]:
        """Operations that cannot run as asked, or that failed a check."""
        unable = [operation.operation for operation in self.operations if operation.backend is None]
        failed = [check.operation for check in self.checks if not check.ok]
        return list(dict.fromkeys([*unable, *failed]))

    def document(self) -> dict[str, Any]:
        """Everything as one JSON document."""
        return {
            "schema": 2,
            "status": self.status,
            "verdict": self.verdict,
            "remark": self.remark,
            "wrong": self.wrong,
            "device": self.device,
            "machine": asdict(self.machine),
            "operations": [asdict(operation) for operation in self.operations],
            "checks": [asdict(check) | {"ok": check.ok} for check in self.checks],
            "timings": [asdict(timing) for timing in self.timings],
        }


def diagnose(
    config: RunConfig,
    *,
    quick: bool = False,
    runs: Path = Path("runs"),
    on_step: Callable[[str], None] = lambda step: None,
) -> Diagnosis:
    """Looks at the machine and tries every operation on it.

    Args:
        config: `train.device`, `train.precision` and `kernels.backend` count.
        quick: leave the timings out, as on a CPU.
        runs: where runs are written.
        on_step: told what comes next.

    Raises:
        AffmaeError: the device that was asked for does not exist.
    """
    on_step("looking at the machine")
    exact_fp32()
    machine = look_around(runs)
    choice = _device(config, machine)
    device, backend = choice.device, config.kernels.backend
    card = next((card for card in machine.cards if device.type == "cuda" and card.index == device.index), None)
    found = Diagnosis(machine, choice.description, card)
    with _quiet_fallback():
        on_step("choosing kernels")
        found.operations = [_operation(name, backend, device) for name in OPERATIONS]
        precisions: tuple[str, ...] = ("fp32",)
        if device.type == "cuda":
            precisions = ("fp32", "bf16", "fp16") if card and card.bf16 else ("fp32", "fp16")
        able = {operation.operation: operation.backend for operation in found.operations if operation.backend}
        found.checks = list(run_checks(device, list(able), precisions, backend, on_step))
        if device.type == "cuda" and not quick:
            right = {check.operation for check in found.checks} - set(found.wrong)
            found.timings = list(
                run_timings(device, choice.precision, {o: b for o, b in able.items() if o in right}, on_step)
            )
    found.status, found.verdict, found.remark = judge(found)
    return found


def judge(found: Diagnosis) -> tuple[Literal["ready", "slow", "failed"], str, str]:
    """Status, a line for people, and what else they should know."""
    if any(operation.backend is None for operation in found.operations):
        return "failed", "Failed: the requested Triton kernels cannot run on this machine", ""
    if found.wrong:
        return "failed", f"Failed: {_names(found.wrong)} on this machine", ""
    slow = [operation for operation in found.operations if operation.backend == "reference"]
    if found.card is None:
        if not slow:
            return "slow", "For tests only: kernels in Triton's interpreter on the CPU", NEEDS
        if found.machine.cards:
            return "slow", "Works, but slowly: plain PyTorch on the CPU, as requested", ""
        return "slow", "Works, but slowly: no usable NVIDIA GPU; plain PyTorch on the CPU", NEEDS
    if not slow:
        return "ready", f"Ready: Triton kernels on {found.card.name}", ""
    reasons = "; ".join(dict.fromkeys(operation.reason for operation in slow))
    if len(slow) == len(found.operations):
        if reasons == "asked for":
            reasons = "Plain PyTorch was requested (kernels.backend = reference)."
        return "slow", f"Works, but slowly: plain PyTorch on {found.card.name}", reasons
    names = _names([operation.operation for operation in slow])
    return "ready", f"Ready: Triton kernels on {found.card.name}, except for {names}", reasons


def _device(config: RunConfig, machine: Machine) -> DeviceChoice:
    try:
        return pick_device(config.train)
    except AffmaeError:
        raise
    except Exception as error:  # a driver that answers and then fails
        machine.problems["card"] = first_line(error)
        machine.cards = []
        return pick_device(config.train.model_copy(update={"device": "cpu", "precision": "auto"}))


def _operation(name: str, backend: str, device: torch.device) -> Operation:
    operation = Operation(name, "", None, "")
    try:
        # What an operation does stands in the first line of its package's docstring.
        contract = importlib.import_module(f"affmae_kernels.{name}").__doc__ or ""
        operation = replace(operation, about=contract.strip().partition("\n")[0])
        choice = choose_backend(backend, name, device)
    except Exception as error:  # forced where it cannot run, or a probe that fails
        return replace(operation, reason=_obstacle(device) or first_line(error))
    return replace(operation, backend=choice.name, reason=choice.reason)


def _obstacle(device: torch.device) -> str | None:
    try:
        return launch.obstacle(device.type, device.index or 0)
    except Exception as error:  # a card that cannot even be asked
        return first_line(error)


@contextlib.contextmanager
def _quiet_fallback() -> Iterator[None]:
    """Mutes the warning about plain PyTorch: the tables say the same."""
    logger = logging.getLogger("affmae_kernels")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
