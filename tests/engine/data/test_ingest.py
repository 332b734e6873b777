"""Ingestion from files to a store: what is taken, skipped, known already; interruption, damage on the way, labels."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from affmae_engine.data import ingest as module
from affmae_engine.data.ingest import IngestProgress, ingest, source_key
from affmae_engine.data.readers import files, open_sources
from affmae_engine.data.readers.arrays import ArraySource
from affmae_engine.data.readers.sandbox import Isolated
from affmae_engine.data.split import split
from affmae_engine.data.store import Store
from affmae_engine.data.store_layout import StorePaths
from affmae_engine.errors import BusyError, ConfigError, InputError, ResourceError

ALL = slice(None)


def picture(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(20, 200, shape).astype(np.uint8)


def write(folder: Path, **images: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        tifffile.imwrite(folder / f"{name}.tif", image, photometric="minisblack")


def names(store: Path) -> list[str]:
    return [image.name for image in Store.open(store).images]


def begun(store: Path) -> list[str]:
    """Images of which anything is there, finished or not."""
    return sorted(entry.name for entry in (store / "images").iterdir() if entry.is_dir())


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("affmae_engine.data.store_layout._SHARD_BYTES", 4096)


@pytest.mark.parametrize("workers", [1, 3])
def test_takes_everything_and_reports_it(tmp_path: Path, small_shards: None, workers: int) -> None:
    stack, single = picture((7, 90, 60)), picture((50, 40), 1)
    write(tmp_path / "in", stack=stack)
    Image.fromarray(single).save(tmp_path / "in" / "single.png")
    Image.fromarray(np.full((40, 40), 9, np.uint8)).save(tmp_path / "in" / "blank.png")
    (tmp_path / "in" / "broken.tif").write_bytes(b"II*\0garbage")
    (tmp_path / "in" / "notes.txt").write_text("hello")
    group = zarr.create_group(tmp_path / "in" / "v.zarr")
    for part in ("a", "b"):
        group.create_array(part, shape=(3, 20, 20), dtype="uint16", chunks=(3, 20, 20))[:] = picture(
            (3, 20, 20), ord(part)
        )
    seen: list[IngestProgress] = []
    report = ingest([tmp_path / "in"], tmp_path / "em.zarr", workers=workers, on_progress=seen.append)
    assert sorted(image.name for image in report.taken) == ["blank", "single", "stack", "v-a", "v-b"]
    assert [Path(entry.path).name for entry in report.skipped] == ["broken.tif"]
    store = Store.open(tmp_path / "em.zarr")
    np.testing.assert_array_equal(store.read("stack", ALL, ALL, ALL), stack)
    np.testing.assert_array_equal(store.read("single", ALL, ALL, ALL)[0], single)
    assert store["stack"].statistics.mean == pytest.approx(stack.mean())
    assert store["blank"].statistics.blank
    assert store["v-a"].source_series == "a"
    assert (seen[-1].done, seen[-1].images_done) == (seen[-1].total, 5)
    assert [p.done for p in seen if p.stage == "write"] == sorted(p.done for p in seen if p.stage == "write")
    manifest = json.loads(StorePaths(tmp_path / "em.zarr").manifest.read_text())
    assert len(manifest["taken"]) == 5
    assert manifest["skipped"][0]["reason"]
    with Image.open(report.overview or "") as sheet:
        assert sheet.size[0] > 300
    root = json.loads((tmp_path / "em.zarr" / "zarr.json").read_text())["attributes"]["affmae"]
    assert root["schema"] == 1
    assert root["statistics"]["mean"] == pytest.approx(store.statistics.mean)


def test_worker_count_does_not_change_the_store(tmp_path: Path, small_shards: None) -> None:
    rng = np.random.default_rng(0)
    write(tmp_path / "in", a=rng.normal(0, 1, (5, 80, 70)).astype(np.float32), b=picture((3, 30, 30)))
    for workers in (1, 4):
        ingest([tmp_path / "in"], tmp_path / f"{workers}.zarr", workers=workers)
    one, four = (Store.open(tmp_path / f"{n}.zarr") for n in (1, 4))
    assert one.fingerprint() == four.fingerprint()
    assert [i.statistics for i in one.images] == [i.statistics for i in four.images]
    assert [i.name for i in one.images] == [i.name for i in four.images]


def test_rerun_adds_only_what_is_new(tmp_path: Path) -> None:
    write(tmp_path / "in", a=picture((20, 30)))
    ingest([tmp_path / "in"], tmp_path / "em.zarr")
    shard = StorePaths(tmp_path / "em.zarr").array("a") / "c/0/0/0"
    before = shard.stat().st_mtime_ns
    write(tmp_path / "in", b=picture((20, 30), 1))
    (tmp_path / "in" / "copy of a.tif").write_bytes((tmp_path / "in" / "a.tif").read_bytes())
    report = ingest([tmp_path / "in"], tmp_path / "em.zarr")
    assert [image.name for image in report.taken] == ["b"]
    assert [(Path(p.path).name, p.name) for p in report.present] == [("a.tif", "a"), ("copy of a.tif", "a")]
    assert shard.stat().st_mtime_ns == before
    again = ingest([tmp_path / "in"], tmp_path / "em.zarr")
    assert (len(again.taken), len(again.present), again.images) == (0, 3, 2)


def test_same_name_with_other_content_becomes_another_image(tmp_path: Path) -> None:
    write(tmp_path / "in", a=picture((20, 30)))
    ingest([tmp_path / "in"], tmp_path / "em.zarr")
    write(tmp_path / "in", a=picture((20, 30), 5), b=picture((20, 30), 6))
    report = ingest([tmp_path / "in"], tmp_path / "em.zarr")
    assert names(tmp_path / "em.zarr") == ["a", "a-2", "b"]
    notes = {image.name: image.notes for image in report.taken}
    assert "a former version" in notes["a-2"][0] and notes["b"] == ()


def test_a_stack_that_grew_and_was_taken_again_is_not_trained_and_validated_on(tmp_path: Path) -> None:
    stack, store = picture((40, 32, 32)), tmp_path / "em.zarr"
    for depth in (20, 40):
        write(tmp_path / "in", stack=stack[:depth])
        ingest([tmp_path / "in"], store)
    images = Store.open(store).images
    assert [image.name for image in images] == ["stack", "stack-2"]
    for seed in range(4):
        parts = split(images, 0.1, seed=seed)
        assert {region.name for region in (*parts.train, *parts.val)} == {"stack-2"}


def test_equal_file_names_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for number, folder in enumerate(("one/image", "two/image")):
        write(tmp_path / "in" / folder, s0=picture((9, 9), number), **{f"only{number}": picture((8, 8), number)})
    write(tmp_path / "in" / "three", S0=picture((9, 9), 7))
    ingest([tmp_path / "in"], tmp_path / "em.zarr")
    expected = ["in-three-S0", "one-image-s0", "only0", "only1", "two-image-s0"]
    assert sorted(names(tmp_path / "em.zarr")) == expected


def test_pixel_size_option_wins_and_corrects(tmp_path: Path) -> None:
    write(tmp_path / "in", a=picture((20, 30)))
    ingest([tmp_path / "in"], tmp_path / "em.zarr")
    assert Store.open(tmp_path / "em.zarr")["a"].pixel_nm == (None, None, None)
    report = ingest([tmp_path / "in"], tmp_path / "em.zarr", pixel_nm=(40.0, 4.0, 4.0))
    assert report.corrected == 1
    assert Store.open(tmp_path / "em.zarr")["a"].pixel_nm == (40.0, 4.0, 4.0)
    axes = json.loads((StorePaths(tmp_path / "em.zarr").node("a") / "zarr.json").read_text())
    scale = axes["attributes"]["ome"]["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"]
    assert scale == [40.0, 4.0, 4.0]


def test_stop_and_continue(tmp_path: Path, small_shards: None) -> None:
    stack = picture((9, 64, 64))
    write(tmp_path / "in", first=picture((30, 30), 1), second=stack, third=picture((30, 30), 2))
    bands: list[int] = []

    def progress(state: IngestProgress) -> None:
        if state.stage == "write":
            bands.append(state.done)

    report = ingest(
        [tmp_path / "in"], tmp_path / "em.zarr", workers=1, on_progress=progress, should_stop=lambda: len(bands) >= 5
    )
    assert report.interrupted
    assert names(tmp_path / "em.zarr") == ["first"]
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "em.zarr" / "images" / "second").rglob("c/*/*/*")}
    assert 0 < len(written) < 9
    again = ingest([tmp_path / "in"], tmp_path / "em.zarr", workers=1)
    assert not again.interrupted
    assert [image.name for image in again.taken] == ["second", "third"]
    np.testing.assert_array_equal(Store.open(tmp_path / "em.zarr").read("second", ALL, ALL, ALL), stack)
    assert Store.open(tmp_path / "em.zarr")["second"].statistics.mean == pytest.approx(stack.mean())
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())


def test_half_an_image_that_lost_or_damaged_shards_is_completed(tmp_path: Path, small_shards: None) -> None:
    stack = picture((9, 64, 64))
    write(tmp_path / "in", a=stack)
    bands: list[int] = []
    store = tmp_path / "em.zarr"
    ingest(
        [tmp_path / "in"],
        store,
        workers=1,
        on_progress=lambda s: bands.append(s.done),
        should_stop=lambda: len(bands) > 6,
    )
    first, second, *_ = sorted(file for file in (store / "images/a/0").rglob("c/*/*/*") if file.is_file())
    first.unlink()
    second.write_bytes(second.read_bytes()[:-9])
    assert not ingest([tmp_path / "in"], store, workers=1).interrupted
    np.testing.assert_array_equal(Store.open(store).read("a", ALL, ALL, ALL), stack)
    # The whole array is gone, as after a power cut: nothing that the ledger said of it counts.
    other = tmp_path / "other.zarr"
    bands.clear()
    ingest(
        [tmp_path / "in"],
        other,
        workers=1,
        on_progress=lambda s: bands.append(s.done),
        should_stop=lambda: len(bands) > 6,
    )
    (other / "images/a/0/zarr.json").write_bytes(b"")
    ingest([tmp_path / "in"], other, workers=1)
    np.testing.assert_array_equal(Store.open(other).read("a", ALL, ALL, ALL), stack)


def test_a_device_that_fails_at_any_sync_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in", a=picture((30, 30)))
    real = os.fsync
    for number in range(100):
        left = number

        def fsync(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(errno.EIO, "failed")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            ingest([tmp_path / "in"], tmp_path / f"{number}.zarr", workers=1)
        except ResourceError as error:
            assert "input/output error" in error.message
        else:
            break
        monkeypatch.undo()
        ingest([tmp_path / "in"], tmp_path / f"{number}.zarr", workers=1)
        assert names(tmp_path / f"{number}.zarr") == ["a"]
    assert number > 15


def test_the_order_in_which_images_finish_does_not_show(tmp_path: Path) -> None:
    write(tmp_path / "in", a=picture((30, 30)), b=picture((30, 30), 1))
    ingest([tmp_path / "in" / "a.tif"], tmp_path / "1.zarr")
    ingest([tmp_path / "in"], tmp_path / "1.zarr")
    ingest([tmp_path / "in" / "b.tif"], tmp_path / "2.zarr")
    ingest([tmp_path / "in"], tmp_path / "2.zarr")
    for name in ("affmae/ledger.jsonl", "zarr.json"):
        assert (tmp_path / "1.zarr" / name).read_bytes() == (tmp_path / "2.zarr" / name).read_bytes()


def test_damage_in_the_middle_leaves_nothing_of_the_image(tmp_path: Path, small_shards: None) -> None:
    write(tmp_path / "in", good=picture((30, 30)))
    path = tmp_path / "in" / "bad.tif"
    tifffile.imwrite(path, picture((9, 64, 64), 3), compression="zlib", photometric="minisblack")
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        offset = file.pages[6].dataoffsets[0]
    content[offset : offset + 200] = b"\xff" * 200
    path.write_bytes(content)
    report = ingest([tmp_path / "in"], tmp_path / "em.zarr")
    assert [image.name for image in report.taken] == ["good"]
    assert [Path(entry.path).name for entry in report.skipped] == ["bad.tif"]
    assert not (tmp_path / "em.zarr" / "images" / "bad").exists()


def test_file_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "in", a=picture((30, 30)), b=picture((30, 30), 1))

    def progress(state: IngestProgress) -> None:
        if state.stage == "write":
            os.utime(tmp_path / "in" / "b.tif", ns=(1, 1))

    report = ingest([tmp_path / "in"], tmp_path / "em.zarr", workers=1, on_progress=progress)
    assert [image.name for image in report.taken] == ["a"]
    assert "changed" in report.skipped[0].reason


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), ResourceError),
        (OSError(errno.ENFILE, "Too many open files in system"), ResourceError),
        (MemoryError(), ResourceError),
        (PermissionError(errno.EACCES, "Permission denied"), InputError),
        (FileNotFoundError(errno.ENOENT, "No such file"), InputError),
    ],
    ids=["stale", "descriptors", "memory", "permission", "absent"],
)
def test_a_read_that_fails_just_now_keeps_what_was_written(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch, failure: Exception, kind: type[Exception]
) -> None:
    stack, store = picture((9, 64, 64)), tmp_path / "em.zarr"
    write(tmp_path / "in", a=stack)
    real = ArraySource._read

    def read(self: ArraySource, handle: Any, z: tuple[int, int], *where: Any) -> np.ndarray:
        if z[0] >= 6:
            raise failure
        return real(self, handle, z, *where)

    monkeypatch.setattr(ArraySource, "_read", read)
    if kind is InputError:  # other files may be readable
        report = ingest([tmp_path / "in"], store, workers=1)
        assert "a.tif" in report.skipped[0].reason and not report.taken
    else:
        with pytest.raises(kind, match=r"a\.tif"):
            ingest([tmp_path / "in"], store, workers=1)
    written = {path: path.stat().st_mtime_ns for path in (store / "images" / "a").rglob("c/*/*/*")}
    assert len(written) >= 5
    monkeypatch.undo()
    monkeypatch.setattr("affmae_engine.data.store_layout._SHARD_BYTES", 4096)
    assert [image.name for image in ingest([tmp_path / "in"], store, workers=1).taken] == ["a"]
    np.testing.assert_array_equal(Store.open(store).read("a", ALL, ALL, ALL), stack)
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())


def test_half_of_a_folder_that_is_no_longer_there_is_not_kept(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    zarr.create_array(tmp_path / "in" / "a.zarr", data=picture((9, 64, 64)), chunks=(1, 64, 64))
    write(tmp_path / "in", b=picture((20, 20)))
    real = Isolated._read

    def read(self: Isolated, handle: Any, z: tuple[int, int], *where: Any) -> np.ndarray:
        if z[0] >= 6:  # its chunks may have been read as empty for some time already
            raise FileNotFoundError(errno.ENOENT, "No such file")
        return real(self, handle, z, *where)

    monkeypatch.setattr(Isolated, "_read", read)
    assert "no such file" in ingest([tmp_path / "in"], tmp_path / "em.zarr", workers=1).skipped[0].reason
    assert begun(tmp_path / "em.zarr") == ["b"]


def test_an_image_whose_file_cannot_be_asked_in_the_end_is_not_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in", a=picture((30, 30)))

    def away(self: files.Original) -> bool:
        raise OSError(errno.ETIMEDOUT, "Connection timed out")

    monkeypatch.setattr(files.Original, "changed", away)
    with pytest.raises(ResourceError, match="does not answer"):
        ingest([tmp_path / "in"], tmp_path / "em.zarr", workers=1)
    assert (tmp_path / "em.zarr/images/a/0/c/0/0/0").is_file()
    monkeypatch.undo()
    assert ingest([tmp_path / "in"], tmp_path / "em.zarr", workers=1).images == 1


@pytest.mark.parametrize("relative", [True, False])
def test_half_an_image_that_is_begun_anew_or_whose_file_is_gone_is_removed(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch, relative: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    source, store = Path("raw") if relative else tmp_path / "raw", tmp_path / "em.zarr"
    zarr.create_array(source / "a.zarr", data=picture((9, 64, 64)), chunks=(1, 64, 64))

    def half(**options: Any) -> None:
        bands: list[int] = []
        options |= {"on_progress": lambda state: bands.append(1), "should_stop": lambda: len(bands) > 3}
        assert ingest([source], store, workers=1, **options).interrupted

    half()
    report = ingest([source], store, pixel_nm=(40.0, 4.0, 4.0))
    assert begun(store) == [report.taken[0].name]
    half(pixel_nm=(50.0, 4.0, 4.0), channel=0)
    Path("raw").rename("share that is away")
    write(tmp_path / "in", other=picture((20, 20)))
    ingest([tmp_path / "in"], store)
    assert len(begun(store)) == 3  # the folder is not there either: it may come back
    Path("raw").mkdir()
    ingest([tmp_path / "in"], store)
    assert len(begun(store)) == 2


def test_a_file_skipped_once_and_then_taken_is_no_longer_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for name in ("taken.png", "copy.png", "broken.png"):
        Path("in", name).write_bytes(b"\x89PNG, but only so far")

    def skipped() -> list[str]:
        manifest = json.loads(StorePaths(tmp_path / "em.zarr").manifest.read_text())
        return [entry["path"] for entry in manifest["skipped"]]

    write(tmp_path / "in", good=picture((20, 20)))
    ingest(["in"], tmp_path / "em.zarr")
    assert skipped() == [str(tmp_path / "in" / name) for name in ("broken.png", "copy.png", "taken.png")]
    for name in ("taken.png", "copy.png"):
        Image.fromarray(picture((9, 9), 3)).save(Path("in", name))
    ingest(["in"], tmp_path / "em.zarr")
    assert skipped() == [str(tmp_path / "in" / "broken.png")]


def test_nothing_taken_leaves_no_store(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(b"no image at all")
    report = ingest([tmp_path / "a.tif"], tmp_path / "new" / "em.zarr")
    assert not report.taken
    assert len(report.skipped) == 1
    assert not (tmp_path / "new" / "em.zarr").exists()
    with pytest.raises(InputError, match="no such file"):
        ingest([tmp_path / "absent"], tmp_path / "new" / "em.zarr")
    assert not (tmp_path / "new" / "em.zarr").exists()


def test_labels_beside_images(tmp_path: Path, small_shards: None) -> None:
    image, numbers = picture((3, 70, 60)), picture((3, 70, 60), 2).astype(np.uint16) + 400
    write(tmp_path / "in", cell=image)
    write(tmp_path / "labels", cell=numbers, wrong=numbers[:2])
    (source,) = open_sources(tmp_path / "in" / "cell.tif")
    (labels,) = open_sources(tmp_path / "labels" / "cell.tif", labels=True)
    report = ingest([source], tmp_path / "em.zarr", labels={source_key(source): labels}, class_names=("a", "b"))
    store = Store.open(tmp_path / "em.zarr")
    assert report.taken[0].labelled
    assert store.class_names == ("a", "b")
    block = store.read_labels("cell", ALL, ALL, ALL)
    assert block.dtype == np.uint16
    np.testing.assert_array_equal(block, numbers)
    again = ingest([source], tmp_path / "em.zarr", labels={source_key(source): labels})
    assert len(again.present) == 1
    assert Store.open(tmp_path / "em.zarr").class_names == ("a", "b")
    (short,) = open_sources(tmp_path / "labels" / "wrong.tif", labels=True)
    refused = ingest([source], tmp_path / "other.zarr", labels={source_key(source): short})
    assert "same shape" in refused.skipped[0].hint


def test_labels_of_a_store_are_listed_as_skipped_not_taken_as_images(
    tmp_path: Path, make_labelled_store: Callable[..., Store]
) -> None:
    store = make_labelled_store({"cell": (picture((2, 20, 20)), picture((2, 20, 20), 1) % 2)})
    report = ingest([store.path], tmp_path / "em.zarr")
    assert [image.source_series for image in report.taken] == ["images/cell/0"]
    (skipped,) = report.skipped
    assert "[labels/cell]: it is a label map (image-label), not an image" in skipped.reason


@pytest.mark.parametrize("begun", [False, True])
def test_a_file_named_like_metadata_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool) -> None:
    write(tmp_path / "in", **{"zarr.json": picture((12, 12)), "c": picture((12, 12), 1)})
    if begun:  # as a version that knew of no reserved name left its store
        with monkeypatch.context() as patched:
            patched.setattr("affmae_engine.data.store_writer._RESERVED", "")
            with pytest.raises(FileExistsError):
                ingest([tmp_path / "in"], tmp_path / "em.zarr")
    report = ingest([tmp_path / "in"], tmp_path / "em.zarr")
    assert not report.skipped and names(tmp_path / "em.zarr") == ["c", "zarr.json-2"]
    block = Store.open(tmp_path / "em.zarr").read("zarr.json-2", ALL, ALL, ALL)
    np.testing.assert_array_equal(block[0], picture((12, 12)))
    assert sorted(zarr.open_group(tmp_path / "em.zarr", mode="r")["images"].keys()) == ["c", "zarr.json-2"]


def test_odd_names_work(tmp_path: Path) -> None:
    odd = ["with space", "größe", "細胞", "[bold]x", "-leading", "new\nline", "a" * 240, "semi;colon&"]
    write(tmp_path / "in", **{name: picture((12, 12), number) for number, name in enumerate(odd)})
    Image.fromarray(picture((12, 12), 99)).save(os.fsencode(tmp_path / "in") + b"/bad\xff.png")
    report = ingest([tmp_path / "in"], tmp_path / "em.zarr")
    assert len(report.taken) == len(odd) + 1, report.skipped
    store = Store.open(tmp_path / "em.zarr")
    assert all(store.read(image.name, ALL, ALL, ALL).shape == (1, 12, 12) for image in store.images)


def test_the_store_itself_is_not_a_source(tmp_path: Path) -> None:
    write(tmp_path, a=picture((20, 20)))
    ingest([tmp_path], tmp_path / "em.zarr")
    report = ingest([tmp_path], tmp_path / "em.zarr")
    assert (len(report.taken), len(report.present)) == (0, 1)
    other = ingest([tmp_path / "em.zarr"], tmp_path / "second.zarr")  # but a store is a source like any OME-Zarr
    assert len(other.taken) == 1


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    write(tmp_path / "in", a=picture((20, 20)))
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError):
        ingest([tmp_path / "in"], tmp_path / "file" / "em.zarr")
    with pytest.raises(ConfigError, match="not a dataset"):
        ingest([tmp_path / "in"], tmp_path / "in")
    with module.StoreWriter(tmp_path / "em.zarr"), pytest.raises(BusyError):
        ingest([tmp_path / "in"], tmp_path / "em.zarr")


def test_disk_that_fills_up_is_one_error_and_the_store_can_be_continued(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in", a=picture((30, 30)), b=picture((9, 64, 64), 1))
    written: list[Any] = []
    original = module.atomic.fsync_file

    def full(path: Path) -> None:
        if "/images/b/0/c/" in str(path):
            written.append(path)
            if len(written) == 4:
                raise OSError(28, "No space left on device")
        original(path)

    monkeypatch.setattr(module.atomic, "fsync_file", full)
    with pytest.raises(ResourceError, match="full"):
        ingest([tmp_path / "in"], tmp_path / "em.zarr", workers=1)
    monkeypatch.undo()
    assert names(tmp_path / "em.zarr") == ["a"]
    monkeypatch.setattr("affmae_engine.data.store_layout._SHARD_BYTES", 4096)
    ingest([tmp_path / "in"], tmp_path / "em.zarr")
    np.testing.assert_array_equal(Store.open(tmp_path / "em.zarr").read("b", ALL, ALL, ALL), picture((9, 64, 64), 1))


_KILLED = """
import os, sys
from pathlib import Path
from affmae_engine.data import ingest as m, store_layout
store_layout._SHARD_BYTES = 4096
seen = []
def progress(state):
    if state.stage == "write":
        seen.append(state)
        if len(seen) == int(sys.argv[3]):
            os.kill(os.getpid(), 9)
m.ingest([sys.argv[1]], Path(sys.argv[2]), workers=2, on_progress=progress)
"""


@pytest.mark.parametrize("moment", [1, 4, 8])
def test_killed_at_any_moment_it_continues(tmp_path: Path, small_shards: None, moment: int) -> None:
    write(tmp_path / "in", a=picture((30, 30)), b=picture((9, 64, 64), 1))
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "in"), str(tmp_path / "em.zarr"), str(moment)], check=False
    )
    assert done.returncode == -9
    ingest([tmp_path / "in"], tmp_path / "em.zarr")
    store = Store.open(tmp_path / "em.zarr")
    np.testing.assert_array_equal(store.read("b", ALL, ALL, ALL), picture((9, 64, 64), 1))
    np.testing.assert_array_equal(store.read("a", ALL, ALL, ALL)[0], picture((30, 30)))
    assert not list((tmp_path / "em.zarr").rglob("*.partial"))


def test_memory_stays_far_below_the_size_of_a_stack(tmp_path: Path) -> None:
    path = tmp_path / "large.tif"
    section = picture((2048, 2048))
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for number in range(24):  # 96 MiB
            file.write(section + np.uint8(number), contiguous=True, photometric="minisblack")
    code = (
        "import resource, sys; from pathlib import Path; from affmae_engine.data.ingest import ingest;"
        "from affmae_engine.data import store_layout; store_layout._SHARD_BYTES = 2 << 20;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "r = ingest([sys.argv[1]], Path(sys.argv[2]), workers=2); assert len(r.taken) == 1;"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path / "em.zarr")], check=True, capture_output=True, text=True
    )
    assert int(out.stdout) < 48 * 1024
