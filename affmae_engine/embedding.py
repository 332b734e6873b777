"""Features of images from the encoder: tokens with positions, and a dense map made of them.

Nothing is masked. The encoder's stages work on fewer and fewer tokens; the map brings each stage back to one vector per
patch by inverse-distance weighting of the 4 nearest tokens, and puts the stages side by side.

Axes: B tiles, N tokens, C channels of a stage, F channels of the map, Z sections, h w patches, Y X pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

from affmae_engine.data.readers import Source
from affmae_engine.model.affmae import at_least_fp32
from affmae_engine.model.encoder import Encoder
from affmae_engine.model.patches import canvas_of, pad_to_patches

NEAREST = 4
"""Tokens that a patch's features are interpolated from, as in the decoder."""


@dataclass(frozen=True)
class StageTokens:
    """Tokens of one encoder stage in one image or stack.

    features: float32 [N, C], normalized by the stage's LayerNorm.
    positions: float32 [N, 3], (z, y, x) of the center of each token's patch in pixels of the input.
    """

    features: NDArray[np.float32]
    positions: NDArray[np.float32]


@dataclass(frozen=True)
class Embedding:
    """Features of an image or stack.

    stages: tokens of each encoder stage, finest first. map: float32 [Z, F, h, w] (of a section [F, h, w]), one vector
    per patch, the chosen stages concatenated. patch: edge of a patch in pixels.
    """

    stages: tuple[StageTokens, ...]
    map: NDArray[np.float32]
    patch: int


def embed(
    source: Source,
    encoder: Encoder,
    normalise: Callable[[np.ndarray], np.ndarray],
    *,
    tile: int,
    device: torch.device,
    stages: Sequence[int] = (1, 2, 3, 4),
    autocast: torch.dtype | None = None,
) -> Embedding:
    """Encode every section in tiles that lie side by side; a smaller image is one tile, the last ones may be smaller.

    Args:
        source: the image.
        encoder: in eval mode on `device`.
        normalise: pixels [Y, X] as they are stored to what the network was trained on.
        tile: edge of a tile in pixels, a multiple of the patch.
        stages: which stages (1 to 4) the map holds.
        autocast: dtype of an autocast context; None: none.
    """
    depth, height, width = source.info.shape_ZYX
    patch = encoder.patch
    rows, columns = canvas_of(height, width, patch)
    found: list[list[tuple[NDArray, NDArray]]] = []
    map_ZFhw: NDArray[np.float32] | None = None
    for z in range(depth):
        for top in range(0, height, tile):
            for left in range(0, width, tile):
                block_YX = source.read(slice(z, z + 1), slice(top, top + tile), slice(left, left + tile))[0]
                outputs = _encode(encoder, normalise(block_YX), device, autocast)
                found = found or [[] for _ in outputs]
                first = top // patch, left // patch
                for kept, (feat_NC, pos_N2) in zip(found, outputs, strict=True):
                    kept.append((feat_NC, _pixels(pos_N2, first, z, patch)))
                canvas_hw = canvas_of(block_YX.shape[0], block_YX.shape[1], patch)
                piece_Fhw = np.concatenate([spread(*outputs[stage - 1], canvas_hw) for stage in stages])
                if map_ZFhw is None:
                    map_ZFhw = np.empty((depth, len(piece_Fhw), rows, columns), np.float32)
                y, x = first
                map_ZFhw[z, :, y : y + canvas_hw[0], x : x + canvas_hw[1]] = piece_Fhw
    assert map_ZFhw is not None  # a source has pixels
    tokens = tuple(
        StageTokens(np.concatenate([feat for feat, _ in kept]), np.concatenate([place for _, place in kept]))
        for kept in found
    )
    return Embedding(tokens, map_ZFhw, patch)


def spread(feat_NC: NDArray[np.float32], pos_N2: NDArray, canvas_hw: tuple[int, int]) -> NDArray[np.float32]:
    """Features of tokens on every canvas cell, float32 [C, h, w]: 1/d weights of the nearest tokens, a token's own
    features at its own cell.

    Args:
        pos_N2: (x, y) cells of the tokens.
    """
    height, width = canvas_hw
    y, x = np.divmod(np.arange(height * width), width)
    count = min(NEAREST, len(pos_N2))
    distance_TK, index_TK = cKDTree(pos_N2).query(np.stack([x, y], -1), k=count)
    distance_TK, index_TK = distance_TK.reshape(-1, count), index_TK.reshape(-1, count)
    weight_TK = 1 / np.maximum(distance_TK, 1e-6)
    weight_TK[distance_TK[:, 0] == 0] = [1.0, *[0.0] * (count - 1)]
    weight_TK /= weight_TK.sum(1, keepdims=True)
    dense_TC = np.einsum("tk,tkc->tc", weight_TK.astype(np.float32), feat_NC[index_TK])
    return dense_TC.T.reshape(-1, height, width)


@torch.no_grad()
def _encode(
    encoder: Encoder, image_YX: np.ndarray, device: torch.device, autocast: torch.dtype | None
) -> list[tuple[NDArray[np.float32], NDArray]]:
    """Features [N, C] and (x, y) cells [N, 2] of every stage."""
    image_1IYX = pad_to_patches(torch.from_numpy(np.ascontiguousarray(image_YX))[None, None].to(device), encoder.patch)
    height, width = canvas_of(image_1IYX.shape[-2], image_1IYX.shape[-1], encoder.patch)
    every_1T = torch.arange(height * width, device=device)[None]
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        outputs = encoder(image_1IYX, every_1T)

    def host(x: Tensor) -> NDArray:
        return x[0].cpu().numpy()

    return [(host(at_least_fp32(stage.feat_BNC)), host(stage.pos_BN2)) for stage in outputs]


def _pixels(pos_N2: NDArray, first: tuple[int, int], z: int, patch: int) -> NDArray[np.float32]:
    """(z, y, x) in pixels of the patches' centers."""
    cells_yx = pos_N2[:, ::-1] + np.asarray(first)
    centers_yx = (cells_yx + 0.5) * patch - 0.5
    return np.concatenate([np.full((len(pos_N2), 1), z), centers_yx], 1).astype(np.float32)
