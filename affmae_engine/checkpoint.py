"""Checkpoints: one folder each, complete under its final name or absent, and checked before it is believed.

    checkpoints/step-000500/  weights.safetensors  optimizer.safetensors  state.json  manifest.json

The manifest holds the size and SHA-256 of the other files and is written last; the folder is built aside and renamed
(`affmae_engine.atomic`). There is no "latest" pointer: the newest valid one is found by scanning, by step and never by
modification time. safetensors does not notice flipped bits, which is why every file is hashed before it is read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from affmae_engine import atomic, model_package
from affmae_engine.errors import CorruptError, InputError, ResourceError, human_bytes, one_line
from affmae_engine.run_dir import RunDir
from affmae_engine.weights import WeightsMetadata, read_metadata, read_tensors, write_tensors, write_weights

MANIFEST_SCHEMA = 1
_LARGEST_JSON = 16 << 20
WEIGHTS, OPTIMIZER, STATE, MANIFEST = "weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that passed `verify`."""

    path: Path
    step: int

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors, on the CPU."""
        return read_tensors(self.path / WEIGHTS)

    def optimizer(self) -> dict[str, Tensor]:
        """The optimizer's tensors by "parameter.kind", on the CPU."""
        return read_tensors(self.path / OPTIMIZER)

    def state(self) -> dict[str, Any]:
        """Everything else that a resumed run needs."""
        return _read_json(self.path / STATE)


def save(
    run: RunDir,
    *,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: dict[str, Any],
    metadata: WeightsMetadata,
) -> Path:
    """Write the checkpoint of `metadata.step`; returns its folder.

    Tensors are copied to the host one by one; nothing is copied on the device. A complete checkpoint of that step
    that is there already is kept as it is: it holds the same.

    Raises:
        ResourceError: disk full, read-only; nothing is left under the final name.
    """
    final = run.checkpoint(metadata.step)
    if final.exists():
        return final
    with atomic.committed_folder(final) as folder:
        write_weights(folder / WEIGHTS, weights, metadata)
        write_tensors(folder / OPTIMIZER, optimizer)
        (folder / STATE).write_text(json.dumps(state, allow_nan=False), "utf-8")
        files = {
            name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
            for name in (WEIGHTS, OPTIMIZER, STATE)
        }
        manifest = {"schema": MANIFEST_SCHEMA, "step": metadata.step, "files": files}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), "utf-8")
    return final


def verify(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CorruptError: a file is missing, of the wrong size, or its SHA-256 differs; the message names the file.
    """
    manifest = _read_json(folder / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or not {WEIGHTS, OPTIMIZER, STATE} <= files.keys():
        raise CorruptError(f"{folder / MANIFEST} does not list the checkpoint's files")
    for name in (WEIGHTS, OPTIMIZER, STATE):
        _verify_file(folder / name, files[name])


def newest_valid(run: RunDir, warn: Callable[[str], None]) -> Checkpoint | None:
    """The valid checkpoint with the highest step; None when the run has no checkpoint at all.

    Args:
        run: the run to scan.
        warn: told about every newer checkpoint that is skipped because it is damaged.

    Raises:
        CorruptError: there are checkpoints and none is valid.
    """
    reasons = []
    for step in run.checkpoint_steps():
        try:
            verify(run.checkpoint(step))
        except CorruptError as error:
            warn(f"checkpoint of step {step} is damaged and was skipped: {error.message}")
            reasons.append(error.message)
            continue
        return Checkpoint(run.checkpoint(step), step)
    if reasons:
        raise CorruptError(
            f"none of the {len(reasons)} checkpoints of {run.root} is intact: {reasons[0]}",
            "restore the folder from a copy, or start anew with another -o/--out",
        )
    return None


def check_space(run: RunDir, weights: dict[str, Tensor], keep: int) -> None:
    """Raises ResourceError when the disk cannot hold the checkpoints of a run.

    Args:
        run: the run.
        weights: the model's tensors; the optimizer keeps two moments of each.
        keep: newest checkpoints that stay, besides the best one and the one that is being written.
    """
    one = 3 * sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    needed = one * max(1, keep + 2 - len(run.checkpoint_steps()))
    free = shutil.disk_usage(run.root).free
    if free < needed:
        raise ResourceError(
            f"the checkpoints of this run need {human_bytes(needed)}, and {run.root} has {human_bytes(free)} left",
            "free some space, choose another -o/--out, or keep fewer with --set train.keep_checkpoints=1",
        )


def set_aside_newer(run: RunDir, step: int) -> list[Path]:
    """Rename checkpoints newer than `step` (damaged ones) out of the way, so that they no longer count."""
    moved = []
    for newer in run.checkpoint_steps():
        if newer > step:
            source = run.checkpoint(newer)
            target = source.with_name(f"{source.name}.damaged")
            with atomic.translated_write_errors(target):
                if target.exists():
                    shutil.rmtree(target)
                source.rename(target)
            moved.append(target)
    return moved


def prune(run: RunDir, keep: int, best_step: int | None, warn: Callable[[str], None]) -> None:
    """Delete all but the newest `keep` checkpoints and the best one. A failed deletion is a warning, not an error."""
    steps = run.checkpoint_steps()
    kept = set(steps[: max(keep, 1)]) | {best_step}
    for step in steps:
        if step in kept:
            continue
        folder = run.checkpoint(step)
        # The rename takes the folder off the list in one step; a kill in the middle of rmtree leaves only rubbish
        # that the next `sweep` removes.
        doomed = folder.with_name(f".{folder.name}{atomic.PARTIAL_SUFFIX}")
        try:
            folder.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            warn(f"cannot delete the old checkpoint {folder}: {error.strerror or error}")


def write_best(run: RunDir, step: int, metric: str, value: float) -> None:
    """Record which checkpoint scored best. Call it once that checkpoint is complete."""
    atomic.commit_json(run.best, {"step": step, "metric": metric, "value": value})


def best_step(run: RunDir) -> int | None:
    """Step of the best checkpoint according to best.json; None when there is none."""
    step = run.read_json(run.best).get("step")
    return step if isinstance(step, int) else None


def load_weights(path: Path, *, which: Literal["best", "last"] = "best") -> tuple[WeightsMetadata, dict[str, Tensor]]:
    """Weights to predict with or to start from, after checking their hashes where a manifest lies beside them.

    Args:
        path: a run directory, a checkpoint folder, a .safetensors file, or a model package (a folder, a ZIP file, or
            `hf:ORG/NAME`; see `model_package`).
        which: of a run directory, the checkpoint with the best held-out score, or the newest. A run that was never
            evaluated has no best one; its newest is taken.

    Returns:
        metadata and tensors by parameter name, on the CPU.

    Raises:
        InputError: nothing of that kind there, or a file that affmae did not write.
        CorruptError: the file, or the only checkpoint asked for, is damaged.
    """
    file = weights_file(path, which=which)
    return read_metadata(file), read_tensors(file)


def weights_file(path: Path, *, which: Literal["best", "last"] = "best") -> Path:
    """The verified weights file that `load_weights` reads; same arguments and errors."""
    packaged = model_package.located(path)
    if packaged is not None:
        return packaged
    if not path.exists():
        raise InputError(f"no such run, checkpoint or weights file: {path}")
    if path.is_file():
        _verify_beside_manifest(path)
        return path
    if (path / MANIFEST).exists() or (path / WEIGHTS).exists():
        verify(path)
        return path / WEIGHTS
    run = RunDir(path)
    if not run.exists() and not run.checkpoint_steps():
        raise InputError(
            f"{path} is neither a run directory nor a checkpoint", "name a folder made by pretrain or finetune"
        )
    best = best_step(run) if which == "best" else None
    if best is not None and run.checkpoint(best).is_dir():
        verify(run.checkpoint(best))
        return run.checkpoint(best) / WEIGHTS
    newest = newest_valid(run, _log.warning)
    if newest is None:
        raise InputError(f"{path} has no checkpoint yet", "train it first")
    return newest.path / WEIGHTS


def _verify_beside_manifest(file: Path) -> None:
    manifest = file.with_name(MANIFEST)
    if not manifest.is_file():
        return
    entry = _read_json(manifest).get("files", {}).get(file.name)
    if entry is not None:
        _verify_file(file, entry)


def _verify_file(file: Path, entry: Any) -> None:
    expected = entry if isinstance(entry, dict) else {}
    try:
        size = file.stat().st_size
        if size != expected.get("bytes"):
            raise CorruptError(f"{file} has {size} bytes instead of {expected.get('bytes')}", HINT)
        if _sha256(file) != expected.get("sha256"):
            raise CorruptError(f"{file} does not match its checksum", HINT)
    except OSError as error:
        raise CorruptError(f"{file} cannot be read: {error.strerror or error}", HINT) from error


HINT = "use another checkpoint of the run, or restore the file from a copy"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"it has more than {human_bytes(_LARGEST_JSON)}")
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptError(f"{path} cannot be read: {one_line(error)}", HINT) from error
    if not isinstance(value, dict):
        raise CorruptError(f"{path} does not hold an object", HINT)
    return value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
