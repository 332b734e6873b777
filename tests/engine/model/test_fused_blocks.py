"""Blocks with fused seams against the same blocks called one by one: forward and every gradient."""

import pytest
import torch

from affmae_engine.model.block import Block
from affmae_engine.model.fused_blocks import _branch_scales, run_blocks
from affmae_engine.model.norm import LayerNorm
from affmae_kernels.neighbourhoods import build_neighbourhoods

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")


def stage(dim=32, heads=2, depth=2, drop_path=0.0, tokens=37, batch=2, std=0.3):
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(Block(dim, heads, 2, drop_path, "triton") for _ in range(depth))
    norm = LayerNorm(dim)
    for parameter in (*blocks.parameters(), *norm.parameters()):
        torch.nn.init.normal_(parameter, std=std)
    pos = torch.stack([torch.randperm(96)[:tokens] for _ in range(batch)])
    pos = torch.stack([pos % 8, pos // 8], -1).int().to(DEVICE)
    _, near = build_neighbourhoods(pos, (12, 8), cluster_size=8, neighbours=16, backend="reference")
    feat = torch.randn(batch, tokens, dim, device=DEVICE)
    return blocks.to(DEVICE), norm.to(DEVICE), feat, near


def results(blocks, norm, feat, near, backend):
    feat = feat.detach().requires_grad_()
    for block in blocks:
        block.attention.backend = backend
    normed, out = run_blocks(blocks, norm, feat, near, backend)
    torch.manual_seed(1)
    loss = (normed * torch.randn_like(normed)).sum() + (out * torch.randn_like(out)).sum()
    parameters = [*blocks.parameters(), *norm.parameters()]
    names = [name for name, _ in (*blocks.named_parameters(), *norm.named_parameters())]
    gradients = torch.autograd.grad(loss, [feat, *parameters])
    return dict(zip(["normed", "out", "feat", *names], (normed, out, *gradients), strict=True))


def assert_close(found, exact, limit) -> None:
    for name, value in exact.items():
        assert torch.isfinite(found[name]).all(), name
        assert float((found[name] - value).detach().norm()) <= limit * float(value.detach().norm()), name


@pytest.mark.parametrize("tokens", [37, 5])
def test_forward_and_every_gradient(tokens) -> None:
    parts = stage(tokens=tokens)
    assert_close(results(*parts, "triton"), results(*parts, "reference"), 2e-5)


def test_only_the_normalised_features_are_used() -> None:
    blocks, norm, feat, near = stage(depth=1)
    for backend in ("triton", "reference"):
        for block in blocks:
            block.attention.backend = backend
        normed, _ = run_blocks(blocks, norm, feat, near, backend)
        gradients = torch.autograd.grad(normed.square().sum(), list(blocks.parameters()))
        if backend == "triton":
            found = gradients
    for mine, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_stochastic_depth_drops_whole_branches_of_whole_images(monkeypatch) -> None:
    blocks, norm, feat, near = stage(drop_path=0.5, batch=3, tokens=19)
    blocks.train()
    torch.manual_seed(5)
    scales = torch.stack(_branch_scales(list(blocks), feat))
    assert scales.shape == (4, 3) and set(scales.flatten().tolist()) == {0.0, 2.0}
    torch.manual_seed(5)
    found = results(blocks, norm, feat, near, "triton")
    # The plain blocks, given the very same draws.
    calls = iter(scales)
    monkeypatch.setattr(
        "affmae_engine.model.block.DropPath.forward", lambda self, branch: branch * next(calls)[:, None, None]
    )
    assert_close(found, results(blocks, norm, feat, near, "reference"), 2e-5)
    blocks.eval()
    assert _branch_scales(list(blocks), feat) is None


def test_the_share_of_kept_branches() -> None:
    blocks, _, _, _ = stage(drop_path=0.25, depth=3)
    blocks.train()
    torch.manual_seed(0)
    scales = torch.stack(_branch_scales(list(blocks), torch.empty(4000, 1, 1, device=DEVICE)))
    assert abs(float(scales.mean()) - 1) < 0.02 and float((scales == 0).float().mean()) == pytest.approx(0.25, abs=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_fp32_as_the_plain_blocks(dtype) -> None:
    blocks, norm, feat, near = stage(dim=128, heads=4, tokens=96, std=0.1)
    parts = blocks, norm, feat.to(dtype), near  # as stem and merging give them: the residual stream is `dtype` in both
    exact = results(blocks, norm, feat.to(dtype).float(), near, "reference")
    with torch.autocast("cuda", dtype):
        found, plain = results(*parts, "triton"), results(*parts, "reference")
    for name, value in exact.items():
        mine, theirs = (
            float((r[name].float() - value).detach().norm() / value.detach().norm()) for r in (found, plain)
        )
        assert mine < max(2 * theirs, 2e-3), (name, mine, theirs)


@pytest.mark.gpu
def test_two_runs_agree_to_the_bit() -> None:
    parts = stage(dim=128, heads=4, tokens=96)
    with torch.autocast("cuda", torch.bfloat16):
        first, second = results(*parts, "triton"), results(*parts, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)
