"""The order and the nearest clusters against a slow reading of the specification in whole numbers and fractions."""

from fractions import Fraction
from math import sqrt

import pytest
import torch

import affmae_kernels.neighbourhoods.reference as reference
from affmae_kernels.neighbourhoods import build_neighbourhoods

CASES = [
    pytest.param((8, 8), 32, 8, id="square"),
    pytest.param((7, 13), 50, 8, id="wide-short-last-cluster"),
    pytest.param((31, 5), 101, 8, id="tall"),
    pytest.param((9, 9), 81, 8, id="full-canvas"),
    pytest.param((12, 10), 60, 4, id="clusters-of-4"),
    pytest.param((6, 6), 7, 8, id="one-short-cluster"),
    pytest.param((1, 40), 33, 8, id="one-row"),
    pytest.param((5, 4), 16, 8, id="two-cells"),
    pytest.param((3, 3), 1, 8, id="one-token"),
    pytest.param((16, 16), 130, 8, id="sparse"),
]


def slow_order(points: list[tuple[int, int]], canvas: tuple[int, int], m: int) -> list[int]:
    """Method 3.1, one token at a time; distances as exact fractions, the ratio as one float64 division."""
    h, w = canvas
    edge = sqrt(h * w / -(-len(points) // m))
    rows, columns = max(1, round(h / edge)), max(1, round(w / edge))

    def canvas_index(p: tuple[int, int]) -> int:
        return p[1] * w + p[0]

    if rows * columns < 3:
        return sorted(range(len(points)), key=lambda i: canvas_index(points[i]))
    walk = []
    for r in range(rows):
        cells = [(c, r) for c in range(columns)]
        walk += cells if r % 2 == 0 else cells[::-1]
    centres = [
        ((c + Fraction(1, 2)) * Fraction(w, columns) - Fraction(1, 2),
         (r + Fraction(1, 2)) * Fraction(h, rows) - Fraction(1, 2))
        for c, r in walk
    ]  # fmt: skip
    first, second, last, before_last = centres[0], centres[1], centres[-1], centres[-2]
    before = (2 * first[0] - second[0], 2 * first[1] - second[1])
    after = (2 * last[0] - before_last[0], 2 * last[1] - before_last[1])
    centres = [before, *centres, after]
    unit = 2 * rows * columns

    def key(i: int) -> tuple[int, float, int]:
        x, y = points[i]
        step = walk.index((x * columns // w, y * rows // h))
        (px, py), (nx, ny) = centres[step], centres[step + 2]
        near = ((x - px) ** 2 + (y - py) ** 2) * unit**2
        far = ((x - nx) ** 2 + (y - ny) ** 2) * unit**2
        assert near.denominator == far.denominator == 1
        return step, int(near) / (int(far) + 1e-5 * unit**2), canvas_index((x, y))

    return sorted(range(len(points)), key=key)


def slow_nearest(points: list[tuple[int, int]], m: int, count: int) -> list[list[int]]:
    """Method 3.2 by exact fractions, ties to the lower cluster index."""
    clusters = [points[i : i + m] for i in range(0, len(points), m)]
    result = []
    for x, y in points:
        distance = [
            Fraction((len(c) * x - sum(p[0] for p in c)) ** 2 + (len(c) * y - sum(p[1] for p in c)) ** 2, len(c) ** 2)
            for c in clusters
        ]
        result.append(sorted(range(len(clusters)), key=lambda k: (distance[k], k))[:count])
    return result


@pytest.mark.parametrize(("canvas", "tokens", "m"), CASES)
def test_order_and_nearest_equal_the_specification(scatter, canvas, tokens, m) -> None:
    pos = scatter(2, tokens, canvas, seed=tokens)
    order, near = build_neighbourhoods(pos, canvas, cluster_size=m, neighbours=2 * m)
    for image in range(2):
        points = [tuple(p) for p in pos[image].tolist()]
        expected = slow_order(points, canvas, m)
        assert order[image].tolist() == expected
        ordered = [points[i] for i in expected]
        assert [tuple(p) for p in near.pos_BN2[image].tolist()] == ordered
        assert near.nearest_BNC[image].tolist() == slow_nearest(ordered, m, 2)


def test_full_grid_has_many_ties_and_all_go_to_the_lower_cluster() -> None:
    canvas = (16, 16)
    pos = torch.stack([torch.arange(256) % 16, torch.arange(256) // 16], -1).int()[None]
    _, near = build_neighbourhoods(pos, canvas)
    points = [tuple(p) for p in near.pos_BN2[0].tolist()]
    assert near.nearest_BNC[0].tolist() == slow_nearest(points, 8, 8)


@pytest.mark.parametrize(("canvas", "tokens", "m"), CASES)
def test_clusters_are_balanced_and_hold_every_token_once(scatter, canvas, tokens, m) -> None:
    pos = scatter(1, tokens, canvas)
    order, near = build_neighbourhoods(pos, canvas, cluster_size=m, neighbours=1024 * m)
    assert sorted(order[0].tolist()) == list(range(tokens))
    assert near.count == -(-tokens // m)
    index, valid = near.members_BNM()
    # With enough clusters allowed, the neighbourhood of every token is every token, once.
    for row in range(tokens):
        assert sorted(index[0, row][valid[0, row]].tolist()) == list(range(tokens))
    sizes = torch.bincount(torch.arange(tokens) // m)
    assert (sizes[:-1] == m).all() and 1 <= sizes[-1] <= m


def test_result_does_not_depend_on_the_order_of_the_tokens(scatter) -> None:
    pos = scatter(3, 75, (11, 14))
    shuffled = torch.stack([p[torch.randperm(75)] for p in pos])
    _, one = build_neighbourhoods(pos, (11, 14))
    order, other = build_neighbourhoods(shuffled, (11, 14))
    assert torch.equal(one.pos_BN2, other.pos_BN2) and torch.equal(one.nearest_BNC, other.nearest_BNC)
    assert torch.equal(torch.gather(shuffled, 1, order[..., None].expand(-1, -1, 2)), other.pos_BN2)


def test_images_do_not_depend_on_their_batch_mates(scatter) -> None:
    pos = scatter(4, 60, (10, 9))
    _, together = build_neighbourhoods(pos, (10, 9), neighbours=24)
    for image in range(4):
        _, alone = build_neighbourhoods(pos[image : image + 1], (10, 9), neighbours=24)
        assert torch.equal(alone.nearest_BNC[0], together.nearest_BNC[image])


def test_tiles_change_nothing(scatter, monkeypatch) -> None:
    pos = scatter(2, 90, (12, 12))
    _, whole = build_neighbourhoods(pos, (12, 12), neighbours=32)
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 1000)
    _, tiled = build_neighbourhoods(pos, (12, 12), neighbours=32)
    assert torch.equal(whole.nearest_BNC, tiled.nearest_BNC)


def test_dtypes_and_shapes(scatter) -> None:
    order, near = build_neighbourhoods(scatter(2, 40, (9, 9)), (9, 9), neighbours=16)
    assert order.dtype == torch.int64 and near.pos_BN2.dtype == near.nearest_BNC.dtype == torch.int32
    assert near.nearest_BNC.shape == (2, 40, 2) and near.members_BNM()[0].shape == (2, 40, 16)


def test_geometry_has_zero_ratios_at_zero_distance() -> None:
    features = reference.relative_geometry(torch.tensor([[0.0, 0.0], [3.0, -4.0]]))
    assert features.tolist() == [[0, 0, 0, 0, 0], pytest.approx([3, -4, 5, -0.8, 0.6])]


@pytest.mark.parametrize(
    ("pos", "options", "message"),
    [
        (torch.zeros(2, 5, 3, dtype=torch.int32), {}, r"\(2, 5, 3\)"),
        (torch.zeros(2, 5, 2), {}, "float32"),
        (torch.zeros(2, 0, 2, dtype=torch.int32), {}, r"\(2, 0, 2\)"),
        (torch.zeros(1, 17, 2, dtype=torch.int32), {}, "17 tokens do not fit on a canvas of 4 x 4"),
        (torch.zeros(1, 5, 2, dtype=torch.int32), {"neighbours": 60}, r"neighbours \(60\).*multiple.*\(8\)"),
        (torch.zeros(1, 5, 2, dtype=torch.int32), {"backend": "cuda"}, "auto, triton, reference; got 'cuda'"),
    ],
)
def test_wrong_input_is_named(pos, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        build_neighbourhoods(pos, (4, 4), **options)


def test_keys_that_would_leave_int64_are_refused() -> None:
    with pytest.raises(ValueError, match="int64"):
        build_neighbourhoods(
            torch.zeros(1, 5, 2, dtype=torch.int32), (2**20, 2**20), cluster_size=2**8, neighbours=2**8
        )
