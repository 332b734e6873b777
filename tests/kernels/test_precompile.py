"""Kernels are compiled for a computation on meta tensors: in a process without interpreter, and without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton")


def rehearsed(cache: Path) -> dict[str, Any]:
    """What rehearsing.py prints, with Triton's cache in this folder."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    script = Path(__file__).parent / "rehearsing.py"
    reading, writing = os.pipe()
    try:
        done = subprocess.run(
            [sys.executable, str(script)], stdin=reading, capture_output=True, text=True, env=environment, timeout=100
        )
    finally:
        os.close(reading)
        os.close(writing)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def found(cache: Path) -> dict[str, Any]:
    return rehearsed(cache)


def test_each_kernel_is_compiled_once(found: dict[str, Any]) -> None:
    assert found["kernels"] == ["_double_kernel"] * 3
    assert found["different"] == 3 and found["cubins"]


def test_errors_reach_the_caller(found: dict[str, Any]) -> None:
    alone, aside, computation = found["errors"]
    assert "no_such_name is not defined" in alone
    assert "no_such_name is not defined" in aside
    assert computation == "KeyError: 'the computation itself'"
    assert found["rehearsing after"] is False


def test_kernels_of_a_training_step_are_compiled_and_the_model_is_left_as_it_is(found: dict[str, Any]) -> None:
    assert found["model"]["count"] > 20
    assert found["model"]["of crops"] == 3  # resize, maps, apply
    assert found["model"]["same"]


def test_a_second_time_loads_what_the_first_left_in_the_cache(found: dict[str, Any], cache: Path) -> None:
    def written() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in cache.rglob("*.cubin")}

    before = written()
    assert len(before) >= 3 + found["model"]["count"]
    assert rehearsed(cache) == found
    assert written() == before
