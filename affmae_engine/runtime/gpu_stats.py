"""The card that a run computes on, as the driver sees it (NVML): memory of all its users, power, heat, clocks.

NVML asks the driver, not the device's queue: a sample takes a millisecond or so and never waits for kernels. Whatever
a card or a driver does not tell is left out, one figure at a time.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

import pynvml
import torch

from affmae_engine.runtime.device import why_no_cuda

GIB = 2**30
_CONTEXT = 2 * GIB
"""Memory that a process may hold on a card beyond what torch's allocator reserved: CUDA context, libraries, graphs."""
_THROTTLES = {
    "nvmlClocksEventReasonSwPowerCap": "power limit",
    "nvmlClocksThrottleReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksEventReasonSwThermalSlowdown": "thermal",
    "nvmlClocksThrottleReasonHwThermalSlowdown": "thermal (hardware)",
    "nvmlClocksThrottleReasonHwPowerBrakeSlowdown": "power brake",
    "nvmlClocksEventReasonApplicationsClocksSetting": "application clocks",
    "nvmlClocksEventReasonSyncBoost": "sync boost",
}
"""Reasons that hold clocks back, by the name of NVML's bit. Idling is none."""

_log = logging.getLogger(__name__)


class Card:
    """Opens NVML for a torch device. missing: why there are no figures, "" when there are."""

    def __init__(self, device: torch.device) -> None:
        self.missing = ""
        self.name = ""
        self._handle: Any = None
        self._others: list[Any] = []
        self._device = device
        if device.type != "cuda":
            self.missing = "the run computes on the CPU" if torch.cuda.is_available() else why_no_cuda()
            return
        self.name = torch.cuda.get_device_properties(device).name
        try:
            pynvml.nvmlInit()
            self._handle = _handle_of(device)
        except pynvml.NVMLError as error:
            self.missing = f"NVML: {error}"
            return
        for index in range(torch.cuda.device_count()):
            if index != (device.index or 0):
                with contextlib.suppress(pynvml.NVMLError):
                    self._others.append(_handle_of(torch.device("cuda", index)))

    def sample(self) -> dict[str, Any]:
        """Fields of a `system` event that NVML gives; those it does not are absent."""
        handle = self._handle
        found: dict[str, Any] = {"gpu": self.name, "gpu_missing": self.missing}
        if handle is None:
            return found
        reserved = torch.cuda.memory_reserved(self._device)
        found["gpu_memory_reserved"] = reserved / GIB
        found |= _figures(handle)
        if "gpu_memory_used" in found:
            processes = _asked(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(handle)) or []
            own = own_memory(((p.pid, p.usedGpuMemory) for p in processes), os.getpid(), reserved)
            if own is not None:
                found["gpu_memory_others"] = max(0.0, found["gpu_memory_used"] - own / GIB)
        reasons = _asked(lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
        found["throttled"] = throttle_reasons(reasons or 0)
        found["other_gpus"] = [_figures(other) for other in self._others]
        return found

    def close(self) -> None:
        """Let go of NVML."""
        if self._handle is not None:
            self._handle = None
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()


def _figures(handle: Any) -> dict[str, float]:
    """Memory in GiB, load, power in W, temperature and clocks in MHz of a GPU, by the names of a `system` event."""
    found: dict[str, float] = {}
    memory = _asked(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2))
    if memory is not None:
        found |= {"gpu_memory_used": memory.used / GIB, "gpu_memory_total": memory.total / GIB}
    figures: dict[str, Callable[[], float]] = {
        "gpu_utilisation": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        "power": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "power_limit": lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        "temperature": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "sm_clock": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "sm_clock_max": lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_clock": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
    }
    return found | {name: value for name, ask in figures.items() if (value := _asked(ask)) is not None}


def throttle_reasons(bits: int) -> list[str]:
    """NVML's bit field of reasons in words."""
    return [words for name, words in _THROTTLES.items() if bits & getattr(pynvml, name)]


def own_memory(processes: Iterable[tuple[int, int | None]], pid: int, reserved: int) -> int | None:
    """Bytes of the card that this process holds, out of (process id, bytes) of all that compute on it.

    In a container the driver's process ids are not ours. Ours is then the one that holds what torch reserved and a
    context's worth more. None when none fits.
    """
    known = [(number, used) for number, used in processes if used is not None]
    for number, used in known:
        if number == pid and used >= reserved:
            return used
    fitting = [used for _, used in known if reserved <= used <= reserved + _CONTEXT]
    return min(fitting, default=None)


def _handle_of(device: torch.device) -> Any:
    # torch numbers the visible cards, NVML all of them; a slice of a card (MIG) has an id of its own.
    uuid = torch.cuda.get_device_properties(device).uuid
    with contextlib.suppress(pynvml.NVMLError):
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    return pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


def _asked(question: Callable[[], Any]) -> Any:
    try:
        return question()
    except pynvml.NVMLError:
        return None
