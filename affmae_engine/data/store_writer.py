"""Writing a dataset store: shard by shard, each synced before the ledger says that it is there.

Only one process writes a store at a time (flock, released by the kernel when the holder dies). Any number of threads
of it may write different bands. What a killed writer left behind (temporary files, half an image) is found through the
ledger by the next one and continued or removed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from affmae_engine import atomic
from affmae_engine.data import ledger as ledgers
from affmae_engine.data.readers.files import natural_key
from affmae_engine.data.readers.source import PixelSize
from affmae_engine.data.statistics import pool
from affmae_engine.data.store_layout import (
    SCHEMA_VERSION,
    Band,
    StoredImage,
    StorePaths,
    bands,
    chunk_shapes,
    image_attributes,
    label_attributes,
    safe_name,
)
from affmae_engine.errors import ConfigError
from affmae_engine.runtime.locks import FileLock

_ZSTD_LEVEL = 3
_WRITE_ALL = {"write_empty_chunks": True}  # an all-zero chunk is a fact about the image, not an absence
_GROUP = {"zarr_format": 3, "node_type": "group"}
_RESERVED = "zarr.json"  # lies in the folder of the images; `safe_name` yields no name that begins with a dot


class StoreWriter:
    """Context manager that holds a store for writing; creates it when it does not exist.

    Raises (on entering):
        ConfigError: the place is taken by something that is not a dataset.
        BusyError: another process writes this store.
        CorruptError: its ledger is damaged.
        ResourceError: it cannot be created or written to.
    """

    def __init__(self, path: Path, *, class_names: Sequence[str] = ()) -> None:
        self.paths = StorePaths(path)
        self._class_names = tuple(class_names)
        self._lock = FileLock(self.paths.lock, f"{path} is being written", "wait for it, or choose another -o/--out")

    def __enter__(self) -> Self:
        root = self.paths.root
        if root.is_dir() and any(root.iterdir()) and not self.paths.private.is_dir():
            raise ConfigError(f"{root} exists and is not a dataset", "choose another -o/--out")
        atomic.ensure_folder(root)
        with atomic.translated_write_errors(root):
            self.paths.private.mkdir(exist_ok=True)
        self._lock.acquire()
        try:
            self._prepare()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.ledger.close()
            if kind is None:
                self._write_group()
        finally:
            self._lock.release()

    @property
    def images(self) -> dict[str, StoredImage]:
        """Finished images by name."""
        return self._state.images

    def begun(self, identity: dict[str, Any]) -> str | None:
        """Name of an image that was begun with exactly this identity and not finished."""
        return next((name for name, one in self._state.begun.items() if one.identity == identity), None)

    def unfinished(self) -> dict[str, dict[str, Any]]:
        """Identities of images that were begun and not finished, by name."""
        return {name: one.identity for name, one in self._state.begun.items()}

    def free_name(self, wished: str) -> str:
        """A safe array name that is not yet used in this store."""
        return safe_name(wished, {_RESERVED, *(name.lower() for name in (*self._state.images, *self._state.begun))})

    def begin(
        self, name: str, identity: dict[str, Any], image: StoredImage, labels_dtype: np.dtype[Any] | None
    ) -> ImageWriter:
        """Create the arrays of an image, or continue one that was begun with the same name and identity."""
        resumed = self._state.begun.get(name)
        if resumed is None:
            resumed = self._state.begun[name] = ledgers.Begun(identity)
            self.ledger.append("begin", name=name, identity=identity)
        return ImageWriter(self, replace(image, name=name), labels_dtype, resumed)

    def finish(self, image: StoredImage) -> None:
        """Record an image whose bands are all written."""
        self.ledger.append("image", record=image.to_dict())
        self._state.begun.pop(image.name, None)
        self._state.images[image.name] = image

    def set_pixel_size(self, name: str, pixel_nm: PixelSize) -> None:
        """Correct the pixel size of a finished image."""
        image = replace(self._state.images[name], pixel_nm=pixel_nm)
        for labels in (False, True) if image.labelled else (False,):
            atomic.sweep(self.paths.node(name, labels=labels))
            _write_attributes(self.paths.node(name, labels=labels), name, pixel_nm, labels=labels)
        self.finish(image)

    def drop(self, name: str) -> None:
        """Forget an image and delete its data."""
        self.ledger.append("drop", name=name)
        self._state.begun.pop(name, None)
        self._state.images.pop(name, None)
        for labels in (False, True):
            shutil.rmtree(self.paths.node(name, labels=labels), ignore_errors=True)

    def _prepare(self) -> None:
        for place in (self.paths.root, self.paths.private, self.paths.root / "images", self.paths.root / "labels"):
            atomic.sweep(place)
        if not self.paths.ledger.exists():
            ledgers.write_compact(self.paths.ledger, ledgers.LedgerState())
        self._state = ledgers.replay(self.paths.ledger)
        self.ledger = ledgers.Ledger(self.paths.ledger, self._state.valid_bytes)
        for name in [name for name in self._state.begun if name.lower() == _RESERVED]:
            self.drop(name)  # an earlier version began it, and could not make its folder
        for name in self._state.begun:
            for labels in (False, True):
                atomic.sweep(self.paths.node(name, labels=labels))
                _remove_partials(self.paths.array(name, labels=labels))
        for folder in ("images", "labels", "affmae"):
            with atomic.translated_write_errors(self.paths.root):
                (self.paths.root / folder).mkdir(exist_ok=True)
            atomic.commit_json(self.paths.root / folder / "zarr.json", {**_GROUP, "attributes": {}})
        self._write_root()

    def _write_group(self) -> None:
        """Bring the group's metadata in line with its content and shorten the ledger."""
        labelled = sorted(image.name for image in self._state.images.values() if image.labelled)
        ome = {"ome": {"version": "0.5", "labels": labelled}} if labelled else {}
        atomic.commit_json(self.paths.root / "labels" / "zarr.json", {**_GROUP, "attributes": ome})
        # In the order of their names: which thread was the first to finish must not show in the bytes.
        self._state.images = dict(sorted(self._state.images.items(), key=lambda item: natural_key(item[0])))
        self._write_root()
        ledgers.write_compact(self.paths.ledger, self._state)

    def _write_root(self) -> None:
        images = self._state.images.values()
        content: dict[str, Any] = {"schema": SCHEMA_VERSION, "images": len(images)}
        if images:
            content["statistics"] = pool([image.statistics for image in images]).to_dict()
        names = self._class_names or self._earlier_class_names()
        if names:
            content["class_names"] = list(names)
        atomic.commit_json(self.paths.root / "zarr.json", {**_GROUP, "attributes": {"affmae": content}})

    def _earlier_class_names(self) -> tuple[str, ...]:
        try:
            attributes = json.loads((self.paths.root / "zarr.json").read_text("utf-8"))["attributes"]["affmae"]
            return tuple(str(name) for name in attributes.get("class_names", ()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return ()  # a new store, or one whose root is being repaired


class ImageWriter:
    """The arrays of one image while they are filled, band by band."""

    def __init__(
        self, store: StoreWriter, image: StoredImage, labels_dtype: np.dtype[Any] | None, begun: ledgers.Begun
    ) -> None:
        self.image = image
        self._store = store
        self._begun = begun
        _, shard = chunk_shapes(image.shape_ZYX, image.dtype.itemsize)
        self.bands = list(bands(image.shape_ZYX, shard))
        """All bands, finished or not; labels use the same ones."""
        self._grey = self._array(image.dtype, labels=False)
        self._labels = self._array(labels_dtype, labels=True) if labels_dtype is not None else None
        # A power cut may have taken folders that the ledger's lines counted on: what is not there is not done.
        arrays = [array for array in (self._grey, self._labels) if array is not None]
        begun.chunks = {key for key in begun.chunks if all(_shard(array, key).is_file() for array in arrays)}

    def is_done(self, band: Band) -> bool:
        """Whether a band was written, by this or an earlier process."""
        return band.key in self._begun.chunks

    def write(self, band: Band, grey: np.ndarray, labels: np.ndarray | None = None) -> None:
        """Write one band [z, Y, X], with its labels if the image has any, and record it.

        Raises:
            ResourceError: the disk is full or cannot be written to.
        """
        for array, block in ((self._grey, grey), (self._labels, labels)):
            if array is None or block is None:
                continue
            with atomic.translated_write_errors(self._store.paths.root):
                file = _shard(array, band.key)
                file.unlink(missing_ok=True)  # what is there is no band yet, or damaged; zarr would read it
                array[band.z, band.y, :] = block
                atomic.fsync_file(file)
                atomic.fsync_folder(file.parent)
        self._store.ledger.append("chunk", name=self.image.name, key=band.key)
        self._begun.chunks.add(band.key)

    def read(self, band: Band) -> np.ndarray | None:
        """Grey values of a finished band; None when it, or its labels, were damaged and must be written again."""
        try:
            if self._labels is not None:
                np.asarray(self._labels[band.z, band.y, :])
            return np.asarray(self._grey[band.z, band.y, :])
        except Exception:  # whatever the codecs make of damaged bytes
            return None

    def finish(self, image: StoredImage) -> None:
        """Record the image as finished; every band must be done."""
        assert all(self.is_done(band) for band in self.bands), image.name
        for labels in (False, True):
            folder = self._store.paths.node(image.name, labels=labels)
            if folder.is_dir():
                with atomic.translated_write_errors(folder):
                    atomic.fsync_file(folder / "0" / "zarr.json")
                    for path in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
                        atomic.fsync_folder(path)
                    atomic.fsync_folder(folder)
                    atomic.fsync_folder(folder.parent)
        self._store.finish(image)

    def _array(self, dtype: np.dtype[Any], *, labels: bool) -> Any:
        image, paths = self.image, self._store.paths
        folder = paths.array(image.name, labels=labels)
        if self._begun.chunks:
            with contextlib.suppress(Exception):  # metadata that a power cut emptied: the image is begun anew
                return zarr.open_array(folder, mode="r+").with_config(_WRITE_ALL)
            self._begun.chunks.clear()
        chunk, shard = chunk_shapes(image.shape_ZYX, image.dtype.itemsize)
        with atomic.translated_write_errors(paths.root):
            shutil.rmtree(folder.parent, ignore_errors=True)
            folder.parent.mkdir(parents=True)
            _write_attributes(folder.parent, image.name, image.pixel_nm, labels=labels)
            return zarr.create_array(
                folder,
                shape=image.shape_ZYX,
                dtype=dtype,
                chunks=chunk,
                shards=shard,
                compressors=[ZstdCodec(level=_ZSTD_LEVEL), Crc32cCodec()],
                fill_value=0,
                dimension_names=["z", "y", "x"],
                config=_WRITE_ALL,
            )


def _shard(array: Any, key: str) -> Path:
    """The file of a band."""
    return Path(array.store_path.store.root) / "c" / key


def _write_attributes(node: Path, name: str, pixel_nm: PixelSize, *, labels: bool) -> None:
    attributes = (label_attributes if labels else image_attributes)(name, pixel_nm)
    atomic.commit_json(node / "zarr.json", {**_GROUP, "attributes": attributes})


def _remove_partials(folder: Path) -> None:
    """Delete temporary files that Zarr leaves when it is killed in the middle of a write."""
    if folder.is_dir():
        for path in folder.rglob("*.partial"):
            path.unlink(missing_ok=True)
