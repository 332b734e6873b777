"""Every path inside a run directory, and the rules for making, finding and locking one.

The directory is the only thing that trainer, dashboard, resume and predict share. Its layout and file contents are
specified in `docs/formats.md`. Nothing else in the project joins a path to a run's name.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import shutil
import stat
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from affmae_engine import atomic
from affmae_engine.config import RunConfig, without_removed
from affmae_engine.errors import ConfigError, CorruptError, InputError
from affmae_engine.runtime.locks import FileLock, Holder, holder_of

_CHECKPOINT = re.compile(r"step-(\d{6,})")
STOP, CHECKPOINT = REQUESTS = ("stop", "checkpoint")
"""What can be asked of a trainer in control/: stop as after Ctrl-C; save a checkpoint now."""


@dataclass(frozen=True)
class RunDir:
    """Paths of one run. Constructing it touches nothing on disk."""

    root: Path

    @property
    def config(self) -> Path:
        """config.toml: the resolved configuration."""
        return self.root / "config.toml"

    @property
    def environment(self) -> Path:
        """environment.json: versions, device, backends, data fingerprint."""
        return self.root / "environment.json"

    @property
    def metrics(self) -> Path:
        """metrics.jsonl: one event a line."""
        return self.root / "metrics.jsonl"

    @property
    def log(self) -> Path:
        """log.txt: the plain log."""
        return self.root / "log.txt"

    @property
    def console(self) -> Path:
        """console.txt: what a trainer without a terminal would have written to one."""
        return self.root / "console.txt"

    @property
    def summary(self) -> Path:
        """summary.json: written at the end."""
        return self.root / "summary.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.root / "checkpoints"

    @property
    def previews(self) -> Path:
        """Folder of preview pictures."""
        return self.root / "previews"

    @property
    def control(self) -> Path:
        """Folder of requests to the trainer: empty files named as in `REQUESTS`."""
        return self.root / "control"

    @property
    def lock(self) -> Path:
        """run.lock: held by the trainer."""
        return self.root / "run.lock"

    @property
    def data(self) -> Path:
        """data.zarr: the labelled store that a finetune run makes from its images and labels."""
        return self.root / "data.zarr"

    @property
    def tensorboard(self) -> Path:
        """tensorboard: a copy of the events for TensorBoard, where it was asked for."""
        return self.root / "tensorboard"

    @property
    def best(self) -> Path:
        """best.json: which checkpoint scored best, {"step", "metric", "value"}."""
        return self.root / "best.json"

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint taken after `step` optimizer steps."""
        return self.checkpoints / f"step-{step:06d}"

    def preview(self, step: int, name: str = "") -> Path:
        """Preview picture of a step; `name` tells several apart."""
        return self.previews / f"step-{step:06d}{'-' + name if name else ''}.png"

    def checkpoint_steps(self) -> list[int]:
        """Steps that have a checkpoint folder under its final name, newest first (not yet verified)."""
        if not self.checkpoints.is_dir():
            return []
        found = (_CHECKPOINT.fullmatch(entry.name) for entry in self.checkpoints.iterdir() if entry.is_dir())
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def exists(self) -> bool:
        """Whether this is a run directory (it has a resolved config)."""
        return self.config.is_file()

    def refuse_to_replace(self, read: Iterable[Path]) -> None:
        """Raises ConfigError when one of the paths that are to be read lies in this run, links followed."""
        here = os.path.realpath(self.root)
        for path in read:
            if Path(os.path.realpath(path)).is_relative_to(here):
                raise ConfigError(f"{path} lies in the run that is to be replaced", "choose another -o/--out")

    def write_config(self, config: RunConfig, task: str) -> None:
        """Write the resolved config as TOML with the task it belongs to."""
        body = tomli_w.dumps(_without_none(config.model_dump(mode="json")))
        atomic.commit_text(self.config, f"# affmae {task}: the resolved configuration of this run\n{body}")

    def read_config(self) -> RunConfig:
        """The resolved config of the run.

        Raises:
            InputError: this is not a run directory.
            CorruptError: config.toml cannot be read or has fields of another version.
        """
        try:
            return RunConfig.model_validate(without_removed(tomllib.loads(self.config.read_text("utf-8"))))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise InputError(
                f"{self.root} is not a run directory: it has no config.toml", _nearest_runs(self.root)
            ) from error
        except OSError as error:
            raise InputError(f"cannot read {self.config}: {error.strerror}") from error
        except ValidationError as error:
            problem = error.errors()[0]
            where = "".join(f"{part}." for part in problem["loc"]).rstrip(".")
            text = f"{where}: {problem['msg']}" if where else problem["msg"]
            raise CorruptError(f"{self.config}: {text}", "was the run made by another version?") from error
        except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, or numbers and nesting beyond all bounds
            raise CorruptError(f"{self.config} is not valid TOML: {error}", "restore it from a copy") from error

    def read_json(self, path: Path) -> dict[str, Any]:
        """A JSON file of the run as a dict; empty when it is absent or unreadable."""
        try:
            value = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    def holder(self) -> Holder:
        """Whether a trainer works here, without disturbing it."""
        return holder_of(self.lock)

    def locked(self) -> FileLock:
        """The lock that the run's trainer holds, for a `with` block.

        Raises (on entering):
            BusyError: another process trains in this run directory.
            ResourceError: the folder cannot be written to, or its file system has no locks.
        """
        return FileLock(self.lock, f"{self.root} is in use", "wait for it, stop it, or choose another run directory")


def create(root: Path, *, overwrite: bool = False) -> RunDir:
    """Make a new run directory with its folders.

    Raises:
        ConfigError: it exists and is not empty, and `overwrite` was not given; or it holds something else than a run.
        ResourceError: it cannot be created or written to.
    """
    run = RunDir(root)
    if root.is_dir() and not _is_bare(root):
        if not run.exists():
            raise ConfigError(f"{root} exists and is not a run directory", "choose another -o/--out")
        if not overwrite:
            raise ConfigError(
                f"the run {root} exists already",
                f"continue it with --resume {root}, choose another -o/--out, or replace it with --overwrite",
            )
        with run.locked(), atomic.translated_write_errors(root):
            _remove_contents(root)
    atomic.ensure_folder(root)
    atomic.sweep(root)
    with atomic.translated_write_errors(root):
        for folder in (run.checkpoints, run.previews, run.control):
            folder.mkdir(exist_ok=True)
    return run


def open_run(root: Path) -> RunDir:
    """An existing run.

    Raises:
        InputError: no such folder, or not a run directory; the hint names near ones.
    """
    if not root.is_dir():
        raise InputError(f"no such run: {root}", _nearest_runs(root))
    run = RunDir(root if root.name not in ("", "..") else root.resolve())  # a run is known by its name
    if not run.exists():
        raise InputError(f"{root} is not a run directory: it has no config.toml", _nearest_runs(root))
    return run


def list_runs(folder: Path) -> list[RunDir]:
    """All runs directly under `folder` that can be read, newest last by their config's modification time.

    There are none in a folder that is missing or may not be listed. Runs may come and go meanwhile.
    """
    found = []
    with contextlib.suppress(OSError):
        for entry in folder.iterdir():
            run = RunDir(entry)
            with contextlib.suppress(OSError):
                status = run.config.stat()
                if stat.S_ISREG(status.st_mode):
                    found.append((status.st_mtime_ns, entry.name, run))
    return [run for _, _, run in sorted(found, key=lambda each: each[:2])]


def free_name(folder: Path, stem: str) -> Path:
    """`folder/stem`, or `folder/stem-2`, `-3`, ...: the first that does not exist."""
    candidate, number = folder / stem, 2
    while candidate.exists():
        candidate, number = folder / f"{stem}-{number}", number + 1
    return candidate


def _nearest_runs(root: Path) -> str:
    names = [run.root.name for run in list_runs(root.parent)]
    near = difflib.get_close_matches(root.name, names, n=3, cutoff=0.5) or names[-3:]
    return f"runs there: {', '.join(near)}" if near else "a run is made by `affmae pretrain` or `affmae finetune`"


def _is_bare(root: Path) -> bool:
    """Whether nothing is in it but what comes before the configuration: what a run that was killed then left behind."""
    run = RunDir(root)
    made = (run.checkpoints, run.previews, run.control)

    def early(entry: Path) -> bool:
        torn = entry.name.startswith(".") and entry.name.endswith(atomic.PARTIAL_SUFFIX)
        return torn or entry in (run.lock, run.environment) or (entry in made and _is_empty(entry))

    return all(early(entry) for entry in root.iterdir())


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _remove_contents(root: Path) -> None:
    # The configuration goes last: what is left of an interrupted removal is still known as a run.
    for entry in sorted(root.iterdir(), key=lambda entry: entry.name == "config.toml"):
        if entry.name == "run.lock":
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return value
