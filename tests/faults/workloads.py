"""The three long jobs of `affmae`, tiny and deterministic, each with a way to compare what it left.

A job is called again and again on the same folder until it returns: the first call begins it, a later one goes on. It
is run in a child (`children.py`); `result` is then compared byte by byte with that of a job that nobody disturbed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch

from affmae_engine import checkpoint, events
from affmae_engine.config import RunConfig
from affmae_engine.data import store_layout
from affmae_engine.data.ingest import ingest
from affmae_engine.data.phantom import generate
from affmae_engine.data.readers import open_sources
from affmae_engine.data.store import Store
from affmae_engine.model.affmae import Segmenter
from affmae_engine.predict.identity import is_finished
from affmae_engine.predict.job import PredictOptions
from affmae_engine.predict.outputs import Outputs
from affmae_engine.predict.predictor import Predictor
from affmae_engine.predict.run import predict
from affmae_engine.run_dir import RunDir, create
from affmae_engine.train.pretraining import PretrainTask
from affmae_engine.train.trainer import Trainer
from affmae_engine.weights import WeightsMetadata

SHARD_BYTES = 8192
"""Of stores that are ingested here: many small shards, so that a kill lands between them."""

CONFIG = RunConfig.model_validate(
    {
        "model": {"size": "tiny"},
        "data": {"crop_size": 32, "workers": 0, "holdout": 0.2},
        "mask": {"lattices": (2, 2)},
        "optim": {"lr": 2e-3, "warmup_steps": 2},
        "train": {"batch_size": 2, "steps": 6, "device": "cpu", "log_every": 1, "eval_every": 3, "checkpoint_every": 1,
                  "preview_every": 0},
        "kernels": {"backend": "reference"},
    }
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A job: `call` begins or continues it in a folder, `result` is everything that it must leave there."""

    name: str
    call: Callable[[Path], object]
    result: Callable[[Path], dict[str, bytes]]


class Workloads:
    """Makes the inputs of the jobs once, under `root`."""

    def __init__(self, root: Path) -> None:
        self.sources, self.weights, self.store = root / "in", root / "segmenter", root / "training.zarr"
        self.sources.mkdir(parents=True)
        specimen = generate((6, 96, 96), seed=3).image_ZYX
        tifffile.imwrite(self.sources / "stack.tif", specimen, compression="zlib")
        self.small = root / "small.tif"
        tifffile.imwrite(self.small, specimen[:4, :56, :56], photometric="minisblack")
        for number in range(3):
            tifffile.imwrite(self.sources / f"section{number}.tif", specimen[number, : 90 - number])
        ingest([self.sources / "stack.tif"], self.store, workers=1)
        _write_segmenter(self.weights)

    def jobs(self) -> tuple[Job, ...]:
        """Training, ingestion and prediction to both kinds of output."""
        return (
            Job("train", self.train, trained),
            Job("ingest", self.ingest, ingested),
            Job("predict", lambda folder: self.predict(folder / "labels.tif"), files),
            Job("predict-zarr", lambda folder: self.predict(folder / "labels.zarr"), files),
        )

    def train(self, folder: Path) -> None:
        """Pretrain the real (tiny) network, with a checkpoint after every step."""
        run = RunDir(folder / "run")
        begun = bool(run.checkpoint_steps())
        if not begun:
            create(run.root, overwrite=True).write_config(CONFIG, "pretrain")
        elif run.read_json(run.summary).get("status") == "finished":
            return
        Trainer(run, PretrainTask(CONFIG, Store.open(self.store)), resume=begun).fit()

    def ingest(self, folder: Path) -> None:
        """Take a stack and a few sections into a store of many shards."""
        store_layout._SHARD_BYTES = SHARD_BYTES
        ingest([self.sources], folder / "em.zarr", workers=2)

    def predict(self, labels: Path) -> None:
        """Segment a small stack, with probabilities beside an OME-Zarr."""
        labels.parent.mkdir(parents=True, exist_ok=True)
        targets = Outputs(labels, with_probabilities=labels.suffix == ".zarr")
        predictor = Predictor.from_weights(self.weights, device="cpu", backend="reference")
        options = PredictOptions(tile=32)
        with open_sources(self.small)[0] as source:
            if not is_finished(source, predictor, targets, options):
                predict(source, predictor, targets, options)


def files(folder: Path) -> dict[str, bytes]:
    """Every file under `folder`, hidden ones too: leftovers count as differences."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def trained(folder: Path) -> dict[str, bytes]:
    """The last checkpoint's weights and optimizer, hidden leftovers, and the figures of the log without times."""
    run = RunDir(folder / "run")
    last = run.checkpoint(CONFIG.train.steps)
    kept = {name: (last / name).read_bytes() for name in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER)}
    hidden = sorted(str(entry.relative_to(folder)) for entry in folder.rglob(".*"))
    figures: dict[tuple[str, int], Any] = {}
    for line in run.metrics.read_text("utf-8").splitlines():
        event = events.from_line(line)
        if isinstance(event, events.StepLogged):
            figures["step", event.step] = event.losses, event.lr, event.grad_norm
        elif isinstance(event, events.Evaluated):
            figures["evaluated", event.step] = event.metrics, event.best
    return {**kept, "hidden": repr(hidden).encode(), "figures": repr(sorted(figures.items())).encode()}


def ingested(folder: Path) -> dict[str, bytes]:
    """The store but for its lock and the times in its manifest."""
    found = files(folder)
    found.pop("em.zarr/affmae/lock", None)
    manifest = "em.zarr/affmae/manifest.json"
    found[manifest] = re.sub(rb'"(updated|time)": "[^"]*"', b"", found[manifest])
    return found


def _write_segmenter(root: Path) -> None:
    torch.manual_seed(0)
    run = create(root)
    run.write_config(CONFIG, "finetune")
    names = ("background", "membrane", "mitochondria")
    about = WeightsMetadata(
        task="finetune", step=1, model=CONFIG.model.model_dump(mode="json"), image_size=32, class_names=names,
        normalisation={"mode": "image", "mean": 0.0, "std": 1.0, "clahe": False}, pixel_nm=6.0,
        config=CONFIG.model_dump(mode="json"),
    )  # fmt: skip
    weights = Segmenter(CONFIG.model, len(names)).state_dict()
    # Random weights hardly tell pixels apart; larger ones give every class its share.
    weights = {name: tensor * 3 if name.startswith("heads") else tensor for name, tensor in weights.items()}
    checkpoint.save(run, weights=weights, optimizer={}, state={}, metadata=about)
    run.summary.write_text(json.dumps({"status": "finished"}))


def differences(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """Names that differ, for messages."""
    return sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))


def shares(labels: Path) -> np.ndarray:
    """How often each label occurs in an output: a prediction of one class would prove little."""
    with open_sources(labels, labels=True)[0] as source:
        return np.bincount(source.read(slice(None), slice(None), slice(None)).ravel(), minlength=3)
