"""Checkpoints with the names and layouts of the published implementation, made from networks of ours.

The inverse of what `affmae_engine.published` does, written down a second time and independently: by renaming.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

RENAMED = [
    (r"^encoder\.stem\.convs\.", "encoder.patch_embed.projs."),
    (r"^encoder\.stages\.(\d)\.norm\.", r"encoder.norms.\1."),
    (r"^encoder\.stages\.(\d)\.merge\.score\.", r"encoder.layers.\1.prob_net."),
    (r"^encoder\.stages\.", "encoder.layers."),
    (r"\.attention\.position\.", ".attn.pos_embed."),
    (r"\.attention\.output\.", ".attn.proj."),
    (r"\.attention\.blank_key", ".attn.blank_k"),
    (r"\.attention\.blank_value", ".attn.blank_v"),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.2\.", ".mlp.fc2."),
    (r"^decoder\.mask_token", "masked_token"),
    (r"^decoder\.steps\.(\d)\.source\.", r"cross_attention_decoder.input_proj.\1.0."),
    (r"^decoder\.steps\.(\d)\.source_norm\.", r"cross_attention_decoder.input_proj.\1.1."),
    (r"^decoder\.steps\.(\d)\.", r"cross_attention_decoder.decoder_blocks.\1.0."),
    (r"\.self_attention\.", ".self_attn."),
    (r"\.cross_attention\.", ".cross_attn."),
    (r"_attn\.value\.", "_attn.value_proj."),
    (r"_attn\.offset\.", "_attn.sampling_offsets."),
    (r"_attn\.logit\.", "_attn.attention_weights."),
    (r"_attn\.output\.", "_attn.output_proj."),
    (r"_attn\.tau", "_attn.shepard_power"),
    (r"\.ffn\.0\.", ".linear1."),
    (r"\.ffn\.2\.", ".linear2."),
]
CLUSTER = [
    (r"\.merge\.position\.", ".downsample.weight_net.0."),
    (r"\.merge\.position_norm\.", ".downsample.weight_net.1."),
    (r"\.merge\.norm\.", ".downsample.norm."),
    (r"\.merge\.reduction\.", ".downsample.linear."),
]
L2NORM = [
    (r"\.merge\.mark", ".downsample.token_selection_embedding"),
    (r"\.merge\.norm\.", ".downsample.downsample_norm."),
    (r"\.merge\.reduction\.", ".downsample.downsample_proj."),
]
AUTOENCODER_HEADS = [
    (r"^heads\.step1\.norm\.", "aux_head_res5.0."),
    (r"^heads\.step1\.linear\.", "aux_head_res5.1."),
    (r"^heads\.step2\.norm\.", "aux_head_res4.0."),
    (r"^heads\.step2\.linear\.", "aux_head_res4.1."),
    (r"^heads\.last\.norm\.", "decoder_pred_norm."),
    (r"^heads\.last\.linear\.", "decoder_pred_head."),
]
SEGMENTER_HEADS = [
    (r"^heads\.step1\.norm\.", "aux_head_res5_norm."),
    (r"^heads\.step1\.linear\.", "aux_head_res5_head."),
    (r"^heads\.step2\.norm\.", "aux_head_res4_norm."),
    (r"^heads\.step2\.linear\.", "aux_head_res4_head."),
    (r"^heads\.last\.norm\.", "decoder_pred_norm."),
    (r"^heads\.last\.linear\.", "decoder_pred_head."),
]


def published_tensors(
    ours: Mapping[str, Tensor], heads: tuple[int, ...], *, convolutions: int, merging: str, segmenter: bool
) -> dict[str, Tensor]:
    """The state dict of a network of ours under published names, with an unused global layer as published ones have."""
    rules = [*RENAMED, *(CLUSTER if merging == "cluster" else L2NORM)]
    rules += SEGMENTER_HEADS if segmenter else AUTOENCODER_HEADS
    result: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        stem_norm = re.fullmatch(r"encoder\.stem\.norms\.(\d+)\.(weight|bias)", name)
        if stem_norm:
            last = int(stem_norm[1]) == convolutions - 1
            result[f"encoder.patch_embed.{'norm' if last else f'lns.{stem_norm[1]}.ln'}.{stem_norm[2]}"] = tensor
            continue
        theirs = name
        for pattern, replacement in rules:
            theirs = re.sub(pattern, replacement, theirs)
        if ".attention.qkv." in theirs:
            stage = int(name.split(".")[2])
            query, key, value = tensor.chunk(3)
            kind = theirs.rpartition(".")[2]
            start = theirs.split(".attention.")[0]
            result[f"{start}.attn.q.{kind}"] = query.clone()
            # Keys and values of head 0, then of head 1, ...
            parts = [half.chunk(heads[stage]) for half in (key, value)]
            result[f"{start}.attn.kv.{kind}"] = torch.cat([part for pair in zip(*parts, strict=True) for part in pair])
            continue
        if theirs.endswith(("blank_k", "blank_v")):
            tensor = tensor.flatten()
        if theirs.endswith(("masked_token", "token_selection_embedding")):
            tensor = tensor[None, None]
        if theirs.endswith("shepard_power"):
            tensor = tensor[0]
        result[theirs] = tensor.clone()
    if merging == "cluster":
        result["encoder.layers.0.downsample.global_norm.weight"] = torch.ones(3)
    return result
