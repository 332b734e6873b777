"""Driving the dashboard without a terminal, and reading what it shows."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from textual.pilot import Pilot
from textual.widget import Widget

from affmae_cli.dashboard.app import DashboardApp, settled
from affmae_cli.dashboard.control import DashboardResult, TrainerProcess
from affmae_cli.dashboard.panes.runs import RunsPane
from affmae_cli.dashboard.run_screen import RunScreen
from affmae_engine import events

SIZES = ((80, 24), (120, 40), (200, 60))
Drive = Callable[["Driver"], Awaitable[None]]


class Driver:
    """One opened dashboard."""

    def __init__(self, app: DashboardApp, pilot: Pilot[DashboardResult]) -> None:
        self.app, self.pilot = app, pilot

    @property
    def screen(self) -> RunScreen:
        """The screen of the run, also when a dialog is above it."""
        return next(screen for screen in self.app.screen_stack if isinstance(screen, RunScreen))

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.pilot.pause()

    async def resize(self, size: tuple[int, int]) -> None:
        await self.pilot.resize_terminal(*size)
        await self.pilot.pause()

    async def until(self, condition: Callable[[], object], seconds: float = 20.0) -> None:
        """Wait for a condition; fails with what the screen shows."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "\n".join(self.lines())
            await self.pilot.pause(0.02)

    async def see(self, *texts: str) -> None:
        """Wait until all of these are on the screen."""
        await self.until(lambda: all(text in self.text() or text in self.unwrapped() for text in texts))

    async def switch(self, name: str) -> None:
        """Follow another run of the folder."""
        self.screen.post_message(RunsPane.Chosen(self.screen.root.parent / name))
        await self.see(name)
        await self.until(lambda: self.screen.model.root.name == name and not self.screen.model.opening)

    def unwrapped(self) -> str:
        """The text as if nothing had been broken into lines."""
        return " ".join(self.text().split())

    def text(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """The screen's rows as text."""
        return [strip.text for strip in self.app.screen._compositor.render_strips()]


def drive(
    root: Path,
    do: Drive,
    *,
    size: tuple[int, int] = (120, 40),
    tab: str = "overview",
    child: TrainerProcess | None = None,
    pixels: type[Widget] | None = None,
    notify: Sequence[str] = (),
) -> DashboardResult | None:
    """Open the dashboard on a run, wait until it is drawn, do something, and return what it returned."""
    app = DashboardApp(root, child=child, tab=tab, pixels=pixels, notify=notify)

    async def go() -> None:
        async with app.run_test(size=size, notifications=True) as pilot:
            await settled(pilot)
            await do(Driver(app, pilot))

    asyncio.run(go())
    return app.return_value


def started(*, step: int = 0, total: int = 100, resumed: bool = False, time: float | None = None) -> events.RunStarted:
    return events.RunStarted(
        task="pretrain", run="live", step=step, total_steps=total, resumed=resumed, device="NVIDIA H200, bf16",
        precision="bf16", parameters=12_300_000, batch_size=8, backends={"cluster_attention": "triton"},
        time=now(time),
    )  # fmt: skip


def stepped(step: int, *, time: float | None = None, loss: float | None = None, **more: float) -> events.StepLogged:
    values = {"lr": 1e-3, "grad_norm": 0.9, "images_per_s": 812.0, "data_wait": 0.01, "step_s": 0.125, "eta_s": 3725.0}
    value = 1 / step if loss is None else loss
    return events.StepLogged(
        step=step, losses={"loss": value, "last": value / 2}, memory_gib=20.0, memory_peak_gib=31.5, time=now(time),
        **{**values, **more},
    )  # fmt: skip


def sampled(**more: object) -> events.SystemSampled:
    values: dict[str, Any] = {"step": 1, "gpu": "NVIDIA H200", "sm_clock": 1830.0, "sm_clock_max": 1980.0}
    values |= {"gpu_memory_used": 24.0, "gpu_memory_total": 139.8, "gpu_memory_others": 3.5, "memory_clock": 3201.0}
    values |= {"gpu_utilisation": 0.97, "power": 612.0, "power_limit": 700.0, "temperature": 66.0, "cpu": 0.21}
    values |= {"host_memory_used": 210.0, "host_memory_total": 1000.0, "process_memory": 12.0}
    return events.SystemSampled(**{**values, **more})


def now(wanted: float | None) -> float:
    return time.time() if wanted is None else wanted
