"""Estimate the memory of training steps on a GPU that is not here, with its Triton kernels, and print it as JSON.

Run as a script without TRITON_INTERPRET. Arguments: task, network size, pixels and images, as "pretrain:base:512:32".
"""

import json
import sys
from pathlib import Path

import torch
import triton

from affmae_engine.config import RunConfig
from affmae_engine.train.memory_estimate import MetaStep

sys.path.append(str(Path(__file__).parents[2] / "kernels"))
from compiling import AbsentGpu


def estimate(case: str) -> int:
    task, size, pixels, images = case.split(":")
    config = RunConfig.model_validate({"model": {"size": size}, "data": {"crop_size": int(pixels)}})
    return MetaStep(task, config, dtype=torch.bfloat16, kernels=True, classes=5).memory(int(images))


if __name__ == "__main__":
    triton.runtime.driver.set_active(AbsentGpu(90))
    print(json.dumps({case: estimate(case) for case in sys.argv[1:]}))
