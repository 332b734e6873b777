"""The work folder: plans, markers, locks."""

import json
import multiprocessing
from pathlib import Path

import pytest

from affmae_engine.errors import BusyError, ConfigError, CorruptError
from affmae_engine.predict.work import Marker, Work, work_folder


def test_the_first_plan_holds(tmp_path: Path) -> None:
    work = Work(tmp_path / "out.zarr")
    assert work.read_plan() is None
    with work.locked(shared=True):
        first = work.publish_plan({"made_from": {"a": 1}, "batch": 4})
        second = work.publish_plan({"made_from": {"a": 1}, "batch": 8})
    assert first == second and first["batch"] == 4
    assert sorted(entry.name for entry in work.folder.iterdir()) == ["blocks", "lock", "plan.json"]


def test_another_plan_is_refused_by_what_differs(tmp_path: Path) -> None:
    work = Work(tmp_path / "out.zarr")
    with pytest.raises(ConfigError, match="another overlap, pixel size") as caught:
        work.refuse_other({"overlap": 0.5, "pixel_size": [1], "tile": 8}, {"overlap": 0.25, "tile": 8})
    assert "--overwrite" in caught.value.hint
    work.refuse_other({"tile": 8}, {"tile": 8})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 99}', "[" * 10000])
def test_a_damaged_plan_is_told(tmp_path: Path, text: str) -> None:
    work = Work(tmp_path / "out.zarr")
    work.folder.mkdir()
    work.plan_file.write_text(text)
    with pytest.raises(CorruptError) as caught:
        work.read_plan()
    assert "--overwrite" in caught.value.hint


def test_markers_carry_the_hash(tmp_path: Path) -> None:
    work = Work(tmp_path / "out.zarr")
    work.blocks.mkdir(parents=True)
    for number in (0, 2, 5):
        work.mark(number, "key", Marker((3, number), 4))
    work.mark(4, "other", Marker((1,), 4))
    (work.blocks / "00000001.json").write_text('{"key": "key"')
    (work.blocks / "00000003.json").write_text(json.dumps({"key": "key", "counts": "x", "batch": None}))
    assert work.finished("key", range(5)) == {0, 2}
    assert work.marker(5, "key") == Marker((3, 5), 4)
    assert work.marker(4, "key") is None and work.marker(1, "key") is None


def hold(folder: str, shared: bool, ready: "multiprocessing.synchronize.Event", stop: "object") -> None:
    with Work(Path(folder) / "out.zarr").locked(shared=shared):
        ready.set()
        stop.wait(30)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("first", "second", "busy"), [(True, True, False), (True, False, True), (False, True, True)])
def test_shards_share_and_whole_runs_do_not(tmp_path: Path, first: bool, second: bool, busy: bool) -> None:
    context = multiprocessing.get_context("spawn")
    ready, stop = context.Event(), context.Event()
    process = context.Process(target=hold, args=(str(tmp_path), first, ready, stop))
    process.start()
    try:
        assert ready.wait(30)
        if busy:
            with (
                pytest.raises(BusyError, match=f"process {process.pid}"),
                Work(tmp_path / "out.zarr").locked(shared=second),
            ):
                pass
        else:
            with Work(tmp_path / "out.zarr").locked(shared=second):
                assert work_folder(tmp_path / "out.zarr").is_dir()
    finally:
        stop.set()
        process.join()


def test_nothing_begun_leaves_nothing_and_long_names_fit(tmp_path: Path) -> None:
    names = [f"{'小' * 80}_{number}.tif" for number in (1, 2)]
    folders = {work_folder(tmp_path / name) for name in names}
    assert len(folders) == 2
    with Work(tmp_path / names[0]).locked():
        assert Work(tmp_path / names[0]).folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_only_one_process_finishes(tmp_path: Path) -> None:
    work = Work(tmp_path / "out.zarr")
    with work.finishing() as mine:
        assert not mine  # nothing is under way
    with work.locked():
        work.publish_plan({})
        with work.finishing() as mine, work.finishing() as other:
            assert mine and not other
