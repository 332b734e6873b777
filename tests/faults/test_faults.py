"""A short, seeded dose of the fault harness, and proof that the harness notices what it is there for.

`python -m tests.faults` gives the long one.
"""

import ctypes
import errno
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from affmae_engine import atomic, checkpoint
from affmae_engine.errors import InputError
from affmae_engine.run_dir import RunDir
from tests.faults import children, operations
from tests.faults.every_call import every_fault
from tests.faults.kills import killed_runs
from tests.faults.mutations import SUBJECTS, Subject, mutants, mutate
from tests.faults.operations import OPERATIONS, Operation
from tests.faults.power import power_cuts
from tests.faults.workloads import CONFIG, Job, Workloads, files, shares

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a forked process cannot use its parent's card")
OPERATION = {operation.name: operation for operation in OPERATIONS}
SUBJECT = {subject.name: subject for subject in SUBJECTS}


@pytest.fixture(scope="module")
def workloads(tmp_path_factory: pytest.TempPathFactory) -> Workloads:
    return Workloads(tmp_path_factory.mktemp("workloads") / "inputs")


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    """No child process and no shared memory outlives a test."""
    memory, children = _shared_memory(), _children()
    yield
    assert not _children() - children
    assert not _shared_memory() - memory


def _children() -> set[int]:
    """Child processes, dead ones that nobody waited for included. Tests of other modules may have begun some."""
    return {child.pid for child in psutil.Process().children()}


def _shared_memory() -> set[Path]:
    """Blocks of this kind that torch makes; other processes of the machine come and go."""
    return set(Path("/dev/shm").glob(f"torch_{os.getpid()}_*"))


@pytest.mark.parametrize(("name", "kills"), [("train", 2), ("ingest", 6), ("predict", 5), ("predict-zarr", 3)])
def test_killed_at_random_it_ends_as_if_undisturbed(
    workloads: Workloads, tmp_path: Path, name: str, kills: int
) -> None:
    (job,) = (job for job in workloads.jobs() if job.name == name)
    for tally in killed_runs(job, tmp_path, random.Random(name)):
        assert not tally.lost
        if tally.kills >= kills and tally.runs:
            break
    if name == "predict":
        assert (shares(tmp_path / "predict-undisturbed" / "labels.tif") > 0).all()


@pytest.mark.parametrize(
    ("name", "stride"),
    [("save", 9), ("prune", 5), ("fall-back", 13), ("new-run", 8), ("ingest", 61), ("predict-tiff", 47),
     ("overwrite", 97),
     # One of 19 runs ended with other bytes of the probabilities, for a reason that is not known yet.
     pytest.param("predict-zarr", 83, marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_fault_at_a_call_leaves_the_old_or_the_new(tmp_path: Path, name: str, stride: int) -> None:
    modes = (("kill", 0), ("for ever", errno.ENOSPC), ("once", errno.EIO))
    tried = 0
    for first, mode in enumerate(modes, 1):  # each mode begins at another call
        for verdict in every_fault(OPERATION[name], tmp_path / mode[0], modes=(mode,), stride=stride, first=first):
            assert not verdict.problem, str(verdict)
            tried += 1
    assert tried >= len(modes)


@pytest.mark.parametrize("name", ["save", "prune", "fall-back", "new-run", "ingest"])
def test_a_power_cut_leaves_the_old_or_the_new(tmp_path: Path, name: str) -> None:
    problems = list(power_cuts(OPERATION[name], tmp_path))
    assert len(problems) > 5 and not any(problems)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_damaged_files_end_in_errors_of_ours(tmp_path: Path, subject: Subject) -> None:
    for mutant in mutants(subject, tmp_path, random.Random(subject.name), count=4):
        assert not mutant.problem, mutant


@pytest.mark.parametrize("name", ["save", "ingest", "predict-tiff"])
def test_a_file_system_that_is_really_full(tmp_path: Path, name: str) -> None:
    """On a tiny tmpfs: an error of ours, and after space was made the same call ends well."""
    operation = OPERATION[name]

    def fill_up() -> None:
        place = tmp_path / "tiny"
        place.mkdir()
        _own_mount(place)
        folder = place / "work"
        folder.mkdir()
        operation.prepare(folder)
        ballast = place / "ballast"
        with ballast.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC
        outcome = children.run(lambda: operation.act(folder), log)
        assert outcome.code == 4 and any(text in outcome.text for text in ("the disk is full", "B left")), outcome
        ballast.unlink()
        operation.check(folder)

    log = tmp_path / "log"
    end = children.run(fill_up, tmp_path / "outer")
    if _NO_MOUNT in end.text:
        pytest.skip("this system lets nobody mount")
    assert end.code == 0, end.text


_NO_MOUNT = "cannot mount"


def _own_mount(folder: Path) -> None:
    """A file system of 40 MB at `folder`, seen by this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER | CLONE_NEWNS
        raise OSError(ctypes.get_errno(), _NO_MOUNT)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, b"size=40m"):
        raise OSError(ctypes.get_errno(), _NO_MOUNT)


# The harness itself ----------------------------------------------------------------------------------------------


def _naive_save(folder: Path) -> None:
    """As most trainers save: straight to the final name, the manifest with it."""
    run = RunDir(folder / "run")
    final = run.checkpoint(2)
    final.mkdir()
    good = run.checkpoint(1)
    for name, values in ((checkpoint.WEIGHTS, operations.tensors(2)), (checkpoint.OPTIMIZER, operations.tensors(-2))):
        save_file(values, final / name)
    for name in (checkpoint.STATE, checkpoint.MANIFEST):
        (final / name).write_bytes((good / name).read_bytes())


def _unsynced(folder: Path) -> None:
    """Beside and renamed, but never synced."""
    path = folder / "run" / "config.toml"
    partial = path.with_suffix(".new")
    partial.write_text(path.read_text())
    partial.rename(path)


def test_a_naive_writer_is_caught(tmp_path: Path) -> None:
    naive = replace(OPERATION["save"], act=_naive_save)
    found = [v for v in every_fault(naive, tmp_path, modes=(("kill", 0),)) if v.problem]
    assert len(found) >= 3


def test_a_writer_that_does_not_sync_is_caught(tmp_path: Path) -> None:
    def check(folder: Path) -> None:
        operations.require(RunDir(folder / "run").read_config() == CONFIG, "another configuration")

    careless = Operation("careless", OPERATION["save"].prepare, _unsynced, check)
    assert any(power_cuts(careless, tmp_path / "a"))
    careful = replace(
        careless, act=lambda f: atomic.commit_text(f / "run/config.toml", (f / "run/config.toml").read_text())
    )
    assert not any(power_cuts(careful, tmp_path / "b"))


def test_a_job_that_forgets_its_position_is_caught(tmp_path: Path) -> None:
    def count(folder: Path) -> None:
        """Appends ten lines, beginning at the first again whenever it is called."""
        path = folder / "lines"
        for number in range(0 if not path.exists() or path.read_text().count("\n") < 10 else 10, 10):
            with path.open("a") as file:
                file.write(f"{number}\n")
            time.sleep(0.01)

    for tally in killed_runs(Job("forgetful", count, files), tmp_path, random.Random(1)):
        if tally.runs == 3:
            break
    assert tally.kills and tally.lost


def _foreign(path: Path) -> None:
    raise ZeroDivisionError


def _crash(path: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _allocate(path: Path) -> None:
    bytearray(1 << 30)


def _endless(path: Path) -> None:
    time.sleep(30)


@pytest.mark.parametrize("reader", [_foreign, _crash, _allocate, _endless])
def test_readers_that_misbehave_are_caught(
    tmp_path: Path, reader: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.faults.mutations.SECONDS", 0.3)

    def read(folder: Path) -> None:
        if (folder / "a").read_bytes() != b"good" * 9:
            reader(folder)

    subject = Subject("misbehaving", lambda folder: (folder / "a").write_bytes(b"good" * 9), read)
    assert [m for m in mutants(subject, tmp_path, random.Random(0), count=4) if m.problem]


def test_our_own_errors_are_not_problems(tmp_path: Path) -> None:
    def read(folder: Path) -> None:
        if (folder / "a").read_bytes() != b"good" * 9:
            raise InputError("damaged")

    subject = Subject("polite", lambda folder: (folder / "a").write_bytes(b"good" * 9), read)
    found = list(mutants(subject, tmp_path, random.Random(0), count=6))
    assert any(mutant.refused for mutant in found) and not any(mutant.problem for mutant in found)


def test_mutations_are_reproducible_and_change_something() -> None:
    data = bytes(range(256)) * 4
    first = [mutate(data, random.Random(seed)) for seed in range(60)]
    assert first == [mutate(data, random.Random(seed)) for seed in range(60)]
    assert sum(one != data for one in first) > 50
    assert mutate(b"", random.Random(0))
