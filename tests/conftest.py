"""Fixtures that several packages share."""

import ctypes
import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Before any kernel is imported: on a machine without a card the Triton interpreter runs them on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So does a shell start what runs in its background; processes that tests start and interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # tests run several processes side by side; more threads only fight for the cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA card where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA card"))


def pytest_collection_finish() -> None:
    """What is loaded by now stays for good: collecting garbage need not look through a million objects each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, a module stays on one worker, so that its fixtures are made once, until the others run out of work."""
    if config.getoption("dist") != "load":  # asked for by name
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own AFFMAE_ variables must not change what is tested."""
    for name in list(os.environ):
        if name.startswith("AFFMAE_") and name != "AFFMAE_TEST_DATA":
            monkeypatch.delenv(name)


@pytest.fixture
def permissions_count() -> Iterator[None]:
    """Files that may not be read cannot be, even by the superuser, who gives up that right for the test (Linux)."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; each once more for the numbers from 32 on
    assert libc.capget(header, sets) == 0
    before = sets[0]
    sets[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = before
        assert libc.capset(header, sets) == 0


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real EM data that is not part of the repository; the test is skipped where it is absent."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("AFFMAE_TEST_DATA", root.parent / "shared" / "data"))
    if not (folder / "em" / "index.json").is_file():
        pytest.skip(f"no real EM data at {folder} (set AFFMAE_TEST_DATA)")
    return folder
