"""The Triton kernels of point attention against the reference in float64, forward and every gradient."""

import functools

import pytest
import torch
from torch import Tensor

from affmae_kernels.point_attention import NearestTable, nearest_table, point_attention, reference

triton_impl = pytest.importorskip("affmae_kernels.point_attention.triton_impl", reason="needs Triton")
triton_values = pytest.importorskip("affmae_kernels.point_attention.triton_values")
from affmae_kernels.point_attention.triton_sample import LaunchConfig, launch_config  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGEST_ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
HALF_ON_GPU = [torch.float32, *(pytest.param(d, marks=pytest.mark.gpu) for d in (torch.float16, torch.bfloat16))]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter, at NaN and infinity
NAMES = ("out", "value", "offset", "logit", "tau")


@pytest.fixture
def poison(monkeypatch) -> None:
    """New memory holds NaN, or large integers: what a kernel forgets to write shows."""

    def poisoned(make):
        def run(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else 2**30)

        return run

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))


@functools.cache
def table_of(cells: tuple[tuple[tuple[int, int], ...], ...], canvas: tuple[int, int]) -> NearestTable:
    """The interpreter is slow, and many tests ask the same tokens."""
    return nearest_table(torch.tensor(cells, dtype=torch.int32, device=DEVICE), canvas, backend="triton")


class Problem:
    """Random inputs; a test changes what it is about."""

    def __init__(self, scatter, canvas=(4, 5), tokens=6, queries=5, batch=2, heads=2, width=16, dtype=torch.float32):
        generator = torch.Generator().manual_seed(7)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE, dtype)

        self.canvas = canvas
        self.pos = scatter(batch, tokens, canvas, seed=3).to(DEVICE)
        self.query = scatter(batch, queries, canvas, seed=4).to(DEVICE)
        self.value = normal(batch, tokens, heads, width)
        self.offset = 2 * normal(batch, queries, heads, 4, 2)
        self.logit = normal(batch, queries, heads, 4)
        self.tau = torch.tensor([1.5], device=DEVICE)
        self.grad = normal(batch, queries, heads, width)

    @property
    def floats(self) -> list[Tensor]:
        return [self.value, self.offset, self.logit, self.tau]

    def run(self) -> tuple[Tensor, ...]:
        """Output and gradients of the kernels."""
        cells = tuple(tuple((x, y) for x, y in image) for image in self.pos.tolist())
        table = table_of(cells, self.canvas)
        leaves = [x.detach().requires_grad_() for x in self.floats]
        value, offset, logit, tau = leaves
        out = point_attention(value, self.pos, table, self.query, offset, logit, tau, self.canvas, backend="triton")
        return (out.detach(), *torch.autograd.grad(out, leaves, self.grad))

    def expected(self) -> tuple[Tensor, ...]:
        """The same in float64, at locations rounded to fp32, which decide about the cell; tau's gradient per sample."""
        location = self.query[:, :, None, None].float() + self.offset.float()
        offset = location.double() - self.query[:, :, None, None].double()
        tau = self.tau.double().reshape(1, 1, 1, 1, 1).expand(*self.logit.shape, 1)
        leaves = [x.detach().clone().requires_grad_() for x in (self.value.double(), offset, self.logit.double(), tau)]
        value, offset, logit, tau = leaves
        table = reference.nearest_table(self.pos, self.canvas)
        out = reference.point_attention(value, self.pos, table, self.query, offset, logit, tau, self.canvas)
        return (out.detach(), *torch.autograd.grad(out, leaves, self.grad.double()))

    def sharpness(self) -> float:
        """tau times the largest distance from the nearest token: an fp32 closeness has its rounding error."""
        location = self.query[:, :, None, None].float() + self.offset.float()
        table = reference.nearest_table(self.pos, self.canvas)
        row = reference._take(table, reference._cell(location, self.canvas))[..., 0]
        return (self.tau.relu() * (location - reference._take(self.pos, row.long())).norm(dim=-1)).max().item()

    def check(self) -> None:
        largest = max(LARGEST_ERROR[self.value.dtype], 8 * 2**-23 * self.sharpness())
        for name, got, expected in zip(NAMES, self.run(), self.expected(), strict=True):
            scale = expected.norm()
            if name == "tau":  # a sum that may cancel
                assert got.dtype == self.tau.dtype and got.shape == self.tau.shape
                got, expected, scale = got.sum(), expected.sum(), expected.abs().sum()
            else:
                assert got.dtype == self.value.dtype
            # Where the gradient vanishes, rounding of its terms remains.
            scale = max(scale, 0.01 * self.grad.double().norm())
            assert (got.double() - expected).norm() <= largest * scale, name


@pytest.mark.parametrize(("canvas", "tokens"), [((5, 13), 65), ((6, 2), 7), ((5, 3), 3), ((2, 4), 1), ((1, 140), 30)])
@pytest.mark.usefixtures("poison")
def test_tables(scatter, canvas, tokens) -> None:
    pos = scatter(2, tokens, canvas).to(DEVICE)
    table = nearest_table(pos, canvas, backend="triton")
    assert torch.equal(table.table_BT4, reference.nearest_table(pos, canvas))
    token = table.table_BT4.flatten(1).long()
    x, y = (pos.gather(1, token.clamp(min=0)[..., None].expand(-1, -1, 2))).unbind(-1)
    packed = torch.where(token >= 0, (token << 16) | (y << 8) | x, -1)
    assert torch.equal(table.packed_BT4.flatten(1), packed.int())
    for image in range(2):
        entries = table.entry_BE[image][table.entry_BE[image] >= 0].long()
        assert sorted(entries.tolist()) == (token[image] >= 0).nonzero().flatten().tolist()
        owner = token[image][entries]
        assert torch.equal(owner, owner.sort().values)
        starts = torch.searchsorted(owner, torch.arange(tokens, device=DEVICE))
        assert torch.equal(entries[starts], table.first_BN[image].long())


@pytest.mark.parametrize("dtype", HALF_ON_GPU)
@pytest.mark.parametrize(
    "shape",
    [
        {"tokens": 20, "queries": 20, "batch": 1},  # every cell a token and a query
        {"canvas": (3, 5), "tokens": 5, "queries": 15, "heads": 1, "width": 32},
        {"canvas": (9, 2), "tokens": 4, "queries": 1, "batch": 1, "width": 64},
        {"tokens": 3, "width": 128, "heads": 1},
        {"tokens": 2, "heads": 1},
        {"tokens": 1, "queries": 3, "batch": 1},
    ],
    ids=lambda shape: " ".join(f"{k} {v}" for k, v in shape.items()),
)
@pytest.mark.usefixtures("poison")
def test_shapes(scatter, shape, dtype) -> None:
    Problem(scatter, **shape, dtype=dtype).check()


@pytest.mark.parametrize("dtype", HALF_ON_GPU)
@pytest.mark.parametrize("offset", ["far", "pile", "whole", "half", "none"])
def test_locations(scatter, offset, dtype) -> None:
    problem = Problem(scatter, batch=1, queries=6, heads=1, dtype=dtype)
    if offset == "far":
        problem.offset *= 10
    elif offset == "pile":
        problem.offset = problem.offset.abs() + 20  # all beyond one corner
        problem.tau = torch.tensor([4.0], device=DEVICE)
    elif offset == "whole":
        problem.offset = problem.offset.round()
    elif offset == "half":
        problem.offset = problem.offset.round() + 0.5
    else:
        problem.query = problem.pos  # distance 0
        problem.offset.zero_()
    problem.check()


@pytest.mark.parametrize("tau", [-1.0, 0.0, 1e-3, 30.0, 500.0])
def test_tau(scatter, tau) -> None:
    problem = Problem(scatter, batch=1, queries=5, heads=1)
    problem.tau = torch.tensor(tau, device=DEVICE)
    problem.check()
    if tau <= 0:
        assert problem.run()[4] == 0


def test_logits_far_apart(scatter) -> None:
    problem = Problem(scatter, batch=1, queries=5, heads=1)
    problem.logit = (1000 * problem.logit.sign() + problem.logit).contiguous()
    problem.check()


def test_inputs_that_are_not_contiguous(scatter) -> None:
    problem = Problem(scatter)
    straight = problem.run()
    for name in ("value", "offset", "logit", "grad", "pos", "query"):
        tensor = getattr(problem, name)
        setattr(problem, name, tensor.transpose(0, -1).contiguous().transpose(0, -1))
        assert not getattr(problem, name).is_contiguous()
    for got, expected in zip(problem.run(), straight, strict=True):
        assert torch.equal(got, expected)


def test_locations_that_are_not_finite(scatter) -> None:
    problem = Problem(scatter)
    clean = problem.run()
    problem.offset[0, 0, 0, 0, 0] = torch.nan
    problem.offset[0, 1, 0, 2, 1] = -torch.inf
    problem.offset[0, 2, 0, 3, 0] = 3e38
    out, dvalue, doffset, dlogit, dtau = problem.run()
    assert out[0, :3, 0].isnan().all() and dlogit[0, :3, 0].isnan().any(-1).all() and dtau.isnan()
    assert dvalue[0, :, 0].isnan().all(), "values of that image and head"
    hit = torch.zeros_like(out[..., 0], dtype=torch.bool)
    hit[0, :3, 0] = True
    for got, expected in ((out, clean[0]), (doffset, clean[2]), (dlogit, clean[3])):
        assert torch.equal(got[~hit], expected[~hit])
    assert torch.equal(dvalue[:, :, 1], clean[1][:, :, 1]) and torch.equal(dvalue[1], clean[1][1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_that_are_not_finite(scatter, dtype) -> None:
    problem = Problem(scatter, dtype=dtype)
    clean = problem.run()
    for number in (torch.nan, -torch.inf):
        problem.grad[1, 2, 1, 3] = number
        _, dvalue, _, dlogit, _ = problem.run()
        assert dvalue[1, :, 1].isnan().all() and not torch.isfinite(dlogit[1, 2, 1]).all()
        assert torch.equal(dvalue[0], clean[1][0]) and torch.equal(dvalue[:, :, 0], clean[1][:, :, 0])


def test_zero_gradients_give_zero(scatter) -> None:
    problem = Problem(scatter, queries=3)
    problem.grad.zero_()
    assert all((gradient == 0).all() for gradient in problem.run()[1:])


def listed(weights: Tensor, grad_1Q1D: Tensor, order: Tensor) -> Tensor:
    """The values' gradient of one token whose list holds query r // 4 with weights[r], in the given order."""
    queries = grad_1Q1D.shape[1]
    query = torch.arange(4 * queries, device=DEVICE) // 4
    if grad_1Q1D.dtype == torch.float32:
        references = (query << 32) | weights.view(torch.int32).long()
    else:
        references = ((query << 16) | (weights * 65535 + 0.5).int()).int()
    ints = {"dtype": torch.int32, "device": DEVICE}
    nothing = torch.empty(0, device=DEVICE)
    problem = triton_values.Problem(
        grad_1Q1D,
        grad_1Q1D.new_zeros(1, 1, 1, 16),
        *[nothing] * 4,
        grad_1Q1D.new_zeros(1, queries, 1, 4, 2),
        *[nothing] * 2,
        1,
        1,
    )
    top = grad_1Q1D.float().abs().amax().view(1).view(torch.int32)
    begin = torch.tensor([[[0, 4 * queries]]], **ints)
    return triton_values.gradient_of_values(
        problem, LaunchConfig(4, 8, 1, 64), references[order].view(1, 1, -1), begin, top
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_lists_neither_overflow_nor_depend_on_their_order(dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = 1024
    ones = torch.ones(4 * queries, device=DEVICE)
    largest = torch.full((1, queries, 1, 16), 1.99, device=DEVICE, dtype=dtype)
    forward = torch.arange(4 * queries, device=DEVICE)
    total = listed(ones, largest, forward).double()
    torch.testing.assert_close(total, 4 * queries * largest[:, :1].double(), rtol=LARGEST_ERROR[dtype], atol=0)
    weights = torch.rand(4 * queries, generator=generator).to(DEVICE)
    grad = torch.randn(1, queries, 1, 16, generator=generator).to(DEVICE, dtype)
    total = listed(weights, grad, forward)
    expected = (weights.double().view(-1, 4).sum(1) @ grad[0, :, 0].double()).view_as(total)
    assert (total.double() - expected).norm() < LARGEST_ERROR[dtype] * expected.norm()
    assert torch.equal(total, listed(weights, grad, torch.randperm(4 * queries, generator=generator).to(DEVICE)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_equal_to_the_bit_and_right(scatter, dtype) -> None:
    large = {"canvas": (64, 64), "tokens": 819, "queries": 2048} if DEVICE == "cuda" else {}
    problem = Problem(scatter, **large, dtype=dtype)
    for first, second in zip(problem.run(), problem.run(), strict=True):
        assert torch.equal(first, second)
    problem.check()


@pytest.mark.parametrize("dtype", [pytest.param(d, marks=pytest.mark.gpu) for d in LARGEST_ERROR])
@pytest.mark.parametrize(("tokens", "queries"), [(2048, 2048), (819, 2048), (130, 2048), (819, 4096)])
def test_production_sizes(scatter, tokens, queries, dtype) -> None:
    Problem(scatter, (64, 64), tokens, queries, 2, 6, 64, dtype).check()


def test_compiles_into_one_graph(scatter) -> None:
    problem = Problem(scatter, batch=1, queries=3)

    def loss(value: Tensor, offset: Tensor, logit: Tensor, tau: Tensor) -> Tensor:
        table = nearest_table(problem.pos, problem.canvas, backend="triton")
        asked = (value, problem.pos, table, problem.query, offset, logit, tau, problem.canvas)
        return (point_attention(*asked, backend="triton") * problem.grad).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    leaves = [x.detach().requires_grad_() for x in problem.floats]
    gradients = torch.autograd.grad(compiled(*leaves), leaves)
    for got, expected in zip(gradients, problem.run()[1:], strict=True):
        assert torch.equal(got, expected)


def test_operators_keep_their_promises(scatter) -> None:
    problem = Problem(scatter, batch=1, queries=3, heads=1)
    table = nearest_table(problem.pos, problem.canvas, backend="triton")
    tables = (table.packed_BT4, table.entry_BE, table.first_BN)
    leaves = [x.detach().requires_grad_() for x in problem.floats]
    args = (leaves[0], *tables, problem.query, *leaves[1:], *problem.canvas)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(triton_impl.point_attention, args, test_utils=tests)
    plain = [x.detach() if isinstance(x, Tensor) else x for x in args]
    torch.library.opcheck(triton_impl.point_attention_backward, (problem.grad, *plain), test_utils=tests)


def test_what_the_kernels_do_not_take_is_named(scatter) -> None:
    problem = Problem(scatter, width=24, queries=3)
    with pytest.raises(ValueError, match="a head width of 24"):
        problem.run()
    with pytest.raises(ValueError, match="a canvas of 300 x 8"):
        nearest_table(problem.pos, (300, 8), backend="triton")
    table = nearest_table(problem.pos, problem.canvas, backend="reference")
    asked = (problem.value, problem.pos, table, problem.query, *problem.floats[1:], problem.canvas)
    with pytest.raises(ValueError, match="a table that the reference made"):
        point_attention(*asked, backend="triton")


def test_launch_configuration() -> None:
    assert launch_config(2048, 2048, 128) == LaunchConfig(4, 8, 4, 8)
    assert launch_config(2048, 819, 128) == LaunchConfig(4, 8, 1, 32)
    assert launch_config(2048, 130, 128) == LaunchConfig(4, 8, 1, 64)
    assert launch_config(2048, 2048, 64) == LaunchConfig(8, 8, 8, 8)
    assert launch_config(2048, 2048, 256) == LaunchConfig(2, 4, 4, 4)
