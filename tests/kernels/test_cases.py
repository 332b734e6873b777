"""How results of an operation are judged, on an operation whose error is known."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from affmae_kernels.cases import LIMITS, Case, deviations

HALF = torch.bfloat16


def scaled(name: str, size: float, **wrong: float) -> Case:
    """y = size * weight * x and a whole number; `wrong`: relative error of y by backend."""

    def make(random: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        return {"x": torch.randn(50, generator=random).to(dtype), "weight": torch.tensor(size)}

    def call(*, backend: str, x: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        factor = 1.0 if x.dtype == torch.float64 else 1.0 + wrong.get(backend, 0.0)
        return {"y": (x.double() * weight * factor).to(x.dtype), "largest": x.argmax()}

    return Case("scaled", name, make, call)


def judged(*group: Case, dtype: torch.dtype = torch.float32, backend: str = "triton"):
    return deviations(group, "cpu", dtype, backend)


def test_results_and_gradients_are_compared() -> None:
    found = judged(scaled("a", 1.0, triton=1e-3))
    assert found.keys() == {"y", "largest", "gradient of x", "gradient of weight"}
    assert found["y"].error == pytest.approx(1e-3, rel=0.01) and found["y"].limit == 1e-5 and not found["y"].ok
    assert all(deviation.ok for deviation in judged(scaled("a", 1.0, triton=1e-6)).values())


def test_in_fp32_every_case_counts_by_itself() -> None:
    found = judged(scaled("small", 1e-3, triton=1e-3), scaled("large", 1e3))
    assert found["y"].error == pytest.approx(1e-3, rel=0.01) and not found["y"].ok


def test_in_half_precision_cases_are_gathered() -> None:
    found = judged(scaled("small", 1e-3, triton=0.5), scaled("large", 1e3), dtype=HALF)
    assert found["y"].ok and found["y"].error < LIMITS[HALF]
    assert not judged(scaled("large", 1e3, triton=0.5), scaled("small", 1e-3), dtype=HALF)["y"].ok


def test_twice_the_error_of_the_plain_reference_is_allowed_in_half_precision_alone() -> None:
    close, far = (scaled("a", 1.0, triton=error, reference=0.05) for error in (0.09, 0.12))
    assert judged(close, dtype=HALF)["y"].ok
    assert judged(close, dtype=HALF)["y"].limit == pytest.approx(0.1, rel=0.1)
    assert not judged(far, dtype=HALF)["y"].ok
    assert judged(close)["y"].limit == LIMITS[torch.float32] and not judged(close)["y"].ok
    nothing = scaled("a", 1.0, triton=0.05, reference=math.nan)
    assert judged(nothing, dtype=HALF)["y"].limit == LIMITS[HALF]


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_what_is_missing_or_not_finite_is_infinitely_wrong(dtype: torch.dtype) -> None:
    assert judged(scaled("a", 1.0, triton=math.nan), dtype=dtype)["y"].error == math.inf
    case = scaled("a", 1.0)

    def call(*, backend: str, **arguments: Any) -> dict[str, torch.Tensor]:
        found = case.call(backend=backend, **arguments)
        if backend == "triton":
            del found["largest"]
        return found

    found = judged(replace(case, call=call), dtype=dtype)["largest"]
    assert found.error == math.inf and found.limit == 0 and not found.ok


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_whole_numbers_must_be_equal(dtype: torch.dtype) -> None:
    case = scaled("a", 1.0)

    def call(*, backend: str, **arguments: Any) -> dict[str, torch.Tensor]:
        found = case.call(backend=backend, **arguments)
        counts = torch.arange(1000)
        counts[7] += backend == "triton"
        return {**found, "counts": counts}

    found = judged(replace(case, call=call), dtype=dtype)
    assert found["largest"] == (0, 0) and found["largest"].ok
    assert found["counts"] == (1e-3, 0) and not found["counts"].ok
