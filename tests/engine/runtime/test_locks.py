"""A lock on a file names its holder, and is released with it. (Runs lock by it too: tests/engine/test_run_dir.py.)"""

import os
import socket
from pathlib import Path

import pytest

from affmae_engine.errors import BusyError
from affmae_engine.runtime.locks import FileLock, Holder, holder_of


def test_a_held_lock_is_refused_with_its_holder(tmp_path: Path) -> None:
    first, second = (FileLock(tmp_path / "lock", "the store is being written", "wait for it") for _ in range(2))
    with first:
        assert holder_of(tmp_path / "lock") == Holder("held", os.getpid(), socket.gethostname())
        with pytest.raises(BusyError) as caught:
            second.acquire()
    assert caught.value.message == f"the store is being written by process {os.getpid()} on {socket.gethostname()}"
    assert caught.value.hint == "wait for it"
    second.acquire()
    second.release()
    second.release()
    assert holder_of(tmp_path / "lock") == Holder("free", os.getpid(), socket.gethostname())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, Holder("free")),
        ("", Holder("free")),
        ("no holder of ours", Holder("free")),
        ("process 12 on elsewhere", Holder("unknown", 12, "elsewhere")),
    ],
)
def test_what_a_lock_file_tells(text: str | None, expected: Holder, tmp_path: Path) -> None:
    """A lock that looks free proves nothing where another machine held it last: its file system may not tell."""
    if text is not None:
        (tmp_path / "lock").write_text(text)
    assert holder_of(tmp_path / "lock") == expected
