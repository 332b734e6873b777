"""Padding of a section: border-connected regions without content, as stitching, rotation and cropping leave them.

A pixel may be padding where it is black (gray values 0 to 3 of uint8, since compression and resampling add noise),
white (252 to 255), or has exactly one value that is common on the section's border; for wider integers and floats
"black" is the same share of the largest value. Padding is every connected region of such pixels that touches the
border, after openings of 5 x 5 pixels (dark structures that merely touch the padding stay image), provided that it
fills at least 0.5 % of the section. Not finite pixels count as padding wherever they are.

A section whose other pixels are as flat as its padding is a drawing, not a micrograph, and has none.

Padding is left out of statistics and training crops, is class 0 in predictions, and is not scored.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 3
"""Largest gray value of black padding, and distance of white padding from 255, of uint8."""

SMALLEST_SHARE = 0.005
"""Smallest share of a section that a region of padding fills."""

_OPENING = 5
_COMMON = 32  # pixels of the border that share a value which is neither black nor white
_MOST_VALUES = 4


def padding_mask(section_YX: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a section has padding.

    Args:
        section_YX: stored gray values [Y, X] of a whole section, of any real dtype.

    Returns:
        bool [Y, X]. Needs about 6 bytes per pixel while it works; sections without a candidate on their border, the
        usual case, cost one look at the border.
    """
    nowhere = np.zeros(section_YX.shape, np.bool_)
    padding = nowhere
    if section_YX.dtype.kind == "f":
        finite = np.isfinite(section_YX)
        if not finite.all():
            padding = ~finite
            section_YX = np.where(finite, section_YX, 0)
    border = _border(section_YX)
    for low, high in _candidates(section_YX, border):
        if np.count_nonzero((border >= low) & (border <= high)) < min(_COMMON, border.size):
            continue
        region = _touching((section_YX >= low) & (section_YX <= high))
        if region is not None:
            padding = padding | region
    return nowhere if _is_drawing(section_YX, padding) else padding


def _is_drawing(section_YX: NDArray[Any], padding_YX: NDArray[np.bool_]) -> bool:
    """Whether most neighboring pixels outside the padding are equal, as no detector records them."""
    if not padding_YX.any() or (padding_YX.all() and section_YX.min() == section_YX.max()):
        return False
    outside_YX = ~padding_YX | padding_YX.all()  # a section that is nothing but padding is looked at as a whole
    inside = outside_YX[:, 1:] & outside_YX[:, :-1]
    equal = (section_YX[:, 1:] == section_YX[:, :-1]) & inside
    return bool(2 * np.count_nonzero(equal) > np.count_nonzero(inside))


def _border(section_YX: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([section_YX[0], section_YX[-1], section_YX[:, 0], section_YX[:, -1]])


def _candidates(section_YX: NDArray[Any], border: NDArray[Any]) -> list[tuple[float, float]]:
    """Ranges of values that padding may have: black, white, and single values that are common on the border."""
    ranges: list[tuple[float, float]] = []
    if section_YX.dtype == np.uint8:
        ranges = [(0, TOLERANCE), (255 - TOLERANCE, 255)]
    elif section_YX.dtype.kind == "u" and not border.min(initial=1):
        ranges = [(0, TOLERANCE * float(section_YX.max()) / 255)]
    values, counts = np.unique(border, return_counts=True)
    for place in np.argsort(counts)[::-1][:_MOST_VALUES]:
        value = float(values[place])
        if counts[place] >= _COMMON and not any(low <= value <= high for low, high in ranges):
            ranges.append((value, value))
    return ranges


def _touching(candidates_YX: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """The connected regions of the candidates that touch the border and are large enough; None when there is none."""
    from scipy import ndimage  # only now: most sections need it not, and it takes 15 MiB

    smallest = SMALLEST_SHARE * candidates_YX.size
    if np.count_nonzero(candidates_YX) < smallest:
        return None
    # Opening; what lies outside the section counts as padding, so that thin strips along the border survive.
    eroded = ndimage.minimum_filter(candidates_YX.view(np.uint8), size=_OPENING, mode="constant", cval=1)
    opened = ndimage.maximum_filter(eroded, size=_OPENING, mode="constant", cval=0).view(np.bool_) & candidates_YX
    regions, count = ndimage.label(opened)
    if not count:
        return None
    sizes = np.bincount(regions.ravel(), minlength=count + 1)
    chosen = np.zeros(count + 1, np.bool_)
    chosen[np.unique(_border(regions))] = True
    chosen &= sizes >= smallest
    chosen[0] = False
    return chosen[regions] if chosen.any() else None
