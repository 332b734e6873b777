"""Where a run computes and in which precision, and a line that says so.

fp32 means exact fp32: TF32 is switched off for matrix products and convolutions, so that a card can be compared with
a CPU. The speed of a run comes from bf16 autocast, which TF32 would not improve.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from affmae_engine.config import Precision, TrainConfig
from affmae_engine.errors import ResourceError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class DeviceChoice:
    """device: where. dtype: of autocast. precision: bf16, fp16 or fp32. description: one line for people."""

    device: torch.device
    dtype: torch.dtype
    precision: str
    description: str

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The run's mixed precision; nothing for fp32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


def pick_device(config: TrainConfig) -> DeviceChoice:
    """The device and precision that `train.device` and `train.precision` mean on this machine.

    Raises:
        ResourceError: CUDA was asked for and is absent, or bf16 on a card that does not have it.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ResourceError("train.device is cuda, but no CUDA device can be used", why_no_cuda())
    if config.device == "cpu" or not available:
        precision: str = "fp32" if config.precision == "auto" else config.precision
        device = torch.device("cpu")
        name = f"CPU ({torch.get_num_threads()} threads)"
        return DeviceChoice(device, _DTYPES[precision], precision, _describe(name, precision))
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    precision = _cuda_precision(config.precision, properties.name)
    name = f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)"
    return DeviceChoice(device, _DTYPES[precision], precision, _describe(name, precision))


def exact_fp32() -> None:
    """Switch TF32 off, for matrix products and convolutions, in this process."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def memory_gib(device: torch.device) -> tuple[float, float]:
    """Memory in GiB, now and at most: allocated on a card, resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30, torch.cuda.max_memory_allocated(device) / 2**30
    # ru_maxrss is in KiB, on macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return peak, peak
    return pages * resource.getpagesize() / 2**30, peak


def _cuda_precision(asked: Precision, name: str) -> str:
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "bf16" and not has_bf16:
        raise ResourceError(f"train.precision is bf16, which {name} does not have", "use --set train.precision=fp16")
    if asked == "auto":
        return "bf16" if has_bf16 else "fp16"
    return asked


def why_no_cuda() -> str:
    """Why torch sees no CUDA device, with what to do about it."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA: install a CUDA build from pytorch.org"
    if not Path("/proc/driver/nvidia").exists() and sys.platform == "linux":
        return "no NVIDIA driver is loaded: install one, and check with nvidia-smi"
    return (
        f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no card: check nvidia-smi, the driver's version "
        "and CUDA_VISIBLE_DEVICES"
    )


def _describe(name: str, precision: str) -> str:
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    return f"{name}, {precision}, torch {torch.__version__.split('+')[0]}{cuda}"
