"""What the card did while something was measured: clocks, temperature, power and throttling, by NVML.

Read twice a second in a thread, by the library that nvidia-smi uses. Without it (no NVIDIA card, no permission, no
package) the record says why and nothing fails: these are circumstances, not results.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

_BUSY_PERCENT = 50
"""Clocks count from samples in which the card was at work more than this."""
_REASONS = {
    0x4: "power limit",
    0x8: "hardware slowdown",
    0x20: "temperature (software)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}
"""NVML's bits for what holds clocks down; idling and settings of the owner are none."""


@dataclass(frozen=True)
class Sample:
    """One reading. Clock in MHz, temperature in degrees Celsius, power in watts, reasons as NVML's bits."""

    busy_percent: int
    clock_mhz: int
    temperature_c: int
    power_w: float
    reasons: int


class CardWatch:
    """A context that reads the card from beginning to end.

    Args:
        device: of torch; nothing is read for a CPU.
        interval: seconds between readings.
    """

    def __init__(self, device: torch.device, interval: float = 0.5) -> None:
        self._interval = interval
        self._samples: list[Sample] = []
        self._about: dict[str, Any] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml, self._card = pynvml, _card_of(pynvml, device)
            self._about = _describe(pynvml, self._card)
        except Exception as error:  # whatever a driver may do, these are only circumstances
            self._about = {"problem": f"{type(error).__name__}: {error}"}
            return
        self._thread = threading.Thread(target=self._read, name="card-watch", daemon=True)

    def __enter__(self) -> CardWatch:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(10)

    def record(self) -> dict[str, Any]:
        """What was seen so far, for JSON; empty without a card."""
        return {**self._about, **summarise(tuple(self._samples))}

    def _read(self) -> None:
        nvml, card = self._nvml, self._card
        reasons = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        while not self._stop.wait(self._interval):
            try:
                self._samples.append(
                    Sample(
                        nvml.nvmlDeviceGetUtilizationRates(card).gpu,
                        nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM),
                        nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU),
                        nvml.nvmlDeviceGetPowerUsage(card) / 1e3,
                        reasons(card) if reasons else nvml.nvmlDeviceGetCurrentClocksThrottleReasons(card),
                    )
                )
            except nvml.NVMLError as error:
                self._about["problem"] = str(error)
                return


def summarise(samples: Sequence[Sample]) -> dict[str, Any]:
    """Extremes and medians while the card was busy, and in which share of that time something held its clocks down."""
    busy = [sample for sample in samples if sample.busy_percent > _BUSY_PERCENT]
    if not busy:
        return {}
    clocks, powers = [sample.clock_mhz for sample in busy], [sample.power_w for sample in busy]
    held = {name: sum(bool(sample.reasons & bit) for sample in busy) / len(busy) for bit, name in _REASONS.items()}
    return {
        "samples": len(busy),
        "clock_mhz": {"least": min(clocks), "median": statistics.median(clocks), "most": max(clocks)},
        "temperature_c": max(sample.temperature_c for sample in busy),
        "power_w": {"median": statistics.median(powers), "most": max(powers)},
        "throttling": {name: round(share, 3) for name, share in held.items() if share},
    }


def _card_of(nvml: Any, device: torch.device) -> Any:
    """NVML's handle: by the card's own name, since the numbers of torch and NVML may differ."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if uuid is not None:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    return nvml.nvmlDeviceGetHandleByIndex(device.index or 0)


def _describe(nvml: Any, card: Any) -> dict[str, Any]:
    return {
        "driver": nvml.nvmlSystemGetDriverVersion(),
        "most_clock_mhz": nvml.nvmlDeviceGetMaxClockInfo(card, nvml.NVML_CLOCK_SM),
        "power_limit_w": nvml.nvmlDeviceGetEnforcedPowerLimit(card) / 1e3,
        "other_processes": max(0, len(nvml.nvmlDeviceGetComputeRunningProcesses(card)) - 1),
    }
