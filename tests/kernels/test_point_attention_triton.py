"""The Triton kernels of point attention against the reference in float64, forward and every gradient."""

import functools

import pytest
import torch
from torch import Tensor

from affmae_kernels.point_attention import NearestTable, nearest_table, point_attention, reference

triton = pytest.importorskip("affmae_kernels.point_attention.triton", reason="needs Triton")
from affmae_kernels.point_attention.triton_backward import EdgeLists, sum_edges  # noqa: E402
from affmae_kernels.point_attention.triton_sample import LaunchConfig, in_rows, launch_config, row_stride  # noqa: E402
from affmae_kernels.point_attention.triton_table import FIRST_OF_TOKEN  # noqa: E402

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
        marked = table.entry_BE[image][table.entry_BE[image] >= 0].long()
        entries = marked & (FIRST_OF_TOKEN.value - 1)
        assert sorted(entries.tolist()) == (token[image] >= 0).nonzero().flatten().tolist()
        owner = token[image][entries]
        assert torch.equal(owner, owner.sort().values)
        starts = torch.searchsorted(owner, torch.arange(tokens, device=DEVICE))
        assert torch.equal(starts, (marked >= FIRST_OF_TOKEN.value).nonzero().flatten())


@pytest.mark.usefixtures("poison")
def test_one_token(scatter) -> None:
    Problem(scatter, tokens=1, queries=3, batch=1).check()


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


def listed(weights: Tensor, grad_1Q1D: Tensor, order: Tensor, dtau_P: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The values' gradient of one token whose list holds query r // 4 with weights[r], in the given order; and the sum
    of the parts of tau's gradient."""
    queries = grad_1Q1D.shape[1]
    query = torch.arange(4 * queries, device=DEVICE) // 4
    if grad_1Q1D.dtype == torch.float32:
        edges = (query << 32) | weights.view(torch.int32).long()
    else:
        edges = ((query << 16) | (weights * 65535 + 0.5).int()).int()
    ints = {"dtype": torch.int32, "device": DEVICE}
    dvalue_111D, dtau = grad_1Q1D.new_empty(1, 1, 1, 16), torch.empty(1, device=DEVICE)
    lists = EdgeLists(
        rank_BQHS=torch.empty(0, **ints),
        place_BHE=torch.empty(0, **ints),
        begin_BHN=torch.tensor([0, 4 * queries], **ints),
        top_BH=grad_1Q1D.float().abs().amax().view(1).view(torch.int32),
    )
    sum_edges(
        grad_1Q1D,
        edges[order].view(1, 1, -1),
        lists,
        torch.zeros(1, device=DEVICE) if dtau_P is None else dtau_P,
        LaunchConfig(4, 8, 1, 64),
        dvalue_BNHD=dvalue_111D,
        dtau=dtau,
    )
    return dvalue_111D, dtau


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_lists_neither_overflow_nor_depend_on_their_order(dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = 1024
    ones = torch.ones(4 * queries, device=DEVICE)
    largest = torch.full((1, queries, 1, 16), 1.99, device=DEVICE, dtype=dtype)
    forward = torch.arange(4 * queries, device=DEVICE)
    total = listed(ones, largest, forward)[0].double()
    torch.testing.assert_close(total, 4 * queries * largest[:, :1].double(), rtol=LARGEST_ERROR[dtype], atol=0)
    weights = torch.rand(4 * queries, generator=generator).to(DEVICE)
    grad = torch.randn(1, queries, 1, 16, generator=generator).to(DEVICE, dtype)
    total = listed(weights, grad, forward)[0]
    expected = (weights.double().view(-1, 4).sum(1) @ grad[0, :, 0].double()).view_as(total)
    assert (total.double() - expected).norm() < LARGEST_ERROR[dtype] * expected.norm()
    assert torch.equal(total, listed(weights, grad, torch.randperm(4 * queries, generator=generator).to(DEVICE))[0])


@pytest.mark.parametrize("parts", [1, 256, 700])
def test_all_parts_of_the_gradient_of_tau_are_summed(parts) -> None:
    dtau_P = torch.arange(1.0, parts + 1, device=DEVICE)
    one = torch.ones(4, device=DEVICE)
    _, dtau = listed(one, torch.ones(1, 1, 1, 16, device=DEVICE), torch.arange(4, device=DEVICE), dtau_P)
    assert dtau.item() == parts * (parts + 1) / 2


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


def test_slices_of_one_matrix(scatter) -> None:
    problem = Problem(scatter, tokens=5, queries=5)
    table = nearest_table(problem.pos, problem.canvas, backend="triton")
    rest = table, problem.query, problem.tau, problem.canvas
    features = problem.value, problem.offset, problem.logit

    def gradients(value: Tensor, offset: Tensor, logit: Tensor, into: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        dvalue, doffset, dlogit = into
        given = {"dvalue_BNHD": dvalue, "doffset_BQHS2": doffset, "dlogit_BQHS": dlogit}
        return *into, triton.backward(problem.grad, value, offset, logit, *rest, **given)

    def slices() -> tuple[Tensor, ...]:
        """Of rows of 60 columns, 4 of them unused."""
        wide = torch.zeros(2, 5, 60, device=DEVICE)
        widths = [x[0, 0].numel() for x in features]
        parts = wide.split([*widths, 60 - sum(widths)], -1)[:3]
        return tuple(part.unflatten(-1, x.shape[2:]) for part, x in zip(parts, features, strict=True))

    sliced = tuple(part.copy_(x) for part, x in zip(slices(), features, strict=True))
    assert all(in_rows(part)[0] is part for part in sliced), "no copies"
    assert torch.equal(triton.forward(*sliced, *rest), triton.forward(*features, *rest))
    expected = gradients(*features, into=tuple(torch.empty_like(x) for x in features))
    for got, straight in zip(gradients(*sliced, into=slices()), expected, strict=True):
        assert torch.equal(got, straight)
    with pytest.raises(ValueError, match="dlogit_BQHS must have dense rows"):
        dvalue, doffset, dlogit = slices()
        gradients(*features, into=(dvalue, doffset, dlogit.transpose(0, 1).contiguous().transpose(0, 1)))


def test_row_stride() -> None:
    wide = torch.empty(2, 3, 20)
    assert row_stride(wide) == row_stride(wide[..., 4:12].unflatten(-1, (2, 4))) == 20
    assert row_stride(wide[:, :2]) is None and row_stride(wide[:, :1]) == 60 and row_stride(wide[:1, :1]) == 20
    assert row_stride(wide.transpose(0, 1)) is None and row_stride(wide.transpose(1, 2)) is None
    assert row_stride(torch.empty(1, 1, 8).expand(2, 3, 8)) is None


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    batch, tokens, heads, width, canvas = 1400, 4096, 6, 64, (64, 64)
    assert batch * tokens * heads * width > 2**31
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    random = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, tokens, *shape, generator=random, device=DEVICE, dtype=torch.bfloat16)

    index = torch.rand(batch, tokens, generator=random, device=DEVICE).argsort(1)
    pos = torch.stack([index % canvas[1], index // canvas[1]], -1).int()
    tensors = pos, normal(heads, width), normal(heads, 4, 2), normal(heads, 4), normal(heads, width)

    def run(pos: Tensor, value: Tensor, offset: Tensor, logit: Tensor, grad: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (value, offset, logit)]
        table = nearest_table(pos, canvas, backend="triton")
        tau = torch.tensor([2.0], device=DEVICE)
        out = point_attention(leaves[0], pos, table, pos, *leaves[1:], tau, canvas, backend="triton")
        return [out.detach()[-1], *(x[-1] for x in torch.autograd.grad(out, leaves, grad))]

    for all_images, alone in zip(run(*tensors), run(*(x[-1:] for x in tensors)), strict=True):
        assert torch.equal(all_images, alone)


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
