"""What is wrong with labels whose values are no classes, told from one section, in one sentence.

Labels are flat (neighboring pixels mostly agree), images are not. Flat labels with a few frequent values and many rare
ones between them were interpolated or compressed; flat labels in which every value is one connected region are numbers
of single objects.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from affmae_engine.data.labels.pairing import LabelledImage
from affmae_engine.data.labels.problems import listed
from affmae_engine.data.readers import Source
from affmae_engine.errors import InputError

Cause = Literal["", "jpeg", "copy", "image", "interpolated", "instances"]

FLAT = 0.5
"""Share of horizontally neighboring pixels that agree, from which a section is flat."""

_MAIN_SHARE, _MOST_MAIN = 0.7, 8  # the frequent values of a label map that was interpolated
_MOST_CLASSES = 32
_FEWEST_OBJECTS, _SINGLE_SHARE = 8, 0.7


def flatness(section_YX: NDArray[np.generic]) -> float:
    """Share of horizontally neighboring pixels that have the same value; 1.0 for a section one pixel wide."""
    if section_YX.shape[1] < 2:
        return 1.0
    return float((section_YX[:, 1:] == section_YX[:, :-1]).mean())


def diagnose(pair: LabelledImage) -> Cause:
    """Why the labels of an image have values that are no classes; "" when it cannot be told.

    Raises:
        InputError: image or labels cannot be read.
    """
    section_YX, z = _busiest_section(pair.labels)
    values, counts = np.unique(section_YX, return_counts=True)
    if len(values) > 2 and pair.labels.info.format == "JPEG":
        return "jpeg"
    if len(values) > 2 and np.array_equal(section_YX, _section(pair.image, z)):
        return "copy"
    ranked = np.sort(counts)[::-1]
    main = int(np.searchsorted(np.cumsum(ranked), _MAIN_SHARE * section_YX.size)) + 1
    frequent = values[np.argsort(counts)[::-1][:main]]
    between = (values > frequent.min()) & (values < frequent.max())
    if 2 <= main <= _MOST_MAIN and len(values) >= main + 4 and between.sum() >= len(values) - main:
        return "interpolated"
    if flatness(section_YX) < FLAT:
        return "image" if len(values) > _MOST_CLASSES else ""
    return "instances" if len(values) > _MOST_CLASSES or are_instances(section_YX) else ""


def are_instances(section_YX: NDArray[np.integer]) -> bool:
    """Whether the numbers in a flat section are those of single objects: many, and nearly each in one piece."""
    numbers, compact = np.unique(section_YX, return_inverse=True)
    found = [(k, box) for k, box in enumerate(ndimage.find_objects(compact.reshape(section_YX.shape) + 1)) if box]
    objects = [(k, box) for k, box in found if numbers[k] != 0]
    if len(objects) < _FEWEST_OBJECTS:
        return False
    compact_YX = compact.reshape(section_YX.shape)
    single = sum(ndimage.label(compact_YX[box] == k, np.ones((3, 3)))[1] == 1 for k, box in objects)
    return bool(single >= _SINGLE_SHARE * len(objects))


def explain(causes: Sequence[tuple[LabelledImage, Cause]], examples: Sequence[Sequence[int]]) -> InputError:
    """One error for labels that cannot be used, with one sentence for the most frequent cause.

    Args:
        causes: images with what `diagnose` says of their labels, none of it "".
        examples: label values of these images, to be shown.
    """
    kinds = [cause for _, cause in causes]
    cause = max(dict.fromkeys(kinds), key=kinds.count)
    files = list(dict.fromkeys(pair.labels.info.path for pair, found in causes if found == cause))
    values = max((v for (_, found), v in zip(causes, examples, strict=True) if found == cause), key=len)
    where = listed(files, 3)
    if cause == "image" and all(_is_label_map(pair.image) for pair, _ in causes):
        return InputError(
            f"--images and --labels are swapped: the labels ({where}) look like gray images, the images like labels",
            "exchange the two options",
        )
    sentences = {
        "jpeg": (
            f"these labels are JPEG, which smears their values ({_ranges(values)}): {where}",
            "save the original labels as PNG or TIFF",
        ),
        "interpolated": (
            f"these labels were interpolated: between their classes they have values in {_ranges(values)}: {where}",
            "resize or export the original labels without interpolation (nearest neighbor)",
        ),
        "instances": (
            f"these labels are instance ids, not classes: each of {len(values)} values is a single object: {where}",
            "to tell objects from background, name these two: --classes background,cell; if the values are classes "
            "after all, name all of them with --classes",
        ),
        "copy": (f"the labels equal their images: {where}", "give the label maps to --labels"),
        "image": (f"the labels look like gray images, not label maps: {where}", "give the label maps to --labels"),
    }
    message, hint = sentences[cause]
    return InputError(message, hint)


def _is_label_map(image: Source) -> bool:
    try:
        section_YX = _section(image, image.info.shape_ZYX[0] // 2)
    except InputError:
        return False
    finally:
        image.close()
    return flatness(section_YX) >= FLAT and len(np.unique(section_YX)) <= 64


def _busiest_section(labels: Source) -> tuple[NDArray[np.integer], int]:
    """The section of five spread over the stack that has most values, and its number."""
    depth = labels.info.shape_ZYX[0]
    candidates = sorted({depth // 2, 0, depth - 1, depth // 4, 3 * depth // 4}, key=lambda z: abs(z - depth // 2))
    sections = [(_section(labels, z), z) for z in candidates]
    return max(sections, key=lambda found: len(np.unique(found[0])))


def _section(source: Source, z: int) -> NDArray[np.integer]:
    return source.read(slice(z, z + 1), slice(None), slice(None))[0]


def _ranges(values: Sequence[int]) -> str:
    """Values in words, `0..31, 223..255`: numbers at most 8 apart make a range."""
    ordered = sorted(values)
    starts = [0, *(k for k in range(1, len(ordered)) if ordered[k] - ordered[k - 1] > 8), len(ordered)]
    pieces = [ordered[a:b] for a, b in itertools.pairwise(starts)]
    return listed([f"{piece[0]}..{piece[-1]}" if len(piece) > 1 else f"{piece[0]}" for piece in pieces], 6)
