"""The live view and the plain lines, on recording consoles."""

import io
import math

import pytest
from msgspec.structs import replace
from rich.console import Console

from affmae_cli.progress import Curve, LiveView, PlainLines, watching
from affmae_engine import events

STARTED = events.RunStarted(
    task="pretrain",
    run="pretrain-em",
    step=0,
    total_steps=2000,
    resumed=False,
    device="NVIDIA GeForce RTX 5090 (32 GiB), bf16, torch 2.13.0, CUDA 13.0",
    precision="bf16",
    parameters=22_800_000,
    batch_size=32,
)


def step(number: int, loss: float = 0.4312, **fields: float) -> events.StepLogged:
    values = {
        "lr": 3.5e-4,
        "grad_norm": 1.2,
        "images_per_s": 412.3,
        "data_wait": 0.03,
        "step_s": 0.0776,
        "memory_gib": 18.2,
        "memory_peak_gib": 21.4,
        "eta_s": 725.0,
        **fields,
    }
    return events.StepLogged(step=number, losses={"loss": loss, "last": 0.38, "step2": 0.5, "step1": 0.6}, **values)


def terminal(width: int = 80) -> Console:
    return Console(file=io.StringIO(), record=True, width=width, force_terminal=True)


def picture(view: LiveView, console: Console) -> list[str]:
    console.print(view.render())
    return [line.rstrip() for line in console.export_text(styles=False).splitlines()]


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=80)


def test_the_view_from_start_to_end_at_80_columns() -> None:
    console, now = terminal(), 0.0
    view = LiveView(console, clock=lambda: now)
    assert picture(view, console) == ["getting ready ..."]
    view(STARTED)
    lines = picture(view, console)
    assert lines[0].startswith("pretrain pretrain-em  22.8 M parameters  NVIDIA") and "0/2000" in lines[1]
    for number in range(10, 1210, 10):
        view(step(number, 0.4 + math.exp(-number / 300)))
    view(events.Evaluated(step=1200, metrics={"loss": 0.44}, best=True))
    view(events.CheckpointSaved(step=1200, path="checkpoints/step-001200", seconds=1.2))
    now = 60.0
    lines = picture(view, console)
    assert all(len(line) <= 80 for line in lines)
    text = "\n".join(lines)
    for part in (
        "1200/2000  60%  eta 11m",
        "last 0.3800",
        "step1 0.6000",
        "412 images/s",
        "waits for data 3%",
        "3.50e-04",
    ):
        assert part in text
    assert "█" in text and "▁" in text
    assert "held-out  loss 0.4400  best at 1200" in text and "saved checkpoints/step-001200 in 1.2s" in text
    view(events.RunEnded(step=2000, status="finished", seconds=1080))
    assert "2000/2000  100%  finished in 18m" in "\n".join(picture(view, console))


def test_the_smoothed_loss_is_shown_and_nan_does_not_stay() -> None:
    console = terminal()
    view = LiveView(console)
    view(STARTED)
    for loss in (1.0, math.nan, 0.0):
        view(step(10, loss))
    assert "losses    0.8000" in "\n".join(picture(view, console))


def test_warnings_are_shown_whole_and_markup_is_text() -> None:
    console = terminal(60)
    view = LiveView(console)
    view(replace(STARTED, run="[red]x[/red]\x1b[2J"))
    view(step(10))
    view(events.Warned(step=10, message="[bold]careful[/bold] " + "word " * 12 + "end"))
    text = "\n".join(picture(view, console))
    assert "[red]x[/red]" in text and "[bold]careful[/bold]" in text and "end" in text and "\x1b[2J" not in text


def test_a_signal_is_answered_at_once() -> None:
    console = terminal()
    view = LiveView(console)
    view(STARTED)
    view.on_signal(2)
    assert any(line.startswith("stopping after this step; Ctrl-C once more") for line in picture(view, console))


def test_ascii_consoles_get_ascii() -> None:
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), record=True, width=80, force_terminal=True)
    view = LiveView(console)
    view(STARTED)
    view(step(10)), view(step(20))
    assert "\n".join(picture(view, console)).isascii()


def test_plain_lines() -> None:
    console = plain_console()
    lines = PlainLines(console, interval=0.0)
    for event in (STARTED, step(120), events.Warned(step=120, message="[red]odd[/red]")):
        lines(event)
    lines(events.RunEnded(step=2000, status="finished", seconds=1080))
    printed = console.file.getvalue().splitlines()
    assert printed[0].startswith("pretrain pretrain-em started: 2000 steps of 32 images, 22.8 M parameters, NVIDIA")
    assert printed[1].startswith("step  120/2000  loss 0.4312  last 0.3800") and printed[1].endswith("eta 12m")
    assert printed[2] == "warning: [red]odd[/red]"
    assert printed[3] == "finished at step 2000 after 18m"
    assert "\x1b" not in console.file.getvalue()


def test_plain_steps_are_thinned_but_the_last_one_is_kept() -> None:
    console = plain_console()
    lines = PlainLines(console, interval=3600.0)
    for event in (STARTED, step(10), step(20), step(30), events.Evaluated(step=30, metrics={"loss": 0.4})):
        lines(event)
    printed = console.file.getvalue().splitlines()
    assert [line.split("/")[0].split()[-1] for line in printed[1:3]] == ["10", "30"]
    assert printed[3].startswith("held-out at step 30  loss 0.4000")


def test_quiet_prints_warnings_only() -> None:
    console = plain_console()
    lines = PlainLines(console, quiet=True)
    for event in (STARTED, step(10), events.Warned(step=1, message="careful")):
        lines(event)
    assert console.file.getvalue() == "warning: careful\n"


def test_the_view_fits_the_console() -> None:
    with watching(plain_console()) as view:
        assert isinstance(view, PlainLines)
    console = terminal()
    with watching(console) as view:
        assert isinstance(view, LiveView)
        view(STARTED)
    written = console.file.getvalue()
    assert "\x1b[?25l" in written and written.rstrip().endswith("\x1b[?25h")


def test_the_terminal_is_restored_when_the_run_fails() -> None:
    console = terminal()
    with pytest.raises(RuntimeError), watching(console):
        raise RuntimeError
    assert console.file.getvalue().rstrip().endswith("\x1b[?25h")


def test_the_curve_covers_the_whole_run_in_bounded_memory() -> None:
    curve = Curve(capacity=16)
    assert curve.draw(10) == ""
    for value in range(1000):
        curve.add(float(value))
    drawn = curve.draw(8)
    assert drawn == "▁▂▃▄▅▆▇█"
    assert len(curve._points) <= 16
    assert len(curve.draw(100)) <= 16
    flat = Curve()
    flat.add(1.0), flat.add(1.0)
    assert flat.draw(5) == "▁▁"
