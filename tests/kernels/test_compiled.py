"""Every kernel compiles for Ampere, Hopper and Blackwell cards, fits their shared memory, and hot ones never spill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")

HERE = Path(__file__).parent
MODULES = sorted(path.stem for path in HERE.glob("compile_cases_*.py"))
SHARED_MEMORY = {80: 166_912, 90: 232_448, 120: 101_376}


@pytest.mark.parametrize("module", MODULES)
def test_kernels_fit_every_card(module: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(HERE / "compiling.py"), module], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found and {case["arch"] for case in found} == set(SHARED_MEMORY)
    for case in found:
        assert case["shared"] <= SHARED_MEMORY[case["arch"]], case
        assert case["stack"] == 0 or not case["hot"], case
        assert case["most_shuffles"] is None or case["shuffles"] <= case["most_shuffles"], case
