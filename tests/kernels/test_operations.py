"""Every operation against its reference in float64: results and every gradient, in every precision, on odd shapes."""

import pytest
import torch

from affmae_kernels.cases import LIMITS, OPERATIONS, Case, Deviation, cases, deviations, solve

pytest.importorskip("triton", reason="needs Triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = [pytest.param(case, id=case.title) for operation in OPERATIONS for case in cases(operation, network=False)]


def wrong(found: dict[str, Deviation]) -> dict[str, Deviation]:
    """The results and gradients that are too far off."""
    assert found
    return {name: deviation for name, deviation in found.items() if not deviation.ok}


@pytest.mark.parametrize("case", SMALL)
def test_kernels_equal_the_reference(case: Case, poison: None) -> None:
    assert wrong(deviations([case], DEVICE, torch.float32, "triton")) == {}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernels_in_half_precision_are_as_close_as_its_rounding_allows(
    operation: str, dtype: torch.dtype, poison: None
) -> None:
    assert wrong(deviations(cases(operation, network=False), DEVICE, dtype, "triton")) == {}


@pytest.mark.parametrize("case", SMALL)
def test_reference_in_fp32_is_close_to_float64(case: Case) -> None:
    assert wrong(deviations([case], "cpu", torch.float32, "reference")) == {}


@pytest.mark.gpu
@pytest.mark.parametrize("operation", OPERATIONS)
def test_two_runs_give_the_same_bits(operation: str) -> None:
    for case in cases(operation, network=False):
        first, second = (solve(case, DEVICE, torch.bfloat16, "triton") for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first), case.title


@pytest.mark.gpu
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_network_shapes_agree_with_the_reference(operation: str) -> None:
    """bf16 kernels are as far from the fp32 reference as the bf16 reference is: both by 3 % where ReLUs flip.

    Everything on the same GPU: a float64 reference of these shapes is too large.
    """
    for case in cases(operation, network=True):
        exact = solve(case, DEVICE, torch.float32, "reference")
        plain, found = (solve(case, DEVICE, torch.bfloat16, backend) for backend in ("reference", "triton"))
        for name, tensor in exact.items():
            if not tensor.is_floating_point():
                assert torch.equal(found[name], plain[name]), (case.title, name)
                continue
            of_plain, of_found = (_relative_rms(other[name], tensor) for other in (plain, found))
            # A handful of numbers that each sum over all pairs, which nearly cancel, is mostly noise.
            limit = 0.2 if tensor.numel() <= 16 else LIMITS[torch.bfloat16] + 1.5 * of_plain
            assert of_found <= limit, (case.title, name, of_found, of_plain)


def _relative_rms(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def test_every_folder_of_an_operation_is_listed_and_has_both_kinds_of_cases() -> None:
    for operation in OPERATIONS:
        found = cases(operation)
        assert {case.operation for case in found} == {operation}
        assert len({case.name for case in found}) == len(found)
        assert any(case.network for case in found) and not all(case.network for case in found)
