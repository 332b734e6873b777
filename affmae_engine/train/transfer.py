"""Weights carried over from another run, with an account of every tensor: nothing is skipped in silence.

Encoder and decoder are taken by name (AFFMAE's mask token, which stood for hidden patches, becomes the query of every
patch; a ViT's has no use). The pixel heads of a pretraining run become class heads (method section 6). The heads of a
finetune run are taken when its classes are the same ones, and left out otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from affmae_engine.checkpoint import load_weights, weights_file
from affmae_engine.config import SIZE_FIELDS, ModelConfig, RunConfig
from affmae_engine.errors import ConfigError, CorruptError
from affmae_engine.model.affmae import class_head_from_pixel_head
from affmae_engine.weights import WeightsMetadata, read_metadata

Outcome = Literal["loaded", "adapted", "skipped", "missing"]

_BOUND = {
    "affmae": ("family", "size", *SIZE_FIELDS, "channels", "patch_size", "merging", "decoder_ffn_ratio"),
    "vit-mae": ("family", "size", "channels", "patch_size"),
}
"""Fields of the model section that decide names and shapes of tensors, by family: they must be those of the weights."""

_UNBOUND = ("cluster_size", "neighbours", "merge_keep")
"""Further fields that a run takes from the weights it starts from, unless the user set them."""


@dataclass(frozen=True)
class TensorRow:
    """What became of one tensor. A shape is None on the side where there is no such tensor."""

    name: str
    outcome: Outcome
    there: tuple[int, ...] | None
    here: tuple[int, ...] | None
    reason: str = ""


@dataclass(frozen=True)
class GroupRow:
    """Tensors of one part of the network that fared alike; `parameters` counts their numbers in the new model."""

    part: str
    outcome: Outcome
    tensors: int
    parameters: int
    reason: str


@dataclass(frozen=True)
class TransferReport:
    """Where weights came from, and what became of every tensor on either side.

    loaded: taken as they are. adapted: made from the other run's. skipped: there, but not used. missing: not there, so
    the new model keeps its random start.
    """

    source: Path
    task: str
    step: int
    rows: tuple[TensorRow, ...]

    def count(self, outcome: Outcome) -> int:
        """Number of tensors with that outcome."""
        return sum(row.outcome == outcome for row in self.rows)

    def groups(self) -> list[GroupRow]:
        """The rows by part of the network, outcome and reason, in the order of the network."""
        merged: dict[tuple[str, Outcome, str], tuple[int, int]] = {}
        for row in self.rows:
            key = (_part(row.name), row.outcome, row.reason)
            tensors, parameters = merged.get(key, (0, 0))
            numbers = torch.Size(row.here).numel() if row.here is not None else 0
            merged[key] = (tensors + 1, parameters + numbers)
        return [GroupRow(*key[:2], *counts, key[2]) for key, counts in merged.items()]


def read_origin(path: Path) -> WeightsMetadata:
    """Metadata of the weights in a run directory, checkpoint folder or file.

    Raises:
        InputError: nothing of that kind there.
        CorruptError: the weights are damaged.
    """
    return read_metadata(weights_file(path))


def follow_origin(
    config: RunConfig, origin: WeightsMetadata, path: Path, *, chosen: Collection[str] = ()
) -> tuple[RunConfig, str]:
    """The configuration with the model section of the run whose weights are taken.

    Args:
        config: as the user and the preset gave it.
        origin: metadata of the weights.
        path: where they are, for messages.
        chosen: dotted paths that the user set on purpose; they are kept, and must agree where shapes depend on them.

    Returns:
        the configuration, and a note on what changed; empty when nothing did.

    Raises:
        ConfigError: a chosen value that decides the shapes differs; lists all of them, or the family alone.
    """
    theirs = _model_of(origin, path)
    ours = config.model
    if ours.family != theirs.family and "model.family" in chosen:
        raise ConfigError(
            f"{path} holds a network of the family {theirs.family}; model.family = {ours.family} was asked for",
            f"start from a run of that family, or use --set model.family={theirs.family}",
        )
    bound = _BOUND[theirs.family]
    differing = [field for field in (*bound, *_UNBOUND) if getattr(ours, field) != getattr(theirs, field)]
    wrong = [field for field in differing if field in bound and f"model.{field}" in chosen]
    if wrong:
        pairs = [f"model.{f} = {getattr(ours, f)} was asked for, {path} has {getattr(theirs, f)}" for f in wrong]
        raise ConfigError("; ".join(pairs), "leave these settings out, or start from another run")
    taken = {field: getattr(theirs, field) for field in differing if f"model.{field}" not in chosen}
    if not taken:
        return config, ""
    model = ModelConfig.model_validate({**ours.model_dump(), **taken})
    changes = ", ".join(f"{field} {value}" for field, value in taken.items())
    return config.model_copy(update={"model": model}), f"model settings follow {path}: {changes}"


def load_pretrained(
    model: nn.Module, path: Path, *, config: RunConfig, class_names: Sequence[str] = (), seed: int = 0
) -> TransferReport:
    """Give a segmenter the weights of another run.

    Args:
        model: from `build_segmenter`, with its random start; changed in place.
        path: run directory (its best checkpoint is taken), checkpoint folder or weights file.
        config: of the new run; its model section must fit (see `follow_origin`).
        class_names: of the new run.
        seed: of the noise in adapted heads.

    Raises:
        ConfigError: the model sections do not fit; names both values.
        InputError, CorruptError: the weights cannot be read.
    """
    origin, there = load_weights(path)
    follow_origin(config, origin, path, chosen=[f"model.{field}" for field in ModelConfig.model_fields])
    here = model.state_dict()
    same_classes = origin.task == "finetune" and tuple(origin.class_names) == tuple(class_names)
    new: dict[str, Tensor] = {}
    rows = []
    if origin.task == "pretrain":
        adapted = _class_heads(there, len(class_names), config.model, seed)
        new |= adapted
        reason = "made from the pixel head"
        rows += [_row(name, "adapted", there, here, reason) for name in adapted]
    for name in here:
        if name in new:
            continue
        if name in there and _is_head(name) and not same_classes and origin.task == "finetune":
            rows.append(_row(name, "skipped", there, here, "trained for other classes"))
        elif name in there and there[name].shape == here[name].shape:
            new[name] = there[name]
            rows.append(_row(name, "loaded", there, here))
        elif name in there:
            rows.append(_row(name, "skipped", there, here, "other shape"))
        else:
            rows.append(_row(name, "missing", there, here, "not in the weights: random start"))
    rows += [_row(name, "skipped", there, here, "not part of this model") for name in there if name not in here]
    model.load_state_dict({**here, **new})
    order = {name: number for number, name in enumerate(dict.fromkeys([*here, *there]))}
    return TransferReport(path, origin.task, origin.step, tuple(sorted(rows, key=lambda row: order[row.name])))


def _class_heads(there: dict[str, Tensor], classes: int, config: ModelConfig, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads: dict[str, Tensor] = {}
    for name in sorted(there):
        bias = name.removesuffix("weight") + "bias"
        if name.startswith("heads.") and name.endswith(".linear.weight") and bias in there:
            heads[name], heads[bias] = class_head_from_pixel_head(
                there[name], there[bias], classes, config.channels, config.patch_size, generator
            )
    return heads


def _model_of(origin: WeightsMetadata, path: Path) -> ModelConfig:
    try:
        return ModelConfig.model_validate(origin.model)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise CorruptError(f"{path}: model.{where}: {problem['msg']}", "was it written by another version?") from error


def _row(name: str, outcome: Outcome, there: dict[str, Tensor], here: dict[str, Any], reason: str = "") -> TensorRow:
    shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (there, here)]
    return TensorRow(name, outcome, shapes[0], shapes[1], reason)


def _is_head(name: str) -> bool:
    return name.startswith("heads.")


def _part(name: str) -> str:
    """`encoder.stem`, `encoder.stages`, `decoder.mask_token`, `decoder.steps`, `heads`, or the first word."""
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first in ("encoder", "decoder") else first
