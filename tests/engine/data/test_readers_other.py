"""Pictures, Zarr folders, telling formats apart, and finding files."""

import json
from pathlib import Path

import imagecodecs
import numcodecs
import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from affmae_engine.data.readers import Source, find_files, open_sources, scan_sources
from affmae_engine.data.readers.files import natural_key
from affmae_engine.data.readers.units import from_resolution, nanometres
from affmae_engine.errors import InputError

ALL = slice(None)


def picture(shape: tuple[int, ...], dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


def read(path: Path, **options: int | None) -> np.ndarray:
    (source,) = open_sources(path, channel=options.get("channel"))
    return source.read(ALL, ALL, ALL)


def test_png_of_every_depth(tmp_path: Path) -> None:
    grey = picture((30, 40))
    Image.fromarray(grey).save(tmp_path / "grey.png", dpi=(2540000, 2540000))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(grey > 100).save(tmp_path / "bits.png")
    Image.fromarray(np.stack([grey] * 3 + [grey * 0], -1)).save(tmp_path / "alpha.png")
    deep_colour = np.stack([grey.astype(np.uint16) * 257] * 3, -1)
    (tmp_path / "deeprgb.png").write_bytes(imagecodecs.png_encode(deep_colour))
    np.testing.assert_array_equal(read(tmp_path / "grey.png")[0], grey)
    np.testing.assert_array_equal(read(tmp_path / "deep.png")[0], grey.astype(np.uint16) * 257)
    np.testing.assert_array_equal(read(tmp_path / "bits.png")[0], (grey > 100) * 255)
    np.testing.assert_array_equal(read(tmp_path / "alpha.png")[0], grey)
    np.testing.assert_array_equal(read(tmp_path / "deeprgb.png")[0], deep_colour[..., 0])
    assert open_sources(tmp_path / "grey.png")[0].info.pixel_nm[1:] == pytest.approx((10, 10), rel=1e-3)


def test_palette_png_as_image_and_as_labels(tmp_path: Path) -> None:
    numbers = picture((20, 30)) % 4
    indexed = Image.fromarray(numbers).convert("L")
    indexed = Image.frombytes("P", indexed.size, numbers.tobytes())
    indexed.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    indexed.save(tmp_path / "p.png")
    luminance = np.array([0, 76, 150, 29], np.uint8)
    np.testing.assert_array_equal(read(tmp_path / "p.png")[0], luminance[numbers])
    (labels,) = open_sources(tmp_path / "p.png", labels=True)
    np.testing.assert_array_equal(labels.read(ALL, ALL, ALL)[0], numbers)


def test_jpeg_is_rotated_as_its_exif_says(tmp_path: Path) -> None:
    ramp = np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[None], 32, axis=0)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(ramp).save(tmp_path / "r.jpg", exif=exif, quality=100)
    (source,) = open_sources(tmp_path / "r.jpg")
    assert source.info.shape_ZYX == (1, 64, 32)
    block = source.read(ALL, ALL, ALL)[0]
    assert np.abs(block.astype(int) - ramp.T).max() <= 3
    assert any("EXIF" in note for note in source.info.notes)


def test_truncated_pictures_are_refused(tmp_path: Path) -> None:
    Image.fromarray(picture((90, 90))).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"a\.png"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("codec", ["zstd", "blosc", "gzip"])
def test_plain_zarr(tmp_path: Path, version: int, codec: str) -> None:
    block = picture((5, 60, 70), "uint16")
    compressor = {"zstd": numcodecs.Zstd(), "blosc": numcodecs.Blosc(), "gzip": numcodecs.GZip()}[codec]
    if version == 3:
        compressor = {
            "zstd": zarr.codecs.ZstdCodec(),
            "blosc": zarr.codecs.BloscCodec(),
            "gzip": zarr.codecs.GzipCodec(),
        }[codec]
    array = zarr.create_array(
        tmp_path / "a.zarr", shape=block.shape, dtype=block.dtype, chunks=(2, 32, 32), zarr_format=version,
        compressors=compressor,
    )  # fmt: skip
    array[:] = block
    (source,) = open_sources(tmp_path / "a.zarr")
    np.testing.assert_array_equal(source.read(ALL, ALL, ALL), block)
    np.testing.assert_array_equal(source.read(slice(1, 4), slice(30, 40), slice(5, 66)), block[1:4, 30:40, 5:66])


def ome(path: Path, block: np.ndarray, axes: str, scale: list[float], version: str, unit: str = "nanometer") -> None:
    group = zarr.create_group(path, zarr_format=2 if version == "0.4" else 3)
    for level, part in enumerate((block, block[..., ::2, ::2])):
        group.create_array(str(level), shape=part.shape, dtype=part.dtype, chunks=part.shape)[:] = part
    kinds = {"t": "time", "c": "channel"}
    named = [{"name": a, "type": kinds.get(a, "space"), **({"unit": unit} if a in "zyx" else {})} for a in axes]
    levels = [
        {"path": str(i), "coordinateTransformations": [{"type": "scale", "scale": [s * (i + 1) for s in scale]}]}
        for i in range(2)
    ]
    multiscales = [{"axes": named, "datasets": levels, "version": version}]
    group.attrs.update(
        {"multiscales": multiscales} if version == "0.4" else {"ome": {"version": version, "multiscales": multiscales}}
    )


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr_axes_scale_and_level(tmp_path: Path, version: str) -> None:
    block = picture((2, 3, 4, 32, 30))
    ome(tmp_path / "a.ome.zarr", block, "tczyx", [1, 1, 0.04, 0.004, 0.005], version, "micrometer")
    (source,) = open_sources(tmp_path / "a.ome.zarr")
    assert source.info.name == "a"
    assert source.info.shape_ZYX == (8, 32, 30)
    assert source.info.pixel_nm == pytest.approx((40, 4, 5))
    np.testing.assert_array_equal(source.read(ALL, ALL, ALL), block[:, 0].reshape(8, 32, 30))
    np.testing.assert_array_equal(source.read(slice(3, 6), ALL, ALL), block[:, 0].reshape(8, 32, 30)[3:6])
    np.testing.assert_array_equal(read(tmp_path / "a.ome.zarr", channel=2), block[:, 2].reshape(8, 32, 30))
    with pytest.raises(InputError, match="no channel 7"):
        open_sources(tmp_path / "a.ome.zarr", channel=7)


def test_hierarchy_takes_images_and_names_refusals(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "h.zarr")
    group.create_array("images/a", shape=(9, 9), dtype="uint8", chunks=(9, 9))[:] = 1
    group.create_array("images/b", shape=(9, 9), dtype="complex64", chunks=(9, 9))
    group.create_array("time", shape=(5,), dtype="float64", chunks=(5,))
    for level in range(3):
        group.create_array(f"volume/s{level}", shape=(8 >> level,) * 3, dtype="uint8", chunks=(4,) * 3)
    sources, refused = scan_sources(tmp_path / "h.zarr")
    assert [s.info.series for s in sources] == ["images/a", "volume/s0"]
    assert len(refused) == 1
    assert "complex64" in refused[0].message


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_label_maps_are_no_images(tmp_path: Path, version: str) -> None:
    root = tmp_path / "h.zarr"
    zarr.create_group(root, zarr_format=2 if version == "0.4" else 3)
    for name in ("images/cell", "labels/cell"):
        ome(root / name, picture((2, 16, 15)), "zyx", [40, 4, 4], version)
    labels = zarr.open_group(root / "labels" / "cell")
    mark = {"image-label": {"source": {"image": "../../images/cell"}}}
    labels.attrs.update(mark if version == "0.4" else {"ome": labels.attrs["ome"] | mark})
    sources, refused = scan_sources(root)
    assert [source.info.series for source in sources] == ["images/cell/0"]
    assert [error.message for error in refused] == [
        f"cannot read {root} [labels/cell]: it is a label map (image-label), not an image"
    ]
    assert [source.info.series for source in open_sources(root, labels=True)] == ["images/cell/0", "labels/cell/0"]
    with pytest.raises(InputError, match="it is a label map") as caught:
        open_sources(root / "labels" / "cell")
    assert "--labels" in caught.value.hint
    (alone,) = open_sources(root / "labels" / "cell", labels=True)
    np.testing.assert_array_equal(alone.read(ALL, ALL, ALL), picture((2, 16, 15)))


def test_missing_chunks_of_a_strangers_zarr_are_fill_values(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a.zarr", shape=(64, 64), dtype="uint8", chunks=(32, 32), fill_value=7)
    assert (read(tmp_path / "a.zarr") == 7).all()


def test_zarr_3_without_the_optional_attributes(tmp_path: Path) -> None:
    stored = picture((2, 40, 50))
    zarr.create_array(tmp_path / "a.zarr", shape=stored.shape, dtype="uint8", chunks=(1, 40, 50))[:] = stored
    metadata = json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())
    del metadata["attributes"]
    (tmp_path / "a.zarr" / "zarr.json").write_text(json.dumps(metadata))
    np.testing.assert_array_equal(read(tmp_path / "a.zarr"), stored)


def test_voxel_sizes_in_attributes_of_zarr(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "a.zarr", shape=(4, 8, 9), dtype="uint8", chunks=(4, 8, 9))
    for attributes in ({"resolution": [40, 4, 5]}, {"voxel_size": [0.04, 0.004, 0.005], "units": ["um"] * 3}):
        array.attrs.put(attributes)
        assert open_sources(tmp_path / "a.zarr")[0].info.pixel_nm == (40, 4, 5)


def _array_metadata(folder: Path) -> dict[str, object]:
    zarr.create_array(folder, shape=(64, 64), dtype="uint8", chunks=(32, 32))[:] = picture((64, 64))
    loaded: dict[str, object] = json.loads((folder / "zarr.json").read_text())
    return loaded


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data_type": "string"}, "not real numbers"),
        ({"data_type": "|O"}, "not real numbers"),
        ({"codecs": [{"name": "numcodecs.pickle"}]}, "pickle"),
        ({"codecs": [{"name": "os.system", "configuration": {}}]}, "not supported"),
        ({"shape": [2**40, 2**20]}, "declares"),
        ({"shape": [2**17, 2**17], "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2**17, 2**17]}}},
         "16.0 GiB once decoded"),
        ({"chunk_grid": {"name": "weird"}}, "grid"),
        ({"shape": "many"}, "damaged|shape"),
    ],
)  # fmt: skip
def test_hostile_zarr_metadata_is_refused(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    metadata = _array_metadata(tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / "zarr.json").write_text(json.dumps({**metadata, **change}))
    with pytest.raises(InputError, match=reason):
        open_sources(tmp_path / "a.zarr")


def test_links_out_of_a_zarr_folder_are_refused(tmp_path: Path) -> None:
    _array_metadata(tmp_path / "secret.zarr")
    _array_metadata(tmp_path / "a.zarr")
    chunk = tmp_path / "a.zarr" / "c" / "0" / "0"
    chunk.unlink()
    chunk.symlink_to(tmp_path / "secret.zarr" / "c" / "0" / "0")
    with pytest.raises(InputError, match="leads out"):
        read(tmp_path / "a.zarr")
    group = zarr.create_group(tmp_path / "g.zarr")
    assert group is not None
    (tmp_path / "g.zarr" / "stolen").symlink_to(tmp_path / "secret.zarr")
    with pytest.raises(InputError, match="leads out"):
        open_sources(tmp_path / "g.zarr")
    ome(tmp_path / "o.zarr", picture((8, 8)), "yx", [1, 1], "0.5")
    node = tmp_path / "o.zarr" / "zarr.json"
    node.write_text(node.read_text().replace('"path": "0"', '"path": "../secret.zarr"'))
    with pytest.raises(InputError, match="outside"):
        open_sources(tmp_path / "o.zarr")


@pytest.mark.parametrize("version", [2, 3])
def test_truncated_blosc_is_refused_before_it_is_decoded(tmp_path: Path, version: int) -> None:
    compressor = numcodecs.Blosc() if version == 2 else zarr.codecs.BloscCodec()
    array = zarr.create_array(
        tmp_path / "a.zarr", shape=(64, 64), dtype="uint8", chunks=(64, 64), zarr_format=version, compressors=compressor
    )
    array[:] = picture((64, 64))
    chunk = tmp_path / "a.zarr" / ("0.0" if version == 2 else "c/0/0")
    chunk.write_bytes(chunk.read_bytes()[:40])
    with pytest.raises(InputError, match="cut short"):
        read(tmp_path / "a.zarr")


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    Image.fromarray(picture((9, 9))).save(tmp_path / "really.png")
    (tmp_path / "really.png").rename(tmp_path / "named.tif")
    assert open_sources(tmp_path / "named.tif")[0].info.format == "PNG"
    for name, content, reason in [
        ("text.tif", b"this is no image", "no image format"), ("empty.tif", b"", "empty"),
        ("x.h5", b"\x89HDF\r\n\x1a\n", r"x\.h5"), ("page.png", b"<!DOCTYPE html><html>", "web page"),
        ("a.mrc", b"\0" * 208 + b"MAP " + b"\0" * 900, "header is damaged"), ("x.npy", b"\x93NUMPY\x01", r"x\.npy"),
        ("x.dm3", b"\0\0\0\3" + bytes(20), "damaged"), ("x.npz", b"PK\3\4", "zip files are not supported"),
        ("lfs.tif", b"version https://git-lfs.github.com/spec/v1", "Git LFS"), ("x.raw", b"\7" * 9, "no header"),
        ("stub.tif", b"II*\0", r"stub\.tif"),
    ]:  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=reason) as caught:
            open_sources(tmp_path / name)
        assert name in caught.value.message
    (tmp_path / "v.n5").mkdir()
    (tmp_path / "v.n5" / "attributes.json").write_text('{"n5": "2.0.0"}')
    with pytest.raises(InputError, match="holds no datasets"):
        open_sources(tmp_path / "v.n5")
    with pytest.raises(InputError, match="no such file"):
        open_sources(tmp_path / "absent.tif")
    with pytest.raises(InputError, match="folder without images"):
        open_sources(tmp_path)


def test_finding_files(tmp_path: Path) -> None:
    for name in ("s10.tif", "s9.tif", "deep/er/s1.png", ".hidden.tif", "notes.txt", "index.json", "deep/.git/x.tif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    zarr.create_array(tmp_path / "v.zarr", shape=(4, 4), dtype="uint8", chunks=(2, 2))[:] = 1
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    found = [path.relative_to(tmp_path).as_posix() for path in find_files([tmp_path])]
    assert found == ["deep/er/s1.png", "s9.tif", "s10.tif", "v.zarr"]
    assert find_files([str(tmp_path / "s*.tif"), tmp_path / "s9.tif"]) == [tmp_path / "s9.tif", tmp_path / "s10.tif"]
    assert find_files([str(tmp_path / "**" / "*.png")]) == [tmp_path / "deep/er/s1.png"]
    assert find_files([tmp_path / "notes.txt"]) == [tmp_path / "notes.txt"]  # named outright: to be refused by name
    (tmp_path / "odd[1] *.tif").write_bytes(b"")
    assert find_files([str(tmp_path / "odd[1] *.tif")]) == [tmp_path / "odd[1] *.tif"]
    (tmp_path / "deep" / "gone.tif").symlink_to(tmp_path / "nowhere.tif")  # told, not passed over
    assert tmp_path / "deep" / "gone.tif" in find_files([tmp_path])
    with pytest.raises(InputError, match=r"gone\.tif: no such file"):
        open_sources(tmp_path / "deep" / "gone.tif")
    for wrong in ("absent.tif", "absent*.tif"):
        with pytest.raises(InputError, match="absent"):
            find_files([tmp_path / wrong])
    (tmp_path / "void").mkdir()
    with pytest.raises(InputError, match="no images"):
        find_files([tmp_path / "void"])


@pytest.mark.usefixtures("permissions_count")
def test_folders_that_may_not_be_read_are_told_and_the_others_taken(tmp_path: Path) -> None:
    theirs, mine = tmp_path / "a" / "theirs", tmp_path / "a" / "z.tif"
    theirs.mkdir(parents=True)
    mine.write_bytes(b"")
    (theirs / "x.tif").write_bytes(b"")
    (tmp_path / "a" / "link.tif").symlink_to(theirs / "x.tif")
    for mode in (0o000, 0o100, 0o400):
        theirs.chmod(mode)
        try:
            seen = [tmp_path / "a" / "link.tif"] if mode == 0o100 else []  # what is in it may be used, not listed
            assert find_files([tmp_path / "a"]) == [*seen, theirs, mine]
            with pytest.raises(InputError, match="theirs: permission was denied"):
                open_sources(theirs)
            if mode != 0o100:
                with pytest.raises(PermissionError):  # not: no such file
                    find_files([theirs / "x.tif"])
        finally:
            theirs.chmod(0o700)


def test_natural_order() -> None:
    names = ["a10", "a9", "A1", "b", "10", "9", "a²", "a"]
    assert sorted(names, key=natural_key) == ["9", "10", "a", "A1", "a9", "a10", "a²", "b"]


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [(4.6, "nm", 4.6), (0.0046, "µm", 4.6), (0.0046, "\\u00B5m", 4.6), (46, "Å", 4.6), (1, "micron", 1000.0),
     (1, "pixel", None), (0, "nm", None), (float("nan"), "nm", None), (None, "nm", None), ("x", "nm", None),
     (1, None, None)],
)  # fmt: skip
def test_units(value: object, unit: object, expected: float | None) -> None:
    assert nanometres(value, unit) == expected


def test_print_resolutions_are_not_pixel_sizes() -> None:
    assert from_resolution(72, "inch") is None
    assert from_resolution(0, "inch") is None
    assert from_resolution(2.54e6, "inch") == pytest.approx(10)


def test_the_zoo_never_crashes(shared_data: Path) -> None:
    zoo = shared_data / "zoo"
    if not (zoo / "MANIFEST.tsv").is_file():
        pytest.skip("the zoo of odd files is not there")
    rows = [line.split("\t") for line in (zoo / "MANIFEST.tsv").read_text().splitlines()]
    wanted = rows[0].index("should_open")
    opened, refused = [], []
    for row in rows[1:]:
        try:
            sources = open_sources(zoo / row[0])
            for source in sources:
                _check(source)
            opened.append(row[0])
        except InputError as error:
            assert "\n" not in error.message
            assert Path(row[0]).name in error.message
            refused.append(row[0])
            should_open = row[wanted] if len(row) > wanted else row[-1]  # the last field of a short row
            assert should_open != "yes" or row[0] in _RIGHTLY_REFUSED
    assert len(opened) >= 240
    assert len(refused) > 40


_RIGHTLY_REFUSED = {
    "large_image/zero_gi.tif",  # no rows
    "zarrita/v2/data.zarr/2d.chunked.U7", "zarrita/v2/data.zarr/3d.chunked.O",  # text
    "zarrita/v3/data.zarr/2d.chunked.string.vlen",
    "zarrs/zarr_python_compat/cities_v2.zarr", "zarrs/zarr_python_compat/cities_v3.zarr",
    "zarrs/zarr_python_compat/str_v2_fv_null.zarr",
    "h5py/vlen_string_dset_utc.h5", "h5py/vlen_string_s390x.h5",  # texts and lines of numbers
    # complex numbers
    "rosettasciio/digitalmicrograph/2D/test-3.dm4", "rosettasciio/digitalmicrograph/2D/test-5.dm3",
    "rosettasciio/digitalmicrograph/2D/test-27.dm4",
}  # fmt: skip


def _check(source: Source) -> None:
    with source:
        block = source.read(ALL, slice(0, 64), slice(0, 64))
    assert block.dtype == source.info.dtype
    assert block.shape == tuple(min(n, m) for n, m in zip(source.info.shape_ZYX, (1 << 40, 64, 64), strict=True))


def test_tiff_written_by_others_is_not_needed_to_be_called_tif(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "scan.tif", picture((9, 9)))
    (tmp_path / "scan.tif").rename(tmp_path / "scan")
    assert find_files([tmp_path]) == [tmp_path / "scan"]
    assert read(tmp_path / "scan").shape == (1, 9, 9)
