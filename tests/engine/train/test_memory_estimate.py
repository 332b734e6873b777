"""The memory estimate: what is counted, that meta tensors count like real ones, and how near it is to a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from affmae_cli import preset_files, settings
from affmae_engine.config import RunConfig
from affmae_engine.model.build import build_autoencoder, build_segmenter
from affmae_engine.model.masking import draw_mask
from affmae_engine.train.losses import SegmentationLoss
from affmae_engine.train.memory_estimate import MetaStep, PeakMemory

MIB = 1 << 20
SMALL = RunConfig.model_validate({"model": {"size": "tiny"}, "data": {"crop_size": 64}, "mask": {"lattices": [4]}})

MEASURED_GIB = {
    "pretrain:base:512:32": 6.3,
    "pretrain:base:1024:8": 6.4,
    "pretrain:small:512:64": 8.1,
    "pretrain:small:1024:8": 4.4,
    "finetune:base:512:8": 3.8,
    "finetune:small:512:8": 2.5,
    "finetune:base:1024:8": 12.0,
    "finetune:small:1024:8": 8.5,
}
"""Peak memory of tensors on an H200 in bf16, from docs/benchmarks.md."""

GPU_PRESETS = [preset for preset in preset_files.list_presets() if preset.card_gb]


def preset_case(name: str, task: str) -> tuple[str, int]:
    """A case of estimating.py for a preset, and its images: the whole batch where `auto` may take it at once."""
    config = settings.resolve(task, preset=name, environ={}).config
    micro = config.train.micro_batch
    images = micro if isinstance(micro, int) else config.train.batch_size
    return f"{task}:{config.model.size}:{config.image_size}:{images}", images


@pytest.fixture(scope="module")
def with_kernels() -> dict[str, float]:
    """Estimates in GiB of steps that use Triton kernels, in a process without the interpreter."""
    pytest.importorskip("triton", reason="needs Triton")
    of_presets = [preset_case(preset.name, task)[0] for preset in GPU_PRESETS for task in settings.TASKS]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / "estimating.py"), *{*MEASURED_GIB, *of_presets}]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    return {case: memory / 2**30 for case, memory in json.loads(done.stdout).items()}


def test_storages_count_once_until_they_are_freed() -> None:
    with PeakMemory() as peak:
        first = torch.zeros(MIB // 4)
        first.view(2, -1).add_(1)  # neither a view nor an operation in place is new memory
        second = first * 2
        del first
        third = second + 1
        assert peak.peak == 2 * MIB
        fourth = torch.cat([second, third])
        assert peak.peak == 4 * MIB and fourth.numel() == 2 * len(second)
        del second, third, fourth
        torch.zeros(1)
    assert peak.peak == 4 * MIB


@pytest.mark.parametrize("task", settings.TASKS)
def test_meta_tensors_count_like_real_ones(task: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 1, 64, 64)
    if task == "pretrain":
        model = build_autoencoder(SMALL.model, SMALL.loss, backend="reference")
        visible, masked = draw_mask((8, 8), SMALL.mask, seed=0, index=0)
    else:
        model = build_segmenter(SMALL.model, 4, backend="reference")
        loss_of = SegmentationLoss(SMALL.finetune, SMALL.loss, [1.0] * 4, backend="reference")
        labels = torch.randint(0, 4, (3, 64, 64))
    with PeakMemory() as peak:
        if task == "pretrain":
            loss = model(images, visible.expand(3, -1), masked.expand(3, -1))["loss"]
        else:
            loss = loss_of(model(images), labels)["loss"]
        loss.backward()
    parameters = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    step = MetaStep(task, SMALL, dtype=torch.float32, kernels=False, classes=4)
    assert step.parameters == parameters
    assert step.memory(3) == pytest.approx(peak.peak + 12 * parameters + buffers, rel=0.03)


def test_memory_grows_with_images_and_shrinks_with_precision() -> None:
    exact = MetaStep("pretrain", SMALL, dtype=torch.float32, kernels=False)
    half = MetaStep("pretrain", SMALL, dtype=torch.bfloat16, kernels=False)
    four, eight, sixteen = (exact.memory(images) for images in (4, 8, 16))
    assert sixteen - eight == pytest.approx(2 * (eight - four), rel=0.05) and four > 16 * exact.parameters
    assert half.memory(16) < 0.95 * sixteen
    assert not torch.is_autocast_enabled("cuda")


@pytest.mark.parametrize(
    ("task", "size", "images", "measured_gib"),
    [("pretrain", "base", 32, 25.6), ("pretrain", "small", 64, 25.5), ("finetune", "base", 8, 11.8)],
)
def test_the_estimate_of_a_vit_is_near_what_a_gpu_took(task: str, size: str, images: int, measured_gib: float) -> None:
    config = RunConfig.model_validate({"model": {"family": "vit-mae", "size": size}})
    step = MetaStep(task, config, dtype=torch.bfloat16, kernels=False, classes=5)
    assert step.memory(images) / 2**30 == pytest.approx(measured_gib, rel=0.05)


def test_an_estimate_is_near_what_a_gpu_took(with_kernels: dict[str, float]) -> None:
    off = {case: with_kernels[case] / measured - 1 for case, measured in MEASURED_GIB.items()}
    assert {case: error for case, error in off.items() if not -0.12 < error < 0.02} == {}


@pytest.mark.parametrize("preset", GPU_PRESETS, ids=lambda preset: preset.name)
@pytest.mark.parametrize("task", settings.TASKS)
def test_a_preset_fits_its_gpu(preset: preset_files.Preset, task: str, with_kernels: dict[str, float]) -> None:
    """With the kernels, the whole batch at once takes at most 0.8 of the memory that the preset is made for."""
    case, _ = preset_case(preset.name, task)
    assert with_kernels[case] < 0.8 * (preset.card_gb or 0) * 1e9 / 2**30
