"""Run directories: making, refusing, finding, locking, and what is read back from them."""

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from affmae_engine import run_dir
from affmae_engine.config import RunConfig
from affmae_engine.errors import BusyError, ConfigError, CorruptError, InputError, ResourceError
from affmae_engine.run_dir import RunDir

CONFIG = RunConfig.model_validate(
    {"finetune": {"class_names": ['a "b"', "é"], "ignore_label": 3}, "train": {"epochs": 2.5, "micro_batch": 4}}
)


def make(root: Path) -> RunDir:
    """A run with a configuration and one checkpoint."""
    run = run_dir.create(root)
    run.write_config(CONFIG, "finetune")
    run.checkpoint(5).mkdir()
    (run.checkpoint(5) / "state.json").write_text("{}")
    return run


class TestCreate:
    def test_new(self, tmp_path):
        run = run_dir.create(tmp_path / "deep" / "a")
        assert sorted(entry.name for entry in run.root.iterdir()) == ["checkpoints", "control", "previews"]
        assert not run.exists()

    def test_an_empty_folder_is_taken(self, tmp_path):
        assert run_dir.create(tmp_path).checkpoints.is_dir()

    def test_what_a_failed_start_left_is_taken(self, tmp_path):
        run = run_dir.create(tmp_path / "a")
        with run.locked():
            pass
        assert run_dir.create(tmp_path / "a") == run

    def test_a_run_killed_before_its_configuration_was_written_is_taken(self, tmp_path):
        run = run_dir.create(tmp_path / "a")
        (run.root / ".config.toml.0a1b2c3d.partial").write_text("[optim")
        run_dir.create(tmp_path / "a")
        assert not list(run.root.glob(".*"))

    def test_an_existing_run_is_refused_with_the_three_ways_out(self, tmp_path):
        run = make(tmp_path / "a")
        with pytest.raises(ConfigError) as caught:
            run_dir.create(run.root)
        assert all(way in caught.value.hint for way in ("--resume", "--out", "--overwrite"))
        assert run.checkpoint_steps() == [5]

    def test_overwrite_replaces_everything(self, tmp_path):
        run = make(tmp_path / "a")
        (run.root / "link").symlink_to(tmp_path)
        run_dir.create(run.root, overwrite=True)
        assert not run.exists()
        assert run.checkpoint_steps() == []
        assert tmp_path.exists()

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_something_else_is_never_deleted(self, tmp_path, overwrite):
        (tmp_path / "thesis.txt").write_text("years of work")
        with pytest.raises(ConfigError, match="is not a run directory"):
            run_dir.create(tmp_path, overwrite=overwrite)
        assert (tmp_path / "thesis.txt").read_text() == "years of work"
        assert list(tmp_path.iterdir()) == [tmp_path / "thesis.txt"]

    def test_a_run_that_was_killed_before_it_had_a_configuration_can_be_begun_again(self, tmp_path):
        run = run_dir.create(tmp_path / "a")
        run.environment.write_text("{}")
        (run.root / ".config.toml.0123abcd.partial").write_text("[mod")
        assert run_dir.create(run.root) == run

    def test_checkpoints_without_a_configuration_are_never_deleted(self, tmp_path):
        run = make(tmp_path / "a")
        run.config.unlink()
        with pytest.raises(ConfigError, match="is not a run directory"):
            run_dir.create(run.root, overwrite=True)
        assert run.checkpoint_steps() == [5]

    def test_a_run_in_use_is_not_overwritten(self, tmp_path):
        run = make(tmp_path / "a")
        with run.locked(), pytest.raises(BusyError):
            run_dir.create(run.root, overwrite=True)
        assert run.checkpoint_steps() == [5]

    def test_an_interrupted_overwrite_can_be_repeated(self, tmp_path, monkeypatch):
        run = make(tmp_path / "a")
        monkeypatch.setattr(run_dir.shutil, "rmtree", lambda path: (_ for _ in ()).throw(PermissionError(13, "no")))
        with pytest.raises(ResourceError, match="permission was denied"):
            run_dir.create(run.root, overwrite=True)
        monkeypatch.undo()
        assert run.exists()
        run_dir.create(run.root, overwrite=True)
        assert not run.exists()

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "a").write_text("")
        with pytest.raises(ResourceError, match="a file of that name exists"):
            run_dir.create(tmp_path / "a")


class TestFind:
    def test_open(self, tmp_path):
        assert run_dir.open_run(make(tmp_path / "a").root).read_config() == CONFIG

    def test_hints_name_near_runs(self, tmp_path):
        make(tmp_path / "mito-1")
        make(tmp_path / "nuclei")
        with pytest.raises(InputError, match="no such run") as caught:
            run_dir.open_run(tmp_path / "mito")
        assert caught.value.hint == "runs there: mito-1"
        (tmp_path / "empty").mkdir()
        with pytest.raises(InputError, match=r"no config\.toml") as caught:
            run_dir.open_run(tmp_path / "empty")
        assert "mito-1" in caught.value.hint

    def test_hint_without_any_runs(self, tmp_path):
        with pytest.raises(InputError) as caught:
            run_dir.open_run(tmp_path / "nowhere" / "a")
        assert "affmae pretrain" in caught.value.hint

    def test_a_run_is_known_by_its_name_where_one_stands_in_it(self, tmp_path, monkeypatch):
        run = make(tmp_path / "em")
        monkeypatch.chdir(run.checkpoints)
        assert run_dir.open_run(Path("..")).root == run.root
        monkeypatch.chdir(run.root)
        assert run_dir.open_run(Path()).root.name == "em"

    @pytest.mark.parametrize("text", ["a = " + "1" * 5000, "a = " + "[" * 3000 + "]" * 3000])
    def test_a_configuration_beyond_all_bounds(self, tmp_path, text):
        run = make(tmp_path / "a")
        run.config.write_text(text)
        with pytest.raises(CorruptError, match="not valid TOML"):
            run.read_config()

    def test_list_is_ordered_by_age(self, tmp_path):
        for number, name in enumerate(["c", "a", "b"]):
            run = make(tmp_path / name)
            os.utime(run.config, (number, number))
        (tmp_path / "other").mkdir()
        (tmp_path / "file").write_text("")
        assert [run.root.name for run in run_dir.list_runs(tmp_path)] == ["c", "a", "b"]
        assert run_dir.list_runs(tmp_path / "gone") == []

    @pytest.mark.usefixtures("permissions_count")
    def test_runs_of_others_are_passed_over(self, tmp_path):
        theirs, mine = make(tmp_path / "theirs"), make(tmp_path / "mine")
        theirs.root.chmod(0)
        try:
            assert [run.root for run in run_dir.list_runs(tmp_path)] == [mine.root]
            with pytest.raises(InputError, match="Permission denied"):
                theirs.read_config()
        finally:
            theirs.root.chmod(0o700)
        tmp_path.chmod(0)
        try:
            assert run_dir.list_runs(tmp_path) == []
        finally:
            tmp_path.chmod(0o700)

    def test_a_run_that_holds_what_is_to_be_read_is_not_replaced(self, tmp_path):
        run = make(tmp_path / "a")
        (tmp_path / "link").symlink_to(run.root)
        run.refuse_to_replace([tmp_path, tmp_path / "ab"])
        for inside in (run.root, tmp_path / "link" / "images.tif"):
            with pytest.raises(ConfigError, match=f"{inside} lies in the run"):
                run.refuse_to_replace([tmp_path, inside])

    def test_free_name(self, tmp_path):
        assert run_dir.free_name(tmp_path, "a") == tmp_path / "a"
        (tmp_path / "a").mkdir()
        (tmp_path / "a-2").mkdir()
        assert run_dir.free_name(tmp_path, "a") == tmp_path / "a-3"

    def test_checkpoints_newest_first_by_number(self, tmp_path):
        run = make(tmp_path / "a")
        for name in ("step-000010", "step-1000000", "step-999999", ".step-000020.ab.partial", "step-7", "best"):
            (run.checkpoints / name).mkdir()
        (run.checkpoints / "step-000030").write_text("a file")
        assert run.checkpoint_steps() == [1_000_000, 999_999, 10, 5]
        assert run.checkpoint(1_000_000).is_dir()
        assert RunDir(tmp_path / "gone").checkpoint_steps() == []

    def test_preview_names(self, tmp_path):
        run = RunDir(tmp_path)
        assert run.preview(5).name == "step-000005.png"
        assert run.preview(5, "tokens").name == "step-000005-tokens.png"


class TestConfig:
    def test_round_trip_says_the_task(self, tmp_path):
        run = make(tmp_path / "a")
        text = run.config.read_text("utf-8")
        assert text.startswith("# affmae finetune")
        assert "tile" not in tomllib.loads(text)["predict"]
        assert run.read_config() == CONFIG

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"[optim\n", "is not valid TOML"),
            (b"# caf\xe9\n", "is not valid TOML"),
            (b"a = " + b"[" * 100_000, "is not valid TOML"),
            (b"[optim]\nlrr = 1\n", "optim.lrr"),
            (b"[train]\nbatch_size = 3\nmicro_batch = 2\n", "must be a multiple"),
        ],
    )
    def test_corrupt(self, tmp_path, content, said):
        run = make(tmp_path / "a")
        run.config.write_bytes(content)
        with pytest.raises(CorruptError) as caught:
            run.read_config()
        assert said in caught.value.message and str(run.config) in caught.value.message
        assert ": :" not in caught.value.message

    def test_no_run(self, tmp_path):
        with pytest.raises(InputError):
            RunDir(tmp_path).read_config()

    def test_read_json_is_forgiving(self, tmp_path):
        run = RunDir(tmp_path)
        assert run.read_json(run.summary) == {}
        for content, value in ((b'{"a": 1}', {"a": 1}), (b'{"a": ', {}), (b"[1]", {}), (b"\xff", {})):
            run.summary.write_bytes(content)
            assert run.read_json(run.summary) == value


HOLDER = """
import sys, time
from pathlib import Path
from affmae_engine.run_dir import RunDir
with RunDir(Path(sys.argv[1])).locked():
    print("locked", flush=True)
    time.sleep(60)
"""


class TestLock:
    def test_a_second_process_is_told_who_holds_it_until_that_one_is_killed(self, tmp_path):
        run = make(tmp_path / "a")
        holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run.root)], stdout=subprocess.PIPE, text=True)
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
            with pytest.raises(BusyError) as caught, run.locked():
                raise AssertionError("must not get here")
            assert f"process {holder.pid} on" in caught.value.message
            assert caught.value.exit_code == 5
        finally:
            holder.kill()
            holder.communicate(timeout=60)
        with run.locked():
            assert f"process {os.getpid()} on" in run.lock.read_text()

    def test_released_at_the_end_and_after_a_failure(self, tmp_path):
        run = make(tmp_path / "a")
        for failure in (None, ValueError("bad")):
            with contextlib.suppress(ValueError), run.locked():
                if failure:
                    raise failure
        with run.locked():
            pass

    def test_errors_of_the_body_are_not_touched(self, tmp_path):
        run = make(tmp_path / "a")
        with pytest.raises(OSError, match="body") as caught, run.locked():
            raise OSError(errno.ENOSPC, "body")
        assert not isinstance(caught.value, ResourceError)

    def test_a_folder_that_is_gone(self, tmp_path):
        with pytest.raises(ResourceError, match="its folder does not exist"), RunDir(tmp_path / "gone").locked():
            raise AssertionError("must not get here")

    def test_a_file_system_without_locks(self, tmp_path, monkeypatch):
        def fail(*_args: object) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "flock", fail)
        run = make(tmp_path / "a")
        with pytest.raises(ResourceError, match="cannot lock"), run.locked():
            raise AssertionError("must not get here")


def test_configuration_of_version_0_1_is_read(tmp_path: Path) -> None:
    """It has a field that is gone."""
    run = run_dir.create(tmp_path / "run")
    run.write_config(RunConfig(), "pretrain")
    run.config.write_text(run.config.read_text().replace("[kernels]\n", '[kernels]\ncompile = "auto"\n'))
    assert "compile" in run.config.read_text()
    assert run.read_config() == RunConfig()
