"""The dataset store: round trip, metadata, damage, locking, resuming half an image."""

import errno
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import yaozarrs

from affmae_engine.data import ledger
from affmae_engine.data.statistics import StatisticsBuilder
from affmae_engine.data.store import Store
from affmae_engine.data.store_layout import Band, StoredImage, StorePaths, bands, chunk_shapes, safe_name
from affmae_engine.data.store_writer import ImageWriter, StoreWriter
from affmae_engine.errors import BusyError, ConfigError, CorruptError, InputError, ResourceError

ALL = slice(None)


def picture(shape: tuple[int, int, int], dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)


def record(block: np.ndarray, **changes: object) -> StoredImage:
    builder = StatisticsBuilder(block.dtype)
    builder.add(block)
    fields: dict[str, object] = {
        "name": "",
        "shape_ZYX": block.shape,
        "dtype": block.dtype,
        "pixel_nm": (None, 4.0, 4.0),
        "statistics": builder.finish(),
        "source_path": "/data/slice_07.tif",
        "source_series": "",
        "sha256": "ab" * 32,
    }
    return StoredImage(**{**fields, **changes})  # type: ignore[arg-type]


def begin(writer: StoreWriter, name: str, block: np.ndarray, labels: np.ndarray | None = None) -> ImageWriter:
    dtype = None if labels is None else labels.dtype
    image = record(block, labelled=labels is not None, labels_dtype="" if labels is None else labels.dtype.name)
    return writer.begin(name, {"sha256": "ab"}, image, dtype)


def write(store: Path, name: str, block: np.ndarray, labels: np.ndarray | None = None) -> None:
    with StoreWriter(store, class_names=("out", "in") if labels is not None else ()) as writer:
        one = begin(writer, name, block, labels)
        for band in one.bands:
            one.write(band, block[band.z, band.y], None if labels is None else labels[band.z, band.y])
        one.finish(one.image)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("shape", [(1, 300, 270), (5, 40, 33), (1, 1, 9), (3, 600, 20)])
def test_round_trip(tmp_path: Path, dtype: str, shape: tuple[int, int, int]) -> None:
    block = picture(shape, dtype)
    write(tmp_path / "em.zarr", "cell", block)
    store = Store.open(tmp_path / "em.zarr")
    assert store["cell"].shape_ZYX == shape
    assert store["cell"].dtype == np.dtype(dtype)
    np.testing.assert_array_equal(store.read("cell", ALL, ALL, ALL), block)
    np.testing.assert_array_equal(store.read("cell", slice(0, 1), slice(0, 30), slice(5, 8)), block[0:1, 0:30, 5:8])
    assert store.read("cell", slice(2, 2), ALL, ALL).shape == (0, *shape[1:])
    assert store["cell"].series_group == "/data/slice_#"
    with pytest.raises(KeyError):
        store.read("other", ALL, ALL, ALL)
    with pytest.raises(KeyError):
        store.read_labels("cell", ALL, ALL, ALL)


@pytest.mark.parametrize(
    ("path", "series", "group"),
    [
        ("/raw/mouse3/s007.tif", "", "/raw/mouse#/s#"),
        ("/raw/Section_007/em.tif", "", "/raw/Section_#/em"),
        ("/raw/stack.zarr", "images/s007/0", "/raw/stack[images/s#/#]"),
        ("/raw/stack.ome.tif", "12", "/raw/stack.ome[#]"),
    ],
)
def test_numbers_anywhere_make_a_series(path: str, series: str, group: str) -> None:
    assert record(picture((1, 9, 9)), source_path=path, source_series=series).series_group == group


def test_is_valid_ome_zarr_with_labels(tmp_path: Path) -> None:
    block = picture((3, 300, 280))
    labels = (block > 100).astype(np.uint8)
    write(tmp_path / "em.zarr", "cell", block, labels)
    yaozarrs.validate_zarr_store(tmp_path / "em.zarr" / "images" / "cell")
    yaozarrs.validate_zarr_store(tmp_path / "em.zarr" / "labels" / "cell")
    yaozarrs.validate_zarr_store(tmp_path / "em.zarr" / "labels")
    store = Store.open(tmp_path / "em.zarr")
    assert store["cell"].labelled
    assert store.class_names == ("out", "in")
    np.testing.assert_array_equal(store.read_labels("cell", ALL, ALL, ALL), labels)
    metadata = json.loads((tmp_path / "em.zarr/images/cell/0/zarr.json").read_text())
    inner = metadata["codecs"][0]["configuration"]["codecs"]
    assert [codec["name"] for codec in inner] == ["bytes", "zstd", "crc32c"]


def test_survives_pickling_and_reads_the_same(tmp_path: Path) -> None:
    block = picture((2, 50, 60))
    write(tmp_path / "em.zarr", "cell", block)
    store = Store.open(tmp_path / "em.zarr")
    store.read("cell", ALL, ALL, ALL)
    copy = pickle.loads(pickle.dumps(store))  # noqa: S301 (our own object, as a data loader passes it)
    np.testing.assert_array_equal(copy.read("cell", ALL, ALL, ALL), block)
    assert copy.fingerprint() == store.fingerprint()


def test_all_zero_image_has_its_chunks_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    block = np.zeros((1, 80, 80), np.uint8)
    write(tmp_path / "em.zarr", "black", block)
    store = Store.open(tmp_path / "em.zarr")
    assert not store.read("black", ALL, ALL, ALL).any()
    shard = StorePaths(store.path).array("black") / "c" / "0" / "0" / "0"
    shard.unlink()
    with pytest.raises(CorruptError, match="0/0/0 is missing"):
        store.read("black", ALL, ALL, ALL)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    block = picture((1, 64, 64))
    write(tmp_path / "em.zarr", "cell", block)
    shard = StorePaths(tmp_path / "em.zarr").array("cell") / "c" / "0" / "0" / "0"
    intact = shard.read_bytes()
    rng = np.random.default_rng(3)
    for position in rng.integers(0, len(intact) * 8, 60):
        damaged = bytearray(intact)
        damaged[position // 8] ^= 1 << (position % 8)
        shard.write_bytes(damaged)
        with pytest.raises(CorruptError, match="cell"):
            Store.open(tmp_path / "em.zarr").read("cell", ALL, ALL, ALL)
    shard.write_bytes(intact[: len(intact) // 2])
    with pytest.raises(CorruptError):
        Store.open(tmp_path / "em.zarr").read("cell", ALL, ALL, ALL)


@pytest.mark.usefixtures("permissions_count")
@pytest.mark.parametrize("hidden", ["zarr.json", "images/cell/0/zarr.json", "images/cell/0/c/0/0"])
def test_what_may_not_be_read_is_not_called_damaged(tmp_path: Path, hidden: str) -> None:
    write(tmp_path / "em.zarr", "cell", picture((1, 30, 30)))
    path = tmp_path / "em.zarr" / hidden
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with pytest.raises(InputError, match="permission was denied"):
            Store.open(tmp_path / "em.zarr").read("cell", ALL, ALL, ALL)
    finally:
        path.chmod(mode)


@pytest.mark.parametrize("where", ["affmae_engine.data.store.os.lstat", "zarr.Array.__getitem__"])
def test_a_network_disk_that_is_gone_is_not_called_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    write(tmp_path / "em.zarr", "cell", picture((1, 30, 30)))
    store = Store.open(tmp_path / "em.zarr")

    def gone(*_what: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")  # no name, as from reading a file that is open

    store.read("cell", ALL, ALL, ALL)
    monkeypatch.setattr(where, gone)
    with pytest.raises(ResourceError, match=r"em.zarr: cell: the network file system has lost it"):
        store.read("cell", ALL, ALL, ALL)


def test_half_an_image_is_invisible_and_can_be_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("affmae_engine.data.store_layout._SHARD_BYTES", 256 * 20)
    block = picture((4, 600, 20))
    block[2:] = 0  # black sections must become chunks, also after continuing
    write(tmp_path / "em.zarr", "first", picture((1, 20, 20)))
    with pytest.raises(RuntimeError), StoreWriter(tmp_path / "em.zarr") as writer:
        one = begin(writer, "second", block)
        for band in one.bands[:5]:
            one.write(band, block[band.z, band.y])
        raise RuntimeError("killed")
    assert [image.name for image in Store.open(tmp_path / "em.zarr").images] == ["first"]
    with (StorePaths(tmp_path / "em.zarr").ledger).open("ab") as file:
        file.write(b'{"event": "chunk", "na')  # a torn line
    with StoreWriter(tmp_path / "em.zarr") as writer:
        assert writer.begun({"sha256": "ab"}) == "second"
        one = begin(writer, "second", block)
        todo = [band for band in one.bands if not one.is_done(band)]
        assert len(todo) == len(one.bands) - 5
        done = next(band for band in one.bands if one.is_done(band))
        np.testing.assert_array_equal(one.read(done), block[done.z, done.y])
        for band in todo:
            one.write(band, block[band.z, band.y])
        one.finish(one.image)
    np.testing.assert_array_equal(Store.open(tmp_path / "em.zarr").read("second", ALL, ALL, ALL), block)


def test_dropped_image_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "em.zarr", "kept", picture((1, 20, 20)))
    with StoreWriter(tmp_path / "em.zarr") as writer:
        begin(writer, "gone", picture((1, 30, 30)))
        writer.drop("gone")
    assert not (tmp_path / "em.zarr" / "images" / "gone").exists()
    assert ledger.replay(StorePaths(tmp_path / "em.zarr").ledger).begun == {}


def test_second_writer_is_refused(tmp_path: Path) -> None:
    with (
        StoreWriter(tmp_path / "em.zarr"),
        pytest.raises(BusyError, match="process"),
        StoreWriter(tmp_path / "em.zarr"),
    ):
        pass
    with StoreWriter(tmp_path / "em.zarr"):
        pass


def test_places_that_are_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such dataset"):
        Store.open(tmp_path / "em.zarr")
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not a dataset"):
        Store.open(other)
    with pytest.raises(ConfigError, match="not a dataset"), StoreWriter(other):
        pass
    with StoreWriter(tmp_path / "empty.zarr"):
        pass
    with pytest.raises(InputError, match="no finished image"):
        Store.open(tmp_path / "empty.zarr")


def test_damaged_ledger_and_newer_schema(tmp_path: Path) -> None:
    write(tmp_path / "em.zarr", "cell", picture((1, 20, 20)))
    path = StorePaths(tmp_path / "em.zarr").ledger
    intact = path.read_text()
    path.write_text("nonsense\n" + intact)
    with pytest.raises(CorruptError, match="line 1"):
        Store.open(tmp_path / "em.zarr")
    path.write_text('{"event": "ledger", "schema": 99}\n')
    with pytest.raises(CorruptError, match="version 99"):
        Store.open(tmp_path / "em.zarr")


@pytest.mark.parametrize(
    ("shape", "itemsize"),
    [((1, 10000, 30000), 2), ((2000, 64, 64), 1), ((250, 250, 250), 1), ((1, 1, 1), 4), ((9, 300, 700), 1)],
)
def test_shards_are_whole_chunks_of_bounded_size(shape: tuple[int, int, int], itemsize: int) -> None:
    chunk, shard = chunk_shapes(shape, itemsize)
    assert chunk[0] == 1
    assert max(chunk) <= 256
    assert all(s % c == 0 for s, c in zip(shard, chunk, strict=True))
    assert np.prod(shard) * itemsize <= max(64 << 20, 256 * shard[2] * itemsize)
    covered = np.zeros(shape[:2], np.int32)
    every: list[Band] = list(bands(shape, shard))
    for band in every:
        covered[band.z, band.y] += 1
    assert (covered == 1).all()
    assert len({band.key for band in every}) == len(every)


def test_odd_names_become_safe_and_unique() -> None:
    taken: set[str] = set()
    wished = ["cell", "Cell", "cell 1", "cell_1", "[bold]x[/bold]", "größe", "細胞", "-rf", "..", "a" * 300, "a" * 301]
    for text in [*wished, "new\nline", "\udcff", "con/../x"]:
        name = safe_name(text, taken)
        assert name.isascii()
        assert len(name) <= 90
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
        assert not name.startswith((".", "-"))
        assert name.lower() not in taken
        taken.add(name.lower())
    assert safe_name("stack1-z_07", set()) == "stack1-z_07"
