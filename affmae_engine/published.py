"""Checkpoints of the published AFFMAE implementation, converted to weights of this one.

Only names and layouts differ: queries and keys with values are two layers there (`q`, `kv`, the latter per head) and
one here (`qkv`), and a few vectors have another shape. Everything that shapes tell (sizes, merging, classes) is read
from the tensors; the rest (cluster size, neighbors, share of survivors) from the checkpoint's configuration, with the
published defaults where it has none. A name that is not part of the network is an error, so nothing is lost in silence.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from affmae_engine.config import DataConfig, LossConfig, MaskConfig, ModelConfig, PredictConfig, RunConfig, Task
from affmae_engine.data.normalise import Normalisation
from affmae_engine.errors import ConfigError, CorruptError, InputError, one_line
from affmae_engine.model.build import build_autoencoder, build_segmenter
from affmae_engine.model.decoder import SAMPLES
from affmae_engine.model.sizes import SIZES, size_of
from affmae_engine.weights import WeightsMetadata

STAGES = 4
IMAGE_SIZE = 512
"""Edge of a training image in pixels where the checkpoint does not say it (the paper's)."""
_DEFAULTS = {"cluster_size": 8, "encoder_nbhd_size": 64, "ds_rate": 0.4}
_UNUSED = re.compile(r"encoder\.layers\.\d+\.downsample\.global_(norm|linear)\.(weight|bias)")
"""Parameters of the published network that its output does not depend on."""
_RESHAPED = re.compile(r"\.(blank_key|blank_value|mark|mask_token|tau)$")
"""Vectors here that have another shape there: [C] for [heads, D], [1, 1, C] for [C], a number for [1]."""
_CONTAINERS = (
    "param.", "state_dict.", "model_state_dict.", "model_ema.", "model.", "module.", "_orig_mod."
)  # fmt: skip
"""What may stand before every name of a network, from the outside to the inside: tables of a checkpoint, then the
wrappers of data parallelism and compilation. Names without it are no parameters then."""


@dataclass(frozen=True)
class Published:
    """A published checkpoint as it is: tensors by name, its configuration, and names in the file that are no
    parameters (recorded figures)."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Converted:
    """The same network here.

    dropped: published parameters that have no effect. unused: settings that have none here.
    """

    task: Task
    classes: int
    config: RunConfig
    weights: dict[str, Tensor]
    dropped: tuple[str, ...]
    unused: tuple[str, ...]

    def metadata(
        self, normalisation: Normalisation, *, pixel_nm: float | None = None, class_names: tuple[str, ...] = ()
    ) -> WeightsMetadata:
        """The record of a weights file.

        Args:
            normalisation: of the images that the network was trained on.
            pixel_nm: edge of a training pixel in nanometers, where known.
            class_names: of a segmenter; by default class0, class1, ...

        Raises:
            ConfigError: class names for an autoencoder, another number of them than of classes, or one twice.
        """
        names = class_names or tuple(f"class{index}" for index in range(self.classes))
        if len(set(names)) != len(names) or "" in names:
            raise ConfigError(f"class names must differ and not be empty: {', '.join(names)}", "name every class once")
        if len(names) != self.classes:
            raise ConfigError(
                f"{len(names)} class names were given; the checkpoint has {self.classes} classes",
                "name every class, in the order of the label values" if self.classes else "leave the names out",
            )
        known = {"normalisation": normalisation.to_dict(), "pixel_nm": pixel_nm, "class_names": names}
        metadata = WeightsMetadata.of_run(self.task, self.config, **known)
        return metadata.model_copy(update={"config": self.config.model_dump(mode="json")})


def read_published(path: Path) -> Published:
    """The tensors and the configuration of a published checkpoint.

    Args:
        path: a `.safetensors` file, with the configuration as JSON under the metadata key "config" if it is there, or a
            `.pth`/`.pt`/`.ckpt` file, which is decoded in a child process (see `affmae_engine.pickled`).

    Raises:
        InputError: no such file, another kind of file, or no tensors in it; pickled objects other than tensors.
        CorruptError: the file is damaged.
    """
    if not path.is_file():
        raise InputError(f"no such checkpoint: {path}", "name a .safetensors or .pth file")
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
    elif path.suffix in (".pth", ".pt", ".ckpt"):
        from affmae_engine.pickled import read_in_child

        tensors, metadata = read_in_child(path)
    else:
        raise InputError(f"{path} is not a checkpoint that can be imported", "name a .safetensors or .pth file")
    config = _config(metadata.get("config", "{}"), path)
    # Files with recorded figures have the parameters under "param.", training checkpoints under "model." or the like.
    others: list[str] = []
    for container in _CONTAINERS:
        inside = {
            name.removeprefix(container): tensor for name, tensor in tensors.items() if name.startswith(container)
        }
        if inside:
            others += [name for name in tensors if not name.startswith(container)]
            tensors = inside
    if not tensors:
        raise InputError(f"{path} holds no tensors", "name a checkpoint of the published AFFMAE implementation")
    return Published(tensors, config, tuple(others))


def convert(published: Published) -> Converted:
    """The weights and the configuration of a published network for this implementation.

    Raises:
        InputError: a name is unknown or missing, a shape does not fit, or a setting is not supported; all such names
            are listed.
    """
    tensors, settings = published.tensors, published.config
    task, classes, model = _model(tensors, settings)
    with torch.device("meta"):
        network = (
            build_segmenter(model, classes, backend="reference")
            if task == "finetune"
            else build_autoencoder(model, LossConfig(), backend="reference")
        )
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    heads = size_of(model).heads
    weights: dict[str, Tensor] = {}
    taken: set[str] = set()
    missing: list[str] = []
    wrong: list[str] = []
    for name, theirs in _names(model, task, tensors):
        taken.update(theirs)
        absent = [each for each in theirs if each not in tensors]
        if absent:
            missing += absent
            continue
        stage = re.match(r"encoder\.stages\.(\d)", name)
        tensor = _joined([tensors[each] for each in theirs], heads[int(stage[1])] if stage else 1)
        if tensor is None or not tensor.is_floating_point() or not _fits(name, tensor.shape, shapes[name]):
            got = ", ".join(f"{each} {list(tensors[each].shape)}" for each in theirs)
            wrong.append(f"{got} (expected {list(shapes[name])} for {name})")
            continue
        weights[name] = tensor.reshape(shapes[name]).to(torch.float32).contiguous()
    dropped = tuple(sorted(name for name in tensors if _UNUSED.fullmatch(name)))
    _refuse("has unknown names", sorted(tensors.keys() - taken - set(dropped)))
    _refuse("lacks parameters", missing)
    _refuse("has parameters of another shape", wrong)
    unused = tuple(sorted(settings.keys() - _USED_SETTINGS))
    return Converted(task, classes, _run_config(model, settings), weights, dropped, unused)


_USED_SETTINGS = frozenset(
    {
        "patch_size", "img_size", "in_channels", "mask_ratio", "encoder_embed_dim", "encoder_depth",
        "encoder_num_heads", "encoder_nbhd_size", "ds_rate", "cluster_size", "mlp_ratio", "global_attention",
        "decoder_embed_dim", "decoder_num_heads", "num_classes", "merging",
    }
)  # fmt: skip


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from affmae_engine.weights import read_tensors

    tensors = read_tensors(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CorruptError(f"{path} is damaged: {one_line(error)}", "download it again") from error


def _config(text: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: its configuration is not valid JSON: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise CorruptError(f"{path}: its configuration is not a table of settings")
    return config


def _refuse(what: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:5]) + (f", and {len(names) - 5} more" if len(names) > 5 else "")
        raise InputError(
            f"the checkpoint {what}: {shown}", "only networks of the published AFFMAE implementation can be imported"
        )


def _joined(parts: list[Tensor], heads: int) -> Tensor | None:
    """One tensor of one or two published ones: queries [C, ...], and keys and values [2C, ...] with rows (head, key or
    value, channel), become rows (query, key or value; head; channel). None when they do not fit together."""
    if len(parts) == 1:
        return parts[0]
    query, pair = parts
    width = len(query)
    if len(pair) != 2 * width or pair.shape[1:] != query.shape[1:] or width % heads:
        return None
    key_value = pair.unflatten(0, (heads, 2, width // heads)).transpose(0, 1).flatten(0, 2)
    return torch.cat([query, key_value])


def _fits(name: str, there: torch.Size, here: torch.Size) -> bool:
    return there == here or (_RESHAPED.search(name) is not None and there.numel() == here.numel())


def _names(model: ModelConfig, task: Task, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every parameter of the network here, with the published ones that it is made of."""

    def layers(ours: str, *theirs: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        for kind in ("weight", "bias"):
            yield f"{ours}.{kind}", tuple(f"{each}.{kind}" for each in theirs)

    def present(*candidates: str) -> str:
        """The spelling that the checkpoint uses."""
        return next((each for each in candidates if f"{each}.weight" in tensors), candidates[0])

    size = size_of(model)
    convolutions = model.patch_size.bit_length() - 1
    for index in range(convolutions):
        yield from layers(f"encoder.stem.convs.{index}", f"encoder.patch_embed.projs.{index}")
        last = index == convolutions - 1
        norm = "encoder.patch_embed.norm" if last else f"encoder.patch_embed.lns.{index}.ln"
        yield from layers(f"encoder.stem.norms.{index}", norm)

    for stage, depth in enumerate(size.depths):
        there, here = f"encoder.layers.{stage}", f"encoder.stages.{stage}"
        for block in range(depth):
            block_there, block_here = f"{there}.blocks.{block}", f"{here}.blocks.{block}"
            attn, attention = f"{block_there}.attn", f"{block_here}.attention"
            yield from layers(f"{attention}.qkv", f"{attn}.q", f"{attn}.kv")
            yield from layers(f"{attention}.output", f"{attn}.proj")
            yield from layers(f"{attention}.position", f"{attn}.pos_embed")
            yield f"{attention}.blank_key", (f"{attn}.blank_k",)
            yield f"{attention}.blank_value", (f"{attn}.blank_v",)
            for ours, theirs in (("norm1",) * 2, ("norm2",) * 2, ("mlp.0", "mlp.fc1"), ("mlp.2", "mlp.fc2")):
                yield from layers(f"{block_here}.{ours}", f"{block_there}.{theirs}")
        yield from layers(f"{here}.norm", f"encoder.norms.{stage}")
        if stage == STAGES - 1:
            continue
        down, merge = f"{there}.downsample", f"{here}.merge"
        if model.merging == "cluster":
            yield from layers(f"{merge}.score", f"{there}.prob_net")
            yield from layers(f"{merge}.position", f"{down}.weight_net.0")
            yield from layers(f"{merge}.position_norm", f"{down}.weight_net.1")
            yield from layers(f"{merge}.norm", f"{down}.norm")
            yield from layers(f"{merge}.reduction", f"{down}.linear")
        else:
            yield f"{merge}.mark", (f"{down}.token_selection_embedding",)
            norm = present(f"{down}.downsample_norm", f"{there}.downsample_norm")
            yield from layers(f"{merge}.norm", norm)
            reduction = present(f"{down}.downsample_proj", f"{there}.downsample_proj")
            yield from layers(f"{merge}.reduction", reduction)

    yield "decoder.mask_token", ("masked_token",)
    for step in range(STAGES):
        projection, here = f"cross_attention_decoder.input_proj.{step}", f"decoder.steps.{step}"
        there = f"cross_attention_decoder.decoder_blocks.{step}.0"
        yield from layers(f"{here}.source", f"{projection}.0")
        yield from layers(f"{here}.source_norm", f"{projection}.1")
        for ours, theirs in (("self_attention", "self_attn"), ("cross_attention", "cross_attn")):
            yield from layers(f"{here}.{ours}.value", f"{there}.{theirs}.value_proj")
            yield from layers(f"{here}.{ours}.offset", f"{there}.{theirs}.sampling_offsets")
            yield from layers(f"{here}.{ours}.logit", f"{there}.{theirs}.attention_weights")
            yield from layers(f"{here}.{ours}.output", f"{there}.{theirs}.output_proj")
            yield f"{here}.{ours}.tau", (f"{there}.{theirs}.shepard_power",)
        for ours, theirs in (("ffn.0", "linear1"), ("ffn.2", "linear2"), *((f"norm{i}",) * 2 for i in (1, 2, 3))):
            yield from layers(f"{here}.{ours}", f"{there}.{theirs}")

    for head, theirs in _HEADS.items():
        pairs = [(f"{theirs}_norm", f"{theirs}_head"), (f"{theirs}.0", f"{theirs}.1")]
        norm, linear = next((pair for pair in pairs if f"{pair[1]}.weight" in tensors), pairs[task == "pretrain"])
        yield from layers(f"heads.{head}.norm", norm)
        yield from layers(f"heads.{head}.linear", linear)


_HEADS = {"last": "decoder_pred", "step2": "aux_head_res4", "step1": "aux_head_res5"}


def _model(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> tuple[Task, int, ModelConfig]:
    """What the network is: its task, the number of classes (0 for an autoencoder), and the model section."""
    if settings.get("global_attention"):
        raise InputError(
            "the checkpoint has global_attention: true, which is not supported", "import one trained without it"
        )

    def rows(name: str, axis: int = 0) -> int:
        if name not in tensors:
            _refuse("lacks parameters", [name])
        shape = tensors[name].shape
        if len(shape) <= axis or 0 in shape:
            _refuse("has parameters of another shape", [f"{name} {list(shape)}"])
        return shape[axis]

    def count(pattern: str) -> int:
        """How many numbers names have in this place; one beyond a gap is an unknown name later."""
        return len({match[1] for match in (re.match(pattern, name) for name in tensors) if match})

    # The encoder.
    stages = count(r"encoder\.layers\.(\d+)\.")
    if stages != STAGES:
        raise InputError(
            f"the checkpoint has {stages} encoder stages (encoder.layers.*); {STAGES} are supported",
            "only networks of the published AFFMAE implementation can be imported",
        )
    encoder = "encoder.layers"
    dims = tuple(rows(f"encoder.norms.{stage}.weight") for stage in range(STAGES))
    depths = tuple(count(rf"encoder\.layers\.{stage}\.blocks\.(\d+)\.") for stage in range(STAGES))
    heads = tuple(rows(f"{encoder}.{stage}.blocks.0.attn.pos_embed.bias") for stage in range(STAGES))
    hidden = [rows(f"{encoder}.{stage}.blocks.0.mlp.fc1.bias") for stage in range(STAGES)]
    mlp_ratio = _mlp_ratio(dims, hidden, _constant("mlp_ratio", settings.get("mlp_ratio")))
    merging = "l2norm" if any("token_selection_embedding" in name for name in tensors) else "cluster"
    channels = rows("encoder.patch_embed.projs.0.weight", 1)
    patch = 2 ** count(r"encoder\.patch_embed\.projs\.(\d+)\.")

    # The decoder: attention weights have a row per head and sampled point, offsets two.
    block = "cross_attention_decoder.decoder_blocks.0.0"
    decoder_dim = rows(f"{block}.norm1.weight")
    points = rows(f"{block}.cross_attn.attention_weights.bias")
    if points % SAMPLES or rows(f"{block}.cross_attn.sampling_offsets.bias") != 2 * points:
        raise InputError(
            f"the checkpoint's decoder does not sample {SAMPLES} points per head: {block}.cross_attn.attention_weights "
            f"has {points} rows"
        )
    decoder_heads = points // SAMPLES

    # The heads, which have other names in a segmenter.
    is_segmenter = any(name.startswith(("aux_head_res5_", "aux_head_res4_")) for name in tensors)
    last = "decoder_pred_head" if "decoder_pred_head.bias" in tensors else "decoder_pred.1"
    values = rows(f"{last}.bias")
    if values % patch**2:
        raise InputError(f"{last}.bias has {values} rows, which are no whole patches of {patch} x {patch} pixels")
    classes = values // patch**2 if is_segmenter else 0

    # What is stated must be what the tensors show.
    shown = {
        "encoder_embed_dim": list(dims), "encoder_depth": list(depths), "encoder_num_heads": list(heads),
        "patch_size": patch, "in_channels": channels, "mlp_ratio": mlp_ratio, "decoder_embed_dim": decoder_dim,
        "decoder_num_heads": decoder_heads,
    }  # fmt: skip
    for name, value in shown.items():
        stated = settings.get(name, value)
        if isinstance(stated, tuple):
            stated = list(stated)
        if isinstance(stated, list) and not isinstance(value, list):
            stated = _constant(name, stated)
        if stated != value:
            raise InputError(f"the checkpoint states {name} = {stated}, but its tensors have {value}")

    # The rest is in the settings alone.
    setting = {name: _constant(name, settings.get(name, default)) for name, default in _DEFAULTS.items()}
    size = {
        "dims": dims, "depths": depths, "heads": heads, "mlp_ratio": mlp_ratio, "decoder_dim": decoder_dim,
        "decoder_heads": decoder_heads,
    }  # fmt: skip
    named = next((name for name, known in SIZES.items() if vars(known) == size), None)
    fields = {
        "family": "affmae", **({"size": named} if named else size), "channels": channels, "patch_size": patch,
        "cluster_size": setting["cluster_size"], "neighbours": setting["encoder_nbhd_size"], "merging": merging,
        "merge_keep": setting["ds_rate"], "decoder_ffn_ratio": rows(f"{block}.linear1.bias") / decoder_dim,
    }  # fmt: skip
    try:
        return "finetune" if is_segmenter else "pretrain", classes, ModelConfig.model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        reason = problem["msg"].removeprefix("Value error, ")
        reason = f"{where}: {reason}" if where else reason
        raise InputError(f"the checkpoint's network cannot be built here: {reason}") from error


def _mlp_ratio(dims: tuple[int, ...], hidden: list[int], stated: Any) -> float:
    """The ratio that gives these hidden widths, floor(dim * ratio); the stated one where it does.

    Raises:
        InputError: no ratio gives all of them.
    """
    smallest = max(wide / dim for wide, dim in zip(hidden, dims, strict=True))
    for ratio in (stated, smallest, math.nextafter(smallest, math.inf)):
        if isinstance(ratio, int | float) and [int(dim * ratio) for dim in dims] == hidden:
            return ratio
    raise InputError(f"the checkpoint's MLPs have widths {hidden} at {list(dims)}; one ratio for all is supported")


def _constant(name: str, value: Any) -> Any:
    """The one value of a setting that may be listed per stage.

    Raises:
        InputError: it differs between the stages.
    """
    if not isinstance(value, list | tuple):
        return value
    if not value or any(each != value[0] for each in value):
        raise InputError(f"the checkpoint has {name} = {list(value)}; only one value for all stages is supported")
    return value[0]


def _run_config(model: ModelConfig, settings: Mapping[str, Any]) -> RunConfig:
    """Settings of a run with this network: its image size and mask ratio are known as well."""
    try:
        edge = settings.get("img_size", IMAGE_SIZE)
        edge = max(edge) if isinstance(edge, list | tuple) else edge
        ratio = settings.get("mask_ratio")  # segmenters have none, or 0
        mask = MaskConfig(ratio=ratio) if ratio else MaskConfig()
        return RunConfig(model=model, mask=mask, data=DataConfig(crop_size=edge), predict=PredictConfig())
    except (ValidationError, ValueError, TypeError) as error:
        raise InputError(f"the checkpoint's img_size or mask_ratio cannot be used: {one_line(error)}") from error
