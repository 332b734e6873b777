"""Training from Python: `ingest`, `pretrain` and `finetune` run the command of that name and return what it made.

The command runs in a process of its own, as it does behind the dashboard: the notebook's memory, GPU and signal
handlers stay as they are, and results are those of the command line. An interrupt (Ctrl-C, the notebook's stop button)
is passed on, so the trainer saves a checkpoint before it ends. Whatever the command reports as an error is raised.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from affmae_engine import run_dir
from affmae_engine.errors import (
    AffmaeError,
    BusyError,
    ConfigError,
    CorruptError,
    DivergedError,
    InputError,
    Interrupted,
    ResourceError,
)

if TYPE_CHECKING:
    from affmae_engine.api import Model

PathLike = str | Path
Paths = PathLike | Iterable[PathLike]

_ERRORS = {
    error.exit_code: error for error in (ConfigError, InputError, ResourceError, BusyError, CorruptError, DivergedError)
}
_LABEL = re.compile(r"(error|stopped|hint): (.*)")
_LAST_LINES = 50
_OPENED = ("losses", "metrics")
"""Tables inside an event whose entries become columns of their own name."""


@dataclass(frozen=True)
class Run:
    """A run directory."""

    path: Path

    @property
    def summary(self) -> dict[str, Any]:
        """How the run ended (summary.json); empty while it is running."""
        run = run_dir.RunDir(self.path)
        return run.read_json(run.summary)

    def model(self, which: Literal["best", "last"] = "best") -> Model:
        """The trained model; see `affmae_engine.load`."""
        from affmae_engine.api import load

        return load(self.path, which=which)

    def metrics(self, kind: Literal["step", "evaluated"] = "step") -> list[dict[str, Any]]:
        """Figures of the run as flat records, in order of the steps: `pandas.DataFrame(run.metrics())`.

        Args:
            kind: "step" for what was logged in training (losses, lr, images_per_s, ...), "evaluated" for held-out
                figures; of classes as "NAME.iou" and "NAME.dice". See the table of events in docs/formats.md.

        Raises:
            InputError: the run has no metrics yet.
        """
        file = run_dir.RunDir(self.path).metrics
        records: dict[int, dict[str, Any]] = {}
        try:
            with file.open(encoding="utf-8") as lines:
                for line in lines:
                    event = _event(line)
                    if event.get("kind") == kind and isinstance(event.get("step"), int):
                        records[event["step"]] = _flat(event)  # after a resume the later line counts
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror or error}", "has the run begun?") from error
        return [records[step] for step in sorted(records)]


def open_run(path: PathLike) -> Run:
    """An existing run.

    Raises:
        InputError: there is none; the hint names near ones.
    """
    return Run(run_dir.open_run(Path(path)).root)


def ingest(sources: Paths, out: PathLike, *, pixel_size: Iterable[float] | None = None, quiet: bool = False) -> Path:
    """Collect images and stacks into a dataset, as `affmae ingest` does; returns its path.

    Args:
        sources: files, folders, patterns.
        out: the dataset; new images are added to one that exists.
        pixel_size: (z, y, x) in nanometers, in place of what the files say.
        quiet: show warnings only.

    Raises:
        AffmaeError: as the command; see its exit codes.
    """
    sizes = [",".join(f"{size:g}" for size in pixel_size)] if pixel_size is not None else []
    _run_command(["ingest", *_many(sources), *_option("out", [out]), *_option("pixel-size", sizes)], quiet=quiet)
    return Path(out)


def pretrain(
    data: PathLike = "data/em.zarr",
    *,
    out: PathLike | None = None,
    preset: str = "auto",
    settings: Mapping[str, Any] | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    seed: int | None = None,
    device: Literal["auto", "cpu", "cuda"] | None = None,
    init_from: PathLike | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Run:
    """Pretrain a masked autoencoder, as `affmae pretrain` does.

    Args:
        data: dataset made by `ingest`.
        out: the new run directory; by default runs/pretrain-NAME.
        preset: see `affmae presets`; `auto` picks by the GPU.
        settings: fields of the configuration by dotted name, such as {"optim.lr": 1e-4}.
        steps, epochs: length of the run; one of them.
        seed: of weights, samples, masks and augmentation.
        device: where to compute.
        init_from: run, weights or model package to start from.
        overwrite: replace a run that is there.
        quiet: show warnings only.

    Raises:
        ConfigError, InputError, ResourceError, BusyError, CorruptError, DivergedError: as the command.
        Interrupted: stopped after a checkpoint; continue with `resume`.
    """
    options = {
        "out": out, "preset": preset, "steps": steps, "epochs": epochs, "seed": seed, "device": device,
        "init-from": init_from,
    }  # fmt: skip
    return _trained(["pretrain", str(data), *_options(options), *_settings(settings)], overwrite, quiet)


def finetune(
    images: Paths,
    labels: Paths,
    *,
    val_images: Paths = (),
    val_labels: Paths = (),
    out: PathLike | None = None,
    preset: str = "auto",
    settings: Mapping[str, Any] | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    seed: int | None = None,
    device: Literal["auto", "cpu", "cuda"] | None = None,
    init_from: PathLike | None = None,
    pixel_size: Iterable[float] | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Run:
    """Train a segmenter from labeled images, as `affmae finetune` does.

    Args:
        images, labels: files, folders or patterns; paired by name or as stacks.
        val_images, val_labels: to validate on; by default a part is set aside.
        out: the new run directory; by default runs/finetune-NAME.
        pixel_size: (z, y, x) in nanometers, in place of what the files say.
        preset, settings, steps, epochs, seed, device, init_from, overwrite, quiet: as for `pretrain`.

    Raises:
        AffmaeError: as for `pretrain`.
    """
    options = {
        "out": out, "preset": preset, "steps": steps, "epochs": epochs, "seed": seed, "device": device,
        "init-from": init_from,
        "pixel-size": None if pixel_size is None else ",".join(f"{size:g}" for size in pixel_size),
    }  # fmt: skip
    places = {"images": images, "labels": labels, "val-images": val_images, "val-labels": val_labels}
    paths = [word for name, given in places.items() for word in _option(name, _many(given))]
    return _trained(["finetune", *paths, *_options(options), *_settings(settings)], overwrite, quiet)


def resume(path: PathLike, *, steps: int | None = None, quiet: bool = False) -> Run:
    """Continue a run from its last checkpoint with its saved settings.

    Args:
        path: the run directory.
        steps: a new length, longer than the old one.
        quiet: show warnings only.

    Raises:
        AffmaeError: as for `pretrain`.
    """
    from affmae_engine.train.environment import recorded_task

    run = run_dir.open_run(Path(path))
    return _trained([recorded_task(run), "--resume", str(path), *_options({"steps": steps})], False, quiet)


def _trained(words: list[str], overwrite: bool, quiet: bool) -> Run:
    result = _run_command([*words, *(["--overwrite"] if overwrite else [])], quiet=quiet)
    return Run(Path(json.loads(result)["run"]))


def _run_command(words: list[str], *, quiet: bool) -> str:
    """Run an affmae command to its end and return what it printed as its result; its messages appear on stderr."""
    command = [sys.executable, "-m", "affmae_cli", *words, "--json", *(["--quiet"] if quiet else [])]
    # A session of its own: an interrupt reaches the trainer once, from here.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        text=True, encoding="utf-8", errors="replace",
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    last: deque[str] = deque(maxlen=_LAST_LINES)
    echo = threading.Thread(target=_pass_on, args=(process.stderr, last), daemon=True)
    echo.start()
    try:
        printed = _read_interruptibly(process, process.stdout)
        status = process.wait()
    finally:
        if process.poll() is None:
            process.kill()
    echo.join()
    if status:
        raise _error(status, list(last))
    return printed


def _read_interruptibly(process: subprocess.Popen[str], stream: IO[str]) -> str:
    """All of stdout; the first interrupt is passed on, and the process ends by itself after a checkpoint."""
    try:
        return stream.read()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        return stream.read()


def _pass_on(stream: IO[str], last: deque[str]) -> None:
    for line in stream:
        last.append(line.rstrip("\n"))
        if not _LABEL.match(line):  # errors are raised
            print(line, end="", file=sys.stderr, flush=True)


def _error(status: int, lines: list[str]) -> AffmaeError:
    found: dict[str, str] = {}
    label = ""
    for line in lines:
        if match := _LABEL.match(line):
            label = match[1]
            found[label] = match[2]
        elif label and line.startswith("  "):  # a list goes on
            found[label] += f"\n{line}"
        else:
            label = ""
    hint = found.get("hint", "")
    if "stopped" in found:
        return Interrupted(found["stopped"], hint, signal_number=max(1, status - 128))
    message = found.get("error") or (lines[-1] if lines else f"the command ended with exit status {status}")
    error = _ERRORS.get(status, AffmaeError)(message, hint)
    error.exit_code = status
    return error


def _many(paths: Paths) -> list[str]:
    return [str(paths)] if isinstance(paths, str | Path) else [str(path) for path in paths]


def _option(name: str, values: Iterable[PathLike]) -> list[str]:
    return [word for value in values for word in (f"--{name}", str(value))]


def _options(options: Mapping[str, Any]) -> list[str]:
    return [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]


def _settings(settings: Mapping[str, Any] | None) -> list[str]:
    """--set options; values as TOML, which has JSON's notation for numbers, texts, booleans and lists."""
    try:
        written = {name: "none" if value is None else json.dumps(value) for name, value in (settings or {}).items()}
    except (TypeError, ValueError) as error:
        raise ConfigError(f"settings hold a value that is no number, text, list or bool: {error}") from error
    return _option("set", [f"{name}={value}" for name, value in written.items()])


def _event(line: str) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return {}  # a torn last line
    return event if isinstance(event, dict) else {}


def _flat(event: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for name, value in event.items():
        if name in _OPENED and isinstance(value, dict):
            record |= value
        elif name == "per_class" and isinstance(value, dict):
            record |= {f"{which}.{score}": number for which, own in value.items() for score, number in own.items()}
        elif name != "kind":
            record[name] = value
    return record
