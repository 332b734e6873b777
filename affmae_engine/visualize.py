"""Pictures for people: reconstructions, token positions, labels on images. numpy and Pillow, no plotting library.

Functions take arrays and return an RGB picture (uint8 [height, width, 3]), or a `Picture`, which also says where its
tiles are and what its colors mean; `picture_files.save_png` writes either. Class 0 is drawn without color: it is what
surrounds the others in nearly every EM label set.

Axes: Y X image, N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import maximum_filter, minimum_filter

from affmae_engine.class_colors import class_colour, class_colours
from affmae_engine.picture_files import Picture, Rgb, Tile

STAGE_COLOURS = ((86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0))
"""Tokens that are gone after stage 1, 2, 3, and those that reach stage 4."""

_DOT_RADII = (0.16, 0.26, 0.38, 0.5)  # of a canvas cell: later stages are few and drawn larger

ERROR_COLOUR = (204, 0, 120)

_BACKGROUND = (255, 255, 255)
_INK = (30, 30, 30)
_GAP = 8
_FONT = 16


@dataclass(frozen=True)
class ReconstructionRow:
    """One image of a reconstruction picture.

    image_YX: normalised input. masked_YX: True where pixels were hidden. images: reconstruction [Y, X] by title, in
    the order of the columns. stage_positions: (x, y) canvas cells [N, 2] of each encoder stage, finest first; empty
    where no tokens are merged.
    """

    image_YX: NDArray[np.float32]
    masked_YX: NDArray[np.bool_]
    images: Mapping[str, NDArray[np.float32]]
    stage_positions: Sequence[NDArray[np.integer]]


def to_grey(image_YX: NDArray, limits: tuple[float, float] | None = None) -> NDArray[np.uint8]:
    """Stretch intensities to 0..255 between `limits`, by default the 0.5th and 99.5th percentile; NaN becomes black."""
    values = np.nan_to_num(np.asarray(image_YX, np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = limits if limits is not None else _limits(values)
    scaled = (values - low) / max(high - low, 1e-12)
    return (np.clip(scaled, 0, 1) * 255 + 0.5).astype(np.uint8)


def reconstruction_picture(rows: Sequence[ReconstructionRow], *, patch: int, width: int = 1600) -> Picture:
    """Images one below the other: original, masked, the reconstructions, and where the tokens of each stage are.

    Args:
        rows: at least one; all with the same titles, the best reconstruction last. Without stage positions the last
            column is left out.
        patch: edge of a canvas cell in pixels.
        width: of the picture, about.
    """
    merged = bool(rows[0].stage_positions)
    titles = ["original", "masked", *rows[0].images, *(["tokens by stage"] if merged else [])]
    edge = max(32, (width - _GAP * (len(titles) + 1)) // len(titles))
    tiles = []
    for row in rows:
        limits = _limits(row.image_YX)
        grey = to_grey(row.image_YX, limits)
        hidden = np.where(row.masked_YX, np.uint8(128), grey)
        line = [grey, hidden, *(to_grey(image, limits) for image in row.images.values())]
        tiles.append([_fitted(_as_rgb(tile), edge) for tile in line])
        if merged:
            tiles[-1].append(token_picture(row.image_YX, row.stage_positions, patch=patch, edge=edge))
    legend = [
        (f"token kept until stage {stage}" if stage > 1 else "token of stage 1 only", colour)
        for stage, colour in enumerate(STAGE_COLOURS, 1)
    ]
    main = ("original", "masked", list(rows[0].images)[-1])
    return _table(tiles, titles, legend if merged else [], main)


def token_picture(
    image_YX: NDArray, stage_positions: Sequence[NDArray[np.integer]], *, patch: int, edge: int = 512
) -> Rgb:
    """Tokens drawn on the (dimmed) image as dots, coloured by the last stage that they reach.

    Args:
        image_YX: any intensities.
        stage_positions: (x, y) cells [N, 2] of each stage, finest first; later stages are subsets of earlier ones.
        patch: edge of a cell in pixels.
        edge: longer side of the picture.
    """
    width = image_YX.shape[1]
    base = _fitted(_as_rgb((to_grey(image_YX) * 0.55).astype(np.uint8)), edge)
    scale = base.shape[1] / width * patch
    oversampling = 4  # Pillow draws without antialiasing
    picture = Image.fromarray(base).resize((base.shape[1] * oversampling, base.shape[0] * oversampling))
    draw = ImageDraw.Draw(picture)
    for stage, positions_N2 in enumerate(stage_positions):
        radius = max(0.5, _DOT_RADII[stage] * scale) * oversampling
        for x, y in (np.asarray(positions_N2, float) + 0.5) * scale * oversampling:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=STAGE_COLOURS[stage])
    return np.asarray(picture.resize((base.shape[1], base.shape[0]), Image.Resampling.BOX))


def overlay(
    image_YX: NDArray,
    labels_YX: NDArray[np.integer],
    class_names: Sequence[str],
    *,
    alpha: float = 0.4,
    ignore: int | None = None,
    legend: bool = True,
) -> Rgb:
    """Classes as colours on the image, with outlines, at the image's own size, and a legend below.

    Args:
        image_YX: any intensities; stretched between percentiles.
        labels_YX: class indices of the same shape; values that are no class (negative, or `ignore`) stay uncoloured.
        class_names: names of 0, 1, 2, ...
        alpha: opacity of the colours.
        ignore: label value that is no class.
        legend: whether to add the legend.

    Raises:
        ValueError: image and labels differ in shape.
    """
    if image_YX.shape != labels_YX.shape:
        raise ValueError(f"image {image_YX.shape} and labels {labels_YX.shape} differ in shape")
    labels = _classes(labels_YX, len(class_names), ignore)
    table = class_colours(max(1, len(class_names))).astype(np.float32)
    colour_YX3 = table[np.maximum(labels, 0)]
    opacity_YX = np.where(labels > 0, alpha, 0.0)
    opacity_YX[_outlines(labels)] = min(1.0, 2.2 * alpha)
    opacity_YX[labels <= 0] = 0.0
    blended = _as_rgb(to_grey(image_YX)) * (1 - opacity_YX[..., None]) + colour_YX3 * opacity_YX[..., None]
    rgb = (blended + 0.5).astype(np.uint8)
    return _table([[rgb]], [], class_legend(class_names)).rgb if legend else rgb


def comparison_picture(
    rows: Sequence[tuple[NDArray, NDArray[np.integer], NDArray[np.integer]]],
    class_names: Sequence[str],
    *,
    ignore: int | None = None,
    width: int = 1600,
) -> Picture:
    """Rows of image | truth | prediction | errors, with a legend. Where the truth is no class, nothing is an error.

    Args:
        rows: (image [Y, X], true labels [Y, X], predicted labels [Y, X]).
        class_names, ignore: see `overlay`.
        width: of the picture, about.
    """
    titles = ["image", "truth", "prediction", "errors"]
    edge = max(32, (width - _GAP * (len(titles) + 1)) // len(titles))
    tiles = []
    for image_YX, truth_YX, predicted_YX in rows:
        grey = _as_rgb(to_grey(image_YX))
        known = _classes(truth_YX, len(class_names), ignore) >= 0
        wrong = (known & (truth_YX != predicted_YX))[..., None]
        errors = np.where(wrong, np.array(ERROR_COLOUR, np.uint8), (grey * 0.6).astype(np.uint8))
        errors = np.where(known[..., None], errors, grey // 4)
        shown = [
            overlay(image_YX, labels, class_names, ignore=ignore, legend=False) for labels in (truth_YX, predicted_YX)
        ]
        tiles.append([_fitted(tile, edge) for tile in (grey, *shown, errors)])
    return _table(tiles, titles, [*class_legend(class_names), ("wrong", ERROR_COLOUR)], titles)


def class_legend(class_names: Sequence[str]) -> list[tuple[str, tuple[int, int, int]]]:
    """(name, colour) of every class, for legends."""
    return [(f"{name} (not colored)" if i == 0 else name, class_colour(i)) for i, name in enumerate(class_names)]


def _limits(values: NDArray) -> tuple[float, float]:
    low, high = np.percentile(values, (0.5, 99.5)) if values.size else (0.0, 1.0)
    return float(low), float(high)


def _as_rgb(grey_YX: NDArray[np.uint8]) -> Rgb:
    return np.repeat(grey_YX[..., None], 3, axis=-1)


def _classes(labels_YX: NDArray[np.integer], count: int, ignore: int | None) -> NDArray[np.int64]:
    """Class indices, -1 for whatever is no class."""
    labels = labels_YX.astype(np.int64)
    foreign = (labels < 0) | (labels >= count)
    if ignore is not None:
        foreign |= labels == ignore
    return np.where(foreign, -1, labels)


def _outlines(labels_YX: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Pixels whose 3 x 3 neighbourhood holds more than one class."""
    return maximum_filter(labels_YX, 3) != minimum_filter(labels_YX, 3)


def _fitted(rgb: Rgb, edge: int) -> Rgb:
    """Scaled so that the longer side is `edge`: smoothly down, in sharp pixels up."""
    height, width = rgb.shape[:2]
    factor = edge / max(height, width)
    if factor == 1:
        return rgb
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    filtering = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(rgb).resize(size, filtering))


def _table(
    tiles: Sequence[Sequence[Rgb]],
    titles: Sequence[str],
    legend: Sequence[tuple[str, tuple[int, int, int]]],
    main: Sequence[str] = (),
) -> Picture:
    """Tiles in rows and columns on white, titles above the columns, a legend below. main: titles of `Tile.main`."""
    font = ImageFont.load_default(_FONT)
    line = _FONT + 10
    widths = [max(row[i].shape[1] for row in tiles) for i in range(len(tiles[0]))]
    heights = [max(tile.shape[0] for tile in row) for row in tiles]
    total = sum(widths) + _GAP * (len(widths) + 1)
    top = line if titles else 0
    entries = _legend_places(legend, font, total)
    legend_height = line * (entries[-1][1] + 1) + _GAP // 2 if entries else 0
    picture = Image.new("RGB", (total, top + sum(heights) + _GAP * (len(heights) + 1) + legend_height), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    x, placed = _GAP, []
    for i, width in enumerate(widths):
        if titles:
            draw.text((x + width / 2, _GAP + _FONT / 2), titles[i], _INK, font, anchor="mm")
        y = top + _GAP
        for number, (row, height) in enumerate(zip(tiles, heights, strict=True)):
            picture.paste(Image.fromarray(row[i]), (x, y))
            if titles:
                box = (x, y, row[i].shape[1], row[i].shape[0])
                placed.append(Tile(titles[i], number, box, titles[i] in main))
            y += height + _GAP
        x += width + _GAP
    bottom = picture.height - legend_height
    for (text, colour), (left, row_number) in zip(legend, entries, strict=True):
        y = bottom + row_number * line
        draw.rectangle((left, y + 2, left + _FONT, y + 2 + _FONT), fill=colour, outline=_INK)
        draw.text((left + _FONT + 6, y + 2 + _FONT / 2), text, _INK, font, anchor="lm")
    return Picture(np.asarray(picture), tuple(placed), tuple(legend))


def _legend_places(
    legend: Sequence[tuple[str, tuple[int, int, int]]], font: ImageFont.FreeTypeFont, width: int
) -> list[tuple[int, int]]:
    """Left edge and row of each entry, wrapped to the width."""
    places, left, row = [], _GAP, 0
    for text, _ in legend:
        needed = _FONT + 6 + round(font.getlength(text)) + 2 * _FONT
        if left > _GAP and left + needed > width:
            left, row = _GAP, row + 1
        places.append((left, row))
        left += needed
    return places
