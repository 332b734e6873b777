"""Atomic writes: complete under the final name or absent, whatever fails; and what the failures say."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from affmae_engine import atomic
from affmae_engine.errors import InputError, ResourceError

LIMITED = """
import resource, sys
from pathlib import Path
from affmae_engine import atomic
from affmae_engine.errors import ResourceError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    {write}
except ResourceError as error:
    print(error.message)
"""


def limited(write: str, folder: Path) -> str:
    """What a write says in a process that may not write files over 4 KiB; `{folder}` stands for the folder."""
    code = LIMITED.format(write=write.format(folder=repr(str(folder))))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


def names(folder: Path) -> list[str]:
    """What is in a folder, hidden entries too."""
    return sorted(entry.name for entry in folder.iterdir())


class TestFile:
    def test_success(self, tmp_path):
        path = tmp_path / "a.txt"
        atomic.commit_text(path, "é\n")
        assert path.read_bytes() == b"\xc3\xa9\n"
        assert names(tmp_path) == ["a.txt"]

    def test_an_existing_file_is_replaced_whole(self, tmp_path):
        path = tmp_path / "a.bin"
        atomic.commit_bytes(path, b"old" * 1000)
        with path.open("rb") as reader:
            atomic.commit_bytes(path, b"new")
            assert reader.read() == b"old" * 1000  # who has it open keeps the old one, never a mixture
        assert path.read_bytes() == b"new"

    @pytest.mark.parametrize("failure", [ValueError("bad"), KeyboardInterrupt(), SystemExit(3), InputError("bad")])
    def test_a_writer_that_fails_midway_leaves_nothing(self, tmp_path, failure):
        path = tmp_path / "a.txt"
        path.write_text("old")

        def write(partial: Path) -> None:
            partial.write_text("half")
            raise failure

        with pytest.raises(type(failure)):
            atomic.commit_file(path, write)
        assert path.read_text() == "old"
        assert names(tmp_path) == ["a.txt"]

    @pytest.mark.parametrize(
        ("code", "reason"),
        [
            (errno.ENOSPC, "the disk is full"),
            (errno.EDQUOT, "the disk quota is used up"),
            (errno.EROFS, "the file system is read-only"),
            (errno.EACCES, "permission was denied"),
            (errno.EIO, "input/output error"),
        ],
    )
    @pytest.mark.parametrize("where", ["write", "fsync", "replace"])
    def test_failures_of_the_system(self, tmp_path, monkeypatch, code, reason, where):
        path = tmp_path / "a.txt"
        path.write_text("old")

        def fail(*_args: object, **_options: object) -> None:
            raise OSError(code, os.strerror(code))

        if where != "write":
            monkeypatch.setattr(os, where, fail)
        with pytest.raises(ResourceError) as caught:
            atomic.commit_file(path, fail if where == "write" else lambda partial: partial.write_text("new"))
        assert str(path) in caught.value.message and reason in caught.value.message
        assert caught.value.hint
        monkeypatch.undo()
        assert path.read_text() == "old"
        assert names(tmp_path) == ["a.txt"]

    def test_other_errors_of_the_system_are_not_disguised(self, tmp_path):
        def fail(partial: Path) -> None:
            raise OSError(errno.ETXTBSY, "busy")

        with pytest.raises(OSError, match="busy"):
            atomic.commit_file(tmp_path / "a", fail)

    def test_a_file_over_the_limit_of_the_process(self, tmp_path):
        text = limited("atomic.commit_bytes(Path({folder}) / 'a.bin', bytes(8192))", tmp_path)
        assert "a.bin: the file is larger than this system allows" in text
        assert names(tmp_path) == []

    def test_libraries_that_hide_a_full_disk(self, tmp_path, monkeypatch):
        """torch raises RuntimeError and safetensors its own class when a write comes up short."""

        def short(partial: Path) -> None:
            raise RuntimeError("unexpected pos 64 vs 0")

        with pytest.raises(RuntimeError):
            atomic.commit_file(tmp_path / "a", short)
        monkeypatch.setattr(atomic, "_free_bytes", lambda path: 0)
        with pytest.raises(ResourceError, match="the disk is full"):
            atomic.commit_file(tmp_path / "a", short)

    def test_safetensors_over_the_limit(self, tmp_path):
        write = (
            "import numpy, safetensors.numpy\n"
            "    tensors = {{'x': numpy.zeros(4096)}}\n"
            "    path = Path({folder}) / 'a.safetensors'\n"
            "    atomic.commit_file(path, lambda partial: safetensors.numpy.save_file(tensors, partial))"
        )
        text = limited(write, tmp_path)
        assert "cannot write" in text and "larger than this system allows" in text
        assert names(tmp_path) == []

    @pytest.mark.usefixtures("permissions_count")
    def test_a_read_only_folder(self, tmp_path):
        tmp_path.chmod(0o500)
        try:
            with pytest.raises(ResourceError, match="permission was denied"):
                atomic.commit_text(tmp_path / "a.txt", "x")
        finally:
            tmp_path.chmod(0o700)

    def test_folders_in_the_wrong_place(self, tmp_path):
        (tmp_path / "file").write_text("")
        (tmp_path / "folder").mkdir()
        with pytest.raises(ResourceError, match="a part of the path is a file"):
            atomic.commit_text(tmp_path / "file" / "a.txt", "x")
        with pytest.raises(ResourceError, match="a folder of that name exists"):
            atomic.commit_text(tmp_path / "folder", "x")
        with pytest.raises(ResourceError, match="its folder does not exist"):
            atomic.commit_text(tmp_path / "gone" / "a.txt", "x")
        assert names(tmp_path) == ["file", "folder"]

    @pytest.mark.parametrize("name", ["x" * 255, "é" * 127, os.fsdecode(b"\xff" * 255), "中" * 85, "[a]*?.txt"])
    def test_very_long_and_strange_names(self, tmp_path, name):
        atomic.commit_text(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"
        assert len(names(tmp_path)) == 1

    def test_a_name_that_is_too_long(self, tmp_path):
        with pytest.raises(ResourceError, match="the name is too long"):
            atomic.commit_text(tmp_path / ("x" * 256), "x")
        assert names(tmp_path) == []


class TestJson:
    def test_round_trip_of_undecodable_names(self, tmp_path):
        value = {"path": os.fsdecode(b"caf\xe9.tif"), "text": "é\\udce9\n", "number": 0.1}
        atomic.commit_json(tmp_path / "a.json", value)
        text = (tmp_path / "a.json").read_text("utf-8")
        assert json.loads(text) == value
        assert text.endswith("}\n") and "é" in text

    def test_numbers_that_json_lacks_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="not JSON compliant"):
            atomic.commit_json(tmp_path / "a.json", {"loss": float("nan")})
        assert names(tmp_path) == []


class TestFolder:
    def test_success(self, tmp_path):
        with atomic.committed_folder(tmp_path / "a") as folder:
            (folder / "deep" / "er").mkdir(parents=True)
            (folder / "deep" / "er" / "x").write_text("x")
            assert not (tmp_path / "a").exists()
        assert (tmp_path / "a" / "deep" / "er" / "x").read_text() == "x"
        assert names(tmp_path) == ["a"]

    @pytest.mark.parametrize("failure", [RuntimeError("bad"), KeyboardInterrupt()])
    def test_a_failure_inside_leaves_nothing(self, tmp_path, failure):
        with pytest.raises(type(failure)), atomic.committed_folder(tmp_path / "a") as folder:
            (folder / "x").write_text("x")
            raise failure
        assert names(tmp_path) == []

    def test_a_full_disk_inside(self, tmp_path):
        with pytest.raises(ResourceError, match="the disk is full"), atomic.committed_folder(tmp_path / "a") as folder:
            (folder / "x").write_text("x")
            raise OSError(errno.ENOSPC, "no space")
        assert names(tmp_path) == []

    def test_an_existing_folder_is_left_alone(self, tmp_path):
        (tmp_path / "a").mkdir()
        with pytest.raises(FileExistsError), atomic.committed_folder(tmp_path / "a"):
            raise AssertionError("must not get here")
        assert names(tmp_path) == ["a"]

    def test_replacing(self, tmp_path):
        for text in ("old", "new"):
            with atomic.committed_folder(tmp_path / "a", replace=True) as folder:
                (folder / text).write_text(text)
        assert names(tmp_path) == ["a"]
        assert names(tmp_path / "a") == ["new"]

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux swaps folders in one step")
    def test_replacing_needs_no_moment_without_either(self, tmp_path, monkeypatch):
        final = tmp_path / "a"
        with atomic.committed_folder(final) as folder:
            (folder / "old").write_text("old")
        monkeypatch.delattr(Path, "rename")
        with atomic.committed_folder(final, replace=True) as folder:
            (folder / "new").write_text("new")
        assert names(tmp_path) == ["a"] and names(final) == ["new"]

    def test_a_failed_replacement_keeps_the_old_one(self, tmp_path):
        with atomic.committed_folder(tmp_path / "a") as folder:
            (folder / "old").write_text("old")
        with pytest.raises(RuntimeError), atomic.committed_folder(tmp_path / "a", replace=True) as folder:
            raise RuntimeError("bad")
        assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["old"]

    @pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt()])
    def test_a_replacement_interrupted_between_its_renames_keeps_the_old_one(self, tmp_path, monkeypatch, failure):
        final = tmp_path / "a"
        with atomic.committed_folder(final) as folder:
            (folder / "old").write_text("old")
        rename = Path.rename

        def failing(self: Path, target: Path) -> Path:
            if target == final and (self / "new").exists():
                raise failure
            return rename(self, target)

        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)  # as where there is no such call
        monkeypatch.setattr(Path, "rename", failing)
        expected = ResourceError if isinstance(failure, OSError) else KeyboardInterrupt
        with pytest.raises(expected), atomic.committed_folder(final, replace=True) as folder:
            (folder / "new").write_text("new")
        assert names(tmp_path) == ["a"] and names(final) == ["old"]

    def test_a_killed_process_leaves_nothing_under_the_final_name(self, tmp_path):
        code = (
            "import os, signal; from pathlib import Path; from affmae_engine import atomic\n"
            f"with atomic.committed_folder(Path({str(tmp_path)!r}) / 'a') as folder:\n"
            "    (folder / 'x').write_text('x')\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
        assert done.returncode == -signal.SIGKILL
        assert not (tmp_path / "a").exists()
        (left,) = tmp_path.iterdir()
        assert left.name.startswith(".a.") and left.name.endswith(".partial")
        assert atomic.sweep(tmp_path) == 1
        assert names(tmp_path) == []


class TestSweep:
    def test_only_leftovers_go(self, tmp_path):
        for name in ("a", ".hidden", "a.partial", ".a.0123.partial", ".b.0123.partial"):
            (tmp_path / name).write_text("")
        (tmp_path / ".c.0123.partial" / "deep").mkdir(parents=True)
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / ".d.0123.partial").write_text("")
        assert atomic.sweep(tmp_path) == 3
        assert names(tmp_path) == [".hidden", "a", "a.partial", "sub"]
        assert names(tmp_path / "sub") == [".d.0123.partial"]

    @pytest.mark.parametrize("name", ["a.tif", "x" * 255, "[1]*.tif"])
    def test_of_one_name(self, tmp_path, name):
        other = tmp_path / ".other.0123.partial"
        other.write_text("")

        def write(partial: Path) -> None:
            partial.with_name(partial.name.replace(".partial", "2.partial")).write_text("as a killed writer leaves it")
            partial.write_text("x")

        atomic.commit_file(tmp_path / name, write)
        assert atomic.sweep(tmp_path, name) == 1
        assert names(tmp_path) == sorted([name, other.name])

    @pytest.mark.parametrize(
        ("name", "other"),
        [
            ("小" * 40 + "_001.tif", "小" * 40 + "_002.tif"),
            ("Щ" * 60 + "_001.tif", "Щ" * 60 + "_002.tif"),
            ("x" * 252 + "001", "x" * 252 + "002"),
            ("a", "a.tif"),
            ("a.tif", "a"),
            (os.fsdecode(b"caf\xe9"), "caf"),
        ],
        ids=["japanese", "cyrillic", "longest", "longer", "shorter", "not utf-8"],
    )
    def test_never_of_another_name(self, tmp_path, name, other):
        def write(partial: Path) -> None:
            partial.write_text("x")
            assert atomic.sweep(tmp_path, other) == 0

        atomic.commit_file(tmp_path / name, write)
        assert names(tmp_path) == [name]
        assert all(len(os.fsencode(atomic.short_stem(text))) <= 120 for text in (name, other))

    def test_a_link_is_removed_not_followed(self, tmp_path):
        (tmp_path / "keep").mkdir()
        (tmp_path / "keep" / "x").write_text("x")
        (tmp_path / ".a.0.partial").symlink_to(tmp_path / "keep")
        assert atomic.sweep(tmp_path) == 1
        assert (tmp_path / "keep" / "x").exists()

    def test_nothing_there(self, tmp_path):
        assert atomic.sweep(tmp_path / "gone") == 0


class TestEnsureFolder:
    def test_made_with_its_parents(self, tmp_path):
        assert atomic.ensure_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
        assert names(tmp_path / "a" / "b") == []
        atomic.ensure_folder(tmp_path / "a" / "b")

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "a").write_text("")
        with pytest.raises(ResourceError, match="a file of that name exists"):
            atomic.ensure_folder(tmp_path / "a")
        with pytest.raises(ResourceError, match="a part of the path is a file"):
            atomic.ensure_folder(tmp_path / "a" / "b")

    @pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
    def test_a_folder_that_cannot_be_written_to(self, tmp_path, monkeypatch, code):
        def fail(*_args: object, **_options: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(Path, "touch", fail)
        with pytest.raises(ResourceError, match="cannot write"):
            atomic.ensure_folder(tmp_path)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that refuses folders")
def test_ensure_folder_says_when_the_file_system_refuses() -> None:
    with pytest.raises(ResourceError, match="/proc/affmae"):
        atomic.ensure_folder(Path("/proc/affmae"))
