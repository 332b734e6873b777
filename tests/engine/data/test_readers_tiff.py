"""TIFF files of many kinds, made here, against what was written into them; damaged ones; hostile ones."""

import copy
import pickle
import resource
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from affmae_engine.data.readers import Source, open_sources
from affmae_engine.errors import InputError

ALL = slice(None)


def picture(shape: tuple[int, ...], dtype: str = "uint8") -> np.ndarray:
    smooth = np.add.outer(np.arange(shape[-2]), np.arange(shape[-1])) // 4 % 200
    noise = np.random.default_rng(0).integers(0, 40, shape)
    return (smooth + noise).astype(dtype)


def read(source: Source) -> np.ndarray:
    return source.read(ALL, ALL, ALL)


def only(path: Path, **options: Any) -> Source:
    sources = open_sources(path, **options)
    assert len(sources) == 1
    return sources[0]


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "zstd", "packbits", "lzma"])
@pytest.mark.parametrize("tile", [None, (64, 48)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_reads_what_was_written(
    tmp_path: Path, compression: str | None, tile: tuple[int, int] | None, dtype: str
) -> None:
    image = picture((5, 150, 170), dtype)
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, image, compression=compression, tile=tile, rowsperstrip=None if tile else 17)
    source = only(path)
    assert source.info.shape_ZYX == image.shape
    assert source.info.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(read(source), image)
    np.testing.assert_array_equal(source.read(slice(1, 3), slice(37, 99), slice(45, 130)), image[1:3, 37:99, 45:130])
    assert source.read(slice(2, 2), ALL, ALL).shape == (0, 150, 170)


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("bigtiff", [False, True])
def test_byte_order_and_bigtiff(tmp_path: Path, byteorder: str, bigtiff: bool) -> None:
    image = picture((40, 50), "uint16") * 200
    tifffile.imwrite(tmp_path / "a.tif", image, byteorder=byteorder, bigtiff=bigtiff)
    block = read(only(tmp_path / "a.tif"))
    assert block.dtype.isnative
    np.testing.assert_array_equal(block[0], image)


def test_predictor_and_bilevel(tmp_path: Path) -> None:
    image = picture((60, 70), "uint16")
    tifffile.imwrite(tmp_path / "p.tif", image, compression="lzw", predictor=True)
    np.testing.assert_array_equal(read(only(tmp_path / "p.tif"))[0], image)
    mask = image > 100
    tifffile.imwrite(tmp_path / "b.tif", mask, photometric="minisblack")
    np.testing.assert_array_equal(read(only(tmp_path / "b.tif"))[0], mask * 255)
    np.testing.assert_array_equal(read(only(tmp_path / "b.tif", labels=True))[0], mask)


@pytest.mark.parametrize(
    ("dtype", "stored", "offset"),
    [("int8", "uint8", 128), ("int16", "uint16", 32768), ("int32", "float32", 0), ("float64", "float32", 0)],
)
def test_other_types_are_stored_without_wrapping(tmp_path: Path, dtype: str, stored: str, offset: int) -> None:
    image = (picture((30, 40)).astype(np.int64) - 120).clip(-128, 127).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", image)
    source = only(tmp_path / "a.tif")
    assert source.info.dtype == np.dtype(stored)
    assert source.info.value_offset == offset
    assert source.info.notes
    np.testing.assert_array_equal(read(source)[0], image.astype(np.float64) + offset)


def test_grey_stored_as_colour_comes_back_exactly(tmp_path: Path) -> None:
    grey = picture((40, 50))
    tifffile.imwrite(tmp_path / "c.tif", np.stack([grey] * 3, -1), photometric="rgb")
    tifffile.imwrite(tmp_path / "p.tif", np.stack([grey] * 3), photometric="rgb", planarconfig="separate")
    for name in ("c.tif", "p.tif"):
        source = only(tmp_path / name)
        np.testing.assert_array_equal(read(source)[0], grey)
        assert any("grey" in note for note in source.info.notes)
    colour = np.zeros((40, 50, 3), np.uint8)
    colour[..., 1] = 200
    tifffile.imwrite(tmp_path / "g.tif", colour, photometric="rgb")
    assert (read(only(tmp_path / "g.tif")) == round(0.587 * 200)).all()
    assert (read(only(tmp_path / "g.tif", channel=1)) == 200).all()
    with pytest.raises(InputError, match="no channel 3"):
        open_sources(tmp_path / "g.tif", channel=3)


def test_white_is_zero_is_inverted_but_not_for_labels(tmp_path: Path) -> None:
    image = picture((40, 50))
    tifffile.imwrite(tmp_path / "w.tif", image, photometric="miniswhite")
    np.testing.assert_array_equal(read(only(tmp_path / "w.tif"))[0], 255 - image)
    np.testing.assert_array_equal(read(only(tmp_path / "w.tif", labels=True))[0], image)


def test_palettes(tmp_path: Path) -> None:
    image = picture((40, 50))
    ramp = np.tile(np.arange(256, dtype=np.uint16) * 257, (3, 1))
    green = ramp * np.array([[0], [1], [0]], np.uint16)
    odd = np.random.default_rng(1).integers(0, 65535, (3, 256)).astype(np.uint16)
    for name, table, expected in (
        ("ramp", ramp, image),
        ("green", green, image),
        ("falling", ramp[:, ::-1], 255 - image),
    ):
        tifffile.imwrite(tmp_path / f"{name}.tif", image, photometric="palette", colormap=table)
        np.testing.assert_array_equal(read(only(tmp_path / f"{name}.tif"))[0], expected)
    tifffile.imwrite(tmp_path / "odd.tif", image, photometric="palette", colormap=odd)
    luminance = np.rint(np.array([0.299, 0.587, 0.114]) @ (odd / 257)).astype(np.uint8)
    np.testing.assert_array_equal(read(only(tmp_path / "odd.tif"))[0], luminance[image])
    np.testing.assert_array_equal(read(only(tmp_path / "odd.tif", labels=True))[0], image)


def test_imagej_hyperstack_with_pixel_size(tmp_path: Path) -> None:
    image = picture((2, 3, 2, 40, 50), "uint16")  # T Z C Y X
    tifffile.imwrite(
        tmp_path / "ij.tif", image, imagej=True, resolution=(1 / 0.004, 1 / 0.005),
        metadata={"axes": "TZCYX", "spacing": 0.04, "unit": "um"},
    )  # fmt: skip
    source = only(tmp_path / "ij.tif")
    assert source.info.format.startswith("ImageJ")
    assert source.info.pixel_nm == pytest.approx((40, 5, 4))
    assert source.info.shape_ZYX == (6, 40, 50)
    assert any("channel 0 of 2" in note for note in source.info.notes)
    assert any("time" in note for note in source.info.notes)
    np.testing.assert_array_equal(read(source), image[:, :, 0].reshape(6, 40, 50))
    np.testing.assert_array_equal(read(only(tmp_path / "ij.tif", channel=1)), image[:, :, 1].reshape(6, 40, 50))


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_ome_tiff_with_pixel_size(tmp_path: Path, compression: str | None) -> None:
    image = picture((4, 2, 40, 50))
    metadata = {
        "axes": "ZCYX", "PhysicalSizeX": 4.6, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.0046,
        "PhysicalSizeYUnit": "µm", "PhysicalSizeZ": 47.5, "PhysicalSizeZUnit": "nm",
    }  # fmt: skip
    tifffile.imwrite(tmp_path / "a.ome.tif", image, ome=True, compression=compression, metadata=metadata)
    source = only(tmp_path / "a.ome.tif")
    assert source.info.pixel_nm == (47.5, 4.6, 4.6)
    assert source.info.name == "a"
    np.testing.assert_array_equal(read(source), image[:, 0])


@pytest.mark.parametrize(
    ("resolution", "unit", "nm"),
    [((2540000, 1270000), "INCH", (None, 20.0, 10.0)), ((1e6, 1e6), "CENTIMETER", (None, 10.0, 10.0)),
     ((72, 72), "INCH", (None, None, None)), ((300, 300), "INCH", (None, None, None)),
     ((2540, 2540), "INCH", (None, None, None)), ((9600, 9600), "INCH", (None, None, None))],
)  # fmt: skip
def test_resolution_tags_count_when_they_are_plausible(tmp_path: Path, resolution: Any, unit: str, nm: Any) -> None:
    tifffile.imwrite(tmp_path / "a.tif", picture((9, 9)), resolution=resolution, resolutionunit=unit)
    found = only(tmp_path / "a.tif").info.pixel_nm
    assert found == (None, None, None) if nm[1] is None else found[1:] == pytest.approx(nm[1:])


def test_pages_of_different_size_are_separate_images_and_pyramids_one(tmp_path: Path) -> None:
    first, second = picture((2, 30, 40)), picture((50, 20), "uint16")
    with tifffile.TiffWriter(tmp_path / "mixed.tif") as file:
        file.write(first)
        file.write(second)
    one, two = open_sources(tmp_path / "mixed.tif")
    np.testing.assert_array_equal(read(one), first)
    np.testing.assert_array_equal(read(two)[0], second)
    assert (one.info.series, two.info.series) == ("0", "1")
    with tifffile.TiffWriter(tmp_path / "pyramid.ome.tif") as file:
        file.write(picture((256, 256)), subifds=1, tile=(64, 64))
        file.write(picture((128, 128)), subfiletype=1, tile=(64, 64))
    np.testing.assert_array_equal(read(only(tmp_path / "pyramid.ome.tif"))[0], picture((256, 256)))


def test_page_sized_strip_is_decoded_once_for_neighbouring_bands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture((300, 300))
    tifffile.imwrite(tmp_path / "a.tif", image, compression="zlib", rowsperstrip=300)
    source = only(tmp_path / "a.tif")
    decoded = []
    original = tifffile.TiffPage.decode.func  # type: ignore[attr-defined]

    def counted(page: Any) -> Any:
        inner = original(page)
        return lambda *args, **options: decoded.append(args[1]) or inner(*args, **options)

    monkeypatch.setattr(tifffile.TiffPage, "decode", property(counted))
    bands = [source.read(ALL, slice(y, y + 60), ALL) for y in range(0, 300, 60)]
    np.testing.assert_array_equal(np.concatenate(bands, axis=1)[0], image)
    assert decoded == [0]


def test_copies_and_pickles_carry_no_handle(tmp_path: Path) -> None:
    image = picture((2, 40, 40))
    tifffile.imwrite(tmp_path / "a.tif", image, compression="zlib")
    with only(tmp_path / "a.tif") as source:
        read(source)
        for other in (copy.copy(source), pickle.loads(pickle.dumps(source))):  # noqa: S301 (our own object)
            assert other._handle is None
            np.testing.assert_array_equal(read(other), image)
    np.testing.assert_array_equal(read(source), image)  # reopens after close


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zlib"},
        {"compression": "zstd"},
        {"compression": "lzw"},
        {"tile": (32, 32), "compression": "zlib"},
        {"bigtiff": True},
        {"imagej": True, "metadata": {"axes": "ZYX"}},
        {"ome": True},
        {"ome": True, "compression": "zlib"},
    ],
)
def test_truncation_is_refused_never_shortened(tmp_path: Path, options: dict[str, Any]) -> None:
    image = picture((6, 64, 64))
    path = tmp_path / "whole.tif"
    tifffile.imwrite(path, image, **options)
    content = path.read_bytes()
    for cut in np.linspace(0, len(content) - 1, 60).astype(int):
        broken = tmp_path / "broken.tif"
        broken.write_bytes(content[:cut])
        try:
            block = read(only(broken))
        except InputError as error:
            assert "broken.tif" in error.message
            assert "\n" not in error.message
        else:  # only bytes without meaning (padding, trailing metadata) were cut off
            np.testing.assert_array_equal(block, image)


def test_headers_that_promise_terabytes_are_refused_at_once(tmp_path: Path) -> None:
    def header(width: int, height: int, compression: int) -> bytes:
        tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, compression), (262, 3, 1, 1),
                (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 4)]  # fmt: skip
        return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + b"".join(
            struct.pack("<HHII", *tag) for tag in tags
        ) + b"\0" * 4  # fmt: skip

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for width, height, compression in [
        (131072, 131072, 1),
        (2**32 - 1, 2**32 - 1, 1),
        (40000, 40000, 8),
        (2**31, 9, 5),
    ]:
        (tmp_path / "bomb.tif").write_bytes(header(width, height, compression))
        with pytest.raises(InputError, match=r"bomb\.tif"):
            open_sources(tmp_path / "bomb.tif")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_other_files_named_by_a_file_are_never_opened(tmp_path: Path) -> None:
    secret, folder = tmp_path / "secret.ome.tif", tmp_path / "data"
    folder.mkdir()
    tifffile.imwrite(secret, np.full((16, 16), 77, np.uint8), ome=True)
    uuid = "urn:uuid:00000000-0000-0000-0000-000000000001"
    xml = (
        '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
        'UUID="urn:uuid:00000000-0000-0000-0000-000000000002"><Image ID="Image:0"><Pixels ID="P:0" '
        'DimensionOrder="XYZCT" Type="uint8" SizeX="16" SizeY="16" SizeZ="2" SizeC="1" SizeT="1">'
        '<TiffData IFD="0" FirstZ="0" PlaneCount="1"/><TiffData IFD="0" FirstZ="1" PlaneCount="1">'
        f'<UUID FileName="../secret.ome.tif">{uuid}</UUID></TiffData></Pixels></Image></OME>'
    )
    tifffile.imwrite(folder / "a.ome.tif", np.zeros((16, 16), np.uint8), description=xml, metadata=None)
    for source in open_sources(folder / "a.ome.tif"):
        assert not (read(source) == 77).any()


def test_entities_in_ome_xml_are_refused(tmp_path: Path) -> None:
    laughs = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 9))
    xml = f'<?xml version="1.0"?><!DOCTYPE OME [<!ENTITY l0 "ha">{laughs}]><OME xmlns="x/OME/">&l8;</OME>'
    tifffile.imwrite(tmp_path / "a.ome.tif", picture((16, 16)), description=xml, metadata=None)
    with pytest.raises(InputError, match="entities"):
        open_sources(tmp_path / "a.ome.tif")


def test_label_maps_keep_their_numbers(tmp_path: Path) -> None:
    numbers = np.array([[0, 1, 70000], [5, 5, 4000000000]], np.uint32)
    tifffile.imwrite(tmp_path / "u.tif", numbers)
    assert only(tmp_path / "u.tif", labels=True).info.dtype == np.uint32
    np.testing.assert_array_equal(read(only(tmp_path / "u.tif", labels=True))[0], numbers)
    tifffile.imwrite(tmp_path / "f.tif", numbers.astype(np.float64))
    np.testing.assert_array_equal(read(only(tmp_path / "f.tif", labels=True))[0], numbers)
    tifffile.imwrite(tmp_path / "half.tif", np.array([[0.5, 1]], np.float32))
    tifffile.imwrite(tmp_path / "minus.tif", np.array([[-1, 1]], np.int16))
    tifffile.imwrite(tmp_path / "rgb.tif", picture((20, 20, 3)), photometric="rgb")
    for name, reason in (("half", "whole"), ("minus", "negative"), ("rgb", "colour")):
        with pytest.raises(InputError, match=reason):
            read(only(tmp_path / f"{name}.tif", labels=True))


def zeiss(**entries: str) -> list[Any]:
    """A tag of Zeiss SmartSEM: unnamed numbers, then names and lines of text."""
    lines = ["0", "0", "0", "5.824988e-009"]
    for name, text in entries.items():
        lines += [name, text]
    return [(34118, "s", 0, ("\r\n".join(lines) + "\r\n").encode("latin-1"), True)]


@pytest.mark.parametrize(
    ("tags", "nm"),
    [
        (zeiss(AP_IMAGE_PIXEL_SIZE="Image Pixel Size = 11.65 nm", AP_PIXEL_SIZE="Pixel Size = 5.825 nm"), 11.65),
        (zeiss(AP_WIDTH="Width = 5.965 \xb5m", AP_PIXEL_SIZE="Pixel Size = 5.825 nm"), 11.650390625),
        (zeiss(AP_PIXEL_SIZE="Pixel Size = 5.825 nm"), 5.825),
        ([(34682, "s", 0, b"[Scan]\r\nPixelWidth=4e-009\r\nPixelHeight=4e-009\r\n", True)], 4.0),
        ([(34682, "s", 0, b"[EBeam]\r\nHFW=2.048e-006\r\n", True)], 4.0),
        ([(65003, "s", 0, "nm", True), (65004, "s", 0, "nm", True), (65009, "d", 1, 4.5, True),
          (65010, "d", 1, 4.5, True)], 4.5),
        ([(50431, "s", 0, b"[MAIN]\r\nPixelSizeX=7.5e-9\r\nPixelSizeY=7.5e-9\r\n", True)], 7.5),
    ],
)  # fmt: skip
def test_pixel_sizes_of_microscopes(tmp_path: Path, tags: list[Any], nm: float) -> None:
    tifffile.imwrite(tmp_path / "a.tif", picture((384, 512)), metadata=None, extratags=tags, resolution=(96, 96))
    assert only(tmp_path / "a.tif").info.pixel_nm == pytest.approx((None, nm, nm))


def test_pixel_size_of_olympus_and_emsis(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture((64, 64)), metadata=None, extratags=[(33560, "I", 1, 0, True)])
    content = bytearray(path.read_bytes())
    place, at = len(content), content.index(struct.pack("<HHI", 33560, 4, 1)) + 8
    details = struct.pack("<10xhdd8xd2x34s32s", -9, 4.5, 5.5, 1.0, b"", b"")
    header = struct.pack("<4s6xhhhhh6x32sH", b"SIS0", 0, 0, 1, 1, 120, b"x", 1) + struct.pack("<hhI", 1, 1, place + 68)
    content[at : at + 4] = struct.pack("<I", place)
    path.write_bytes(bytes(content) + header + details)
    assert only(path).info.pixel_nm == pytest.approx((None, 5.5, 4.5))


def test_pixel_size_of_jeol_tem(tmp_path: Path) -> None:
    xml = (
        "<TemReporter><ImageFormingSystem><ModeString>{}</ModeString><SelectorValue>20000</SelectorValue>"
        "</ImageFormingSystem></TemReporter>"
    )
    for mode, nm in (("MAG", 6.35), ("DIFF", None)):
        tifffile.imwrite(
            tmp_path / "a.tif", picture((64, 64)), metadata=None, description=xml.format(mode),
            resolution=(200, 200), resolutionunit="INCH", extratags=[(271, "s", 0, "JEOL Ltd.", True)],
        )  # fmt: skip
        assert only(tmp_path / "a.tif").info.pixel_nm == (pytest.approx((None, nm, nm)) if nm else (None, None, None))


@pytest.mark.parametrize(
    ("text", "encoding", "nm"),
    [
        ("[SemImageFile]\r\nInstructName=SU8000\r\nDataSize=1280x960\r\nPixelSize=9.921875\r\n", "utf-16", 19.84375),
        ("[SemImageFile]\r\nPixelSize=9.921875\r\n", "latin-1", 9.921875),
        ("$CM_FULL_SIZE 1280 960\n$$SM_MICRON_BAR 100\n$$SM_MICRON_MARKER 1um\n", "latin-1", 20.0),
        ("notes\nPixelSize=3\n", "latin-1", None),
    ],
)
def test_pixel_sizes_in_text_beside_an_image(tmp_path: Path, text: str, encoding: str, nm: float | None) -> None:
    tifffile.imwrite(tmp_path / "a.tif", picture((480, 640)), metadata=None)
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert only(tmp_path / "a.tif").info.pixel_nm == (pytest.approx((None, nm, nm)) if nm else (None, None, None))


@pytest.mark.parametrize(("size", "asked"), [(4.6, False), (1500.0, True), (0.004, True)])
def test_absurd_pixel_sizes_are_questioned(tmp_path: Path, size: float, asked: bool) -> None:
    metadata = {"axes": "YX", "PhysicalSizeX": size, "PhysicalSizeXUnit": "nm"}
    tifffile.imwrite(tmp_path / "a.ome.tif", picture((40, 50)), ome=True, metadata=metadata)
    info = only(tmp_path / "a.ome.tif").info
    assert info.pixel_nm[2] == size
    assert bool(info.questions) == asked
    assert not asked or "--pixel-size" in info.questions[0]


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_axes_that_a_file_writes_are_obeyed_and_narrow_pages_questioned(
    tmp_path: Path, compression: str | None
) -> None:
    image = picture((50, 40, 6), "uint16")  # y, x, z
    tifffile.imwrite(tmp_path / "named.tif", image, metadata={"axes": "YXZ"}, compression=compression)
    tifffile.imwrite(tmp_path / "plain.tif", image, metadata=None, photometric="minisblack", compression=compression)
    source = only(tmp_path / "named.tif")
    assert (source.info.shape_ZYX, source.info.questions) == ((6, 50, 40), ())
    np.testing.assert_array_equal(read(source), np.moveaxis(image, -1, 0))
    np.testing.assert_array_equal(
        source.read(slice(2, 5), slice(7, 20), slice(3, 30)), np.moveaxis(image, -1, 0)[2:5, 7:20, 3:30]
    )
    plain = only(tmp_path / "plain.tif")
    assert plain.info.shape_ZYX == (50, 40, 6)
    assert "--axes YXZ" in plain.info.questions[0]
    said = only(tmp_path / "plain.tif", axes="yxz")
    assert said.info.series == "YXZ"  # another image than the one without
    np.testing.assert_array_equal(read(said), np.moveaxis(image, -1, 0))
    tifffile.imwrite(tmp_path / "colors.tif", image[..., :3], metadata=None, photometric="minisblack")
    assert "--axes YXC" in only(tmp_path / "colors.tif").info.questions[0]
    assert not only(tmp_path / "plain.tif", axes="ZYX").info.questions
    channels = only(tmp_path / "plain.tif", axes="YXC", channel=2)
    np.testing.assert_array_equal(read(channels)[0], image[..., 2])


def test_time_stays_time(tmp_path: Path) -> None:
    image = picture((2, 3, 40, 50))
    tifffile.imwrite(tmp_path / "a.tif", image, imagej=True, metadata={"axes": "TZYX"})
    info = only(tmp_path / "a.tif").info
    assert (info.section_axes, info.section_shape, info.shape_ZYX) == ("TZ", (2, 3), (6, 40, 50))
    tifffile.imwrite(tmp_path / "b.tif", image[:, 0], imagej=True, metadata={"axes": "TYX"})
    assert (only(tmp_path / "b.tif").info.section_axes, only(tmp_path / "b.tif").info.section_shape) == ("T", (2,))


def subsampled(path: Path, luminance: np.ndarray, across: int, down: int, rows: int, compression: int) -> None:
    """A YCbCr TIFF whose colors are stored once per `across` x `down` pixels (TIFF 6.0, section 21)."""
    height, width = luminance.shape
    strips = []
    for top in range(0, height, rows):
        part = luminance[top : top + rows]
        part = np.pad(part, ((0, -part.shape[0] % down), (0, -width % across)), "edge")
        units = part.reshape(part.shape[0] // down, down, part.shape[1] // across, across).swapaxes(1, 2)
        units = units.reshape(*units.shape[:2], -1)
        data = np.concatenate([units, np.full((*units.shape[:2], 2), 77, np.uint8)], -1).tobytes()
        strips.append(zlib.compress(data) if compression == 8 else data)
    offsets = np.cumsum([8, *map(len, strips)])
    extra = int(offsets[-1]) + int(offsets[-1]) % 2
    lists = [struct.pack(f"<{len(strips)}I", *offsets[:-1]), struct.pack(f"<{len(strips)}I", *map(len, strips))]
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, extra + 138), (259, 3, 1, compression), (262, 3, 1, 6),
            (273, 4, len(strips), extra + 144), (277, 3, 1, 3), (278, 4, 1, rows),
            (279, 4, len(strips), extra + 144 + len(lists[0])), (530, 3, 2, across | down << 16),
            (531, 3, 1, 2)]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    assert len(directory) == 138 and len(strips) > 1
    path.write_bytes(
        b"II*\0" + struct.pack("<I", extra) + b"".join(strips).ljust(extra - 8, b"\0") + directory
        + struct.pack("<3H", 8, 8, 8) + b"".join(lists)
    )  # fmt: skip


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize(("across", "down"), [(2, 1), (2, 2), (4, 2)])
def test_subsampled_colors_give_their_luminance(tmp_path: Path, compression: int, across: int, down: int) -> None:
    image = picture((47, 63))
    subsampled(tmp_path / "a.tif", image, across, down, 16, compression)
    source = only(tmp_path / "a.tif")
    np.testing.assert_array_equal(read(source)[0], image)
    np.testing.assert_array_equal(source.read(ALL, slice(10, 40), slice(5, 50))[0], image[10:40, 5:50])
    content = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "b.tif").write_bytes(content[:900] + content[1100:])
    with pytest.raises(InputError, match=r"b\.tif"):
        read(only(tmp_path / "b.tif"))


def test_old_style_jpeg_of_the_zoo(shared_data: Path) -> None:
    path = shared_data / "zoo" / "image-tiff" / "libtiffpic" / "zackthecat.tif"
    if not path.is_file():
        pytest.skip("the zoo of odd files is not there")
    with Image.open(path) as picture:
        colors = np.asarray(picture.convert("RGB")).astype(int)
    luminance = (299 * colors[..., 0] + 587 * colors[..., 1] + 114 * colors[..., 2] + 500) // 1000
    np.testing.assert_array_equal(read(only(path))[0], luminance)
