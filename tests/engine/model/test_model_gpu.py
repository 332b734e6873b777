"""On a CUDA card: the same numbers as on the CPU, and the base model at 512 px in every precision."""

import pytest
import torch

from affmae_engine.config import LossConfig, ModelConfig
from affmae_engine.model.affmae import MaskedAutoencoder, Segmenter

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("merging", ["cluster", "l2norm"])
def test_cuda_equals_cpu(autoencoder, batch, merging) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = autoencoder(merging=merging).double()
    image, visible, masked = batch(2, 128, 96)
    model(image.double(), visible, masked)["loss"].backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    on_cpu = model.reconstruct(image.double(), visible, masked)
    model.zero_grad(set_to_none=True)
    model.cuda()
    arguments = image.double().cuda(), visible.cuda(), masked.cuda()
    model(*arguments)["loss"].backward()
    on_cuda = model.reconstruct(*arguments)
    for one, two in zip(on_cpu.stage_pos, on_cuda.stage_pos, strict=True):
        assert torch.equal(one, two.cpu())
    torch.testing.assert_close(on_cuda.images["last"].cpu(), on_cpu.images["last"])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.cpu(), expected[name], rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_base_at_512_trains_without_waiting_for_the_card(batch, precision) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    torch.manual_seed(0)
    model = MaskedAutoencoder(ModelConfig(size="base"), LossConfig()).cuda()
    arguments = [x.cuda() for x in batch(2, 512, 512)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", dtype=dtype, enabled=precision != "fp32"):
            losses = model(*arguments)
        (losses["loss"] * (1024 if precision == "fp16" else 1)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0.8 < losses["last"].item() < 3
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_segmenter_at_512_in_bf16() -> None:
    torch.manual_seed(0)
    model = Segmenter(ModelConfig(size="small"), classes=4).cuda()
    image = torch.randn(2, 1, 512, 512, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = model.train()(image)
        with torch.no_grad():
            logits = model.eval()(image)["logits"]
    sum(x.float().mean() for x in out.values()).backward()
    assert out["logits"].shape == (2, 64 * 64, 8 * 8 * 4)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    assert logits.shape == (2, 4, 512, 512) and torch.isfinite(logits).all()
