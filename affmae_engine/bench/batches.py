"""How many images fit where: default batches by the card's memory, and how much memory a case is likely to take.

The figures come from measurements on an H200 (docs/benchmarks.md, bf16, compiled): GiB an image at 512 x 512 in
pretraining. Memory goes with the pixels in both families, since no attention here keeps its matrix. Factors of the
other tasks are estimates: they choose a batch and pack processes, and appear in no result.
"""

from __future__ import annotations

from affmae_engine.bench.case import Case

_GIB_AN_IMAGE = {
    ("affmae", "base"): 0.27,
    ("affmae", "small"): 0.17,
    ("vit-mae", "base"): 0.80,
    ("vit-mae", "small"): 0.40,
}
_FACTOR = {"pretrain": 1.0, "finetune": 1.8, "predict": 0.5}
_LEAST_GIB = 2.0
"""Weights, optimizer, libraries."""
_USABLE = 0.85
_PIXELS = {"base": 32 * 512**2, "small": 64 * 512**2, "tiny": 64 * 512**2}
"""More images than this fill a large card anyway; from 1024 pixels on 8 images do for every size."""
_LARGE_EDGE_PIXELS = 32 * 512**2


def default_batch(work: str, size: str, edge: int, memory_gib: float) -> int:
    """Images that both families can hold on a card of that memory, a power of two: at most 32 (small: 64) at 512 px."""
    pixels = _PIXELS[size] if edge <= 512 else _LARGE_EDGE_PIXELS
    most = max(1, pixels // edge**2)
    need = _GIB_AN_IMAGE.get(("vit-mae", size), 0.1) * _FACTOR[work] * (edge / 512) ** 2
    fitting = int(max(1.0, (_USABLE * memory_gib - _LEAST_GIB) / need))
    return 1 << (min(most, fitting).bit_length() - 1)


def likely_gib(case: Case) -> float:
    """Memory that a case is likely to take."""
    an_image = _GIB_AN_IMAGE.get((case.model, case.size), 0.1) * _FACTOR[case.work] * (case.resolution / 512) ** 2
    return _LEAST_GIB + an_image * case.batch
