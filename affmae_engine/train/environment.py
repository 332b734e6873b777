"""environment.json: with what a run was made, and the data that a resumed run must find again."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from affmae_engine import atomic
from affmae_engine.config import Task
from affmae_engine.data.store import Store
from affmae_engine.errors import ConfigError, CorruptError
from affmae_engine.run_dir import RunDir
from affmae_engine.runtime.device import DeviceChoice
from affmae_kernels.cases import OPERATIONS
from affmae_kernels.dispatch import choose_backend

ENVIRONMENT_SCHEMA = 1
_PACKAGES = ("affmae", "torch", "numpy", "zarr", "safetensors", "triton")


def kernel_backends(backend: str, device: torch.device) -> dict[str, str]:
    """The implementation of each operation that `kernels.backend` means here."""
    return {operation: choose_backend(backend, operation, device).name for operation in OPERATIONS}


def write_environment(
    run: RunDir, task: Task, choice: DeviceChoice, *, store: Store, command: Mapping[str, Any], backend: str
) -> None:
    """Write environment.json.

    Args:
        run: the run.
        task: what it does.
        choice: device and precision.
        store: what it is trained on.
        command: what the command was given and a resumed run may need again.
        backend: `kernels.backend`.
    """
    atomic.commit_json(
        run.environment,
        {
            "schema": ENVIRONMENT_SCHEMA,
            "task": task,
            "data": store_record(store),
            "command": dict(command),
            "device": choice.description,
            "precision": choice.precision,
            "backends": kernel_backends(backend, choice.device),
            "versions": {name: found for name in _PACKAGES if (found := _version(name))},
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "host": socket.gethostname(),
            "cpus": os.cpu_count(),
            "git": git_state(),
        },
    )


def store_record(store: Store) -> dict[str, Any]:
    """What identifies a dataset, and its images one by one so that a change can be named."""
    return {
        "path": str(store.path.absolute()),
        "fingerprint": store.fingerprint(),
        "images": {image.name: image.sha256[:16] for image in store.images},
    }


def recorded_task(run: RunDir) -> str:
    """The task of a run; "" when environment.json is missing."""
    return str(run.read_json(run.environment).get("task", ""))


def recorded_origin(run: RunDir) -> Path | None:
    """The weights that a run without a checkpoint starts from (`--init-from`), as it starts again from step 0.

    None for a run that started from random weights, and for one with a checkpoint, which replaces them.
    """
    command = run.read_json(run.environment).get("command")
    origin = command.get("init_from") if isinstance(command, dict) else None
    return Path(origin) if isinstance(origin, str) and not run.checkpoint_steps() else None


def recorded_data(run: RunDir) -> dict[str, Any]:
    """The "data" entry of environment.json.

    Raises:
        CorruptError: it is missing, so the run's data cannot be found again.
    """
    data = run.read_json(run.environment).get("data")
    if not isinstance(data, dict) or not isinstance(data.get("path"), str):
        raise CorruptError(f"{run.environment} does not say where the data is", "restore it from a copy")
    return data


def check_same_data(recorded: Mapping[str, Any], store: Store) -> None:
    """Compare the "data" entry of environment.json with a dataset.

    Raises:
        ConfigError: the data is not what the run was trained on; says which images came, went or changed.
    """
    if recorded.get("fingerprint") == store.fingerprint():
        return
    found = store_record(store)
    raise ConfigError(
        f"the data at {store.path} is not what this run was trained on: {_data_changes(recorded, found)}",
        "put the data back as it was, or begin a new run with --init-from",
    )


def _data_changes(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    before, now = recorded.get("images") or {}, found.get("images") or {}
    changes = {
        "added": sorted(now.keys() - before.keys()),
        "missing": sorted(before.keys() - now.keys()),
        "changed": sorted(name for name in before.keys() & now.keys() if before[name] != now[name]),
    }
    parts = [f"{len(names)} {word} ({_some(names)})" for word, names in changes.items() if names]
    return ", ".join(parts) or "its labels or pixel sizes differ"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def git_state() -> dict[str, Any] | None:
    """Commit and cleanliness of the checkout that this code runs from; None when it is not run from one."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "modified": bool(changed)} if commit else None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def command_line() -> list[str]:
    """The words that this process was started with."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
