"""Tensors out of PyTorch's pickled checkpoints (`.pth`), the only pickles that affmae reads.

    parent   read_in_child(path) starts `python -m affmae_engine.pickled PATH FOLDER`
    child    limits its own memory and time, loads with `weights_only=True`, writes FOLDER/tensors.safetensors

`weights_only=True` builds tensors and plain containers and calls nothing else. The limits are for files that are small
and ask for much, and for holes in that loader: a child that dies or exceeds them costs an error message.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from affmae_engine.errors import InputError, one_line

TIMEOUT_S = 600
CPU_S = 300
MARGIN_BYTES = 1 << 30
"""Memory that decoding may take besides three times the file's size."""
TENSORS = "tensors.safetensors"
_REFUSED = 3
_SECTIONS = ("config", "cfg", "args", "hparams", "hyper_parameters")
"""Where checkpoints keep the configuration that they were trained with."""


def read_in_child(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """All tensors of a pickled checkpoint, under dotted names.

    Returns:
        tensors on the CPU by name, nested tables joined with dots ("model.encoder...."), and the configuration
        under "config" as JSON, where there is one.

    Raises:
        InputError: the file is damaged, holds other objects than tensors and plain values, or exceeds the limits.
    """
    from affmae_engine.weights import read_tensors

    with tempfile.TemporaryDirectory(prefix="affmae-") as folder:
        command = [sys.executable, "-m", "affmae_engine.pickled", str(path.resolve()), folder]
        try:
            ended = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired as error:
            raise InputError(f"{path} took more than {TIMEOUT_S} s to decode", "download it again") from error
        if ended.returncode == _REFUSED:
            raise InputError(f"{path} was not loaded: {ended.stdout.strip()}", "use a checkpoint of weights alone")
        if ended.returncode:
            raise InputError(
                f"{path} was not loaded: decoding it exceeded the limits of memory or time, or failed "
                f"(exit status {ended.returncode})",
                "download it again, or use a .safetensors file",
            )
        config = json.loads(ended.stdout)["config"]
        return read_tensors(Path(folder) / TENSORS), {"config": json.dumps(config)}


def _limit_resources(file_bytes: int) -> None:
    """Caps CPU time, the size of written files, and memory beyond what the interpreter with torch has now."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # elsewhere than on Linux, the timeout alone
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * file_bytes + MARGIN_BYTES,) * 2)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + 3 * file_bytes + MARGIN_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _tensors(value: object, name: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors in nested tables, by dotted name."""
    import torch

    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}" if name else str(key))


def _plain(value: object) -> Any:
    """The part of a configuration that JSON can say."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str) else None


def _main(path: Path, folder: Path) -> int:
    import torch
    from safetensors.torch import save_file

    _limit_resources(path.stat().st_size)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError
    ) as error:  # fmt: skip
        lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line]
        if lines:
            print(f"it holds more than tensors and plain values: {one_line(ValueError(lines[0]))}")
        else:
            first = one_line(error).partition(". ")[0]
            print(f"it is damaged or no PyTorch checkpoint ({type(error).__name__}: {first})")
        return _REFUSED
    table = content if isinstance(content, Mapping) else {}
    # Optimizers keep their tensors under numbers; nothing of theirs is a parameter of the network.
    tensors = {name: t.contiguous().clone() for name, t in _tensors(table) if not name.startswith("optimizer")}
    config: Any = next((_plain(table[name]) for name in _SECTIONS if name in table), {})
    save_file(tensors, folder / TENSORS)
    print(json.dumps({"config": config if isinstance(config, dict) else {}}))
    return 0


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), Path(sys.argv[2])))
