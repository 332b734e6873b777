"""Everything that changes while a run goes on, and its way into a checkpoint and back.

Randomness of a step is seeded from (seed, step), so a resumed run does not depend on the generators' history; their
states are kept all the same, for code of a task that draws from them outside a step.
"""

from __future__ import annotations

import base64
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from affmae_engine import checkpoint
from affmae_engine.config import RunConfig
from affmae_engine.errors import CorruptError, DivergedError
from affmae_engine.run_dir import RunDir
from affmae_engine.train.health import Health
from affmae_engine.train.metrics import Window
from affmae_engine.train.optim import load_optimizer_tensors, optimizer_tensors
from affmae_engine.train.schedule import learning_rate, warmup_length
from affmae_engine.train.task import Task
from affmae_engine.weights import WeightsMetadata

STATE_SCHEMA = 1


@dataclass
class TrainState:
    """What a checkpoint holds. `step` counts finished optimizer steps; `best` is (step, score); `metrics` the last
    evaluation's; `micro_batch` the size in use, 0 before it is chosen."""

    model: nn.Module
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    window: Window
    step: int = 0
    best: tuple[int, float] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    micro_batch: int = 0
    health: Health = field(default_factory=Health)


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint's content in host memory, independent of the training that goes on. `best` is its score if it is the
    best so far."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    metadata: WeightsMetadata
    best: float | None

    def write(self, run: RunDir) -> Path:
        """Write it, and note in best.json if it is the best; returns its folder.

        Raises:
            ResourceError: the write failed; nothing is left of the checkpoint.
        """
        folder = checkpoint.save(
            run, weights=self.weights, optimizer=self.optimizer, state=self.state, metadata=self.metadata
        )
        if self.best is not None:
            checkpoint.write_best(run, self.metadata.step, "score", self.best)
        return folder


def take_snapshot(state: TrainState, config: RunConfig, task: Task) -> Snapshot:
    """Copy everything that a checkpoint of `state.step` holds to the host.

    Raises:
        DivergedError: a weight is not finite.
    """
    weights = dict(state.model.state_dict())
    if not _all_finite(weights):
        raise DivergedError(
            f"the weights are not finite at step {state.step}; no checkpoint was written",
            "resume from the last one with a lower optim.lr",
        )
    return Snapshot(
        weights=_copied(weights),
        optimizer=_copied(optimizer_tensors(state.optimizer, state.model)),
        state=_to_json(state, config, task),
        metadata=task.metadata.model_copy(update={"step": state.step, "config": config.model_dump(mode="json")}),
        best=state.best[1] if state.best is not None and state.best[0] == state.step else None,
    )


def restore_state(saved: checkpoint.Checkpoint, state: TrainState, task: Task, config: RunConfig) -> None:
    """Put a checkpoint's content into `state`, whose model is on its device already.

    The micro-batch in use (measured, or halved when memory ran out) is kept unless the configuration asks for another.

    Raises:
        CorruptError: the checkpoint does not fit this model, or lacks a part.
    """
    try:
        state.model.load_state_dict(saved.weights(), strict=True)
    except RuntimeError as error:
        raise CorruptError(f"{saved.path} does not fit the model: {error}", "was the model changed?") from error
    load_optimizer_tensors(state.optimizer, state.model, saved.optimizer())
    record = saved.state()
    try:
        state.step = int(record["step"])
        if record["scaler"]:  # empty when the run was not in fp16 so far
            state.scaler.load_state_dict(record["scaler"])
        state.window.load_json(record["window"])
        state.best = None if record["best"] is None else (int(record["best"][0]), float(record["best"][1]))
        state.metrics = {name: float(value) for name, value in record["metrics"].items()}
        micro = record.get("micro_batch", {})  # absent in early checkpoints, as is "health"
        state.health.load_json(record.get("health", {"losses": [], "windows": []}))
        state.micro_batch = int(micro["used"]) if micro.get("asked") == config.train.micro_batch else 0
        _set_generators(record["generators"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CorruptError(f"{saved.path / checkpoint.STATE} lacks or garbles {error}", checkpoint.HINT) from error


def _to_json(state: TrainState, config: RunConfig, task: Task) -> dict[str, Any]:
    optim, total = config.optim, config.train.steps
    return {
        "schema": STATE_SCHEMA,
        "step": state.step,
        "samples": state.step * config.train.batch_size,
        "fingerprint": task.fingerprint,
        "schedule": {
            "total_steps": total,
            "warmup_steps": warmup_length(optim.warmup_steps, total),
            "next_lr": learning_rate(
                state.step,
                total_steps=total,
                warmup_steps=optim.warmup_steps,
                peak=optim.lr,
                minimum=optim.min_lr,
            ),
        },
        "scaler": state.scaler.state_dict(),
        "window": state.window.to_json(),
        "health": state.health.to_json(),
        "best": state.best,
        "micro_batch": {"asked": config.train.micro_batch, "used": state.micro_batch},
        "metrics": {name: value for name, value in state.metrics.items() if np.isfinite(value)},
        "generators": _generators(),
    }


def _generators() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 (the global generator is meant)
    return {
        "torch": _encode(torch.get_rng_state()),
        "cuda": [_encode(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_initialized() else [],
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
    }


def _set_generators(value: dict[str, Any]) -> None:
    torch.set_rng_state(_decode(value["torch"]))
    if torch.cuda.is_initialized() and torch.cuda.device_count() == len(value["cuda"]):
        torch.cuda.set_rng_state_all([_decode(text) for text in value["cuda"]])
    version, words, gauss = value["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = value["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _all_finite(tensors: dict[str, Tensor]) -> bool:
    """One synchronisation for all tensors."""
    flags = [torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point()]
    return bool(torch.stack(flags).all()) if flags else True
