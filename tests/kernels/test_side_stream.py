"""Work beside the chain of gradients: at once outside a capture, the same bits inside one."""

import pytest
import torch

from affmae_engine.runtime.cuda_graphs import capture
from affmae_kernels.side_stream import SideStream, at_once


def test_outside_a_capture_everything_runs_at_once_and_in_order() -> None:
    side = SideStream(torch.device("cpu"))
    done: list[int] = []
    for turn in range(3):
        assert side.run(lambda x: done.append(x) or x + 1, turn) == turn + 1
        assert done[-1] == turn
        side.turn()
    side.join()
    assert done == [0, 1, 2]


def test_errors_reach_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        SideStream(torch.device("cpu")).run(lambda: 1 / 0)


def test_at_once() -> None:
    assert at_once(max, 1, 2) == 2


@pytest.mark.gpu
def test_a_recorded_branch_gives_the_same_bits() -> None:
    """Temporaries that only the side stream reads are not handed to the next kernel before they were read."""
    device = torch.device("cuda")
    x = torch.randn(512, 512, device=device)

    def chain() -> list[torch.Tensor]:
        side, found, y = SideStream(device), [], x
        for _ in range(6):
            y = torch.tanh(y @ x / 16)
            found.append(side.run(lambda a, b: (a @ b).sum(0), y * 2, y))
            side.turn()
        side.join()
        return [y, *found]

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        expected = [tensor.clone() for tensor in chain()]
    torch.cuda.current_stream().wait_stream(warm)
    with capture() as graph:
        found = chain()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
