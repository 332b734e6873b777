"""Fifty seeded steps of the small network on a card: kernels, recording and half precision leave the loss curve as the
plain PyTorch operations draw it. `pytest -s` prints the differences that docs/benchmarks.md quotes."""

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

from affmae_engine.config import LossConfig, MaskConfig, ModelConfig, OptimConfig, TrainConfig
from affmae_engine.model.affmae import MaskedAutoencoder
from affmae_engine.model.masking import draw_mask
from affmae_engine.runtime.device import exact_fp32, pick_device
from affmae_engine.train.metrics import Stopwatch
from affmae_engine.train.optim import build_adamw, decay_groups, set_learning_rate
from affmae_engine.train.step import TrainStep, seed_forward

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
STEPS, IMAGES, EDGE = 50, 8, 256


@cache
def batches() -> list[dict[str, torch.Tensor]]:
    """Smooth random fields of unit variance: something to learn, a new batch every step."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for step in range(STEPS):
        noise = torch.randn(IMAGES, 1, EDGE // 8, EDGE // 8, generator=generator)
        image = F.interpolate(noise, size=(EDGE, EDGE), mode="bicubic")
        image = (image - image.mean()) / image.std() + 0.1 * torch.randn(image.shape, generator=generator)
        drawn = [
            draw_mask((EDGE // 8, EDGE // 8), MaskConfig(), seed=0, index=step * IMAGES + i) for i in range(IMAGES)
        ]
        masks = {name: torch.stack([pair[i] for pair in drawn]) for i, name in enumerate(("visible", "masked"))}
        made.append({"image": image, **masks})
    return made


@cache
def curve(backend: str, precision: str, *, record: bool = False) -> torch.Tensor:
    choice = pick_device(TrainConfig.model_validate({"device": "cuda", "precision": precision}))
    exact_fp32()
    torch.manual_seed(0)
    config = ModelConfig(size="small", drop_path=0.0, decoder_dropout=0.0)
    model = MaskedAutoencoder(config, LossConfig(), backend=backend).cuda().train()
    optim = OptimConfig()
    optimizer = build_adamw(decay_groups(model.named_parameters(), optim.weight_decay, lambda name: 1.0), optim)
    take_step = TrainStep(
        model,
        lambda model, batch: model(batch["image"], batch["visible"], batch["masked"]),
        optimizer,
        torch.amp.GradScaler("cuda", enabled=False),
        choice,
        accumulate=1,
        clip_norm=5.0,
        record=record,
    )
    data, losses = iter(batches()), []
    for step in range(STEPS):
        set_learning_rate(optimizer, 3e-4 * min(1.0, (step + 1) / 10))
        result = take_step(data, seed=partial(seed_forward, 0, step, 0), watch=Stopwatch())
        losses.append(result.losses["loss"].clone())
    return torch.stack(losses).cpu()


def test_kernels_follow_the_reference_for_fifty_steps() -> None:
    exact = curve("reference", "fp32")
    assert exact[-5:].mean() < 0.95 * exact[:5].mean()  # it learns, so that there is something to follow
    found = {
        "reference bf16": curve("reference", "bf16"),
        "kernels fp32": curve("triton", "fp32"),
        "kernels bf16": curve("triton", "bf16"),
        "kernels bf16, recorded": curve("triton", "bf16", record=True),
    }
    for name, losses in found.items():
        apart = (losses - exact).abs() / exact
        print(f"{name}: largest {apart.max():.1e}, mean {apart.mean():.1e}, last loss {losses[-1]:.5f}")
        # A score that rounds to the other side of another makes other survivors: single steps differ more than most.
        assert apart.max() < 5e-3 and apart.mean() < 5e-4, name


def test_a_recorded_run_has_the_bits_of_an_eager_one() -> None:
    assert torch.equal(curve("triton", "bf16"), curve("triton", "bf16", record=True))
