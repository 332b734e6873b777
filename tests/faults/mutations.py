"""Damaged inputs and stores: flipped bits, cuts, splices and zeros in files of every kind that `affmae` reads.

Whatever comes of it, it is either the work done or an error of ours: no other exception, no signal, no more than
`SECONDS`, no more than `MEMORY` beyond what the process had. Where the format promises to notice (checkpoints, our own
stores and journals), a result that differs is a fault too.
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numcodecs
import numpy as np
import tifffile
import zarr
from PIL import Image
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from affmae_engine import checkpoint
from affmae_engine.data.ingest import ingest
from affmae_engine.data.readers import scan_sources
from affmae_engine.data.store import Store
from affmae_engine.run_dir import RunDir
from tests.faults import children
from tests.faults.operations import begun, picture, require, tensors

SECONDS = 5.0
MEMORY = 512 << 20
ALL = slice(None)


@dataclass(frozen=True)
class Subject:
    """Something that is damaged: `make` builds it in a folder, `read` uses it as `affmae` would."""

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]


@dataclass(frozen=True)
class Mutant:
    """One damaged copy and what came of it; `problem` is empty when all was well."""

    subject: str
    file: str
    number: int
    refused: bool
    problem: str = ""


def mutate(data: bytes, chance: random.Random) -> bytes:
    """A damaged copy of `data`."""
    if not data:
        return bytes(chance.randrange(256) for _ in range(chance.randrange(1, 40)))
    changed = bytearray(data)
    match chance.randrange(7):
        case 0:
            for _ in range(chance.choice((1, 1, 1, 3, 10))):
                changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        case 1:
            del changed[chance.randrange(len(changed)) :]
        case 2:  # a piece of it somewhere else
            start, length = chance.randrange(len(changed)), chance.randrange(1, 64)
            at = chance.randrange(len(changed))
            changed[at : at + length] = changed[start : start + length]
        case 3:
            start = chance.randrange(len(changed))
            length = min(chance.choice((1, 4, 64, 4096)), len(changed) - start)
            changed[start : start + length] = bytes(length)
        case 4:  # the numbers that overflow
            at = chance.randrange(len(changed))
            extreme = chance.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff" * 8, b"\0\0\0\x80", b"-1", b"1e9"))
            changed[at : at + len(extreme)] = extreme
        case 5:
            start = chance.randrange(len(changed))
            del changed[start : start + chance.choice((1, 2, 8, 100))]
        case _:  # near the beginning, where headers are
            for _ in range(chance.choice((1, 2, 4))):
                changed[chance.randrange(min(256, len(changed)))] = chance.randrange(256)
    return bytes(changed)


def mutants(subject: Subject, root: Path, chance: random.Random, *, count: int) -> Iterator[Mutant]:
    """Damage one file of the subject at a time and use it in a child."""
    original, folder, log = root / "original", root / "work", root / "log"
    folder.mkdir(parents=True)
    ready = children.run(lambda: subject.make(folder), log)
    if ready.code != 0:
        raise RuntimeError(f"{subject.name} cannot be made: {ready.text}")
    whole = children.run(lambda: subject.read(folder), log)
    if whole.code != 0:
        raise RuntimeError(f"{subject.name} is refused undamaged: {whole.text}")
    folder.rename(original)
    names = sorted(file.relative_to(original) for file in original.rglob("*") if file.is_file())
    # Small files hold the metadata: each gets its share, however large the others are.
    for number in range(count):
        name = names[number % len(names)] if number % 2 else chance.choice(names)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        (folder / name).write_bytes(mutate((original / name).read_bytes(), chance))
        end = children.run(lambda: subject.read(folder), log, seconds=SECONDS, memory=MEMORY)
        problem = ""
        if end.hung:
            problem = f"took more than {SECONDS:g} s"
        elif not end.honest:
            problem = f"ended with {end.code}: {end.text[-600:]}"
        yield Mutant(subject.name, str(name), number, end.code > 0, problem)


# What is damaged -------------------------------------------------------------------------------------------------


def read_sources(path: Path) -> None:
    """Open and read all of it, as ingest and predict do."""
    for source in scan_sources(path)[0]:
        with source:
            depth, height, width = source.info.shape_ZYX
            # As much as one band of it: no damage may turn a small file into an afternoon.
            block = source.read(slice(0, min(depth, 4)), slice(0, min(height, 256)), slice(0, min(width, 256)))
            require(block.dtype == source.info.dtype, "another type than announced")


def _tiff(**options: object) -> Callable[[Path], object]:
    return lambda folder: tifffile.imwrite(folder / "a.tif", np.resize(picture(1), (3, 40, 36)), **options)


def _picture(suffix: str) -> Callable[[Path], object]:
    return lambda folder: Image.fromarray(np.resize(picture(1), (40, 36))).save(folder / f"a.{suffix}")


def _zarr(version: int, compressors: object) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        sharded = {"shards": (2, 24, 20)} if version == 3 else {}
        array = zarr.create_array(
            folder / "a.zarr", shape=(2, 24, 20), chunks=(1, 12, 20), dtype="u1", zarr_format=version,
            compressors=compressors, **sharded,
        )  # fmt: skip
        array[:] = picture(1)

    return make


def _mrc(folder: Path) -> None:
    header = bytearray(1024)
    struct.pack_into("<10i", header, 0, 20, 24, 2, 6, 0, 0, 0, 20, 24, 2)
    struct.pack_into("<3i", header, 64, 1, 2, 3)
    header[208:216] = b"MAP DD\0\0"
    (folder / "a.mrc").write_bytes(bytes(header) + picture(1).astype("<u2").tobytes())


def _npy(folder: Path) -> None:
    np.save(folder / "a.npy", picture(1))


def _packed(folder: Path) -> None:
    _npy(folder)
    (folder / "a.npy.gz").write_bytes(gzip.compress((folder / "a.npy").read_bytes()))
    (folder / "a.npy").unlink()


def _hdf5(folder: Path) -> None:
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("volumes/raw", data=picture(1), chunks=(1, 12, 20), compression="gzip")


def _n5(folder: Path) -> None:
    metadata = {
        "dataType": "uint8",
        "dimensions": [20, 24, 2],
        "blockSize": [20, 12, 1],
        "compression": {"type": "gzip"},
    }
    root = folder / "a.n5"
    for y in range(2):
        for z in range(2):
            block = root / "0" / f"{y}" / f"{z}"
            block.parent.mkdir(parents=True, exist_ok=True)
            pixels = picture(1)[z : z + 1, 12 * y : 12 * y + 12]
            block.write_bytes(struct.pack(">2H3I", 0, 3, 20, 12, 1) + gzip.compress(pixels.tobytes()))
    (root / "attributes.json").write_text(json.dumps(metadata))


def _store(folder: Path) -> None:
    source = folder.parent / "source.tif"
    tifffile.imwrite(source, picture(1))
    ingest([source], folder / "em.zarr", workers=1)


def _read_store(folder: Path) -> None:
    store = Store.open(folder / "em.zarr")
    for image in store.images:
        if image.name == "source":
            found = store.read("source", ALL, ALL, ALL)
            require(found.shape == (2, 24, 20) and np.array_equal(found, picture(1)), "other pixels were believed")


def _ingest_again(folder: Path) -> None:
    source = folder.parent / "source.tif"
    report = ingest([source], folder / "em.zarr", workers=1)
    require(report.images >= 1, "no image in it")


def _read_run(folder: Path) -> None:
    run = RunDir(folder / "run")
    run.read_config()
    newest = checkpoint.newest_valid(run, lambda message: None)
    if newest is None:
        return
    found = newest.weights()
    newest.optimizer(), newest.state()
    checkpoint.load_weights(run.root)
    require(all(bool((found[name] == values).all()) for name, values in tensors(newest.step).items()), "other weights")


def _read_weights(folder: Path) -> None:
    """A single file from a stranger, with no manifest beside it."""
    checkpoint.load_weights(folder / "a.safetensors")


def _weights(folder: Path) -> None:
    run = begun(folder, (1,))
    (run.checkpoint(1) / checkpoint.WEIGHTS).rename(folder / "a.safetensors")
    shutil.rmtree(run.root)


SUBJECTS = (
    Subject("tiff", _tiff(), lambda folder: read_sources(folder / "a.tif")),
    Subject("tiff-deflate-tiled", _tiff(compression="zlib", tile=(16, 16)), lambda f: read_sources(f / "a.tif")),
    Subject("tiff-lzw", _tiff(compression="lzw", predictor=True), lambda folder: read_sources(folder / "a.tif")),
    Subject("tiff-jpeg", _tiff(compression="jpeg"), lambda folder: read_sources(folder / "a.tif")),
    Subject("tiff-ome", _tiff(ome=True, compression="zstd"), lambda folder: read_sources(folder / "a.tif")),
    Subject("tiff-imagej", _tiff(imagej=True), lambda folder: read_sources(folder / "a.tif")),
    Subject("bigtiff", _tiff(bigtiff=True, compression="lzma"), lambda folder: read_sources(folder / "a.tif")),
    Subject("png", _picture("png"), lambda folder: read_sources(folder / "a.png")),
    Subject("jpeg", _picture("jpg"), lambda folder: read_sources(folder / "a.jpg")),
    Subject("jpeg2000", _picture("jp2"), lambda folder: read_sources(folder / "a.jp2")),
    Subject("zarr3", _zarr(3, [ZstdCodec(), Crc32cCodec()]), lambda folder: read_sources(folder / "a.zarr")),
    Subject("zarr3-blosc", _zarr(3, [BloscCodec()]), lambda folder: read_sources(folder / "a.zarr")),
    Subject("zarr2-blosc", _zarr(2, numcodecs.Blosc()), lambda folder: read_sources(folder / "a.zarr")),
    Subject("zarr2-zlib", _zarr(2, numcodecs.Zlib()), lambda folder: read_sources(folder / "a.zarr")),
    Subject("tiff-jpeg2000", _tiff(compression="jpeg2000"), lambda folder: read_sources(folder / "a.tif")),
    Subject("mrc", _mrc, lambda folder: read_sources(folder / "a.mrc")),
    Subject("npy", _npy, lambda folder: read_sources(folder / "a.npy")),
    Subject("packed", _packed, lambda folder: read_sources(folder / "a.npy.gz")),
    Subject("hdf5", _hdf5, lambda folder: read_sources(folder / "a.h5")),
    Subject("n5", _n5, lambda folder: read_sources(folder / "a.n5")),
    Subject("zarr2-lz4", _zarr(2, numcodecs.LZ4()), lambda folder: read_sources(folder / "a.zarr")),
    Subject("dataset", _store, _read_store),
    Subject("dataset-ingest", _store, _ingest_again),
    Subject("run", lambda folder: begun(folder, (1, 2)), _read_run),
    Subject("weights", _weights, _read_weights),
)
