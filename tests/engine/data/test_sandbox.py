"""The child process that decodes what is not safe to decode: crashes, endless work, memory, forks, threads."""

import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr

from affmae_engine.data.readers import open_sources, sandbox
from affmae_engine.errors import InputError, ResourceError

ALL = slice(None)
BLOCK = np.random.default_rng(0).integers(0, 255, (6, 64, 64), np.uint8)


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    zarr.create_array(tmp_path / "a.zarr", shape=BLOCK.shape, dtype="u1", chunks=(1, 32, 64))[:] = BLOCK
    return tmp_path / "a.zarr"


def children() -> list[int]:
    return [child.process.pid for child in sandbox._POOL._idle]


def test_a_child_is_kept_for_the_next_read_and_ends_with_its_parent(stack: Path) -> None:
    sandbox.end_children()
    (source,) = open_sources(stack)
    before = children()
    np.testing.assert_array_equal(source.read(slice(1, 3), slice(5, 40), ALL), BLOCK[1:3, 5:40])
    assert children() == before and len(before) == 1
    assert os.getsid(before[0]) != os.getsid(0)  # signals to the terminal's processes do not reach it
    sandbox.end_children()
    with pytest.raises(ProcessLookupError):
        os.kill(before[0], 0)
    np.testing.assert_array_equal(source.read(ALL, ALL, ALL), BLOCK)


def test_a_child_that_dies_costs_one_error(stack: Path) -> None:
    (source,) = open_sources(stack)
    for number, kind, text in ((signal.SIGSEGV, InputError, "crashed"), (signal.SIGKILL, ResourceError, "memory")):
        sandbox.end_children()
        source.read(slice(0, 1), ALL, ALL)
        child = sandbox._POOL.take()
        os.kill(child.process.pid, signal.SIGSTOP)
        sandbox._POOL.give_back(child)
        timer = threading.Timer(0.1, os.kill, (child.process.pid, number))
        timer.start()
        if number == signal.SIGSEGV:
            threading.Timer(0.2, os.kill, (child.process.pid, signal.SIGCONT)).start()
        with pytest.raises(kind, match=text) as caught:
            source.read(ALL, ALL, ALL)
        timer.join()
        assert str(stack) in caught.value.message
        np.testing.assert_array_equal(source.read(ALL, ALL, ALL), BLOCK)
    sandbox.end_children()
    source.read(slice(0, 1), ALL, ALL)
    idle = sandbox._POOL._idle[0].process
    idle.kill()  # while nobody waits for it: nobody notices
    idle.wait()
    np.testing.assert_array_equal(source.read(ALL, ALL, ALL), BLOCK)


def test_decoding_has_a_time_limit(stack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = open_sources(stack)
    sandbox.end_children()
    source.read(slice(0, 1), ALL, ALL)
    (pid,) = children()
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(sandbox, "READ_SECONDS", 0.2)
    with pytest.raises(InputError, match="took longer than"):
        source.read(ALL, ALL, ALL)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_threads_have_a_child_each(stack: Path) -> None:
    (source,) = open_sources(stack)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda z: open_sources(stack)[0].read(slice(z, z + 1), ALL, ALL), [*range(6)] * 4))
    np.testing.assert_array_equal(np.concatenate(found[:6]), BLOCK)
    assert 1 <= len(children()) <= max(2, os.cpu_count() or 1)
    np.testing.assert_array_equal(source.read(ALL, ALL, ALL), BLOCK)


def test_a_forked_process_has_children_of_its_own(stack: Path) -> None:
    (source,) = open_sources(stack)
    source.read(ALL, ALL, ALL)
    pid = os.fork()
    if pid == 0:
        same = bool(np.array_equal(source.read(ALL, ALL, ALL), BLOCK))
        sandbox.end_children()
        os._exit(0 if same else 1)
    for _ in range(20):
        np.testing.assert_array_equal(source.read(ALL, ALL, ALL), BLOCK)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_file_that_changed_is_opened_anew(stack: Path) -> None:
    (source,) = open_sources(stack)
    np.testing.assert_array_equal(source.read(ALL, ALL, ALL), BLOCK)
    zarr.open_array(stack)[:] = 255 - BLOCK
    np.testing.assert_array_equal(source.read(ALL, ALL, ALL), 255 - BLOCK)


def test_a_file_that_lost_images_since_it_was_scanned(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "g.zarr")
    for name in "ab":
        group.create_array(name, shape=(9, 9), dtype="u1", chunks=(9, 9))[:] = 1
    sources = open_sources(tmp_path / "g.zarr")
    shutil.rmtree(tmp_path / "g.zarr" / "b")
    sandbox.end_children()
    with pytest.raises(InputError, match="fewer images"):
        sources[1].read(ALL, ALL, ALL)


def test_the_libraries_of_this_process_stay_as_they_are(stack: Path) -> None:
    import numcodecs

    open_sources(stack)[0].read(ALL, ALL, ALL)
    assert numcodecs.get_codec({"id": "blosc"}).__class__.__module__.startswith("numcodecs")
    assert zarr.config.get("codecs.blosc").startswith("zarr.")
