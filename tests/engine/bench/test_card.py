"""The card's own readings."""

import pytest
import torch

from affmae_engine.bench.card import CardWatch, Sample, summarise


def test_figures_come_from_busy_moments_alone() -> None:
    samples = [Sample(0, 210, 40, 80.0, 0x1), Sample(99, 1700, 60, 500.0, 0), Sample(97, 1500, 65, 690.0, 0x4 | 0x1)]
    assert summarise(samples) == {
        "samples": 2,
        "clock_mhz": {"least": 1500, "median": 1600, "most": 1700},
        "temperature_c": 65,
        "power_w": {"median": 595.0, "most": 690.0},
        "throttling": {"power limit": 0.5},
    }
    assert summarise(samples[:1]) == {}


def test_a_cpu_has_no_card() -> None:
    with CardWatch(torch.device("cpu")) as watch:
        pass
    assert watch.record() == {}


def test_a_card_that_cannot_be_read_is_a_remark() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with CardWatch(torch.device("cuda")) as watch:
        pass
    assert "NVML" in watch.record()["problem"]


@pytest.mark.gpu
def test_a_card_is_read() -> None:
    matrix = torch.randn(4096, 4096, device="cuda")
    with CardWatch(torch.device("cuda", torch.cuda.current_device()), interval=0.1) as watch:
        for _ in range(300):
            matrix = (matrix @ matrix).clamp(-1, 1)
        torch.cuda.synchronize()
    record = watch.record()
    assert record["driver"] and record["power_limit_w"] > 0 and "problem" not in record
    assert record["clock_mhz"]["most"] <= record["most_clock_mhz"]
