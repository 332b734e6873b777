"""Scores of predicted objects against true ones.

Everything follows from one sparse table: how many voxels carry each pair (true id, predicted id). The table is
gathered block by block, so volumes of any size can be scored. Objects match when their IoU is above the threshold; at
0.5 and more an object has at most one match, so no assignment has to be solved.

- F1 = 2 TP / (2 TP + FP + FN), at an IoU threshold.
- AP = TP / (TP + FP + FN), the average precision of instance segmentation without confidences (Caicedo et al. 2019,
  Nature Methods 16:1247; also of StarDist and Cellpose). It is not COCO's area under a precision-recall curve.
- PQ = sum of the IoU of matches / (TP + FP / 2 + FN / 2), at IoU 0.5 (Kirillov et al. 2019, CVPR).
- Adapted Rand error (Arganda-Carreras et al. 2015) and variation of information (Meila 2007, in bits) come from
  scikit-image; voxels that are background in the truth do not count in them, predicted background is one object.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from skimage.metrics import adapted_rand_error, variation_of_information

from affmae_engine.objects.pairs import PairCounts, add_pairs, count_pairs, sum_pairs

THRESHOLDS = (0.5, 0.75)


@dataclass(frozen=True)
class Matching:
    """Objects at one IoU threshold: matched, predicted without a match, true without a match."""

    iou: float
    matched: int
    spurious: int
    missed: int

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN); NaN when there are no objects at all."""
        return _ratio(2 * self.matched, 2 * self.matched + self.spurious + self.missed)

    @property
    def ap(self) -> float:
        """TP / (TP + FP + FN); NaN when there are no objects at all."""
        return _ratio(self.matched, self.matched + self.spurious + self.missed)

    @property
    def precision(self) -> float:
        """Share of the predicted objects that are matched."""
        return _ratio(self.matched, self.matched + self.spurious)

    @property
    def recall(self) -> float:
        """Share of the true objects that are matched."""
        return _ratio(self.matched, self.matched + self.missed)


@dataclass(frozen=True)
class ObjectScores:
    """Scores of one volume.

    Attributes:
        true_objects, predicted_objects: how many there are.
        f1_50, f1_75, ap_50, ap_75, pq: see the module; 0 to 1, higher is better. NaN without any object.
        adapted_rand_error: 0 is perfect, 1 the worst. NaN when the truth has no objects.
        voi_split, voi_merge: variation of information in bits, H(predicted | true) and H(true | predicted); 0 is
            perfect. NaN when the truth has no objects.
    """

    true_objects: int
    predicted_objects: int
    f1_50: float
    f1_75: float
    ap_50: float
    ap_75: float
    pq: float
    adapted_rand_error: float
    voi_split: float
    voi_merge: float


def score_blocks(blocks: Iterable[tuple[np.ndarray, np.ndarray]], *, smallest: int = 1) -> ObjectScores:
    """Scores from blocks (true ids, predicted ids) that together cover the volume once; 0 is background.

    Args:
        smallest: true and predicted objects of fewer voxels are background.
    """
    table = add_pairs([count_pairs(true, predicted) for true, predicted in blocks])
    return score_table(without_small(table, smallest) if smallest > 1 else table)


def score_objects(true: np.ndarray, predicted: np.ndarray) -> ObjectScores:
    """Scores of a whole label volume of integer ids; 0 is background.

    Raises:
        ValueError: the shapes differ.
    """
    return score_table(count_pairs(true, predicted))


def score_table(table: PairCounts) -> ObjectScores:
    """Scores from the numbers of voxels with each pair (true id, predicted id)."""
    iou_N, true_count, predicted_count = pair_iou(table)
    at = {t: matching(iou_N, true_count, predicted_count, t) for t in THRESHOLDS}
    half = at[0.5]
    quality = float(iou_N[iou_N > 0.5].sum())
    rand, split, merge = _partition_scores(table)
    return ObjectScores(
        true_objects=true_count,
        predicted_objects=predicted_count,
        f1_50=half.f1,
        f1_75=at[0.75].f1,
        ap_50=half.ap,
        ap_75=at[0.75].ap,
        pq=_ratio(quality, half.matched + 0.5 * (half.spurious + half.missed)),
        adapted_rand_error=rand,
        voi_split=split,
        voi_merge=merge,
    )


def without_small(table: PairCounts, voxels: int) -> PairCounts:
    """The table with objects of fewer than `voxels` voxels, true or predicted, taken for background."""
    ids = table.ids_N2.copy()
    for side in (0, 1):
        values, position = np.unique(table.ids_N2[:, side], return_inverse=True)
        small = np.bincount(position, table.counts_N, len(values)) < voxels
        ids[small[position], side] = 0
    return sum_pairs(ids, table.counts_N)


def pair_iou(table: PairCounts) -> tuple[np.ndarray, int, int]:
    """IoU [N] of all overlapping pairs of objects, number of true objects, number of predicted objects."""
    true_ids, true_of = np.unique(table.ids_N2[:, 0], return_inverse=True)
    predicted_ids, predicted_of = np.unique(table.ids_N2[:, 1], return_inverse=True)
    true_size = np.bincount(true_of, table.counts_N, len(true_ids))
    predicted_size = np.bincount(predicted_of, table.counts_N, len(predicted_ids))
    both = (table.ids_N2 != 0).all(axis=1)
    shared = table.counts_N[both]
    union = true_size[true_of[both]] + predicted_size[predicted_of[both]] - shared
    return shared / union, int((true_ids != 0).sum()), int((predicted_ids != 0).sum())


def matching(iou_N: np.ndarray, true_count: int, predicted_count: int, threshold: float) -> Matching:
    """Count matches at one threshold.

    Args:
        threshold: at least 0.5, so that matches are unique; pairs match when their IoU is above it.
    """
    if threshold < 0.5:
        raise ValueError(f"matches at an IoU of {threshold} are not unique; use 0.5 or more")
    matched = int((iou_N > threshold).sum())
    return Matching(threshold, matched, predicted_count - matched, true_count - matched)


def _partition_scores(table: PairCounts) -> tuple[float, float, float]:
    """Adapted Rand error, split and merge variation of information over the true foreground."""
    inside = table.where(table.ids_N2[:, 0] != 0)
    if not len(inside.counts_N):
        return math.nan, math.nan, math.nan
    rows = np.unique(inside.ids_N2[:, 0], return_inverse=True)[1]
    columns = np.unique(inside.ids_N2[:, 1], return_inverse=True)[1]
    counts = csr_array((inside.counts_N.astype(np.float64), (rows, columns)))
    with np.errstate(invalid="ignore", divide="ignore"):  # precision or recall alone may be 0 / 0
        error, _, _ = adapted_rand_error(table=counts)
    unused = np.empty(0)  # scikit-image compares the shapes of two images even when it is given a table
    split, merge = variation_of_information(unused, unused, table=counts / counts.sum())
    # Objects of one voxel have no pairs of voxels that two partitions could disagree about.
    return 0.0 if math.isnan(error) else float(error), float(split), float(merge)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
