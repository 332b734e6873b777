"""Finished runs of small networks with random weights, for tests that need a model but no training."""

import json
import math
from pathlib import Path

import torch

from affmae_engine import checkpoint, run_dir
from affmae_engine.config import RunConfig
from affmae_engine.events import Evaluated, RunStarted, StepLogged, to_line
from affmae_engine.model.affmae import MaskedAutoencoder, Segmenter
from affmae_engine.weights import WeightsMetadata

CONFIG = RunConfig.model_validate(
    {"model": {"size": "tiny"}, "data": {"crop_size": 64}, "finetune": {"val_images": ["secret-name"]}}
)
NAMES = ("background", "membrane", "mitochondria")


def trained_run(root: Path, task: str = "finetune", *, step: int = 3, pixel_nm: float | None = 4.0) -> Path:
    """A finished run with one checkpoint, its evaluation and its metrics."""
    torch.manual_seed(0)
    run = run_dir.create(root)
    run.write_config(CONFIG, task)
    segmenter = task == "finetune"
    model = Segmenter(CONFIG.model, len(NAMES)) if segmenter else MaskedAutoencoder(CONFIG.model, CONFIG.loss)
    about = WeightsMetadata.of_run(
        "finetune" if segmenter else "pretrain",
        CONFIG,
        step=step,
        normalisation={"mode": "image", "mean": 0.0, "std": 1.0, "clahe": False},
        pixel_nm=pixel_nm,
        class_names=NAMES if segmenter else (),
    ).model_copy(update={"config": CONFIG.model_dump(mode="json")})
    checkpoint.save(run, weights=model.state_dict(), optimizer={}, state={}, metadata=about)
    checkpoint.write_best(run, step, "iou", 0.5)
    logged = {"lr": 1e-3, "grad_norm": 1.0, "images_per_s": 2.0, "data_wait": 0.0, "step_s": 0.5}
    events = [
        RunStarted(
            task=task, run=root.name, step=0, total_steps=step, resumed=False, device="cpu", precision="fp32",
            parameters=1, batch_size=1,
        ),
        *(
            StepLogged(step=n, losses={"loss": 1 / n}, memory_gib=0.1, memory_peak_gib=0.1, eta_s=0.0, **logged)
            for n in (1, 2, 3)
        ),
        Evaluated(
            step=step, metrics={"iou": 0.5, "score": 0.5}, per_class={"membrane": {"iou": 0.4, "dice": math.nan}},
            best=True,
        ),
    ]  # fmt: skip
    run.metrics.write_text("".join(f"{to_line(event)}\n" for event in events))
    run.summary.write_text(json.dumps({"status": "finished", "step": step}))
    return root
