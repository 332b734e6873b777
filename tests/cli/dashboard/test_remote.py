"""Runs on another machine: a stand-in for ssh runs the script on this machine."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from affmae_cli.dashboard.remote import Mirror, Remote, mirrored
from affmae_cli.dashboard.run_model import RunModel
from affmae_engine import events
from affmae_engine.errors import InputError
from tests.cli.dashboard.conftest import Recorded
from tests.cli.dashboard.driving import started, stepped

SSH = """#!/bin/sh
while [ "$1" != "--" ]; do shift; done
shift; [ "$1" = "me@box" ] || { echo "ssh: cannot resolve $1" >&2; exit 255; }
shift; exec sh -c "$*"
"""


@pytest.fixture(autouse=True)
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(SSH)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("me@box:runs", Remote("me@box", "runs")),
        ("box:", Remote("box", ".")),
        ("box:/a b/runs", Remote("box", "/a b/runs")),
        ("runs/em", None),
        ("./a:b", None),
        ("-oProxyCommand=x:runs", None),
        ("runs", None),
    ],
)
def test_what_names_another_machine(text: str, found: Remote | None) -> None:
    assert Remote.parse(text) == found


def test_runs_are_copied_as_they_grow(record: Callable[..., Recorded], tmp_path: Path) -> None:
    run = record(started(), stepped(1), name="a 'run' $HOME")
    run.run.log.write_text("first\n")
    run.run.preview(1).write_bytes(b"picture")
    (run.root / "weights").write_bytes(b"x" * 1000)
    with run.run.locked(), mirrored(Remote("me@box", str(run.root.parent))) as folder:
        here = folder / run.root.name
        model = RunModel(here)
        model.poll()
        assert model.step == 1 and model.log_tail() == ["first"] and model.status.kind == "running"
        assert model.place == f"me@box:{run.root.parent}/{run.root.name}"
        assert (here / "previews" / "step-000001.png").read_bytes() == b"picture"
        assert not (here / "weights").exists()
        run.add(stepped(2))
        end = time.monotonic() + 20
        while model.step < 2:
            assert time.monotonic() < end
            model.poll()
            time.sleep(0.05)
    assert not folder.exists()


def test_requests_reach_the_trainer_and_come_back_as_taken(record: Callable[..., Recorded], tmp_path: Path) -> None:
    run = record(started(), stepped(1))
    (tmp_path / "copy").mkdir()
    mirror = Mirror(Remote("me@box", str(run.root)), tmp_path / "copy")
    mirror.sync()
    asked = tmp_path / "copy" / "control" / "stop"
    asked.touch()
    mirror.sync()
    assert (run.run.control / "stop").exists() and asked.exists()
    (run.run.control / "stop").unlink()
    mirror.sync()
    assert not asked.exists() and not (run.run.control / "stop").exists()
    mirror.close()


def test_a_file_that_was_replaced_is_copied_anew_and_a_lost_connection_is_made_again(
    record: Callable[..., Recorded], tmp_path: Path
) -> None:
    run = record(started(), *(stepped(n) for n in range(1, 9)))
    (tmp_path / "copy").mkdir()
    mirror = Mirror(Remote("me@box", str(run.root)), tmp_path / "copy")
    mirror.sync()
    run.run.metrics.write_text(events.to_line(started()) + "\n")
    mirror.close()
    mirror.sync()
    assert (tmp_path / "copy" / "metrics.jsonl").read_bytes() == run.run.metrics.read_bytes()
    mirror.close()


def test_names_that_lead_elsewhere_are_passed_over(record: Callable[..., Recorded], tmp_path: Path) -> None:
    run = record(started())
    evil = tmp_path / "bin" / "evil"
    evil.write_text(
        "#!/bin/sh\nread line\nprintf '5 ../../config.toml\\n5 /etc/log.txt\\n5 x/y/config.toml\\nend\\n'\ncat\n"
    )
    evil.chmod(0o755)
    shutil.copy(evil, tmp_path / "bin" / "ssh")
    (tmp_path / "copy").mkdir()
    mirror = Mirror(Remote("me@box", str(run.root)), tmp_path / "copy")
    mirror.sync()
    mirror.close()
    assert [path.name for path in (tmp_path / "copy").rglob("*")] == [".origin"]


@pytest.mark.parametrize(("host", "says"), [("me@box", "no such folder"), ("elsewhere", "cannot resolve elsewhere")])
def test_what_cannot_be_reached_is_an_error_with_a_hint(tmp_path: Path, host: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as error, mirrored(Remote(host, str(tmp_path / "missing"))):
        pass
    assert f"ssh {host}" in error.value.hint
