"""The stream of micro-batches: order, sharing among ranks, and every way in which a worker can fail."""

import contextlib
import errno
import importlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from affmae_engine.data import loading
from affmae_engine.data.loading import batches, worker_count
from affmae_engine.errors import AffmaeError, ConfigError, CorruptError, InputError, ResourceError


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("loading_fakes")


def take(dataset: Any, count: int, **options: Any) -> list[list[int]]:
    options = {"first": 0, "batch_size": 4, "micro_batch": 2, "workers": 0, **options}
    with contextlib.closing(batches(dataset, **options)) as stream:
        return [batch["index"].tolist() for batch in itertools.islice(stream, count)]


def test_samples_come_in_order(fakes: ModuleType) -> None:
    assert take(fakes.Counting(), 4) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_any_number_of_workers_gives_the_same_stream(fakes: ModuleType) -> None:
    expected = take(fakes.Counting(), 9, first=3)
    assert expected[0] == [12, 13]
    for workers in (1, 3):
        assert take(fakes.Counting(), 9, first=3, workers=workers) == expected


def test_ranks_share_a_step_without_overlap(fakes: ModuleType) -> None:
    parts = [take(fakes.Counting(), 2, first=1, batch_size=8, rank=rank, world=2) for rank in (0, 1)]
    assert parts == [[[8, 9], [10, 11]], [[12, 13], [14, 15]]]


def test_indivisible_batches_are_refused(fakes: ModuleType) -> None:
    with pytest.raises(ConfigError, match="batch of 6"):
        batches(fakes.Counting(), first=0, batch_size=6, micro_batch=2, world=2)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (ValueError("bad header"), InputError, "ValueError: bad header"),
        (OSError(errno.EIO, "Input/output error"), InputError, "Input/output error"),
        (OSError(errno.EMFILE, "Too many open files"), ResourceError, "Too many open files"),
        (MemoryError(), ResourceError, "MemoryError"),
    ],
)
def test_bad_samples_name_their_image_and_cause(
    fakes: ModuleType, workers: int, error: Exception, expected: type[AffmaeError], words: str
) -> None:
    with pytest.raises(expected, match=words) as caught:
        take(fakes.Raising(error), 9, workers=workers)
    assert "sample 5 (image 'slice5')" in caught.value.message
    assert "\n" not in caught.value.message
    assert type(error).__name__ in str(caught.value.__cause__)


def test_typed_errors_keep_class_and_hint(fakes: ModuleType) -> None:
    with pytest.raises(CorruptError, match="chunk 1/2/3 is damaged") as caught:
        take(fakes.Damaged(), 9, workers=1)
    assert caught.value.hint == "ingest it again"


def test_samples_of_unequal_shapes(fakes: ModuleType) -> None:
    with pytest.raises(InputError, match="slice5"):
        take(fakes.Ragged(), 9, workers=1)


def test_batches_before_the_bad_one_arrive(fakes: ModuleType) -> None:
    with contextlib.closing(
        batches(fakes.Raising(ValueError("x")), first=0, batch_size=2, micro_batch=2, workers=1)
    ) as stream:
        assert [next(stream)["index"].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
        with pytest.raises(InputError):
            next(stream)


def test_killed_worker_is_replaced(fakes: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert take(fakes.Dying(tmp_path, 1), 5, workers=2) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert "died" in caplog.text


def test_worker_killed_again_and_again(fakes: ModuleType, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ResourceError, match=r"died 3 times, last at sample \d \(image 'slice\d'\)") as caught:
        take(fakes.Dying(tmp_path, 99), 5, workers=1)
    assert "data.workers" in caught.value.hint
    assert time.monotonic() - start < 30
    assert not multiprocessing.active_children()


def test_hanging_worker(fakes: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_POLL_S", 0.2)
    with pytest.raises(ResourceError, match=r"no data came within 3 s; .*slice4") as caught:
        take(fakes.Hanging(), 5, workers=1, timeout=3.0)
    assert "disk" in caught.value.hint
    assert not multiprocessing.active_children()


def test_signals_for_the_group_do_not_end_workers(fakes: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    assert take(fakes.Signalled(), 5, workers=1)[-1] == [8, 9]
    assert not caplog.text


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core, one thread")
def test_workers_compute_with_one_thread_each(fakes: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    forkserver._forkserver._stop()  # an earlier test's, which read another environment
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    # The first micro-batch alone: handing it over starts a thread of the worker's queue.
    assert take(fakes.Threads(), 1, workers=1) == [[0, 0]]
    assert os.environ["OMP_NUM_THREADS"] == "2" and "OPENBLAS_NUM_THREADS" not in os.environ


def test_closing_leaves_no_process(fakes: ModuleType) -> None:
    take(fakes.Counting(), 1, workers=2)
    assert not multiprocessing.active_children()


TRAINER = """
import multiprocessing, os, signal, sys
from loading_fakes import Counting
from affmae_engine.data.loading import batches
if __name__ == "__main__":
    stream = batches(Counting(), first=0, batch_size=4, micro_batch=2, workers=2)
    next(stream)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_trainer_leaves_no_process(tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    killed = subprocess.run(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, timeout=60
    )
    workers = [int(pid) for pid in killed.stdout.split()]
    assert killed.returncode == -signal.SIGKILL and len(workers) == 2
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if psutil.pid_exists(pid)]


def test_automatic_worker_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.os, "sched_getaffinity", lambda _: range(16), raising=False)
    assert worker_count("auto") == 15
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert worker_count("auto") == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert worker_count("auto") == 0
    assert worker_count(5) == 5
