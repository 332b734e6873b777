"""The decoder's position code, the start of its offsets, and its steps."""

import math

import pytest
import torch

from affmae_engine.config import ModelConfig
from affmae_engine.model.decoder import Decoder, PointAttention, position_code
from affmae_engine.model.encoder import StageOutput


@pytest.mark.parametrize(("canvas", "position"), [((7, 11), (3, 6)), ((5, 1), (0, 4)), ((4, 4), (3, 0))])
def test_position_code_equals_its_formula(canvas, position) -> None:
    dim = 24
    code = position_code(canvas, dim, torch.device("cpu"))
    assert code.shape == (canvas[0] * canvas[1], dim)
    embedding = code[position[1] * canvas[1] + position[0]]
    expected = []
    for value, cells in zip(position, reversed(canvas), strict=True):
        u = 2 * math.pi * value / max(cells - 1, 1)
        phase = [u * 10000 ** (-2 * (i // 2) / (dim // 2)) for i in range(dim // 2)]
        expected += [math.sin(p) for p in phase[0::2]] + [math.cos(p) for p in phase[1::2]]
    torch.testing.assert_close(embedding, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_offsets_start_on_rings() -> None:
    layer = PointAttention(384, 6)
    assert not layer.offset.weight.any() and not layer.logit.weight.any() and not layer.logit.bias.any()
    offset = layer.offset.bias.detach().view(6, 4, 2)
    for head in range(6):
        angle = 2 * math.pi * head / 6
        x, y = math.cos(angle), math.sin(angle)
        scale = max(abs(x), abs(y))
        for sample in range(4):
            expected = torch.tensor([x / scale, y / scale]) * (sample + 1)
            torch.testing.assert_close(offset[head, sample], expected, atol=1e-5, rtol=0)
    assert layer.tau.tolist() == [2.0]


def test_steps_ask_the_coarsest_stage_first() -> None:
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig(size="tiny")).eval()
    generator = torch.Generator().manual_seed(1)
    stages = [
        StageOutput(torch.randn(1, n, c, generator=generator), torch.tensor([[[i, i] for i in range(n)]]).int())
        for n, c in zip((8, 4, 2, 1), (32, 64, 96, 96), strict=True)
    ]
    query = torch.tensor([[[0, 1], [5, 2], [7, 7]]], dtype=torch.int32)
    before = list(decoder(stages, query, (8, 8)))
    assert [x.shape for x in before] == [(1, 3, 128)] * 4
    for changed in range(4):
        other = list(stages)
        other[changed] = StageOutput(stages[changed].feat_BNC + 1, stages[changed].pos_BN2)
        same = [torch.equal(a, b) for a, b in zip(before, decoder(other, query, (8, 8)), strict=True)]
        assert same == [step < 3 - changed for step in range(4)]


def test_queries_do_not_depend_on_the_order_they_come_in() -> None:
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig(size="tiny")).eval()
    stages = [
        StageOutput(torch.randn(1, 5, c), torch.tensor([[[i, 2 * i] for i in range(5)]]).int())
        for c in (32, 64, 96, 96)
    ]
    query = torch.tensor([[[0, 1], [5, 2], [7, 7], [3, 3], [4, 3], [6, 0]]], dtype=torch.int32)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    *_, forward = decoder(stages, query, (10, 10))
    *_, shuffled = decoder(stages, query[:, order], (10, 10))
    torch.testing.assert_close(forward[:, order], shuffled, atol=1e-5, rtol=1e-5)
