"""MRC, HDF5 and EMD, N5, NumPy, NIfTI, DM3/DM4, precomputed and packed files, as independent writers write them."""

import bz2
import gzip
import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from affmae_engine.data.labels.pairing import pair_labels
from affmae_engine.data.readers import Source, find_files, open_sources, packed, scan_here, scan_sources
from affmae_engine.data.readers.source import ReadOptions, reading_as
from affmae_engine.errors import ConfigError, InputError, ResourceError

ALL = slice(None)


def block(shape: tuple[int, ...], dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 120, shape).astype(dtype)


def only(path: Path, **options: Any) -> Source:
    (source,) = open_sources(path, **options)
    return source


def values(source: Source) -> np.ndarray:
    """What the file holds: the shift of signed numbers undone."""
    with source:
        return source.read(ALL, ALL, ALL).astype(np.float64) - source.info.value_offset


# MRC -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint16", "float16", "float32"])
def test_mrc_modes_and_voxel_size(tmp_path: Path, dtype: str) -> None:
    mrcfile = pytest.importorskip("mrcfile")
    stack = block((4, 20, 30), dtype) - np.dtype(dtype).type(0 if dtype[0] == "u" else 60)
    with mrcfile.new(tmp_path / "a.mrc") as file:
        file.set_data(stack)
        file.set_volume()
        file.voxel_size = (40.0, 50.0, 400.0)  # x, y, z in angstroms
        file.set_extended_header(np.zeros(100, "V16"))
    source = only(tmp_path / "a.mrc")
    np.testing.assert_array_equal(values(source), stack)
    assert source.info.pixel_nm == (40, 5, 4)
    np.testing.assert_array_equal(
        source.read(slice(1, 3), slice(2, 9), slice(5, 30)).astype(float) - source.info.value_offset,
        stack[1:3, 2:9, 5:30],
    )


def mrc(data: np.ndarray, mode: int, order: str = "<", *, axes: tuple[int, ...] = (1, 2, 3), **fields: Any) -> bytes:
    depth, height, width = data.shape[:3]
    header = bytearray(1024)
    struct.pack_into(order + "10i6f3i3f2i", header, 0, width, height, depth, mode, 0, 0, 0,
                     *fields.get("intervals", (width, height, depth)), *fields.get("cell", (0, 0, 0)), 90, 90, 90,
                     *axes, *fields.get("range", (0, -1, 0)), fields.get("group", 1), 0)  # fmt: skip
    struct.pack_into(order + "2i", header, 152, fields.get("stamp", 0), fields.get("flags", 0))
    header[208:212] = fields.get("map", b"MAP ")
    header[212:214] = b"DD" if order == "<" else b"\x11\x11"
    return bytes(header) + data.astype(data.dtype.newbyteorder(order)).tobytes()


@pytest.mark.parametrize("order", ["<", ">"])
def test_mrc_byte_order_permuted_axes_and_no_stamp(tmp_path: Path, order: str) -> None:
    stored = block((5, 6, 7), "int16")  # sections, rows, columns
    # Columns run along z, rows along x, sections along y; the cell is 70 x 50 x 60 angstroms along x, y, z.
    content = mrc(stored, 1, order, axes=(3, 1, 2), intervals=(6, 5, 7), cell=(60.0, 100.0, 210.0))
    (tmp_path / "a.map").write_bytes(content)
    source = only(tmp_path / "a.map")
    np.testing.assert_array_equal(values(source), stored.transpose(2, 0, 1))
    assert source.info.pixel_nm == (3, 2, 1)
    (tmp_path / "old.mrc").write_bytes(mrc(stored, 1, order, map=b"\0" * 4))
    np.testing.assert_array_equal(values(only(tmp_path / "old.mrc")), stored)
    (tmp_path / "old.mrc").rename(tmp_path / "old.bin")  # without stamp, the name has to say so
    with pytest.raises(InputError, match="no image format"):
        open_sources(tmp_path / "old.bin")


@pytest.mark.parametrize("fields", [{"stamp": 1146047817, "flags": 0}, {"range": (0, 250, 100)}])
def test_mrc_bytes_of_imod_and_older_programs_are_unsigned(tmp_path: Path, fields: dict[str, Any]) -> None:
    stored = block((2, 9, 9)) + np.uint8(130)
    (tmp_path / "a.rec").write_bytes(mrc(stored, 0, **fields))
    source = only(tmp_path / "a.rec")
    assert source.info.value_offset == 0
    np.testing.assert_array_equal(values(source), stored)
    (tmp_path / "b.rec").write_bytes(mrc(stored, 0, stamp=1146047817, flags=1))
    np.testing.assert_array_equal(values(only(tmp_path / "b.rec")), stored.view(np.int8))


def test_mrc_stacks_colors_and_refusals(tmp_path: Path) -> None:
    stored = block((6, 9, 9))
    (tmp_path / "s.mrcs").write_bytes(mrc(stored, 0, group=0, intervals=(9, 9, 1), cell=(90.0, 90.0, 10.0)))
    assert only(tmp_path / "s.mrcs").info.pixel_nm == (None, 1, 1)  # images, not a volume
    (tmp_path / "v.mrc").write_bytes(mrc(stored, 0, group=401, intervals=(9, 9, 3)))
    assert any("2 volumes of 3" in note for note in only(tmp_path / "v.mrc").info.notes)
    np.testing.assert_array_equal(values(only(tmp_path / "v.mrc")), stored)
    colors = block((2, 9, 9, 3))
    (tmp_path / "c.mrc").write_bytes(mrc(colors, 16))
    np.testing.assert_array_equal(values(only(tmp_path / "c.mrc", channel=1)), colors[..., 1])
    (tmp_path / "f.mrc").write_bytes(mrc(block((2, 9, 9), "float32"), 2, cell=(9.0, 9.0, 2.0)))
    assert only(tmp_path / "f.mrc").info.pixel_nm == (None, None, None)  # one angstrom: nobody knew
    for name, content, reason in [
        ("short", mrc(stored, 0)[:-1], "1 bytes of its pixels are missing"),
        ("complex", mrc(stored, 4), "complex"), ("mode", mrc(stored, 99), "mode 99"),
        ("header", mrc(stored, 0)[:500], "incomplete"), ("size", mrc(np.zeros((0, 9, 9), "u1"), 0), "damaged"),
    ]:  # fmt: skip
        (tmp_path / f"{name}.mrc").write_bytes(content)
        with pytest.raises(InputError, match=reason):
            open_sources(tmp_path / f"{name}.mrc")
    source = only(tmp_path / "s.mrcs")
    values(source)
    (tmp_path / "s.mrcs").write_bytes(mrc(stored, 0)[:1100])
    with pytest.raises(InputError, match=r"ended \d+ bytes early"):
        source.read(ALL, ALL, ALL)


# NumPy and NIfTI -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(20, 30), (5, 20, 30), (20, 30, 3), (2, 5, 20, 30)])
def test_npy(tmp_path: Path, order: str, shape: tuple[int, ...]) -> None:
    stored = np.asarray(block(shape, ">u2"), order=order)  # type: ignore[call-overload]
    np.save(tmp_path / "a.npy", stored)
    source = only(tmp_path / "a.npy", channel=1 if len(shape) == 4 or shape[-1] == 3 else None)
    expected = stored[..., 1][None] if shape[-1] == 3 else stored[1] if len(shape) == 4 else stored
    np.testing.assert_array_equal(values(source), expected.reshape(source.info.shape_ZYX))
    np.testing.assert_array_equal(
        source.read(slice(0, 1), slice(3, 7), slice(4, 29)), expected.reshape(source.info.shape_ZYX)[:1, 3:7, 4:29]
    )
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(content[:-1])
    with pytest.raises(InputError, match="1 bytes"):
        open_sources(tmp_path / "a.npy")


@pytest.mark.parametrize("kind", ["Nifti1Image", "Nifti2Image"])
@pytest.mark.parametrize("packing", ["", ".gz"])
def test_nifti(tmp_path: Path, kind: str, packing: str) -> None:
    nibabel = pytest.importorskip("nibabel")
    stored = block((30, 20, 5), "int16")  # x, y, z
    image = getattr(nibabel, kind)(stored, np.diag([0.004, 0.005, 0.04, 1]))
    image.header.set_xyzt_units("micron")
    nibabel.save(image, tmp_path / f"a.nii{packing}")
    source = only(tmp_path / f"a.nii{packing}")
    assert source.info.name == "a"
    assert source.info.pixel_nm == pytest.approx((40, 5, 4))
    np.testing.assert_array_equal(values(source), np.asarray(nibabel.load(tmp_path / f"a.nii{packing}").dataobj).T)


def test_nifti_scaled_values_and_time(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    image = nibabel.Nifti1Image(block((8, 9, 3, 2)), np.eye(4))
    image.header.set_slope_inter(2, -7)
    nibabel.save(image, tmp_path / "a.nii")
    source = only(tmp_path / "a.nii")
    assert (source.info.section_axes, source.info.section_shape) == ("TZ", (2, 3))
    truth = np.asarray(nibabel.load(tmp_path / "a.nii").dataobj)
    np.testing.assert_allclose(values(source), truth.T.reshape(6, 9, 8))
    content = bytearray((tmp_path / "a.nii").read_bytes())
    for place, change, reason in (
        (70, b"\x20\0", "not real"),
        (344, b"ni1\0", "second file"),
        (40, b"\x09", "damaged"),
    ):
        changed = content.copy()
        changed[place : place + len(change)] = change
        (tmp_path / "b.nii").write_bytes(changed)
        with pytest.raises(InputError, match=reason):
            open_sources(tmp_path / "b.nii")


# DM3 and DM4 -----------------------------------------------------------------------------------------------------


class Gatan:
    """Writes the tags of a DM3 or DM4 file."""

    def __init__(self, version: int) -> None:
        self.version, self.count = version, ">q" if version == 4 else ">i"

    def number(self, value: int) -> bytes:
        return struct.pack(self.count, value)

    def tag(self, name: str, kind: int, content: bytes) -> bytes:
        length = struct.pack(">q", len(content)) if self.version == 4 else b""
        return struct.pack(">bH", kind, len(name)) + name.encode() + length + content

    def group(self, *tags: bytes) -> bytes:
        return b"\1\0" + self.number(len(tags)) + b"".join(tags)

    def folder(self, name: str, *tags: bytes) -> bytes:
        return self.tag(name, 20, self.group(*tags))

    def value(self, name: str, kind: int, code: str, value: float) -> bytes:
        return self.tag(name, 21, b"%%%%" + self.number(1) + self.number(kind) + struct.pack("<" + code, value))

    def array(self, name: str, kind: int, data: bytes, count: int) -> bytes:
        numbers = b"".join(map(self.number, (3, 20, kind, count)))
        return self.tag(name, 21, b"%%%%" + numbers + data)

    def text(self, name: str, text: str) -> bytes:
        return self.array(name, 4, text.encode("utf-16-le"), len(text))

    def image(self, data: np.ndarray, pixels: int, element: int, scales: list[tuple[float, str]]) -> bytes:
        dimensions = [self.folder("", self.value("Scale", 6, "f", s), self.text("Units", u)) for s, u in scales]
        sizes = [self.value("", 5, "I", n) for n in data.shape[::-1]]
        return self.folder(
            "",
            self.folder(
                "ImageData",
                self.folder("Calibrations", self.folder("Dimension", *dimensions)),
                self.array("Data", element, data.tobytes(), data.size),
                self.value("DataType", 5, "I", pixels),
                self.folder("Dimensions", *sizes),
            ),
        )

    def file(self, *images: bytes) -> bytes:
        thumbnail = self.folder("Thumbnails", self.folder("", self.value("ImageIndex", 5, "I", 0)))
        size = struct.pack(">q" if self.version == 4 else ">i", 0)
        return struct.pack(">i", self.version) + size + struct.pack(">i", 1) + self.group(
            self.folder("ImageList", *images), thumbnail
        )  # fmt: skip


@pytest.mark.parametrize("version", [3, 4])
def test_digital_micrograph(tmp_path: Path, version: int) -> None:
    gatan = Gatan(version)
    small = gatan.image(np.zeros((4, 4), "u4"), 23, 5, [(1.0, "")] * 2)
    stack = block((3, 20, 30), "uint16")
    (tmp_path / "a.dm").write_bytes(
        gatan.file(small, gatan.image(stack, 10, 4, [(4.0, "nm"), (0.005, "µm"), (40.0, "nm")]))
    )
    source = only(tmp_path / "a.dm")  # the content tells
    np.testing.assert_array_equal(values(source), stack)
    assert source.info.pixel_nm == pytest.approx((40, 5, 4))
    movie = gatan.image(block((3, 8, 9), "float32"), 2, 6, [(1.0, "1/nm"), (1.0, "1/nm"), (2.0, "s")])
    (tmp_path / "b.dm3").write_bytes(gatan.file(small, movie))
    source = only(tmp_path / "b.dm3")
    assert source.info.pixel_nm == (None, None, None)
    assert (source.info.section_axes, source.info.section_shape) == ("T", (3,))
    colors = block((5, 6, 4))
    (tmp_path / "c.dm4").write_bytes(gatan.file(small, gatan.image(colors.view("u4")[..., 0], 23, 5, [(1.0, "")] * 2)))
    np.testing.assert_array_equal(values(only(tmp_path / "c.dm4", channel=0))[0], colors[..., 2])
    (tmp_path / "d.dm4").write_bytes(gatan.file(small, gatan.image(block((5, 6), "u8"), 3, 12, [(1.0, "")] * 2)))
    with pytest.raises(InputError, match="not real numbers"):
        open_sources(tmp_path / "d.dm4")


@pytest.mark.parametrize("version", [3, 4])
def test_damaged_tags_of_digital_micrograph_are_refused(tmp_path: Path, version: int) -> None:
    gatan = Gatan(version)
    stored = block((20, 30), "uint16")
    content = gatan.file(gatan.image(np.zeros((4, 4), "u4"), 23, 5, []), gatan.image(stored, 10, 4, [(4.0, "nm")] * 2))
    chance = np.random.default_rng(1)
    for cut in chance.integers(0, len(content), 60):
        (tmp_path / "a.dm3").write_bytes(content[:cut])
        with pytest.raises(InputError, match=r"a\.dm3"):
            open_sources(tmp_path / "a.dm3")
    for place in chance.integers(0, len(content), 300):
        (tmp_path / "a.dm3").write_bytes(content[:place] + b"\xff" * 4 + content[place + 4 :])
        try:
            sources = open_sources(tmp_path / "a.dm3")
        except InputError as error:
            assert "\n" not in error.message
        else:
            assert all(source.read(ALL, ALL, ALL).shape == source.info.shape_ZYX for source in sources)


# HDF5 ------------------------------------------------------------------------------------------------------------


def test_hdf5_of_cremi_and_inner_paths(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    raw, ids = block((4, 30, 40)), block((4, 30, 40), "uint64") * 1000
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("volumes/raw", data=raw, compression="gzip").attrs["resolution"] = (40.0, 4.0, 5.0)
        file["volumes/labels/neuron_ids"] = ids
        file["annotations/locations"] = np.zeros((900, 3))
        file["volumes/labels"].attrs["comment"] = "x"
    source = only(tmp_path / "a.h5")
    assert source.info.pixel_nm == (40, 4, 5)
    assert (source.info.name, source.info.series) == ("a", "volumes/raw")
    np.testing.assert_array_equal(values(source), raw)
    np.testing.assert_array_equal(values(only(tmp_path / "a.h5", labels=True)), ids)
    named = tmp_path / "a.h5:/volumes/labels/neuron_ids"
    assert find_files([str(named)]) == [named]
    np.testing.assert_array_equal(values(only(named, labels=True)), ids)
    with pytest.raises(InputError, match="no image of that name") as caught:
        open_sources(tmp_path / "a.h5:/volumes/none")
    assert "/volumes/raw (uint8, 4 x 30 x 40)" in caught.value.hint
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["other"] = raw
    with pytest.raises(InputError, match="2 datasets that could be the image") as caught:
        open_sources(tmp_path / "a.h5")
    assert f"{tmp_path}/a.h5:/volumes/raw (uint8, 4 x 30 x 40)" in caught.value.hint


def test_hdf5_axes_and_sizes_of_ilastik_fiji_and_dimension_labels(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    stored = block((5, 6, 7, 2))
    tags = {"axes": [{"key": k, "resolution": r, "unit": "nm"} for k, r in zip("xyzc", (4, 5, 40, 0), strict=True)]}
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["exported_data"] = stored
        file["exported_data"].attrs["axistags"] = json.dumps(tags)
    source = only(tmp_path / "a.h5", channel=1)
    np.testing.assert_array_equal(values(source), stored[..., 1].T)
    assert source.info.pixel_nm == (40, 5, 4)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["data"] = stored[..., 0]
        file["data"].attrs["element_size_um"] = (0.04, 0.005, 0.004)
        file["data"].dims[0].label, file["data"].dims[1].label, file["data"].dims[2].label = "y", "x", "z"
    source = only(tmp_path / "b.h5")
    np.testing.assert_array_equal(values(source), stored[..., 0].transpose(2, 0, 1))
    assert source.info.pixel_nm == (40, 5, 4)


def test_hdf5_of_big_data_viewer(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    stored = block((4, 20, 30), "uint16") + np.uint16(40_000)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for setup in range(2):
            for level in range(2):
                file[f"t00000/s{setup:02}/{level}/cells"] = stored[:, :: level + 1, :: level + 1].view(np.int16)
            file[f"s{setup:02}/resolutions"] = np.ones((2, 3))
    setups = "".join(
        f"<ViewSetup><id>{i}</id><voxelSize><unit>um</unit><size>0.004 0.005 0.04</size></voxelSize></ViewSetup>"
        for i in range(2)
    )
    (tmp_path / "a.xml").write_text(f"<SpimData>{setups}</SpimData>")
    sources = open_sources(tmp_path / "a.h5")
    assert [source.info.series for source in sources] == ["t00000/s00/0/cells", "t00000/s01/0/cells"]
    np.testing.assert_array_equal(values(sources[1]), stored)
    assert sources[1].info.pixel_nm == (40, 5, 4)


def test_emd_of_ncem_and_velox(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    stored = block((3, 20, 30), "float32")
    with h5py.File(tmp_path / "a.emd", "w") as file:
        group = file.create_group("data/stack")
        group.attrs["emd_group_type"] = 1
        group["data"] = stored
        for number, (name, unit, step) in enumerate((("z", "[n_m]", 40), ("y", "[n_m]", 5), ("x", "[u_m]", 0.004)), 1):
            group[f"dim{number}"] = np.arange(stored.shape[number - 1]) * float(step)
            group[f"dim{number}"].attrs.update({"name": name, "units": unit})
    source = only(tmp_path / "a.emd")
    np.testing.assert_array_equal(values(source), stored)
    assert source.info.pixel_nm == pytest.approx((40, 5, 4))
    metadata = {
        "BinaryResult": {"PixelSize": {"width": "4e-9", "height": "5e-9"}, "PixelUnitX": "m", "PixelUnitY": "m"}
    }
    text = np.frombuffer(json.dumps(metadata).encode().ljust(900, b"\0"), np.uint8)
    with h5py.File(tmp_path / "b.emd", "w") as file:
        file["Data/Image/0123abcd/Data"] = stored.transpose(1, 2, 0)
        file["Data/Image/0123abcd/Metadata"] = np.stack([text] * 3, 1)
    source = only(tmp_path / "b.emd")
    np.testing.assert_array_equal(values(source), stored)
    assert source.info.pixel_nm == pytest.approx((None, 5, 4))
    assert source.info.section_axes == "T"


def test_hdf5_reads_nothing_of_other_files(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["raw"] = block((9, 9))
    (tmp_path / "secret.raw").write_bytes(bytes(81))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["link"] = h5py.ExternalLink("secret.h5", "/raw")
        file["loop"] = h5py.SoftLink("/")
    with pytest.raises(InputError, match="no dataset that could be an image"):
        open_sources(tmp_path / "a.h5")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_dataset("raw", (9, 9), "u1", external=str(tmp_path / "secret.raw"))
    with h5py.File(tmp_path / "c.h5", "w") as file:
        layout = h5py.VirtualLayout((9, 9), "u1")
        layout[:] = h5py.VirtualSource(tmp_path / "secret.h5", "raw", (9, 9))
        file.create_virtual_dataset("raw", layout)
    for name in ("b.h5", "c.h5"):
        with pytest.raises(InputError, match="lie in other files"):
            open_sources(tmp_path / name)


# N5 and precomputed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [{"type": "raw"}, {"type": "gzip"}, {"type": "bzip2"}, {"type": "zstd"},
                                         {"type": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1}])  # fmt: skip
def test_n5(tmp_path: Path, compression: dict[str, Any]) -> None:
    ts = pytest.importorskip("tensorstore")
    stored = block((4, 30, 40), "uint16")
    root = tmp_path / "a.n5"
    for key, data in (("vol/s0", stored), ("vol/s1", stored[:, ::2, ::2])):
        ts.open({
            "driver": "n5", "kvstore": {"driver": "file", "path": f"{root}/{key}/"}, "create": True,
            "metadata": {"dataType": "uint16", "dimensions": data.shape[::-1], "blockSize": [16, 16, 3],
                         "compression": compression},
        }).result()[...] = data.T  # fmt: skip
    (root / "attributes.json").write_text('{"n5": "2.5.0"}')
    (root / "vol" / "attributes.json").write_text('{"pixelResolution": {"unit": "nm", "dimensions": [4, 5, 40]}}')
    source = only(root)
    np.testing.assert_array_equal(values(source), stored)
    assert source.info.pixel_nm == (40, 5, 4)
    np.testing.assert_array_equal(values(only(tmp_path / "a.n5:/vol/s1")), stored[:, ::2, ::2])
    block_file = root / "vol" / "s0" / "0" / "0" / "0"
    block_file.write_bytes(block_file.read_bytes()[:20])
    with pytest.raises(InputError, match=r"a\.n5"):
        only(root).read(ALL, ALL, ALL)


def test_precomputed(tmp_path: Path) -> None:
    ts = pytest.importorskip("tensorstore")
    stored = block((4, 30, 40))
    for kind in ("image", "segmentation"):
        spec = {
            "driver": "neuroglancer_precomputed", "kvstore": {"driver": "file", "path": f"{tmp_path}/{kind}/"},
            "create": True, "multiscale_metadata": {"type": kind, "data_type": "uint8", "num_channels": 1},
            "scale_metadata": {"size": [40, 30, 4], "resolution": [4, 5, 40], "encoding": "raw",
                               "chunk_size": [16, 16, 4], "voxel_offset": [7, 8, 9]},
        }  # fmt: skip
        ts.open(spec).result()[...] = stored.T[..., None]
    assert find_files([tmp_path]) == [tmp_path / "image", tmp_path / "segmentation"]
    source = only(tmp_path / "image")
    assert source.info.pixel_nm == (40, 5, 4)
    np.testing.assert_array_equal(values(source), stored)
    with pytest.raises(InputError, match="label map"):
        open_sources(tmp_path / "segmentation")
    np.testing.assert_array_equal(values(only(tmp_path / "segmentation", labels=True)), stored)


def test_formats_whose_package_is_missing_say_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99))
    (tmp_path / "a.n5").mkdir()
    (tmp_path / "a.n5" / "attributes.json").write_text('{"n5": "2.0.0"}')
    for package, name in (("h5py", "a.h5"), ("tensorstore", "a.n5")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(InputError, match=f"need the package {package}") as caught:
            scan_here(tmp_path / name, ReadOptions())
        assert caught.value.hint == "install it with: pip install 'affmae[formats]'"


# Packed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress])
def test_packed_files(tmp_path: Path, pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ending = "gz" if pack is gzip.compress else "bz2"
    stored = block((3, 40, 50))
    tifffile.imwrite(tmp_path / "a.ome.tif", stored, ome=True, compression="jpeg", metadata={"axes": "ZYX"})
    path = tmp_path / f"a.ome.tif.{ending}"
    path.write_bytes(pack((tmp_path / "a.ome.tif").read_bytes()))
    assert find_files([tmp_path]) == [tmp_path / "a.ome.tif", path]
    source = only(path)
    assert (source.info.path, source.info.name) == (path, "a")
    np.testing.assert_array_equal(values(source), values(only(tmp_path / "a.ome.tif")))
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:-9] + bytes(9), pack(content)):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"a\.ome\.tif\.{ending}"):
            open_sources(path)
    path.write_bytes(pack(bytes(1 << 20)))
    with pytest.raises(InputError, match="no image format") as caught:
        open_sources(path)
    assert str(path) in caught.value.message
    monkeypatch.setattr("affmae_engine.data.readers.limits.HARMLESS", 1000)
    monkeypatch.setattr("affmae_engine.data.readers.limits.LARGEST_RATIO", 100)
    path.write_bytes(pack(bytes(3 << 20)))
    with pytest.raises(InputError, match="its header declares"):
        open_sources(path)
    monkeypatch.setattr(packed, "_SPARE", 1 << 60)
    path.write_bytes(pack(b"x" * 50))
    with pytest.raises(ResourceError, match="are free") as full:
        open_sources(path)
    assert "TMPDIR" in full.value.hint


# Axes and channels as the user says ------------------------------------------------------------------------------


def test_axes_and_channel_that_the_user_names(tmp_path: Path) -> None:
    stored = block((50, 40, 6))  # y, x, z
    np.save(tmp_path / "a.npy", stored)
    source = only(tmp_path / "a.npy", axes="yxz")
    np.testing.assert_array_equal(values(source), np.moveaxis(stored, -1, 0))
    np.testing.assert_array_equal(source.read(slice(2, 4), slice(5, 9), ALL), np.moveaxis(stored, -1, 0)[2:4, 5:9])
    np.testing.assert_array_equal(values(only(tmp_path / "a.npy", axes="YXC", channel=4))[0], stored[..., 4])
    with reading_as(axes="YXC", channel=2):
        np.testing.assert_array_equal(values(only(tmp_path / "a.npy"))[0], stored[..., 2])
        np.testing.assert_array_equal(values(only(tmp_path / "a.npy", labels=True))[0], stored[..., 0])
    assert only(tmp_path / "a.npy").info.shape_ZYX == stored.shape
    with pytest.raises(InputError, match="names 2 axes, it has 3"):
        open_sources(tmp_path / "a.npy", axes="YX")
    for wrong in ("ZZYX", "ZXC", "YXQ"):
        with pytest.raises(ConfigError, match="one letter per axis"):
            open_sources(tmp_path / "a.npy", axes=wrong)
    sources, refused = scan_sources(tmp_path / "a.npy", axes="CYX")
    assert sources[0].info.shape_ZYX == (1, 40, 6) and not refused


def test_channel_and_axes_of_images_in_finetuning(tmp_path: Path) -> None:
    stored = block((2, 3, 40, 50), "uint16")  # z, c, y, x
    numbers = block((2, 40, 50)) % 3
    tifffile.imwrite(tmp_path / "image.tif", stored, imagej=True, metadata={"axes": "ZCYX"})
    tifffile.imwrite(tmp_path / "labels.tif", numbers, imagej=True, metadata={"axes": "ZYX"})
    with reading_as(channel=2):
        (pair,) = pair_labels([tmp_path / "image.tif"], [tmp_path / "labels.tif"]).pairs
    np.testing.assert_array_equal(values(pair.image), stored[:, 2])
    np.testing.assert_array_equal(values(pair.labels), numbers)
    np.save(tmp_path / "image.npy", np.moveaxis(stored[:, 0], 0, -1))
    np.save(tmp_path / "labels.npy", np.moveaxis(numbers, 0, -1))
    with reading_as(axes="yxz"):
        (pair,) = pair_labels([tmp_path / "image.npy"], [tmp_path / "labels.npy"]).pairs
    np.testing.assert_array_equal(values(pair.image), stored[:, 0])
    np.testing.assert_array_equal(values(pair.labels), numbers)
