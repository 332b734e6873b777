"""The table and the interpolation against slow readings of the specification; gradients in float64."""

import pytest
import torch

import affmae_kernels.point_attention.reference as reference
from affmae_kernels.point_attention import NearestTable, nearest_table, point_attention


def slow_table(points: list[tuple[int, int]], canvas: tuple[int, int]) -> list[list[int]]:
    h, w = canvas
    table = []
    for cell in range(h * w):
        cx, cy = cell % w, cell // w
        rows = sorted(
            range(len(points)),
            key=lambda i: ((points[i][0] - cx) ** 2 + (points[i][1] - cy) ** 2, points[i][1] * w + points[i][0]),
        )[:4]
        table.append(rows + [-1] * (4 - len(rows)))
    return table


@pytest.mark.parametrize(
    ("canvas", "tokens"),
    [((8, 8), 20), ((5, 13), 65), ((11, 3), 7), ((6, 6), 4), ((6, 6), 3), ((4, 7), 1), ((1, 9), 5)],
)
def test_table_equals_brute_force(scatter, canvas, tokens) -> None:
    pos = scatter(2, tokens, canvas)
    table = nearest_table(pos, canvas).table_BT4
    assert table.dtype == torch.int32
    for image in range(2):
        assert table[image].tolist() == slow_table([tuple(p) for p in pos[image].tolist()], canvas)


def test_table_in_tiles_and_in_int64_is_the_same(scatter, monkeypatch) -> None:
    pos = scatter(2, 30, (9, 12))
    table = nearest_table(pos, (9, 12)).table_BT4
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 1500)
    assert torch.equal(nearest_table(pos, (9, 12)).table_BT4, table)
    wide = torch.tensor([[[0, 0], [1999, 0], [0, 299], [1000, 150], [1001, 150]]], dtype=torch.int32)
    assert nearest_table(wide, (300, 2000)).table_BT4[0, 150 * 2000 + 1000].tolist() == [3, 4, 1, 2]


def inputs(scatter, batch=2, tokens=20, queries=7, heads=2, width=3, canvas=(7, 9), dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    pos, query = scatter(batch, tokens, canvas, seed=3), scatter(batch, queries, canvas, seed=4)
    offset = (normal(batch, queries, heads, 4, 2) * 2).detach().requires_grad_()
    floats = [normal(batch, tokens, heads, width), offset, normal(batch, queries, heads, 4), normal(1)]
    floats[3] = (floats[3].detach().abs() + 0.5).requires_grad_()
    return pos, query, nearest_table(pos, canvas), floats, canvas


def attend(pos, query, table, floats, canvas):
    value, offset, logit, tau = floats
    return point_attention(value, pos, table, query, offset, logit, tau, canvas)


@pytest.mark.parametrize("tokens", [20, 3, 1])
def test_equals_a_loop(scatter, tokens) -> None:
    pos, query, table, floats, canvas = inputs(scatter, tokens=tokens)
    value, offset, logit, tau = (x.detach() for x in floats)
    out = attend(pos, query, table, [value, offset, logit, tau], canvas)
    for b, q, a in [(0, 0, 0), (1, 3, 1), (0, 6, 1), (1, 5, 0)]:
        expected = torch.zeros(3, dtype=torch.float64)
        mix = logit[b, q, a].softmax(0)
        points = [tuple(p) for p in pos[b].tolist()]
        nearest = slow_table(points, canvas)
        for s in range(4):
            x, y = (query[b, q].double() + offset[b, q, a, s]).tolist()
            column, row = min(max(round(x), 0), canvas[1] - 1), min(max(round(y), 0), canvas[0] - 1)
            rows = [i for i in nearest[row * canvas[1] + column] if i >= 0]
            distance = torch.tensor([((x - points[i][0]) ** 2 + (y - points[i][1]) ** 2) ** 0.5 for i in rows])
            expected += mix[s] * ((-tau.relu() * distance.double()).softmax(0) @ value[b, rows, a])
        torch.testing.assert_close(out[b, q, a], expected, rtol=1e-6, atol=1e-7)


def test_gradients_of_all_inputs(scatter) -> None:
    pos, query, table, floats, canvas = inputs(scatter, queries=4)
    assert torch.autograd.gradcheck(lambda *x: attend(pos, query, table, list(x), canvas), floats)


def test_negative_tau_means_no_preference_and_no_gradient(scatter) -> None:
    pos, query, table, floats, canvas = inputs(scatter)
    floats[3] = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    out = attend(pos, query, table, floats, canvas)
    out.square().sum().backward()
    assert floats[3].grad == 0
    zero = attend(pos, query, table, [*floats[:3], torch.zeros(1, dtype=torch.float64)], canvas)
    torch.testing.assert_close(out, zero)


def test_constant_values_stay_constant(scatter) -> None:
    pos, query, table, floats, canvas = inputs(scatter, dtype=torch.float32)
    floats[0] = torch.full_like(floats[0], 3.25)
    out = attend(pos, query, table, floats, canvas)
    torch.testing.assert_close(out, torch.full_like(out, 3.25))


def test_samples_on_tokens_have_zero_distance_gradient(scatter) -> None:
    pos, _, table, floats, canvas = inputs(scatter, queries=20)
    offset = torch.zeros(2, 20, 2, 4, 2, dtype=torch.float64, requires_grad=True)
    one = torch.zeros_like(floats[0][:, :, :, :1])  # value 1 at the asked token alone: only its own distance matters
    value = floats[0].detach()
    logit = torch.zeros(2, 20, 2, 4, dtype=torch.float64)
    out = point_attention(value, pos, table, pos, offset, logit, floats[3], canvas)
    out.square().sum().backward()
    assert torch.isfinite(offset.grad).all() and torch.isfinite(floats[3].grad).all()
    lonely = torch.tensor([[[2, 3]]], dtype=torch.int32).expand(2, -1, -1)
    offset = torch.zeros(2, 1, 2, 4, 2, dtype=torch.float64, requires_grad=True)
    out = point_attention(
        one[:, :1] + 1, lonely, nearest_table(lonely, canvas), lonely, offset, logit[:, :1], floats[3], canvas
    )
    out.sum().backward()
    assert (offset.grad == 0).all()
    distance_input = torch.zeros(3, 2, requires_grad=True)
    reference._distance(distance_input).sum().backward()
    assert (distance_input.grad == 0).all()


def test_locations_far_outside_use_the_border_cell_and_the_true_distance(scatter) -> None:
    pos = torch.tensor([[[0, 0], [8, 0], [8, 6], [0, 6], [4, 3]]], dtype=torch.int32)
    table = nearest_table(pos, (7, 9))
    value = torch.arange(5.0).view(1, 5, 1, 1)
    offset = torch.full((1, 1, 1, 4, 2), 1000.0)
    out = point_attention(
        value,
        pos,
        table,
        torch.zeros(1, 1, 2, dtype=torch.int32),
        offset,
        torch.zeros(1, 1, 1, 4),
        torch.ones(1),
        (7, 9),
    )
    torch.testing.assert_close(out.flatten(), torch.tensor([2.0]), atol=0.1, rtol=0)


def test_non_finite_offsets_neither_crash_nor_vanish(scatter) -> None:
    pos, query, table, floats, canvas = inputs(scatter, dtype=torch.float32)
    offset = floats[1].detach().clone()
    offset[0, 0, 0, 0] = torch.nan
    offset[0, 1, 0, 0] = torch.inf
    out = attend(pos, query, table, [floats[0], offset, *floats[2:]], canvas)
    assert out[0, 0, 0].isnan().all() and torch.isfinite(out[1]).all()


def test_halves_round_to_even() -> None:
    locations = torch.tensor([[0.5, 1.5], [2.5, -0.5], [3.5, 7.0]])
    assert reference._cell(locations, (4, 5)).tolist() == [2 * 5 + 0, 2, 3 * 5 + 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_values_under_autocast(scatter, dtype) -> None:
    pos, query, table, floats, canvas = inputs(scatter, dtype=torch.float32)
    half = [x.detach().to(dtype).requires_grad_() for x in floats[:3]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(pos, query, table, [*half, floats[3]], canvas)
    assert out.dtype == dtype
    exact = attend(pos, query, table, [x.float() for x in half] + [floats[3]], canvas)
    torch.testing.assert_close(out, exact.to(dtype))
    out.float().sum().backward()
    assert all(torch.isfinite(x.grad).all() and x.grad.dtype == dtype for x in half)


def test_wrong_shapes_are_named(scatter) -> None:
    pos, query, table, floats, canvas = inputs(scatter)
    with pytest.raises(ValueError, match=r"table_BT4 must be \[2, 63, 4\].*7 x 9; got \[2, 62, 4\]"):
        attend(pos, query, NearestTable(table.table_BT4[:, 1:]), floats, canvas)
    with pytest.raises(ValueError, match=r"logit_BQHS must be \[2, 7, 2, 4\].*got \[2, 7, 2, 3\]"):
        attend(pos, query, table, [floats[0], floats[1], floats[2][..., :3], floats[3]], canvas)
    with pytest.raises(ValueError, match=r"tau must be one number; got \[2\]"):
        attend(pos, query, table, [*floats[:3], torch.ones(2)], canvas)
    with pytest.raises(ValueError, match="float32"):
        nearest_table(pos.float(), canvas)
