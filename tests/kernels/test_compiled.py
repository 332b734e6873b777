"""Every kernel compiles for Ampere, Hopper and Blackwell cards, fits their shared memory, and hot ones never spill."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton")

HERE = Path(__file__).parent
MODULES = sorted(path.stem for path in HERE.glob("compile_cases_*.py"))
SHARED_MEMORY = {80: 166_912, 90: 232_448, 120: 101_376}


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[dict[str, Any]]]:
    """What the cases of each module need, from one process that compiles all of them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(HERE / "compiling.py"), *MODULES], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[dict[str, Any]]] = {}
    for line in done.stdout.splitlines():
        case = json.loads(line)
        found.setdefault(case["module"], []).append(case)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_kernels_fit_every_card(module: str, compiled: dict[str, list[dict[str, Any]]]) -> None:
    found = compiled[module]
    assert found and {case["arch"] for case in found} == set(SHARED_MEMORY)
    for case in found:
        assert case["shared"] <= SHARED_MEMORY[case["arch"]], case
        assert case["stack"] == 0 or not case["hot"], case
        assert case["most_shuffles"] is None or case["shuffles"] <= case["most_shuffles"], case
