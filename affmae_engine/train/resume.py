"""What may differ between a run and its continuation, and how a refused difference is told.

Every field of the configuration stands in exactly one of three sets; a test fails on a new field that does not.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from affmae_engine.config import RunConfig
from affmae_engine.errors import ConfigError
from affmae_engine.run_dir import RunDir

KEPT = frozenset(
    {
        "model.family",
        "model.size",
        "model.dims",
        "model.depths",
        "model.heads",
        "model.mlp_ratio",
        "model.decoder_dim",
        "model.decoder_heads",
        "model.channels",
        "model.patch_size",
        "model.cluster_size",
        "model.neighbours",
        "model.merging",
        "model.merge_keep",
        "model.drop_path",
        "model.decoder_dropout",
        "model.decoder_ffn_ratio",
        "data.crop_size",
        "data.crop_scale",
        "data.flips",
        "data.clahe",
        "data.normalisation",
        "data.holdout",
        "mask.kind",
        "mask.ratio",
        "mask.lattices",
        "loss.step2",
        "loss.step1",
        "optim.lr",
        "optim.min_lr",
        "optim.betas",
        "optim.weight_decay",
        "optim.warmup_steps",
        "optim.clip_norm",
        "optim.layer_decay",
        "train.batch_size",
        "train.precision",
        "train.seed",
        "finetune.class_names",
        "finetune.ignore_label",
        "finetune.class_weights",
        "finetune.val_fraction",
        "finetune.val_images",
        "finetune.focal_gamma",
        "finetune.focal_weight",
        "finetune.dice_weight",
        "finetune.elastic",
        "finetune.rotation",
        "finetune.scale",
        "finetune.photometric",
        "predict.tile",
        "predict.overlap",
    }
)
"""Fields that decide what is learned or how it is scored: a continuation with others is refused."""

ROUNDING = frozenset({"train.micro_batch", "train.device", "kernels.backend", "kernels.cuda_graph"})
"""Fields that change the result by rounding, and by what dropout and drop path draw: each forward pass is seeded, and
they change how many images it sees or which code draws. They may change, which is recorded as a warning."""

FREE = frozenset(
    {
        "train.steps",
        "train.epochs",
        "train.log_every",
        "train.eval_every",
        "train.preview_every",
        "train.checkpoint_every",
        "train.checkpoint_minutes",
        "train.keep_checkpoints",
        "train.max_nonfinite",
        "train.max_nonfinite_share",
        "train.spike_factor",
        "data.workers",
        "predict.batch_size",
    }
)
"""Fields that change neither the samples of a step nor what is done with them. More steps are allowed too: the run goes
on along the longer cosine (`schedule.learning_rate`); fewer are not (`check_length`)."""


def check_continuation(run: RunDir, asked: RunConfig) -> None:
    """Compare the settings for a continuation with the run's own.

    Raises:
        ConfigError: a setting differs that must not; lists all of them with both values.
    """
    changed = _changes(run.read_config(), asked, KEPT)
    if not changed:
        return
    lines = "\n  ".join(
        f"{path}: {'not set' if before is None else before} in the run, {'not set' if now is None else now} now"
        for path, (before, now) in changed.items()
    )
    raise ConfigError(
        f"a resumed run keeps its settings; these differ:\n  {lines}",
        "leave them out (and AFFMAE_ variables unset), or begin a new run from these weights with --init-from "
        f"{run.root}",
    )


def rounding_notes(before: RunConfig, now: RunConfig) -> list[str]:
    """What a continuation changes that shows in the last digits, or in what dropout draws; one sentence each."""
    draws = now.model.drop_path > 0 or now.model.decoder_dropout > 0
    kept = "up to rounding and the draws of dropout" if draws else "up to rounding"
    return [
        f"{path} is {new} from here on, was {old}: the result stays the same {kept}"
        for path, (old, new) in _changes(before, now, ROUNDING).items()
    ]


def check_length(run: RunDir, steps: int) -> None:
    """Raises ConfigError when a run of `steps` steps would not go beyond what the run has done already."""
    planned = run.read_config().train.steps
    finished = run.read_json(run.summary).get("status") == "finished"
    done = finished and next(iter(run.checkpoint_steps()), 0) >= planned  # its last checkpoint may be lost
    if steps < planned:
        raise ConfigError(f"{run.root} is a run of {planned} steps; a continuation cannot make it shorter ({steps})")
    if done and steps == planned:
        raise ConfigError(f"{run.root} is finished ({planned} steps)", "train it longer with --steps")


def _changes(before: RunConfig, now: RunConfig, fields: Collection[str]) -> dict[str, tuple[Any, Any]]:
    """Old and new value of each of the fields that differ."""
    old, new = _flat(before), _flat(now)
    return {path: (old[path], new[path]) for path in new if path in fields and old[path] != new[path]}


def _flat(config: RunConfig) -> dict[str, Any]:
    sections = config.model_dump(mode="json")
    return {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}
