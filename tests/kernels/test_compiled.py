"""The kernels of the network-sized cases compile for Hopper and Blackwell, fit shared memory, and never spill."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from affmae_kernels.cases import OPERATIONS

pytest.importorskip("triton", reason="needs Triton")

SHARED_MEMORY = {90: 232_448, 120: 101_376}
"""Largest shared memory of one block, in bytes, by architecture (CUDA C++ programming guide, compute capabilities)."""

MOST_SHUFFLES = {"_points_fwd_kernel": 12}
"""Exchanges between lanes: 20 to 200 if lanes lie on the rows that are summed (see `OWNERS_FIRST` of the kernel)."""


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """What the kernels of all operations need, from one process that compiles them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compiling.py"
    done = subprocess.run(
        [sys.executable, str(script), *OPERATIONS], capture_output=True, text=True, env=environment, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernels_fit_hopper_and_blackwell(operation: str, compiled: list[dict[str, Any]]) -> None:
    found = [row for row in compiled if row["operation"] == operation]
    assert {row["arch"] for row in found} == set(SHARED_MEMORY)
    assert [row for row in found if row["stack"] or row["shared"] > SHARED_MEMORY[row["arch"]]] == []
    assert [row for row in found if row["shuffles"] > MOST_SHUFFLES.get(row["kernel"], math.inf)] == []
