"""Object scores against independent implementations: dense matrices, optimal assignment, counting pairs of voxels."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy.optimize import linear_sum_assignment

from affmae_engine.objects.pairs import add_pairs, compact, count_pairs
from affmae_engine.objects.scores import matching, score_blocks, score_objects

maps = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)).flatmap(
    lambda shape: st.tuples(
        npst.arrays(np.uint32, shape, elements=st.integers(0, 5)),
        npst.arrays(np.uint64, shape, elements=st.sampled_from([0, 1, 2, 3, 9, 2**63 + 5])),
    )
)


def iou_matrix(true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """IoU of every true object with every predicted one, from boolean masks."""
    a = [true == i for i in np.unique(true) if i]
    b = [predicted == i for i in np.unique(predicted) if i]
    return np.array([[(p & q).sum() / (p | q).sum() for q in b] for p in a]).reshape(len(a), len(b))


def matched_by_assignment(iou: np.ndarray, threshold: float) -> np.ndarray:
    """IoUs of the one-to-one matching with the most pairs above the threshold."""
    good = iou > threshold
    rows, columns = linear_sum_assignment(good * (1 + iou), maximize=True)
    return iou[rows, columns][good[rows, columns]]


def rand_error_by_pairs(true: np.ndarray, predicted: np.ndarray) -> float:
    """1 - F-score of pairs of voxels that are together in one object, over the true foreground."""
    voxels = [(t, p) for t, p in zip(true.ravel().tolist(), predicted.ravel().tolist(), strict=True) if t]
    together = in_true = in_predicted = 0
    for (t1, p1), (t2, p2) in itertools.combinations(voxels, 2):
        in_true += t1 == t2
        in_predicted += p1 == p2
        together += t1 == t2 and p1 == p2
    return 1 - 2 * together / (in_true + in_predicted) if in_true + in_predicted else 0.0


def conditional_entropy(of: np.ndarray, given_: np.ndarray) -> float:
    """H(of | given) in bits, from the definition."""
    total = 0.0
    for g in np.unique(given_):
        part = of[given_ == g]
        shares = np.array([(part == v).mean() for v in np.unique(part)])
        total -= len(part) / len(of) * float((shares * np.log2(shares)).sum())
    return total


@settings(max_examples=60, deadline=None)
@given(maps)
def test_scores_equal_independent_implementations(pair: tuple[np.ndarray, np.ndarray]) -> None:
    true, predicted = pair
    scores = score_objects(true, predicted)
    iou = iou_matrix(true, predicted)
    assert (scores.true_objects, scores.predicted_objects) == iou.shape
    for threshold, f1, ap in ((0.5, scores.f1_50, scores.ap_50), (0.75, scores.f1_75, scores.ap_75)):
        found = matched_by_assignment(iou, threshold)
        wrong = sum(iou.shape) - 2 * len(found)
        if sum(iou.shape):
            assert f1 == pytest.approx(2 * len(found) / (2 * len(found) + wrong))
            assert ap == pytest.approx(len(found) / (len(found) + wrong))
        else:
            assert math.isnan(f1) and math.isnan(ap)
    found = matched_by_assignment(iou, 0.5)
    if sum(iou.shape):
        assert scores.pq == pytest.approx(found.sum() / (len(found) + 0.5 * (sum(iou.shape) - 2 * len(found))))
    inside = true != 0
    if inside.any():
        assert scores.adapted_rand_error == pytest.approx(rand_error_by_pairs(true, predicted), abs=1e-12)
        assert scores.voi_split == pytest.approx(conditional_entropy(predicted[inside], true[inside]), abs=1e-12)
        assert scores.voi_merge == pytest.approx(conditional_entropy(true[inside], predicted[inside]), abs=1e-12)
    else:
        assert math.isnan(scores.adapted_rand_error)


@settings(max_examples=30, deadline=None)
@given(maps, st.integers(1, 4))
def test_scores_do_not_depend_on_blocks(pair: tuple[np.ndarray, np.ndarray], edge: int) -> None:
    true, predicted = pair
    corners = itertools.product(*(range(0, n, edge) for n in true.shape))
    windows = [tuple(slice(c, c + edge) for c in corner) for corner in corners]
    np.testing.assert_equal(score_blocks((true[w], predicted[w]) for w in windows), score_objects(true, predicted))


def test_splitting_and_merging_are_told_apart() -> None:
    two = np.repeat([1, 2], 8)[None, None]
    one = np.ones_like(two)
    assert score_objects(one, two).voi_split == pytest.approx(1.0)
    assert score_objects(one, two).voi_merge == pytest.approx(0.0)
    assert score_objects(two, one).voi_merge == pytest.approx(1.0)
    assert score_objects(two, one).voi_split == pytest.approx(0.0)


def test_identical_maps_are_perfect_whatever_the_ids() -> None:
    rng = np.random.default_rng(3)
    true = rng.integers(0, 9, (4, 20, 20)).astype(np.uint16)
    renamed = np.append(np.uint64(0), rng.permutation(np.arange(1, 10)).astype(np.uint64) << np.uint64(40))
    predicted = renamed[true]
    scores = score_objects(true, predicted)
    assert (scores.f1_50, scores.f1_75, scores.ap_50, scores.ap_75, scores.pq) == (1, 1, 1, 1, 1)
    assert scores.adapted_rand_error == pytest.approx(0, abs=1e-12)
    assert scores.voi_split == pytest.approx(0, abs=1e-12)


def test_small_objects_can_be_left_out() -> None:
    true, predicted = np.zeros((1, 6, 6), np.uint8), np.zeros((1, 6, 6), np.uint8)
    true[0, :3], true[0, 5, 5] = 4, 9
    predicted[0, :3], predicted[0, 4, :2] = 1, 2
    assert score_blocks([(true, predicted)]).f1_50 == pytest.approx(0.5)
    scores = score_blocks([(true, predicted)], smallest=3)
    assert (scores.true_objects, scores.predicted_objects, scores.f1_50) == (1, 1, 1)


def test_thresholds_with_ambiguous_matches_are_refused() -> None:
    with pytest.raises(ValueError, match="not unique"):
        matching(np.array([0.4]), 1, 1, 0.3)


@settings(max_examples=40, deadline=None)
@given(maps)
def test_pair_counts_and_compaction(pair: tuple[np.ndarray, np.ndarray]) -> None:
    first, second = pair
    table = count_pairs(first, second)
    expected: dict[tuple[int, int], int] = {}
    for key in zip(first.ravel().tolist(), second.ravel().tolist(), strict=True):
        expected[key] = expected.get(key, 0) + 1
    assert {tuple(k): c for k, c in zip(table.ids_N2.tolist(), table.counts_N.tolist(), strict=True)} == expected
    doubled = add_pairs([table, table])
    assert (doubled.ids_N2 == table.ids_N2).all() and (doubled.counts_N == 2 * table.counts_N).all()
    ids, position = compact(second)
    assert ids[0] == 0 and (np.diff(ids.astype(object)) > 0).all()
    assert (ids[position] == second).all()
