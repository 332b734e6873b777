"""Device and precision rules."""

import pytest
import torch

from affmae_engine.config import TrainConfig
from affmae_engine.errors import ResourceError
from affmae_engine.runtime.device import exact_fp32, memory_gib, pick_device


def test_cpu_is_fp32_unless_asked_otherwise() -> None:
    choice = pick_device(TrainConfig(device="cpu"))
    assert (choice.device.type, choice.dtype, choice.precision) == ("cpu", torch.float32, "fp32")
    assert "CPU" in choice.description and "fp32" in choice.description and torch.__version__[:3] in choice.description
    assert pick_device(TrainConfig(device="cpu", precision="bf16")).dtype == torch.bfloat16


def test_autocast_is_off_for_fp32_and_on_for_bf16() -> None:
    layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    with pick_device(TrainConfig(device="cpu")).autocast():
        assert layer(x).dtype == torch.float32
    with pick_device(TrainConfig(device="cpu", precision="bf16")).autocast():
        assert layer(x).dtype == torch.bfloat16


def test_cuda_asked_for_and_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ResourceError) as caught:
        pick_device(TrainConfig(device="cuda"))
    assert caught.value.exit_code == 4 and caught.value.hint
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ResourceError) as caught:
        pick_device(TrainConfig(device="cuda"))
    assert "without CUDA" in caught.value.hint
    assert pick_device(TrainConfig(device="auto")).device.type == "cpu"


@pytest.mark.parametrize(("has_bf16", "asked", "expected"), [(True, "auto", "bf16"), (False, "auto", "fp16")])
def test_card_precision(has_bf16: bool, asked: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_card(monkeypatch, has_bf16)
    choice = pick_device(TrainConfig(precision=asked))
    assert choice.device.type == "cuda" and choice.precision == expected
    assert choice.description.startswith("Some Card (24 GiB), " + expected)


def test_bf16_on_a_card_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_card(monkeypatch, has_bf16=False)
    with pytest.raises(ResourceError, match="does not have"):
        pick_device(TrainConfig(precision="bf16"))


def fake_card(monkeypatch: pytest.MonkeyPatch, has_bf16: bool) -> None:
    class Properties:
        name = "Some Card"
        total_memory = 24 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)


def test_memory_of_the_process() -> None:
    now, peak = memory_gib(torch.device("cpu"))
    assert 0 < now <= peak * 1.01 < 1000


@pytest.mark.gpu
def test_fp32_on_a_card_is_exact() -> None:
    exact_fp32()
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    image = torch.randn(1, 8, 64, 64, generator=torch.Generator().manual_seed(1))
    kernel = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close((x.cuda() @ x.cuda()).cpu(), x @ x, rtol=1e-5, atol=1e-4)
    on_card = torch.nn.functional.conv2d(image.cuda(), kernel.cuda()).cpu()
    torch.testing.assert_close(on_card, torch.nn.functional.conv2d(image, kernel), rtol=1e-5, atol=1e-4)
