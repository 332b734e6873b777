"""Training crops in three kernels: normalize and resize; a CLAHE map per tile; apply the maps.

Whichever kernel comes last writes turned. Axes: Y X pixels of a program's block, K bins, P pixels of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from affmae_kernels.training_crops.reference import BINS, CENTER, CLIP, OUTLIER, SCALE, TILE

BLOCK = tl.constexpr(32)
"""Edge of a program's block of pixels."""


@triton.jit
def _cubic(distance):
    """Keys' cubic with a = -0.5; 0 from a distance of 2 on."""
    x = tl.abs(distance)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))


@triton.jit
def _first_tap(index, scale, support):
    """Index of the first source pixel under the filter of an output pixel, and the filter's center."""
    center = scale * (index.to(tl.float32) + 0.5)
    first = (center - support + 0.5).to(tl.int32)  # towards 0; negative ones are cut off below
    return tl.maximum(first, 0), center


@triton.jit
def _tap_weight(first, center, tap, reach, support, edge):
    """The weight of source pixel first + tap, not normalized."""
    at = first + tap
    last = tl.minimum((center + support + 0.5).to(tl.int32), edge)
    weight = _cubic((at.to(tl.float32) - center + 0.5) * reach)
    return tl.where(at < last, weight, 0.0)


@triton.jit
def _turned(y, x, turn, SIZE):
    """Where a pixel goes: `turn % 4` quarter turns counterclockwise, then a mirror image if turn >= 4."""
    quarters = turn % 4
    last = SIZE - 1
    row = tl.where(quarters == 0, y, tl.where(quarters == 1, last - x, tl.where(quarters == 2, last - y, x)))
    column = tl.where(quarters == 0, x, tl.where(quarters == 1, y, tl.where(quarters == 2, last - x, last - y)))
    column = tl.where(turn >= 4, last - column, column)
    return row, column


@triton.jit
def _bin(value, low, high, BINS: tl.constexpr):
    unit = tl.div_rn(value - low, tl.where(high > low, high - low, 1.0))  # an empty range is not equalized
    unit = tl.minimum(tl.maximum(unit, 0.0), 1.0)
    return tl.minimum((unit * BINS).to(tl.int32), BINS - 1)


@triton.jit(do_not_specialize=["E", "SIZE"])
def _resize_kernel(CROP, WINDOW, INTENSITY, OUT, E, SIZE, OUTLIER: tl.constexpr, TURN: tl.constexpr):
    """One program: a block of one image."""
    sample = tl.program_id(0).to(tl.int64)
    edge, turn = tl.load(WINDOW + 2 * sample), tl.load(WINDOW + 2 * sample + 1)
    mean, std = tl.load(INTENSITY + 4 * sample), tl.load(INTENSITY + 4 * sample + 1)
    y = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [Y]
    x = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)  # [X]

    # The filter: two pixels to either side, of the source, or of the result where that is coarser.
    scale = tl.where(edge == SIZE, 1.0, edge.to(tl.float32) / SIZE.to(tl.float32))
    widening = tl.maximum(scale, 1.0)
    support, reach = 2.0 * widening, 1.0 / widening
    taps = (2.0 * support).to(tl.int32) + 2
    first_y, center_y = _first_tap(y, scale, support)
    first_x, center_x = _first_tap(x, scale, support)
    sum_y = tl.zeros([BLOCK], tl.float32)
    sum_x = tl.zeros([BLOCK], tl.float32)
    for tap in range(taps):
        sum_y += _tap_weight(first_y, center_y, tap, reach, support, edge)
        sum_x += _tap_weight(first_x, center_x, tap, reach, support, edge)
    unit_y, unit_x = 1.0 / tl.where(y < SIZE, sum_y, 1.0), 1.0 / tl.where(x < SIZE, sum_x, 1.0)
    unit = 1.0 / tl.where(std > 0, std, 1.0)

    # Weighted sum of normalized source pixels.
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    source = CROP + sample * E * E
    inside = (y < SIZE)[:, None] & (x < SIZE)[None, :]
    for tap_y in range(taps):
        weight_y = _tap_weight(first_y, center_y, tap_y, reach, support, edge) * unit_y
        row = tl.minimum(first_y + tap_y, edge - 1)
        for tap_x in range(taps):
            weight_x = _tap_weight(first_x, center_x, tap_x, reach, support, edge) * unit_x
            column = tl.minimum(first_x + tap_x, edge - 1)
            gray = tl.load(source + row[:, None] * E + column[None, :], mask=inside, other=0).to(tl.float32)  # [Y, X]
            value = tl.minimum(tl.maximum((gray - mean) * unit, -OUTLIER), OUTLIER)
            total += weight_y[:, None] * weight_x[None, :] * value
    total = tl.where(std > 0, total, 0.0)

    if TURN:
        row, column = _turned(y[:, None], x[None, :], turn, SIZE)
    else:
        row, column = y[:, None], x[None, :]
    tl.store(OUT + sample * SIZE * SIZE + row * SIZE + column, total, mask=inside)


@triton.jit(do_not_specialize=["SIZE", "TILE", "LIMIT"])
def _map_kernel(IMAGE, INTENSITY, MAP, SIZE, TILE, LIMIT, PIXELS: tl.constexpr, BINS: tl.constexpr):
    """One program: the map of one tile, see `reference.equalize`."""
    sample, tile, tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.cdiv(SIZE, TILE)
    low, high = tl.load(INTENSITY + 4 * sample + 2), tl.load(INTENSITY + 4 * sample + 3)

    # Count the bins of the tile's pixels; beyond the image it is reflected.
    number = tl.arange(0, PIXELS)  # [P]
    inside = number < TILE * TILE
    y, x = tile // tiles * TILE + number // TILE, tile % tiles * TILE + number % TILE
    period = tl.maximum(2 * (SIZE - 1), 1)
    y, x = y % period, x % period
    y, x = tl.minimum(y, period - y), tl.minimum(x, period - x)
    at = sample * SIZE * SIZE + y * SIZE + x
    value = tl.load(IMAGE + at, mask=inside, other=0.0)  # [P]
    count = tl.histogram(_bin(value, low, high, BINS), BINS, mask=inside)  # [K]

    # Clip, and spread what was above.
    excess = tl.sum(tl.maximum(count - LIMIT, 0))
    count = tl.minimum(count, LIMIT)
    filled = tl.minimum(count + excess // BINS, LIMIT)
    left = excess - tl.sum(filled - count)
    below = (filled < LIMIT).to(tl.int32)
    rank = tl.cumsum(below, 0)
    bins_below = tl.maximum(tl.sum(below), 1)
    given = rank * left // bins_below - (rank - 1) * left // bins_below
    count = tl.where(below == 1, tl.minimum(filled + given, LIMIT), filled)

    mapped = tl.div_rn(tl.cumsum(count, 0).to(tl.float32), (TILE * TILE).to(tl.float32))
    own = MAP + (sample * tl.num_programs(1) + tile) * BINS
    tl.store(own + tl.arange(0, BINS), tl.minimum(mapped, 1.0))


@triton.jit(do_not_specialize=["SIZE", "TILE"])
def _apply_kernel(
    IMAGE, WINDOW, INTENSITY, MAP, OUT, SIZE, TILE, BINS: tl.constexpr, CENTER: tl.constexpr, SCALE: tl.constexpr
):
    """One program: a block of one image, equalized by the maps of the four nearest tiles, and turned."""
    sample, tiles = tl.program_id(0).to(tl.int64), tl.cdiv(SIZE, TILE)
    turn = tl.load(WINDOW + 2 * sample + 1)
    low, high = tl.load(INTENSITY + 4 * sample + 2), tl.load(INTENSITY + 4 * sample + 3)
    y = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = (y < SIZE)[:, None] & (x < SIZE)[None, :]
    value = tl.load(IMAGE + sample * SIZE * SIZE + y[:, None] * SIZE + x[None, :], mask=inside, other=0.0)  # [Y, X]
    bin = _bin(value, low, high, BINS)

    # The tiles whose centers lie before and after each pixel, and the weights of those after.
    after_y, after_x = (y + TILE // 2) // TILE, (x + TILE // 2) // TILE
    v = tl.div_rn(((y + TILE // 2) % TILE).to(tl.float32), TILE.to(tl.float32))[:, None]
    u = tl.div_rn(((x + TILE // 2) % TILE).to(tl.float32), TILE.to(tl.float32))[None, :]
    above = tl.maximum(after_y - 1, 0)[:, None]
    below = tl.minimum(after_y, tiles - 1)[:, None]
    left = tl.maximum(after_x - 1, 0)[None, :]
    right = tl.minimum(after_x, tiles - 1)[None, :]

    own = MAP + sample * tiles * tiles * BINS
    top_left = tl.load(own + (above * tiles + left) * BINS + bin, mask=inside, other=0.0)
    top_right = tl.load(own + (above * tiles + right) * BINS + bin, mask=inside, other=0.0)
    bottom_left = tl.load(own + (below * tiles + left) * BINS + bin, mask=inside, other=0.0)
    bottom_right = tl.load(own + (below * tiles + right) * BINS + bin, mask=inside, other=0.0)
    top = (1 - u) * top_left + u * top_right
    bottom = (1 - u) * bottom_left + u * bottom_right
    equalized = ((1 - v) * top + v * bottom - CENTER) / SCALE
    row, column = _turned(y[:, None], x[None, :], turn, SIZE)
    out = OUT + sample * SIZE * SIZE + row * SIZE + column
    tl.store(out, tl.where(high > low, equalized, value), mask=inside)


def training_crops(crop_BYX: Tensor, window_B2: Tensor, intensity_B4: Tensor, size: int, *, clahe: bool) -> Tensor:
    """See the package."""
    crop_BYX, window_B2, intensity_B4 = crop_BYX.contiguous(), window_B2.contiguous(), intensity_B4.contiguous()
    batch, edge = len(crop_BYX), crop_BYX.shape[-1]
    blocks = (batch, triton.cdiv(size, BLOCK.value), triton.cdiv(size, BLOCK.value))
    resized_BYX = torch.empty(batch, size, size, dtype=torch.float32, device=crop_BYX.device)
    _resize_kernel[blocks](
        CROP=crop_BYX, WINDOW=window_B2, INTENSITY=intensity_B4, OUT=resized_BYX, E=edge, SIZE=size, OUTLIER=OUTLIER,
        TURN=not clahe, num_warps=8,
    )  # fmt: skip
    return _equalized(resized_BYX, window_B2, intensity_B4) if clahe else resized_BYX


def equalize(image_BYX: Tensor, low_B: Tensor, high_B: Tensor) -> Tensor:
    """See the package; square fp32 images."""
    unused_B = torch.zeros_like(low_B)
    intensity_B4 = torch.stack([unused_B, unused_B, low_B, high_B], 1)
    window_B2 = torch.zeros(len(low_B), 2, dtype=torch.int32, device=low_B.device)
    return _equalized(image_BYX.contiguous(), window_B2, intensity_B4)


def _equalized(image_BYX: Tensor, window_B2: Tensor, intensity_B4: Tensor) -> Tensor:
    """Equalized and turned."""
    batch, size = image_BYX.shape[:2]
    tile = min(TILE, size)
    tiles = triton.cdiv(size, tile) ** 2
    map_BTK = torch.empty(batch, tiles, BINS, dtype=torch.float32, device=image_BYX.device)
    _map_kernel[(batch, tiles)](
        IMAGE=image_BYX, INTENSITY=intensity_B4, MAP=map_BTK, SIZE=size, TILE=tile,
        LIMIT=max(1, int(CLIP * tile * tile)), PIXELS=triton.next_power_of_2(tile * tile), BINS=BINS, num_warps=8,
    )  # fmt: skip
    equalized_BYX = torch.empty_like(image_BYX)
    blocks = (batch, triton.cdiv(size, BLOCK.value), triton.cdiv(size, BLOCK.value))
    _apply_kernel[blocks](
        IMAGE=image_BYX, WINDOW=window_B2, INTENSITY=intensity_B4, MAP=map_BTK, OUT=equalized_BYX, SIZE=size, TILE=tile,
        BINS=BINS, CENTER=CENTER, SCALE=SCALE,
    )  # fmt: skip
    return equalized_BYX
