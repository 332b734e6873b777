"""Files from strangers: what declares, hides or points to more than it is gets refused, quickly and in little memory.

Code that a file brings along would make a canary: a file of that name beside it.
"""

import bz2
import gzip
import json
import lzma
import os
import pickle
import re
import resource
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numcodecs
import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec

from affmae_engine.data.ingest import ingest
from affmae_engine.data.readers import limits, open_sources
from affmae_engine.data.readers.limits import trusted_sizes
from affmae_engine.data.readers.source import Source
from affmae_engine.data.readers.units import nanometres
from affmae_engine.errors import CorruptError, InputError

ALL = slice(None)
SECONDS, MEGABYTES = 2.0, 200
"""Half a second is the aim on a quiet machine; tests share theirs."""


class Quickly:
    """Context manager that asserts time and memory of what happens inside."""

    def __enter__(self) -> None:
        self._began = time.monotonic()
        self._before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def __exit__(self, *_: object) -> None:
        assert time.monotonic() - self._began < SECONDS
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._before < MEGABYTES * 1024


def read(path: Path) -> np.ndarray:
    (source,) = open_sources(path)
    with source:
        return source.read(ALL, ALL, ALL)


def tiff(path: Path, *, compression: int = 1, payload: bytes = b"\0" * 4096, width: int = 64, height: int = 64) -> Path:
    """A TIFF of one strip, made by hand so that it can lie."""
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, compression), (262, 3, 1, 1),
            (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, len(payload))]  # fmt: skip
    head = b"II*\0" + struct.pack("<I", 8 + len(payload)) + payload
    path.write_bytes(head + struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *t) for t in tags) + bytes(4))
    return path


def png(path: Path, width: int, height: int) -> Path:
    """A PNG whose header declares any size over a few bytes of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(900))) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize(
    ("width", "height", "compression"),
    [(131072, 131072, 1), (2**32 - 1, 2**32 - 1, 1), (40000, 40000, 8), (2**31, 9, 5), (60000, 60000, 7),
     (60000, 60000, 34712), (50000, 50000, 50000), (1 << 20, 1 << 20, 34925), (65000, 65000, 32773)],
)  # fmt: skip
def test_tiff_bombs_are_refused_by_their_header(tmp_path: Path, width: int, height: int, compression: int) -> None:
    path = tiff(tmp_path / "bomb.tif", width=width, height=height, compression=compression)
    with Quickly(), pytest.raises(InputError, match=r"bomb\.tif"):
        open_sources(path)


@pytest.mark.parametrize(("width", "height"), [(60000, 60000), (2**31 - 1, 2**31 - 1), (2**31 - 1, 200)])
def test_png_bombs_are_refused_by_their_header(tmp_path: Path, width: int, height: int) -> None:
    with Quickly(), pytest.raises(InputError, match=r"bomb\.png"):
        open_sources(png(tmp_path / "bomb.png", width, height))


def test_trusted_sizes_open_what_the_ratio_refuses(tmp_path: Path) -> None:
    path = tmp_path / "blank.tif"
    payload = imagecodecs.zstd_encode(np.zeros((20000, 20000), np.uint8))
    tiff(path, width=20000, height=20000, compression=50000, payload=payload)
    with pytest.raises(InputError, match="declares 381") as caught:
        open_sources(path)
    assert "--trust-sizes" in caught.value.hint
    with trusted_sizes():
        (source,) = open_sources(path)
        assert os.environ[limits.VARIABLE] == "1"
    assert source.info.shape_ZYX == (1, 20000, 20000) and limits.VARIABLE not in os.environ
    # What the file cannot hold is refused all the same.
    with trusted_sizes(), pytest.raises(InputError, match="declares"):
        open_sources(tiff(tmp_path / "short.tif", width=20000, height=20000))


LARGE = np.zeros((5000, 5000), np.uint8)


@pytest.mark.parametrize(
    ("compression", "encode"),
    [(7, imagecodecs.jpeg8_encode), (34712, imagecodecs.jpeg2k_encode), (34933, imagecodecs.png_encode),
     (50001, lambda a: imagecodecs.webp_encode(np.stack([a, a, a], -1)))],
)  # fmt: skip
def test_a_picture_in_a_tile_has_the_size_of_the_tile(
    tmp_path: Path, compression: int, encode: Callable[[np.ndarray], bytes]
) -> None:
    path = tiff(tmp_path / "a.tif", compression=compression, payload=encode(LARGE))
    with Quickly(), pytest.raises(InputError, match="5000 x 5000"):
        read(path)
    small = np.full((64, 64), 7, np.uint8)
    assert read(tiff(path, compression=compression, payload=encode(small))).shape == (1, 64, 64)


@pytest.mark.parametrize("compression", [50002, 34887, 34934])
def test_decoders_without_bounds_run_in_a_child(tmp_path: Path, compression: int) -> None:
    encode = {50002: imagecodecs.jpegxl_encode, 34887: imagecodecs.lerc_encode, 34934: imagecodecs.jpegxr_encode}
    small = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    options = {50002: {"lossless": True}, 34887: {}, 34934: {"level": 1.0}}[compression]
    path = tiff(tmp_path / "a.tif", compression=compression, payload=bytes(encode[compression](small, **options)))
    np.testing.assert_array_equal(read(path)[0], small)
    tiff(path, compression=compression)
    with pytest.raises(InputError, match=r"a\.tif"):
        read(path)


@pytest.mark.parametrize("compression", [34676, 32809, 64999])
def test_compressions_that_nobody_decodes_are_named(tmp_path: Path, compression: int) -> None:
    with pytest.raises(InputError, match="is not supported"):
        open_sources(tiff(tmp_path / "a.tif", compression=compression))


def chained(path: Path, pages: int, *, loop: bool = False) -> Path:
    """A TIFF with many page directories that share their pixels."""
    one = tiff(path, payload=bytes(16), width=4, height=4).read_bytes()
    start = 8 + 16
    directory = one[start:-4]
    size = len(directory) + 4
    parts = [one[:start]]
    for number in range(pages):
        following = start + (number + 1) * size if number + 1 < pages else start if loop else 0
        parts += [directory, struct.pack("<I", following)]
    path.write_bytes(b"".join(parts))
    return path


def test_page_chains_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Quickly(), pytest.raises(InputError, match="circular"):
        open_sources(chained(tmp_path / "loop.tif", 3, loop=True))
    monkeypatch.setattr("affmae_engine.data.readers.tiff.MOST_PAGES", 2000)
    assert open_sources(chained(tmp_path / "many.tif", 2000))[0].info.shape_ZYX[0] == 2000
    with Quickly(), pytest.raises(InputError, match="more than 2000 pages"):
        open_sources(chained(tmp_path / "many.tif", 20000))
    with trusted_sizes():
        assert open_sources(chained(tmp_path / "many.tif", 2001))[0].info.shape_ZYX[0] == 2001


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../secret.ome.tif", "\\\\server\\share\\a.tif", "a/../../secret.ome.tif"]
)
def test_files_that_ome_names_are_not_opened(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    tifffile.imwrite(tmp_path / "secret.ome.tif", np.full((16, 16), 77, np.uint8))
    xml = (
        '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image '
        'ID="Image:0"><Pixels ID="P:0" DimensionOrder="XYZCT" Type="uint8" SizeX="16" SizeY="16" SizeZ="2" SizeC="1" '
        f'SizeT="1"><TiffData IFD="0" FirstZ="0"/><TiffData IFD="0" FirstZ="1"><UUID FileName="{name}">urn:uuid:'
        "00000000-0000-0000-0000-000000000001</UUID></TiffData></Pixels></Image></OME>"
    )
    tifffile.imwrite(folder / "a.ome.tif", np.zeros((16, 16), np.uint8), description=xml, metadata=None)
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    for source in open_sources(folder / "a.ome.tif"):
        assert not (source.read(ALL, ALL, ALL) == 77).any()
    assert {Path(one).name for one in opened if one.endswith((".tif", "hostname"))} <= {"a.ome.tif"}


@pytest.mark.parametrize("size", ["nan", "-5", "inf", "1e400", "0", "x", ""])
def test_absurd_pixel_sizes_count_as_unknown(tmp_path: Path, size: str) -> None:
    assert nanometres(size, "nm") is None
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as writer:
        writer.write(
            np.zeros((9, 9), np.uint8), metadata={"axes": "YX", "PhysicalSizeX": 4.0625, "PhysicalSizeXUnit": "nm"}
        )
    content = (tmp_path / "a.ome.tif").read_bytes()
    changed = content.replace(b'PhysicalSizeX="4.0625"', f'PhysicalSizeX="{size}"'.ljust(22).encode())
    assert changed != content
    (tmp_path / "a.ome.tif").write_bytes(changed)
    assert open_sources(tmp_path / "a.ome.tif")[0].info.pixel_nm[2] is None


# Zarr ------------------------------------------------------------------------------------------------------------


def array(path: Path, version: int = 3, compressors: Any = "auto") -> Path:
    node = zarr.create_array(
        path, shape=(64, 64), dtype="u1", chunks=(64, 64), zarr_format=version, compressors=compressors, overwrite=True
    )
    node[:] = np.random.default_rng(0).integers(0, 9, (64, 64), np.uint8)
    return path


BOMB = bytes(1 << 28)
"""Far more than the 4 KiB that the arrays' chunks may hold."""


def zstd_without_size(data: bytes) -> bytes:
    """A frame of raw blocks that does not say how long it is."""
    blocks = [data[i : i + 100_000] for i in range(0, len(data), 100_000)]
    parts = [
        (len(block) << 3 | (index + 1 == len(blocks))).to_bytes(3, "little") + block
        for index, block in enumerate(blocks)
    ]
    return b"\x28\xb5\x2f\xfd\x00\x58" + b"".join(parts)


@pytest.mark.parametrize(
    ("version", "codec", "bomb"),
    [
        (3, ZstdCodec(), lambda: imagecodecs.zstd_encode(BOMB)),
        (3, ZstdCodec(), lambda: zstd_without_size(bytes(5 << 20))),
        (3, GzipCodec(), lambda: gzip.compress(BOMB, 1)),
        (3, BloscCodec(cname="zstd"), lambda: numcodecs.Blosc("zstd").encode(BOMB)),
        (2, numcodecs.Zstd(), lambda: imagecodecs.zstd_encode(BOMB)),
        (2, numcodecs.GZip(), lambda: gzip.compress(BOMB, 1)),
        (2, numcodecs.Zlib(), lambda: zlib.compress(BOMB, 1)),
        (2, numcodecs.BZ2(), lambda: bz2.compress(BOMB[: 1 << 26], 1)),
        (2, numcodecs.LZMA(), lambda: lzma.compress(BOMB[: 1 << 26], preset=0)),
        (2, numcodecs.LZ4(), lambda: bytes(numcodecs.LZ4().encode(BOMB))),
        (2, numcodecs.Blosc(), lambda: bytes(numcodecs.Blosc().encode(BOMB))),
    ],
)
def test_chunks_are_decoded_only_as_far_as_the_array_allows(
    tmp_path: Path, version: int, codec: Any, bomb: Callable[[], bytes]
) -> None:
    path = array(tmp_path / "a.zarr", version, codec)
    expected = zarr.open_array(path, mode="r")[:]
    np.testing.assert_array_equal(read(path)[0], expected)
    chunk = path / ("0.0" if version == 2 else "c/0/0")
    chunk.write_bytes(bomb())
    with Quickly(), pytest.raises(InputError, match=r"of memory|too small|damaged|size|reshape"):
        read(path)


def test_a_bomb_in_a_shard(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    node = zarr.create_array(
        path, shape=(64, 64), dtype="u1", chunks=(32, 32), shards=(64, 64), compressors=[ZstdCodec(), Crc32cCodec()]
    )
    node[:] = 1
    inner = imagecodecs.zstd_encode(BOMB)
    inner += _crc32c(inner)
    index = b"".join(struct.pack("<QQ", 0, len(inner)) for _ in range(4))
    (path / "c" / "0" / "0").write_bytes(inner + index + _crc32c(index))
    with Quickly(), pytest.raises(InputError):
        read(path)


def _crc32c(data: bytes) -> bytes:
    from google_crc32c import value

    return struct.pack("<I", value(data))


def test_links_that_multiply_and_pipes_that_block(tmp_path: Path) -> None:
    root = tmp_path / "a.zarr"
    zarr.create_group(root)
    array(root / "image")
    for number in range(40):
        (root / f"again{number}").symlink_to(root)
    with Quickly():
        assert len(open_sources(root)) == 1
    chunk = root / "image" / "c" / "0" / "0"
    chunk.unlink()
    os.mkfifo(chunk)
    with Quickly(), pytest.raises(InputError, match="neither a file nor a folder"):
        read(root)
    with Quickly():
        report = ingest([root], tmp_path / "store.zarr")
    assert not report.taken and "no file" in report.skipped[0].reason
    chunk.unlink()
    chunk.symlink_to("/dev/zero")
    with Quickly():
        report = ingest([root], tmp_path / "store.zarr")
    assert not report.taken and "link out of its folder" in report.skipped[0].reason


def test_links_out_of_our_own_store_are_refused(tmp_path: Path) -> None:
    from affmae_engine.data.store import Store

    tifffile.imwrite(tmp_path / "a.tif", np.ones((64, 64), np.uint8))
    ingest([tmp_path / "a.tif"], tmp_path / "store.zarr")
    folder = tmp_path / "store.zarr" / "images" / "a" / "0"
    (tmp_path / "linked.zarr").symlink_to(tmp_path / "store.zarr")  # the user's own link to the whole is fine
    assert Store.open(tmp_path / "linked.zarr").read("a", ALL, ALL, ALL).all()
    chunk = folder / "c" / "0" / "0" / "0"
    chunk.rename(tmp_path / "elsewhere")
    chunk.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptError, match="link"):
        Store.open(tmp_path / "store.zarr").read("a", ALL, ALL, ALL)
    chunk.unlink()
    (tmp_path / "elsewhere").rename(chunk)
    folder.parent.rename(tmp_path / "moved")
    folder.parent.symlink_to(tmp_path / "moved")
    with pytest.raises(CorruptError, match="link out of the dataset"):
        Store.open(tmp_path / "store.zarr").read("a", ALL, ALL, ALL)


@pytest.mark.parametrize(
    "change",
    [{"shape": [2**60, 2**60]}, {"shape": [2**34, 64]}, {"shape": [-1, 4]}, {"shape": []}, {"shape": [64] * 40},
     {"chunks": [2**34, 1]}, {"chunks": [0, 64]}, {"dtype": "|O"}, {"dtype": "|S9999999"}, {"dtype": [["a", "<u1"]]},
     {"filters": [{"id": "pickle"}]}, {"compressor": {"id": "pickle"}}, {"filters": [{"id": "json2"}]},
     {"filters": [{"id": "delta", "dtype": "|O"}]}, {"filters": [{"id": "delta", "dtype": "|S1000000000"}]},
     {"filters": "many"}, {"compressor": 7}, {"order": "Z"}, {"fill_value": "x" * 1000}, {"zarr_format": 9}],
)  # fmt: skip
def test_absurd_zarr_2_metadata_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = array(tmp_path / "a.zarr", 2, numcodecs.Zlib())
    metadata = json.loads((path / ".zarray").read_text())
    (path / ".zarray").write_text(json.dumps({**metadata, **change}))
    with Quickly():
        try:
            block = read(path)
        except InputError as error:
            assert "a.zarr" in error.message and "\n" not in error.message
        else:  # harmless: our reader does not need what was changed
            assert "zarr_format" in change or "fill_value" in change
            assert block.shape == (1, 64, 64)


class Canary:
    """Unpickling one makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_are_never_executed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    evil = np.array([Canary(canary)], dtype=object)
    np.save(tmp_path / "a.npy", evil, allow_pickle=True)
    np.savez(tmp_path / "a.npz", evil)
    (tmp_path / "a.tif").write_bytes(pickle.dumps(evil))
    path = array(tmp_path / "z.zarr", 2, numcodecs.Zlib())
    metadata = json.loads((path / ".zarray").read_text())
    (path / ".zarray").write_text(
        json.dumps({**metadata, "dtype": "|O", "filters": [{"id": "pickle"}], "compressor": None, "fill_value": 0})
    )
    (path / "0.0").write_bytes(pickle.dumps(evil))
    report = ingest([tmp_path], tmp_path / "store.zarr")
    assert not report.taken and len(report.skipped) == 4
    assert not canary.exists()
    pickle.loads(pickle.dumps(evil))  # noqa: S301 (the canary itself works)
    assert canary.exists()


ALLOWED = {
    ("kernels/cases.py", "import_module("),  # those of `OPERATIONS`
    ("affmae_engine/doctor/diagnosis.py", "import_module("),
    ("affmae_engine/__init__.py", "import_module("),  # those of its own table
    ("affmae_engine/bench/child.py", "import_module("),  # in a child process, what its parent asks for
    ("affmae_engine/export.py", "torch.jit.load("),  # the file that it has just written, to check it
    ("affmae_engine/pickled.py", "torch.load("),  # weights only, in a child process: see tests/test_packaging.py
}
"""What would be dangerous with a stranger's file, and is not done with one."""


def test_no_source_file_can_run_what_it_reads() -> None:
    forbidden = re.compile(
        r"\bpickle\.loads?\(|weights_only\s*=\s*False|allow_pickle\s*=\s*True|yaml\.load\(|(?<![.\w])(eval|exec)\("
        r"|torch\.(jit\.)?load\(|distributed\.checkpoint|os\.system\(|shell\s*=\s*True|import_module\("
    )
    root = Path(__file__).resolve().parents[3]
    sources = [file for name in ("affmae_cli", "affmae_engine", "kernels") for file in (root / name).rglob("*.py")]
    assert len(sources) > 100
    found = {
        f"{file.relative_to(root)}:{number}"
        for file in sources
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1)
        if (match := forbidden.search(line)) and (str(file.relative_to(root)), match[0]) not in ALLOWED
    }
    assert not found


def test_an_image_too_wide_for_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.zeros((300, 300), np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(limits, "LARGEST_PIECE", 80_000)
    with pytest.raises(InputError, match=r"87\.9 KiB once decoded") as caught:
        open_sources(tmp_path / "a.png")
    assert "--trust-sizes" in caught.value.hint
    tifffile.imwrite(tmp_path / "b.tif", np.zeros((300, 300), np.uint8))
    report = ingest([tmp_path / "b.tif"], tmp_path / "store.zarr")
    assert "a band of rows" in report.skipped[0].reason
    with trusted_sizes():
        assert isinstance(open_sources(tmp_path / "a.png")[0], Source)
